"""What a user would do without this project, on the base's own tower: no training, the same questions.

prototype   class means of the shown pictures; the query belongs to the nearest
patches     the largest distance of a query's patch to its nearest patch in the references (after PatchCore, arXiv 2106.08265)
copied      the box that was shown last, said again
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lcl_adapter.base.prototypes import CHUNK, class_means, mean_patches, standardised
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.sources import Picture
from lcl_adapter.data.sources.boxes import parse
from lcl_adapter.evaluate import judges
from lcl_adapter.evaluate.cases import Case, Cell
from lcl_adapter.evaluate.metrics import mean


def measure(cell: Cell, vision: VisionFeatures) -> tuple[dict[str, Any] | None, list[bool | None]]:
    """The baseline's name and figures, and whether it is right on each case where that can be said."""
    nothing: list[bool | None] = [None] * len(cell.cases)
    match cell.baseline:
        case "prototype":
            right = nearest_prototype(cell.cases, vision)
            known = [r for r in right if r is not None]
            return ({"name": "prototype", "value": mean(known)} if known else None), right
        case "patches":
            scores = patch_distances(cell.cases, vision)
            return {"name": "patch distance", **judges.ranked(cell.cases, scores, None, None)}, nothing
        case "prototype or neither":
            decided, threshold = prototype_or_neither(cell.cases, vision)
            told = {"threshold": round(threshold, 3), "note": "its threshold is the best one on these very questions"}
            return {"name": "prototype, best threshold", **judges.roles(cell.cases, decided, None), **told}, nothing
        case "copied":
            boxes = [parse(c.episode.support[-1].label) if c.episode and c.episode.support else None for c in cell.cases]
            return {"name": "last shown box", **judges.overlaps(cell.cases, boxes)}, nothing
        case _:
            return None, nothing


def _vectors(pictures: Sequence[Picture], vision: VisionFeatures) -> tuple[torch.Tensor, dict[Picture, int]]:
    """Unit vectors [N, C] of the different pictures, and each one's row."""
    different = list(dict.fromkeys(pictures))
    return standardised(mean_patches(different, vision)), {picture: row for row, picture in enumerate(different)}


def _similarities(cases: Sequence[Case], vision: VisionFeatures) -> list[dict[str, float] | None]:
    """Cosine of the query and each shown label's mean; None where nothing is shown."""
    vectors, place = _vectors([p for c in cases for t in (*c.support, c.query) for p in t.pictures], vision)
    found: list[dict[str, float] | None] = []
    for case in cases:
        shown = case.episode.support if case.episode else ()
        if not shown or case.query.picture is None:
            found.append(None)
            continue
        query = vectors[place[case.query.picture]]
        labels = list(dict.fromkeys(e.label for e in shown))
        means = class_means(vectors[[place[e.picture] for e in shown]], [labels.index(e.label) for e in shown])
        found.append(dict(zip(labels, (means @ query).tolist(), strict=True)))
    return found


def nearest_prototype(cases: Sequence[Case], vision: VisionFeatures) -> list[bool | None]:
    """Whether the nearest prototype is the gold label's, for each case; None where there is no support set."""
    return [None if s is None else max(s, key=s.__getitem__) == c.gold for c, s in zip(cases, _similarities(cases, vision), strict=True)]


def prototype_or_neither(cases: Sequence[Case], vision: VisionFeatures) -> tuple[list[str], float]:
    """The nearer product, or neither below a threshold; of all thresholds the one with the best balanced accuracy here."""
    near = []
    for case, scores in zip(cases, _similarities(cases, vision), strict=True):
        assert scores is not None
        label = max(scores, key=scores.__getitem__)
        near.append((scores[label], case.truth["roles"][label]))
    best: tuple[float, list[str], float] = (-1.0, [], 0.0)
    for threshold in np.quantile([s for s, _ in near], np.linspace(0, 1, 41)):
        decided = [role if score >= threshold else "neither" for score, role in near]
        value = judges.roles(cases, decided, None)["value"]
        if value > best[0]:
            best = (value, decided, float(threshold))
    return best[1], best[2]


def patch_distances(cases: Sequence[Case], vision: VisionFeatures) -> list[float]:
    """Each query's largest distance of a patch to the nearest patch of the references shown with it."""
    groups: dict[tuple[Picture, ...], list[int]] = {}
    for index, case in enumerate(cases):
        groups.setdefault(tuple(p for t in case.support for p in t.pictures), []).append(index)
    found = [0.0] * len(cases)
    for references, members in groups.items():
        shown = vision.patches(references).float()
        mean_patch, spread = shown.mean((0, 1)), shown.std((0, 1)) + 1e-6
        known = ((shown - mean_patch) / spread).flatten(0, 1)
        for start in range(0, len(members), CHUNK):
            part = members[start : start + CHUNK]
            queries = (vision.patches([p for i in part for p in cases[i].query.pictures]).float() - mean_patch) / spread
            nearest = torch.cdist(queries.flatten(0, 1), known).min(1).values.view(len(part), -1)
            for index, distance in zip(part, nearest.max(1).values.tolist(), strict=True):
                found[index] = distance
    return found
