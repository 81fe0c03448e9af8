"""A user's own preference pairs as a stage: from TRL's forms to the pairs table that training reads."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from spa_ray.config.models import Config
from spa_ray.data.hub import version_of
from spa_ray.data.left_out import lines
from spa_ray.data.own_pairs import read_own_pairs
from spa_ray.data.prompts import PromptCounts
from spa_ray.errors import InputError
from spa_ray.rollout.chat import chat_of
from spa_ray.rollout.settings import ChatSettings
from spa_ray.rollout.template import template_text
from spa_ray.rollout.tokenizer import load_tokenizer
from spa_ray.storage.claimed import claimed
from spa_ray.storage.files import AnyPath, as_path, copy_file, is_file, parquet_dataset
from spa_ray.storage.folder import check_claim
from spa_ray.storage.hashing import file_hash, folder_hash, model_hash, stage_hash
from spa_ray.training.own_pairs import end_ids, write_own_pairs

STAGE_VERSION = 1
Say = Callable[[str], None]


def are_own(pairs: AnyPath) -> bool:
    """Whether these are a user's own pairs: a file, or a folder, without a table of generated ids."""
    tables: list[AnyPath] = [pairs] if is_file(pairs) else sorted(pairs.glob("*.parquet"), key=str)
    if not tables or not tables[0].name.endswith(".parquet"):
        return True
    try:
        return "chosen_ids" not in parquet_dataset(tables[0]).schema.names
    except (OSError, pa.ArrowInvalid):
        return False  # training says what is wrong with the file


def own_pairs_stage(
    config: Config, source: AnyPath | str, *, out: AnyPath, model: Path, chat: ChatSettings, say: Say = print
) -> AnyPath:
    """The pairs table of `source` in the folder `out`, written once; a text is a hub's address, of which
    `prompts.split` is read. Returns: the table's folder.

    Raises: InputError for a row that is no pair, with file and line, unless `prompts.on_bad_row` is skip.
    """
    prompts, split = config.prompts, None
    if isinstance(source, str):
        split, content = prompts.split, f"{source} {prompts.split} {version_of(source, 'pairs')}"
    elif isinstance(source, Path):
        content = file_hash(source) if source.is_file() else folder_hash(source)
    else:
        raise InputError(f"{source}: pairs of your own are read from this machine's disks or a hub; copy them here")
    rendered = chat.key(template_text(model))
    digest = stage_hash("pairs", STAGE_VERSION, {"chat": rendered}, [content, model_hash(model)])
    stage, _ = check_claim(as_path(out), "pairs", digest)
    if stage.done:
        return stage.folder / "pairs"
    started = time.time()
    with (
        tempfile.TemporaryDirectory() as scratch
    ):  # a bad row leaves no folder behind that a mended file is refused for
        fresh = Path(scratch) / "pairs.parquet"
        tokenizer = load_tokenizer(model, trust_remote_code=config.model.trust_remote_code)
        counts = PromptCounts()
        rows = read_own_pairs(str(source), split=split, on_bad_row=prompts.on_bad_row, counts=counts)
        count = write_own_pairs(rows, fresh, chat_of(tokenizer, model, chat), end_ids(model))
        for line in [*counts.notes("pairs"), *lines({"pairs": counts.dropped})]:
            say(f"warning: {line}")
        with claimed(out, "pairs", digest) as stage:
            if not stage.done:
                copy_file(fresh, stage.folder / "pairs" / "pairs.parquet")
                stage.finish(started, pairs=count, source=str(source))
    return stage.folder / "pairs"
