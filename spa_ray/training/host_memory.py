"""What glibc does with host memory that is freed: give it back at once, or keep it for the next use.

Comes in: nothing. Goes out: context managers. Where there is another C library they do nothing. Never: GPU memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# mallopt's parameters, and what glibc starts with or comes to by itself.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4
SMALLEST = 128 * 1024
LARGEST = 32 * 1024 * 1024
MAPPINGS = 65536

NEVER = 2**31 - 1  # bytes; the parameter is an int
AHEAD = 64 * 1024 * 1024


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Host memory that is freed inside this block goes back to the system.

    Partitions that stay are allocated between complete tensors that go. In one heap they would keep the holes between
    them resident: without this a rank of two on CPUs was seen to keep more than a complete model.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, SMALLEST)
    try:
        yield
    finally:
        libc.mallopt(MMAP_THRESHOLD, LARGEST)


@contextmanager
def kept_for_reuse() -> Iterator[None]:
    """Host memory that is freed inside this block is kept, and goes back to the system at its end.

    A step allocates what the step before it freed. glibc gives large blocks back at once, and the system zeroes each of
    their pages again: a twentieth to a tenth of a step's processor time on two cores (docs/TRAINING.md).
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, NEVER)
    libc.mallopt(TOP_PAD, AHEAD)
    try:
        yield
    finally:
        libc.mallopt(MMAP_MAX, MAPPINGS)
        libc.mallopt(TRIM_THRESHOLD, SMALLEST)
        libc.mallopt(TOP_PAD, SMALLEST)
        libc.malloc_trim(0)


def _glibc() -> Any:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
