"""Suites -> cells. One file a kind of task; what a suite asks is worded and packed as in training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lcl_adapter.batches import Encoder
from lcl_adapter.conversations import WORDINGS
from lcl_adapter.errors import EpisodeError, RecipeError, did_you_mean
from lcl_adapter.evaluate.cases import Cell
from lcl_adapter.evaluate.suites import boxes, inspection, lcl, product, published, questions
from lcl_adapter.mixture import Mixture
from lcl_adapter.recipe import Recipe, presets
from lcl_adapter.recipe.suites import (
    ImageNet100Suite,
    InspectionSuite,
    InstructSuite,
    IsekaiSuite,
    LclSuite,
    LocateSuite,
    PopeSuite,
    ProductSuite,
    RecSuite,
    SuiteOptions,
    VqaSuite,
)
from lcl_adapter.sources import ClassPool, InspectionPool, Picture, open_reader
from lcl_adapter.sources.base import names_of, pictures_of
from lcl_adapter.templates import Wording

__all__ = ["build_cells", "check_held_out", "check_suites"]


def build_cells(recipe: Recipe, limit: int | None = None, only: tuple[str, ...] = (), seed: int | None = None) -> Iterator[Cell]:
    """The cells of a recipe's suites, in its order. ``only`` keeps the suites named; ``limit`` the first cases of each.

    Raises RecipeError for a suite that is not there.
    """
    known = recipe.evaluate.suites
    missing = [name for name in only if name not in known]
    if missing:
        there = f"the recipe has {', '.join(known) or 'none'}; by name there are {', '.join(presets())}"
        raise RecipeError([f"no suite {name!r}{did_you_mean(name, [*known, *presets()])}; {there}" for name in missing])
    wording, chosen = WORDINGS[recipe.wording], recipe.evaluate.seed if seed is None else seed
    for name, options in known.items():
        if not only or name in only:
            yield from cells_of(name, options, wording, chosen, limit)


def cells_of(name: str, options: SuiteOptions, wording: Wording, seed: int, limit: int | None) -> Iterator[Cell]:
    match options:
        case LclSuite():
            yield from lcl.cells(name, options, wording, seed, limit)
        case ImageNet100Suite():
            yield from published.imagenet_100(name, options, wording, seed, limit)
        case IsekaiSuite():
            yield from published.isekai(name, options, wording, seed, limit)
        case InspectionSuite():
            yield from inspection.cells(name, options, wording, limit)
        case ProductSuite():
            yield from product.cells(name, options, wording, seed, limit)
        case LocateSuite():
            yield from boxes.locate(name, options, wording, seed, limit)
        case RecSuite():
            yield boxes.rec(name, options, limit)
        case VqaSuite():
            yield questions.vqa(name, options, limit)
        case PopeSuite():
            yield questions.pope(name, options, limit)
        case InstructSuite():
            yield questions.instruct(name, options, limit)


def check_held_out(recipe: Recipe, mixture: Mixture) -> None:
    """No class or category that is evaluated may be trained on: neither under its name in a source of the same type, nor by any picture.

    Plain questions are asked about training classes too (what must be kept), so only suites about classes are checked.
    Raises RecipeError that lists the classes in common.
    """
    pictures: set[tuple[str, str | None]] = set()
    names: set[tuple[str, str]] = set()
    for source, trained in mixture.pools.items():
        names |= {(mixture.options[source].type, n) for n in names_of(trained)}
        pictures |= {_key(p) for p in pictures_of(trained)}
    faults = []
    for name, options in recipe.evaluate.suites.items():
        if not isinstance(options, LclSuite | InspectionSuite | ProductSuite | LocateSuite):
            continue
        reader: Any = options.source
        common = sorted(_common(open_reader(name, reader), reader.type, names, pictures))
        if common:
            shown = ", ".join(common[:5]) + (f" and {len(common) - 5} more" if len(common) > 5 else "")
            faults.append(f"evaluate.suites.{name}: {shown} are trained on too; evaluate held-out classes (set `split` on both sides)")
    if faults:
        raise RecipeError(faults)


def _common(pool: ClassPool | InspectionPool, kind: str, names: set[tuple[str, str]], pictures: set[tuple[str, str | None]]) -> set[str]:
    parts = pool.classes if isinstance(pool, ClassPool) else pool.parts
    return {one.name for one in parts if (kind, one.name) in names or any(_key(p) in pictures for p in one.pictures)}


def check_suites(recipe: Recipe, encoder: Encoder, new_tokens: int = 24) -> None:
    """Draw a few cases of every cell: what cannot be drawn or does not fit the context is said before training, not after.

    Raises RecipeError, DataError, EpisodeError.
    """
    for cell in build_cells(recipe, limit=4):
        for case in cell.cases:
            length = len(encoder.turns([*case.support, case.query], opened=True)[0]) + new_tokens
            if length > encoder.context:
                raise EpisodeError(f"evaluate.suites.{cell.suite}: {length} tokens do not fit the context of {encoder.context}; lower its `shots`.")


def _key(picture: Picture) -> tuple[str, str | None]:
    return str(picture.path), picture.member
