"""Replies -> figures: ``value`` (the main one), ``ci95`` (its 95 % interval), ``greedy`` (the share of right texts),
and more.

An interval resamples the cases' groups (classes, categories, pictures) and, where they are few, the cases within them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lcl_adapter.answering.predict import Reply
from lcl_adapter.data.sources.boxes import Box, parse
from lcl_adapter.errors import DataError
from lcl_adapter.evaluate import metrics, rules
from lcl_adapter.evaluate.cases import Case, Judged
from lcl_adapter.evaluate.metrics import Estimate, mean

RIGHT_IOU = 0.5


def _judged(estimate: Estimate, greedy: float | None, **more: Any) -> Judged:
    figures = {"value": round(estimate.value, 4), "ci95": [round(v, 4) for v in estimate.interval()], "greedy": greedy, **more}
    return Judged(figures, estimate)


def _mean_of(right: Sequence[bool | float], cases: Sequence[Case], greedy: float | None, **more: Any) -> Judged:
    return _judged(metrics.accuracy(right, [c.group for c in cases]), greedy, **more)


def answer_of(case: Case, reply: Reply) -> str:
    """The label with the highest score; "" if all scores are equal, as for a server's text that names no label."""
    return case.labels[reply.best] if reply.decided else ""


def label_figures(cases: Sequence[Case], replies: Sequence[Reply]) -> Judged:
    """Accuracy of the scored labels. Beside it, accuracy of the text: exactly, and by LCL's rule."""
    right = [answer_of(c, r) == c.gold for c, r in zip(cases, replies, strict=True)]
    texts = [rules.exact(r.text, c.worded_gold) for c, r in zip(cases, replies, strict=True)]
    return _mean_of(right, cases, mean(texts), lcl_rule=mean(_right_by_lcl_rule(cases, replies)))


def lcl_rule_figures(cases: Sequence[Case], replies: Sequence[Reply]) -> Judged:
    """Accuracy of the generated text by LCL's rule, as the paper scores its tests.

    Beside it, the exact text and the scored labels.
    """
    texts = [rules.exact(r.text, c.worded_gold) for c, r in zip(cases, replies, strict=True)]
    scored = [answer_of(c, r) == c.gold for c, r in zip(cases, replies, strict=True)] if cases[0].labels else []
    right = _right_by_lcl_rule(cases, replies)
    return _mean_of(right, cases, mean(texts), lcl_rule=mean(right), **({"scored": mean(scored)} if scored else {}))


def open_mi_figures(cases: Sequence[Case], replies: Sequence[Reply]) -> Judged:
    """Accuracy of the generated text by VL-ICL Bench's rule. Beside it, the exact text and the scored labels."""
    right = [rules.vl_icl_rule(r.text, c.worded_gold) for c, r in zip(cases, replies, strict=True)]
    texts = [rules.exact(r.text, c.worded_gold) for c, r in zip(cases, replies, strict=True)]
    scored = [answer_of(c, r) == c.gold for c, r in zip(cases, replies, strict=True)]
    return _mean_of(right, cases, mean(texts), scored=mean(scored))


def _right_by_lcl_rule(cases: Sequence[Case], replies: Sequence[Reply]) -> list[bool]:
    return [rules.lcl_rule(r.text.lower(), c.gold.lower(), [x.lower() for x in c.labels if x != c.gold]) for c, r in zip(cases, replies, strict=True)]


def exact_figures(cases: Sequence[Case], replies: Sequence[Reply]) -> Judged:
    """Accuracy of the greedy text, without regard to case and white space."""
    right = [rules.exact(r.text, c.gold) for c, r in zip(cases, replies, strict=True)]
    return _mean_of(right, cases, mean(right))


def contained_figures(cases: Sequence[Case], replies: Sequence[Reply]) -> Judged:
    """The share of texts that contain an accepted answer. Beside it, exact answers."""
    right = [rules.contains(r.text, c.truth or (c.gold,)) for c, r in zip(cases, replies, strict=True)]
    return _mean_of(right, cases, mean([rules.exact(r.text, c.gold) for c, r in zip(cases, replies, strict=True)]))


def perplexity_figures(cases: Sequence[Case], replies: Sequence[Reply]) -> Judged:
    """Perplexity of the cases' texts: e to the mean surprise of a token, in nats. ``greedy`` is None: nothing is generated."""
    nats = [-reply.log_likelihoods[0] for reply in replies]
    tokens = [reply.tokens[0] for reply in replies]
    estimate = metrics.log_perplexity(nats, tokens, [c.group for c in cases])
    interval = sorted(math.exp(-bound) for bound in estimate.interval())
    figures = {"value": round(estimate.shown, 3), "ci95": [round(bound, 3) for bound in interval], "greedy": None, "tokens": sum(tokens)}
    return Judged(figures, estimate)


def vqav2_figures(cases: Sequence[Case], replies: Sequence[Reply]) -> Judged:
    """VQAv2's soft score against all answers that people gave."""
    scores = [rules.vqa_score(r.text, c.truth) for c, r in zip(cases, replies, strict=True)]
    return _mean_of(scores, cases, mean([rules.exact(r.text, c.gold) for c, r in zip(cases, replies, strict=True)]))


def pope_figures(cases: Sequence[Case], replies: Sequence[Reply]) -> Judged:
    """Accuracy, precision, recall and F1 of "yes", and the share of "yes" among the answers."""
    yes = [not rules.pope_says_no(r.text) for r in replies]
    truth = [c.gold == "yes" for c in cases]
    right = [a == b for a, b in zip(yes, truth, strict=True)]
    hits = sum(a and b for a, b in zip(yes, truth, strict=True))
    precision = hits / sum(yes) if any(yes) else 0.0
    recall = hits / sum(truth) if any(truth) else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    figures = {"precision": precision, "recall": recall, "f1": f1, "yes_share": sum(yes) / len(yes)}
    return _mean_of(right, cases, mean([rules.exact(r.text, c.gold) for c, r in zip(cases, replies, strict=True)]), **_rounded(figures))


def rouge_figures(cases: Sequence[Case], replies: Sequence[Reply]) -> Judged:
    """ROUGE-L, and beside it the share of exact answers."""
    scores = [metrics.rouge_l(r.text, c.gold) for c, r in zip(cases, replies, strict=True)]
    return _mean_of(scores, cases, mean([rules.exact(r.text, c.gold) for c, r in zip(cases, replies, strict=True)]))


def box_figures(cases: Sequence[Case], replies: Sequence[Reply]) -> Judged:
    """Accuracy of boxes: right if the first box in the text has an IoU over 0.5. A text without a box is wrong."""
    return overlap_figures(cases, [parse(r.text) for r in replies], mean([rules.exact(r.text, c.gold) for c, r in zip(cases, replies, strict=True)]))


def overlap_figures(cases: Sequence[Case], boxes: Sequence[Box | None], greedy: float | None = None) -> Judged:
    """The same figures for boxes; None is a missing one."""
    ious = [c.truth.iou(b) if b is not None else 0.0 for c, b in zip(cases, boxes, strict=True)]
    return _mean_of([iou > RIGHT_IOU for iou in ious], cases, greedy, mean_iou=mean(ious), no_box=mean([b is None for b in boxes]))


def inspection_figures(cases: Sequence[Case], replies: Sequence[Reply]) -> Judged:
    """AUROC and other figures of each category, from the log-odds of "defective".

    The main figure is the mean AUROC over categories.
    """
    scores = [-metrics.log_odds(r.log_likelihoods, c.labels.index(c.truth["good"])) for c, r in zip(cases, replies, strict=True)]
    texts = [rules.exact(r.text, c.worded_gold) for c, r in zip(cases, replies, strict=True)]
    decided = [answer_of(c, r) != c.truth["good"] for c, r in zip(cases, replies, strict=True)]
    return ranking_figures(cases, scores, decided, mean(texts))


def ranking_figures(cases: Sequence[Case], scores: Sequence[float], decided: Sequence[bool] | None, greedy: float | None) -> Judged:
    """scores: higher for a defect.

    decided: whether each case was called defective, None for a method without decisions.

    Raises DataError if no category has both good and defective cases.
    """
    truth = np.array([c.truth["defect"] is not None for c in cases])
    values, groups = np.asarray(scores), [c.group for c in cases]
    by_category: dict[str, dict[str, float]] = {}
    for category in dict.fromkeys(groups):
        members = [i for i, g in enumerate(groups) if g == category]
        if 0 < truth[members].sum() < len(members):
            own = metrics.ranking(truth[members], values[members])
            if decided is not None:
                own |= metrics.decisions(truth[members].tolist(), [decided[i] for i in members])
            by_category[category] = own
    kinds = sorted({c.truth["defect"] for c in cases if c.truth["defect"]})
    keys = next(iter(by_category.values()), {})
    figures: dict[str, Any] = {key: mean([own[key] for own in by_category.values()]) for key in keys}
    if decided is not None:
        counts = Counter(zip(truth.tolist(), decided, strict=True))
        figures["confusion"] = {_state(t): {_state(d): counts[t, d] for d in (False, True)} for t in (False, True)}
    figures["by_category"] = {category: _rounded(own) for category, own in by_category.items()}
    figures["by_defect"] = {kind: _kind_auroc(kind, cases, values, groups) for kind in kinds}
    if not by_category:
        raise DataError(f"no category has both good and defective photos among the {len(cases)} photos of the suite; raise its limit.")
    usable = [i for i, g in enumerate(groups) if g in by_category]
    return _judged(metrics.mean_auroc(truth[usable], values[usable], [groups[i] for i in usable]), greedy, **figures)


def _kind_auroc(kind: str, cases: Sequence[Case], values: np.ndarray, groups: Sequence[str]) -> float:
    """AUROC of one kind of defect against the good photos of the same category, averaged over categories."""
    aurocs = []
    for category in dict.fromkeys(groups):
        members = [i for i, c in enumerate(cases) if groups[i] == category and c.truth["defect"] in {None, kind}]
        truth = [cases[i].truth["defect"] is not None for i in members]
        if 0 < sum(truth) < len(truth):
            aurocs.append(metrics.auroc(truth, values[members]))
    return mean(aurocs)


def _state(defective: bool) -> str:
    return "defective" if defective else "good"


ROLES = ("A", "B", "neither")


def product_figures(cases: Sequence[Case], replies: Sequence[Reply]) -> Judged:
    """Balanced accuracy over the roles A, B and neither, each role's recall, and both kinds of wrong "neither".

    A is the product shown first.
    """
    texts = [rules.exact(r.text, c.worded_gold) for c, r in zip(cases, replies, strict=True)]
    decided = [c.truth["roles"].get(answer_of(c, r), "") for c, r in zip(cases, replies, strict=True)]
    return role_figures(cases, decided, mean(texts))


def role_figures(cases: Sequence[Case], decided: Sequence[str], greedy: float | None) -> Judged:
    """The same figures for decided roles; "" is no decision."""
    truth = roles_of(cases)
    confusion = Counter(zip(truth, decided, strict=True))
    figures = {
        "accuracy": mean([a == b for a, b in zip(truth, decided, strict=True)]),
        "recall": {r: mean([d == r for t, d in zip(truth, decided, strict=True) if t == r]) for r in ROLES if r in truth},
        "neither_said_of_a_product": mean([d == "neither" for t, d in zip(truth, decided, strict=True) if t != "neither"]),
        "product_said_of_neither": mean([d != "neither" for t, d in zip(truth, decided, strict=True) if t == "neither"]),
        "near_neither_recall": mean([d == "neither" for c, d in zip(cases, decided, strict=True) if c.truth["near"]]),
        "confusion": {t: {d: confusion[t, d] for d in ROLES} for t in ROLES},
    }
    return _judged(metrics.balanced_accuracy(truth, decided, [c.group for c in cases]), greedy, **figures)


def roles_of(cases: Sequence[Case]) -> list[str]:
    """The right role of each case."""
    return [c.truth["roles"][c.gold] for c in cases]


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}
