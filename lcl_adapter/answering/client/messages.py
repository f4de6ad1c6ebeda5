"""Turns -> OpenAI's messages, with images as data URLs: the same conversation that ``predict`` reads."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN

from lcl_adapter.answering.sent_images import data_url
from lcl_adapter.base.families import IMAGE
from lcl_adapter.base.vision import squared
from lcl_adapter.data.conversations import Turn
from lcl_adapter.data.sources import Picture, read_image
from lcl_adapter.data.sources.images import REDUCING_GAP, is_plain, is_whole, open_image, read_bytes

LARGEST_SENT, MOST_PIXELS = 8 * 2**20, 40_000_000  # bytes and pixels of an image; this project's server refuses 10 MiB
REDUCED_SIDE = 1600  # pixels of a larger one when it is sent: at most 7.7 MB, and more than towers read


def image_of(picture: Picture, pad: bool = False) -> str:
    """A data URL of the pixels that training reads.

    pad: make the picture square first, in CLIP's mean colour, for servers that would crop it.

    A plain upright RGB file is sent unchanged. Anything else is sent as PNG, because servers differ in how they rotate a
    photo and in the background of transparent pixels. One that is too large for a server is sent reduced. Raises
    DataError for a broken picture.
    """
    side = None
    if is_whole(picture) and not pad:
        data = read_bytes(picture)
        try:
            with open_image(data) as opened:
                if opened.width * opened.height > MOST_PIXELS:
                    side = REDUCED_SIDE // REDUCING_GAP + 1
                if len(data) <= LARGEST_SENT and side is None and is_plain(opened):
                    opened.load()
                    return data_url(data)
        except (OSError, MemoryError, Image.DecompressionBombError):  # read_image below raises a clear one
            pass
    image = read_image(picture, side)
    image = squared(image, OPENAI_CLIP_MEAN) if pad else image
    png = b"" if side or image.width * image.height > MOST_PIXELS else _png(image)
    if not png or len(png) > LARGEST_SENT:
        image.thumbnail((REDUCED_SIDE, REDUCED_SIDE), Image.Resampling.BICUBIC)
        png = _png(image)
    return data_url(png)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def to_messages(turns: Sequence[Turn], pad: bool = False) -> list[dict[str, Any]]:
    """One message for each turn. An image comes before its text; several stand where the text has ``<image>``.

    Raises DataError.
    """
    return [{"role": turn.role, "content": _content(turn, pad)} for turn in turns]


def _content(turn: Turn, pad: bool) -> str | list[dict[str, Any]]:
    images = [{"type": "image_url", "image_url": {"url": image_of(picture, pad)}} for picture in turn.pictures]
    if not images:
        return turn.text
    if not turn.further:
        return [images[0], {"type": "text", "text": turn.text}]
    parts: list[dict[str, Any]] = []
    remaining = iter(images)
    for number, text in enumerate(turn.text.split(IMAGE)):
        if number:
            parts.append(next(remaining))
        if text.strip():
            parts.append({"type": "text", "text": text.strip()})
    return parts
