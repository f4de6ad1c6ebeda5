"""Boxes: from pixels or masks to text and back. Coordinates are relative to the square that the picture is padded to.

The text has Shikra's form (arXiv 2306.15195, and its published code): three decimals, no spaces,
``[0.123,0.456,0.789,0.987]``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageOps

from lcl_adapter.data.sources.base import Region
from lcl_adapter.data.sources.images import MAX_PIXELS, SIDEWAYS, open_image, orientation_of, read, read_bytes, upright_box
from lcl_adapter.data.sources.picture import ROUNDED, Picture, PixelBox
from lcl_adapter.errors import DataError

PATTERN = re.compile(r"\[\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*(?:[\];]|$)")


@dataclass(frozen=True)
class Box:
    """Corners from 0 to 1 on the padded square; x points to the right, y down."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def area(self) -> float:
        return max(0.0, self.x1 - self.x0) * max(0.0, self.y1 - self.y0)

    def text(self) -> str:
        return f"[{self.x0:.3f},{self.y0:.3f},{self.x1:.3f},{self.y1:.3f}]"

    def iou(self, other: Box) -> float:
        """Intersection over union, 0 to 1."""
        common = Box(max(self.x0, other.x0), max(self.y0, other.y0), min(self.x1, other.x1), min(self.y1, other.y1)).area
        union = self.area + other.area - common
        return common / union if union > 0 else 0.0


def parse(text: str) -> Box | None:
    """The first box in a text, or None."""
    match = PATTERN.search(text)
    return Box(*(float(v) for v in match.groups())) if match else None


def on_square(box: PixelBox, size: tuple[int, int]) -> Box:
    """A pixel box of a picture of ``size`` (width, height), on the padded square.

    The picture is in the middle of the square.
    """
    width, height = size
    side = max(size)
    left, top = (side - width) / 2, (side - height) / 2
    return Box((box[0] + left) / side, (box[1] + top) / side, (box[2] + left) / side, (box[3] + top) / side)


def region_box(region: Region) -> Box:
    """A region as a box on the padded square. For a mask, the smallest box around it.

    Raises DataError for a box out of range or of zero size, an empty mask, or a mask of another size than the picture.
    """
    stored, orientation = stored_size(region.picture)
    width, height = picture_size(region.picture)
    box = None if region.box is None else upright_box(region.box, region.picture, stored, orientation)
    if box is None:
        assert region.mask is not None
        lefts, tops, rights, bottoms = zip(*(mask_box(mask, (width, height)) for mask in (region.mask, *region.further_masks)), strict=True)
        box = min(lefts), min(tops), max(rights), max(bottoms)
    x0, y0, x1, y1 = box
    x1, y1 = (edge if edge < most or edge > most + ROUNDED else float(most) for edge, most in ((x1, width), (y1, height)))
    box = (x0, y0, x1, y1)
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise DataError(f"{region.picture}: the box {list(box)} is out of range; x runs from 0 to {width}, y from 0 to {height}, x0 < x1, y0 < y1.")
    return on_square(box, (width, height))


def picture_size(picture: Picture) -> tuple[int, int]:
    """Width and height after the EXIF rotation, from the file's header. Raises DataError for a file that is no image."""
    (width, height), orientation = stored_size(picture)
    return (height, width) if orientation in SIDEWAYS else (width, height)


@lru_cache(maxsize=65536)
def stored_size(picture: Picture) -> tuple[tuple[int, int], int]:
    """Width and height as stored, and the EXIF orientation, from the file's header.

    Raises DataError for a file that is no image.
    """
    try:
        with open_image(read_bytes(picture)) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise DataError(f"{picture}: {opened.width} x {opened.height} pixels is over the bound of {MAX_PIXELS:,}. Scale it down first.")
            return opened.size, orientation_of(opened)
    except (OSError, MemoryError, Image.DecompressionBombError) as error:
        raise DataError(f"{picture}: not an image that can be read ({error}).") from error


@lru_cache(maxsize=65536)
def mask_box(mask: Picture, size: tuple[int, int]) -> PixelBox:
    """The smallest box around all pixels of a mask that are not black.

    Raises DataError for an empty mask or another size.
    """
    image = ImageOps.grayscale(read(mask))
    if image.size != size:
        raise DataError(f"{mask}: the mask is {image.width} x {image.height} pixels, its picture {size[0]} x {size[1]}.")
    inside = np.asarray(image) > 0
    if not inside.any():
        raise DataError(f"{mask}: the mask is all black: it shows no defect.")
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
