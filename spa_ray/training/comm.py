"""The few collectives that the step loop needs, over an already chosen backend (gloo on CPU, nccl on GPU).

Comes in: torch.distributed, initialised by Ray Train, torchrun or `single_process`. Never: Ray, models.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spa_ray.errors import InputError, RunError

T = TypeVar("T")
RANK_ZERO_SECONDS = 4 * 3600.0  # for what rank 0 does alone: merging an adapter, writing and uploading a model
_turns = itertools.count()


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def device() -> torch.device:
    """The device that this rank computes on: a GPU only where the group's backend can reach it. On a GPU host, ranks
    without GPUs of their own (`gpus_per_worker: 0`) talk by gloo."""
    if torch.cuda.is_available() and not (dist.is_initialized() and dist.get_backend() == "gloo"):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def barrier() -> None:
    dist.barrier()


def all_sum(values: Tensor) -> Tensor:
    """The elementwise sum over all ranks, in place."""
    dist.all_reduce(values)
    return values


def gather_lists(mine: list[str]) -> list[str]:
    """All ranks' lists, one after the other."""
    lists: list[list[str]] = [[] for _ in range(world_size())]
    dist.all_gather_object(lists, mine)
    return [item for one in lists for item in one]


def on_rank_zero(work: Callable[[], T]) -> T:
    """Do it on rank 0, hand the result to all. If it fails, it fails on every rank, so that none waits for ever.

    The other ranks wait at the group's key-value store, not in a collective, whose time-out of 30 minutes is meant for
    steps: rank 0 may merge, write or upload for `RANK_ZERO_SECONDS`.
    """
    answer: list[tuple[T | None, InputError | RunError | None]] = [(None, None)]
    failure: Exception | None = None
    if rank() == 0:
        try:
            answer[0] = (work(), None)
        except (InputError, RunError) as e:
            answer[0] = (None, e)
        except Exception as e:  # noqa: BLE001  # raised again below, once the other ranks know
            failure = e
            answer[0] = (None, RunError(f"training failed on rank 0: {type(e).__name__}: {e}"))
    _meet_rank_zero()
    dist.broadcast_object_list(answer, src=0)
    if failure is not None:
        raise failure
    value, error = answer[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _meet_rank_zero() -> None:
    """Return on every rank once rank 0 is here. Raises: RunError when it does not come."""
    turn = next(_turns)  # the same on every rank: all of them make the same calls
    if world_size() == 1:
        return
    store, key = dist.distributed_c10d._get_default_store(), f"spa_ray/rank_zero/{turn}"
    if rank() == 0:
        store.set(key, "done")
        return
    try:
        store.wait([key], timedelta(seconds=RANK_ZERO_SECONDS))
    except dist.DistNetworkError:  # rank 0 has died: the group is started again
        raise
    except RuntimeError as e:  # what a store raises differs between stores
        raise RunError(f"training: rank 0 was not done with its own work in {RANK_ZERO_SECONDS:g} s") from e


@contextmanager
def process_group() -> Iterator[None]:
    """A process group for runs without Ray: torchrun's where its variables are set, else one of this process alone."""
    alone = {} if "RANK" in os.environ else _variables_of_one()
    os.environ.update(alone)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
        for key in alone:
            del os.environ[key]


def _variables_of_one() -> dict[str, str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def set_threads() -> None:
    """Share the cores that this process may use among the ranks of this machine. Only the CPU's arithmetic cares."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
