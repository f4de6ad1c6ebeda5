"""Pictures with more than 8 bits: which value is white.

A camera writes 10, 12 or 14 bits into a file of 16, and software writes floats from 0 to 1. Read with the file's range, such
pictures are nearly black. A scale for each picture would change the contrast between a reference and a query. So all pictures of
a source have one scale: the file's own depth where it says one, else the smallest usual range that holds the values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from lcl_adapter.data.sources.base import ClassPool, InspectionPool, PartCategory, Pool, Specimen, pictures_of
from lcl_adapter.data.sources.images import DEEP_MODES, MAX_PIXELS, open_image, read_bytes, white_of
from lcl_adapter.data.sources.picture import Picture
from lcl_adapter.errors import DataError

DEEP_SUFFIXES = (".png", ".tif", ".tiff", ".pgm", ".ppm", ".pnm")  # formats that can hold more than 8 bits
SAMPLED = 48  # pictures of a source whose values are read


def common_white(pictures: Iterable[Picture]) -> float | None:
    """The value that is white in all these pictures; None where none of those that are looked at has more than 8 bits."""
    whites = [white for picture in _sample([p for p in pictures if _may_be_deep(p)]) if (white := _white(picture)) is not None]
    return max(whites, default=None)


def _may_be_deep(picture: Picture) -> bool:
    if picture.data is not None:
        return not picture.data.startswith(b"\xff\xd8")
    return (picture.member or picture.path.name).lower().endswith(DEEP_SUFFIXES) or "." not in (picture.member or picture.path.name)


def _sample(pictures: Sequence[Picture]) -> list[Picture]:
    step = max(1, len(pictures) // SAMPLED)
    return list(pictures[::step][:SAMPLED])


def _white(picture: Picture) -> float | None:
    """None for a picture of 8 bits, and for one that cannot be read: whoever shows it reports that."""
    try:
        with open_image(read_bytes(picture)) as image:
            if image.mode not in DEEP_MODES or image.width * image.height > MAX_PIXELS:
                return None
            return white_of(image, np.asarray(image))
    except (DataError, OSError, MemoryError, Image.DecompressionBombError):
        return None


def with_white(pool: Pool, white: float | None) -> Pool:
    """The pool with one scale for all its pictures. white: the recipe's own; None looks at some pictures.

    Pools of questions stay as they are: their pictures are read late, and each has a scale of its own.
    """
    if not isinstance(pool, ClassPool | InspectionPool):
        return pool
    white = common_white(pictures_of(pool)) if white is None else white
    if white is None:
        return pool

    def scaled(pictures: Iterable[Picture]) -> tuple[Picture, ...]:
        return tuple(replace(picture, white=white) for picture in pictures)

    if isinstance(pool, ClassPool):
        return replace(pool, classes=tuple(replace(one, pictures=scaled(one.pictures)) for one in pool.classes))

    def specimens(some: Iterable[Specimen]) -> tuple[Specimen, ...]:
        return tuple(replace(one, picture=replace(one.picture, white=white)) for one in some)

    def category(one: PartCategory) -> PartCategory:
        defects = {kind: specimens(photos) for kind, photos in one.defects.items()}
        return replace(one, references=scaled(one.references), good=specimens(one.good), defects=defects)

    return replace(pool, categories=tuple(map(category, pool.categories)))
