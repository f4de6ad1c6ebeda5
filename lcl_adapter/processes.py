"""Training in several processes: which one this is, its device, and its part of a step.

torchrun, `accelerate launch` and Slurm set the same environment variables. Without a launcher there is one process, and
no function here waits.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from torch import distributed

from lcl_adapter.devices import training_device
from lcl_adapter.errors import RecipeError, RunError


def count() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def join() -> None:
    """Connect to the other processes and select this process's device. Does nothing where there is one process.

    Raises RunError where the launcher requires DeepSpeed and it is not installed.
    """
    if uses_deepspeed() and find_spec("deepspeed") is None:
        raise RunError("the launcher requires DeepSpeed, which is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed")
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=training_device() == "cpu")


def sharded() -> bool:
    """Whether the launcher shards the weights among processes."""
    return uses_deepspeed() or _is_set("ACCELERATE_USE_FSDP")


def uses_deepspeed() -> bool:
    """Whether the launcher uses DeepSpeed."""
    return _is_set("ACCELERATE_USE_DEEPSPEED")


def _is_set(key: str) -> bool:
    return os.environ.get(key, "false").lower() == "true"


def leave() -> None:
    """Disconnect from the other processes. A model that is loaded afterwards is not sharded."""
    if uses_deepspeed():
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def barrier() -> None:
    """Wait until all processes have called it."""
    if count() > 1:
        distributed.barrier()


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank. All must call it."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def split_step(batch: int, accumulate: int, processes: int) -> tuple[int, int]:
    """Each process's batch size and accumulation, so that a step has the same rows for any number of processes.

    batch, accumulate: those of a single process; a step has ``batch * accumulate`` rows.
    Raises RecipeError where the rows of a step cannot be divided evenly.
    """
    rows = batch * accumulate
    if rows % processes:
        raise RecipeError(
            [
                f"train: a step has {rows} rows (per_device_train_batch_size x gradient_accumulation_steps), which {processes} processes cannot "
                f"divide evenly; use {rows + -rows % processes} rows"
            ]
        )
    own = rows // processes
    size = next(size for size in range(min(batch, own), 0, -1) if own % size == 0)
    return size, own // size
