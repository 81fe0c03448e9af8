"""The live funnel agrees with the build stage, row by row, and the progress display shows it."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings

from spa_ray.config.models import Config
from spa_ray.errors import InputError
from spa_ray.pipeline.progress import Progress
from spa_ray.preferences import LIVE_CLASSES, denoise, live_reason, live_reasons
from tests.preferences_tables import cases, make_config, make_episodes, make_row

GOOD = [(1, 2), (3, 4), (5, 5), (2, 7), (8, 1)]


@settings(deadline=None)
@given(cases())
def test_each_row_gets_the_reason_that_denoise_would_give_it(case: tuple[Config, pa.Table]) -> None:
    config, episodes = case
    rows = episodes.to_pylist()
    alone = [denoise(make_episodes([row], config), config, tau=None)["drop_reason"][0].as_py() for row in rows]
    assert [live_reason(row, config) for row in rows] == alone
    assert live_reasons(rows, config) == alone
    assert {reason or "passed" for reason in alone} <= set(LIVE_CLASSES)


@settings(deadline=None)
@given(cases())
def test_over_a_table_without_repetitions_the_counts_are_those_of_denoise(case: tuple[Config, pa.Table]) -> None:
    config, episodes = case
    table = denoise(episodes, config, tau=None)
    single = [i for i, reason in enumerate(table["drop_reason"].to_pylist()) if reason != "duplicate"]
    rows = episodes.to_pylist()
    found = live_reasons([rows[i] for i in single], config)
    assert found == [table["drop_reason"][i].as_py() for i in single]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (make_row(GOOD, (9, 9)), None),
        (make_row([], error="refused: no"), "error"),
        (make_row(GOOD, (9, None)), "too_few_scores"),
        (make_row(GOOD), "too_few_scores"),
        (make_row(GOOD, (9, 7)), "inconsistent"),
        (make_row([(1, 2), (2, 4), (3, 6), (4, 8)], (9, 9)), "zero_det"),
    ],
)
def test_the_classes_by_example(row: dict[str, object], reason: str | None) -> None:
    assert live_reason(row, make_config(2)) == reason


def test_no_bound_is_applied_while_the_pass_runs() -> None:
    config = make_config(2, denoise__tau=0.001)
    row = make_row(GOOD, (9, 9))
    assert denoise(make_episodes([row], config), config, tau=0.001)["drop_reason"][0].as_py() == "high_det"
    assert live_reason(row, config) is None


def test_a_damaged_row_is_refused_as_by_build() -> None:
    row = make_row(GOOD, (9, 9)) | {"scores": [[1.0, 2.0]]}
    with pytest.raises(InputError, match="responses but"):
        live_reason(row, make_config(2))


UPDATE = {"done": 569, "total": 569, "tokens/s": 2134.567, "passed": 123, "inconsistent": 446, "zero_det": 0}


def test_lines_name_what_passed_and_why_the_rest_did_not(capsys: pytest.CaptureFixture[str]) -> None:
    count = Progress().counter("generate")
    count(UPDATE)
    count(UPDATE)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.split()[:3] == ["generate", "569/569", "tokens/s"]
    assert "passed 123  inconsistent 446" in first
    assert "zero_det" not in first
    assert "upper bound τ" in second  # said once
    assert third == first


def test_the_funnel_has_a_line_of_its_own_below_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress()
    progress.counter("generate")(UPDATE)
    console = Console(width=100, force_terminal=True, color_system=None)
    with console.capture() as shown:
        for part in progress.live.get_renderables():
            console.print(part)
    progress.close()
    bar, funnel = [line.rstrip() for line in shown.get().splitlines() if line.strip()]
    assert "569/569" in bar
    assert "passed" not in bar
    assert funnel.split(maxsplit=1) == ["generate", "passed 123 (before τ)  inconsistent 446"]


def test_nothing_passed_yet_is_said_and_errors_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().counter("generate")({"done": 9, "total": 9, "errors": 2, "error": 2, "inconsistent": 7})
    assert capsys.readouterr().err.splitlines()[0] == "generate               9/9  passed 0  error 2  inconsistent 7"


def test_updates_without_a_funnel_look_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().counter("train")({"name": "spa", "done": 54, "total": 54, "loss": 0.5, "pairs/s": 99.9})
    assert capsys.readouterr().err == "train spa              54/54  loss 0.5  pairs/s 99.9\n"
