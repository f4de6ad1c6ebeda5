"""Suites -> cells. There is one file for each kind of task. Questions are worded as in training."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from lcl_adapter.base.encoder import Encoder
from lcl_adapter.base.model import load_encoder
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.data.conversations import Turn, from_dialogues, wording_of
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import ClassPool, InspectionPool, Picture, QuestionPool, open_reader, read_open_mi, read_test_pairs
from lcl_adapter.data.sources.base import first_names, names_of, pictures_of
from lcl_adapter.data.sources.copies import copies_held_out
from lcl_adapter.data.sources.records import longest_dialogues
from lcl_adapter.data.sources.shards import Shards
from lcl_adapter.errors import DataError, EpisodeError, RecipeError, did_you_mean
from lcl_adapter.evaluate.cases import Cell, Selection
from lcl_adapter.evaluate.suites import boxes, inspection, lcl, perplexity, product, published, questions
from lcl_adapter.packaged import packaged
from lcl_adapter.recipe import Recipe, presets
from lcl_adapter.recipe.suites import (
    ImageNet100Suite,
    InspectionSuite,
    InstructSuite,
    IsekaiSuite,
    LclSuite,
    LocateSuite,
    OpenMiSuite,
    PerplexitySuite,
    PopeSuite,
    ProductSuite,
    RecSuite,
    SuiteOptions,
    VqaSuite,
)
from lcl_adapter.recipe.wording import Wording

__all__ = ["build_cells", "check_held_out", "check_measured", "check_suites"]

DRAWN = 4  # cases of a cell whose lengths are measured before training
SHOWN = 5  # classes, or photos, that an error names
LONGEST = 200  # how many questions of a suite, the longest ones, are checked before training


def build_cells(
    recipe: Recipe,
    limit: int | None = None,
    only: tuple[str, ...] = (),
    seed: int | None = None,
    during: bool = False,
    added: Collection[str] = (),
) -> Iterator[Cell]:
    """The cells of a recipe's suites, in its order.

    limit: only the first cases of each cell. only: the names of suites to build, all if empty. seed: instead of the
    recipe's. during: the questions that are measured during training; the report has others. added: suites that the
    recipe did not have when it was trained. Raises RecipeError for an unknown suite; DataError for a suite that has too
    few questions to divide them.
    """
    known = recipe.evaluate.suites
    missing = [name for name in only if name not in known]
    if missing:
        available = f"the recipe has {', '.join(known) or 'none'}; shipped ones are {', '.join(presets())}"
        raise RecipeError([f"no suite {name!r}{did_you_mean(name, [*known, *presets()])}; {available}" for name in missing])
    wording, chosen = wording_of(recipe), recipe.evaluate.seed if seed is None else seed
    for name, options in known.items():
        if not only or name in only:
            set_aside = recipe.evaluate.during_limit if name in recipe.evaluate.watched and name not in added else 0
            yield from cells_of(name, options, wording, Selection(name, chosen, limit, during, set_aside))


def validation_cells(recipe: Recipe, limit: int | None = None) -> Iterator[Cell]:
    """The cells of the suites under ``evaluate.validation``. limit: only the first cases of each."""
    for name, options in recipe.evaluate.validation.items():
        yield from cells_of(name, options, wording_of(recipe), Selection(name, recipe.evaluate.seed, limit))


def cells_of(name: str, options: SuiteOptions, wording: Wording, selection: Selection) -> Iterator[Cell]:
    """The cells of one suite."""
    match options:
        case LclSuite():
            yield from lcl.cells(name, options, wording, selection)
        case ImageNet100Suite():
            yield from published.imagenet_100(name, options, wording, selection)
        case IsekaiSuite():
            yield from published.isekai(name, options, wording, selection)
        case OpenMiSuite():
            yield from published.open_mi(name, options, wording, selection)
        case InspectionSuite():
            yield from inspection.cells(name, options, wording, selection)
        case ProductSuite():
            yield from product.cells(name, options, wording, selection)
        case LocateSuite():
            yield from boxes.locate(name, options, wording, selection)
        case RecSuite():
            yield boxes.rec(name, options, selection)
        case VqaSuite():
            yield questions.vqa(name, options, selection)
        case PerplexitySuite():
            yield perplexity.page(name, options, selection)
        case PopeSuite():
            yield questions.pope(name, options, selection)
        case InstructSuite():
            yield questions.instruct(name, options, selection)


CLASS_SUITES = (LclSuite, InspectionSuite, ProductSuite, LocateSuite, ImageNet100Suite, IsekaiSuite, OpenMiSuite)


def check_held_out(recipe: Recipe, mixture: Mixture, copies: bool = True) -> None:
    """Refuse to evaluate a class or category that is trained on: by name in a source of the same type, or by any
    picture.

    Plain questions may be about training classes, because they measure retention. For them, the same file in training
    and evaluation is refused. Samples of shards are not read for this: their pictures are inside the shard, and no class
    is read from there. copies: whether files under different names are compared too. Raises RecipeError with everything in
    common.
    """
    pictures: set[tuple[str, str | None]] = set()
    names: set[tuple[str, str]] = set()
    own: dict[str, list[Picture]] = {}  # source -> pictures of its classes
    if recipe.evaluate.validation or any(isinstance(options, CLASS_SUITES) for options in recipe.evaluate.suites.values()):
        for source, trained in mixture.pools.items():
            names |= {(mixture.options[source].type, n) for n in names_of(trained)}
            if not getattr(mixture.options[source], "reads_late", False):
                pictures |= {_picture_key(p) for p in pictures_of(trained)}
            if not isinstance(trained, QuestionPool) and not getattr(mixture.options[source], "shipped", False):
                own[source] = list(pictures_of(trained))
    faults = _reported_too(recipe)
    held_out: dict[str, list[Picture]] = {}
    for key, options in _suites_of(recipe):
        if isinstance(options, CLASS_SUITES):
            measured = list(_classes_of(key, options))
            if not getattr(getattr(options, "source", None), "shipped", False):
                _, part, name = key.split(".", 2)
                held_out[f"{'suite' if part == 'suites' else part} {name}"] = [picture for _, _, shown in measured for picture in shown]
            common = sorted({n for kind, n, shown in measured if (kind, n) in names or any(_picture_key(p) in pictures for p in shown)})
            faults += [_overlap_message(key, common)] if common else []
        else:
            files = _files(options if isinstance(options, PerplexitySuite) else options.source)
            same = [s for s, o in mixture.options.items() if files & _files(o)]
            faults += [f"{key}: source {same[0]} trains on the same file; measure on another"] if same else []
    for copied in copies_held_out(own, held_out).values() if copies else ():
        faults += copied[:SHOWN] + ([f"and {len(copied) - SHOWN} more; `lcl-adapter data check` lists them all"] if len(copied) > SHOWN else [])
    if faults:
        raise RecipeError(faults)


def check_measured(recipe: Recipe, held_in: Mapping[str, Sequence[str]], only: tuple[str, ...]) -> None:
    """The same check for a trained adapter, by name alone.

    held_in: the classes of each source, from its manifest. Raises RecipeError.
    """
    names = {(recipe.sources[source].type, n) for source, trained in held_in.items() if source in recipe.sources for n in trained}
    faults = []
    for key, options in _suites_of(recipe):
        if isinstance(options, CLASS_SUITES) and (not only or key.rpartition(".")[2] in only):
            common = sorted({n for kind, n, _ in _classes_of(key, options) if (kind, n) in names})
            faults += [_overlap_message(key, common)] if common else []
    if faults:
        raise RecipeError(faults)


def _files(options: Any) -> frozenset[str]:
    """The files that a reader reads, of questions or of classes."""
    if isinstance(options, Shards):
        return frozenset(options.shards())
    return frozenset(str(file) for key in ("file", "questions", "path") if (file := getattr(options, key, None)) is not None)


def _classes_of(name: str, options: SuiteOptions) -> Iterator[tuple[str, str, tuple[Picture, ...]]]:
    """The classes or categories of a suite: type of source, name, pictures."""
    if isinstance(options, ImageNet100Suite):
        for pair in read_test_pairs(packaged(options.pairs), packaged(options.images)):
            # An empty type: compared by pictures alone, because two classes of ImageNet may share a name.
            for side, class_name in enumerate(pair.names):
                yield "", class_name, (*pair.support[side], *pair.queries[side])
        return
    if isinstance(options, OpenMiSuite):
        for question in read_open_mi(packaged(options.file), packaged(options.images)):
            # An empty type here too: its names are made up, and stand for other classes from question to question.
            for label, shown in question.support.items():
                yield "", label, (*shown, question.query) if label == question.gold else shown
        return
    assert not isinstance(options, PerplexitySuite)
    reader: Any = options.source
    pool: ClassPool | InspectionPool = open_reader(name, reader)
    for part in pool.classes if isinstance(pool, ClassPool) else pool.categories:
        yield reader.type, part.name, part.pictures


def _suites_of(recipe: Recipe) -> Iterator[tuple[str, SuiteOptions]]:
    """Every suite, by its key in the recipe."""
    for part in ("suites", "validation"):
        for name, options in getattr(recipe.evaluate, part).items():
            yield f"evaluate.{part}.{name}", options


def _reported_too(recipe: Recipe) -> list[str]:
    """A message for each validation suite that has a reported one's pictures, or its classes out of the same file: its weights
    would be chosen on the test.
    """
    if not recipe.evaluate.validation:
        return []
    names: set[tuple[str, frozenset[str], str]] = set()
    pictures: set[tuple[str, str | None]] = set()
    for name, options in recipe.evaluate.suites.items():
        if isinstance(options, CLASS_SUITES):
            for kind, n, shown in _classes_of(name, options):
                names.add((kind, _files(getattr(options, "source", None)), n))
                pictures.update(map(_picture_key, shown))
    messages = []
    for name, options in recipe.evaluate.validation.items():
        files = _files(options.source)
        common = {n for kind, n, shown in _classes_of(name, options) if (kind, files, n) in names or any(_picture_key(p) in pictures for p in shown)}
        if common:
            messages.append(
                f"evaluate.validation.{name}: {first_names(sorted(common), SHOWN)} are reported too; the weights would be chosen on the test"
            )
    return messages


def _overlap_message(key: str, common: Sequence[str]) -> str:
    return f"{key}: {first_names(common, SHOWN)} are trained on too; evaluate held-out classes (set `split` in training and evaluation)"


@dataclass(frozen=True)
class LongestCase:
    """Lengths in tokens of a case: its support set, its question with the answers to score, and what may be generated.

    places: tokens whose logits are computed. pictures: distinct ones.
    """

    support: int
    question: int
    places: int
    new_tokens: int
    pictures: int

    @property
    def total(self) -> int:
        return self.support + self.question + self.new_tokens


def longest_case(recipe: Recipe, encoder: Encoder) -> LongestCase | None:
    """The longest of a few cases of each cell. None without suites. Raises RecipeError, DataError."""
    cases = []
    for cell in build_cells(recipe, limit=DRAWN):
        for case in cell.cases:
            support = len(encoder.support(case.support))
            prompt, answers = encoder.question(case.query, case.answers)
            scored = sum(len(ids) - 1 for ids in answers)
            pictures = {picture for turn in (*case.support, case.query) for picture in turn.pictures}
            cases.append(LongestCase(support, len(prompt) + scored, 1 + scored, cell.new_tokens or 0, len(pictures)))
    return max(cases, key=lambda case: case.total, default=None)


def suite_tokens(recipe: Recipe) -> list[int]:
    """Every number of tokens of a picture shown with a label that a suite asks with."""
    return sorted({tokens for suite in recipe.evaluate.suites.values() for tokens in getattr(suite, "support_tokens", [])})


def check_suites(recipe: Recipe, encoder: Encoder) -> None:
    """Draw a few cases of every cell, and the longest questions of every question suite, so that faults show before
    training.

    Raises RecipeError, DataError; EpisodeError if a question does not fit the context; ModelError where the base's pictures cannot
    have as few tokens as a suite says.
    """
    for tokens in suite_tokens(recipe):
        load_encoder(replace(BaseRef.of(recipe), support_tokens=tokens))
    watched = tuple(recipe.evaluate.watched)
    during = build_cells(recipe, DRAWN, watched, during=True) if watched else ()
    for cell in chain(build_cells(recipe, limit=DRAWN), during, validation_cells(recipe, DRAWN)):
        for case in cell.cases if cell.kind != perplexity.KIND else ():
            _check_length(encoder, cell.suite, case.support, [case.query], cell.new_tokens)
    for name, options in recipe.evaluate.suites.items():
        if isinstance(options, PerplexitySuite):
            _check_page(encoder, name, perplexity.page(name, options, Selection(name, 0)))
        elif isinstance(options, VqaSuite | PopeSuite | RecSuite | InstructSuite):
            pool = open_reader(name, options.source)
            new_tokens = options.new_tokens if isinstance(options, InstructSuite) else boxes.BOX_TOKENS
            for index in longest_dialogues(pool, LONGEST):
                try:
                    turns = from_dialogues((pool.dialogues[index],)).branches[0][:-1]
                except DataError:
                    if options.source.on_fault == "refuse":
                        raise
                    continue
                _check_length(encoder, name, (), turns, new_tokens)


def _check_length(encoder: Encoder, suite: str, support: Sequence[Turn], turns: Sequence[Turn], new_tokens: int) -> None:
    length = encoder.support(support).longest + len(encoder.turns(turns, opened=True, first=not support)[0]) + new_tokens
    if length > encoder.context:
        raise EpisodeError(f"evaluate.suites.{suite}: {length} tokens do not fit the {encoder.limit}; lower its `shots`, or shorten the question.")


def _check_page(encoder: Encoder, suite: str, cell: Cell) -> None:
    for case in cell.cases:
        prompt, (ids,) = encoder.question(case.query, case.answers)
        if (length := len(prompt) + len(ids)) > encoder.context:
            remedy = "divide its paragraphs with blank lines"
            raise EpisodeError(f"evaluate.suites.{suite}: a paragraph of {length} tokens does not fit the {encoder.limit}; {remedy}.")


def _picture_key(picture: Picture) -> tuple[str, str | None]:
    return str(picture.path), picture.member
