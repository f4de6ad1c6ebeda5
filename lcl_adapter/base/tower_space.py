"""How a frozen tower's features are compared: standardised, and less along what varies among photos of one class.

The likeness of two pictures is the cosine of their vectors here. What differs between photos of the same thing, such as light,
pose and background, says little about which thing it is. Those directions are learned from the classes that an adapter was
trained on, and count less (within-class covariance normalisation, Hatch et al., Interspeech 2006). A new class needs no training.

Shapes: N pictures, C width of a patch, D directions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from safetensors.torch import save
from torch.nn import functional

LIMIT = 3.0  # deviations; a class probability is nearly always 0, so that one large one would be the whole vector (docs/lab.md)
DIRECTIONS = 128
ROUNDING = 1e-4  # deviations: what copies of a photo may differ by
LATER = ("directions", "gains", "patches")  # tensors that files of earlier versions do not have
SHRINKAGE = 1.0  # of the covariance, in mean variances: there are fewer photos than features


@dataclass(frozen=True)
class TowerSpace:
    """Where a tower's features are compared.

    statistics: mean and deviation of each feature of whole pictures, [2, C]. limit: deviations beyond it are set to it. directions:
    orthonormal, [D, C], along which photos of one class vary. gains: [D], what a feature vector is multiplied by along each of them.
    patches: mean and deviation of each feature of single patches, [2, C]. A tensor is empty where it is not known.
    """

    statistics: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    limit: float = math.inf
    directions: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    gains: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    patches: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))

    @classmethod
    def fit(cls, features_NC: torch.Tensor, classes: Sequence[torch.Tensor] = (), patches: torch.Tensor | None = None) -> TowerSpace:
        """Mean and deviation of features [N, C]; directions from the features of each class's photos, [n, C], where it has two or more.

        patches: their mean and deviation, [2, C].
        """
        plain = cls(torch.stack([features_NC.mean(0), features_NC.std(0) + 1e-6]), LIMIT)
        if patches is not None:
            plain = replace(plain, patches=patches)
        varied = [_around_their_mean(plain.limited(class_NC)) for class_NC in classes if len(class_NC) > 1]
        if not any(float(class_NC.abs().max()) > ROUNDING for class_NC in varied):  # no class of two photos, or copies alone
            return plain
        directions_DC, gains_D = _within_classes(torch.cat(varied))
        return replace(plain, directions=directions_DC, gains=gains_D)

    @property
    def compares_patches(self) -> bool:
        return bool(self.patches.numel())

    def limited(self, features_NC: torch.Tensor) -> torch.Tensor:
        """Features in deviations from their mean, up to the limit."""
        return ((features_NC - self.statistics[0]) / self.statistics[1]).clamp(-self.limit, self.limit)

    def limited_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """Features of single patches, [..., C], in deviations from their mean, up to the limit. Their differences are compared."""
        mean_C, deviation_C = self.patches.to(patches.device)
        return ((patches - mean_C) / deviation_C).clamp(-self.limit, self.limit)

    def vectors(self, features_NC: torch.Tensor) -> torch.Tensor:
        """Unit vectors, [N, C]. Their dot products are likenesses."""
        limited_NC = self.limited(features_NC)
        if len(self.directions):
            limited_NC = limited_NC + (limited_NC @ self.directions.T * (self.gains - 1)) @ self.directions
        return functional.normalize(limited_NC, dim=1)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """For a file; ``from_tensors`` reads them."""
        tensors = {"tower": self.statistics, "limit": torch.tensor(self.limit), **{name: getattr(self, name) for name in LATER}}
        return {name: value.contiguous() for name, value in tensors.items()}

    def hash(self) -> str:
        """Which space it is: cached figures depend on it."""
        return hashlib.sha256(save(self.to_tensors())).hexdigest()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> TowerSpace:
        """Files of earlier versions have statistics alone. Their features are compared without a limit, as their weights were fitted."""
        return cls(tensors["tower"], float(tensors.get("limit", math.inf)), **{name: tensors[name] for name in LATER if name in tensors})


def _around_their_mean(class_NC: torch.Tensor) -> torch.Tensor:
    """Deviations from the mean of a few, longer by what their own mean takes of them."""
    return (class_NC - class_NC.mean(0)) * math.sqrt(len(class_NC) / (len(class_NC) - 1))


def _within_classes(varied_NC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The directions of most variance and their gains: the root of the shrunk covariance's inverse, 1 along all other directions on average."""
    width = varied_NC.shape[1]
    _, lengths, directions_DC = torch.linalg.svd(varied_NC, full_matrices=False)
    variances = lengths.square() / lengths.square().sum() * width  # in mean variances of a feature
    count = min(DIRECTIONS, len(variances), width - 1)
    rest = (width - variances[:count].sum()).clamp_min(0) / (width - count)
    return directions_DC[:count].contiguous(), ((rest + SHRINKAGE) / (variances[:count] + SHRINKAGE)).sqrt()
