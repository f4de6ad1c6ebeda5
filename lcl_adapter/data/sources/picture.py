"""A picture by reference: where it is, and what is done to it when it is read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lcl_adapter.reading import brief

PixelBox = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the upright picture
PICTURE_NAME = re.compile(
    r"(?:(.*?\.zip)!)?(.*?)(?: \(cut out at ([\de.+, -]+)(?: of (\d+) x (\d+))?\))?(?: \(view (\d+)\))?(?: \(turned (\d)\))?(?: \(tile ([\dx:]+)\))?"
    r"(?: \(white ([\de.+-]+)\))?(?: \(orientation (\d)\))?",
    re.DOTALL | re.IGNORECASE,
)


@dataclass(frozen=True)
class Picture:
    """One image by reference.

    path: the file, or the zip archive that holds it.
    member: the name inside the archive, None for a plain file.
    artist: who drew or photographed it, if known. An episode shows support pictures by other artists than the query's.
    view: 0 is the image as it is; k > 0 is its k-th further view (other background, scale, rotation, light), computed
    when it is read.
    turned: quarter turns counter-clockwise, applied first.
    tile: one piece of the picture, (rows, columns, place); places are counted from 0 along the rows.
    data: the image file's bytes, if they are in no file; ``path`` is then only a unique name.
    crop: the box that is cut out of the upright picture, before anything else is done to it.
    listed_size: width and height by the list that has its boxes, which may be of the picture as it is stored, not yet upright.
    white: the value that is white, of a picture with more than 8 bits; None: by its own values (``depth``).
    blend: another picture whose features are mixed into this one's, and its weight, for a class without end.
    tokens: how many a pooled picture has in the row that it stands in; None for all of them. Files know nothing of it.
    orientation: EXIF's number of what is done to it last of all: 1 for nothing, 2 for left and right exchanged, 3 for half a turn.
    """

    path: Path
    member: str | None = None
    artist: str | None = None
    view: int = 0
    turned: int = 0
    tile: tuple[int, int, int] | None = None
    data: bytes | None = field(default=None, repr=False, compare=False)
    blend: tuple[Picture, float] | None = None
    white: float | None = None
    crop: PixelBox | None = None
    listed_size: tuple[int, int] | None = None
    tokens: int | None = None
    orientation: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.path, str):  # Picture("photo.png") is convenient in a script
            object.__setattr__(self, "path", Path(self.path))

    def __str__(self) -> str:
        name = f"{self.path}!{self.member}" if self.member else str(self.path)
        if self.crop:
            name += " (cut out at {:g}, {:g}, {:g}, {:g}".format(*self.crop) + (" of {} x {})".format(*self.listed_size) if self.listed_size else ")")
        name += (f" (view {self.view})" if self.view else "") + (f" (turned {self.turned})" if self.turned else "")
        name += (" (tile {}x{}:{})".format(*self.tile) if self.tile else "") + (f" (white {self.white:.12g})" if self.white is not None else "")
        name += f" (orientation {self.orientation})" if self.orientation > 1 else ""
        return name + (f" (blended with {self.blend[1]:.2f} of {self.blend[0]})" if self.blend else "")

    @classmethod
    def parse(cls, name: str) -> Picture:
        """The inverse of ``str``, for a picture that is no blend. ``artist`` is not in a name."""
        archive, inner, crop, width, height, view, turned, tile, white, orientation = PICTURE_NAME.fullmatch(name).groups()  # type: ignore[union-attr]
        return cls(
            Path(archive or inner),
            inner if archive else None,
            view=int(view or 0),
            turned=int(turned or 0),
            tile=tuple(int(n) for n in re.findall(r"\d+", tile)) if tile else None,  # type: ignore[arg-type]
            crop=tuple(float(n) for n in crop.split(", ")) if crop else None,  # type: ignore[arg-type]
            listed_size=(int(width), int(height)) if width else None,
            white=float(white) if white else None,
            orientation=int(orientation or 1),
        )

    def cropped(self, box: PixelBox) -> Picture:
        """What is inside a box of the same picture, to tenths of a pixel."""
        x0, y0, x1, y1 = (round(edge, 1) for edge in box)
        return replace(self, crop=(x0, y0, x1, y1))

    def in_view(self, view: int) -> Picture:
        """The same picture in its ``view``-th further view."""
        return replace(self, view=view)

    def oriented(self, orientation: int) -> Picture:
        """The same picture in another orientation. 1 is as it was."""
        blend = self.blend and (self.blend[0].oriented(orientation), self.blend[1])
        return replace(self, orientation=orientation, blend=blend)


ROUNDED = 1.0  # pixels by which a box may be outside: tools round


def pixel_box(value: Any) -> PixelBox:
    """(x0, y0, x1, y1) in pixels, from a list of four numbers or a text with four numbers.

    Raises ValueError for a box of zero size, or with a corner below 0. The picture's size is checked when it is read.
    """
    numbers = value if isinstance(value, list) else str(value).replace(",", " ").split()
    if len(numbers) != 4:
        raise ValueError(f"the box {brief(value)} is not four numbers, x0 y0 x1 y1 in pixels")
    try:
        x0, y0, x1, y1 = (float(v) for v in numbers)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"the box {brief(value)} is not four numbers, x0 y0 x1 y1 in pixels") from None
    x0, y0 = (0.0 if -ROUNDED < edge < 0 else edge for edge in (x0, y0))
    if not (0 <= x0 < x1 and 0 <= y0 < y1):
        raise ValueError(f"the box {brief(value)} is out of range: x0 < x1 and y0 < y1 in pixels, none below 0")
    return x0, y0, x1, y1
