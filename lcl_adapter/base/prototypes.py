"""What the frozen tower says of pictures without any training: class means of unit vectors, and distances of patches.

Shapes: N pictures, C width of a patch, K classes, R references, Q queries, P patches of a picture,
X = R * P patches of all references.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from lcl_adapter.base.tower_space import TowerSpace
from lcl_adapter.base.vision import BATCH, VisionFeatures
from lcl_adapter.data.sources import Picture

PATCH_BYTES = 256 * 10**6  # for the patches of some queries and their distances; ``plan`` counts them


@torch.inference_mode()
def unit_vectors(pictures: Sequence[Picture], vision: VisionFeatures) -> torch.Tensor:
    """Each picture's mean patch as a unit vector, [N, C], on the CPU.

    Dot products of them are cosines: how alike two pictures are to the tower. Raises DataError for a broken picture.
    """
    if not pictures:
        return torch.empty(0, 0)
    return functional.normalize(vision.mean_patches(pictures), dim=1)


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


@torch.inference_mode()
def patch_distances(
    references: Sequence[Picture], queries: Sequence[Picture], vision: VisionFeatures, space: TowerSpace | None = None
) -> list[float]:
    """For each query, the largest distance of one of its patches to the nearest patch of the references (after PatchCore,
    arXiv 2106.08265). Without a space, patches are standardised over the references, however few they are.
    """
    references_RPC = vision.patches(references).float()
    if space is None or not space.compares_patches:
        space = TowerSpace(patches=torch.stack([references_RPC.mean((0, 1)), references_RPC.std((0, 1)) + 1e-6]))
    known_XC = space.limited_patches(references_RPC).flatten(0, 1)  # the patches of all references in one list
    patches, width = references_RPC.shape[1:]
    # Of each query: its patches as they come, in fp32 and standardised, and their distances to all known ones
    together = max(1, PATCH_BYTES // (4 * patches * (3 * width + len(known_XC))))
    distances: list[float] = []
    for start in range(0, len(queries), together):
        chunk = queries[start : start + together]
        queries_QPC = space.limited_patches(vision.patches(chunk).float())
        nearest_QP = torch.cdist(queries_QPC.flatten(0, 1), known_XC).min(1).values.view(len(chunk), -1)
        distances += nearest_QP.max(1).values.tolist()
    return distances


@torch.inference_mode()
def patch_statistics(pictures: Sequence[Picture], vision: VisionFeatures) -> torch.Tensor:
    """Mean and deviation of the features of single patches over pictures, [2, C], on the CPU."""
    count, sums_2C = 0, torch.zeros(2, 1, dtype=torch.float64)
    for start in range(0, len(pictures), BATCH):
        patches_XC = vision.patches(pictures[start : start + BATCH]).flatten(0, 1).double().cpu()
        sums_2C = sums_2C + torch.stack([patches_XC.sum(0), patches_XC.square().sum(0)])
        count += len(patches_XC)
    mean_C, square_C = sums_2C / count
    return torch.stack([mean_C, (square_C - mean_C.square()).clamp_min(0).sqrt() + 1e-6]).float()
