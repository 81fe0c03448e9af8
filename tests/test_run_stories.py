"""What a run tells of single prompts: an episode once for all arms that share it, examples by a stated rule."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_ray.config.evaluation import Evaluation
from spa_ray.config.prompts import Prompts
from spa_ray.data.readers import Row
from spa_ray.pipeline.inspect import print_story
from spa_ray.pipeline.prompt_files import PromptFiles
from spa_ray.report.examples import RULE, choose, print_examples
from spa_ray.report.run_data import Answer, Asked
from tests.scripted import scripted_config


def chapter(text: str, *, kept: bool, iteration: int = 1) -> dict[str, Any]:
    response = {"index": 0, "kind": "candidate", "scores": [1.0, 2.0], "score_status": ["ok"], "text": text}
    episode = {
        "prompt_id": "p1",
        "messages": [{"role": "user", "content": "How?"}],
        "error": None,
        "responses": [response],
    }
    filters = {"det": 1.0, "tau": 2.0, "kept": kept, "drop_reason": None if kept else "inconsistent"}
    return {
        "iteration": iteration,
        "episode": episode,
        "objectives": ["harmless", "helpful"],
        "filters": filters,
        "pairs": [],
        "train": {"gap": "l1", "alpha": 1.0},
    }


def test_an_episode_is_printed_once_with_the_arms_that_share_it(capsys: pytest.CaptureFixture[str]) -> None:
    arms = {
        "sft": [chapter("shared answer", kept=True)],
        "spa": [chapter("shared answer", kept=True)],
        "robust": [chapter("shared answer", kept=False)],
        "other": [chapter("own answer", kept=True)],
    }
    print_story({"arms": arms})
    out = capsys.readouterr().out
    assert out.count("shared answer") == 1
    assert out.count("own answer") == 1
    assert "arms sft, spa, robust, iteration 1: p1" in out
    assert "arm other, iteration 1: p1" in out
    assert "arms sft, spa, iteration 1:\n" in out
    assert "arm robust, iteration 1:\n" in out
    assert (out.count("kept"), out.count("dropped: inconsistent")) == (2, 1)


def test_one_arm_is_told_without_a_heading_of_outcomes(capsys: pytest.CaptureFixture[str]) -> None:
    print_story({"arms": {"main": [chapter("a", kept=True), chapter("b", kept=True, iteration=2)]}})
    out = capsys.readouterr().out
    assert out.count("arm main, iteration 1") == out.count("arm main, iteration 2") == 1


def asked(before: list[float | None], after: list[float | None], name: str = "q") -> Asked:
    said = [{"role": "user", "content": name}]
    return Asked(name, "test", "harmful", said, {"vanilla": Answer("b", before), "spa": Answer("a", after)})


def test_gain_median_and_loss_are_shown_with_the_rule(capsys: pytest.CaptureFixture[str]) -> None:
    group = [
        asked([5, 5], [9, 5], "best"),
        asked([5, 5], [5, 5], "median"),
        asked([5, 5], [2, 9], "worst"),
        asked([5, None], [9, 9], "unscored"),
    ]
    chosen = choose(group, arm="spa")
    assert [(e.asked.prompt_id, e.shown_as) for e in chosen] == [
        ("best", "largest gain"), ("median", "median change"), ("worst", "largest loss"),
    ]  # fmt: skip
    print_examples(chosen)
    out = capsys.readouterr().out
    assert out.count(RULE) == 1
    assert "[harmful: largest loss, -3/+4] worst" in out


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9))
def test_the_best_and_the_worst_are_among_the_examples(changes: list[tuple[int, int]]) -> None:
    group = [asked([0, 0], [a - 5, b - 5], str(k)) for k, (a, b) in enumerate(changes)]
    chosen = choose(group, arm="spa")
    shown = {e.change for e in chosen}
    assert {(a - 5, b - 5) for a, b in (min(changes), max(changes))} <= shown
    assert len({e.asked.prompt_id for e in chosen}) == len(chosen)
    assert all(e.shown_as != "largest loss" or e.change < (0, 0) for e in chosen)


def test_nothing_scored_is_no_example() -> None:
    assert choose([asked([None], [1.0])], arm="spa") == []


# --- prompts are read once ----------------------------------------------------------------------------------------


def test_the_checks_and_the_run_read_each_source_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr("spa_ray.data.readers._read", lambda path, *rest: read.append(path.name) or rows(path))

    def rows(path: Path) -> Iterator[Row]:
        yield Row(f"{path}:1", {"prompt": "one"})
        yield Row(f"{path}:2", {"prompt": "two"})

    for name in ("train.jsonl", "held.jsonl"):
        (tmp_path / name).write_text("{}\n")
    files = PromptFiles()
    config = scripted_config(prompts={"source": str(tmp_path / "train.jsonl")})
    evaluation = Evaluation(prompts=Prompts(source=str(tmp_path / "held.jsonl")))
    for number in range(3):
        out = tmp_path / f"{number}.parquet"
        assert files.write(config, out).rows == 2
        assert pq.read_table(out).num_rows == 2
        assert files.write_held_out(evaluation, out).rows == {"test": 2}
        assert pq.read_table(out)["prompt_id"][0].as_py().startswith("test/")
    assert read == ["train.jsonl", "held.jsonl"]
    assert files.write(config, tmp_path / "x.parquet", skip=1).rows == 1
    assert len(read) == 3
