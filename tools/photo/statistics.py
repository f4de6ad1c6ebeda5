"""Statistics of the photo base's tower over the training pictures: `lcl_adapter/photo/data/statistics.safetensors`.

    python -m tools.photo.statistics             # needs `make photos-data` and `lcl-adapter base build photo`; minutes on two cores

feature_mean, feature_deviation, logit_mean, logit_deviation: over the pictures of training classes, whole. key_directions,
key_deviation: the first principal directions of keys, and how far keys spread along each. key_scale: gives a key the length of a
word's embedding, on average. Classes for validation and evaluation are not read.
"""

from __future__ import annotations

import csv
import math

import torch
from safetensors.torch import save_file

from lcl_adapter.base.model import load_base
from lcl_adapter.base.vision import BATCH, VisionFeatures
from lcl_adapter.data.sources import Picture
from lcl_adapter.packaged import packaged, photo_data_folder
from lcl_adapter.photo.build import STATISTICS, class_names, directions, name_embeddings, whitening
from lcl_adapter.photo.tower import CLASSES

KEY_DIRECTIONS = 64  # docs/lab.md: the language model uses few of a key's directions, so those that tell classes apart get equal weight
SMALLEST = 1e-3  # of a deviation: a feature that is nearly always 0


def training_pictures() -> list[Picture]:
    with (photo_data_folder() / "train.csv").open(encoding="utf-8") as file:
        return [Picture(packaged("photo:train.zip"), row["image"]) for row in csv.DictReader(file) if row["split"] == "train"]


@torch.no_grad()
def raw_features(pictures: list[Picture]) -> torch.Tensor:
    """The tower's features of whole pictures, [N, C], not standardised."""
    base = load_base("photo")
    tower, vision = base.llava.model.vision_tower, VisionFeatures(base)
    parts = []
    for start in range(0, len(pictures), BATCH):
        parts.append(tower.feature_map(vision.pixels(pictures[start : start + BATCH])["pixel_values"]).mean((2, 3)))
        print(f"{start + len(parts[-1])} of {len(pictures)} pictures", flush=True)
    return torch.cat(parts)


@torch.no_grad()
def main() -> None:
    base = load_base("photo")
    features_NC = raw_features(training_pictures())
    logits_NK = base.llava.model.vision_tower.classifier(features_NC)
    statistics = {
        "feature_mean": features_NC.mean(0),
        "feature_deviation": features_NC.std(0) + SMALLEST,
        "logit_mean": logits_NK.mean(0),
        "logit_deviation": logits_NK.std(0) + SMALLEST,
    }
    embedding_VD = base.llava.get_input_embeddings().weight
    frame_KD = directions(name_embeddings(base.tokenizer, embedding_VD))
    keys_ND = ((logits_NK - statistics["logit_mean"]) / statistics["logit_deviation"] / math.sqrt(CLASSES)).double() @ frame_KD
    _, spread_D, directions_DD = torch.linalg.svd(keys_ND, full_matrices=False)
    statistics["key_directions"] = directions_DD[:KEY_DIRECTIONS].float()
    statistics["key_deviation"] = (spread_D[:KEY_DIRECTIONS] / math.sqrt(len(keys_ND))).float()
    keys_ND = keys_ND @ whitening(statistics)
    statistics["key_scale"] = (embedding_VD.norm(dim=-1).mean() / keys_ND.norm(dim=-1).mean()).float()
    save_file({name: value.contiguous() for name, value in statistics.items()}, STATISTICS)
    print(f"{len(features_NC)} pictures, {len(class_names())} names, key_scale {statistics['key_scale']:.3f}: {STATISTICS}")


if __name__ == "__main__":
    main()
