"""Parse amounts of memory, and make the allocator return freed memory to the system."""

from __future__ import annotations

import ctypes
import re
import sys

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "": 10**9}


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
