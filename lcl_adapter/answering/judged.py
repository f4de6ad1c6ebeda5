"""What ``ask`` returns: JSON-ready fields for each photo, and the pictures that they are about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcl_adapter.data.sources import Picture

CLOSE_MARGIN = 0.2  # between the probabilities of the two likeliest labels; below it an answer is unsure
UNSURE = f"the two likeliest labels are less than {CLOSE_MARGIN} apart"
NONE_OF_THESE, UNDECIDED = "none of these", "undecided"


@dataclass(frozen=True)
class Judged:
    """shown: the labelled photos, in the order of their indices in ``most_alike``. queries: one for each answer.

    result: JSON-ready. Its ``answers`` have for each query its name and ``error``, or ``answer`` (the model's text),
    ``label``, ``margin``, ``unsure`` and ``scores``; where they were computed, ``most_alike`` and ``base`` too.
    """

    shown: tuple[tuple[Picture, str], ...]
    queries: tuple[Picture, ...]
    result: dict[str, Any]

    @property
    def answers(self) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = self.result["answers"]
        return answers

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label, in the order of the scores."""
        return tuple(dict.fromkeys(label for row in self.answers for label in row.get("scores", ())))

    @property
    def failed(self) -> int:
        return sum("error" in row for row in self.answers)


def margin_of(scores: Iterable[float]) -> float:
    """The difference of the two highest probabilities."""
    first, second = sorted(scores, reverse=True)[:2]
    return first - second


def group_of(row: Mapping[str, Any]) -> str:
    """What a photo is listed under: its label, or why it has none (all scores are equal; it is like no labelled photo)."""
    label = row["label"]
    return NONE_OF_THESE if label is None else label or UNDECIDED


def summary(answers: Sequence[Mapping[str, Any]]) -> str:
    """``12 photos: 7 good, 3 scratched, 2 failed; 1 unsure (…)``."""
    counts = Counter(group_of(row) for row in answers if "error" not in row)
    parts = [f"{count} {group}" for group, count in counts.most_common()]
    if failed := sum("error" in row for row in answers):
        parts.append(f"{failed} failed")
    unsure = sum(row.get("unsure", False) for row in answers)
    note = f"; {unsure} unsure ({UNSURE})" if unsure else ""
    return f"{len(answers)} photo{'' if len(answers) == 1 else 's'}: {', '.join(parts)}{note}"
