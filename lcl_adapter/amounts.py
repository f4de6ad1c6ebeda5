"""Amounts of memory as people write them, and an allocator that gives back what it no longer needs."""

from __future__ import annotations

import ctypes
import re
import sys

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "": 10**9}
M_MMAP_THRESHOLD = -3  # malloc.h
LARGE = 1 << 20


def memory_bytes(text: str) -> int:
    """``1.5 GB`` or ``1.5g`` -> 1500000000; a bare number is gigabytes. Raises ValueError for what is no amount of memory."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT]i?B?|)", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is no amount of memory; write for instance 500MB, 16GB or 16 GiB")
    unit = match[2].upper().removesuffix("B")
    return int(float(match[1]) * UNITS[f"{unit[:1]}iB" if unit.endswith("I") else f"{unit}B" if unit else ""])


def trim_heap(done: int, every: int = 100 * 10**6) -> int:
    """Called with the bytes worked on since the last time: from ``every`` on, free pieces between used ones return to the system.

    Returns what is to be counted on from. glibc cannot use a freed aligned piece for the next of the same size, so that a
    loop over tensors grows by several times what is alive in it. Elsewhere nothing happens.
    """
    if done < every:
        return done
    if sys.platform == "linux":
        trimmer = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trimmer is not None:
            trimmer(0)
    return 0


def release_large_blocks() -> None:
    """Large tensors return to the system when they are freed.

    glibc moves the size from which it does so up to 32 MB by itself; on a CPU, training then holds a third more than
    is alive (benchmarks/results/plan.txt). Elsewhere nothing happens.
    """
    if sys.platform == "linux":
        setter = getattr(ctypes.CDLL(None), "mallopt", None)
        if setter is not None:
            setter(M_MMAP_THRESHOLD, LARGE)
