"""A job on an autoscaling cluster: nodes come because engines ask for GPUs, and go when the engines are gone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as pds
import pytest

from tests.fake_cluster import FakeCluster, fake_cluster, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.long]

REPOSITORY = Path(__file__).parents[1]
PROMPTS = 24
ENGINES = 2
AGENT_SECONDS = 60.0
JOB_SECONDS = 240.0
IDLE_SECONDS = 60.0
REFUSED_SECONDS = 180.0  # importing, connecting, looking at the cluster, on a busy machine; the wait for nodes is 900


@dataclass(frozen=True)
class Job:
    """A finished job: how many worker nodes lived how many seconds after it was submitted, what it said and left."""

    nodes: list[tuple[float, int]]
    status: str
    logs: str
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads(self.logs.strip().splitlines()[-1])["arms"]["main"]["iterations"][0]

    @property
    def asked(self) -> list[str]:
        return (self.folder / "asked.log").read_text().splitlines()


def config(folder: Path, engines: tuple[int, int], *, prompts: int, jitter: float, gpus: int) -> Path:
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "question {k}?"}}\n' for k in range(prompts)))
    written = {
        "run_dir": str(folder / "run"),
        "model": {
            "path": "package://spa_ray.microworld/model",
            "engine": "spa_ray.engine.scripted:ScriptedEngine",
            "engine_kwargs": {"jitter": jitter, "log": str(folder / "asked.log")},
        },
        "prompts": {"source": str(folder / "prompts.jsonl")},
        "sampling": {"max_tokens": 60},
        "generation": {"rows_per_block": 4},
        "resources": {
            "engines": {"min": engines[0], "max": engines[1]},
            "gpus_per_engine": gpus,
            "concurrency": 4,
        },
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(written))
    return path


def submit(
    cluster: FakeCluster,
    folder: Path,
    engines: tuple[int, int],
    *,
    prompts: int = PROMPTS,
    jitter: float = 0.05,
    gpus: int = 1,
) -> Job:
    """Submit the pipeline up to its build stage, and look at the cluster until it has ended."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(cluster.dashboard)
    path = config(folder, engines, prompts=prompts, jitter=jitter, gpus=gpus)
    nodes = [(0.0, cluster.workers())]
    jobs: list[str] = []
    entrypoint = f"python jobs/spa_pipeline.py --config {path} --until build"

    def submitted() -> bool:
        try:
            jobs.append(client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(REPOSITORY)}))
        except RuntimeError as e:  # the head's agent comes up a little later than its dashboard
            if "No available agent" not in str(e):
                raise
        return bool(jobs)

    wait_until(submitted, AGENT_SECONDS, "an agent that takes the job")
    began = time.monotonic()
    while not (status := client.get_job_status(jobs[0])).is_terminal() and time.monotonic() < began + JOB_SECONDS:
        nodes.append((time.monotonic() - began, cluster.workers()))
        time.sleep(0.3)
    return Job(nodes, str(status.value), client.get_job_logs(jobs[0]), folder)


@pytest.fixture(scope="module")
def cluster() -> Iterator[FakeCluster]:
    with fake_cluster({"CPU": 1, "GPU": 1}, max_workers=ENGINES) as running:
        yield running
    assert running.processes() == []


@pytest.fixture(scope="module")
def job(cluster: FakeCluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return submit(cluster, tmp_path_factory.mktemp("job"), (ENGINES, ENGINES))


def test_a_submitted_job_brings_its_nodes(job: Job) -> None:
    assert job.status == "SUCCEEDED", job.logs
    assert job.nodes[0] == (0.0, 0)
    assert max(count for _, count in job.nodes) == ENGINES


def test_it_leaves_every_prompts_episode_once_and_asked_no_request_twice(job: Job) -> None:
    table = pds.dataset(job.result["episodes"], format="parquet").to_table()
    assert table.num_rows == len(set(table["prompt_id"].to_pylist())) == PROMPTS
    assert table["error"].null_count == PROMPTS
    assert job.result["funnel"]["prompts"] == PROMPTS
    assert len(job.asked) == len(set(job.asked)) >= PROMPTS * (5 + 10 + 1 + 2)


def test_idle_nodes_go(cluster: FakeCluster, job: Job) -> None:
    wait_until(lambda: cluster.workers() == 0, IDLE_SECONDS, "the end of the idle nodes")


def test_a_job_that_no_node_type_can_hold_ends_at_once_and_brings_no_node(cluster: FakeCluster, tmp_path: Path) -> None:
    refused = submit(cluster, tmp_path, (1, 1), gpus=8)
    assert refused.status == "FAILED", refused.logs
    said = [line for line in refused.logs.splitlines() if line.startswith("spa: ")]
    assert len(said) == 1
    assert "GPU: 8" in said[0]
    assert max(count for _, count in refused.nodes) == refused.nodes[0][1]
    assert not (tmp_path / "asked.log").exists()
    assert refused.nodes[-1][0] < REFUSED_SECONDS
