"""The temperature of a stored set's probabilities, and its threshold of "none of these".

Temperature: photos of the set are left out, one of each label at a time, and are judged, as new photos are, by the remaining
photos. The temperature is the one that fits the probabilities of these answers best (Guo et al., arXiv 1706.04599).
With few answers it stays near 1.

"None of these": the language model's probabilities separate unknown classes from known ones badly. The vision tower
separates them better, so this decision uses its vectors alone, where the judgement compares them. A query is none of these if it is
hardly more similar to its label's photos than photos of other labels are, and less than photos of the adapter's validation classes
are to their own (``LeastFamiliar``): the mean of both counts, so that a set of few photos has a threshold too.
``python -m benchmarks.calibrate`` measures both.

Shapes: N photos of the set, C width of a vector, J classified photos, K labels, G grid points.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from lcl_adapter.answering.api_types import JudgeName
from lcl_adapter.answering.judgement import LeastFamiliar, familiarity
from lcl_adapter.answering.predict import Reply
from lcl_adapter.data.conversations import Turn, support_turns
from lcl_adapter.data.sources import Picture
from lcl_adapter.recipe.wording import Wording

FORMAT = 4  # of a stored calibration; one of another format is computed again
MAX_FOLDS = 6  # rounds in which one photo per label is left out

# The spread (standard deviation) of familiarity within a label. A few photos give a bad estimate of it, so the estimate
# is averaged with PRIOR_SPREAD, which counts as much as PRIOR_WEIGHT photos.
PRIOR_SPREAD, PRIOR_WEIGHT = 0.35, 4.0

# The threshold's three numbers. They were chosen on half of the shipped data's held-out classes;
# benchmarks/calibrate.py measures on the other half.
GAP_SHARE = 0.2  # where the threshold is between the mean familiarity with other labels (0) and with the own label (1)
OFFSET = 0.14  # added to that
MIN_DEVIATIONS = 0.8  # but the threshold is at least so many standard deviations below the own label's mean

EXPECTED_WEIGHT = 4.0  # the threshold of the validation classes counts as much as that of so many photos of the set

LOG_TEMPERATURE_SPREAD = 0.7  # standard deviation of the prior on the temperature's logarithm, whose mean is 0


@dataclass(frozen=True)
class Calibration:
    """What was measured on a set's own photos.

    threshold: of familiarity; None if there is one label, or no label has two photos and the adapter no validation classes.
    left_out: how many photos were left out and classified. right: how many of these correctly.
    """

    temperature: float = 1.0
    threshold: float | None = None
    left_out: int = 0
    right: int = 0
    format: int = FORMAT

    def probabilities(self, log_likelihoods: Sequence[float]) -> tuple[float, ...]:
        """One for each label; they sum to 1."""
        top = max(log_likelihoods)
        weights = [math.exp((value - top) / self.temperature) for value in log_likelihoods]
        return tuple(weight / sum(weights) for weight in weights)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Calibration | None:
        """None if another version of this package wrote the fields."""
        return cls(**fields) if fields.get("format") == FORMAT else None


class CalibrationEngine(Protocol):
    """The part of an engine that calibration needs."""

    def judge(self, name: str, turns: Sequence[Turn], questions: Sequence[tuple[Turn, tuple[str, ...]]], judge: JudgeName) -> list[Reply]: ...

    def vectors(self, name: str, pictures: Sequence[Picture]) -> torch.Tensor: ...

    def least_familiar(self, name: str) -> LeastFamiliar | None: ...


def calibrate(
    engine: CalibrationEngine,
    model: str,
    examples: Sequence[tuple[Picture, str]],
    wording: Wording,
    question: str | None,
    judge: JudgeName = "both",
) -> Generator[None, None, Calibration]:
    """Calibrate a set of labelled photos; the generator's return value is the result.

    It runs on the engine's thread and yields after each fold, so that other jobs run in between.
    model: its name at the engine. judge: whose probabilities they are. question: the set's own; without it the wording's query is asked.
    """
    labels = list(dict.fromkeys(label for _, label in examples))
    answers = tuple(wording.answered(label) for label in labels)
    judged: list[tuple[tuple[float, ...], int]] = []  # log-likelihoods of all labels, and the index of the true label
    for fold in _folds([label for _, label in examples]):
        remaining = [example for place, example in enumerate(examples) if place not in fold]
        questions = [(Turn("user", question or wording.query, examples[place][0]), answers) for place in fold]
        replies = engine.judge(model, support_turns(remaining, wording), questions, judge)
        judged += [(reply.log_likelihoods, labels.index(examples[place][1])) for place, reply in zip(fold, replies, strict=True)]
        yield
    vectors_NC = engine.vectors(model, [picture for picture, _ in examples])
    right = sum(int(np.argmax(likely)) == label for likely, label in judged)
    threshold = _threshold(vectors_NC @ vectors_NC.T, [label for _, label in examples], engine.least_familiar(model))
    return Calibration(_temperature(judged), threshold, len(judged), right)


def _folds(labels: Sequence[str]) -> list[list[int]]:
    """At most MAX_FOLDS lists of indices to leave out together: one photo of every label that has at least two."""
    indices = [[index for index, own in enumerate(labels) if own == label] for label in dict.fromkeys(labels)]
    several = [own for own in indices if len(own) > 1]
    count = min(MAX_FOLDS, max((len(own) for own in several), default=0))
    return [[own[fold] for own in several if fold < len(own)] for fold in range(count)]


def _temperature(judged: Sequence[tuple[tuple[float, ...], int]]) -> float:
    """The most probable temperature, by grid search: cross-entropy plus a Gaussian prior on the logarithm.

    judged: log-likelihoods of all labels, and the index of the true label.
    """
    if not judged:
        return 1.0
    scores_JK = torch.tensor([likely for likely, _ in judged], dtype=torch.float64)
    truth_J = torch.tensor([label for _, label in judged])
    grid_G = torch.linspace(-2, 3, 101, dtype=torch.float64)  # logarithms of temperatures
    losses = []
    for log_temperature in grid_G:
        fit = float(functional.cross_entropy(scores_JK / math.exp(log_temperature), truth_J, reduction="sum"))
        losses.append(fit + 0.5 * (float(log_temperature) / LOG_TEMPERATURE_SPREAD) ** 2)
    return math.exp(float(grid_G[int(np.argmin(losses))]))


def _threshold(cosines_NN: torch.Tensor, labels: Sequence[str], expected: LeastFamiliar | None = None) -> float | None:
    """The familiarity below which a query is none of these: the set's own, and what is expected of so many photos of a label.

    None if there is one label, or neither is known.
    """
    own, several = _own_threshold(cosines_NN, labels), len(set(labels)) > 1
    if expected is None or not several:
        return own
    new = expected.of(len(labels) / len(set(labels)))
    return new if own is None else (EXPECTED_WEIGHT * new + len(labels) * own) / (EXPECTED_WEIGHT + len(labels))


def _own_threshold(cosines_NN: torch.Tensor, labels: Sequence[str]) -> float | None:
    """The threshold by the set's photos alone. None if no label has two photos, or there is one label.

    Each photo is compared with the other photos of its own label, and with the photos of each other label. The other
    labels' photos play the part of unknown classes, and the threshold lies between the two means. If labels look alike,
    the two means are close and say nothing about unknown classes. Then the threshold is MIN_DEVIATIONS below the own
    label's mean instead.
    """
    own: list[float] = []
    others: list[float] = []
    for index, label in enumerate(labels):
        for other in dict.fromkeys(labels):
            similarities = [float(cosines_NN[index, i]) for i, name in enumerate(labels) if name == other and i != index]
            if similarities:
                (own if other == label else others).append(familiarity(similarities))
    if len(own) < 2 or not others:
        return None
    count, known, unknown = len(own), float(np.mean(own)), float(np.mean(others))
    variance = (PRIOR_WEIGHT * PRIOR_SPREAD**2 + (count - 1) * float(np.var(own, ddof=1))) / (PRIOR_WEIGHT + count - 1)
    between = unknown + GAP_SHARE * (known - unknown) + OFFSET
    return min(between, known - MIN_DEVIATIONS * math.sqrt(variance * (1 + 1 / count)))
