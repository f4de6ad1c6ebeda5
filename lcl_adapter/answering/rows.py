"""What the model reads behind a support set in one pass: questions, and the answers to score, packed into a row.

Shapes: T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lcl_adapter.base.encoder import Position
from lcl_adapter.data.conversations import Turn

Ids = list[int]
PADDING = -1  # the segment of a padding token
NO_SEGMENT = -2  # matches no token's segment, not even padding's: the parent of a question


@dataclass(frozen=True)
class EncodedQuestion:
    """A question as tokens. Its ``answers`` are token ids, with the positions of all but the last of them."""

    turn: Turn
    prompt: Ids
    positions: Sequence[Position]
    next_position: int
    answers: tuple[tuple[Ids, Sequence[Position]], ...]

    @property
    def tokens(self) -> int:
        """Tokens that it takes in a row, with its answers. The last token of an answer is not read."""
        return len(self.prompt) + sum(len(positions) for _, positions in self.answers)

    @property
    def places(self) -> int:
        """Tokens whose logits are needed."""
        return 1 + sum(len(positions) for _, positions in self.answers)


def without_ends(answers: Sequence[Ids]) -> list[Ids]:
    """The answers without their last token, which ends each, unless one of them would then begin another."""
    shorter = [ids[:-1] for ids in answers]
    begins_another = any(a == b[: len(a)] for n, a in enumerate(shorter) for m, b in enumerate(shorter) if n != m)
    return list(answers) if begins_another else shorter


@dataclass(frozen=True)
class PackedAnswer:
    """An answer to score. ``ids[i]`` is predicted by the logits at the row's token ``predicted_at[i]``."""

    ids: Ids
    predicted_at: list[int]


@dataclass(frozen=True)
class PackedQuestion:
    """Where a question is in its row: its segment, its last token, and the position that follows it."""

    segment: int
    last: int
    next_position: int
    answers: tuple[PackedAnswer, ...]


@dataclass
class Row:
    """The tokens that follow one support set in a pass. Lists are [T].

    A segment is a question, or an answer; an answer's parent is the segment of its question. Positions count from the
    end of the support set. longest: tokens of the longest question together with one answer.
    """

    ids: Ids = field(default_factory=list)
    segment: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    position: list[Position] = field(default_factory=list)
    questions: list[PackedQuestion] = field(default_factory=list)
    longest: int = 0

    @classmethod
    def of(cls, questions: Iterable[EncodedQuestion]) -> Row:
        """The questions of one support set, and their answers, as segments."""
        row = cls()
        for question in questions:
            row.add_question(question)
        return row

    def add_question(self, question: EncodedQuestion) -> None:
        last = self._add(question.prompt, NO_SEGMENT, question.positions) + len(question.prompt) - 1
        segment = self.segment[-1]
        self.longest = max(self.longest, len(question.prompt))
        answers = []
        for ids, positions in question.answers:
            start = self._add(ids[:-1], segment, positions)
            answers.append(PackedAnswer(ids, [last, *range(start, start + len(ids) - 1)]))
            self.longest = max(self.longest, len(question.prompt) + len(ids) - 1)
        self.questions.append(PackedQuestion(segment, last, question.next_position, tuple(answers)))

    def _add(self, ids: Ids, parent: int, positions: Sequence[Position]) -> int:
        """Append a segment. Returns the index of its first token."""
        start, number = len(self.ids), 1 + max(self.segment, default=PADDING)
        self.ids += ids
        self.segment += [number] * len(ids)
        self.parent += [parent] * len(ids)
        self.position += positions
        return start

    def places_to_read(self) -> Iterator[int]:
        """Tokens whose logits are needed; the same one may come several times."""
        for question in self.questions:
            yield question.last
            for answer in question.answers:
                yield from answer.predicted_at
