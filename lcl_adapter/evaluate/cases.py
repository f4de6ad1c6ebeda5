"""A case is one question with its right answer.

A cell is one line of the report: the same cases for base and adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from lcl_adapter.answering.predict import Reply
from lcl_adapter.data import episodes
from lcl_adapter.data.conversations import Turn, from_episode
from lcl_adapter.data.episodes import Episode
from lcl_adapter.data.sources import ClassPool, InspectionPool
from lcl_adapter.errors import DataError
from lcl_adapter.evaluate.metrics import Estimate
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


@dataclass(frozen=True)
class Judged:
    """A cell's figures, as the report shows them, and the estimate of the main one."""

    figures: dict[str, Any]
    estimate: Estimate


Judge = Callable[[Sequence[Case], Sequence[Reply]], Judged]


@dataclass(frozen=True)
class Cell:
    """One line of the report.

    metric: the name of ``value``. chance: None where there is no such level. judge: cases and replies -> figures with
    "value", "ci95", "greedy" and more. baseline: the method
    without training to compare with. published: (who, value) by the same protocol. new_tokens: the most generated tokens.
    faults: what is wrong with the records that gave no case; they are counted as left out.
    """

    suite: str
    name: str
    kind: str
    metric: str
    chance: float | None
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
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selection:
    """Which questions of a suite are asked.

    A suite that is measured during training chooses the checkpoint in ``best/``. So its report is about other
    questions: episodes of another stream, and of a fixed list those that were not set aside.

    suite: its name. seed: of drawn episodes. limit: only the first questions of each cell. during: those that are measured during
    training, instead of those that are reported. set_aside: how many questions of a fixed list training measures at
    most, 0 if it does not measure the suite.
    """

    suite: str
    seed: int
    limit: int | None = None
    during: bool = False
    set_aside: int = 0

    @property
    def stream(self) -> str:
        """The stream of the episodes that are drawn."""
        return "measuring" if self.during else "evaluation"

    def count(self, episodes: int) -> int:
        """How many episodes are drawn."""
        return min(episodes, self.limit or episodes)

    def of_list(self, kinds: Sequence[Hashable]) -> list[int]:
        """The indices of a fixed list's questions, without ``limit``.

        kinds: the kind of each question. Of each, in turn, at most half are set aside, the first ones.

        Raises DataError if no kind has two questions.
        """
        if not self.set_aside:
            return list(range(len(kinds)))
        members: dict[Hashable, list[int]] = {}
        for index, kind in enumerate(kinds):
            members.setdefault(kind, []).append(index)
        halves = [own[: len(own) // 2] for own in members.values()]
        aside = [index for in_turn in zip_longest(*halves) for index in in_turn if index is not None][: self.set_aside]
        if not aside:
            raise DataError(
                f"evaluate.suites.{self.suite}: {len(kinds)} questions are too few to choose a checkpoint by some and to report the others; "
                "add questions, or do not measure the suite during training."
            )
        return aside if self.during else sorted(set(range(len(kinds))) - set(aside))


def draw_episodes(
    pool: ClassPool | InspectionPool, options: EpisodeOptions | InspectionOptions, selection: Selection, count: int, on_fault: str, *stream: str
) -> list[Episode]:
    """The first ``count`` episodes of a suite. With ``on_fault="skip"``, those with an unusable mask or box are left out.

    stream: the suite's name, and the part of it.

    Raises DataError for the first such episode with "refuse", and if nearly all are unusable.
    """
    drawn: list[Episode] = []
    for index in range(4 * count + 20):
        if len(drawn) == count:
            return drawn
        try:
            drawn.append(episodes.draw(pool, options, selection.seed, 0, index, selection.stream, *stream))
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
