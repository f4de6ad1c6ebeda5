"""What an episode is, and what all policies share: random draws, names, pictures by other hands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from lcl_adapter.data.sources import ClassPool, Picture, PictureClass
from lcl_adapter.errors import EpisodeError
from lcl_adapter.recipe.sources import EpisodeOptions
from lcl_adapter.recipe.wording import Wording

Rng = np.random.Generator
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))


class LearnedAnswers(Enum):
    """Which answers are trained: the query's alone (as LCL does), or also support labels that were shown before."""

    QUERY = "query"
    REPEATED = "repeated"


@dataclass(frozen=True)
class Example:
    """One labelled picture. ``class_index`` points into the pool; it is never shown to the model."""

    picture: Picture
    label: str
    class_index: int


@dataclass(frozen=True)
class Episode:
    """A support set and the queries to be judged by it. ``labels`` are the names in play, in an order that tells nothing.

    wording: how the task's own questions are put; None for the recipe's wording.
    """

    support: tuple[Example, ...]
    queries: tuple[Example, ...]
    labels: tuple[str, ...]
    learned: LearnedAnswers
    origin: str
    wording: Wording | None = None


Policy = Callable[[ClassPool, EpisodeOptions, Rng, str], Episode]


def generator(seed: int, epoch: int, index: int, stream: int = 0) -> Rng:
    """The only source of randomness of an episode: a pure function of its arguments."""
    return np.random.default_rng([seed, epoch, index, stream])


def random_name(rng: Rng) -> str:
    """1 to 10 lower-case letters, as LCL names a class under test."""
    return "".join(rng.choice(LETTERS, int(rng.integers(1, 11))))


def clash(one: str, other: str) -> bool:
    """Whether one of two names is a prefix of the other: then the first tokens could not tell them apart."""
    return one.startswith(other) or other.startswith(one)


def random_names(rng: Rng, count: int, taken: Sequence[str] = ()) -> list[str]:
    """``count`` random names, none a prefix of another or of those taken."""
    names: list[str] = []
    while len(names) < count:
        name = random_name(rng)
        if not any(clash(name, other) for other in (*names, *taken)):
            names.append(name)
    return names


def take(rng: Rng, pictures: Sequence[Picture], count: int, views: int) -> list[Picture]:
    """``count`` pictures in random order; when they run out, again in further views, up to ``views`` of them each."""
    order = [pictures[i] for i in rng.permutation(len(pictures))]
    return [order[i % len(order)].in_view(i // len(order)) for i in range(min(count, len(order) * (views + 1)))]


def divide(
    rng: Rng, classes: Sequence[PictureClass], asked: Sequence[int], shots: int | Sequence[int], options: EpisodeOptions
) -> list[list[list[Picture]]]:
    """For each class, its query pictures (``asked`` of them) and its support pictures (``shots``): [class][side][picture].

    No query picture is in the support set. Where hands are known and ``other_artists`` is set, no *hand* of a query is in
    it either, in any class: else the class that lacks the query's style would give the answer away.

    Raises EpisodeError where a class has too few pictures.
    """
    shown = [shots] * len(classes) if isinstance(shots, int) else list(shots)
    needed = [-(-count // (options.further_views + 1)) for count in shown]
    by_hand = options.other_artists and all(p.artist is not None for one in classes for p in one.pictures)
    hands: list[str] = []
    if by_hand:
        queried = [one.artists for one, count in zip(classes, asked, strict=True) if count]
        shuffled = rng.permutation(sorted({h for one in classes for h in one.artists})).tolist()
        for hand in sorted(shuffled, key=lambda h: -sum(h in own for own in queried)):  # a hand all queried classes have, first
            rest = [sum(p.artist not in {*hands, hand} for p in one.pictures) for one in classes]
            if all(r >= n for r, n in zip(rest, needed, strict=True)) and len(hands) < max(1, *asked):
                hands.append(str(hand))
    pair = []
    for one, count, shots_of_class, kept in zip(classes, asked, shown, needed, strict=True):
        if by_hand:
            querying = [p for p in one.pictures if p.artist in hands]
            rest_of_class = [p for p in one.pictures if p.artist not in hands]
        else:
            order = [one.pictures[i] for i in rng.permutation(len(one.pictures))]
            spare = max(0, min(count, len(order) - kept))
            querying, rest_of_class = order[:spare], order[spare:]
        support = take(rng, rest_of_class, shots_of_class, options.further_views) if rest_of_class else []
        if (count and not querying) or len(support) < shots_of_class:
            other = "by other hands than the query's" if by_hand else "besides the query"
            raise EpisodeError(
                f"class {one.name!r} has {len(one.pictures)} pictures, {shots_of_class} {other} are needed: "
                "lower `shots`, add photos, or allow `further_views`."
            )
        queries = take(rng, querying, count, options.further_views) if count else []
        queries += [queries[i % len(queries)] for i in range(count - len(queries))]  # asked again rather than not at all
        pair.append([queries, support])
    return pair


def first_that_works(attempt: Callable[[], Episode]) -> Episode:
    """Try other classes, from the same stream, where those drawn have clashing names or share too few hands.

    Raises the last attempt's EpisodeError after 50.
    """
    for _ in range(49):
        try:
            return attempt()
        except EpisodeError:
            continue
    return attempt()


def draw_classes(rng: Rng, pool: ClassPool, ways: int, hard: bool) -> list[int]:
    """``ways`` different classes: near neighbours of a first one when ``hard``, else classes of different groups.

    Where a class has too few hard neighbours another first class is tried; where none has, any classes are drawn.
    """
    if len(pool) < ways:
        raise EpisodeError(f"{pool.name}: {len(pool)} classes, {ways} ways are asked: add classes or lower `ways`.")
    for _ in range(50):
        first = int(rng.integers(len(pool)))
        near = pool.hard_neighbours(first)
        if hard and len(near) >= ways - 1:
            return [first, *(int(i) for i in rng.choice(near, ways - 1, replace=False))]
        if not hard:
            chosen = [first]
            barred = {first, *pool.siblings(first)}
            for candidate in rng.permutation(len(pool)):
                if len(chosen) < ways and int(candidate) not in barred:
                    chosen.append(int(candidate))
                    barred.update((int(candidate), *pool.siblings(int(candidate))))
            if len(chosen) == ways:
                return chosen
    return [int(i) for i in rng.choice(len(pool), ways, replace=False)]


def assemble(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str, classes: Sequence[int], names: Sequence[str], shots: int) -> Episode:
    """The episode of the given classes and names: queries from classes at random, support shuffled, labels in random order.

    Raises EpisodeError where a class has too few pictures.
    """
    asked = np.bincount(rng.integers(0, len(classes), options.queries), minlength=len(classes)).tolist()
    pair = divide(rng, [pool.classes[i] for i in classes], asked, shots, options)
    turned = int(rng.integers(4)) if options.turned and rng.random() < options.turned else 0

    def seen(picture: Picture) -> Picture:
        view = int(rng.integers(options.augment + 1)) if options.augment else picture.view
        return replace(picture, view=view, turned=turned)

    queries, support = (
        [Example(seen(p), name, index) for index, name, parts in zip(classes, names, pair, strict=True) for p in parts[side]] for side in (0, 1)
    )
    return Episode(
        support=tuple(support[i] for i in rng.permutation(len(support))),
        queries=tuple(queries[i] for i in rng.permutation(len(queries))),
        labels=tuple(names[i] for i in rng.permutation(len(names))),
        learned=LearnedAnswers(options.learn),
        origin=origin,
    )
