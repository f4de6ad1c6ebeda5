"""Pools -> episodes. One policy a file; every draw is a pure function of (seed, epoch, index).

A new policy is a function of (pool, options, rng, origin) in a file of its own, its name in ``recipe/schema.py``, and a
line in ``POLICIES``.
"""

from lcl_adapter.episodes.base import Episode, Example, LearnedAnswers, Policy, generator
from lcl_adapter.episodes.n_way import n_way
from lcl_adapter.episodes.two_way import two_way_random_shot, two_way_weight
from lcl_adapter.recipe.schema import EpisodeOptions, PolicyName
from lcl_adapter.sources import ClassPool

__all__ = ["POLICIES", "Episode", "Example", "LearnedAnswers", "draw", "generator", "pictures_needed"]

POLICIES: dict[PolicyName, Policy] = {"2way-weight": two_way_weight, "2way-random-shot": two_way_random_shot, "n-way": n_way}


def draw(pool: ClassPool, options: EpisodeOptions, seed: int, epoch: int, index: int) -> Episode:
    """The episode that (seed, epoch, index) stands for.

    Raises EpisodeError where the pool cannot give what the options ask.
    """
    return POLICIES[options.policy](pool, options, generator(seed, epoch, index), f"{pool.name} episode {index}")


def pictures_needed(options: EpisodeOptions, shots: int) -> int:
    """How many pictures a class needs for an episode of ``shots``: those, less what further views stand in for, and one query."""
    return 1 + -(-shots // (options.further_views + 1))
