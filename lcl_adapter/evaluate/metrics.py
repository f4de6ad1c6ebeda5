"""Means, intervals by class, ranking and decision figures, and agreement of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from sklearn import metrics as sk

from lcl_adapter.randomness import generator

RESAMPLES = 2000


def mean(values: Sequence[bool | float]) -> float:
    """The mean to four decimals; 0 for no values."""
    return round(float(sum(values)) / len(values), 4) if len(values) else 0.0


def class_bootstrap(right: Sequence[bool | float], groups: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean. It resamples whole classes, because the queries of one class are not independent."""
    values = np.asarray(right, dtype=float)
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(member, values), np.bincount(member)
    draws = generator("interval", seed).integers(0, len(names), (RESAMPLES, len(names)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def resampled(figure: Callable[[np.ndarray], float], groups: Sequence[str], resamples: int = 400, seed: int = 0) -> tuple[float, float]:
    """95 % interval of any figure, resampling whole classes. figure: the indices of some cases -> its value on them."""
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    cases = [np.flatnonzero(member == i) for i in range(len(names))]
    rng = generator("interval", seed)
    values = [figure(np.concatenate([cases[i] for i in rng.integers(0, len(names), len(names))])) for _ in range(resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def ranking(truth: Sequence[bool] | np.ndarray, scores: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Image AUROC, average precision and the highest F1 over thresholds.

    truth: true for a defect. scores: higher for a defect.
    """
    precision, recall, _ = sk.precision_recall_curve(truth, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return {
        "auroc": auroc(truth, scores),
        "ap": float(sk.average_precision_score(truth, scores)),
        "f1_max": float(f1.max()),
    }


def auroc(truth: Sequence[bool] | np.ndarray, scores: Sequence[float] | np.ndarray) -> float:
    """The area under the ROC curve. truth: true for a defect. scores: higher for a defect."""
    return float(sk.roc_auc_score(truth, scores))


def decisions(truth: Sequence[bool], decided: Sequence[bool]) -> dict[str, float]:
    """Balanced accuracy and MCC of yes-or-no decisions, and the share of yes, which is 0 or 1 for a model with a
    constant answer.
    """
    true, predicted = np.asarray(truth, dtype=bool), np.asarray(decided, dtype=bool)
    recalls = [float((predicted[true == value] == value).mean()) for value in (True, False) if (true == value).any()]
    constant = len(set(decided)) < 2 or len(set(truth)) < 2
    return {
        "balanced_accuracy": float(np.mean(recalls)),
        "mcc": 0.0 if constant else float(sk.matthews_corrcoef(true, predicted)),
        "said_share": float(predicted.mean()),
    }


def rouge_l(text: str, answer: str) -> float:
    """ROUGE-L's F-measure over words: twice the longest common subsequence, divided by both lengths (Lin, 2004; beta
    1).
    """
    words, answer_words = text.lower().split(), answer.lower().split()
    if not words or not answer_words:
        return float(words == answer_words)
    # row[j]: length of the longest common subsequence of the words so far and the answer's first j
    row = [0] * (len(answer_words) + 1)
    for word in words:
        previous = row
        row = [0]
        for j, answer_word in enumerate(answer_words):
            row.append(previous[j] + 1 if word == answer_word else max(row[-1], previous[j + 1]))
    return 2 * row[-1] / (len(words) + len(answer_words))
