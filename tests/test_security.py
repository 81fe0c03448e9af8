"""What docs/SECURITY.md promises: no pickle and no code from a folder that a user names, no model text that a terminal
obeys, no secret in what a run leaves behind."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2.exceptions import SecurityError

from spa_ray.cli.guard import fail
from spa_ray.cli.main import emit
from spa_ray.config import arm_configs
from spa_ray.config.models import Model
from spa_ray.errors import InputError, RunError
from spa_ray.generation.templates import Templates
from spa_ray.objectives import load_objectives
from spa_ray.pipeline.inspect import print_story, run_configs
from spa_ray.pipeline.manifest import write_manifest, write_run_config
from spa_ray.pipeline.progress import Progress
from spa_ray.report.examples import Example, print_examples
from spa_ray.report.run_data import Answer, Asked
from spa_ray.storage.folder import RunFolder
from spa_ray.storage.model_folder import check_model_folder
from spa_ray.storage.weights import check_safetensors
from spa_ray.training import hashes
from tests.scripted import scripted_config

PACKAGE = Path(__file__).parents[1] / "spa_ray"
HOSTILE = "\x1b]0;owned\x07\x1b[2J[bold red]x[/bold red] [link=http://h]y[/link] \x9b31m \u202egnp.exe\r"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Trap:
    """A pickle that writes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a source file, with the dotted text of what is called."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


# --- models ---------------------------------------------------------------------------------------------------------


def test_every_model_is_loaded_from_safetensors_and_runs_code_only_where_that_was_asked_for() -> None:
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        for name, call in calls(path):
            if not name.endswith(".from_pretrained") or "PreTrainedTokenizerFast" in name or "PeftModel" in name:
                continue
            seen += 1
            if "AutoModel" in name:
                assert keyword(call, "use_safetensors") == "True", f"{path}: {ast.unparse(call)}"
            assert (keyword(call, "trust_remote_code") or "").split(".")[-1] == "trust_remote_code", path
    assert seen >= 5


def test_nothing_unpickles_or_evaluates_what_it_reads() -> None:
    barred = re.compile(
        r"(pickle|cloudpickle|dill|joblib|marshal|shelve)\.(load|loads|Unpickler|open)"
        r"|eval|exec|os\.system|yaml\.(load|full_load|unsafe_load)|pd\.read_pickle"
    )
    for path in PACKAGE.rglob("*.py"):
        for name, call in calls(path):
            assert not barred.fullmatch(name), f"{path}: {ast.unparse(call)}"
            if name == "torch.load":
                assert keyword(call, "weights_only") == "True", path
            assert keyword(call, "allow_pickle") in {None, "False"}, path
            assert keyword(call, "shell") in {None, "False"}, path


def test_code_of_a_model_folder_is_not_run_unless_asked() -> None:
    assert Model(path="m").trust_remote_code is False


@pytest.mark.parametrize("kind", ["auto", "pt", "npcache", "hf", "tensorizer"])
def test_an_engine_is_not_told_to_read_pickles(kind: str) -> None:
    with pytest.raises(InputError, match=f"engine_kwargs: load_format '{kind}' can read pickles"):
        arm_configs({"model": {"path": "m", "engine_kwargs": {"load_format": kind}}}, [], where="c", stem="c")


def test_a_folder_of_pickles_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    with pytest.raises(InputError, match=r"only pytorch_model.bin, a pickle.*save_pretrained\(NEW\)"):
        check_model_folder(tmp_path)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", ["pytorch_model-00001.bin", "../other/model.safetensors", 7])
def test_an_index_that_leads_to_anything_but_this_folders_safetensors_is_refused(tmp_path: Path, name: Any) -> None:
    (tmp_path / "model-00001.safetensors").touch()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    check_safetensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors", "b": name}}))
    with pytest.raises(InputError, match=r"names .*, which is no safetensors file of this folder"):
        check_safetensors(tmp_path)


def test_an_adapter_of_pickles_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    from spa_ray.training import convert

    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    with pytest.raises(InputError, match=r"no adapter_model.safetensors in it"):
        convert.export(tiny_model, tmp_path / "out", adapter=tmp_path)
    assert not (tmp_path / "trapped").exists()


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A recorded checkpoint of three files."""
    folder = tmp_path / "work" / "checkpoints" / "step_00000005"
    (folder / "state").mkdir(parents=True)
    for name in ("meta.json", "state/a.pt", "state/b.pt"):
        (folder / name).write_text(name)
    shares = [hashes.hash_files(folder, rank=rank, ranks=2) for rank in range(2)]
    assert not shares[0].keys() & shares[1].keys()
    hashes.write_record(folder, shares[0] | shares[1])
    return folder


def all_damage(checkpoint: Path, ranks: int) -> list[str]:
    return sorted(line for rank in range(ranks) for line in hashes.damage(checkpoint, rank=rank, ranks=ranks))


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_every_changed_missing_and_added_file_of_a_checkpoint_is_seen(checkpoint: Path, ranks: int) -> None:
    assert all_damage(checkpoint, ranks) == []
    (checkpoint / "state" / "a.pt").write_text("other")
    (checkpoint / "state" / "b.pt").unlink()
    (checkpoint / "state" / "c.pt").touch()
    assert all_damage(checkpoint, ranks) == [
        "state/a.pt has changed",
        "state/b.pt is gone",
        "state/c.pt is not the job's",
    ]


def test_the_record_lies_beside_the_work_folder_and_goes_with_its_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    record = tmp_path / "work.checkpoints" / "step_00000005.json"
    assert json.loads(record.read_text())["sha256"].keys() == {"meta.json", "state/a.pt", "state/b.pt"}
    hashes.forget(checkpoint.parent)
    assert record.exists()
    shutil.rmtree(checkpoint)
    hashes.forget(checkpoint.parent)
    assert not record.exists()


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"sha256": 3}'])
def test_a_checkpoint_without_a_record_is_nobodys(checkpoint: Path, text: str | None) -> None:
    record = Path(str(hashes.record_of(checkpoint)))
    record.unlink() if text is None else record.write_text(text)
    with pytest.raises(RunError, match="not known whether this job wrote it"):
        hashes.damage(checkpoint)


@pytest.mark.engine
def test_even_a_recorded_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"optimizer": Trap(tmp_path / "trapped"), "x": torch.ones(2)}, tmp_path / "a.pt")
    with hashes.no_code(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pt", weights_only=False)  # as DeepSpeed calls it
    assert not (tmp_path / "trapped").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


# --- templates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack",
    [
        "{{ question.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ objective.__init__.__globals__ }}",
        "{% set x = messages.clear() %}",
    ],
)
def test_a_prompt_template_reaches_nothing_but_its_variables(attack: str) -> None:
    config = scripted_config(scoring={"prompt": "{{ answer }}" + attack})
    with pytest.raises((InputError, SecurityError), match=r"unsafe|not safe|cannot be rendered"):
        Templates(config, load_objectives(config))


def test_a_prompt_or_an_answer_is_never_a_template() -> None:
    config = scripted_config()
    templates = Templates(config, load_objectives(config))
    attack = "{{ 7 * 7 }}{% for x in messages %}"
    shown = templates.score([{"role": "user", "content": attack}], attack, templates.objectives[0])
    assert shown.count(attack) == 2


# --- terminals ------------------------------------------------------------------------------------------------------


def test_an_error_that_quotes_a_model_or_a_secret_is_one_harmless_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "abc123def456")
    with pytest.raises(SystemExit) as e:
        fail(f"row 3: {HOSTILE}\nat https://me:pw@host with abc123def456", 2)
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert OBEYED.search(err) is None
    assert "\\x1b]0;owned" in err
    assert "abc123def456" not in err
    assert "me:pw" not in err


def test_json_results_are_harmless_and_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"text": HOSTILE}, True)
    out = capsys.readouterr().out
    assert OBEYED.search(out) is None
    assert json.loads(out) == {"text": HOSTILE}


def episode() -> dict[str, Any]:
    response = {
        "index": 0,
        "kind": "candidate",
        "text": HOSTILE,
        "scores": [3.0, None],
        "score_status": ["ok", HOSTILE],
    }
    return {
        "prompt_id": HOSTILE,
        "messages": [{"role": "user", "content": HOSTILE}],
        "error": HOSTILE,
        "responses": [response],
    }


def test_an_inspected_story_shows_escapes_as_they_are_and_no_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    chapter = {"iteration": 1, "episode": episode(), "objectives": ["harmless", "helpful"]}
    print_story({"arms": {"main": [chapter]}})
    out = capsys.readouterr().out
    assert OBEYED.search(out) is None
    assert out.count("\\x1b]0;owned") == 5
    assert out.count("[bold red]x[/bold red] [link=http://h]y[/link]") == 5


def test_examples_and_progress_show_escapes_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    asked = Asked("p", "test", HOSTILE, [{"role": "user", "content": HOSTILE}], {})
    print_examples([Example("median change", asked, Answer(HOSTILE, [1.0]), Answer(HOSTILE, [None]))])
    progress = Progress()
    progress.say(HOSTILE)
    progress.counter("generate")({"done": 1, "total": 1, "error": HOSTILE})
    out, err = capsys.readouterr()
    assert OBEYED.search(out + err) is None
    assert (out.count("owned"), err.count("owned")) == (4, 2)


def test_a_preview_shows_escapes_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path
) -> None:
    from spa_ray.pipeline import preview

    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": HOSTILE}) + "\n")
    monkeypatch.setattr(preview, "fetch_model", lambda model: tiny_model)
    preview.preview_prompts(scripted_config(prompts={"source": str(tmp_path / "p.jsonl")}), verbose=False, count=1)
    out = capsys.readouterr().out
    assert OBEYED.search(out) is None
    assert "\\x1b]0;owned" in out


# --- secrets --------------------------------------------------------------------------------------------------------


def test_a_runs_config_and_manifest_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "abc123def456")
    monkeypatch.setattr(
        "sys.argv", ["spa", "run", "c.yaml", "model.engine_kwargs.hf_token=topsecret", "name=abc123def456"]
    )
    run = RunFolder(tmp_path)
    config = scripted_config({"hf_token": "topsecret"}, prompts={"source": "s3://key:topsecret@bucket/p.jsonl"})
    write_run_config(run, {"main": config})
    facts = {"generate-1": {"first_error": "internal: no access with abc123def456", "rows": 3}}
    write_manifest(run, started=datetime.now(UTC), stages=facts, compared={"stages": {}, "total": {}}, spent={})
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "topsecret" not in text
    assert "abc123def456" not in text
    assert json.loads((tmp_path / "manifest.json").read_text())["command"][3] == "model.engine_kwargs.hf_token=***"
    again = run_configs(run)["main"]  # what `spa inspect` reads
    assert again.sampling == config.sampling
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["arms"]["main"]["model"]["path"] == "m"


# --- stores ---------------------------------------------------------------------------------------------------------


def test_a_stored_name_cannot_lead_out_of_the_folder_that_it_is_copied_to(tmp_path: Path) -> None:
    from spa_ray.storage.files import copy_files

    (tmp_path / "from").mkdir()
    (tmp_path / "outside").write_text("mine")
    with pytest.raises(InputError, match="leaves the folder"):
        copy_files(tmp_path / "from", tmp_path / "to", ["a/../../outside"])
    assert (tmp_path / "outside").read_text() == "mine"
