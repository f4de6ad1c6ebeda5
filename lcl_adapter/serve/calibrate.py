"""What a stored set says of itself: how sure its judgements may be, and how alike its photos are.

Photos are left out, one of each label at a time, and asked about without themselves. The temperature is what makes the probabilities of
those judgements fit best (Guo et al., arXiv 1706.04599), held near 1 where they are few. "None of these" does not come from the language
model, whose probabilities tell a strange photo badly from a known one; it comes from the vision tower: a query that is hardly more like
its label's photos than another label's are is none of them. Both are measured by ``python -m benchmarks.calibrate``.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from lcl_adapter.answering.cache import Prefilled
from lcl_adapter.answering.predict import Reply
from lcl_adapter.data.conversations import Turn, support_turns
from lcl_adapter.data.sources import Picture
from lcl_adapter.recipe.wording import Wording

FORMAT = 2
MOST_FOLDS = 6
PRIOR_SPREAD, PRIOR_WEIGHT = 0.35, 4.0  # of familiarity within a label: what few photos say of it is held near this
# Chosen on half of the shipped data's held-out classes; benchmarks/calibrate.py measures on the other half.
BETWEEN, ABOVE = 0.2, 0.14  # how far from another label's photos to a label's own the threshold is, and how much further
BELOW = 0.8  # and at least so many standard deviations below the label's own, for labels that look alike
STEADY = 0.7  # how far from 1 the temperature's logarithm is expected to be


@dataclass(frozen=True)
class Calibration:
    """threshold: of familiarity, None where no label has two photos. left_out, right: judgements made, and those that were right."""

    temperature: float = 1.0
    threshold: float | None = None
    left_out: int = 0
    right: int = 0
    format: int = FORMAT

    def probabilities(self, log_likelihoods: Sequence[float]) -> tuple[float, ...]:
        """Over the labels; they sum to 1."""
        top = max(log_likelihoods)
        weights = [math.exp((value - top) / self.temperature) for value in log_likelihoods]
        return tuple(weight / sum(weights) for weight in weights)

    def written(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, value: dict[str, Any]) -> Calibration | None:
        """None for one that another version wrote."""
        return cls(**value) if value.get("format") == FORMAT else None


class Asked(Protocol):
    """What of an engine is needed here."""

    def prefill(self, turns: Sequence[Turn]) -> Prefilled: ...

    def ask(self, ready: Prefilled, asked: Sequence[tuple[Turn, tuple[str, ...]]]) -> list[Reply]: ...

    def vectors(self, pictures: Sequence[Picture]) -> torch.Tensor: ...


def familiarity(similarities: Sequence[float]) -> float:
    """Of a photo whose cosines to photos of a label are these; grows without bound as the nearest approaches it."""
    return -math.log(max(1e-6, 1.0 - max(similarities)))


def calibrate(engine: Asked, shown: Sequence[tuple[Picture, str]], wording: Wording, question: str | None) -> Generator[None, None, Calibration]:
    """On the engine's thread, a step a fold, so that others are answered in between."""
    labels = list(dict.fromkeys(label for _, label in shown))
    answers = tuple(wording.answered(label) for label in labels)
    judged: list[tuple[tuple[float, ...], int]] = []
    for fold in _folds([label for _, label in shown]):
        rest = [one for place, one in enumerate(shown) if place not in fold]
        ready = engine.prefill(support_turns(rest, wording))
        asked = [(Turn("user", question or wording.query, shown[place][0]), answers) for place in fold]
        replies = engine.ask(ready, asked)
        judged += [(reply.log_likelihoods, labels.index(shown[place][1])) for place, reply in zip(fold, replies, strict=True)]
        yield
    vectors = engine.vectors([picture for picture, _ in shown])
    right = sum(int(np.argmax(likely)) == label for likely, label in judged)
    return Calibration(_temperature(judged), _threshold(vectors @ vectors.T, [label for _, label in shown]), len(judged), right)


def _folds(labels: Sequence[str]) -> list[list[int]]:
    """Places to leave out together: one photo of every label that has another; MOST_FOLDS at most."""
    places = [[p for p, own in enumerate(labels) if own == label] for label in dict.fromkeys(labels)]
    several = [own for own in places if len(own) > 1]
    count = min(MOST_FOLDS, max((len(own) for own in several), default=0))
    return [[own[fold] for own in several if fold < len(own)] for fold in range(count)]


def _temperature(judged: Sequence[tuple[tuple[float, ...], int]]) -> float:
    """The likeliest, given that its logarithm is expected within STEADY of 0."""
    if not judged:
        return 1.0
    scores = torch.tensor([likely for likely, _ in judged], dtype=torch.float64)
    truth = torch.tensor([label for _, label in judged])
    grid = torch.linspace(-2, 3, 101, dtype=torch.float64)
    losses = [float(torch.nn.functional.cross_entropy(scores / math.exp(t), truth, reduction="sum")) + 0.5 * (float(t) / STEADY) ** 2 for t in grid]
    return math.exp(float(grid[int(np.argmin(losses))]))


def _threshold(cosines: torch.Tensor, labels: Sequence[str]) -> float | None:
    """Of familiarity: each photo beside the others of its label, and beside each other label's, which are this set's own strangers.

    Two photos a label say little of how alike a label's photos are, and another label's tell where to begin. Labels that look alike say
    nothing of strangers; there the threshold is below what a label's own photos are. The spread is held near PRIOR_SPREAD.
    """
    own: list[float] = []
    others: list[float] = []
    for place, label in enumerate(labels):
        for other in dict.fromkeys(labels):
            beside = [float(cosines[place, p]) for p, name in enumerate(labels) if name == other and p != place]
            if beside:
                (own if other == label else others).append(familiarity(beside))
    if len(own) < 2 or not others:
        return None
    count, known, strange = len(own), float(np.mean(own)), float(np.mean(others))
    spread = (PRIOR_WEIGHT * PRIOR_SPREAD**2 + (count - 1) * float(np.var(own, ddof=1))) / (PRIOR_WEIGHT + count - 1)
    return min(strange + BETWEEN * (known - strange) + ABOVE, known - BELOW * math.sqrt(spread * (1 + 1 / count)))
