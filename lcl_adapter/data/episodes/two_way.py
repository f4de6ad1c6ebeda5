"""``2way-weight`` and ``2way-random-shot``, as LCL trains them (arXiv 2308.07891, section 3.2 and the published code).

The class under test goes by a random string of letters, its neighbour by its own name. Neighbours are drawn with
weights n ... 1 from the nearest to the farthest, so that near ones come often and far ones still come.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lcl_adapter.data.episodes.base import Episode, Rng, assemble, first_that_works, random_names
from lcl_adapter.data.sources import ClassPool
from lcl_adapter.errors import EpisodeError
from lcl_adapter.recipe.sources import EpisodeOptions


def rank_weight(rng: Rng, ranked: Sequence[int]) -> int:
    """One of ``ranked``, the nearest with weight n and the farthest with weight 1."""
    weights = np.arange(len(ranked), 0, -1, dtype=float)
    return int(ranked[int(rng.choice(len(ranked), p=weights / weights.sum()))])


def opponents(pool: ClassPool, rng: Rng) -> list[int]:
    """A class under test and a neighbour, near ones more often. Raises EpisodeError for a pool of one."""
    if len(pool) < 2:
        raise EpisodeError(f"{pool.name}: {len(pool)} classes, 2 ways are asked: add classes.")
    under_test = int(rng.integers(len(pool)))
    ranked = pool.neighbours(under_test)
    return [under_test, rank_weight(rng, ranked) if pool.grouped else int(rng.choice(ranked))]  # no ranks are known without groups


def _linked(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str, shots: int) -> Episode:
    def attempt() -> Episode:
        classes = opponents(pool, rng)
        real = pool.classes[classes[1]].name
        return assemble(pool, options, rng, origin, classes, [*random_names(rng, 1, taken=[real]), real], shots)

    return first_that_works(attempt)


def two_way_weight(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str) -> Episode:
    """Shots as the recipe lists them, each as likely."""
    return _linked(pool, options, rng, origin, int(rng.choice(options.shots)))


def two_way_random_shot(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str) -> Episode:
    """Shots from 1 to the recipe's largest, shot i + 1 with weight e^((i + 1) / 2): many shots come more often."""
    most = max(options.shots)
    weights = np.exp((np.arange(most) + 1) / 2)
    return _linked(pool, options, rng, origin, 1 + int(rng.choice(most, p=weights / weights.sum())))
