"""What a recipe will take, and what to change where that is too much: ``budget``'s formulas on the recipe's own longest rows."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from lcl_adapter.answering.predict import TOGETHER
from lcl_adapter.base.encoder import Encoded
from lcl_adapter.base.layouts import open_checkpoint
from lcl_adapter.base.model import attach, load_base, load_encoder
from lcl_adapter.base.precision import choose_precision
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.errors import DataError, EpisodeError, RecipeError
from lcl_adapter.memory import budget
from lcl_adapter.processes import default_device
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.schema import QUANTISED, Precision
from lcl_adapter.recipe.sources import EpisodeOptions, InspectionOptions
from lcl_adapter.training.collate import Collator
from lcl_adapter.training.lengths import check_rows
from lcl_adapter.training.trainer import LclTrainer

ENOUGH = 3  # ways to fit that are shown


@dataclass(frozen=True)
class Change:
    """One thing to change in a recipe, as an override, and what it costs in words."""

    override: str
    cost: str
    recipe: Recipe


@dataclass
class Plan:
    """A recipe with what its forecasts need, read once."""

    recipe: Recipe
    device: str
    mixture: Mixture
    memory: int

    @cached_property
    def config(self) -> Any:
        return open_checkpoint(BaseRef.of(self.recipe)).config

    @cached_property
    def shape(self) -> budget.Shape:
        return budget.shape_of(self.config)

    @cached_property
    def precision(self) -> Precision:
        return choose_precision(self.config, self.device, self.memory)[0] if self.recipe.precision == "auto" else self.recipe.precision

    @cached_property
    def collator(self) -> Collator:
        return Collator(self.mixture, load_encoder(BaseRef.of(self.recipe)), on_fault=self.recipe.data.on_fault)

    @cached_property
    def row(self) -> Encoded:
        return check_rows(self.collator, []).longest

    def training(self) -> budget.Forecast:
        recipe = self.recipe
        work = budget.longest(self.row, recipe.train.per_device_train_batch_size, recipe.tiles)
        return budget.training(self.shape, self.precision, self.device, recipe.adapter, recipe.train, work)

    def evaluation(self) -> budget.Forecast:
        """Support sets as long as the longest row's, a batch of them at a time."""
        support = self.row.branch.count(0) or len(self.row)
        question = max(1, len(self.row) - support)
        sets = self.recipe.evaluate.batch_size
        return budget.answering(self.shape, self.precision, self.device, self.recipe.adapter, sets, support, TOGETHER * question, sets * 8)

    def serving(self) -> budget.Forecast:
        """One support set and its questions."""
        support = self.row.branch.count(0) or len(self.row)
        question = max(1, len(self.row) - support)
        return budget.answering(self.shape, self.precision, self.device, self.recipe.adapter, 1, support, TOGETHER * question, 8)


def available(device: str) -> int:
    """Bytes that a new process could take on this machine's device."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def make(recipe: Recipe, memory: int | None = None, device: str | None = None, mixture: Mixture | None = None) -> dict[str, Any]:
    """Forecasts for training, evaluation and serving; whether training fits ``memory``, and if not, ways to make it.

    Nothing of the base's weights is loaded. Raises RecipeError, DataError, ModelError as training would.
    """
    device = device or default_device()
    if device == "cuda" and memory is None and not torch.cuda.is_available():
        raise RecipeError(["there is no GPU here to ask how much memory it has: say it with --memory, for instance --memory 16GB"])
    memory = memory or available(device)
    plan = Plan(recipe, device, mixture or Mixture(recipe), memory)
    forecasts = {"training": plan.training(), "evaluation": plan.evaluation(), "serving": plan.serving()}
    told = {name: {"total": f.total, "parts": f.parts, "moments": f.moments} for name, f in forecasts.items()}
    encoder = plan.collator.encoder
    fits = forecasts["training"].total <= memory
    size = budget.width(plan.precision, device)
    a_set = budget.cache(plan.shape, size, plan.row.branch.count(0) or len(plan.row))
    return {
        "device": device,
        "memory": memory,
        "precision": plan.precision,
        "tokens_an_image": encoder.tokens_an_image,
        "longest_row": len(plan.row),
        "images_in_it": len(plan.row.pictures),
        "context": encoder.context,
        "forecasts": told,
        "support_sets_beside": max(0, (memory - forecasts["serving"].total) // max(1, a_set)),
        "fits": fits,
        "remedies": [] if fits else remedies(plan, memory),
    }


def remedies(plan: Plan, memory: int) -> list[dict[str, Any]]:
    """The first few changes, alone or the fewest together, that bring training within ``memory``; cheapest first.

    Each change is forecast once alone; several together only where none does alone, and none at all where not even all do.
    """
    known = [change.override for change in changes(plan.recipe, plan.device)]
    rows: dict[str, Encoded] = {}

    def total(together: Sequence[str]) -> int | None:
        changed, _ = applied(plan.recipe, plan.device, together)
        shown = repr((changed.sources, changed.tiles))
        try:
            tried = Plan(changed, plan.device, plan.mixture, memory)
            if shown not in rows:
                rows[shown] = plan.row if (changed.sources, changed.tiles) == (plan.recipe.sources, plan.recipe.tiles) else _row(plan, changed)
            tried.__dict__.update(config=plan.config, shape=plan.shape, row=rows[shown])
            return tried.training().total
        except (DataError, EpisodeError, RecipeError):
            return None

    def fit(together: Sequence[str]) -> bool:
        found = total(together)
        return found is not None and found <= memory

    def told(together: Sequence[str]) -> dict[str, Any]:
        return {"overrides": list(together), "total": total(together), "cost": "; ".join(applied(plan.recipe, plan.device, together)[1])}

    if not fit(known):
        return []
    for count in (1, 2):
        found = [told(together) for together in itertools.combinations(known, count) if fit(together)]
        if found:
            return found[:ENOUGH]
    for count in range(3, len(known) + 1):  # the cheapest so many, in their order
        if fit(known[:count]):
            return [told(known[:count])]
    return []


def _row(plan: Plan, recipe: Recipe) -> Encoded:
    """The longest row with other options of the same sources: the pools are not read again."""
    mixture = copy.copy(plan.mixture)
    mixture.options = {name: recipe.sources[name] for name in plan.mixture.options}
    mixture.recipe = recipe
    return check_rows(Collator(mixture, load_encoder(BaseRef.of(recipe)), on_fault=recipe.data.on_fault), []).longest


def applied(recipe: Recipe, device: str, overrides: Sequence[str]) -> tuple[Recipe, list[str]]:
    """The recipe with several changes, and what each costs."""
    costs = []
    for override in overrides:
        change = next(c for c in changes(recipe, device) if c.override == override)
        recipe = change.recipe
        costs.append(change.cost)
    return recipe, costs


def changes(recipe: Recipe, device: str) -> Iterator[Change]:
    """What can be made smaller, the cheapest first."""
    train, base = recipe.train, recipe.base
    if not train.gradient_checkpointing:
        yield Change("train.gradient_checkpointing=true", "a third more time a step", _with(recipe, train={"gradient_checkpointing": True}))
    if train.per_device_train_batch_size > 1:
        steps = train.per_device_train_batch_size * train.gradient_accumulation_steps
        override = f"train.per_device_train_batch_size=1 train.gradient_accumulation_steps={steps}"
        smaller = _with(recipe, train={"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps})
        yield Change(override, "less work at a time, the same gradient", smaller)
    if recipe.precision in {"fp32", "auto"} and device == "cuda":
        yield Change("precision=bf16", "none on a GPU", recipe.model_copy(update={"precision": "bf16"}))
    if recipe.precision not in QUANTISED and not recipe.adapter.pissa:
        yield Change("precision=nf4", "a base that answers a little worse, and a slower step", recipe.model_copy(update={"precision": "nf4"}))
    if recipe.tiles:
        yield Change("tiles=false", f"{base} sees every picture at half the resolution", recipe.model_copy(update={"tiles": False}))
    for name, options in recipe.sources.items():
        if isinstance(options, EpisodeOptions | InspectionOptions) and options.queries > 1:
            yield Change(f"sources.{name}.queries=1", "fewer questions learned from one support set", _source(recipe, name, {"queries": 1}))
    if recipe.adapter.rank > 8:
        half = recipe.adapter.rank // 2
        smaller = _with(recipe, adapter={"rank": half, "alpha": recipe.adapter.alpha / 2})
        yield Change(f"adapter.rank={half} adapter.alpha={recipe.adapter.alpha / 2:g}", "an adapter that can learn less", smaller)
    for name, options in recipe.sources.items():
        if isinstance(options, EpisodeOptions | InspectionOptions) and max(options.shots) > 1:
            fewer = sorted({s for s in options.shots if s < max(options.shots)}) or [max(options.shots) - 1]
            told = json.dumps(fewer).replace(" ", "")
            yield Change(f"sources.{name}.shots={told}", "support sets of fewer photos", _source(recipe, name, {"shots": fewer}))


def _with(recipe: Recipe, **parts: dict[str, Any]) -> Recipe:
    return recipe.model_copy(update={name: getattr(recipe, name).model_copy(update=new) for name, new in parts.items()})


def _source(recipe: Recipe, name: str, new: dict[str, Any]) -> Recipe:
    return recipe.model_copy(update={"sources": {**recipe.sources, name: recipe.sources[name].model_copy(update=new)}})


class _Clock(TrainerCallback):
    """Seconds of the steps after the first, which warms up."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.marks.append(time.perf_counter())


def probe(recipe: Recipe, mixture: Mixture | None = None) -> dict[str, float]:
    """Load the base and train three steps in a folder that is thrown away: seconds a step, and the peak on a GPU."""
    scratch = Path(tempfile.mkdtemp())
    try:
        short = _with(recipe, train={"max_steps": 3, "save_steps": 1000}).model_copy(update={"output": scratch / "run"})
        base = attach(load_base(BaseRef.of(short)), short.adapter)
        collator = Collator(mixture or Mixture(short), base.encoder(), on_fault=short.data.on_fault)
        batch = short.train.per_device_train_batch_size * short.train.gradient_accumulation_steps
        trainer = LclTrainer(base, short, collator, VisionFeatures(base), 3 * batch)
        clock = _Clock()
        trainer.add_callback(clock)
        trainer.train()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    told = {"seconds_a_step": (clock.marks[-1] - clock.marks[0]) / (len(clock.marks) - 1)}
    return told | ({"peak": float(torch.cuda.max_memory_allocated())} if torch.cuda.is_available() else {})
