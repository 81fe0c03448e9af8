"""A pass of real Ray Data, scripted engines, whose judge is behind an endpoint: counted at the server."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from spa_ray.config.budget import Budget
from spa_ray.config.models import Config
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.data.schemas import PROMPTS
from spa_ray.engine.openai import BudgetSpentError
from spa_ray.errors import InputError, RunError
from spa_ray.generation import endpoint_actor
from spa_ray.generation.budget import Meter
from spa_ray.generation.setup import Task
from spa_ray.generation.stage import PassCounts, generate
from tests.fake_endpoint import FakeEndpoint, running
from tests.scripted import WEIGHTS, scripted_config

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("ray_session")]

PROMPT_COUNT = 12
PLACES = 3


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stage") / "prompts.parquet"
    rows = [
        {"prompt_id": f"p{k:02d}", "messages": [{"role": "user", "content": f"question {k}?"}], "meta": "{}"}
        for k in range(PROMPT_COUNT)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=PROMPTS), path)
    return path


def config(fake: FakeEndpoint, **judge: Any) -> Config:
    section = {"kind": "endpoint", "base_url": fake.url, "model": "judge", "max_concurrency": PLACES, **judge}
    return scripted_config(
        {"jitter": 0.02},
        scoring={"mode": "regex", "judge": section},
        generation={"rows_per_block": 2},
        resources={"engines": {"min": 2, "max": 2}, "concurrency": 4},
    )


def play(config: Config, prompts: Path, folder: Path) -> PassCounts:
    out, checkpoint = folder / "episodes", folder / "checkpoint"
    meter = Meter(folder / "spent", config.budget)
    with meter.stage("generate", gpus=0):
        return generate(
            config, Task(), prompts=prompts, out=out, checkpoint=checkpoint, model=WEIGHTS, config_hash="h", meter=meter
        )


def rating(number: int, body: dict[str, Any]) -> str:
    """The same score for the same answer, in whichever order they are asked."""
    return f"so: [[{len(body['messages'][-1]['content']) % 10 + 1}]]"


def asked(fake: FakeEndpoint) -> tuple[int, int]:
    """Requests, and distinct ones."""
    return len(fake.bodies), len({json.dumps(body["messages"]) for body in fake.bodies})


def asking() -> int:
    """The process of the actor that asks; one of an earlier test may be about to end."""
    actors = [p for p in psutil.process_iter(["name", "cmdline", "create_time"])
              if any("EndpointActor" in part for part in p.info["cmdline"] or ())]  # fmt: skip
    return max(actors, key=lambda p: p.info["create_time"]).pid


def test_two_engines_share_one_limit_and_every_answer_is_scored_and_the_key_is_in_no_file(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "sk-not-to-be-seen-0123456789"
    monkeypatch.setenv("JUDGE_KEY", secret)
    with running(FakeEndpoint(rating, delay=0.02, key=secret)) as fake:
        judge = {"price": {"input": 1.0, "output": 1.0}, "api_key_env": "JUDGE_KEY"}
        counts = play(config(fake, **judge), prompts, tmp_path)
        rows = EpisodeFolder(tmp_path / "episodes").table().to_pylist()
        assert len(rows) == PROMPT_COUNT
        for row in rows:
            assert row["error"] is None
            assert [r["score_status"] for r in row["responses"]] == [["ok", "ok"]] * 6
        assert fake.most_inside == PLACES
        requests, distinct = asked(fake)
        assert requests == distinct
        assert counts.judge is not None
        assert counts.judge["requests"] == requests
        assert counts.judge["usd"] == pytest.approx(12 * requests / 1e6)
        assert fake.keys == {f"Bearer {secret}"}
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    for file in (*tmp_path.rglob("*"), *session.rglob("*")):  # the run's, and Ray's logs
        assert not file.is_file() or secret.encode() not in file.read_bytes()


def test_a_dead_endpoint_ends_the_pass_and_no_stage_of_the_run_asks_again_what_it_answered(
    prompts: Path, tmp_path: Path
) -> None:
    stages = tmp_path / "run" / "stages"

    def dies(number: int, body: dict[str, Any]) -> Any:
        return rating(number, body) if number < 40 else (500, {}, "{}")

    with running(FakeEndpoint(dies)) as fake:
        with pytest.raises(RunError, match=r"generate: endpoint http.*, model judge: .* requests failed"):
            play(config(fake, retries=0), prompts, stages / "generate-a")
        before = len(fake.bodies)
        answered = {json.dumps(body["messages"]) for body in fake.bodies[:40]}
        assert len(answered) == 40
        fake.act = rating
        play(config(fake, retries=0), prompts, stages / "generate-b")
        again = [json.dumps(body["messages"]) for body in fake.bodies[before:]]
        assert not answered & set(again)
        assert len(again) == len(set(again))


@pytest.mark.long
def test_a_budget_ends_the_pass_before_it_is_passed_and_a_larger_one_goes_on_without_asking_twice(
    prompts: Path, tmp_path: Path
) -> None:
    price = {"input": 0, "output": 1}  # an answer costs 2 millionths, and might cost scoring.max_tokens, 8
    with running(FakeEndpoint(rating, delay=0.02)) as fake:
        small = config(fake, price=price).model_copy(update={"budget": Budget(usd=101e-6)})
        small = small.model_copy(update={"resources": small.resources.model_copy(update={"concurrency": 1})})
        told = r"^generate: what is left of budget\.usd may not be enough for one more request; \d+ of 12 prompts are"
        with pytest.raises(BudgetSpentError, match=told) as first:
            play(small, prompts, tmp_path)
        assert "raise it and run the same command again" in str(first.value)
        assert 40 <= len(fake.bodies) <= 50
        done = EpisodeFolder(tmp_path / "episodes").table().to_pylist()
        assert str(len(done)) in str(first.value)
        assert 0 < len(done) < PROMPT_COUNT
        assert all(row["error"] is None for row in done)
        before = len(fake.bodies)
        with pytest.raises(BudgetSpentError):  # the same again: other requests under way may just fit
            play(small, prompts, tmp_path)
        assert len(fake.bodies) <= 50
        counts = play(small.model_copy(update={"budget": None}), prompts, tmp_path)
        rows = EpisodeFolder(tmp_path / "episodes").table().to_pylist()
        assert [len(rows), {row["error"] for row in rows}] == [PROMPT_COUNT, {None}]
        requests, distinct = asked(fake)
        assert requests == distinct > before
        assert counts.judge is not None
        account = {key: round(value, 9) for key, value in counts.judge.items() if key != "cached"}
        assert account == {
            "requests": requests, "retries": 0, "prompt_tokens": 10 * requests, "generated_tokens": 2 * requests,
            "usd": round(2e-6 * requests, 9),
        }  # fmt: skip
        assert counts.judge["cached"] > 0
        spent = Meter(tmp_path / "spent", None).total()
        assert spent.usd == pytest.approx(2e-6 * requests)
        assert spent.tokens > 12 * requests  # and the engines'


@pytest.mark.long
def test_an_actor_that_asks_and_hangs_ends_the_pass(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_actor, "SIGN_OF_LIFE", 20.0)  # it has to start within twice that
    stopped: list[int] = []

    def stop(number: int, body: dict[str, Any]) -> str:
        if number >= 10 and not stopped:
            stopped.append(asking())
            os.kill(stopped[0], signal.SIGSTOP)
        return rating(number, body)

    with running(FakeEndpoint(stop, delay=0.02)) as fake:
        try:
            with pytest.raises(
                RunError, match=r"generate: endpoint actor \w+, which asks http\S+, gave no sign of life"
            ):
                play(config(fake), prompts, tmp_path)
        finally:
            os.kill(stopped[0], signal.SIGKILL)


@pytest.mark.long
def test_after_the_asking_process_is_killed_only_what_was_under_way_is_asked_again(
    prompts: Path, tmp_path: Path
) -> None:
    with running(FakeEndpoint(rating, delay=0.1)) as fake:
        failed: list[BaseException] = []

        def run() -> None:
            try:
                play(config(fake), prompts, tmp_path)
            except BaseException as e:  # noqa: BLE001 looked at below
                failed.append(e)

        passing = threading.Thread(target=run)
        passing.start()
        for at in (20, 60):
            while len(fake.bodies) < at:
                time.sleep(0.02)
                assert passing.is_alive()
            os.kill(asking(), signal.SIGKILL)
            time.sleep(0.5)
        passing.join(180)
        assert not failed
        requests, distinct = asked(fake)
        assert distinct < requests <= distinct + 2 * PLACES
        assert all(row["error"] is None for row in EpisodeFolder(tmp_path / "episodes").table().to_pylist())


def test_a_wrong_model_ends_it_before_an_engine_starts(prompts: Path, tmp_path: Path) -> None:
    with running(FakeEndpoint(models=("other",))) as fake:
        with pytest.raises(InputError, match="serves no model 'judge'; it serves other"):
            play(config(fake), prompts, tmp_path)
        assert not fake.bodies
