"""The SGA paper's printed numbers agree with each other: its Table 1 is the average of its Table 2."""

from __future__ import annotations

from statistics import fmean

import pytest

from spa_ray.evaluation.published import published

DATA = ("HH-RLHF", "UltraFeedback", "HelpSteer2")
PRINTED = 0.05 + 1e-9  # half of the last digit
TABLES = published("sga")
MEANS, SINGLE = TABLES["table1"], TABLES["table2"]


@pytest.mark.parametrize("row", MEANS.rows)
def test_every_average_of_table_1_recomputes(row: str) -> None:
    data = next(name for name in DATA if row.startswith(name))
    model = row.removeprefix(f"{data} ")
    for at, method in enumerate(MEANS.columns):
        if model == "Average":
            parts = [cells[at] for name, cells in MEANS.rows.items() if name.startswith(data) and name != row]
            assert len(parts) == 6
        else:
            cells = SINGLE.rows[f"{model} {method}"]
            parts = [cell for name, cell in zip(SINGLE.columns, cells, strict=True) if name.startswith(data)]
        assert abs(fmean(parts) - MEANS.rows[row][at]) <= PRINTED
