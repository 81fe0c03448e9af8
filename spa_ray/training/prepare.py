"""What a job needs before its first step: token file, selection, order and plan, fingerprint.

Comes in: a job. Goes out: `Prepared`, the same on every rank. All ranks call; rank 0 alone tokenises. Never: models.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from spa_ray.errors import InputError
from spa_ray.rollout.chat import Chat, chat_of
from spa_ray.rollout.settings import ChatSettings, today
from spa_ray.rollout.tokenizer import load_tokenizer
from spa_ray.storage.model_folder import check_model_folder
from spa_ray.training import comm
from spa_ray.training.batches import Order, order_pairs, step_weights
from spa_ray.training.dataset import Selection, TokenizedPairs, select_pairs
from spa_ray.training.deal import Plan
from spa_ray.training.job import TrainJob
from spa_ray.training.method import Method, check_section_of_method, method_of, method_source
from spa_ray.training.own_pairs import end_ids
from spa_ray.training.rope import long_factors
from spa_ray.training.tokenize import content_hash, read_columns, tokenize_pairs
from spa_ray.training.trainable import check_trainable


@dataclass(frozen=True)
class Prepared:
    """A job's data and its order. `dropped` counts pairs by reason."""

    data: TokenizedPairs
    selection: Selection
    order: Order
    dropped: dict[str, int]
    fingerprint: str
    state: Any = None  # what the method learnt from the pairs

    def plan(self, job: TrainJob, *, packed: bool) -> Plan:
        """Every step of the job, for as many ranks as there are now."""
        train, gap = job.train, self.selection.gap
        mean_gap = float(gap.mean()) if train.gap_mean == "epoch" else None
        weights = step_weights(self.order, gap, partial(method_of(train).weights, mean_gap=mean_gap))
        return Plan(
            self.order,
            weights,
            self.selection.sequences,
            ranks=comm.world_size(),
            micro_batch_tokens=train.micro_batch_limit,
            packed=packed,
        )


def fingerprint(job: TrainJob) -> str:
    """A hash of all that decides a job's result: the pairs' bytes, the model's files, the settings, the seed."""
    return _fingerprint(job, fitted(job))


def _fingerprint(job: TrainJob, state: Any) -> str:
    settings = job.train.identity().model_dump_json(include=job.train.identified_by())
    chat = "" if job.chat is None else job.chat.model_dump_json()
    parts = [content_hash(job.pairs), model_hash(job.model), settings, str(job.seed), chat, *method_source(job.train)]
    parts += [f"{name}: {model_hash(model)}" for name, model in sorted(job.models.items())]
    chosen = long_factors(_config(job), job.context)
    if chosen is not None:
        parts.append(f"long rotary factors: {chosen}")
    if state is not None:
        parts.append(f"method: {json.dumps(state, sort_keys=True)}")
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def fitted(job: TrainJob) -> Any:
    """What the job's method learns from its pairs before training, as JSON gives it back. Raises: InputError."""
    method = method_of(job.train)
    if type(method).fit is Method.fit:
        return None
    state = method.fit(read_columns(job.pairs, method.columns))
    try:
        return json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError) as e:
        raise InputError(f"train.method: {job.train.method}: fit must return finite JSON values ({e})") from e


def model_hash(model: Path) -> str:
    """A hash of a model folder: files below 4 MiB whole; of larger ones 64 KiB out of every 4 MiB, which meets every
    matrix of a large model, in a second or so instead of a minute."""
    digest = hashlib.blake2b(digest_size=16)
    stride = 4 << 20
    for file in sorted(p for p in model.iterdir() if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as f:
            for at in range(0, size, stride):
                f.seek(at)
                digest.update(f.read(stride if size < stride else 64 << 10))
    return digest.hexdigest()


def prepare(job: TrainJob) -> Prepared:
    """Tokenise once (kept in the job's folder), then select and order on every rank alike. Raises: InputError."""
    mark, dropped, state = comm.on_rank_zero(lambda: _tokenize(job))
    data = TokenizedPairs(tokens_path(job, mark))
    selection, also = select_pairs(data, method_of(job.train, state), seed=job.seed)
    train = job.train
    order = order_pairs(
        len(selection),
        seed=job.seed,
        batch_size=train.batch_size,
        epochs=train.epochs,
        max_steps=train.max_steps,
        prompts=selection.sequences.prompt_of_pair if train.order == "prompts" else None,
    )
    return Prepared(data, selection, order, {**dropped, **also}, mark, state)


def tokens_path(job: TrainJob, mark: str) -> Path:
    return job.work / f"tokens_{mark}_v2.arrow"  # files of an earlier layout are not read


def _tokenize(job: TrainJob) -> tuple[str, dict[str, int], Any]:
    check_section_of_method(job.train, name=job.name)
    check_model_folder(job.model)
    check_trainable(job.model, job.train, trust_remote_code=job.trust_remote_code)
    if not job.pairs.exists():
        raise InputError(f"{job.pairs}: no such file or folder; give the pairs that `spa build` wrote")
    state = fitted(job)
    mark = _fingerprint(job, state)
    job.work.mkdir(parents=True, exist_ok=True)
    tokens, counts = tokens_path(job, mark), job.work / f"tokens_{mark}.json"
    if not (tokens.is_file() and counts.is_file()):
        dropped = tokenize_pairs(
            job.pairs,
            tokens,
            _chat(job),
            vocab_size=_vocab_size(job),
            max_length=job.train.max_length,
            gap=job.train.gap,
            reliable=job.train.uncertainty == "draws",
            method=method_of(job.train, state),
            ends=cache(lambda: end_ids(job.model)),
        )
        partial = counts.with_suffix(".partial")
        partial.write_text(json.dumps(dropped))
        os.replace(partial, counts)
    return mark, json.loads(counts.read_text()), state


def _chat(job: TrainJob) -> Chat:
    settings = job.chat or ChatSettings(date=today())
    return chat_of(load_tokenizer(job.model, trust_remote_code=job.trust_remote_code), job.model, settings)


def _vocab_size(job: TrainJob) -> int:
    return _config(job).get_text_config().vocab_size


def _config(job: TrainJob):  # type: ignore[no-untyped-def]  # a Hugging Face config
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(job.model, trust_remote_code=job.trust_remote_code)
