"""The nearest-prototype baseline on the base's own tower: what a user would do without this project.

Each picture is the mean of its patch features, standardised by the mean and spread of the cell's pictures; a class is
the mean of its support pictures' unit vectors; the query belongs to the class of the largest cosine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from lcl_adapter.evaluate.suites import Case
from lcl_adapter.vision import VisionFeatures


def nearest_prototype(cases: Sequence[Case], vision: VisionFeatures) -> list[bool | None]:
    """Whether the nearest prototype is the gold label's, for each case; None where there is no support set."""
    pictures = list(dict.fromkeys(t.picture for c in cases for t in (*c.support, c.query) if t.picture is not None))
    vectors = torch.cat([vision.raw(pictures[i : i + 256]).mean(1).float() for i in range(0, len(pictures), 256)])
    vectors = functional.normalize((vectors - vectors.mean(0)) / (vectors.std(0) + 1e-6), dim=1)
    place = {picture: i for i, picture in enumerate(pictures)}
    judged: list[bool | None] = []
    for case in cases:
        shown = case.episode.support if case.episode else ()
        if not shown or case.query.picture is None:
            judged.append(None)
            continue
        query = vectors[place[case.query.picture]]
        scores = {
            label: float(query @ functional.normalize(vectors[[place[e.picture] for e in shown if e.label == label]].mean(0), dim=0))
            for label in case.labels
        }
        judged.append(max(scores, key=scores.__getitem__) == case.gold)
    return judged
