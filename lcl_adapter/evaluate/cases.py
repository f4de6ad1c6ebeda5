"""A case is one question with what is right; a cell is one line of the report: the same cases for base and adapter."""

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
    """One query. ``answers`` are the worded labels (empty for free text), ``gold`` the right one, ``group`` its class.

    truth: what else a judge needs, for instance the ten answers, a box, or the kind of defect.
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
    def worded(self) -> str:
        """The right answer as it is said."""
        return self.answers[self.labels.index(self.gold)] if self.labels else self.gold


Judge = Callable[[Sequence[Case], Sequence[Reply]], dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One line of the report.

    metric: what ``value`` is called. judge: replies -> {"value", "ci95", "greedy", ...}. baseline: which training-free method
    stands beside it. published: other people's figures, by the same protocol. new_tokens: how long a generated answer may be.
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


def drawn(
    pool: ClassPool | InspectionPool, options: EpisodeOptions | InspectionOptions, seed: int, epoch: int, count: int, on_fault: str
) -> list[Episode]:
    """The first ``count`` episodes; with "skip", those with a mask or box that cannot be used are passed over.

    Raises DataError with "refuse", and where nearly all are faulty.
    """
    made: list[Episode] = []
    for index in range(4 * count + 20):
        if len(made) == count:
            return made
        try:
            made.append(episodes.draw(pool, options, seed, epoch, index))
        except DataError:
            if on_fault == "refuse" or index == 4 * count + 19:
                raise
    return made


def case_of(episode: Episode, wording: Wording, group: str, place: int = 0, truth: Any = None) -> Case:
    """One query of an episode, worded as in training; labels are scored where there are several."""
    conversation = from_episode(episode, wording)
    query = episode.queries[place]
    words = episode.wording or wording
    labels = episode.labels if len(episode.labels) > 1 else ()
    return Case(
        support=tuple(replace(t, learn=False) for t in conversation.shared),
        query=conversation.branches[place][0],
        labels=labels,
        answers=tuple(words.answered(label) for label in labels),
        gold=query.label,
        group=group,
        episode=episode,
        truth=truth,
    )
