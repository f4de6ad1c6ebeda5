"""Episode -> turns: one picture in each user turn, and a mark on each answer that is trained.

A :class:`Conversation` has a shared opening (the support set) and one or more branches (the queries). No branch can see
another. Training puts all branches into one sequence behind one support set; prediction asks them one by one, with the
same turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lcl_adapter.data.episodes import Episode, LearnedAnswers
from lcl_adapter.data.sources import Dialogue, Picture
from lcl_adapter.data.sources.boxes import region_box
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.wording import Wording


@dataclass(frozen=True)
class Turn:
    """One message. The image is before the text, as in LLaVA's training. ``learn`` marks a trained answer.

    further: more pictures of the same message. Then each ``<image>`` in the text marks the place of one picture, the
    first included.
    unfinished: the answer was cut; the token that ends it is not learned.
    shown: the picture is shown with a label, and is not asked about. It may have fewer tokens.
    """

    role: str  # "user" or "assistant"; "text" is plain text, outside of any chat
    text: str
    picture: Picture | None = None
    learn: bool = False
    further: tuple[Picture, ...] = ()
    unfinished: bool = False
    shown: bool = False

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return () if self.picture is None else (self.picture, *self.further)


@dataclass(frozen=True)
class Conversation:
    """Turns that are ready to be rendered.

    ``shared`` is empty for plain questions; ``origin`` names the sample in errors.
    """

    shared: tuple[Turn, ...]
    branches: tuple[tuple[Turn, ...], ...]
    origin: str

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The shared turns, then those of each branch."""
        return (*self.shared, *(turn for branch in self.branches for turn in branch))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Every picture, in the order of the tokens."""
        return tuple(picture for turn in self.turns for picture in turn.pictures)


WORDINGS = {
    # Pictures and labels alone: the fewest tokens, and unlike a question about a picture.
    "bare": Wording(),
    # Few tokens: for short contexts, and only words that the pocket base knows.
    "short": Wording("Learn the names.", "What is this?", "Now, what is this?"),
    # LCL's own sentences (arXiv 2308.07891 and its published templates), with its tags around examples.
    "lcl": Wording(
        instruction="Learn from the following examples what each name means, then answer the question about the last image.",
        question="[BEGIN EXAMPLE] What is in the image?",
        query="[FINAL QUESTION] Based on the previous examples, what is in the image?",
        answer='there is "{name}" in the image.',
    ),
}


def wording_of(recipe: Recipe) -> Wording:
    """The sentences of a recipe's episodes. Where no labelled picture sees another, each has the instruction."""
    return replace(WORDINGS[recipe.wording], repeated=recipe.supports != "ordered")


def from_episode(episode: Episode, wording: Wording) -> Conversation:
    """Support examples become turns, in order; every query becomes a branch of two turns.

    An episode's own wording, from its task's templates, replaces the sentences of ``wording``.
    """
    wording = replace(episode.wording or wording, repeated=wording.repeated)
    shared: list[Turn] = []
    learn_support = episode.learned is LearnedAnswers.REPEATED
    known_labels: set[str] = set()
    for position, example in enumerate(episode.support):
        shared.append(Turn("user", wording.support_question(first=position == 0), example.picture, shown=True))
        # The model cannot know a label before it was shown: the first mention of a label is never learned.
        learn = learn_support and example.label in known_labels
        shared.append(Turn("assistant", wording.answered(example.label), learn=learn))
        known_labels.add(example.label)
    branches = tuple(
        (Turn("user", wording.query, query.picture), Turn("assistant", wording.answered(query.label), learn=True)) for query in episode.queries
    )
    return Conversation(tuple(shared), branches, episode.origin)


def pooled_to(turns: Sequence[Turn], tokens: int) -> tuple[Turn, ...]:
    """The turns, with so many tokens for each picture that is shown with a label."""
    return tuple(replace(turn, picture=replace(turn.picture, tokens=tokens)) if turn.shown and turn.picture else turn for turn in turns)


def oriented(turns: Sequence[Turn], orientation: int) -> tuple[Turn, ...]:
    """The turns, with every picture in another orientation (``Picture.orientation``)."""
    return tuple(
        replace(turn, picture=turn.picture.oriented(orientation), further=tuple(picture.oriented(orientation) for picture in turn.further))
        if turn.picture
        else turn
        for turn in turns
    )


def shown_order(count: int) -> list[int]:
    """The order in which ``count`` labelled pictures are shown: a fixed permutation of their indices."""
    return [int(index) for index in np.random.default_rng(0).permutation(count)]


def support_turns(labelled: Sequence[tuple[Picture, str]], wording: Wording | None = None) -> tuple[Turn, ...]:
    """A support set of labelled pictures as turns. Their order depends on their number only, and mixes the classes.

    wording: ``WORDINGS["short"]`` by default.
    """
    wording = wording or WORDINGS["short"]
    turns: list[Turn] = []
    for position, index in enumerate(shown_order(len(labelled))):
        picture, label = labelled[index]
        turns += [Turn("user", wording.support_question(position == 0), picture, shown=True), Turn("assistant", wording.answered(label))]
    return tuple(turns)


def shown_before(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """A chat's turns. Where the last one asks about a picture of its own, the earlier pictures are shown for it, as those of
    a support set are.
    """
    if not turns or not turns[-1].pictures:
        return tuple(turns)
    return (*(replace(turn, shown=True) if turn.pictures else turn for turn in turns[:-1]), turns[-1])


def is_support_set(turns: Sequence[Turn]) -> bool:
    """Whether these are labelled photos, one after the other, behind one question. A chat asks something else each time."""
    examples = list(zip(turns[::2], turns[1::2], strict=False))
    if not examples or len(turns) != 2 * len(examples):
        return False
    shown = all(user.shown and user.picture and answer.role == "assistant" for user, answer in examples)
    return shown and len({user.text for user, _ in examples[1:]}) <= 1


def read_again(turns: Sequence[Turn], readings: int) -> tuple[Turn, ...]:
    """A support set, ``readings`` times one after the other. Other turns stay as they are.

    From the second time on, each photo sees the whole set, and no label is learned, because it was shown with this photo before.
    """
    if readings == 1 or not is_support_set(turns):
        return tuple(turns)
    without_instruction = replace(turns[0], text=turns[2].text if len(turns) > 2 else turns[0].text)
    again = [replace(turn, learn=False) for turn in (without_instruction, *turns[1:])]
    return (*turns, *again * (readings - 1))


def to_conversation(drawn: Episode | tuple[Dialogue, ...], wording: Wording) -> Conversation:
    """An episode or a row of dialogues, as the mixture draws them, as a conversation."""
    return from_episode(drawn, wording) if isinstance(drawn, Episode) else from_dialogues(drawn)


def from_dialogues(dialogues: tuple[Dialogue, ...]) -> Conversation:
    """Plain questions: each dialogue is a branch, and every answer in it is learned.

    Raises DataError if an answer is a box and its picture cannot be read, or the box is outside the picture.
    """
    branches = []
    for dialogue in dialogues:
        turns: list[Turn] = []
        for exchange in dialogue.exchanges:
            answer = region_box(exchange.region).text() if exchange.region else exchange.answer
            turns.append(Turn("user", exchange.question, exchange.picture, further=exchange.further))
            turns.append(Turn("assistant", answer, learn=True, unfinished=exchange.unfinished))
        branches.append(tuple(turns))
    return Conversation((), tuple(branches), dialogues[0].origin)
