"""``product``: two products are taught in context; the query is the one, the other, or neither.

"Neither" comes from near classes as well as far ones, else the model would learn that it means "looks nothing like these".
In the plain form nothing is shown: the catalogue itself is learned.
"""

from __future__ import annotations

from dataclasses import replace

from lcl_adapter.data.episodes.base import Episode, Example, LearnedAnswers, Rng, clash, divide, draw_classes, first_that_works, random_names
from lcl_adapter.data.sources import ClassPool
from lcl_adapter.errors import EpisodeError
from lcl_adapter.recipe.sources import EpisodeOptions
from lcl_adapter.recipe.wording import Wording, phrase


def product(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str) -> Episode:
    """Form, shots, nearness and kind of names are drawn first, then products, queries and pictures."""
    if options.plain and rng.random() < options.plain:
        return _plain(pool, options, rng, origin)
    if len(pool) < 3:
        raise EpisodeError(f"{pool.name}: {len(pool)} products; two are shown and a third is neither: add products.")
    shots = int(rng.choice(options.shots))
    hard = bool(rng.random() < options.hard)
    real = options.names == "real" or (options.names == "mixed" and bool(rng.random() < options.real_names))
    words = phrase("product.context", options.templates, rng, options.languages)
    return first_that_works(lambda: _context(pool, options, rng, origin, shots, hard, real, words))


def _context(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str, shots: int, hard: bool, real: bool, words: Wording) -> Episode:
    shown = draw_classes(rng, pool, 2, hard)
    names = [pool.classes[i].name for i in shown] if real else random_names(rng, 2, taken=[words.neither])
    if any(clash(a, b) for a, b in ((names[0], names[1]), (names[0], words.neither), (names[1], words.neither))):
        raise EpisodeError(f"{pool.name}: one of the names {names[0]!r}, {names[1]!r} and {words.neither!r} begins another: rename it.")
    which = [2 if rng.random() < options.neither else int(rng.integers(2)) for _ in range(options.queries)]
    others = [_other(pool, rng, shown, bool(rng.random() < options.near_neither)) for w in which if w == 2]
    strangers = list(dict.fromkeys(others))
    asked = [which.count(0), which.count(1), *(others.count(s) for s in strangers)]
    classes = [*shown, *strangers]
    pair = divide(rng, [pool.classes[i] for i in classes], asked, [shots, shots, *[0] * len(strangers)], options)
    labels = [*names, *[words.neither] * len(strangers)]
    turned = int(rng.integers(4)) if options.turned and rng.random() < options.turned else 0
    queries, support = (
        [Example(replace(p, turned=turned), label, index) for index, label, parts in zip(classes, labels, pair, strict=True) for p in parts[side]]
        for side in (0, 1)
    )
    return Episode(
        support=tuple(support[i] for i in rng.permutation(len(support))),
        queries=tuple(queries[i] for i in rng.permutation(len(queries))),
        labels=tuple(in_any_order(rng, [*names, words.neither])),
        learned=LearnedAnswers(options.learn),
        origin=origin,
        wording=words.filled(a=names[0], b=names[1]),
    )


def in_any_order(rng: Rng, values: list[str]) -> list[str]:
    """In an order that tells nothing."""
    return [values[i] for i in rng.permutation(len(values))]


def _other(pool: ClassPool, rng: Rng, shown: list[int], near: bool) -> int:
    """A product that is neither: a sibling of one shown where ``near`` and there is one, else any other."""
    siblings = [i for i in (*pool.hard_neighbours(shown[0]), *pool.hard_neighbours(shown[1])) if i not in shown] if near else []
    if siblings:
        return int(rng.choice(siblings))
    while (index := int(rng.integers(len(pool)))) in shown:
        pass
    return index


def _plain(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str) -> Episode:
    words = phrase("product.plain", options.templates, rng, options.languages)
    queries = []
    for _ in range(options.queries):
        index = int(rng.integers(len(pool)))
        one = pool.classes[index]
        queries.append(Example(one.pictures[int(rng.integers(len(one.pictures)))], one.name, index))
    return Episode((), tuple(queries), tuple(dict.fromkeys(q.label for q in queries)), LearnedAnswers(options.learn), origin, words)
