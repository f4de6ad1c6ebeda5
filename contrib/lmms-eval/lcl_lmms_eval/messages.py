"""lmms-eval's messages -> turns, as the predictor reads them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile

from lcl_adapter.base.families import IMAGE
from lcl_adapter.data.conversations import Turn
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import RequestError


def turns_of(messages: Sequence[dict[str, Any]], pictures: dict[str, Picture]) -> list[Turn]:
    """lmms-eval's messages as turns. System texts go before the next user text, for LLaVA's prompts have one fixed system text.

    pictures: those that were read before, by their contents. Raises RequestError: a video, a sound, an order that is no conversation.
    """
    turns: list[Turn] = []
    instructions: list[str] = []
    for message in messages:
        parts = message["content"] if isinstance(message["content"], list) else [{"type": "text", "text": message["content"]}]
        texts, shown = [], []
        for part in parts:
            if part["type"] == "text":
                texts.append(part["text"])
            elif part["type"] == "image":
                shown.append(_picture(part["url"], pictures))
                texts.append(IMAGE)
            else:
                raise RequestError(f"lcl-adapter reads images and text; the task has {part['type']}.")
        if message["role"] == "system":
            instructions += texts
            continue
        if message["role"] != ("assistant" if len(turns) % 2 else "user"):
            raise RequestError("the task's messages are not user and assistant in turn.")
        if message["role"] == "user":
            texts, instructions = [*instructions, *texts], []
        if len(shown) == 1:
            texts = [text for text in texts if text != IMAGE]  # LLaVA was trained with a single image before the text
        first, further = (shown[0], tuple(shown[1:])) if shown else (None, ())
        turns.append(Turn(message["role"], "\n".join(texts), first, further=further))
    if not turns or turns[-1].role != "user":
        raise RequestError("the task's last message is not the user's, so there is no question.")
    return turns


def _picture(image: Any, pictures: dict[str, Picture]) -> Picture:
    """An image that stands in a file is read from there, at the size that the model needs; another by its pixels."""
    if isinstance(image, str | Path):
        return Picture(Path(image))
    if isinstance(image, ImageFile.ImageFile) and _is_whole_file(image):
        return Picture(Path(str(image.filename)))
    image = image.convert("RGB")
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    if digest not in pictures:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        pictures[digest] = Picture(Path(f"image-{digest}.png"), data=buffer.getvalue())
    return pictures[digest]


def _is_whole_file(image: ImageFile.ImageFile) -> bool:
    """Whether the opened image still is what its file holds; ``thumbnail``, for one, changes it in place."""
    file = Path(str(getattr(image, "filename", None) or ""))
    if not file.is_file():
        return False
    with Image.open(file) as stored:
        return (stored.size, stored.mode) == (image.size, image.mode)
