"""Parse amounts of memory, and make the allocator return freed memory to the system."""

from __future__ import annotations

import ctypes
import re
import sys

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "": 10**9}
M_MMAP_THRESHOLD = -3  # malloc.h
LARGE = 32 << 20  # from 1 MiB on, page faults took a third of the time of a training (docs/lab.md)


def memory_bytes(text: str) -> int:
    """``1.5 GB`` or ``1.5g`` -> 1500000000 bytes. A bare number is gigabytes. Raises ValueError for any other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT]i?B?|)", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is no amount of memory; write for instance 500MB, 16GB or 16 GiB")
    unit = match[2].upper().removesuffix("B")
    return int(float(match[1]) * UNITS[f"{unit[:1]}iB" if unit.endswith("I") else f"{unit}B" if unit else ""])


def trim_heap(processed: int, every: int = 100 * 10**6) -> int:
    """Return free memory inside the heap to the system, once for every ``every`` bytes processed.

    processed: bytes processed since the last trim. Returns the new count: 0 after a trim, else ``processed``.
    glibc does not reuse a freed aligned block for the next one of the same size, so a loop over tensors would grow to
    several times the memory in use. Does nothing on other systems than Linux.
    """
    if processed < every:
        return processed
    if sys.platform == "linux":
        trimmer = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trimmer is not None:
            trimmer(0)
    return 0


def release_large_blocks() -> None:
    """Make the allocator return every block of 32 MiB or more to the system when it is freed.

    glibc ends at this threshold by itself, once it has freed a block of that size. Does nothing on other systems than
    Linux.
    """
    if sys.platform == "linux":
        setter = getattr(ctypes.CDLL(None), "mallopt", None)
        if setter is not None:
            setter(M_MMAP_THRESHOLD, LARGE)
