"""``jigsaw`` (the published LCL code): one image's pieces in disorder, then the whole; the answer says where each belongs.

There the pieces' places are shuffled once more before the answer is made, so it cannot be known; here it is the pieces' own.
"""

from __future__ import annotations

from dataclasses import replace

from lcl_adapter.data.episodes.base import Episode, Example, LearnedAnswers, Rng
from lcl_adapter.data.sources import ClassPool
from lcl_adapter.recipe.sources import EpisodeOptions
from lcl_adapter.recipe.wording import phrase

GRIDS = {4: ((2, 2),), 6: ((2, 3), (3, 2)), 9: ((3, 3),), 12: ((3, 4), (4, 3)), 16: ((4, 4),)}  # pieces -> rows and columns


def jigsaw(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str) -> Episode:
    """The answer is a list of pairs, [column, row] counted from 0, one a piece in the order they were shown."""
    index = int(rng.integers(len(pool)))
    whole = pool.classes[index].pictures[int(rng.integers(len(pool.classes[index].pictures)))]
    count = int(rng.choice(options.tiles))
    rows, columns = GRIDS[count][int(rng.integers(len(GRIDS[count])))]
    places = [int(p) for p in rng.permutation(count)]
    support = tuple(Example(replace(whole, tile=(rows, columns, place)), f"piece {n}", index) for n, place in enumerate(places, 1))
    answer = str([[place % columns, place // columns] for place in places])
    words = phrase("jigsaw", options.templates, rng, options.languages).filled(thing=f"{columns} x {rows}")
    return Episode(support, (Example(whole, answer, index),), (answer,), LearnedAnswers(options.learn), origin, words)
