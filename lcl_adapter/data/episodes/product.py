"""``product``: the support set shows two products; the query is one of them, or neither.

"Neither" pictures come from near classes as well as from far ones. Otherwise the model would learn that "neither" means
"very different from both". In the plain form there is no support set: the catalogue itself is learned.
"""

from __future__ import annotations

from dataclasses import replace

from lcl_adapter.data.episodes.base import (
    Episode,
    Example,
    LearnedAnswers,
    Rng,
    clash,
    draw_classes,
    random_names,
    retry,
    shuffled,
    shuffled_examples,
    split_pictures,
)
from lcl_adapter.data.sources import ClassPool
from lcl_adapter.errors import EpisodeError
from lcl_adapter.recipe.sources import EpisodeOptions
from lcl_adapter.recipe.wording import Wording, phrase


def product(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str) -> Episode:
    """Form, shots, nearness and kind of names are drawn first; then products, queries and pictures."""
    if options.plain and rng.random() < options.plain:
        return _plain(pool, options, rng, origin)
    if len(pool) < 3:
        raise EpisodeError(f"{pool.name}: {len(pool)} products; two are shown and a third is neither: add products.")
    shots = int(rng.choice(options.shots))
    hard = bool(rng.random() < options.hard)
    real = options.names == "real" or (options.names == "mixed" and bool(rng.random() < options.real_names))
    words = phrase("product.context", options.templates, rng, options.languages)
    return retry(lambda: _context(pool, options, rng, origin, shots, hard, real, words))


def _context(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str, shots: int, hard: bool, real: bool, words: Wording) -> Episode:
    shown = draw_classes(rng, pool, 2, hard)
    names = [pool.classes[i].name for i in shown] if real else random_names(rng, 2, used=[words.neither])
    if any(clash(a, b) for a, b in ((names[0], names[1]), (names[0], words.neither), (names[1], words.neither))):
        raise EpisodeError(f"{pool.name}: one of the names {names[0]!r}, {names[1]!r} and {words.neither!r} begins another: rename it.")
    answers = [2 if rng.random() < options.neither else int(rng.integers(2)) for _ in range(options.queries)]  # 0, 1, or 2 for neither
    neither = [_other_product(pool, rng, shown, bool(rng.random() < options.near_neither)) for a in answers if a == 2]
    others = list(dict.fromkeys(neither))
    query_counts = [answers.count(0), answers.count(1), *(neither.count(o) for o in others)]
    classes = [*shown, *others]
    divided = split_pictures(rng, [pool.classes[i] for i in classes], query_counts, [shots, shots, *[0] * len(others)], options)
    labels = [*names, *[words.neither] * len(others)]
    turned = int(rng.integers(4)) if options.turned and rng.random() < options.turned else 0
    labelled = list(zip(classes, labels, divided, strict=True))
    queries = [Example(replace(p, turned=turned), label, index) for index, label, pictures in labelled for p in pictures.queries]
    support = [Example(replace(p, turned=turned), label, index) for index, label, pictures in labelled for p in pictures.support]
    return Episode(
        support=shuffled_examples(rng, support),
        queries=shuffled_examples(rng, queries),
        labels=shuffled(rng, [*names, words.neither]),
        learned=LearnedAnswers(options.learn),
        origin=origin,
        wording=words.filled(a=names[0], b=names[1]),
    )


def _other_product(pool: ClassPool, rng: Rng, shown: list[int], near: bool) -> int:
    """A product that is not shown: with ``near``, a sibling of a shown one if there is any; else any other product."""
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
        pictures = pool.classes[index].pictures
        queries.append(Example(pictures[int(rng.integers(len(pictures)))], pool.classes[index].name, index))
    return Episode((), tuple(queries), tuple(dict.fromkeys(q.label for q in queries)), LearnedAnswers(options.learn), origin, words)
