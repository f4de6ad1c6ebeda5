"""Forecast a recipe's memory from its own longest rows and questions (formulas: ``budget``), and propose changes that
make it fit.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from lcl_adapter.answering.batches import QUESTIONS_PER_PASS, SHARE_OF_FREE, largest_batch
from lcl_adapter.answering.room import Load, keys_and_values
from lcl_adapter.base.encoder import Encoded
from lcl_adapter.base.layouts import open_checkpoint
from lcl_adapter.base.model import attach, load_base, load_encoder
from lcl_adapter.base.precision import choose_precision
from lcl_adapter.base.prototypes import PATCH_BYTES
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.devices import free_memory, training_device
from lcl_adapter.errors import DataError, EpisodeError, RecipeError
from lcl_adapter.evaluate.suites import LongestCase, longest_case
from lcl_adapter.memory import budget
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.schema import QUANTISED, Precision
from lcl_adapter.recipe.sources import EpisodeOptions, InspectionOptions
from lcl_adapter.recipe.suites import InspectionSuite
from lcl_adapter.training.collate import Collator
from lcl_adapter.training.lengths import check_rows
from lcl_adapter.training.trainer import LclTrainer

REMEDIES = 3  # that are shown at most


@dataclass(frozen=True)
class Change:
    """One change of a recipe: as an override, its cost in words, and the changed recipe."""

    override: str
    cost: str
    recipe: Recipe


@dataclass
class Plan:
    """A recipe with the values that its forecasts need, each computed once. ``memory`` is in bytes."""

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
        """The longest row."""
        return check_rows(self.collator).longest

    @cached_property
    def case(self) -> LongestCase:
        """The longest case of the suites; without suites, one like the longest row."""
        if self.recipe.evaluate.suites and (case := longest_case(self.recipe, self.collator.encoder)):
            return case
        support = self.row.branch.count(0) or len(self.row)
        return LongestCase(support, max(1, len(self.row) - support), 1, 0, len(set(self.row.pictures)))

    @property
    def work(self) -> budget.Work:
        """Steps whose rows are all as long as the longest, and the pictures of the whole run."""
        train = self.recipe.train
        row_pictures = self.mixture.total * len(set(self.row.pictures))
        cached = min(row_pictures, self.mixture.pictures)
        near_base = bool(self.recipe.near_base)
        return budget.longest(self.row, train.per_device_train_batch_size, self.recipe.tiles, cached, near_base, train.tokens_per_batch)

    def training(self) -> budget.Forecast:
        return budget.training(self.shape, self.precision, self.device, self.recipe.adapter, self.recipe.train, self.work)

    def measuring(self) -> budget.Forecast:
        """Measuring while training: the optimiser and the cached features stay in memory."""
        recipe = self.recipe
        return self._answering(budget.lasting(self.shape, self.precision, self.device, recipe.adapter, recipe.train, self.work))

    def evaluation(self) -> budget.Forecast:
        forecast = self._answering({})
        inspects = any(isinstance(suite, InspectionSuite) for suite in self.recipe.evaluate.suites.values())
        return budget.Forecast(forecast.parts, {**forecast.moments, **({"patch distance": PATCH_BYTES} if inspects else {})})

    def _answering(self, beside: Mapping[str, int]) -> budget.Forecast:
        """Batches of the longest case, as large as the recipe says, or as the memory allows."""
        recipe, case = self.recipe, self.case
        one = Load(1, case.support, case.question, case.places, case.new_tokens)
        fixed = self._forecast(Load(0, 0, 0, 0), beside)
        sets, pack = largest_batch(
            self.shape,
            budget.width(self.precision, self.device),
            one,
            recipe.evaluate.batch_size,
            QUESTIONS_PER_PASS,
            int(SHARE_OF_FREE * (self.memory - sum(fixed.parts.values()))),
        )
        return self._forecast(one.times(sets, pack), beside)

    def _forecast(self, load: Load, beside: Mapping[str, int]) -> budget.Forecast:
        pictures = load.sets * self.case.pictures
        pooled = pictures if self.collator.encoder.support_tokens else 0
        return budget.answering(self.shape, self.precision, self.device, self.recipe.adapter, load, pictures, beside, pooled)

    def serving(self) -> budget.Forecast:
        """One support set as long as the longest row's, and its questions."""
        support = self.row.branch.count(0) or len(self.row)
        question = max(1, len(self.row) - support)
        load = Load(1, support, question, 1).times(1, QUESTIONS_PER_PASS)
        pooled = sum(picture.tokens is not None for picture in self.row.pictures)
        return budget.answering(self.shape, self.precision, self.device, self.recipe.adapter, load, max(8, pooled), pooled=pooled)

    def forecasts(self) -> dict[str, budget.Forecast]:
        """By what the recipe does. All but ``serving`` are part of ``train``."""
        during = {"measuring while training": self.measuring()} if self.recipe.evaluate.watched else {}
        after = {"evaluation": self.evaluation()} if self.recipe.evaluate.suites else {}
        return {"training": self.training(), **during, **after, "serving": self.serving()}

    def peak(self) -> int:
        """Of the whole ``train`` command: training, measuring while training, and the evaluation at its end."""
        return max(forecast.total for name, forecast in self.forecasts().items() if name != "serving")


def make_plan(recipe: Recipe, memory: int | None = None, device: str | None = None, mixture: Mixture | None = None) -> dict[str, Any]:
    """Forecasts for training, measuring while training, evaluation and serving.

    ``fits`` says whether everything that ``train`` does fits into ``memory``; ``remedies`` are changes that make it fit.
    memory: bytes; the device's free memory where None. No weights are loaded.
    Raises RecipeError, DataError, ModelError as training does.
    """
    device = device or training_device()
    if device == "cuda" and memory is None and not torch.cuda.is_available():
        raise RecipeError(["this machine has no GPU whose memory could be read: give its memory with --memory, for instance --memory 16GB"])
    memory = memory or free_memory(device)
    plan = Plan(recipe, device, mixture or Mixture(recipe), memory)
    forecasts = plan.forecasts()
    forecasts_json = {name: {"total": f.total, "parts": f.parts, "moments": f.moments} for name, f in forecasts.items()}
    encoder = plan.collator.encoder
    fits = plan.peak() <= memory
    size = budget.width(plan.precision, device)
    cache_of_a_set = keys_and_values(plan.shape, size, (plan.row.branch.count(0) or len(plan.row)) - sum(plan.row.hidden))
    return {
        "device": device,
        "memory": memory,
        "precision": plan.precision,
        "tokens_an_image": encoder.tokens_an_image,
        **({"support_tokens": encoder.support_tokens} if encoder.support_tokens else {}),
        "longest_row": len(plan.row),
        "images_in_it": len(plan.row.pictures),
        **({"tokens_per_batch": recipe.train.tokens_per_batch} if recipe.train.tokens_per_batch else {}),
        "context": encoder.context,
        "forecasts": forecasts_json,
        "support_sets_beside": max(0, (memory - forecasts["serving"].total) // max(1, cache_of_a_set)),
        "fits": fits,
        "remedies": [] if fits else remedies(plan, memory),
    }


def remedies(plan: Plan, memory: int) -> list[dict[str, Any]]:
    """The first changes that bring ``train`` within ``memory``, cheapest first: single ones, else the fewest together.

    Empty where even all changes together do not suffice.
    """
    available_overrides = [change.override for change in changes(plan.recipe, plan.device)]
    rows: dict[str, Encoded] = {}  # the longest row by sources and tiles

    def total(overrides: Sequence[str]) -> int | None:
        changed, _ = apply_changes(plan.recipe, plan.device, overrides)
        key = repr((changed.sources, changed.tiles))
        try:
            changed_plan = Plan(changed, plan.device, plan.mixture, memory)
            if key not in rows:
                same_rows = (changed.sources, changed.tiles) == (plan.recipe.sources, plan.recipe.tiles)
                rows[key] = plan.row if same_rows else _longest_row(plan, changed)
            changed_plan.__dict__.update(config=plan.config, shape=plan.shape, row=rows[key])
            if changed.tiles == plan.recipe.tiles:
                changed_plan.__dict__.update(case=plan.case)
            return changed_plan.peak()
        except (DataError, EpisodeError, RecipeError):
            return None

    def fits(overrides: Sequence[str]) -> bool:
        size = total(overrides)
        return size is not None and size <= memory

    def remedy(overrides: Sequence[str]) -> dict[str, Any]:
        costs = apply_changes(plan.recipe, plan.device, overrides)[1]
        return {"overrides": list(overrides), "total": total(overrides), "cost": "; ".join(costs)}

    if not fits(available_overrides):
        return []
    for count in (1, 2):
        fitting = [remedy(overrides) for overrides in itertools.combinations(available_overrides, count) if fits(overrides)]
        if fitting:
            return fitting[:REMEDIES]
    for count in range(3, len(available_overrides) + 1):  # only the first ``count``, which are the cheapest
        if fits(available_overrides[:count]):
            return [remedy(available_overrides[:count])]
    return []


def _longest_row(plan: Plan, recipe: Recipe) -> Encoded:
    """The longest row with other options of the same sources. The pools are not read again."""
    mixture = copy.copy(plan.mixture)
    mixture.options = {name: recipe.sources[name] for name in plan.mixture.options}
    mixture.recipe = recipe
    return check_rows(Collator(mixture, load_encoder(BaseRef.of(recipe)), on_fault=recipe.data.on_fault)).longest


def apply_changes(recipe: Recipe, device: str, overrides: Sequence[str]) -> tuple[Recipe, list[str]]:
    """The recipe with these changes, and the cost of each."""
    costs = []
    for override in overrides:
        change = next(c for c in changes(recipe, device) if c.override == override)
        recipe = change.recipe
        costs.append(change.cost)
    return recipe, costs


def changes(recipe: Recipe, device: str) -> Iterator[Change]:
    """The changes that reduce memory, the cheapest first."""
    train, base = recipe.train, recipe.base
    if not train.gradient_checkpointing:
        yield Change("train.gradient_checkpointing=true", "a third more time a step", _with(recipe, train={"gradient_checkpointing": True}))
    if train.per_device_train_batch_size > 1:
        steps = train.per_device_train_batch_size * train.gradient_accumulation_steps
        override = f"train.per_device_train_batch_size=1 train.gradient_accumulation_steps={steps}"
        smaller = _with(recipe, train={"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps})
        yield Change(override, "smaller batches, the same gradient", smaller)
    if recipe.precision in {"fp32", "auto"} and device == "cuda":
        yield Change("precision=bf16", "none on a GPU", recipe.model_copy(update={"precision": "bf16"}))
    if recipe.precision not in QUANTISED and not recipe.adapter.pissa:
        yield Change("precision=nf4", "a base that answers a little worse, and a slower step", recipe.model_copy(update={"precision": "nf4"}))
    if recipe.tiles:
        yield Change("tiles=false", f"{base} reads every picture at half the resolution", recipe.model_copy(update={"tiles": False}))
    for name, options in recipe.sources.items():
        if isinstance(options, EpisodeOptions | InspectionOptions) and options.queries > 1:
            yield Change(f"sources.{name}.queries=1", "fewer questions learned from one support set", _source(recipe, name, {"queries": 1}))
    if recipe.adapter.rank > 8:
        half: dict[str, float] = {"rank": recipe.adapter.rank // 2, "alpha": recipe.adapter.alpha / 2}
        if recipe.adapter.query_key_rank is not None:
            half["query_key_rank"] = max(1, recipe.adapter.query_key_rank // 2)
        overrides = " ".join(f"adapter.{key}={value:g}" for key, value in half.items())
        yield Change(overrides, "an adapter that can learn less", _with(recipe, adapter=half))
    for name, options in recipe.sources.items():
        if isinstance(options, EpisodeOptions | InspectionOptions) and max(options.shots) > 1:
            fewer = sorted({s for s in options.shots if s < max(options.shots)}) or [max(options.shots) - 1]
            value = json.dumps(fewer).replace(" ", "")
            yield Change(f"sources.{name}.shots={value}", "support sets of fewer photos", _source(recipe, name, {"shots": fewer}))


def _with(recipe: Recipe, **parts: dict[str, Any]) -> Recipe:
    return recipe.model_copy(update={name: getattr(recipe, name).model_copy(update=new) for name, new in parts.items()})


def _source(recipe: Recipe, name: str, new: dict[str, Any]) -> Recipe:
    return recipe.model_copy(update={"sources": {**recipe.sources, name: recipe.sources[name].model_copy(update=new)}})


class _Clock(TrainerCallback):
    """Records the time at the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.append(time.perf_counter())


def probe(recipe: Recipe, mixture: Mixture | None = None) -> dict[str, float]:
    """Load the base and train three steps in a temporary folder.

    Returns seconds per step without the first, and the peak bytes on a GPU.
    """
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
    seconds = {"seconds_a_step": (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)}
    return seconds | ({"peak": float(torch.cuda.max_memory_allocated())} if torch.cuda.is_available() else {})
