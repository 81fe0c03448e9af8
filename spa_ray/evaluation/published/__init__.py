"""The numbers that the papers print, as data: one YAML file a paper."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources

import yaml

from spa_ray.errors import InputError


@dataclass(frozen=True)
class Published:
    """One table or figure. `rows` and `differences` (a row minus another, where the text gives no more) hold one number
    per column."""

    title: str
    columns: list[str]
    rows: dict[str, list[float]]
    differences: dict[str, list[float]] = field(default_factory=dict)

    def difference(self, a: str, b: str, column: str) -> float | None:
        """Row a minus row b, rounded as they are printed; None where the paper has no such numbers."""
        at = self.columns.index(column)
        if f"{a} − {b}" in self.differences:
            return self.differences[f"{a} − {b}"][at]
        return round(self.rows[a][at] - self.rows[b][at], 3) if {a, b} <= self.rows.keys() else None

    def turned(self) -> Published:
        """Rows as columns, columns as rows."""
        turned = zip(*self.rows.values(), strict=True)
        rows = {name: list(values) for name, values in zip(self.columns, turned, strict=True)}
        return Published(self.title, list(self.rows), rows)


def published(paper: str) -> dict[str, Published]:
    """A paper's tables by key. Raises: InputError for a paper that is not here."""
    file = resources.files(__name__).joinpath(f"{paper}.yaml")
    if not file.is_file():
        raise InputError(f"the numbers of a paper {paper!r} are not here")
    return {key: Published(**table) for key, table in yaml.safe_load(file.read_text(encoding="utf-8")).items()}
