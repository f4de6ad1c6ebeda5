"""``2way-weight`` and ``2way-random-shot``, as LCL trains them (arXiv 2308.07891, section 3.2 and the published code).

The class under test has a random string of letters as its name; its neighbour keeps its own name. Neighbours are drawn
with weights n ... 1 from the nearest to the farthest: near neighbours are frequent, far neighbours are rare.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lcl_adapter.data.episodes.base import Episode, Rng, assemble, random_names, retry
from lcl_adapter.data.sources import ClassPool
from lcl_adapter.errors import EpisodeError
from lcl_adapter.recipe.sources import EpisodeOptions


def draw_by_rank(rng: Rng, ranked: Sequence[int]) -> int:
    """An element of ``ranked``; the nearest has weight n, the farthest weight 1."""
    weights = np.arange(len(ranked), 0, -1, dtype=float)
    return int(ranked[int(rng.choice(len(ranked), p=weights / weights.sum()))])


def draw_pair(pool: ClassPool, rng: Rng) -> list[int]:
    """A class under test and a neighbour; near neighbours are more frequent.

    Raises EpisodeError for a pool of one class.
    """
    if len(pool) < 2:
        raise EpisodeError(f"{pool.name}: {len(pool)} classes, 2 ways are needed: add classes.")
    under_test = int(rng.integers(len(pool)))
    neighbours = pool.neighbours(under_test)
    if not pool.grouped:  # nothing is known about nearness
        return [under_test, int(rng.choice(neighbours))]
    return [under_test, draw_by_rank(rng, neighbours)]


def _two_way(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str, shots: int) -> Episode:
    def attempt() -> Episode:
        classes = draw_pair(pool, rng)
        neighbour = pool.classes[classes[1]].name
        return assemble(pool, options, rng, origin, classes, [*random_names(rng, 1, used=[neighbour]), neighbour], shots)

    return retry(attempt)


def two_way_weight(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str) -> Episode:
    """Each number of shots in the recipe's list is equally likely."""
    return _two_way(pool, options, rng, origin, int(rng.choice(options.shots)))


def two_way_random_shot(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str) -> Episode:
    """From 1 shot to the recipe's largest number; i + 1 shots have weight e^((i + 1) / 2), so that many shots are more
    frequent.
    """
    most = max(options.shots)
    weights = np.exp((np.arange(most) + 1) / 2)
    return _two_way(pool, options, rng, origin, 1 + int(rng.choice(most, p=weights / weights.sum())))
