"""The public Python API: what its page shows, and that its names cost nothing until they are used."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import spa_ray
from spa_ray.errors import InputError

PAGE = Path(__file__).parents[1] / "docs" / "PYTHON.md"


def settings(folder: Path, model: Path) -> dict[str, Any]:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {k}?"}) + "\n" for k in range(20)))
    return {
        "model": {"path": str(model), "engine": "spa_ray.engine.scripted:ScriptedEngine"},
        "prompts": {"source": str(prompts)},
        "sampling": {"max_tokens": 60},
        "refine": {"max_tokens": 100},
        "run_dir": str(folder / "run"),
    }


@pytest.mark.parametrize("name", spa_ray.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(spa_ray, name) is not None


def test_a_name_that_is_not_there_is_told_as_python_does() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = spa_ray.nothing


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, spa_ray; print(sorted({'torch', 'ray', 'pydantic', 'numpy', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
def test_the_pages_example_runs(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(json.dumps(settings(tmp_path, tiny_model)))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out
    assert re.search(r"^main \d+ pairs in .*/pairs$", printed, flags=re.MULTILINE)


def test_overrides_that_would_be_lost_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(settings(tmp_path, tiny_model)))
    arms = spa_ray.load_config(tmp_path / "c.yaml")
    with pytest.raises(InputError, match="give them to load_config"):
        spa_ray.plan(arms, ["prompts.limit=4"])


def test_a_config_may_be_a_mapping_and_a_wrong_one_is_told(tmp_path: Path, tiny_model: Path) -> None:
    plan = spa_ray.plan(settings(tmp_path, tiny_model), ["prompts.limit=4"])
    assert plan["arms"]["main"]["prompts"]["count"] == 4
    with pytest.raises(InputError, match=r"config: sampling\.n: must be a whole number, 1 or more, got 0"):
        spa_ray.plan({**settings(tmp_path, tiny_model), "sampling": {"n": 0}})
