"""The step loop: a job in, a model folder out. It knows torch and DeepSpeed and nothing of Ray.

All ranks call `run_job` together. By itself: `python -m spa_ray.training.loop --job job.json` (one process), or the
same under `torchrun`. Writes `train_log.jsonl` and checkpoints into the job's `work` folder.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spa_ray.errors import InputError, RunError
from spa_ray.logs import context
from spa_ray.training import checkpoint, comm
from spa_ray.training.attention import forget_layouts, why_not_packed
from spa_ray.training.export import export_model
from spa_ray.training.guards import CollapseAlarm, check_dropped, check_lr, check_movement
from spa_ray.training.host_memory import kept_for_reuse
from spa_ray.training.job import RESULT, Progress, TrainJob, TrainResult, read_job, write_job
from spa_ray.training.method import method_of
from spa_ray.training.own_modules import Beside, OwnModules
from spa_ray.training.policy import make_engine, parameter_count
from spa_ray.training.prepare import Prepared, prepare
from spa_ray.training.reference import Reference, cached_reference, compute_reference, reference_path
from spa_ray.training.relief import is_out_of_memory, out_of_memory
from spa_ray.training.step import StepLoop
from spa_ray.training.tokenize import objectives_in
from spa_ray.training.trackers import open_trackers

LOGGER = logging.getLogger(__name__)
LOG = "train_log.jsonl"


def run_job(job: TrainJob, progress: Progress | None = None) -> TrainResult:
    """Train, export, clean up. Collective. A job that is already done is handed back with `skipped`.

    Raises: InputError for bad input, a resume that cannot be honoured, or an `out` that another job wrote; RunError for
    a non-finite loss or gradient. Both on every rank.
    """
    with context(job=job.name):
        return _run_job(job, progress)


def _run_job(job: TrainJob, progress: Progress | None) -> TrainResult:
    started = time.perf_counter()
    comm.set_threads()
    prepared = prepare(job)
    done = comm.on_rank_zero(lambda: _finished(job, prepared.fingerprint))
    if done is not None:
        return done
    others = _others(job, prepared)
    engine = make_engine(job)
    try:
        own = OwnModules.of(job, prepared.state, engine.module.model)
        first = _resume(job, engine, prepared, own)
        comm.on_rank_zero(lambda: write_job(job))
        comm.on_rank_zero(lambda: Beside(prepared.state).write(job.work, job.train))
        # Under ZeRO-3 whole layers come and go between what stays: kept, they would leave holes.
        with kept_for_reuse() if job.train.zero_stage < 3 and not torch.cuda.is_available() else nullcontext():
            loop = StepLoop(job, engine, prepared, _reference(job, engine, prepared, first), own, others)
            _say("job begins", step=first, steps=loop.plan.steps, pairs=len(prepared.selection))
            metrics = _run_steps(loop, prepared, first, progress)
        result = TrainResult(
            name=job.name,
            model=job.out,
            steps=loop.plan.steps,
            pairs=len(prepared.selection),
            dropped=prepared.dropped,
            metrics=metrics,
            seconds=time.perf_counter() - started,
            resumed_at=first,
            warnings=comm.on_rank_zero(lambda: [text for row in _read_log(job) for text in row.get("warnings", ())]),
        )
        # Before the model, which appears by a rename: whoever finds the model knows whose it is, whenever this dies.
        about = {"fingerprint": prepared.fingerprint, **result.to_dict()}
        comm.on_rank_zero(lambda: _write_json(job.work / RESULT, about))
        modules = {} if own is None else own.modules.state_dict()
        export_model(job, engine, Beside(prepared.state, modules))
        _say("job ends", step=loop.plan.steps, seconds=result.seconds)
    finally:
        dispose(engine)
    return result


def _say(message: str, **fields: Any) -> None:
    """One record for all ranks."""
    if comm.rank() == 0:
        LOGGER.info(message, extra=fields)


def _run_steps(loop: StepLoop, prepared: Prepared, first: int, progress: Progress | None) -> dict[str, float]:
    job, steps = loop.job, loop.plan.steps
    timer = checkpoint.SaveTimer(job.train, steps)
    alarm = CollapseAlarm(job.train, earlier=comm.on_rank_zero(lambda: _read_log(job)))
    trackers = open_trackers(job, fingerprint=prepared.fingerprint, first=first)
    warnings = _first_warnings(loop, prepared)
    row: dict[str, float] = {}
    try:
        for step in range(first, steps):
            row = loop.train_step(step)
            collapsed = None
            try:
                text = alarm.see(row)
            except RunError as e:  # raised below, once the row that it speaks of is written
                collapsed, text = e, str(e)
            warnings += [text] if text else []
            warnings += trackers.log(row) if trackers is not None else []
            logged = {**row, "warnings": warnings} if warnings else row
            comm.on_rank_zero(partial(_log, job, logged, progress))
            if collapsed is not None:
                raise collapsed
            warnings = []
            if timer.due(step + 1):
                meta = _meta(job, prepared, step + 1)
                frozen_excluded = job.train.lora is not None
                keep = job.train.keep_checkpoints
                checkpoint.save(
                    loop.engine, _checkpoints(job), meta, keep=keep, frozen_excluded=frozen_excluded, own=loop.own
                )
                timer.restart()
                _say("checkpoint written", step=step + 1)
    finally:
        if trackers is not None:
            trackers.close()
    return row


def _first_warnings(loop: StepLoop, prepared: Prepared) -> list[str]:
    """What can be said before the first step; it stands in the first row that this start logs."""
    train, policy = loop.job.train, loop.engine.module
    parameters = parameter_count(policy)
    dropped = check_dropped(prepared.dropped, len(prepared.selection), train.max_length)
    found = [check_lr(train, parameters), check_movement(train, parameters, loop.plan.steps), dropped]
    if train.packing is None and not policy.packed:
        found.append(f"sequences are padded, not packed: this model cannot be packed, {why_not_packed(policy.model)}")
    if train.logits_mib is not None and policy.logits_budget is None:
        found.append("the output head is no plain linear layer: a micro-batch's logits are held at once")
    return [text for text in found if text is not None]


def _log(job: TrainJob, row: dict[str, Any], progress: Progress | None) -> None:
    with (job.work / LOG).open("a") as log:
        log.write(json.dumps(row) + "\n")
    for text in row.get("warnings", ()):
        LOGGER.warning(text, extra={"step": row["step"]})
    if progress is not None:
        progress({"job": job.name, **row})


def _read_log(job: TrainJob) -> list[dict[str, Any]]:
    path = job.work / LOG
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _resume(job: TrainJob, engine: Any, prepared: Prepared, own: OwnModules | None) -> int:
    """The step to start at: 0, or where the newest checkpoint stands; the log is cut back to it."""
    found = comm.on_rank_zero(lambda: checkpoint.newest(_checkpoints(job)))
    first = 0
    if found is not None:
        path, meta = found
        first = meta.step
        expected = _meta(job, prepared, first)
        checkpoint.load(engine, path, meta, expected, frozen_excluded=job.train.lora is not None, own=own)
    comm.on_rank_zero(lambda: _cut_log(job.work / LOG, first))
    return first


def _reference(job: TrainJob, engine: Any, prepared: Prepared, first: int) -> Reference | None:
    if not method_of(job.train).needs_reference:
        return None
    path = comm.on_rank_zero(lambda: reference_path(job, prepared.selection))
    cached = comm.on_rank_zero(lambda: cached_reference(path))
    if cached is not None:
        return cached
    if first > 0:
        raise InputError(
            f"{path}: the reference log-probs of the resumed run are gone; delete {_checkpoints(job)} to start over"
        )
    return compute_reference(
        engine, prepared.data, prepared.selection, path, micro_batch_tokens=job.train.micro_batch_limit
    )


def _others(job: TrainJob, prepared: Prepared) -> dict[str, Reference]:
    """The log-probs of the models of the method's recipe, one model in memory at a time. Raises: InputError without."""
    found = {}
    for name in method_of(job.train).recipe(comm.on_rank_zero(lambda: objectives_in(job.pairs))):
        if name not in job.models:
            raise InputError(f"train.method: {job.train.method} trains the model {name!r} first; use `spa run`")
        other = replace(job, model=job.models[name], models={})
        path = comm.on_rank_zero(partial(reference_path, other, prepared.selection))
        cached = comm.on_rank_zero(partial(cached_reference, path))
        if cached is None:
            engine, tokens = make_engine(other), job.train.micro_batch_limit
            try:
                cached = compute_reference(engine, prepared.data, prepared.selection, path, micro_batch_tokens=tokens)
            finally:
                dispose(engine)
        found[name] = cached
    return found


def dispose(engine: Any) -> None:
    """Give back what an engine holds, so that the next job of this process starts clean. The process group stays.

    `destroy` alone frees little: DeepSpeed's hooks, closures and (ZeRO-3) a cache of the class keep engine, optimizer
    and every module alive, so they are emptied here.
    """
    engine.destroy()
    for store in (*engine.module.modules(), engine.optimizer, engine):
        vars(store).clear()
    forget_layouts()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _finished(job: TrainJob, mark: str) -> TrainResult | None:
    if not job.out.exists():
        return None
    try:
        raw = json.loads((job.work / RESULT).read_text())
        if raw.pop("fingerprint") == mark:
            return replace(TrainResult.from_dict(raw), skipped=True)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{job.out}: stands already and is not this job's result; remove it or name another folder")


def _meta(job: TrainJob, prepared: Prepared, step: int) -> checkpoint.CheckpointMeta:
    return checkpoint.CheckpointMeta(step, prepared.fingerprint, comm.world_size(), job.train.zero_stage)


def _checkpoints(job: TrainJob) -> Path:
    return job.work / "checkpoints"


def _cut_log(path: Path, steps: int) -> None:
    rows = path.read_text().splitlines()[:steps] if path.is_file() else []
    partial = path.with_suffix(".partial")
    partial.write_text("".join(row + "\n" for row in rows))
    os.replace(partial, path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2))
    os.replace(partial, path)


def main() -> int:
    """The command behind `python -m spa_ray.training.loop`; exit status as DESIGN.md."""
    parser = argparse.ArgumentParser(prog="python -m spa_ray.training.loop", description=__doc__)
    parser.add_argument("--job", type=Path, nargs="+", required=True, help="JSON of a TrainJob; several run in order")
    arguments = parser.parse_args()
    running: TrainJob | None = None
    try:
        jobs = [read_job(path) for path in arguments.job]
        with comm.process_group():
            for job in jobs:
                running = job
                result = run_job(job, lambda row: print(json.dumps(row), flush=True))
                if comm.rank() == 0:
                    print(json.dumps(result.to_dict()), flush=True)
    except InputError as e:
        print(e, file=sys.stderr)
        return 2
    except RunError as e:
        print(e, file=sys.stderr)
        return 1
    except RuntimeError as e:
        if running is None or not is_out_of_memory(e):
            raise
        print(out_of_memory(running.to_dict(), e), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
