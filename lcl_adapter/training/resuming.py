"""Resuming from a checkpoint that somebody else may have made: it holds plain tensors and numbers, or the run ends with a message.

transformers unpickles tensors only, so nothing in a checkpoint is ever run. What its readers raise on anything else is
caught here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState
from trl import SFTTrainer

from lcl_adapter import reading
from lcl_adapter.errors import RunError

STATE = "trainer_state.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # of an optimizer's state, those that have the shape of their weight
NUMBERS = (int, float)


class ResumingTrainer(SFTTrainer):
    """SFTTrainer whose reading of a checkpoint raises RunError and nothing else."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _faults(resume_from_checkpoint, "its adapter"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also refuses states of other shapes or kinds, on which the first step would fail."""
        if checkpoint is None:
            return
        before = dict(vars(self.lr_scheduler)) if self.lr_scheduler is not None else {}
        with _faults(checkpoint, "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)
            for parameter, state in self.optimizer.state.items():
                for name in MOMENTS:
                    moment = state.get(name)
                    if isinstance(moment, torch.Tensor) and moment.dtype.is_floating_point and moment.shape != parameter.shape:
                        raise ValueError(f"{name} of {list(moment.shape)} for a weight of {list(parameter.shape)}")
            for name, value in vars(self.lr_scheduler).items() if before else ():
                if name not in before or not _of_one_kind(value, before[name]):
                    raise ValueError(f"{name} is {reading.brief(value, 60)}")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _faults(checkpoint, "rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _faults(checkpoint, "scaler.pt"):
            super()._load_scaler(checkpoint)


def _of_one_kind(value: Any, other: Any) -> bool:
    return (isinstance(value, NUMBERS) and isinstance(other, NUMBERS)) or isinstance(value, type(other)) or other is None


def check_checkpoint(checkpoint: Path) -> None:
    """Raises RunError for a checkpoint with files that must not be read, or without a state of its own step."""
    if fault := reading.fault_of_folder(checkpoint):
        raise RunError(f"{checkpoint}: {fault}. Remove the checkpoint, and resume from an earlier one.")
    with _faults(checkpoint, STATE):
        reading.read_json(checkpoint / STATE)
        state = TrainerState.load_from_json(str(checkpoint / STATE))
        if state.global_step != int(checkpoint.name.partition("-")[2]) or isinstance(state.global_step, bool):
            raise ValueError(f"global_step is {reading.brief(state.global_step, 60)}")
        if not isinstance(state.log_history, list) or not isinstance(state.stateful_callbacks, dict):
            raise TypeError("log_history is a list, stateful_callbacks an object")


@contextmanager
def _faults(checkpoint: str | Path | None, what: str) -> Iterator[None]:
    try:
        with reading.one_line():
            yield
    except ValueError as error:
        raise RunError(
            f"{checkpoint}: cannot be resumed from, {what} is not what a training wrote ({error}). Only tensors and numbers are read, "
            "nothing is run. Remove the checkpoint, and resume from an earlier one."
        ) from error
