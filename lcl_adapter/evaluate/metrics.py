"""How answers are judged: label scores, exact text, LCL's own rule; and intervals by class."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def normalise(text: str) -> str:
    """Lower case, white space collapsed, an ending full stop dropped."""
    return re.sub(r"\s+", " ", text).strip().rstrip(".").lower()


def exact(text: str, answer: str) -> bool:
    """Whether the greedy text is the answer."""
    return normalise(text) == normalise(answer)


def lcl_rule(text: str, gold: str, others: Sequence[str]) -> bool:
    """LCL's scoring of generated text (the evaluation code of isekai-portal/Link-Context-Learning).

    "there is", "in the image", quotes and dots are stripped; right if the true label is in what remains, and no other
    label is in what remains once the true one is removed.

    Substrings break it ("cat" in "cattle"), so exact match and label scores are shown beside it.
    """
    rest = text
    for filler in ("there is", "in the image", '"', "'", "."):
        rest = rest.replace(filler, "")
    rest = rest.strip()
    if gold not in rest:
        return False
    rest = rest.replace(gold, "")
    return not any(other in rest for other in others)


def class_bootstrap(right: Sequence[bool | float], groups: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean, resampling whole classes: queries of one class are not independent."""
    values = np.asarray(right, dtype=float)
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(member, values), np.bincount(member)
    draws = np.random.default_rng(seed).integers(0, len(names), (RESAMPLES, len(names)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
