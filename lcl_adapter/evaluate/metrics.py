"""Means, intervals, ranking and decision figures, and agreement of texts.

Shapes: R resamples, G groups of cases, K numbers of a statistic, M lists of N cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from sklearn import metrics as sk

from lcl_adapter.randomness import generator

RESAMPLES = 1000
AT_ONCE = 2_000_000  # numbers drawn together, which bounds memory
RULE_OF_THREE = 3.0  # what happens in under 3/n of all cases may well happen in none of n (95 %; Hanley and Lippman-Hand, 1983)


@dataclass(frozen=True)
class Estimate:
    """A figure, and how it differs between samples like the measured one.

    resampled: the figure on each resample [R]. cases: how many cases it rests on; of unequal kinds, those of the rarer.
    unit: a share, from 0 to 1; or the mean log-likelihood of a token in nats, whose differences are relative changes of the
    perplexity. More is better in both.
    """

    value: float
    resampled: tuple[float, ...]
    cases: float
    unit: Literal["share", "log-likelihood"] = "share"

    @property
    def shown(self) -> float:
        """The figure as it is shown: the share, or the perplexity."""
        return self.value if self.unit == "share" else math.exp(-self.value)

    def interval(self, lowest: float = 0.0, highest: float = 1.0) -> tuple[float, float]:
        """95 % interval, within the figure's range.

        It comes from the resamples. Where they hardly differ, for instance where all answers are right, they say
        nothing about rarer cases. So an interval of a share is never narrower than 3/n to each side (the rule of three).
        """
        low, high = np.percentile(self.resampled, [2.5, 97.5])
        if self.unit != "share":
            return float(low), float(high)
        unseen = RULE_OF_THREE / self.cases
        return max(lowest, min(float(low), self.value - unseen)), min(highest, max(float(high), self.value + unseen))

    def minus(self, other: Estimate) -> Estimate:
        """The difference of two figures on the same cases. It is paired: both have the same resamples."""
        return Estimate(
            self.value - other.value,
            tuple(a - b for a, b in zip(self.resampled, other.resampled, strict=True)),
            min(self.cases, other.cases),
            self.unit,
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "resampled": list(self.resampled)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Estimate:
        return cls(fields["value"], tuple(fields["resampled"]), fields["cases"], fields.get("unit", "share"))


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of several figures. They may be about the same cases, so ``cases`` does not add up."""
    resampled_R = np.mean([e.resampled for e in estimates], axis=0)
    cases = 1 / float(np.mean([1 / e.cases for e in estimates]))
    return Estimate(float(np.mean([e.value for e in estimates])), tuple(resampled_R.tolist()), cases, estimates[0].unit)


def mean(values: Sequence[bool | float]) -> float:
    """The mean to four decimals; 0 for no values."""
    return round(float(sum(values)) / len(values), 4) if len(values) else 0.0


def resampled_sums(groups: Sequence[str], statistic: Callable[[np.ndarray], np.ndarray], kinds: Sequence[Any] | None = None) -> np.ndarray:
    """Sums [R, K] of a statistic over resampled groups. Figures on the same groups have the same resamples.

    Groups are resampled, and within a drawn group its cases with probability 1/G. With one group the cases alone vary.
    With many, groups alone vary nearly always: resampling both always would count the cases' variation twice (Davison
    and Hinkley, Bootstrap Methods, 1997, section 3.8).

    statistic: indices of cases [M, N], each row of one group -> [M, K]. kinds: the kind of each case; resampling within
    a group preserves how many there are of each.
    """
    _, group_of_case = np.unique(np.asarray(groups), return_inverse=True)
    members = np.split(np.argsort(group_of_case, kind="stable"), np.cumsum(np.bincount(group_of_case))[:-1])
    kind_of_case = np.unique([str(kind) for kind in kinds or [""] * len(groups)], return_inverse=True)[1]
    whole_GK = np.concatenate([statistic(cases[None]) for cases in members]).astype(float)
    count, rng = len(members), generator("interval")
    sums_RK = np.zeros((RESAMPLES, whole_GK.shape[1]))
    for rows in np.array_split(np.arange(RESAMPLES), max(1, RESAMPLES * count // AT_ONCE)):
        drawn_RG = rng.integers(count, size=(len(rows), count))
        within_RG = rng.random(drawn_RG.shape) < 1 / count
        sums_RK[rows] = np.where(within_RG[..., None], 0.0, whole_GK[drawn_RG]).sum(1)
        resamples, redrawn_groups = rows[np.nonzero(within_RG)[0]], drawn_RG[within_RG]
        for group in np.unique(redrawn_groups):
            own = resamples[redrawn_groups == group]
            for some in np.array_split(own, max(1, len(own) * len(members[group]) // AT_ONCE)):
                np.add.at(sums_RK, some, statistic(_redrawn(rng, members[group], kind_of_case, len(some))))
    return sums_RK


def _redrawn(rng: np.random.Generator, cases: np.ndarray, kind_of_case: np.ndarray, count: int) -> np.ndarray:
    """Cases of a group drawn with replacement [count, N], as many of each kind as there are."""
    kinds = kind_of_case[cases]
    members = [cases[kinds == kind] for kind in np.unique(kinds)]
    return np.concatenate([own[rng.integers(len(own), size=(count, len(own)))] for own in members], axis=1)


def accuracy(right: Sequence[bool | float], groups: Sequence[str]) -> Estimate:
    """The mean of right or wrong answers, or of scores between 0 and 1."""
    values = np.asarray(right, dtype=float)
    sums_RK = resampled_sums(groups, lambda cases_MN: np.stack([values[cases_MN].sum(1), np.full(len(cases_MN), cases_MN.shape[1])], 1))
    return Estimate(float(values.mean()), tuple((sums_RK[:, 0] / sums_RK[:, 1]).tolist()), len(values))


def balanced_accuracy(truth: Sequence[str], decided: Sequence[str], groups: Sequence[str]) -> Estimate:
    """The mean recall of the kinds of ``truth``. A resample without one of them has the mean of the others."""
    kinds = sorted(set(truth))
    of_kind = np.array([[t == kind for kind in kinds] for t in truth], dtype=float)
    right = of_kind * np.array([[t == d] for t, d in zip(truth, decided, strict=True)], dtype=float)
    table, counts_K = np.concatenate([right, of_kind], 1), of_kind.sum(0)
    sums = resampled_sums(groups, lambda cases_MN: table[cases_MN].sum(1))
    hits_RK, asked_RK = sums[:, : len(kinds)], sums[:, len(kinds) :]
    recalls_RK = np.divide(hits_RK, asked_RK, out=np.full_like(hits_RK, np.nan), where=asked_RK > 0)
    return Estimate(mean_recall(truth, decided), tuple(np.nanmean(recalls_RK, axis=1).tolist()), 1 / float(np.mean(1 / counts_K)))


def log_perplexity(nats: Sequence[float], tokens: Sequence[int], groups: Sequence[str]) -> Estimate:
    """The mean log-likelihood of a token, over all texts together. nats: minus the log-likelihood of each text."""
    table = np.array([nats, tokens], dtype=float).T
    sums_RK = resampled_sums(groups, lambda cases_MN: table[cases_MN].sum(1))
    resampled_R = -sums_RK[:, 0] / sums_RK[:, 1]
    return Estimate(-sum(nats) / sum(tokens), tuple(resampled_R.tolist()), len(nats), "log-likelihood")


def mean_recall(truth: Sequence[str], decided: Sequence[str]) -> float:
    """The mean, over the kinds of ``truth``, of the share of each that was decided right."""
    recalls = []
    for kind in sorted(set(truth)):
        own = [t == d for t, d in zip(truth, decided, strict=True) if t == kind]
        recalls.append(sum(own) / len(own))
    return float(np.mean(recalls))


def mean_auroc(truth: Sequence[bool] | np.ndarray, scores: Sequence[float] | np.ndarray, groups: Sequence[str]) -> Estimate:
    """The mean over groups of the AUROC. Every group has cases of both kinds."""
    true, values = np.asarray(truth, dtype=bool), np.asarray(scores, dtype=float)
    sums_RK = resampled_sums(groups, lambda cases_MN: np.array([[auroc(true[own], values[own]), 1.0] for own in cases_MN]), true.tolist())
    members = [np.flatnonzero(np.asarray(groups) == group) for group in dict.fromkeys(groups)]
    value = float(np.mean([auroc(true[own], values[own]) for own in members]))
    rarer = min(int(true.sum()), int((~true).sum()))
    return Estimate(value, tuple((sums_RK[:, 0] / sums_RK[:, 1]).tolist()), rarer)


def log_odds(log_likelihoods: Sequence[float], index: int) -> float:
    """log(P / (1 - P)) of the answer at ``index``, among the given ones.

    It ranks answers however certain they are: 1 - P itself is 0 from 37 nats on.
    """
    others = [value for place, value in enumerate(log_likelihoods) if place != index]
    return log_likelihoods[index] - float(np.logaddexp.reduce(others))


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
    """The area under the ROC curve: the share of pairs of a good and a defective case in which the defective one has
    the higher score; equal scores count half.

    truth: true for a defect. The result is scikit-learn's, 30 times as fast on the few cases of a resample.
    """
    true, values = np.asarray(truth, dtype=bool), np.asarray(scores, dtype=float)
    good, defective = np.sort(values[~true]), values[true]
    below, not_above = np.searchsorted(good, defective, "left"), np.searchsorted(good, defective, "right")
    return float((below + not_above).mean() / (2 * len(good)))


def calibration_error(certainty: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error: how far the certainty of answers is from the share of right ones, over ranges of equal width
    (Guo et al., arXiv 1706.04599).
    """
    bin_of = np.minimum((np.asarray(certainty) * bins).astype(int), bins - 1)
    error = 0.0
    for number in np.unique(bin_of):
        own = bin_of == number
        error += own.mean() * abs(float(np.asarray(certainty)[own].mean()) - float(np.asarray(right)[own].mean()))
    return float(error)


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
