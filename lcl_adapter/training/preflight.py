"""``data check``: opens every file that a recipe names and reports every fault with its place, before training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
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
    read_open_mi,
    read_test_pairs,
)
from lcl_adapter.data.sources.base import NothingLeftError, pictures_of
from lcl_adapter.data.sources.boxes import region_box
from lcl_adapter.data.sources.copies import digest
from lcl_adapter.data.sources.images import read_bytes
from lcl_adapter.errors import DataError, EpisodeError, ModelError, RecipeError
from lcl_adapter.evaluate import CLASS_SUITES, check_held_out, check_suites, with_enough_classes
from lcl_adapter.packaged import packaged
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.sources import SourceOptions
from lcl_adapter.recipe.suites import ImageNet100Suite, OpenMiSuite, PerplexitySuite
from lcl_adapter.terminal import console
from lcl_adapter.training.collate import Collator
from lcl_adapter.training.lengths import check_rows
from lcl_adapter.training.photo_copies import Photo, nearly_the_same, same_files, signature

THREADS = 4
TOGETHER = 256  # entries whose pictures are opened together
DARK, FLAT = 24, 4  # of 255: a picture whose brightest pixel is below, and one whose pixels differ by less
DULL = "nearly black or flat"  # no fault: a note
NOTED = 10  # such pictures that are named
BAD_SAMPLE = "bad sample"  # of a shard, which is discovered when it is read
Check = tuple[str, Picture, Region | None]  # the record that names the picture, the picture, a region of it to check
Faults = list[tuple[str, Fault]]  # (source, fault)


def check(recipe: Recipe) -> dict[str, Any]:
    """All faults of a recipe's data, with counts, realised shares and the longest rows.

    Returns {"faults": [{"source", "kind", "message"}], "sources": {name: {...}}, "rows": {...} or None, "notes": []}.
    """
    recipe, notes = with_enough_classes(_counting_faults(recipe))
    faults: Faults = []
    sources: dict[str, dict[str, Any]] = {}
    pools: dict[str, Pool] = {}
    known = _Known()
    for name, options in recipe.sources.items():
        pool = _open_pool(name, options, faults)
        if pool is not None:
            pools[name] = pool
            notes += pool.notes
            sources[name] = _open_pictures(name, pool, known, faults, not _is_shipped(options))
    for kind, suites in (("suite", recipe.evaluate.suites), ("validation", recipe.evaluate.validation)):
        for name, suite in suites.items():
            if isinstance(suite, PerplexitySuite):  # read by ``check_suites``
                continue
            if isinstance(suite, ImageNet100Suite | OpenMiSuite):
                pool = _open_listed(name, suite, faults)
            else:
                pool = _open_pool(f"{kind} {name}", suite.source, faults)
            if pool is not None:
                notes += pool.notes
                sources[f"{kind} {name}"] = _open_pictures(
                    f"{kind} {name}", pool, known, faults, isinstance(suite, CLASS_SUITES) and not _is_shipped(getattr(suite, "source", None))
                )
    faults += same_files(known.photos)
    rows: dict[str, Any] | None = None
    if len(pools) == len(recipe.sources):
        try:
            mixture = Mixture(recipe, pools)
            rows = {"requested": mixture.requested, "realised": mixture.realised(range(mixture.total)), "ended": mixture.ended}
            rows["passes"] = mixture.repeats(mixture.total)
            for step in (lambda: check_held_out(recipe, mixture, copies=False), lambda: rows.update(_lengths(recipe, mixture, faults))):
                _collect("recipe", step, faults, notes)
        except (RecipeError, DataError, EpisodeError) as error:
            faults.append(("recipe", Fault("recipe", str(error))))
    if recipe.evaluate.suites or recipe.evaluate.validation:
        _collect("suites", lambda: check_suites(recipe, load_encoder(BaseRef.of(recipe))), faults, notes)
    notes += nearly_the_same(known.photos)
    notes += _notes_of([fault.message for _, fault in faults if fault.kind == DULL])
    faults = [(source, fault) for source, fault in faults if fault.kind != DULL]
    distinct: dict[str, tuple[str, Fault]] = {}
    for source, fault in faults:  # a suite can read the same file as a source
        distinct.setdefault(fault.message, (source, fault))
    reported = [{"source": source, "kind": fault.kind, "message": fault.message} for source, fault in distinct.values()]
    return {"faults": reported, "sources": sources, "rows": rows, "notes": list(dict.fromkeys(notes))}


def _is_shipped(options: Any) -> bool:
    return bool(getattr(options, "shipped", False))


def _notes_of(messages: Sequence[str]) -> list[str]:
    """The first messages, and how many more there are."""
    distinct = list(dict.fromkeys(messages))
    return distinct[:NOTED] + ([f"and {len(distinct) - NOTED:,} more pictures that are nearly black or flat"] if len(distinct) > NOTED else [])


def _counting_faults(recipe: Recipe) -> Recipe:
    """The same recipe with readers that collect their faults instead of refusing the first."""

    def skipping(options: Any) -> Any:
        return options.model_copy(update={"on_fault": "skip"}) if hasattr(options, "on_fault") else options

    def with_skipping(suites: dict[str, Any]) -> dict[str, Any]:
        return {n: s.model_copy(update={"source": skipping(s.source)}) if hasattr(s, "source") else s for n, s in suites.items()}

    changed = {part: with_skipping(getattr(recipe.evaluate, part)) for part in ("suites", "validation")}
    sources = {n: skipping(s) for n, s in recipe.sources.items()}
    return recipe.model_copy(update={"sources": sources, "evaluate": recipe.evaluate.model_copy(update=changed)})


def _collect(where: str, step: Any, faults: Faults, notes: list[str]) -> None:
    """Run a step and collect its error as faults. A missing base gives a note instead."""
    try:
        step()
    except ModelError as error:
        notes.append(f"lengths are not checked, and training would stop at this: {error}")
    except RecipeError as error:
        faults += [(where, Fault("recipe", fault)) for fault in error.faults]
    except EpisodeError as error:
        faults.append((where, Fault("does not fit", str(error))))
    except DataError as error:
        faults += [(where, Fault("data", line.strip())) for line in str(error).splitlines()]


def _open_pool(name: str, options: Any, faults: Faults) -> Pool | None:
    """Open a source and collect its faults; None where it cannot be opened at all."""
    try:
        pool: Pool = open_options(name, options) if isinstance(options, SourceOptions) else open_reader(name, options)
    except NothingLeftError as error:
        faults += [(name, fault) for fault in error.faults] or [(name, Fault("source", str(error)))]
        return None
    except DataError as error:
        faults.append((name, Fault("source", str(error))))
        return None
    faults += [(name, fault) for fault in pool.faults]
    return pool


def _open_listed(name: str, suite: ImageNet100Suite | OpenMiSuite, faults: Faults) -> ClassPool | None:
    """The pictures of a published list of questions as classes; as one class where a picture's name differs by question."""
    try:
        if isinstance(suite, OpenMiSuite):
            questions = read_open_mi(packaged(suite.file), packaged(suite.images), name)
            pictures = dict.fromkeys(picture for q in questions for shown in ((q.query,), *q.support.values()) for picture in shown)
            return ClassPool(name, (PictureClass(name, tuple(pictures)),))
        pairs = read_test_pairs(packaged(suite.pairs), packaged(suite.images))
    except DataError as error:
        faults.append((f"suite {name}", Fault("source", str(error))))
        return None
    return ClassPool(name, tuple(PictureClass(p.names[s], (*p.support[s], *p.queries[s])) for p in pairs for s in (0, 1)))


@dataclass
class _Known:
    """opened: names of what was opened. photos: those of classes and categories, to be compared."""

    opened: set[str] = field(default_factory=set)
    photos: list[Photo] = field(default_factory=list)


@dataclass
class _Opened:
    """What opening one picture or region gave."""

    fault: Fault | None = None
    digest: bytes | None = None
    signature: np.ndarray | None = None


def _open_pictures(name: str, pool: Pool, known: _Known, faults: Faults, compare: bool) -> dict[str, Any]:
    """Open every picture, mask and box of a pool, except those in ``known``, which it extends.

    compare: whether its pictures are compared with each other and with those of other sources.

    Returns the pool's counts.
    """
    pictures, bad_samples = 0, 0
    labels = _labels(pool) if compare else {}
    with (
        Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
        ThreadPoolExecutor(THREADS) as threads,
    ):
        task = bar.add_task(name, total=len(pool) if isinstance(pool, QuestionPool) else sum(1 for _ in _checks(pool)))
        for entries, checks, bad in _parts(pool):
            faults += [(name, fault) for fault in bad]
            bad_samples += len(bad)
            new_checks = {key: check for key, check in checks if key not in known.opened}
            known.opened.update(new_checks)
            pictures += sum(region is None for _, _, region in new_checks.values())
            for (key, check), opened in zip(new_checks.items(), threads.map(partial(_open, compare=compare), new_checks.values()), strict=True):
                if opened.fault is not None:
                    faults.append((name, opened.fault))
                if opened.digest is not None and opened.signature is not None and key in labels:
                    known.photos.append(Photo(name, *labels[key], check[1], opened.digest, opened.signature))
            bar.advance(task, entries)
    left_out = {**pool.skipped, **({BAD_SAMPLE: bad_samples} if bad_samples else {})}
    return {"entries": len(pool), "pictures": pictures, "left_out": left_out}


def _labels(pool: Pool) -> dict[str, tuple[str, str]]:
    """The label and category of each picture, by the picture's name; nothing for questions."""
    if isinstance(pool, ClassPool):
        return {str(picture): (one.name, one.name) for one in pool.classes for picture in one.pictures}
    if isinstance(pool, InspectionPool):
        good = {str(p): (f"{one.name}, good", one.name) for one in pool.categories for p in (*one.references, *(s.picture for s in one.good))}
        bad = {str(s.picture): (f"{one.name}, {kind}", one.name) for one in pool.categories for kind, some in one.defects.items() for s in some}
        return good | bad
    return {}


def _parts(pool: Pool) -> Iterator[tuple[int, list[tuple[str, Check]], list[Fault]]]:
    """A pool in parts: (entries, what to open by its name, bad samples). A sample of a shard holds its pictures' bytes, so
    the parts are small.
    """
    if not isinstance(pool, QuestionPool):
        everything = list(_checks(pool))
        for start in range(0, len(everything), TOGETHER):
            checks = everything[start : start + TOGETHER]
            yield len(checks), checks, []
        return
    for start in range(0, len(pool), TOGETHER):
        numbers = range(start, min(start + TOGETHER, len(pool)))
        checks = []
        bad: list[Fault] = []
        for number in numbers:
            try:
                dialogue = pool.dialogues[number]
            except DataError as error:
                bad.append(Fault(BAD_SAMPLE, str(error)))
                continue
            checks += [(str(picture), (dialogue.origin, picture, None)) for picture in dialogue.pictures]
            checks += [_region_check(e.region) for e in dialogue.exchanges if e.region is not None]
        yield len(numbers), checks, bad


def _checks(pool: ClassPool | InspectionPool) -> Iterator[tuple[str, Check]]:
    """What to open of classes or parts: every picture, box and mask, by its name."""
    yield from ((str(picture), ("", picture, None)) for picture in pictures_of(pool))
    yield from (_region_check(region) for regions in pool.regions.values() for region in regions)


def _region_check(region: Region) -> tuple[str, Check]:
    return f"{region.mask or region.picture} {region.box}", ("", region.picture, region)


def _open(check: Check, compare: bool) -> _Opened:
    """Opens a picture or a region. compare: also what pictures are compared by."""
    origin, picture, region = check
    try:
        if region is not None:
            region_box(region)
            return _Opened()
        grey = read_image(picture).convert("L")
        dull = _dullness(grey)
        fault = Fault(DULL, f"{origin}: {picture} {dull}" if origin else f"{picture} {dull}") if dull else None
        return _Opened(fault, digest(read_bytes(picture)), signature(grey)) if compare and not picture.crop else _Opened(fault)
    except DataError as error:
        message = str(error)
        if region is None:
            kind = next((kind for kind, words in KINDS if words in message), "broken image")
        else:
            kind = "box out of range" if "out of range" in message else "bad mask" if "mask" in message else ""
        if kind:  # none for a region whose picture cannot be read: the picture's own check reports that
            return _Opened(Fault(kind, f"{origin}: {message}" if origin else message))
    return _Opened()


def _dullness(grey: Image.Image) -> str:
    """What is suspicious about a grey picture's light; "" for nothing."""
    low, high = (int(value) for value in grey.getextrema())  # type: ignore[arg-type]
    if high < DARK:
        return f"is nearly black (its brightest pixel has {high} of 255); if it has more than 8 bits, give `white`"
    return f"is flat (all its pixels have {low} to {high} of 255)" if high - low < FLAT else ""


KINDS = (  # (kind of fault, words of its message)
    ("missing image", "no such"),
    ("box out of range", "box is out of range"),
    ("empty image", "is empty"),
    ("not an image", "not an image"),
    ("image too large", "bound of"),
    ("image too small", "shows nothing"),
)


def _lengths(recipe: Recipe, mixture: Mixture, faults: Faults) -> dict[str, Any]:
    """The longest row of each source and the base's context, in tokens.

    Rows that do not fit are added to ``faults``.
    """
    collator = Collator(mixture, load_encoder(BaseRef.of(recipe)), on_fault="skip")
    too_long: list[str] = []
    lengths = check_rows(collator, too_long)
    faults += [("recipe", Fault("does not fit", message)) for message in too_long]
    return {"longest": {name: most for name in lengths.lengths if (most := lengths.most(name))}, "context": collator.encoder.context}
