"""Small pictures that are embedded in a page, so that the page is one file."""

from __future__ import annotations

import base64
import io
from functools import lru_cache

from PIL import Image

from lcl_adapter.data.sources import Picture, read_image

SIDE = 96


@lru_cache(maxsize=2048)
def thumbnail(picture: Picture, side: int = SIDE) -> Image.Image:
    """The picture scaled to fit a white square."""
    image = read_image(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    page = Image.new("RGB", (side, side), "white")
    page.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return page


@lru_cache(maxsize=2048)
def data_url(picture: Picture) -> str:
    """A thumbnail as a WebP data URL. Raises DataError for a broken picture."""
    buffer = io.BytesIO()
    thumbnail(picture).save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
