"""`spa export`: a real DeepSpeed checkpoint or an adapter becomes the model folder that training itself would write."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spa_ray.cli.main import main
from spa_ray.errors import InputError, RunError
from spa_ray.training import checkpoint, comm, convert, hashes
from spa_ray.training.export import export_model
from spa_ray.training.job import TrainJob, write_job
from spa_ray.training.policy import make_engine
from tests.tiny_model import build_tiny_model
from tests.training_support import make_job

LORA = {"lora": {"r": 4, "alpha": 8.0}}
KINDS: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "tied": {"zero_stage": 2, "dtype": "bfloat16"},
    "lora2": {"zero_stage": 2, **LORA},
    "lora3": {"zero_stage": 3, **LORA},
}


@dataclass(frozen=True)
class Trained:
    """A job after three steps, checkpoints of steps 1 and 2, and the model folder of step 2 as training writes it."""

    job: TrainJob

    @property
    def work(self) -> Path:
        return self.job.work


def train(job: TrainJob) -> Trained:
    """A few AdamW steps without the step loop: what matters here is what DeepSpeed holds."""
    job.work.mkdir(parents=True)
    write_job(job)
    engine = make_engine(job)
    ids = np.random.default_rng(0).integers(8, 265, size=(6, 12))
    for step in (1, 2, 3):
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2
        summed, _ = engine(engine.module.collate([(row[:5], row[5:]) for row in ids], comm.device()))
        engine.backward(-summed.mean())
        engine.step()
        if step < 3:
            meta = checkpoint.CheckpointMeta(step, "mark", 1, job.train.zero_stage)
            frozen_excluded = job.train.lora is not None
            checkpoint.save(engine, job.work / "checkpoints", meta, keep=2, frozen_excluded=frozen_excluded)
        if step == 2:
            export_model(job, engine)
    engine.destroy()
    return Trained(job)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def trained(shared: Path, tiny_model: Path, one_process: None) -> Any:
    """The trained job of a kind, made once."""
    made: dict[str, Trained] = {}

    def get(kind: str) -> Trained:
        if kind not in made:
            model = build_tiny_model(shared / "tied_model", tie=True) if kind == "tied" else tiny_model
            made[kind] = train(make_job(shared, model, shared / "none.parquet", name=kind, **KINDS[kind]))
        return made[kind]

    return get


def moved_work(done: Trained, to: Path) -> Path:
    """A copy of a job's work folder, and of the record beside it."""
    shutil.copytree(done.work, to)
    shutil.copytree(done.work.with_name(f"{done.work.name}.checkpoints"), to.with_name(f"{to.name}.checkpoints"))
    return to


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


def files_of(model: Path) -> set[str]:
    return {str(p.relative_to(model)) for p in model.rglob("*") if p.is_file()}


def assert_same_model(a: Path, b: Path) -> None:
    left, right = weights_of(a), weights_of(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        assert torch.equal(value, right[name]), name


@pytest.mark.engine
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_becomes_the_model_of_its_step(trained: Any, tmp_path: Path, kind: str) -> None:
    done = trained(kind)
    out = convert.export(done.work, tmp_path / "out")
    assert_same_model(out, done.job.out)
    assert files_of(out) == files_of(done.job.out)
    assert json.loads((out / "config.json").read_text()) == json.loads((done.job.out / "config.json").read_text())
    earlier = weights_of(convert.export(done.work, tmp_path / "first", step=1))
    moved = [name for name, value in weights_of(out).items() if not torch.equal(value, earlier[name])]
    assert moved
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.engine
def test_the_exported_folder_is_loaded_by_transformers(trained: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = convert.export(trained("lora2").work, tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(out).chat_template


@pytest.mark.engine
def test_a_checkpoint_is_found_in_the_stage_the_work_folder_and_by_itself(trained: Any) -> None:
    done = trained("zero2")
    newest = done.work / "checkpoints" / "step_00000002"
    assert {convert.find_checkpoint(p, None) for p in (done.work.parent, done.work, newest)} == {newest}
    assert convert.find_checkpoint(done.work, 1) == newest.with_name("step_00000001")
    with pytest.raises(InputError, match=r"no checkpoint of step 7; there are \[1, 2\]"):
        convert.find_checkpoint(done.work, 7)


@pytest.mark.engine
def test_a_job_whose_model_moved_is_given_its_base(trained: Any, tmp_path: Path, tiny_model: Path) -> None:
    done = trained("lora2")
    moved = moved_work(done, tmp_path / "work")
    write_job(replace(done.job, work=moved, model=tmp_path / "gone"))
    with pytest.raises(InputError, match="gone"):
        convert.export(moved, tmp_path / "out")
    assert_same_model(convert.export(moved, tmp_path / "out", base=tiny_model), done.job.out)


@pytest.mark.engine
def test_a_checkpoint_of_another_architecture_is_refused(trained: Any, tmp_path: Path, shared: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = tmp_path / "other"
    shutil.copytree(build_tiny_model(tmp_path / "copied"), other)
    config = LlamaConfig.from_pretrained(other, hidden_size=32)
    LlamaForCausalLM(config).save_pretrained(other)
    with pytest.raises(InputError, match="does not fit"):
        convert.export(trained("zero2").work, tmp_path / "out", base=other)
    assert not (tmp_path / "out").exists()


@pytest.mark.engine
def test_a_damaged_checkpoint_is_named_and_never_read(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = moved_work(trained("zero2"), tmp_path / "work")
    newest = work / "checkpoints" / "step_00000002"
    for file in (newest / checkpoint.TAG).glob("*optim_states.pt"):
        file.write_bytes(file.read_bytes()[:1000])
    with monkeypatch.context() as m:
        m.setattr(torch, "load", lambda *a, **k: pytest.fail("was read"))
        with pytest.raises(InputError, match=r"step_00000002: not as the job wrote it \(state/"):
            convert.export(work, tmp_path / "out")
    hashes.write_record(newest, hashes.hash_files(newest))  # damaged before it was recorded
    with pytest.raises(RunError, match=r"step_00000002: the checkpoint cannot be read"):
        convert.export(work, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.engine
def test_a_checkpoint_without_its_jobs_record_is_refused_with_the_mend(spa: Any, trained: Any, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(trained("zero2").work, work)
    status, _, err = spa(work, "--out", tmp_path / "out")
    assert status == 2
    assert "it is not known whether this job wrote it" in err
    assert "export where the job ran, or bring" in err
    assert not (tmp_path / "out").exists()


class Trap:
    """A pickle that makes a folder when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["zero0", "zero2"])
def test_a_checkpoint_that_hides_code_runs_none_even_with_a_forged_record(
    trained: Any, tmp_path: Path, kind: str
) -> None:
    work = moved_work(trained(kind), tmp_path / "work")
    newest = work / "checkpoints" / "step_00000002"
    for file in (newest / checkpoint.TAG).glob("*_states.pt"):
        torch.save(Trap(tmp_path / "trapped"), file)
    hashes.write_record(newest, hashes.hash_files(newest))
    with pytest.raises(RunError, match=r"the checkpoint cannot be read \(Weights only load failed"):
        convert.export(work, tmp_path / "out")
    assert not (tmp_path / "trapped").exists()


# --- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_merging_an_adapter_gives_what_training_merged(trained: Any, tmp_path: Path, tiny_model: Path) -> None:
    done = trained("lora2")
    adapter = done.job.out / "adapter"
    merged = convert.export(tiny_model, tmp_path / "merged", adapter=adapter)
    alone = convert.export(adapter, tmp_path / "alone")  # names its base itself
    for out in (merged, alone):
        assert_same_model(out, done.job.out)
        assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert files_of(merged) >= files_of(tiny_model)


@pytest.mark.engine
def test_an_adapter_of_another_model_is_refused(trained: Any, tmp_path: Path, tiny_model: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(trained("lora2").job.out / "adapter", adapter)
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: torch.zeros(3, 3) for k in tensors}, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="does not fit the base model"):
        convert.export(tiny_model, tmp_path / "out", adapter=adapter)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_names_no_folder_wants_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name"}')
    with pytest.raises(InputError, match="'owner/name' is no folder here; give --base"):
        convert.export(tmp_path, tmp_path / "out")


# --- the hub and the command ----------------------------------------------------------------------------------------


class Hub:
    """What the hub's client was asked for; refuses with `error`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None

    def create_repo(self, repo: str, **settings: Any) -> str:
        if self.error is not None:
            raise self.error
        self.calls.append(("create_repo", {"repo": repo, **settings}))
        return f"https://hub/{repo}"

    def upload_folder(self, **settings: Any) -> None:
        self.calls.append(("upload_folder", settings))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    return fake


@pytest.fixture
def spa(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `spa export ARGS`; returns (exit status, stdout, stderr)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["spa", "export", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as e:
            status = int(e.code or 0)
        return (status, *capsys.readouterr())

    return call


def test_a_model_folder_is_pushed_as_it_is_and_private_unless_asked(spa: Any, hub: Hub, tiny_model: Path) -> None:
    status, out, _ = spa(tiny_model, "--push-to-hub", "me/model", "--json")
    assert status == 0
    assert json.loads(out.splitlines()[-1]) == {"model": str(tiny_model), "pushed": "https://hub/me/model"}
    (_, created), (_, uploaded) = hub.calls
    assert created == {"repo": "me/model", "private": True, "exist_ok": True, "repo_type": "model"}
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/model", tiny_model)
    spa(tiny_model, "--push-to-hub", "me/model", "--public")
    assert hub.calls[2][1]["private"] is False


@pytest.mark.engine
def test_what_was_exported_is_what_is_pushed(spa: Any, hub: Hub, trained: Any, tmp_path: Path) -> None:
    done = trained("zero2")
    status, out, _ = spa(done.work, "--out", tmp_path / "out", "--push-to-hub", "me/model", "--json")
    assert status == 0
    assert len(out.splitlines()) == 2  # nothing of DeepSpeed's
    assert hub.calls[1][1]["folder_path"] == tmp_path / "out"
    assert_same_model(tmp_path / "out", done.job.out)


@pytest.mark.engine
def test_nothing_is_pushed_unasked(spa: Any, hub: Hub, trained: Any, tmp_path: Path) -> None:
    assert spa(trained("zero2").work, "--out", tmp_path / "out")[0] == 0
    assert hub.calls == []


def test_a_hub_that_refuses_ends_with_one_line_and_status_1(spa: Any, hub: Hub, tiny_model: Path) -> None:
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    response = httpx.Response(403, request=httpx.Request("POST", "https://hub"))
    for error in (HfHubHTTPError("403 Forbidden", response=response), httpx.ConnectError("no network")):
        hub.error = error
        status, _, err = spa(tiny_model, "--push-to-hub", "me/model")
        assert status == 1
        assert err.count("\n") == 1
        assert "me/model: the hub did not take it" in err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["none", "--out", "out"], "no such folder"),
        (["{model}"], "--out is missing"),
        (["{model}", "--adapter", "{empty}", "--push-to-hub", "me/m"], "--out is missing"),
        (["{model}", "--out", "{empty}"], "stands already"),
        (["{model}", "--out", "{new}"], "is a complete model folder"),
        (["{empty}", "--out", "{new}"], "neither a model folder"),
        (["{model}", "--adapter", "{empty}", "--out", "{new}"], "not an adapter"),
        (["{empty}", "--adapter", "{model}", "--out", "{new}"], "not a model folder"),
        (["{unfinished}", "--out", "{new}"], "no checkpoint; there are []"),
        (["{stranger}", "--out", "{new}"], "job.json: missing"),
        (["{empty}", "--push-to-hub", "me/m"], "not a model folder"),
        (["{model}", "--push-to-hub", "no such name!"], "--push-to-hub"),
    ],
)
def test_each_mistake_ends_with_one_line_and_status_2(
    spa: Any, hub: Hub, tmp_path: Path, tiny_model: Path, arguments: list[str], part: str
) -> None:
    places = {"model": tiny_model, **{name: tmp_path / name for name in ("empty", "unfinished", "stranger", "new")}}
    places["empty"].mkdir()
    (places["unfinished"] / "checkpoints" / "step_00000001").mkdir(parents=True)
    complete = places["stranger"] / "checkpoints" / "step_00000001"
    (complete / "state").mkdir(parents=True)
    (complete / "meta.json").write_text('{"step": 1, "fingerprint": "f", "workers": 1, "zero_stage": 2}')
    status, _, err = spa(*(a.format(**places) for a in arguments))
    assert status == 2
    assert err.startswith("spa: ")
    assert err.count("\n") == 1
    assert part in err
    assert not places["new"].exists()
    assert hub.calls == []
