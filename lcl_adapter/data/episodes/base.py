"""What an episode is, and what all policies share: random draws, names, pictures by different artists."""

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
BLENDS = (0.3, 0.5)  # the weight of a blend's second class
ATTEMPTS = 50  # draws of other classes before a policy gives up


class LearnedAnswers(Enum):
    """Which answers are trained: only the queries' (as in LCL), or also support labels that were shown before."""

    QUERY = "query"
    REPEATED = "repeated"


@dataclass(frozen=True)
class Example:
    """One labelled picture. ``class_index`` is its class in the pool; the model never sees it."""

    picture: Picture
    label: str
    class_index: int


@dataclass(frozen=True)
class Episode:
    """A support set, and queries to answer with it. ``labels`` are all possible labels, in random order.

    wording: the sentences of the episode's task; None for the recipe's wording.
    """

    support: tuple[Example, ...]
    queries: tuple[Example, ...]
    labels: tuple[str, ...]
    learned: LearnedAnswers
    origin: str
    wording: Wording | None = None


Policy = Callable[[ClassPool, EpisodeOptions, Rng, str], Episode]


def random_name(rng: Rng) -> str:
    """1 to 10 lower-case letters, as LCL names a class under test."""
    return "".join(rng.choice(LETTERS, int(rng.integers(1, 11))))


def clash(first: str, second: str) -> bool:
    """Whether one of two names is a prefix of the other. Their first tokens could then be the same."""
    return first.startswith(second) or second.startswith(first)


def random_names(rng: Rng, count: int, used: Sequence[str] = ()) -> list[str]:
    """``count`` random names, none of them a prefix of another or of a used one."""
    names: list[str] = []
    while len(names) < count:
        name = random_name(rng)
        if not any(clash(name, other) for other in (*names, *used)):
            names.append(name)
    return names


def draw_pictures(rng: Rng, pictures: Sequence[Picture], count: int, views: int) -> list[Picture]:
    """``count`` pictures in random order. When they run out, their further views follow, up to ``views`` of each."""
    order = [pictures[i] for i in rng.permutation(len(pictures))]
    return [order[i % len(order)].in_view(i // len(order)) for i in range(min(count, len(order) * (views + 1)))]


@dataclass(frozen=True)
class ClassPictures:
    """The pictures of one class in an episode."""

    queries: list[Picture]
    support: list[Picture]


def split_pictures(
    rng: Rng, classes: Sequence[PictureClass], queries: Sequence[int], shots: int | Sequence[int], options: EpisodeOptions
) -> list[ClassPictures]:
    """Query and support pictures of each class. ``queries`` and ``shots`` say how many.

    No query picture is in the support set. If artists are known and ``other_artists`` is set, no *artist* of a query is
    in the support set of any class. Otherwise the class without the query's style could be ruled out by style alone.

    Raises EpisodeError if a class has too few pictures.
    """
    shots_of = [shots] * len(classes) if isinstance(shots, int) else list(shots)
    needed = [-(-count // (options.further_views + 1)) for count in shots_of]  # pictures for the support set, without further views
    by_artist = options.other_artists and all(p.artist is not None for c in classes for p in c.pictures)
    query_artists = _query_artists(rng, classes, queries, needed) if by_artist else []
    divided = []
    for picture_class, query_count, shot_count, reserved in zip(classes, queries, shots_of, needed, strict=True):
        if by_artist:
            for_queries = [p for p in picture_class.pictures if p.artist in query_artists]
            for_support = [p for p in picture_class.pictures if p.artist not in query_artists]
        else:
            order = [picture_class.pictures[i] for i in rng.permutation(len(picture_class.pictures))]
            spare = max(0, min(query_count, len(order) - reserved))
            for_queries, for_support = order[:spare], order[spare:]
        support = draw_pictures(rng, for_support, shot_count, options.further_views) if for_support else []
        if (query_count and not for_queries) or len(support) < shot_count:
            condition = "by other artists than the query's" if by_artist else "besides the query"
            raise EpisodeError(
                f"class {picture_class.name!r} has {len(picture_class.pictures)} pictures, {shot_count} {condition} are needed: "
                "lower `shots`, add photos, or allow `further_views`."
            )
        drawn = draw_pictures(rng, for_queries, query_count, options.further_views) if query_count else []
        repeated = [drawn[i % len(drawn)] for i in range(query_count - len(drawn))]  # too few pictures: some are asked about twice
        divided.append(ClassPictures(drawn + repeated, support))
    return divided


def _query_artists(rng: Rng, classes: Sequence[PictureClass], queries: Sequence[int], needed: Sequence[int]) -> list[str]:
    """Artists whose pictures are queries; without them every class still has ``needed`` support pictures."""
    chosen: list[str] = []
    queried = [c.artists for c, count in zip(classes, queries, strict=True) if count]
    shuffled = rng.permutation(sorted({artist for c in classes for artist in c.artists})).tolist()
    # Artists of all queried classes come first.
    for artist in sorted(shuffled, key=lambda a: -sum(a in artists for artists in queried)):
        rest = [sum(p.artist not in {*chosen, artist} for p in c.pictures) for c in classes]
        if all(r >= n for r, n in zip(rest, needed, strict=True)) and len(chosen) < max(1, *queries):
            chosen.append(str(artist))
    return chosen


def retry(attempt: Callable[[], Episode]) -> Episode:
    """Draw again, with the same generator, while the drawn classes have clashing names or too few common artists.

    Raises the last attempt's EpisodeError after 50 attempts.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return attempt()
        except EpisodeError:
            continue
    return attempt()


def draw_classes(rng: Rng, pool: ClassPool, ways: int, hard: bool) -> list[int]:
    """``ways`` different classes: with ``hard``, near neighbours of a first class; else classes of different groups.

    If a class has too few hard neighbours, another first class is drawn; after 50 attempts, any classes are drawn.
    """
    if len(pool) < ways:
        raise EpisodeError(f"{pool.name}: {len(pool)} classes, {ways} ways are needed: add classes or lower `ways`.")
    for _ in range(ATTEMPTS):
        first = int(rng.integers(len(pool)))
        near = pool.hard_neighbours(first)
        if hard and len(near) >= ways - 1:
            return [first, *(int(i) for i in rng.choice(near, ways - 1, replace=False))]
        if not hard:
            chosen = [first]
            excluded = {first, *pool.siblings(first)}
            for candidate in map(int, rng.permutation(len(pool))):
                if len(chosen) < ways and candidate not in excluded:
                    chosen.append(candidate)
                    excluded.update((candidate, *pool.siblings(candidate)))
            if len(chosen) == ways:
                return chosen
    return [int(i) for i in rng.choice(len(pool), ways, replace=False)]


def shuffled(rng: Rng, values: Sequence[str]) -> tuple[str, ...]:
    """The values in random order."""
    return tuple(values[i] for i in rng.permutation(len(values)))


def shuffled_examples(rng: Rng, examples: Sequence[Example]) -> tuple[Example, ...]:
    """The examples in random order."""
    return tuple(examples[i] for i in rng.permutation(len(examples)))


def _draw_partners(rng: Rng, pool: ClassPool, classes: Sequence[int]) -> dict[int, tuple[PictureClass, float]]:
    """For each class the one that it is blended with, and that one's weight.

    A blend of two classes is a third one, so that no model learns all classes by heart (docs/lab.md).
    """
    others = [int(i) for i in rng.permutation(len(pool)) if i not in classes] or [*classes[1:], classes[0]]
    return {index: (pool.classes[others[n % len(others)]], float(rng.uniform(*BLENDS))) for n, index in enumerate(classes)}


def _copied(rng: Rng, query: Example, support: Sequence[Example]) -> Example:
    """The query with a picture of its class out of the support set; unchanged where that has none."""
    same = [example for example in support if example.class_index == query.class_index]
    return replace(query, picture=same[int(rng.integers(len(same)))].picture) if same else query


def assemble(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str, classes: Sequence[int], names: Sequence[str], shots: int) -> Episode:
    """The episode of these classes and names: queries from random classes, support set and labels in random order.

    Raises EpisodeError if a class has too few pictures.
    """
    query_counts = np.bincount(rng.integers(0, len(classes), options.queries), minlength=len(classes)).tolist()
    divided = split_pictures(rng, [pool.classes[i] for i in classes], query_counts, shots, options)
    turned = int(rng.integers(4)) if options.turned and rng.random() < options.turned else 0

    own_names = list(names) == [pool.classes[i].name for i in classes]  # a blend of two classes has no name of its own
    blended = bool(options.blended) and rng.random() < options.blended and not own_names
    partners = _draw_partners(rng, pool, classes) if blended else {}

    def example(picture: Picture, label: str, index: int) -> Example:
        view = int(rng.integers(options.augment + 1)) if options.augment else picture.view
        blend = None
        if index in partners:
            partner, weight = partners[index]
            blend = (replace(partner.pictures[int(rng.integers(len(partner.pictures)))], turned=turned), weight)
        return Example(replace(picture, view=view, turned=turned, blend=blend), label, index)

    named = list(zip(classes, names, divided, strict=True))
    queries = [example(picture, name, index) for index, name, pictures in named for picture in pictures.queries]
    support = [example(picture, name, index) for index, name, pictures in named for picture in pictures.support]
    if options.copied:
        queries = [_copied(rng, query, support) if rng.random() < options.copied else query for query in queries]
    return Episode(
        support=shuffled_examples(rng, support),
        queries=shuffled_examples(rng, queries),
        labels=shuffled(rng, names),
        learned=LearnedAnswers(options.learn),
        origin=origin,
    )
