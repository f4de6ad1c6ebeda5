"""Pools -> episodes. One policy a file. Every draw is a pure function of (stream, seed, epoch, index).

A new policy is a function of (pool, options, rng, origin) in a file of its own, its name in ``recipe/sources.py``, and
a line in ``POLICIES`` or ``PART_POLICIES``.
"""

from collections.abc import Mapping
from typing import Any

from lcl_adapter.data.episodes.base import Episode, Example, LearnedAnswers, Policy
from lcl_adapter.data.episodes.inspection import inspection, inspection_episode
from lcl_adapter.data.episodes.jigsaw import jigsaw
from lcl_adapter.data.episodes.locate import locate
from lcl_adapter.data.episodes.longest import Place, longest_box, longest_episodes
from lcl_adapter.data.episodes.n_way import n_way
from lcl_adapter.data.episodes.product import product
from lcl_adapter.data.episodes.references import ref_or_weight, two_way_ref
from lcl_adapter.data.episodes.two_way import two_way_random_shot, two_way_weight
from lcl_adapter.data.sources import ClassPool, InspectionPool
from lcl_adapter.randomness import generator
from lcl_adapter.recipe.sources import EpisodeOptions, InspectionOptions, InspectionPolicy, PolicyName

__all__ = [
    "PART_POLICIES",
    "POLICIES",
    "Episode",
    "Example",
    "LearnedAnswers",
    "Place",
    "draw",
    "inspection_episode",
    "longest_box",
    "longest_episodes",
    "pictures_needed",
]

POLICIES: Mapping[PolicyName, Policy] = {
    "2way-weight": two_way_weight,
    "2way-random-shot": two_way_random_shot,
    "2way-ref": two_way_ref,
    "ref-or-weight": ref_or_weight,
    "jigsaw": jigsaw,
    "n-way": n_way,
    "product": product,
    "locate": locate,
}
PART_POLICIES: Mapping[InspectionPolicy, Any] = {"inspection": inspection, "locate": locate}


def draw(pool: ClassPool | InspectionPool, options: EpisodeOptions | InspectionOptions, seed: int, epoch: int, index: int, *stream: str) -> Episode:
    """The episode of (stream, seed, epoch, index).

    stream: what the episode is for, for instance ``"training"`` and the source's name. Two sources with equal options
    and different names draw different episodes.

    Raises EpisodeError if the pool has too little for these options.
    """
    policy: Any = PART_POLICIES[options.policy] if isinstance(options, InspectionOptions) else POLICIES[options.policy]
    episode: Episode = policy(pool, options, generator("episode", *stream, seed, epoch, index), f"{pool.name} episode {index}")
    return episode


def pictures_needed(options: EpisodeOptions, shots: int) -> int:
    """How many pictures a class needs for an episode: one for the query, and enough for ``shots``, with further views
    counted.
    """
    if options.policy == "jigsaw":
        return 1
    return 1 + -(-shots // (options.further_views + 1))
