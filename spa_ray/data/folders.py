"""Which files of a folder hold prompts: plain folders, and copies of a hub's repository.

Metadata is never taken for rows. Of several splits the one that is asked for is read, else `train`; what is left out is
said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from spa_ray.data.containers import KINDS, Unreadable, kind_of, looks_like_file, suffix_of
from spa_ray.errors import InputError

SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
METADATA = frozenset(
    {
        "dataset_info.json",
        "dataset_infos.json",
        "dataset_dict.json",
        "state.json",
        "stage.json",
        "croissant.json",
        "license",
        "licence",
        "readme",
        "notice",
        "citation.cff",
    }
)
METADATA_SUFFIXES = frozenset({".md", ".crc", ".lock", ".incomplete", ".sha256", ".md5"})
NAMED = 5  # files that a message names at most
BESIDE_ROWS = Unreadable("a text file beside files of rows", "name it alone to read its lines as prompts")


def files_of(folder: Path, split: str | None, where: str, notes: dict[str, None]) -> list[Path]:
    """The files to read, in the order of their names. `notes` is told what is left out.

    Raises: InputError when none can be read, and for a split that the folder does not have.
    """
    inside = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_metadata(path, folder))
    kinds: dict[Path, str | Unreadable] = {path: kind_of(path) for path in inside}
    texts = {path for path in inside if suffix_of(path) == ".txt"}
    if any(isinstance(kind, str) and path not in texts for path, kind in kinds.items()):
        kinds |= dict.fromkeys(texts, BESIDE_ROWS)
    files = [path for path, kind in kinds.items() if isinstance(kind, str)]
    unknown = {path: kind for path, kind in kinds.items() if isinstance(kind, Unreadable)}
    if not files:
        told = [f"{path.relative_to(folder)} is {kind.form}: {kind.fix}" for path, kind in unknown.items()]
        why = f"; {'; '.join(told[:NAMED])}" if told else f" ({', '.join(KINDS)}, each also compressed)"
        raise InputError(f"{where}.source: {folder}: no file with rows in it{why}")
    if unknown:
        notes[f"{where}: {folder}: left out, no files of rows: {_names(unknown, folder)}"] = None
    groups = _groups(folder, files, split)
    if groups is None:
        if split is not None:
            raise InputError(
                f"{where}.source: {folder}: no file of the split {split!r} in it (SPLIT.jsonl, SPLIT-00000.parquet or "
                f"SPLIT/ANY.csv); without {where}.split all its files are read"
            )
        return files
    return _of_split(folder, files, groups, split, where, notes)


def _of_split(
    folder: Path,
    files: list[Path],
    groups: Mapping[str, list[Path]],
    split: str | None,
    where: str,
    notes: dict[str, None],
) -> list[Path]:
    chosen = choose_split(list(groups), split, str(folder), where)
    taken = groups[chosen]
    left = [path for path in files if path not in set(taken)]
    if split is None and left:
        notes[f"{where}: {folder}: the split {chosen} is read ({where}.split); left out: {_names(left, folder)}"] = None
    return taken


def choose_split(names: list[str], split: str | None, source: str, where: str) -> str:
    """The split that is asked for, else `train`, else the only one. Raises: InputError that names those there are."""
    chosen = split if split is not None else names[0] if len(names) == 1 else "train"
    if chosen in names:
        return chosen
    there = ", ".join(names)
    if split is not None:
        raise InputError(f"{where}.source: {source}: no file of the split {split!r} in it; it has {there}")
    raise InputError(f"{where}.source: {source}: several splits: {there}; say which with {where}.split={names[0]}")


def _names(paths: Iterable[Path], folder: Path) -> str:
    names = [str(path.relative_to(folder)) for path in paths]
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _is_metadata(path: Path, folder: Path) -> bool:
    inside = path.relative_to(folder)
    hidden = any(part.startswith(".") for part in inside.parts) or any(p.startswith("_") for p in inside.parts)
    name = path.name.lower()
    bare = name.partition(".")[0] if not looks_like_file(name) or name.endswith((".md", ".txt")) else name
    return (
        hidden
        or name in METADATA
        or bare in METADATA
        or path.suffix.lower() in METADATA_SUFFIXES
        or name == "metadata.json"
    )


def _groups(folder: Path, files: list[Path], split: str | None) -> dict[str, list[Path]] | None:
    """Split -> its files, None for a folder without splits."""
    declared = _declared(folder, files)
    if declared:
        return declared
    if split is not None:
        own = [path for path in files if _is_of(path.relative_to(folder), split)]
        if own:
            return {split: own}
    found: dict[str, list[Path]] = {}
    for path in files:
        for name, canonical in SPLITS.items():
            if _is_of(path.relative_to(folder), name):
                found.setdefault(canonical, []).append(path)
                break
    if split is not None and split in SPLITS and SPLITS[split] in found:
        return {**found, split: found[SPLITS[split]]}
    return found if len(found) > 1 or (found and split is not None) else None


def _is_of(path: Path, split: str) -> bool:
    stem = path.name.partition(".")[0]
    return split in path.parts[:-1] or stem == split or stem.startswith((f"{split}-", f"{split}_0"))


def _declared(folder: Path, files: list[Path]) -> dict[str, list[Path]] | None:
    """The splits that a hub's README names in its front matter (`configs`). A config's split is CONFIG/SPLIT."""
    configs = _front_matter(folder)
    groups: dict[str, list[Path]] = {}
    alone = len(configs) == 1
    for config in configs:
        name = str(config.get("config_name", "default"))
        for of_split, patterns in _data_files(config.get("data_files")):
            own = [path for path in files if any(_fits(path.relative_to(folder), pattern) for pattern in patterns)]
            if own:
                short = alone or name == "default" or config.get("default") is True
                groups.setdefault(of_split if short else f"{name}/{of_split}", []).extend(own)
    return groups or None


def _front_matter(folder: Path) -> list[Mapping[str, Any]]:
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        if not text.startswith("---"):
            return []
        head = yaml.safe_load(text[3:].partition("\n---")[0])
        return [config for config in head["configs"] if isinstance(config, Mapping)]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return []


def _data_files(given: Any) -> list[tuple[str, list[str]]]:
    if isinstance(given, str):
        return [("train", [given])]
    if isinstance(given, Mapping):
        return [(str(split), _patterns(paths)) for split, paths in given.items()]
    found = []
    for entry in given if isinstance(given, list) else []:
        if isinstance(entry, Mapping):
            found.append((str(entry.get("split", "train")), _patterns(entry.get("path"))))
        else:
            found.append(("train", _patterns(entry)))
    return found


def _patterns(given: Any) -> list[str]:
    return [str(entry) for entry in (given if isinstance(given, list) else [given])]


def _fits(path: Path, pattern: str) -> bool:
    pattern = pattern.removeprefix("./")
    return fnmatch(str(path), pattern) or fnmatch(str(path), pattern.replace("**/", ""))
