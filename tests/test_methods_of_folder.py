"""What a model folder says of the method that it was trained with: `method.json`, read without its model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spa_ray.errors import InputError
from spa_ray.training.method import METHOD, Method, method_of, method_of_folder
from spa_ray.training.own_modules import Beside
from tests.training_support import train_section

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "dual_head.py"
STATE = {"mean": [5.0, 4.0], "std": [2.0, 0.0]}
ASKED = [{"role": "user", "content": "May I?"}]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copy(EXAMPLE, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "dual_head", raising=False)
    yield tmp_path
    sys.modules.pop("dual_head", None)


def section(**given: Any) -> Any:
    return train_section({"method": "dual_head:DualHead", **given})


def test_a_method_comes_back_with_its_own_keys_and_state_and_renders(home: Path) -> None:
    train = section(top_score=4.0, lr=1e-3, epochs=7)
    Beside(STATE).write(home, train)
    about = json.loads((home / METHOD).read_text())
    assert about["method"] == "dual_head:DualHead"
    assert about["train"].keys() == {"beta", "gamma", "lr", "head_weight", "head_lr", "top_score"}
    found = method_of_folder(home)
    assert found is not None
    assert found.config.model_dump(include=set(about["train"])) == train.model_dump(include=set(about["train"]))
    assert found.render(ASKED, [7.0, 4.5], found.state) == method_of(train, STATE).render(ASKED, [7.0, 4.5], STATE)
    assert found.render(ASKED, [7.0, 4.5], found.state)[0]["content"] == "May I?\nScores to reach: 1.0, 0.5"


@pytest.mark.parametrize("name", ["sft", "spa", "spa_dpo"])
def test_a_method_that_leaves_a_model_alone_writes_nothing(tmp_path: Path, name: str) -> None:
    Beside().write(tmp_path, train_section({"method": name}))
    assert list(tmp_path.iterdir()) == []
    assert method_of_folder(tmp_path) is None


def test_a_method_that_renders_and_learns_nothing_is_written_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Polite(Method[Any]):
        def render(self, messages: Any, scores: Any, state: Any) -> Any:
            return [{"role": "system", "content": "Be polite."}, *messages]

    monkeypatch.setattr("tests.test_methods_of_folder.Polite", Polite, raising=False)
    Beside().write(tmp_path, train_section({"method": f"{__name__}:Polite", "lr": 1e-5}))
    found = method_of_folder(tmp_path)
    assert type(found) is Polite
    assert found.state is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", r"method\.json: not as training writes it \(JSONDecodeError"),
        ("[]", r"method\.json: not as training writes it \(TypeError"),
        ('{"method": "spa_ray"}', r"method\.json: not as training writes it \(KeyError: 'state'\)"),
        ('{"method": "nowhere:Method", "state": null}', r"method\.json: train\.method: 'nowhere:Method'"),
        (
            '{"method": "dual_head:DualHead", "train": {"head": 1}, "state": null}',
            r"method\.json: train: head: unknown",
        ),
    ],
)
def test_what_training_did_not_write_is_told_in_one_line(home: Path, text: str, told: str) -> None:
    (home / METHOD).write_text(text)
    with pytest.raises(InputError, match=told) as error:
        method_of_folder(home)
    assert "\n" not in str(error.value)
