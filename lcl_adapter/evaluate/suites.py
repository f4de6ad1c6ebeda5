"""Suites -> cells. A cell is one figure: the same requests for base and adapter, what is right, and what chance is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from lcl_adapter import episodes
from lcl_adapter.batches import Encoder
from lcl_adapter.conversations import WORDINGS, Turn, Wording, from_dialogues, from_episode
from lcl_adapter.episodes import Episode
from lcl_adapter.errors import EpisodeError, RecipeError
from lcl_adapter.mixture import Mixture
from lcl_adapter.recipe import Recipe, packaged
from lcl_adapter.recipe.schema import ClassFolders, ControlSuite, EpisodeOptions, LclSuite, PocketClasses, VqaSuite
from lcl_adapter.sources import ClassPool, Picture, QuestionPool, read_class_folders, read_llava_json, read_pocket


@dataclass(frozen=True)
class Case:
    """One query. ``answers`` are the worded labels (empty for free text), ``gold`` the right one, ``group`` its class."""

    support: tuple[Turn, ...]
    query: Turn
    labels: tuple[str, ...]
    answers: tuple[str, ...]
    gold: str
    group: str
    episode: Episode | None = None


@dataclass(frozen=True)
class Cell:
    """One line of the report."""

    suite: str
    name: str
    kind: str
    policy: str | None
    ways: int | None
    shots: int | None
    neighbours: str | None
    control: str | None
    chance: float
    cases: tuple[Case, ...]


def build_cells(recipe: Recipe, limit: int | None = None, only: tuple[str, ...] = (), seed: int | None = None) -> Iterator[Cell]:
    """The cells of a recipe's suites, in its order. ``only`` keeps the suites named; ``limit`` the first cases of each.

    Raises RecipeError for a suite that is not there.
    """
    missing = [name for name in only if name not in recipe.evaluate.suites]
    if missing:
        raise RecipeError([f"no suite {name!r}; the recipe has {', '.join(recipe.evaluate.suites) or 'none'}" for name in missing])
    wording, seed = WORDINGS[recipe.wording], recipe.evaluate.seed if seed is None else seed
    for name, options in recipe.evaluate.suites.items():
        if only and name not in only:
            continue
        if isinstance(options, VqaSuite):
            yield _vqa_cell(name, options, limit)
        else:
            yield from _lcl_cells(name, options, wording, seed, limit)


def classes_of(options: PocketClasses | ClassFolders, name: str, min_pictures: int = 1) -> ClassPool:
    """The pool that a suite's source names, with the classes of its split alone."""
    if isinstance(options, PocketClasses):
        return read_pocket(options.split, name, min_pictures)
    return read_class_folders(options.path, name, min_pictures, options.split, options.hold_out)


def check_held_out(recipe: Recipe, mixture: Mixture) -> None:
    """No class that is evaluated may be trained on: neither under its name in a source of the same type, nor by any picture.

    Raises RecipeError that lists the classes in common.
    """
    pictures, names = set(), set()
    for source, trained in mixture.pools.items():
        if isinstance(trained, ClassPool):
            names |= {(mixture.options[source].type, c.name) for c in trained.classes}
            pictures |= {_key(p) for c in trained.classes for p in c.pictures}
        else:
            pictures |= {_key(e.picture) for d in trained.dialogues for e in d.exchanges if e.picture}
    faults = []
    for name, options in recipe.evaluate.suites.items():
        if isinstance(options, LclSuite):
            pool = classes_of(options.source, name)
            common = sorted({c.name for c in pool.classes if (options.source.type, c.name) in names or any(_key(p) in pictures for p in c.pictures)})
            if common:
                shown = ", ".join(common[:5]) + (f" and {len(common) - 5} more" if len(common) > 5 else "")
                faults.append(f"evaluate.suites.{name}: {shown} are trained on too; evaluate held-out classes (set `split` on both sides)")
    if faults:
        raise RecipeError(faults)


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


def _lcl_cells(name: str, options: LclSuite, wording: Wording, seed: int, limit: int | None) -> Iterator[Cell]:
    control = options.control if isinstance(options, ControlSuite) else None
    # Shipped classes with five drawings or more in every suite, so that all cells are about the same classes.
    wanted = 4 if isinstance(options.source, PocketClasses) else 1 if options.further_views else max(options.shots)
    pool = classes_of(options.source, name, 1 + wanted)
    if "hard" in options.neighbours and not pool.grouped:
        raise RecipeError([f"evaluate.suites.{name}: nothing tells which classes are near; set `neighbours: easy`, or add neighbours.json"])
    for shots in options.shots:
        for neighbours in options.neighbours:
            drawn = EpisodeOptions(
                policy="n-way",
                ways=[options.ways],
                shots=[shots],
                queries=1,
                names=options.names,
                hard=float(neighbours == "hard"),
                further_views=options.further_views,
            )
            count = min(options.episodes, limit or options.episodes)
            made = (episodes.draw(pool, drawn, seed, 1 + (neighbours == "hard"), index) for index in range(count))
            label = f"{name}-{neighbours}" if control and len(options.shots) == 1 else f"{name}-{shots}shot-{neighbours}"
            yield Cell(
                suite=name,
                name=label,
                kind=options.kind,
                policy="n-way",
                ways=options.ways,
                shots=shots,
                neighbours=neighbours,
                control=control,
                chance=1 / options.ways,
                cases=tuple(_case(_controlled(e, control, seed, i), wording, pool) for i, e in enumerate(made)),
            )


def _controlled(episode: Episode, control: str | None, seed: int, index: int) -> Episode:
    """The same pictures with nothing to learn from them: names shuffled among the support set, or no support set."""
    if control == "no-support":
        return replace(episode, support=())
    if control == "shuffled-names":
        order = np.random.default_rng([seed, index, 17]).permutation(len(episode.support))
        names = [episode.support[i].label for i in order]
        return replace(episode, support=tuple(replace(e, label=n) for e, n in zip(episode.support, names, strict=True)))
    return episode


def _case(episode: Episode, wording: Wording, pool: ClassPool) -> Case:
    conversation = from_episode(episode, wording)
    query = episode.queries[0]
    return Case(
        support=tuple(replace(t, learn=False) for t in conversation.shared),
        query=conversation.branches[0][0],
        labels=episode.labels,
        answers=tuple(wording.answered(label) for label in episode.labels),
        gold=query.label,
        group=pool.classes[query.class_index].name,
        episode=episode,
    )


def _vqa_cell(name: str, options: VqaSuite, limit: int | None) -> Cell:
    source = options.source
    pool: QuestionPool = read_llava_json(packaged(source.file), packaged(source.images), name, source.on_fault, source.limit)
    count = min(len(pool), limit or len(pool))
    cases = []
    for dialogue in pool.dialogues[:count]:
        turns = from_dialogues((dialogue,)).branches[0]
        before = tuple(replace(t, learn=False) for t in turns[:-2])
        cases.append(Case(before, turns[-2], (), (), turns[-1].text, turns[-1].text))
    most_common = Counter(case.gold for case in cases).most_common(1)[0][1] / len(cases)
    return Cell(name, name, "vqa", None, None, None, None, None, most_common, tuple(cases))
