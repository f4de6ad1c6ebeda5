"""Pictures as unit vectors of the frozen tower, and their class means: a classifier without any training.

Shapes: N pictures, C width of a patch, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from lcl_adapter.base.vision import BATCH, VisionFeatures
from lcl_adapter.data.sources import Picture


def mean_patches(pictures: Sequence[Picture], vision: VisionFeatures) -> torch.Tensor:
    """Each picture's mean patch in fp32, [N, C]. Raises DataError for a broken picture."""
    chunks = (pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH))
    return torch.cat([vision.patches(chunk).float().mean(1) for chunk in chunks])


@torch.inference_mode()
def unit_vectors(pictures: Sequence[Picture], vision: VisionFeatures) -> torch.Tensor:
    """Each picture's mean patch as a unit vector, [N, C], on the CPU.

    Dot products of them are cosines: how alike two pictures are to the tower. Raises DataError for a broken picture.
    """
    if not pictures:
        return torch.empty(0, 0)
    return functional.normalize(mean_patches(pictures, vision), dim=1).cpu()


def standardised(features_NC: torch.Tensor) -> torch.Tensor:
    """Unit vectors [N, C], after each feature was standardised over these pictures, so that none dominates."""
    return functional.normalize((features_NC - features_NC.mean(0)) / (features_NC.std(0) + 1e-6), dim=1)


def class_means(vectors_NC: torch.Tensor, class_N: Sequence[int]) -> torch.Tensor:
    """The prototype of each class, [K, C]: its pictures' mean as a unit vector.

    class_N: each picture's class, from 0 to K - 1.
    """
    owners_N = torch.tensor(class_N, device=vectors_NC.device)
    sums_KC = torch.zeros(max(class_N) + 1, vectors_NC.shape[1], device=vectors_NC.device).index_add_(0, owners_N, vectors_NC)
    return functional.normalize(sums_KC, dim=1)
