"""A judgement by two kinds of evidence: the model's label scores, and what the frozen tower says without any training.

The tower's evidence for a label is how alike the query is to the label's photos: the cosine with their mean. Where one
label is shown, as good parts are, it is that cosine, and how far the query's patches are from the photos' patches. A label
that is not shown ("defective", "neither") has a constant instead: it is the answer where no shown label is alike enough.

Both kinds are added with weights, and one softmax over the labels gives the probabilities. The weights are fitted on classes that
were not trained on (``lcl_adapter.evaluate.weighing``), and stand in the adapter's manifest.

Shapes: N pictures, C width of a patch, M shown photos, K labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file, save_file

from lcl_adapter.answering.api_types import JudgeName
from lcl_adapter.base.adapter import MANIFEST
from lcl_adapter.base.prototypes import class_means, patch_distances, unit_vectors
from lcl_adapter.base.tower_space import TowerSpace
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import AdapterError
from lcl_adapter.files import read_result, sha256_of, write_json

STATISTICS = "tower.safetensors"
JUDGES: tuple[JudgeName, ...] = get_args(JudgeName)
Shown = tuple[tuple[Picture, str], ...]  # labelled photos


@dataclass(frozen=True)
class Evidence:
    """The tower's evidence for one label. shown: whether it has photos; without them, the two figures are 0.

    likeness: the cosine of the query with the mean of the label's photos. distance: from a patch of the query to the nearest
    one of the photos, the largest; 0 where several labels are shown. shots: photos of a shown label, on average.
    """

    shown: bool
    likeness: float = 0.0
    distance: float = 0.0
    shots: float = 1.0


@dataclass(frozen=True)
class Weights:
    """How much each kind of evidence counts. A label's score is
    ``model * log-likelihood + likeness * cosine - distance * patch distance``, plus ``unshown + unshown_by_shots * log(shots)`` for
    one that is not shown: the more photos are shown, the more alike is one of their label.
    """

    model: float
    likeness: float
    distance: float = 0.0
    unshown: float = 0.0
    unshown_by_shots: float = 0.0

    def score(self, log_likelihood: float, evidence: Evidence, judge: JudgeName = "both") -> float:
        """A label's score; ``judge`` leaves one of the two kinds of evidence out."""
        own = self.model * log_likelihood if judge != "tower" else 0.0
        if judge == "model":
            return own
        if evidence.shown:
            return own + self.likeness * evidence.likeness - self.distance * evidence.distance
        return own + self.unshown + self.unshown_by_shots * math.log(evidence.shots)


def familiarity(cosines: Sequence[float]) -> float:
    """How familiar a photo is, given its cosines with a label's photos: -log(1 - the highest).

    It is 0 at cosine 0, and grows fast as the most alike photo approaches cosine 1 (13.8 at most).
    """
    return -math.log(max(1e-6, 1.0 - max(cosines)))


@dataclass(frozen=True)
class LeastFamiliar:
    """How familiar photos of validation classes are with photos of their own class, all but the least familiar ones.

    with_one: with one photo. by_shots: more for each natural logarithm of how many there are. fitted_on: questions.
    """

    with_one: float
    by_shots: float
    fitted_on: int = 0

    def of(self, shots: float) -> float:
        """With so many photos of a label."""
        return self.with_one + self.by_shots * math.log(shots)


@dataclass(frozen=True)
class Weighing:
    """The weights of an adapter.

    several: where two or more labels are shown. single: where one is. fitted_on: how many questions each was fitted on.
    least_familiar: below it, a photo is likely none of several labels.
    """

    several: Weights | None = None
    single: Weights | None = None
    fitted_on: tuple[int, int] = (0, 0)
    least_familiar: LeastFamiliar | None = None

    def of(self, evidence: Sequence[Evidence]) -> Weights | None:
        """The weights for a question with this evidence; None where none were fitted, or nothing is shown."""
        shown = sum(one.shown for one in evidence)
        return self.several if shown > 1 else self.single if shown == 1 else None

    def scores(self, log_likelihoods: Sequence[float], evidence: Sequence[Evidence], judge: JudgeName = "both") -> tuple[float, ...] | None:
        """Logarithms of the labels' probabilities. None where there are no weights for this kind of question."""
        weights = self.of(evidence)
        if weights is None:
            return None
        return log_softmax([weights.score(value, one, judge) for value, one in zip(log_likelihoods, evidence, strict=True)])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Weighing:
        several, single = (Weights(**fields[name]) if fields.get(name) else None for name in ("several", "single"))
        least = LeastFamiliar(**fields["least_familiar"]) if fields.get("least_familiar") else None
        return cls(several, single, tuple(fields.get("fitted_on", (0, 0))), least)


def log_softmax(scores: Sequence[float]) -> tuple[float, ...]:
    top = max(scores)
    total = top + math.log(sum(math.exp(score - top) for score in scores))
    return tuple(score - total for score in scores)


@dataclass(frozen=True)
class ShownLabels:
    """What a tower remembers of labelled photos: the labels, the mean of each one's photos as a unit vector, [K, C], and the photos."""

    names: tuple[str, ...]
    means: torch.Tensor
    photos: tuple[Picture, ...]


class TowerEvidence:
    """The tower's evidence about pictures.

    space: where the adapter's features are compared. A tower's raw features, which are compared without one, have a few that are
    large for every picture, and cosines of them say little. orientations: over which distances of patches are means.
    Features of a whole picture are a mean over it and its mirror image alone: upside down, it is less like others (docs/lab.md).
    """

    def __init__(self, vision: VisionFeatures, space: TowerSpace | None = None, orientations: int = 1) -> None:
        self.vision = vision
        self.space = space
        self.orientations = range(1, orientations + 1)

    @torch.inference_mode()
    def vectors(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Unit vectors, [N, C], on the CPU. Raises DataError for a broken picture."""
        if self.space is None or not pictures:
            return unit_vectors(pictures, self.vision)
        features = [self.vision.mean_patches([picture.oriented(k) for picture in pictures]) for k in self.orientations[:2]]
        return self.space.vectors(torch.stack(features).mean(0))

    def remember(self, shown: Shown) -> ShownLabels:
        """The means of labelled photos, of which there is at least one."""
        names = tuple(dict.fromkeys(label for _, label in shown))
        photos = tuple(picture for picture, _ in shown)
        return ShownLabels(names, class_means(self.vectors(photos), [names.index(label) for _, label in shown]), photos)

    def about(self, known: ShownLabels, queries: Sequence[Picture], labels: Sequence[str]) -> list[list[Evidence]]:
        """For each query, the evidence for each label."""
        cosines = (self.vectors(queries) @ known.means.T).tolist()
        distances = self._distances(known.photos, queries) if len(known.names) == 1 else [0.0] * len(queries)
        shots = len(known.photos) / len(known.names)
        return [
            [
                Evidence(True, row[known.names.index(label)], distance, shots) if label in known.names else Evidence(False, shots=shots)
                for label in labels
            ]
            for row, distance in zip(cosines, distances, strict=True)
        ]

    def _distances(self, references: Sequence[Picture], queries: Sequence[Picture]) -> list[float]:
        """Of each query, how far a patch of it is from the references."""
        distances = [
            patch_distances([picture.oriented(k) for picture in references], [picture.oriented(k) for picture in queries], self.vision, self.space)
            for k in self.orientations
        ]
        return torch.tensor(distances).mean(0).tolist()

    def of(self, shown: Shown, queries: Sequence[Picture], labels: Sequence[str]) -> list[list[Evidence]]:
        """:meth:`about` for photos that are not remembered. Photos of other labels than these count for none."""
        own = tuple((picture, label) for picture, label in shown if label in labels)
        return self.about(self.remember(own), queries, labels) if own else [[Evidence(False) for _ in labels] for _ in queries]


def save_weighing(folder: Path, weighing: Weighing, space: TowerSpace) -> None:
    """Write the weights into an adapter's manifest, and where the tower's features are compared beside it."""
    save_file(space.to_tensors(), folder / STATISTICS)
    manifest = read_result(folder / MANIFEST)
    write_json(folder / MANIFEST, {**manifest, "judgement": {**weighing.to_json(), "statistics": sha256_of(folder / STATISTICS)}})


def read_weighing(folder: Path, manifest: Mapping[str, Any]) -> tuple[Weighing, TowerSpace] | None:
    """The weights of an adapter, and where its tower's features are compared; None where none were fitted.

    Raises AdapterError where the file of statistics is missing or not the one that was saved.
    """
    fields = manifest.get("judgement")
    if not fields:
        return None
    file = folder / STATISTICS
    if not file.exists() or sha256_of(file) != fields["statistics"]:
        raise AdapterError(f"{file}: missing, or not the file that was saved; copy the folder again.")
    return Weighing.from_json(fields), TowerSpace.from_tensors(load_file(file))
