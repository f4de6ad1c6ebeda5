"""Measure some suites every few steps of a training, and save the best checkpoint that passes the retention gate.

The evaluation at the end decides whether the run passes the gate. If not, the saved checkpoint can be used. It is
chosen on other questions than those of that evaluation (``lcl_adapter.evaluate.cases.Selection``), whose figures would
otherwise be too high.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lcl_adapter import processes, reading
from lcl_adapter.amounts import memory_bytes
from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.adapter import load_weights
from lcl_adapter.base.model import Base
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.evaluate import allowance_met, build_cells, drop_unreadable, measure_adapter, measure_base, retention_of
from lcl_adapter.evaluate.metrics import Estimate
from lcl_adapter.files import write_json
from lcl_adapter.recipe import Recipe
from lcl_adapter.terminal import console
from lcl_adapter.training.callbacks import Running
from lcl_adapter.training.trackers import figures_of

BEST = "best"
MEASURED = "watched.json"


class MeasureDuring(TrainerCallback):
    """Measures the suites ``evaluate.watched`` every ``evaluate.every`` steps, with the adapter and the base.

    ``watched.json`` has all figures. ``best/`` is an adapter that passed the gate: among those, one whose measured
    falls are within their allowances if there is any, and then the one with the highest mean.
    Training ends after ``evaluate.patience`` measurements without a new best one.
    """

    def __init__(self, recipe: Recipe, base: Base, running: Running) -> None:
        self.recipe, self.running = recipe, running
        self.folder = recipe.output
        # A cache of its own: features cached during prediction are inference tensors, which training cannot use.
        vision = VisionFeatures(base, memory_bytes(recipe.train.feature_cache) // 4)
        self.predictor = Predictor(base, vision, recipe.evaluate.batch_size)
        cells = build_cells(recipe, recipe.evaluate.during_limit, tuple(recipe.evaluate.watched), during=True)
        self.cells = [drop_unreadable(cell, vision)[0] for cell in cells]
        self.base_estimates: dict[str, Estimate] = {}
        self.results: dict[str, Any] = self._saved_results()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step = state.global_step
        if step % (self.recipe.evaluate.every or state.max_steps):
            return
        if step not in [s["step"] for s in self.results["steps"]]:
            self._measure(step, model)
        if self.recipe.evaluate.patience and since_best(self.results, step) >= self.recipe.evaluate.patience:
            control.should_training_stop = True

    def _measure(self, step: int, model: Any) -> None:
        began = time.monotonic()
        model.eval()
        try:
            if not self.base_estimates:
                self.base_estimates = measure_base(self.cells, self.predictor)
            estimates = measure_adapter(self.cells, self.predictor)
        finally:
            model.train()
        base_figures, figures = _rounded(self.base_estimates), _rounded(estimates)
        self.results["base"] = base_figures
        gate = retention_of([(c.suite, len(c.cases), self.base_estimates[c.name].minus(estimates[c.name])) for c in self.cells], self.recipe)
        passed, within = all(g["retained"] for g in gate), allowance_met(gate)
        mean = sum(estimate.value for estimate in estimates.values()) / len(estimates)  # more is better, of a perplexity too
        best = self.results["best"]
        better = passed and (best is None or (within, mean) > (best.get("within", True), best["mean"]))
        better = processes.gather(better)[0]  # saving needs all processes, so all follow the first one's decision
        if better:
            self.results["best"] = {"step": step, "mean": round(mean, 4), "within": within}
            self.running.save(self.folder / BEST, {"step": step, "watched": figures})
        self.results["steps"].append({"step": step, "figures": figures, "kept": passed, "retention": gate})
        if processes.is_first():
            write_json(self.folder / MEASURED, self.results)
        self.running.log(figures_of("eval", base_figures, figures) | {"eval_runtime": time.monotonic() - began})
        shown = ", ".join(f"{name} {base_figures[name]:.3f} -> {value:.3f}" for name, value in figures.items())
        verdict = f"{'passes' if passed else 'does not pass'}{', the best so far' if better else ''}"
        console.print(f"step {step}: {shown}: {verdict}", highlight=False)

    def _saved_results(self) -> dict[str, Any]:
        """The results of a run that is resumed; empty ones for a new run."""
        try:
            results: dict[str, Any] = reading.read_json(self.folder / MEASURED)
        except (OSError, ValueError):
            return {"base": {}, "best": None, "steps": []}
        return results


def _rounded(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    return {name: round(estimate.shown, 4) for name, estimate in estimates.items()}


def since_best(results: Mapping[str, Any], step: int) -> int:
    """How many measurements up to ``step`` came after the best one; 0 where the best one comes after ``step``."""
    best = results["best"]["step"] if results["best"] else 0
    return sum(best < measured["step"] <= step for measured in results["steps"]) if best <= step else 0


def use_best(recipe: Recipe, base: Base, step: int, planned: int) -> dict[str, Any]:
    """Give a model the weights of the best measurement, where one passed the gate; returns facts for the manifest.

    step: the training's last one. planned: the number of steps that the recipe asks for.
    """
    facts: dict[str, Any] = {}
    if step < planned:
        waited = f"no better mean in {recipe.evaluate.patience} measurements"
        facts["early_stop"] = {"step": step, "of": planned, "reason": waited}
        console.print(f"stopped at step {step} of {planned}: {waited}", highlight=False)
    best = best_of(recipe.output)
    if best is None:
        console.print("no measured step passes the retention gate: the adapter is that of the last step", style="yellow", highlight=False)
        return facts
    load_weights(base, recipe.output / BEST)
    console.print(f"the adapter is that of step {best['step']}, the best that was measured", highlight=False)
    return facts | {"best_step": best["step"]}


def best_of(folder: Path) -> dict[str, Any] | None:
    """The step and the mean of the best checkpoint that passed; None where none did."""
    try:
        best: dict[str, Any] | None = reading.read_json(folder / MEASURED)["best"]
    except (OSError, ValueError, KeyError):
        return None
    return best
