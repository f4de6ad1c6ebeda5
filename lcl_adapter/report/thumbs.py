"""Small pictures that are embedded in a page, so that the page is one file."""

from __future__ import annotations

import base64
import io
from functools import lru_cache

from PIL import Image

from lcl_adapter.data.sources import Picture, read_image
from lcl_adapter.errors import DataError

SIDE = 96
GREY = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'%3E%3Crect width='9' height='9' fill='%23ccc'/%3E%3C/svg%3E"


@lru_cache(maxsize=256)
def thumbnail(picture: Picture, side: int = SIDE, padded: bool = True) -> Image.Image:
    """The picture scaled to fit a square, and padded to a white one. A smaller picture is not enlarged."""
    image = read_image(picture, side)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    if not padded:
        return image
    page = Image.new("RGB", (side, side), "white")
    page.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return page


@lru_cache(maxsize=2048)
def data_url(picture: Picture, side: int = SIDE, padded: bool = True) -> str:
    """A thumbnail as a WebP data URL. Raises DataError for a broken picture."""
    buffer = io.BytesIO()
    thumbnail(picture, side, padded).save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def url_or_grey(picture: Picture, side: int = SIDE, padded: bool = True) -> str:
    """:func:`data_url`, or a grey square if the file can no longer be read."""
    try:
        return data_url(picture, side, padded)
    except DataError:
        return GREY
