"""What figures are made of: intervals by class, ranking of scores, and agreement of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from sklearn import metrics as sk

RESAMPLES = 2000


def mean(values: Sequence[bool | float]) -> float:
    return round(float(sum(values)) / len(values), 4) if len(values) else 0.0


def class_bootstrap(right: Sequence[bool | float], groups: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean, resampling whole classes: queries of one class are not independent."""
    values = np.asarray(right, dtype=float)
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(member, values), np.bincount(member)
    draws = np.random.default_rng(seed).integers(0, len(names), (RESAMPLES, len(names)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def resampled(figure: Callable[[np.ndarray], float], groups: Sequence[str], resamples: int = 400, seed: int = 0) -> tuple[float, float]:
    """95 % interval of any figure of case numbers, resampling whole classes."""
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    places = [np.flatnonzero(member == i) for i in range(len(names))]
    rng = np.random.default_rng(seed)
    found = [figure(np.concatenate([places[i] for i in rng.integers(0, len(names), len(names))])) for _ in range(resamples)]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def ranking(truth: Sequence[bool] | np.ndarray, scores: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Image AUROC, average precision and the largest F1 over thresholds; ``truth`` is true for a defect, high scores mean one."""
    precision, recall, _ = sk.precision_recall_curve(truth, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return {
        "auroc": float(sk.roc_auc_score(truth, scores)),
        "ap": float(sk.average_precision_score(truth, scores)),
        "f1_max": float(f1.max()),
    }


def decisions(truth: Sequence[bool], said: Sequence[bool]) -> dict[str, float]:
    """Balanced accuracy and MCC of yes-or-no decisions, and how often each is said: a model that always says one is seen here."""
    right, told = np.asarray(truth, dtype=bool), np.asarray(said, dtype=bool)
    pair = [float((told[right == side] == side).mean()) for side in (True, False) if (right == side).any()]
    constant = len(set(said)) < 2 or len(set(truth)) < 2
    return {
        "balanced_accuracy": float(np.mean(pair)),
        "mcc": 0.0 if constant else float(sk.matthews_corrcoef(right, told)),
        "said_share": float(told.mean()),
    }


def rouge_l(text: str, answer: str) -> float:
    """ROUGE-L's F-measure over words: twice the longest common subsequence, over both lengths (Lin, 2004; beta 1)."""
    one, other = text.lower().split(), answer.lower().split()
    if not one or not other:
        return float(one == other)
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for place, against in enumerate(other):
            row.append(before[place] + 1 if word == against else max(row[-1], before[place + 1]))
    return 2 * row[-1] / (len(one) + len(other))
