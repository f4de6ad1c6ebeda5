"""``data check``: every file that a recipe names is opened, and every fault told with its place, before any time is spent on training."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.progress import Progress

from lcl_adapter.base.model import load_encoder
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.data.mixture import Mixture, open_options
from lcl_adapter.data.sources import (
    ClassPool,
    Fault,
    InspectionPool,
    Picture,
    PictureClass,
    Pool,
    QuestionPool,
    Region,
    open_reader,
    read_image,
    read_test_pairs,
)
from lcl_adapter.data.sources.base import pictures_of
from lcl_adapter.data.sources.boxes import located
from lcl_adapter.errors import DataError, EpisodeError, ModelError, RecipeError
from lcl_adapter.evaluate import check_held_out, check_suites
from lcl_adapter.recipe import Recipe, packaged
from lcl_adapter.recipe.sources import SourceOptions
from lcl_adapter.recipe.suites import ImageNet100Suite
from lcl_adapter.terminal import console
from lcl_adapter.training.collate import Collator
from lcl_adapter.training.lengths import check_rows

THREADS = 4
Look = tuple[str, Picture, Region | None]  # the record that names it, the picture, and where in it something is


def check(recipe: Recipe) -> dict[str, Any]:
    """All faults of a recipe's data, with counts, realised shares and the longest rows.

    Returns {"faults": [{"source", "kind", "message"}], "sources": {name: {...}}, "rows": {...} or None, "notes": [...]}.
    """
    recipe = _lenient(recipe)
    told: list[tuple[str, Fault]] = []
    sources: dict[str, dict[str, Any]] = {}
    pools: dict[str, Pool] = {}
    opened: set[str] = set()
    for name, options in recipe.sources.items():
        pool = _opened(name, options, told)
        if pool is not None:
            pools[name] = pool
            sources[name] = _looked_through(name, pool, opened, told)
    for name, suite in recipe.evaluate.suites.items():
        pool = _paired(name, suite, told) if isinstance(suite, ImageNet100Suite) else _opened(f"suite {name}", suite.source, told)
        if pool is not None:
            sources[f"suite {name}"] = _looked_through(f"suite {name}", pool, opened, told)
    rows: dict[str, Any] | None = None
    notes: list[str] = []
    if len(pools) == len(recipe.sources):
        try:
            mixture = Mixture(recipe, pools)
            rows = {"requested": mixture.requested, "realised": mixture.realised(range(mixture.total)), "ended": mixture.ended}
            rows["passes"] = mixture.repeats(mixture.total)
            for step in (lambda: check_held_out(recipe, mixture), lambda: rows.update(_lengths(recipe, mixture, told))):
                _tried("recipe", step, told, notes)
        except (RecipeError, DataError, EpisodeError) as error:
            told.append(("recipe", Fault("recipe", str(error))))
    if recipe.evaluate.suites:
        _tried("suites", lambda: check_suites(recipe, load_encoder(BaseRef.of(recipe))), told, notes)
    known: dict[str, tuple[str, Fault]] = {}
    for source, fault in told:  # a suite may read what a source has read
        known.setdefault(fault.message, (source, fault))
    faults = [{"source": source, "kind": fault.kind, "message": fault.message} for source, fault in known.values()]
    return {"faults": faults, "sources": sources, "rows": rows, "notes": list(dict.fromkeys(notes))}


def _lenient(recipe: Recipe) -> Recipe:
    """The same recipe with every reader's faults counted instead of refused: they are told one by one."""

    def skipping(options: Any) -> Any:
        return options.model_copy(update={"on_fault": "skip"}) if hasattr(options, "on_fault") else options

    suites = {n: s.model_copy(update={"source": skipping(s.source)}) if hasattr(s, "source") else s for n, s in recipe.evaluate.suites.items()}
    sources = {n: skipping(s) for n, s in recipe.sources.items()}
    return recipe.model_copy(update={"sources": sources, "evaluate": recipe.evaluate.model_copy(update={"suites": suites})})


def _tried(where: str, step: Any, told: list[tuple[str, Fault]], notes: list[str]) -> None:
    """Run a step whose error is a fault; one that needs a base that is not here is a note."""
    try:
        step()
    except ModelError as error:
        notes.append(f"lengths are not checked, and training would stop here: {error}")
    except RecipeError as error:
        told += [(where, Fault("recipe", fault)) for fault in error.faults]
    except EpisodeError as error:
        told.append((where, Fault("does not fit", str(error))))
    except DataError as error:
        told += [(where, Fault("data", line.strip())) for line in str(error).splitlines()]


def _opened(name: str, options: Any, told: list[tuple[str, Fault]]) -> Pool | None:
    """A source read with its faults counted instead of refused; None where nothing of it can be used."""
    try:
        pool: Pool = open_options(name, options) if isinstance(options, SourceOptions) else open_reader(name, options)
    except DataError as error:
        told.append((name, Fault("source", str(error))))
        return None
    told += [(name, fault) for fault in pool.faults]
    return pool


def _paired(name: str, suite: ImageNet100Suite, told: list[tuple[str, Fault]]) -> ClassPool | None:
    """The pictures of the published test as classes, to be opened like any other's."""
    try:
        pairs = read_test_pairs(packaged(suite.pairs), packaged(suite.images))
    except DataError as error:
        told.append((f"suite {name}", Fault("source", str(error))))
        return None
    return ClassPool(name, tuple(PictureClass(p.names[s], (*p.shown[s], *p.asked[s])) for p in pairs for s in (0, 1)))


def _looked_through(name: str, pool: Pool, opened: set[str], told: list[tuple[str, Fault]]) -> dict[str, Any]:
    """Open every picture of a pool once, and every mask and box."""
    waiting: dict[str, Look] = {}
    for origin, picture in _pictures(pool):
        waiting.setdefault(str(picture), (origin, picture, None))
    pictures = len(waiting.keys() - opened)
    for region in _regions(pool):
        waiting.setdefault(f"{region.mask or region.picture} {region.box}", ("", region.picture, region))
    fresh = [look for key, look in waiting.items() if key not in opened]
    opened.update(waiting)
    with (
        Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
        ThreadPoolExecutor(THREADS) as threads,
    ):
        task = bar.add_task(name, total=len(fresh))
        for fault in threads.map(_looked_at, fresh, chunksize=32):
            bar.advance(task)
            if fault is not None:
                told.append((name, fault))
    return {"entries": len(pool), "pictures": pictures, "left_out": pool.skipped}


def _pictures(pool: Pool) -> Iterator[tuple[str, Picture]]:
    """Every picture, and the record that names it where one does."""
    if isinstance(pool, QuestionPool):
        yield from ((d.origin, picture) for d in pool.dialogues for picture in d.pictures)
    else:
        yield from (("", picture) for picture in pictures_of(pool))


def _looked_at(look: Look) -> Fault | None:
    origin, picture, region = look
    try:
        if region is None:
            read_image(picture)
        else:
            located(region)
    except DataError as error:
        message = str(error)
        if region is None:
            kind = next((k for k, sign in KINDS if sign in message), "broken image")
        else:
            kind = "box out of range" if "out of range" in message else "bad mask" if "mask" in message else ""
        told = f"{origin}: {message}" if origin else message
        return Fault(kind, told) if kind else None  # a picture that cannot be read was told of as such
    return None


KINDS = (
    ("missing image", "no such"),
    ("empty image", "is empty"),
    ("not an image", "not an image"),
    ("image too large", "bound of"),
    ("image too small", "shows nothing"),
)


def _regions(pool: Pool) -> Iterator[Region]:
    if isinstance(pool, QuestionPool):
        yield from (e.region for d in pool.dialogues for e in d.exchanges if e.region is not None)
    elif isinstance(pool, InspectionPool) or pool.regions:
        yield from (r for found in pool.regions.values() for r in found)


def _lengths(recipe: Recipe, mixture: Mixture, told: list[tuple[str, Fault]]) -> dict[str, Any]:
    collator = Collator(mixture, load_encoder(BaseRef.of(recipe)), on_fault="skip")
    too_long: list[str] = []
    found = check_rows(collator, too_long).lengths
    told += [("recipe", Fault("does not fit", why)) for why in too_long]
    return {"longest": {n: max(lengths) for n, lengths in found.items() if lengths}, "context": collator.encoder.context}
