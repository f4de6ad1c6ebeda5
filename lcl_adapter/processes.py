"""Training in several processes: who this one is, and what each takes of a step. Without a launcher there is one, and nothing here waits.

torchrun, `accelerate launch` and Slurm all tell by the same environment variables.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import distributed

from lcl_adapter.errors import RecipeError, RunError


def world() -> int:
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
    if deepspeed() and find_spec("deepspeed") is None:
        raise RunError("the launcher asks for DeepSpeed, which is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed")
    if world() > 1:
        from accelerate import PartialState

        PartialState(cpu=on_cpu())


def on_cpu() -> bool:
    return not torch.cuda.is_available()


def sharded() -> bool:
    """Whether the launcher shares the weights out among processes."""
    return deepspeed() or _says_yes("ACCELERATE_USE_FSDP")


def deepspeed() -> bool:
    return _says_yes("ACCELERATE_USE_DEEPSPEED")


def _says_yes(key: str) -> bool:
    return os.environ.get(key, "false").lower() == "true"


def leave() -> None:
    """Alone again: what is loaded from here on is nobody else's."""
    if deepspeed():
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def wait() -> None:
    """Until all are here."""
    if world() > 1:
        distributed.barrier()


def gathered(value: Any) -> list[Any]:
    """Each process's value, by rank; all must call it."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    distributed.all_gather_object(found, value)
    return found


def share(batch: int, accumulate: int, processes: int) -> tuple[int, int]:
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
