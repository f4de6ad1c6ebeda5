"""``jigsaw`` (the published LCL code): the shuffled pieces of one image, then the whole image.

The answer is the place of each piece. The published code shuffles the places again before it makes the answer, so that
the answer cannot be known. Here the answer has the true places.
"""

from __future__ import annotations

from dataclasses import replace

from lcl_adapter.data.episodes.base import Episode, Example, LearnedAnswers, Rng
from lcl_adapter.data.sources import ClassPool
from lcl_adapter.recipe.sources import EpisodeOptions
from lcl_adapter.recipe.wording import phrase

GRIDS = {4: ((2, 2),), 6: ((2, 3), (3, 2)), 9: ((3, 3),), 12: ((3, 4), (4, 3)), 16: ((4, 4),)}  # pieces -> rows and columns


def jigsaw(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str) -> Episode:
    """The answer is a list of pairs, [column, row] from 0, one for each piece in the order they were shown."""
    index = int(rng.integers(len(pool)))
    whole = pool.classes[index].pictures[int(rng.integers(len(pool.classes[index].pictures)))]
    count = int(rng.choice(options.tiles))
    rows, columns = GRIDS[count][int(rng.integers(len(GRIDS[count])))]
    places = [int(p) for p in rng.permutation(count)]
    support = tuple(Example(replace(whole, tile=(rows, columns, place)), f"piece {n}", index) for n, place in enumerate(places, 1))
    answer = str([[place % columns, place // columns] for place in places])
    words = phrase("jigsaw", options.templates, rng, options.languages).filled(thing=f"{columns} x {rows}")
    return Episode(support, (Example(whole, answer, index),), (answer,), LearnedAnswers(options.learn), origin, words)
