"""The device that a model runs on: which one, its free memory, and what to do when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import psutil
import torch

from lcl_adapter.amounts import trim_heap

Device = Literal["cuda", "mps", "cpu"]


def default_device() -> Device:
    """The device that is used where none is named: the GPU where the machine has one, CUDA's or Apple's."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def training_device() -> Literal["cuda", "cpu"]:
    """The device that training uses where none is named. Apple's GPUs are used for answering only."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_memory(device: str) -> int:
    """Bytes that can still be allocated on this machine's GPU, or in its main memory for "cpu".

    On a GPU, blocks that torch has freed and not returned count as free.
    """
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    if device == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return int(psutil.virtual_memory().available)


def release_memory(loaded: bool = False) -> None:
    """Free what only cycles of references still hold, and return freed blocks to the system, a CPU's and a GPU's.

    loaded: also what was set aside (:func:`loaded_objects_set_aside`), which takes longer.
    """
    set_aside = loaded and gc.get_freeze_count() > 0
    if set_aside:
        gc.unfreeze()
    gc.collect()
    if set_aside:
        gc.freeze()
    trim_heap(1, every=1)  # glibc keeps freed blocks below 32 MiB
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


@contextmanager
def loaded_objects_set_aside() -> Iterator[None]:
    """Meanwhile Python's garbage collector does not look through the objects that exist now.

    Those of a model and its libraries are most of all, and looking through them takes 0.3 s, in which no thread goes on.
    """
    earlier = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not earlier:
            gc.unfreeze()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory. Only CUDA has an error class for it."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)
