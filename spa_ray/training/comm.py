"""The few collectives that the step loop needs, over an already chosen backend (gloo on CPU, nccl on GPU).

Comes in: torch.distributed, initialised by Ray Train, torchrun or `single_process`. Never: Ray, models.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spa_ray.errors import InputError, RunError

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def device() -> torch.device:
    """The device that this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


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
    """Do it on rank 0, hand the result to all. If it fails, it fails on every rank, so that none waits for ever."""
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
    dist.broadcast_object_list(answer, src=0)
    if failure is not None:
        raise failure
    value, error = answer[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


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
