"""Trainer callbacks: a line of figures for every logged step, a progress bar, a trial run of the longest row."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from lcl_adapter import processes
from lcl_adapter.base.encoder import Encoded
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.errors import DataError, RunError
from lcl_adapter.files import read_lines, write_text
from lcl_adapter.terminal import console
from lcl_adapter.training.collate import collate
from lcl_adapter.training.packing import widest


@dataclass(frozen=True)
class Running:
    """What a callback may ask of the training that it is a part of. Every process has to ask the same.

    save: writes the current adapter into a folder, with further facts of its manifest. log: logs figures as Trainer's
    own.
    """

    save: Callable[[Path, Mapping[str, Any]], None]
    log: Callable[[dict[str, float]], None]


class MetricsCallback(TrainerCallback):
    """Writes one JSON line for every logged step.

    When a run is resumed, the lines after its checkpoint are removed first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not processes.is_first():
            return
        lines = read_lines(self.path) if self.path.exists() else []
        # The last line of a killed run can be incomplete.
        earlier = [line for line, value in lines if value.get("step", 0) <= state.global_step]
        write_text(self.path, "".join(line + "\n" for line in earlier))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs and processes.is_first():
            names = ("loss", "grad_norm", "learning_rate")
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **{n: logs[n] for n in names if n in logs}}) + "\n")


class BarCallback(TrainerCallback):
    """A progress bar with the loss and the time left; plain lines where the output is no terminal."""

    def __init__(self) -> None:
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"))
        self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.start()
        self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, loss="-")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.bar.update(self.task, loss=f"{float(logs['loss']):.3f}")
            if not console.is_terminal:
                console.print(f"step {state.global_step}/{state.max_steps} loss {float(logs['loss']):.3f}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.stop()


class LongestFirst(TrainerCallback):
    """Runs a batch of the longest row forward and backward before the first step, beside all that later steps hold.

    A lack of memory then shows in the first minute. It leaves no trace: gradients and the optimiser's state are dropped,
    weights, random states and counters are restored.

    row: the longest row. pad: the id that rows are padded with. loss: the trainer's ``compute_loss``. holds_optimiser:
    whether the optimiser's state is allocated for the trial; a resumed run has it already. budget: the most tokens of a
    packed row; the trial's rows are then as long as packed ones can be.
    Raises RunError where the row does not fit the device's memory.
    """

    def __init__(
        self,
        row: Encoded,
        pad: int,
        vision: VisionFeatures,
        loss: Callable[[Any, dict[str, Any]], torch.Tensor],
        holds_optimiser: bool = True,
        budget: int | None = None,
    ) -> None:
        self.row, self.pad, self.vision, self.loss = row, pad, vision, loss
        self.holds_optimiser, self.budget = holds_optimiser, budget

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        vision, device = self.vision, self.vision.base.device
        batch = collate(widest(self.row, args.per_device_train_batch_size, self.budget), self.pad)
        counters = vision.requested, vision.computed
        optimizer = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper, which counts steps
        new_state = self.holds_optimiser and optimizer is not None and not optimizer.state
        try:
            if new_state:
                _allocate_state(optimizer)
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                model.train()
                self.loss(model, {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}).backward()
        except DataError:
            pass  # a picture of the row is broken; training replaces such a row
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"the longest row, {len(self.row)} tokens, does not fit this device's memory ({str(error).splitlines()[0]}). "
                "`lcl-adapter plan RECIPE` shows what to change."
            ) from error
        finally:
            model.zero_grad(set_to_none=True)
            if new_state:
                optimizer.state.clear()
            vision.requested, vision.computed = counters


def _allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimiser allocate its state, by a step whose gradients are zero. The weights are put back."""
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    copies = [parameter.detach().to("cpu", copy=True) for parameter in weights]
    for parameter in weights:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with torch.no_grad():
        for parameter, copy in zip(weights, copies, strict=True):
            parameter.copy_(copy)
