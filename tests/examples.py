"""How many examples a property is tried on: all of them in `make long`, a fifth in `make test`."""

from __future__ import annotations

import os


def examples(number: int) -> int:
    return number if os.environ.get("SPA_ALL_EXAMPLES") else max(10, number // 5)
