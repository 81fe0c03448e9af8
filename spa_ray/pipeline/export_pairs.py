"""`spa export PAIRS`: pairs in another trainer's form, or as they are, and their way to a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spa_ray.data.pair_formats import ROWS, write_pairs
from spa_ray.errors import InputError
from spa_ray.pipeline.cards import CARD, pairs_card_for
from spa_ray.storage.files import write_text
from spa_ray.storage.hub_push import push

AS_BUILT = (CARD, "pairs/*.parquet", "funnel.json")  # of a build's folder


def pairs_in(source: Path) -> Path | None:
    """The table of a folder that `spa build` wrote, or of its `pairs/`; None where there is none."""
    return next((folder for folder in (source / "pairs", source) if any(folder.glob("*.parquet"))), None)


def export_pairs(
    source: Path, out: Path | None, form: str | None, repo: str | None, *, private: bool
) -> dict[str, Any]:
    """Write `out` in a form, or take the pairs as they are; push what was written, as a data set. Raises: InputError,
    RunError."""
    pairs = pairs_in(source)
    if pairs is None:
        raise InputError(f"{source}: no pairs; give the folder that `spa build` wrote")
    if (form is None) != (out is None):
        raise InputError("spa export: pairs need --format and --out, or --push-to-hub alone")
    if form is None and repo is None:
        raise InputError("spa export: pairs need --format and --out, or --push-to-hub alone")
    if form is not None and out is not None:
        count = write_pairs(pairs, out, form)
        write_text(out / CARD, pairs_card_for(pairs, ROWS))
        print(f"{count:,} pairs for {form}: {out}")
        url = None if repo is None else push(out, repo, private=private, kind="dataset")
        return {"pairs": str(out.absolute()), "count": count, "pushed": url}
    if pairs.name != "pairs":
        raise InputError(f"{pairs}: only a build's folder is pushed as it is; give --format and --out for others")
    url = push(pairs.parent, str(repo), private=private, kind="dataset", only=AS_BUILT)
    print(url)
    return {"pairs": str(pairs), "pushed": url}
