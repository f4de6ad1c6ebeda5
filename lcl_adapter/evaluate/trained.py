"""Photos of the classes that an adapter was trained on: what varies among those of one class says little about which class it is.

Shapes: N photos of a class, C width of a patch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.mixture import open_options
from lcl_adapter.data.sources import ClassPool, InspectionPool, Picture, fault_of
from lcl_adapter.errors import DataError
from lcl_adapter.randomness import generator
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.sources import QuestionOptions, SourceOptions
from lcl_adapter.terminal import console

CLASSES = 256  # of a source; with all 721 of recipes/photo.yaml, nothing is judged better (docs/lab.md)
PHOTOS = 4  # of a class


def trained_features(recipe: Recipe, vision: VisionFeatures) -> list[torch.Tensor]:
    """The tower's features [N, C] of photos of some classes of every training source, of parts the good ones.

    Broken photos are left out and printed, and so is a source that is no longer there.
    """
    used = {name for _, shares in recipe.phases() for name, share in shares.items() if share > 0}
    features: list[torch.Tensor] = []
    for name, options in recipe.sources.items():
        if name in used and not isinstance(options, QuestionOptions):
            features += [_features(own, vision) for own in _photos(name, options, recipe.train.seed)]
    return features


def _photos(name: str, options: SourceOptions, seed: int) -> Iterator[list[Picture]]:
    """Photos of each chosen class of one source."""
    try:
        pool = open_options(name, options)
    except DataError as error:
        _left_out(f"the classes of sources.{name}: {error}")
        return
    classes: list[tuple[Picture, ...]] = []
    if isinstance(pool, ClassPool):
        classes = [one.pictures for one in pool.classes]
    elif isinstance(pool, InspectionPool):
        classes = [(*part.references, *(specimen.picture for specimen in part.good)) for part in pool.categories]
    rng = generator("compared", seed, name)
    for index in rng.permutation(len(classes))[:CLASSES].tolist():
        own = classes[index]
        yield [own[place] for place in rng.permutation(len(own))[:PHOTOS].tolist()]


def _features(photos: list[Picture], vision: VisionFeatures) -> torch.Tensor:
    """The features of those that can be read."""
    try:
        return vision.mean_patches(photos)
    except DataError:  # a photo is read once, unless one of them is broken
        faults = {photo: fault_of(photo) for photo in photos}
    for fault in filter(None, faults.values()):
        _left_out(fault)
    readable = [photo for photo, fault in faults.items() if fault is None]
    return vision.mean_patches(readable) if readable else torch.empty(0, 0)


def _left_out(what: str) -> None:
    console.print(f"judgement: left out: {what}", style="yellow", markup=False, highlight=False)
