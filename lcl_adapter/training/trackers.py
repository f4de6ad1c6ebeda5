"""Experiment trackers: what Trainer logs, and the figures at the end of a run, under the same names in each of them.

    train/loss, train/learning_rate, train/tokens_per_second    every `logging_steps`
    train/shares/<source>                                       the source's part of the rows so far
    eval/<line>/base, eval/<line>/adapter                       while training, every `evaluate.every` steps
    test/<line>/base, test/<line>/adapter                       at the end, on all of a suite's questions

<line> is a line of the report, for instance ``2way-2shot-easy``. transformers' own callbacks write them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback, get_available_reporting_integrations, get_reporting_integration_callbacks

from lcl_adapter.errors import RecipeError
from lcl_adapter.recipe import Recipe

TENSORBOARD = "tensorboard"  # the folder of its files in a run
OWN_EXTRA = {"tensorboard", "trackio"}  # installed by lcl-adapter[track]
EVENTS = (
    "on_epoch_begin", "on_epoch_end", "on_step_begin", "on_step_end", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_save",
)  # fmt: skip


class Trackers(TrainerCallback):
    """The trackers under ``train.report_to``, open until the evaluation after a training is logged too.

    A context manager, which closes them. Raises RecipeError for each whose package is missing.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.folder = recipe.output
        self.callbacks: list[TrainerCallback] = []
        self.arguments: tuple[Any, Any, Any] | None = None  # Trainer's arguments, state and control, once a training began
        names = list(recipe.train.report_to)
        if "all" in names:
            names = get_available_reporting_integrations()
        faults = []
        for name in names:
            try:
                self.callbacks += [make() for make in get_reporting_integration_callbacks([name])]
            except (ImportError, RuntimeError, AssertionError) as error:
                hint = 'pip install "lcl-adapter[track]"' if name in OWN_EXTRA else str(error).splitlines()[0]
                faults.append(f"train.report_to: {name} is not installed: {hint}")
        if faults:
            raise RecipeError(faults)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def log_report(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log the figures of an evaluation: the rows of its report."""
        if self.arguments is not None:
            figures = figures_of("test", {r["name"]: r["base"]["value"] for r in rows}, {r["name"]: r["adapter"]["value"] for r in rows})
            self.on_log(*self.arguments, logs=figures)

    def close(self) -> None:
        """End the trackers' runs. Does nothing before a training and the second time."""
        if self.arguments is not None:
            ended = [callback for callback in self.callbacks if not isinstance(callback, WandbCallback)]
            _call(ended, "on_train_end", *self.arguments, model=SimpleNamespace())  # the model itself may be gone by now
            self.arguments = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.arguments = args, state, control
        for callback in self.callbacks:
            if isinstance(callback, TensorBoardCallback) and state.is_world_process_zero:
                folder = Path(callback.logging_dir or self.folder / TENSORBOARD)
                # What a resumed run had logged after its checkpoint is logged again, and hidden here
                purge = {"purge_step": state.global_step + 1} if state.global_step else {}
                callback.tb_writer = callback._SummaryWriter(log_dir=str(folder), **purge)
        _call(self.callbacks, "on_train_begin", args, state, control, **more)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        """Without Trainer's ``epoch``, which is the part of the run that is done and no epoch of the sources."""
        shown = {name: value for name, value in (logs or {}).items() if name != "epoch"}
        _call(self.callbacks, "on_log", args, state, control, logs=shown, **more)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Only W&B ends with the training: it may save the model then, and its run stays open."""
        _call([callback for callback in self.callbacks if isinstance(callback, WandbCallback)], "on_train_end", args, state, control, **more)


def figures_of(stage: str, base: Mapping[str, float], adapter: Mapping[str, float]) -> dict[str, float]:
    """Figures by line of the report -> a tracker's names. stage: ``eval`` while training, ``test`` after it."""
    return {f"{stage}_{line}/{who}": value for line in adapter for who, value in (("base", base[line]), ("adapter", adapter[line]))}


def _call(callbacks: Sequence[TrainerCallback], event: str, *arguments: Any, **more: Any) -> None:
    """Call an event of each callback that has it. What they print is no result of a command: it goes to standard error."""
    for callback in callbacks:
        if getattr(type(callback), event) is not getattr(TrainerCallback, event):
            with redirect_stdout(sys.stderr):
                getattr(callback, event)(*arguments, **more)


def _forward(event: str) -> Callable[..., None]:
    def forward(self: Trackers, *arguments: Any, **more: Any) -> None:
        _call(self.callbacks, event, *arguments, **more)

    return forward


for _event in EVENTS:
    setattr(Trackers, _event, _forward(_event))
