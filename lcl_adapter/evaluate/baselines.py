"""Methods that need no training, on the base's own vision tower and the same questions, to compare with.

prototype   class means of the shown pictures; the query gets the label of the nearest mean
patches     the largest distance of a patch of the query to its nearest patch in the references (after PatchCore, arXiv 2106.08265)
copied      the box that was shown last

Shapes: N pictures, M shown pictures of a case, K labels of a case, C width of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lcl_adapter.base import prototypes
from lcl_adapter.base.prototypes import class_means, standardised
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.sources import Picture
from lcl_adapter.data.sources.boxes import parse
from lcl_adapter.evaluate import judges
from lcl_adapter.evaluate.cases import Case, Cell
from lcl_adapter.evaluate.metrics import mean, mean_recall


def measure_baseline(cell: Cell, vision: VisionFeatures) -> tuple[dict[str, Any] | None, list[bool | None]]:
    """The baseline's name and figures (None if the cell has none), and whether it is right on each case (None if
    unknown).
    """
    unknown: list[bool | None] = [None] * len(cell.cases)
    match cell.baseline:
        case "prototype":
            right = nearest_prototype(cell.cases, vision)
            known = [r for r in right if r is not None]
            return ({"name": "prototype", "value": mean(known)} if known else None), right
        case "patches":
            scores = patch_distances(cell.cases, vision)
            return {"name": "patch distance", **judges.ranking_figures(cell.cases, scores, None, None).figures}, unknown
        case "prototype or neither":
            decided, threshold = prototype_or_neither(cell.cases, vision)
            note = {"threshold": round(threshold, 3), "note": "its threshold is the best one on these very questions"}
            return {"name": "prototype, best threshold", **judges.role_figures(cell.cases, decided, None).figures, **note}, unknown
        case "copied":
            boxes = [parse(c.episode.support[-1].label) if c.episode and c.episode.support else None for c in cell.cases]
            return {"name": "last shown box", **judges.overlap_figures(cell.cases, boxes).figures}, unknown
        case _:
            return None, unknown


def _unit_vectors(pictures: Sequence[Picture], vision: VisionFeatures) -> tuple[torch.Tensor, dict[Picture, int]]:
    """Unit vectors [N, C] of the distinct pictures, and each picture's index among the N."""
    distinct = list(dict.fromkeys(pictures))
    return standardised(vision.mean_patches(distinct)), {picture: index for index, picture in enumerate(distinct)}


def _similarities(cases: Sequence[Case], vision: VisionFeatures) -> list[dict[str, float] | None]:
    """For each case, the cosine of the query and the mean of each shown label; None if nothing is shown."""
    whole = [replace(picture, tokens=None) for case in cases for turn in (*case.support, case.query) for picture in turn.pictures]
    vectors_NC, index = _unit_vectors(whole, vision)
    similarities: list[dict[str, float] | None] = []
    for case in cases:
        shown = case.episode.support if case.episode else ()
        if not shown or case.query.picture is None:
            similarities.append(None)
            continue
        query_C = vectors_NC[index[case.query.picture]]
        labels = list(dict.fromkeys(e.label for e in shown))
        shown_MC = vectors_NC[[index[e.picture] for e in shown]]
        means_KC = class_means(shown_MC, [labels.index(e.label) for e in shown])
        similarities.append(dict(zip(labels, (means_KC @ query_C).tolist(), strict=True)))
    return similarities


def nearest_prototype(cases: Sequence[Case], vision: VisionFeatures) -> list[bool | None]:
    """For each case, whether the nearest prototype has the right label; None if there is no support set."""
    return [None if s is None else max(s, key=s.__getitem__) == c.gold for c, s in zip(cases, _similarities(cases, vision), strict=True)]


def prototype_or_neither(cases: Sequence[Case], vision: VisionFeatures) -> tuple[list[str], float]:
    """Each query's role: the nearer product, or neither below a threshold.

    The threshold has the best balanced accuracy on these cases.
    """
    nearest = []
    for case, similarities in zip(cases, _similarities(cases, vision), strict=True):
        assert similarities is not None
        label = max(similarities, key=similarities.__getitem__)
        nearest.append((similarities[label], case.truth["roles"][label]))
    truth = judges.roles_of(cases)
    best: tuple[float, list[str], float] = (-1.0, [], 0.0)
    for threshold in np.quantile([similarity for similarity, _ in nearest], np.linspace(0, 1, 41)):
        decided = [role if similarity >= threshold else "neither" for similarity, role in nearest]
        value = mean_recall(truth, decided)
        if value > best[0]:
            best = (value, decided, float(threshold))
    return best[1], best[2]


def patch_distances(cases: Sequence[Case], vision: VisionFeatures) -> list[float]:
    """For each query, the largest distance of one of its patches to the nearest patch of its references."""
    groups: dict[tuple[Picture, ...], list[int]] = {}
    for index, case in enumerate(cases):
        groups.setdefault(tuple(p for t in case.support for p in t.pictures), []).append(index)
    distances = [0.0] * len(cases)
    for references, members in groups.items():
        queries = [picture for index in members for picture in cases[index].query.pictures]
        for index, distance in zip(members, prototypes.patch_distances(references, queries, vision), strict=True):
            distances[index] = distance
    return distances
