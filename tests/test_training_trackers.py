"""Trackers: real TensorBoard files read back, fake Weights & Biases and MLflow that record what they are asked."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from spa_ray.config import load_config
from spa_ray.config.training import TRAIN_BYSTANDERS, Tracking
from spa_ray.errors import InputError
from spa_ray.pipeline.progress import train_counter
from spa_ray.pipeline.stages import STAGES
from spa_ray.training import comm
from spa_ray.training.job import TrainJob, TrainResult, read_job, write_job
from spa_ray.training.trackers import Trackers, check_backends, curves, open_trackers, run_id
from tests.training_support import make_job

NAMES = {"loss", "rewards/chosen", "rewards/accuracies", "learning_rate", "tokens/s", "epoch"}


def row(step: int, loss: float | None = None) -> dict[str, Any]:
    return {
        "step": step,
        "steps": 6,
        "epoch": step / 6,
        "loss": 1 / step if loss is None else loss,
        "rewards/chosen": -0.1 * step,
        "rewards/accuracies": 0.5,
        "learning_rate": 1e-6,
        "tokens/s": 1000.0,
        "warnings": ["text is no curve"],
    }


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    job = make_job(tmp_path, tmp_path / "model", tmp_path / "pairs")
    job.work.mkdir(parents=True)
    return job


def tracked(job: TrainJob, *backends: str) -> TrainJob:
    return replace(job, tracking=Tracking(backends=backends, project="curves"))  # type: ignore[arg-type]


def run(job: TrainJob, steps: range, *, end: bool = True, **values: float) -> Trackers:
    """Log these steps (from 1), as a run that starts where they start."""
    trackers = Trackers(job, fingerprint="f", first=steps.start - 1)
    for step in steps:
        assert trackers.log(row(step, **values)) == []
    if end:
        trackers.close()
    return trackers


# --- TensorBoard ----------------------------------------------------------------------------------------------------


def scalars(job: TrainJob) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(job.work / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_fields_names_and_steps(job: TrainJob) -> None:
    run(job, range(1, 4))
    found = scalars(job)
    assert found.keys() == NAMES
    assert found["loss"] == [(1, 1.0), (2, 0.5), (3, 0.3333)]


@pytest.mark.parametrize("saved", [0, 2])
def test_a_resume_continues_the_curves_and_what_it_does_again_stands_once(job: TrainJob, saved: int) -> None:
    trackers = run(job, range(1, 5), end=False, loss=9.0)  # killed after step 4, its last checkpoint at `saved`
    trackers.open["tensorboard"].writer.flush()  # type: ignore[attr-defined]
    run(job, range(saved + 1, 7), loss=7.0)
    assert scalars(job)["loss"] == [(s, 9.0) for s in range(1, saved + 1)] + [(s, 7.0) for s in range(saved + 1, 7)]


def test_with_no_backend_nothing_is_written(job: TrainJob) -> None:
    run(tracked(job), range(1, 3))
    assert list(job.work.iterdir()) == []


@pytest.mark.engine
def test_only_rank_zero_writes_and_its_errors_are_every_ranks(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch, one_process: None
) -> None:
    trackers = open_trackers(job, fingerprint="f", first=0)
    assert trackers is not None
    trackers.close()
    monkeypatch.setattr(comm, "on_rank_zero", lambda work: None)  # as on another rank
    assert open_trackers(job, fingerprint="f", first=0) is None


# --- Weights & Biases and MLflow, which are not installed -----------------------------------------------------------


class FakeWandb(ModuleType):
    """Records `init`, `log` and `finish`; fails at the step that it is told to."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []
        self.fail_at: int | None = None

    def init(self, **settings: Any) -> Any:
        self.calls.append(("init", settings))
        if self.fail_at == 0:
            raise RuntimeError("no\nnetwork")
        return SimpleNamespace(log=self.record, finish=lambda: self.calls.append(("finish", None)))

    def record(self, values: dict[str, float], *, step: int) -> None:
        if step == self.fail_at:
            raise ConnectionError("no\nnetwork")
        self.calls.append(("log", (step, values)))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_is_given_project_name_id_and_every_step(job: TrainJob, wandb: FakeWandb) -> None:
    job = tracked(job, "wandb")
    run(job, range(1, 3))
    (_, settings), *logged, (last, _) = wandb.calls
    assert settings["id"] == run_id(job, "f")
    assert (settings["project"], settings["name"], settings["resume"]) == ("curves", "job", "allow")
    assert settings["config"] == job.to_dict()
    assert [step for _, (step, _) in logged] == [1, 2]
    assert logged[0][1][1].keys() == NAMES
    assert last == "finish"


def test_a_runs_id_is_the_same_after_a_resume_and_another_for_other_runs(job: TrainJob, tmp_path: Path) -> None:
    assert run_id(job, "f") == run_id(replace(job, name="renamed"), "f")
    assert len({run_id(job, "f"), run_id(job, "g"), run_id(replace(job, work=tmp_path), "f")}) == 3


def test_a_tracker_that_fails_is_told_once_and_the_others_go_on(
    job: TrainJob, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    job = tracked(job, "wandb", "tensorboard")
    wandb.fail_at = 2
    trackers = Trackers(job, fingerprint="f", first=0)
    told = [trackers.log(row(step)) for step in range(1, 5)]
    trackers.close()
    assert [len(t) for t in told] == [0, 1, 0, 0]
    assert told[1][0].startswith("wandb failed (ConnectionError: no network); training goes on")
    assert [r.getMessage() for r in caplog.records] == [f"job job: {told[1][0]}"]
    assert [step for step, _ in scalars(job)["loss"]] == [1, 2, 3, 4]
    assert [what for what, _ in wandb.calls] == ["init", "log"]


def test_one_that_cannot_start_is_the_users_to_mend(job: TrainJob, wandb: FakeWandb) -> None:
    wandb.fail_at = 0
    with pytest.raises(InputError, match=r"wandb cannot start \(RuntimeError: no network\); mend that, or leave wandb"):
        Trackers(tracked(job, "tensorboard", "wandb"), fingerprint="f", first=0)


def test_one_that_cannot_start_again_does_not_stop_a_resume(job: TrainJob, wandb: FakeWandb) -> None:
    wandb.fail_at = 0
    trackers = Trackers(tracked(job, "tensorboard", "wandb"), fingerprint="f", first=3)
    (trouble,) = trackers.log(row(4))
    trackers.close()
    assert trouble.startswith("wandb failed")
    assert [step for step, _ in scalars(job)["loss"]] == [4]


class FakeMLflow:
    """A server's store: experiments, and runs with tags, parameters and metrics."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: list[SimpleNamespace] = []
        self.uris: list[str] = []

    def client(self, tracking_uri: str) -> FakeMLflow:
        self.uris.append(tracking_uri)
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, "7")

    def search_runs(self, experiments: list[str], *, filter_string: str, max_results: int) -> list[Any]:
        return [r for r in self.runs if filter_string == f"tags.spa_ray_id = '{r.tags['spa_ray_id']}'"][:max_results]

    def create_run(self, experiment: str, *, tags: dict[str, str], run_name: str) -> Any:
        info = SimpleNamespace(run_id=f"run{len(self.runs)}")
        self.runs.append(SimpleNamespace(info=info, name=run_name, tags=tags, params={}, metrics=[], status="RUNNING"))
        return self.runs[-1]

    def by_id(self, name: str) -> Any:
        return next(r for r in self.runs if r.info.run_id == name)

    def update_run(self, name: str, *, status: str) -> None:
        self.by_id(name).status = status

    def log_batch(self, name: str, *, metrics: Any = (), params: Any = ()) -> None:
        self.by_id(name).metrics += [(m.key, m.value, m.step) for m in metrics]
        self.by_id(name).params |= {p.key: p.value for p in params}

    def set_terminated(self, name: str) -> None:
        self.by_id(name).status = "FINISHED"


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMLflow:
    store = FakeMLflow()
    module, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    module.MlflowClient = store.client  # type: ignore[attr-defined]
    entities.Metric = lambda key, value, timestamp, step: SimpleNamespace(  # type: ignore[attr-defined]
        key=key, value=value, timestamp=timestamp, step=step
    )
    entities.Param = lambda key, value: SimpleNamespace(key=key, value=value)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return store


def test_mlflow_has_one_run_a_job_however_often_it_resumes(job: TrainJob, mlflow: FakeMLflow) -> None:
    job = tracked(job, "mlflow")
    run(job, range(1, 3))
    run(job, range(3, 5))
    (only,) = mlflow.runs
    assert (only.name, only.tags, only.status) == ("job", {"spa_ray_id": run_id(job, "f")}, "FINISHED")
    assert [step for key, _, step in only.metrics if key == "loss"] == [1, 2, 3, 4]
    assert {key for key, *_ in only.metrics} == NAMES
    assert only.params["train.method"] == '"spa"'
    assert mlflow.experiments == {"curves": "7"}
    assert mlflow.uris == [f"sqlite:///{job.work / 'mlflow.db'}"] * 2


def test_another_job_is_another_mlflow_run(job: TrainJob, mlflow: FakeMLflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    for work in ("a", "b"):
        run(replace(tracked(job, "mlflow"), work=job.work / work), range(1, 2))
    assert len(mlflow.runs) == 2
    assert mlflow.uris == ["http://there"] * 2


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_before_anything_starts(job: TrainJob, name: str) -> None:
    with pytest.raises(InputError, match=f"tracking.backends: {name} cannot be imported.*pip install {name}") as e:
        check_backends([name])  # type: ignore[list-item]
    assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="pip install"):
        Trackers(tracked(job, name), fingerprint="f", first=0)


# --- what is no part of a job's identity; what reaches the user -----------------------------------------------------


def test_only_numbers_that_change_are_curves() -> None:
    assert curves({"step": 1, "steps": 2, "loss": 1, "done": True, "warnings": ["x"], "name": "y"}) == {"loss": 1.0}


def test_neither_tracking_nor_how_a_run_is_watched_changes_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\nrun_dir: r\n")
    values = {
        "save_every_steps": 3,
        "save_every_minutes": 1.5,
        "keep_checkpoints": 7,
        "collapse_nats": "null",
        "on_collapse": "stop",
    }
    assert values.keys() == TRAIN_BYSTANDERS
    overrides = ["tracking.backends=[]", "tracking.project=p", *(f"train.{k}={v}" for k, v in values.items())]

    def hashed(*changes: str) -> str:
        return STAGES["train"].key(load_config(path, changes)["main"], {})

    assert {hashed(), *map(hashed, overrides)} == {hashed()}
    assert hashed("train.lr=1e-3") != hashed()


def test_a_job_travels_with_its_tracking(job: TrainJob) -> None:
    job = tracked(job, "wandb")
    assert TrainJob.from_dict(job.to_dict()) == replace(job, pairs=job.pairs.absolute())
    older = {key: value for key, value in job.to_dict().items() if key != "tracking"}
    assert TrainJob.from_dict(older).tracking == Tracking()
    write_job(job)
    assert read_job(job.work / "job.json") == TrainJob.from_dict(job.to_dict())


def test_warnings_of_a_row_are_said_and_are_kept_in_the_result() -> None:
    said: list[str] = []
    progress = SimpleNamespace(say=said.append, counter=lambda what: lambda update: None)
    report = train_counter(progress)  # type: ignore[arg-type]
    report({"job": "spa", "step": 1, "steps": 2, "warnings": ["a", "b"]})
    report({"job": "spa", "step": 2, "steps": 2})
    assert said == ["warning: train spa: a", "warning: train spa: b"]
    result = TrainResult("spa", Path("/m"), 2, 8, {}, {"loss": 1.0}, 3.0, warnings=["a"])
    assert TrainResult.from_dict(result.to_dict()) == result


def test_the_modules_that_others_import_early_stay_light() -> None:
    code = "import sys, spa_ray.training.guards, spa_ray.training.trackers; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
