"""The day of a run's first start: what chat templates see as today where `model.date` is null.

It is kept in the run's folder, or in the one that a single stage writes, so that a resume on another day renders alike.
"""

from __future__ import annotations

import datetime as dt

from spa_ray.rollout.settings import today
from spa_ray.storage.files import AnyPath, is_file, read_json, write_json

FILE = "first_start.json"


def first_day(*folders: AnyPath) -> dt.date:
    """The day that the first of these folders records which records one; today where none does."""
    for folder in folders:
        if is_file(folder / FILE):
            return dt.date.fromisoformat(read_json(folder / FILE)["date"])
    return today()


def record_first_day(folder: AnyPath, day: dt.date) -> None:
    """Write it down, unless the folder records one already."""
    if not is_file(folder / FILE):
        write_json(folder / FILE, {"date": day.isoformat()})
