"""Replies -> figures. Every judge gives ``value`` (the cell's main figure), its 95 % interval, and the share of right texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lcl_adapter.answering.predict import Reply
from lcl_adapter.data.sources.boxes import Box, parse
from lcl_adapter.errors import DataError
from lcl_adapter.evaluate import metrics, rules
from lcl_adapter.evaluate.cases import Case
from lcl_adapter.evaluate.metrics import mean

RIGHT_IOU = 0.5


def _figures(value: float, interval: tuple[float, float], greedy: float | None, **more: Any) -> dict[str, Any]:
    return {"value": round(value, 4), "ci95": [round(v, 4) for v in interval], "greedy": greedy, **more}


def _mean_of(right: Sequence[bool | float], cases: Sequence[Case], greedy: float | None, **more: Any) -> dict[str, Any]:
    return _figures(mean(right), metrics.class_bootstrap(right, [c.group for c in cases]), greedy, **more)


def answer_of(case: Case, reply: Reply) -> str:
    """The label that is scored highest; "" where nothing tells them apart, as when a server's text names none of them."""
    return case.labels[reply.best] if reply.decided else ""


def labelled(cases: Sequence[Case], replies: Sequence[Reply]) -> dict[str, Any]:
    """Accuracy of scored labels; the text word for word, and by LCL's own rule, beside it."""
    right = [answer_of(c, r) == c.gold for c, r in zip(cases, replies, strict=True)]
    texts = [rules.exact(r.text, c.worded) for c, r in zip(cases, replies, strict=True)]
    return _mean_of(right, cases, mean(texts), lcl_rule=mean(_by_lcls_rule(cases, replies)))


def by_lcls_rule(cases: Sequence[Case], replies: Sequence[Reply]) -> dict[str, Any]:
    """As the paper scores its tests: the generated text by LCL's rule; scored labels and the exact text beside it."""
    texts = [rules.exact(r.text, c.worded) for c, r in zip(cases, replies, strict=True)]
    scored = [answer_of(c, r) == c.gold for c, r in zip(cases, replies, strict=True)] if cases[0].labels else []
    right = _by_lcls_rule(cases, replies)
    return _mean_of(right, cases, mean(texts), lcl_rule=mean(right), **({"scored": mean(scored)} if scored else {}))


def _by_lcls_rule(cases: Sequence[Case], replies: Sequence[Reply]) -> list[bool]:
    return [rules.lcl_rule(r.text.lower(), c.gold.lower(), [x.lower() for x in c.labels if x != c.gold]) for c, r in zip(cases, replies, strict=True)]


def exact(cases: Sequence[Case], replies: Sequence[Reply]) -> dict[str, Any]:
    """The greedy text is the answer, but for case and white space."""
    right = [rules.exact(r.text, c.gold) for c, r in zip(cases, replies, strict=True)]
    return _mean_of(right, cases, mean(right))


def vqav2(cases: Sequence[Case], replies: Sequence[Reply]) -> dict[str, Any]:
    """VQAv2's soft score against every answer that people gave."""
    scores = [rules.vqa_score(r.text, c.truth) for c, r in zip(cases, replies, strict=True)]
    return _mean_of(scores, cases, mean([rules.exact(r.text, c.gold) for c, r in zip(cases, replies, strict=True)]))


def pope(cases: Sequence[Case], replies: Sequence[Reply]) -> dict[str, Any]:
    """Accuracy, precision, recall and F1 of "yes", and how often it is said."""
    yes = [not rules.pope_says_no(r.text) for r in replies]
    truth = [c.gold == "yes" for c in cases]
    right = [a == b for a, b in zip(yes, truth, strict=True)]
    hits = sum(a and b for a, b in zip(yes, truth, strict=True))
    precision = hits / sum(yes) if any(yes) else 0.0
    recall = hits / sum(truth) if any(truth) else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    told = {"precision": precision, "recall": recall, "f1": f1, "yes_share": sum(yes) / len(yes)}
    return _mean_of(right, cases, mean([rules.exact(r.text, c.gold) for c, r in zip(cases, replies, strict=True)]), **_rounded(told))


def instructed(cases: Sequence[Case], replies: Sequence[Reply]) -> dict[str, Any]:
    """ROUGE-L, and exact answers beside it."""
    scores = [metrics.rouge_l(r.text, c.gold) for c, r in zip(cases, replies, strict=True)]
    return _mean_of(scores, cases, mean([rules.exact(r.text, c.gold) for c, r in zip(cases, replies, strict=True)]))


def boxed(cases: Sequence[Case], replies: Sequence[Reply]) -> dict[str, Any]:
    """Right if the answer's first box has an IoU over 0.5; an answer without a box is wrong."""
    return overlaps(cases, [parse(r.text) for r in replies], mean([rules.exact(r.text, c.gold) for c, r in zip(cases, replies, strict=True)]))


def overlaps(cases: Sequence[Case], boxes: Sequence[Box | None], greedy: float | None = None) -> dict[str, Any]:
    found = [c.truth.iou(b) if b is not None else 0.0 for c, b in zip(cases, boxes, strict=True)]
    told = {"mean_iou": mean(found), "no_box": mean([b is None for b in boxes])}
    return _mean_of([iou > RIGHT_IOU for iou in found], cases, greedy, **told)


def inspected(cases: Sequence[Case], replies: Sequence[Reply]) -> dict[str, Any]:
    """AUROC and the rest by category, from the score of "good" against "defective"; the mean over categories is the figure."""
    scores = [1 - dict(zip(c.labels, r.probabilities, strict=True))[c.truth["good"]] for c, r in zip(cases, replies, strict=True)]
    texts = [rules.exact(r.text, c.worded) for c, r in zip(cases, replies, strict=True)]
    return ranked(cases, scores, [answer_of(c, r) != c.truth["good"] for c, r in zip(cases, replies, strict=True)], mean(texts))


def ranked(cases: Sequence[Case], scores: Sequence[float], called: Sequence[bool] | None, greedy: float | None) -> dict[str, Any]:
    """``scores`` are higher for a defect; ``called`` is what was decided, None for a method that decides nothing."""
    truth = np.array([c.truth["defect"] is not None for c in cases])
    values, groups = np.asarray(scores), [c.group for c in cases]
    by_category: dict[str, dict[str, float]] = {}
    for category in dict.fromkeys(groups):
        places = [i for i, g in enumerate(groups) if g == category]
        if 0 < truth[places].sum() < len(places):
            one = metrics.ranking(truth[places], values[places])
            if called is not None:
                one |= metrics.decisions(truth[places].tolist(), [called[i] for i in places])
            by_category[category] = one
    kinds = sorted({c.truth["defect"] for c in cases if c.truth["defect"]})
    aurocs = {category: one["auroc"] for category, one in by_category.items()}
    keys = next(iter(by_category.values()), {})
    told: dict[str, Any] = {k: mean([one[k] for one in by_category.values()]) for k in keys}
    if called is not None:
        tally = Counter(zip(truth.tolist(), called, strict=True))
        told["confusion"] = {_state(t): {_state(s): tally[t, s] for s in (False, True)} for t in (False, True)}
    told["by_category"] = {category: _rounded(one) for category, one in by_category.items()}
    told["by_defect"] = {kind: _kind_auroc(kind, cases, values, groups) for kind in kinds}
    if not aurocs:
        raise DataError(f"no category has both good and defective photos among the {len(cases)} that are asked about; raise the limit.")
    interval = metrics.class_bootstrap(list(aurocs.values()), list(aurocs))
    return _figures(mean(list(aurocs.values())), interval, greedy, **told)


def _kind_auroc(kind: str, cases: Sequence[Case], values: np.ndarray, groups: Sequence[str]) -> float:
    """One kind of defect against the good photos of the same category, averaged over categories."""
    found = []
    for category in dict.fromkeys(groups):
        places = [i for i, c in enumerate(cases) if groups[i] == category and c.truth["defect"] in {None, kind}]
        truth = [cases[i].truth["defect"] is not None for i in places]
        if 0 < sum(truth) < len(truth):
            found.append(metrics.ranking(truth, values[places])["auroc"])
    return mean(found)


def _state(defective: bool) -> str:
    return "defective" if defective else "good"


ROLES = ("A", "B", "neither")


def sorted_out(cases: Sequence[Case], replies: Sequence[Reply]) -> dict[str, Any]:
    """A, B or neither: balanced accuracy, each role's recall, and how "neither" goes wrong each way. A is the product shown first."""
    texts = [rules.exact(r.text, c.worded) for c, r in zip(cases, replies, strict=True)]
    return roles(cases, [c.truth["roles"].get(answer_of(c, r), "") for c, r in zip(cases, replies, strict=True)], mean(texts))


def roles(cases: Sequence[Case], decided: Sequence[str], greedy: float | None) -> dict[str, Any]:
    truth = [c.truth["roles"][c.gold] for c in cases]

    def balanced(places: np.ndarray) -> float:
        recalls = []
        for role in ROLES:
            own = [i for i in places if truth[i] == role]
            if own:
                recalls.append(sum(decided[i] == role for i in own) / len(own))
        return float(np.mean(recalls))

    confusion = Counter(zip(truth, decided, strict=True))
    told = {
        "accuracy": mean([a == b for a, b in zip(truth, decided, strict=True)]),
        "recall": {r: mean([d == r for t, d in zip(truth, decided, strict=True) if t == r]) for r in ROLES if r in truth},
        "neither_said_of_a_product": mean([d == "neither" for t, d in zip(truth, decided, strict=True) if t != "neither"]),
        "product_said_of_neither": mean([d != "neither" for t, d in zip(truth, decided, strict=True) if t == "neither"]),
        "near_neither_recall": mean([d == "neither" for c, d in zip(cases, decided, strict=True) if c.truth["near"]]),
        "confusion": {t: {d: confusion[t, d] for d in ROLES} for t in ROLES},
    }
    everything = np.arange(len(cases))
    return _figures(balanced(everything), metrics.resampled(balanced, [c.group for c in cases]), greedy, **told)


def _rounded(told: dict[str, float]) -> dict[str, float]:
    return {k: round(v, 4) for k, v in told.items()}
