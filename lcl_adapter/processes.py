"""Training in several processes: who this one is, and what each takes of a step. Without a launcher there is one, and nothing here waits.

torchrun, `accelerate launch` and Slurm all tell by the same environment variables.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import distributed

from lcl_adapter.errors import RecipeError, RunError


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """The one that writes files and speaks."""
    return rank() == 0


def join() -> None:
    """Meet the others, and take this process's own device. Does nothing where there is one process.

    Raises RunError where DeepSpeed is asked for and not installed.
    """
    if uses_deepspeed() and find_spec("deepspeed") is None:
        raise RunError("the launcher asks for DeepSpeed, which is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed")
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=default_device() == "cpu")


def default_device() -> Literal["cuda", "cpu"]:
    """The device that work goes to where none is named: the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def sharded() -> bool:
    """Whether the launcher shares the weights out among processes."""
    return uses_deepspeed() or _is_set("ACCELERATE_USE_FSDP")


def uses_deepspeed() -> bool:
    return _is_set("ACCELERATE_USE_DEEPSPEED")


def _is_set(key: str) -> bool:
    return os.environ.get(key, "false").lower() == "true"


def leave() -> None:
    """Alone again: what is loaded from here on is nobody else's."""
    if uses_deepspeed():
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def barrier() -> None:
    """Until all are here."""
    if count() > 1:
        distributed.barrier()


def gather(value: Any) -> list[Any]:
    """Each process's value, by rank; all must call it."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    distributed.all_gather_object(found, value)
    return found


def split_step(batch: int, accumulate: int, processes: int) -> tuple[int, int]:
    """Rows at a time and times, for one process, so that a step has the same rows whatever the number of processes.

    ``batch`` rows at a time, ``accumulate`` times, are one process's step. Raises RecipeError where a step cannot be shared evenly.
    """
    rows = batch * accumulate
    if rows % processes:
        raise RecipeError(
            [
                f"train: a step has {rows} rows (per_device_train_batch_size x gradient_accumulation_steps), which {processes} processes cannot "
                f"share; {rows + -rows % processes} could be"
            ]
        )
    own = rows // processes
    at_a_time = next(size for size in range(min(batch, own), 0, -1) if own % size == 0)
    return at_a_time, own // at_a_time
