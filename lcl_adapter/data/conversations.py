"""Episode -> turns: one picture a user turn, each answer marked learned or not.

A :class:`Conversation` is a shared opening (the support set) and one or more branches (the queries). Branches are blind
to each other: training puts them in one sequence behind one support set, prediction asks them one by one; the turns
are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lcl_adapter.data.episodes import Episode, LearnedAnswers
from lcl_adapter.data.sources import Dialogue, Picture
from lcl_adapter.data.sources.boxes import region_box
from lcl_adapter.recipe.wording import Wording


@dataclass(frozen=True)
class Turn:
    """One message. An image is always put before the text, as LLaVA was trained; ``learn`` marks a trained answer.

    further: more pictures of the same message; then ``<image>`` in the text says where each of them stands, the first too.
    """

    role: str  # "user" or "assistant"
    text: str
    picture: Picture | None = None
    learn: bool = False
    further: tuple[Picture, ...] = ()

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return () if self.picture is None else (self.picture, *self.further)


@dataclass(frozen=True)
class Conversation:
    """Turns ready to be rendered. ``shared`` is empty for plain questions; ``origin`` names the sample in errors."""

    shared: tuple[Turn, ...]
    branches: tuple[tuple[Turn, ...], ...]
    origin: str

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Every picture, in the order of its tokens: the shared ones, then each branch's."""
        turns = [*self.shared, *(turn for branch in self.branches for turn in branch)]
        return tuple(picture for turn in turns for picture in turn.pictures)


WORDINGS = {
    # Few tokens: for short contexts, and the words the pocket base knows.
    "short": Wording("Learn the names.", "What is this?", "Now, what is this?"),
    # As LCL words its episodes (arXiv 2308.07891 and its published templates), its marks around examples included.
    "lcl": Wording(
        instruction="Learn from the following examples what each name means, then answer the question about the last image.",
        question="[BEGIN EXAMPLE] What is in the image?",
        query="[FINAL QUESTION] Based on the previous examples, what is in the image?",
        answer='there is "{name}" in the image.',
    ),
}


def from_episode(episode: Episode, wording: Wording) -> Conversation:
    """Support examples become turns in their order; every query becomes a branch of two turns.

    An episode that has a wording of its own, as its task's templates give it, is put in that.
    """
    wording = episode.wording or wording
    shared: list[Turn] = []
    learn_support = episode.learned is LearnedAnswers.REPEATED
    seen: set[str] = set()
    for position, example in enumerate(episode.support):
        shared.append(Turn("user", wording.support_question(first=position == 0), example.picture))
        # A label can be known only once it was shown: its first mention is never learned.
        learn = learn_support and example.label in seen
        shared.append(Turn("assistant", wording.answered(example.label), learn=learn))
        seen.add(example.label)
    branches = tuple(
        (Turn("user", wording.query, query.picture), Turn("assistant", wording.answered(query.label), learn=True)) for query in episode.queries
    )
    return Conversation(tuple(shared), branches, episode.origin)


def shown_order(count: int) -> list[int]:
    """Which of so many labelled pictures is shown first, second, …"""
    return [int(index) for index in np.random.default_rng(0).permutation(count)]


def support_turns(shown: Sequence[tuple[Picture, str]], wording: Wording | None = None) -> tuple[Turn, ...]:
    """A support set of labelled pictures as turns. Their order depends on their number only, and mixes the classes.

    wording: ``WORDINGS["short"]`` where None.
    """
    wording = wording or WORDINGS["short"]
    turns: list[Turn] = []
    for position, index in enumerate(shown_order(len(shown))):
        picture, label = shown[index]
        turns += [Turn("user", wording.support_question(position == 0), picture), Turn("assistant", wording.answered(label))]
    return tuple(turns)


def to_conversation(drawn: Episode | tuple[Dialogue, ...], wording: Wording) -> Conversation:
    """Whatever the mixture draws, as a conversation."""
    return from_episode(drawn, wording) if isinstance(drawn, Episode) else from_dialogues(drawn)


def from_dialogues(dialogues: tuple[Dialogue, ...]) -> Conversation:
    """Plain questions: each dialogue is a branch of its own, every answer in it is learned.

    Raises DataError where an answer is a box and its picture cannot be read, or the box is outside it.
    """
    branches = []
    for dialogue in dialogues:
        turns: list[Turn] = []
        for exchange in dialogue.exchanges:
            answer = region_box(exchange.region).text() if exchange.region else exchange.answer
            turns += [Turn("user", exchange.question, exchange.picture, further=exchange.further), Turn("assistant", answer, learn=True)]
        branches.append(tuple(turns))
    return Conversation((), tuple(branches), dialogues[0].origin)
