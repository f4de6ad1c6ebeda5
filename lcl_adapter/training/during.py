"""Measuring while training: some suites every so many steps, and the best checkpoint that keeps what must be kept.

The whole evaluation at the end decides whether a run has kept enough; this is what can be gone back to where it has not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lcl_adapter import processes
from lcl_adapter.amounts import memory_bytes
from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.model import Base
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.evaluate import build_cells, measure_adapter, measure_base, readable, retention_of
from lcl_adapter.files import write_json
from lcl_adapter.recipe import Recipe
from lcl_adapter.terminal import console

BEST = "best"
WATCHED = "watched.json"
Save = Callable[[Path, Mapping[str, Any]], None]


class Watch(TrainerCallback):
    """Every ``evaluate.every`` steps: the watched suites for the adapter as it stands, the base's figures beside it.

    ``watched.json`` has all of them; ``best/`` is the adapter with the highest mean of those that passed the gate.
    """

    def __init__(self, recipe: Recipe, base: Base, save: Save) -> None:
        self.recipe, self.save = recipe, save
        self.folder = recipe.output
        # Features kept for predictions are inference tensors, which training cannot use: a store of its own.
        vision = VisionFeatures(base, memory_bytes(recipe.train.feature_cache) // 4)
        self.predictor = Predictor(base, vision, recipe.evaluate.batch_size)
        drawn = build_cells(recipe, recipe.evaluate.during_limit, tuple(recipe.evaluate.watched))
        self.cells = [readable(cell, vision)[0] for cell in drawn]
        self.told: dict[str, Any] = self._earlier()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % (self.recipe.evaluate.every or state.max_steps) or state.global_step in [s["step"] for s in self.told["steps"]]:
            return
        model.eval()
        try:
            missing = [cell for cell in self.cells if cell.name not in self.told["base"]]
            if missing:
                self.told["base"] |= measure_base(missing, self.predictor)
            figures = measure_adapter(self.cells, self.predictor)
        finally:
            model.train()
        before = self.told["base"]
        gate = retention_of([(c.suite, before[c.name], figures[c.name]) for c in self.cells], self.recipe)
        passed = all(g["kept"] for g in gate)
        mean = sum(figures.values()) / len(figures)
        best = self.told["best"]
        better = passed and (best is None or mean > best["mean"])
        better = processes.gather(better)[0]  # saving is done together: all go by what the first found
        if better:
            self.told["best"] = {"step": state.global_step, "mean": round(mean, 4)}
            self.save(self.folder / BEST, {"step": state.global_step, "watched": figures})
        self.told["steps"].append({"step": state.global_step, "figures": figures, "kept": passed})
        if processes.is_first():
            write_json(self.folder / WATCHED, self.told)
        shown = ", ".join(f"{name} {before[name]:.3f} -> {value:.3f}" for name, value in figures.items())
        console.print(
            f"step {state.global_step}: {shown}: {'passes' if passed else 'does not pass'}{', the best so far' if better else ''}", highlight=False
        )

    def _earlier(self) -> dict[str, Any]:
        """What a run that is resumed had measured by the step it goes on from."""
        try:
            told: dict[str, Any] = json.loads((self.folder / WATCHED).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"base": {}, "best": None, "steps": []}
        return told


def best_of(folder: Path) -> dict[str, Any] | None:
    """The step and the mean of the best checkpoint that passed, None where none did."""
    try:
        found: dict[str, Any] | None = json.loads((folder / WATCHED).read_text(encoding="utf-8"))["best"]
    except (OSError, ValueError, KeyError):
        return None
    return found
