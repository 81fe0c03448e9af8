"""What several commands take, and how they end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spa_ray.cli.guard import shows_unicode
from spa_ray.data.hub import source_path
from spa_ray.logs import printable_json
from spa_ray.storage.files import as_path, out_path

ConfigFile = Annotated[Path, typer.Argument(help="YAML config", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, dotted")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object as the last line of stdout")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Ray's and vLLM's own logs too")]
Out = Annotated[Any, typer.Option("--out", parser=out_path, metavar="PATH", help="folder to write", show_default=False)]
Episodes = Annotated[Any, typer.Argument(parser=as_path, metavar="EPISODES", help="their folder", show_default=False)]
Pairs = Annotated[
    Any,
    typer.Argument(
        parser=source_path,
        metavar="PAIRS",
        help="their folder, or pairs of your own in TRL's forms: file, folder or hf://owner/name",
        show_default=False,
    ),
]
Model = Annotated[Any, typer.Argument(parser=as_path, metavar="MODEL", help="its folder", show_default=False)]
Run = Annotated[Any, typer.Argument(parser=as_path, metavar="RUN", help="run folder or its URI", show_default=False)]
ConfigOption = Annotated[Path, typer.Option("--config", help="YAML config", show_default=False)]

Steered = Annotated[
    list[str] | None,
    typer.Option("--steer", help="of an SGA model: helpful=0.9, floors.harmless=0.8 or none", show_default=False),
]


def steering(text: str) -> str:
    """What `--steer` says as an override."""
    return f"steer.{text}" if "=" in text else f"steer={text}"


def emit(result: dict[str, Any], as_json: bool) -> None:
    """The result as stdout's last line."""
    if as_json:
        print(printable_json(result, ascii_only=not shows_unicode()), flush=True)
