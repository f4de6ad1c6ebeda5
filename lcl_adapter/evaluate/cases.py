"""A case is one question with its right answer.

A cell is one line of the report: the same cases for base and adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lcl_adapter.answering.predict import Reply
from lcl_adapter.data import episodes
from lcl_adapter.data.conversations import Turn, from_episode
from lcl_adapter.data.episodes import Episode
from lcl_adapter.data.sources import ClassPool, InspectionPool
from lcl_adapter.errors import DataError
from lcl_adapter.recipe.sources import EpisodeOptions, InspectionOptions
from lcl_adapter.recipe.wording import Wording


@dataclass(frozen=True)
class Case:
    """One query.

    answers: the worded labels, empty for free text. gold: the right label, or the right text. group: its class; intervals
    resample groups. truth: what else a judge needs, for instance VQAv2's ten answers, a box, or the kind of defect.
    """

    support: tuple[Turn, ...]
    query: Turn
    labels: tuple[str, ...]
    answers: tuple[str, ...]
    gold: str
    group: str
    episode: Episode | None = None
    truth: Any = None

    @property
    def worded_gold(self) -> str:
        """The right label in the wording of an answer."""
        return self.answers[self.labels.index(self.gold)] if self.labels else self.gold


Judge = Callable[[Sequence[Case], Sequence[Reply]], dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One line of the report.

    metric: the name of ``value``. judge: cases and replies -> {"value", "ci95", "greedy", ...}. baseline: the method
    without training to compare with. published: (who, value) by the same protocol. new_tokens: the most generated tokens.
    """

    suite: str
    name: str
    kind: str
    metric: str
    chance: float
    cases: tuple[Case, ...]
    judge: Judge = field(compare=False)
    baseline: str | None = None
    policy: str | None = None
    ways: int | None = None
    shots: int | None = None
    neighbours: str | None = None
    control: str | None = None
    published: tuple[tuple[str, float], ...] = ()
    new_tokens: int = 24


def draw_episodes(
    pool: ClassPool | InspectionPool, options: EpisodeOptions | InspectionOptions, seed: int, count: int, on_fault: str, *stream: str
) -> list[Episode]:
    """The first ``count`` episodes of a stream. With ``on_fault="skip"``, those with an unusable mask or box are left out.

    Raises DataError for the first such episode with "refuse", and if nearly all are unusable.
    """
    drawn: list[Episode] = []
    for index in range(4 * count + 20):
        if len(drawn) == count:
            return drawn
        try:
            drawn.append(episodes.draw(pool, options, seed, 0, index, *stream))
        except DataError:
            if on_fault == "refuse" or index == 4 * count + 19:
                raise
    return drawn


def case_of(episode: Episode, wording: Wording, group: str, query_index: int = 0, truth: Any = None) -> Case:
    """One query of an episode, worded as in training. Labels are scored if there are several."""
    conversation = from_episode(episode, wording)
    query = episode.queries[query_index]
    words = episode.wording or wording
    labels = episode.labels if len(episode.labels) > 1 else ()
    return Case(
        support=tuple(replace(t, learn=False) for t in conversation.shared),
        query=conversation.branches[query_index][0],
        labels=labels,
        answers=tuple(words.answered(label) for label in labels),
        gold=query.label,
        group=group,
        episode=episode,
        truth=truth,
    )
