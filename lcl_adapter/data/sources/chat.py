"""One record of a conversation, as trainers write it -> its turns and its images.

    LLaVA                  {"image", "conversations": [{"from": "human" | "gpt", "value"}]}
    LLaMA-Factory          the same with "images", or {"messages": [{"role", "content"}], "images": [...]}
    ms-swift               {"messages", "images"}, or {"query", "response", "history"?, "images"}
    OpenAI                 {"messages": [{"role", "content": [{"type": "text" | "image_url", ...}]}]}

What is not read is refused by its key, so that no question loses its picture.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from lcl_adapter.data.sources.images import SUFFIXES
from lcl_adapter.data.sources.picture import Picture

IMAGE = "<image>"
IMAGE_KEYS = ("image", "images", "image_path", "image_paths", "img", "img_path")
PICTURES = frozenset(suffix.removeprefix(".") for suffix in SUFFIXES)
OTHER_MEDIA = frozenset({"mp4", "avi", "mov", "mkv", "webm", "wav", "mp3", "flac", "ogg"})
READ_KEYS = frozenset({*IMAGE_KEYS, "id", "conversations", "messages", "query", "response", "history", "system", "answers"})
OTHER_MARKS = ("<video>", "<audio>")
ASKS, ANSWERS = frozenset({"human", "user"}), frozenset({"gpt", "assistant", "model", "bot", "chatgpt"})
Image = str | bytes  # a name, or the file's bytes


class Turn(NamedTuple):
    """text: with ``<image>`` where an image belongs. asks: whether it is a question. role: as it was written."""

    text: str
    asks: bool
    role: str


def turns_of(record: Any) -> tuple[list[Turn], list[Image]]:
    """The turns of a record, and the images that stand in the turns themselves, in order. A system turn stands before the
    first question.

    Raises ValueError for turns that cannot be read, KeyError where there are none.
    """
    inline: list[Image] = []
    turns: list[Turn] = []
    system = ""
    for written in _written_turns(record):
        if not isinstance(written, dict):
            raise ValueError("a turn that is no object")
        role = str(written.get("from", written.get("role", "")))
        content = written["value"] if "value" in written else written.get("content")
        text = content if isinstance(content, str) else _text(content, inline)
        if "o>" in text and (mark := next((mark for mark in OTHER_MARKS if mark in text), "")):
            raise ValueError(f"{mark} in a turn: only images are read")
        if role == "system":
            if turns:
                raise ValueError("a system turn that is not the first")
            system = text.strip()
            continue
        if role not in ASKS | ANSWERS:
            raise ValueError(f"a turn of {role!r}; human, gpt, user, assistant and system are read")
        turns.append(Turn(f"{system}\n\n{text}" if system and not turns else text, role in ASKS, role))
    return turns, inline


def _written_turns(record: Any) -> Sequence[Any]:
    for key in ("conversations", "messages"):
        turns = record.get(key)
        if isinstance(turns, list):
            return turns
        if turns is not None:
            raise ValueError(f"`{key}` is no list")
    if "query" in record and "response" in record:
        history = record.get("history") or []
        pairs = [*history, [record["query"], record["response"]]]
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise ValueError("`history` is a list of pairs, question and answer")
        begin = [{"role": "system", "content": record["system"]}] if record.get("system") else []
        return begin + [turn for ask, answer in pairs for turn in ({"role": "user", "content": ask}, {"role": "assistant", "content": answer})]
    raise KeyError("conversations")


def _text(content: Any, inline: list[Image]) -> str:
    """A turn's text. Images among its parts are added to ``inline``, and marked."""
    if isinstance(content, str):
        return content
    if isinstance(content, int | float) and not isinstance(content, bool) and math.isfinite(content):
        return str(content)
    if not isinstance(content, list):
        raise ValueError(f"a turn's text is {content!r}, not of the form that is expected")
    text = ""
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in {"image", "image_url"}:
            given = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key)), None)
            if given is not None:
                inline.append(_image(given))
            text += IMAGE  # without an image of its own: the next one of the record's list
        else:
            raise ValueError(f"a part of type {kind!r} in a turn; text, image and image_url are read")
    return text


def images_of(record: Mapping[str, Any], inline: Sequence[Image] = ()) -> list[Image]:
    """The images under a record's own keys. inline: those that stand in its turns.

    Raises ValueError for several such keys with other images, and, where there is no image, for a key that is not read and
    names a picture; always for one that names a video or a sound.
    """
    lists = {
        key: [_image(one) for one in (value if isinstance(value, list) else [value])]
        for key, value in record.items()
        if key in IMAGE_KEYS and value and value == value  # NaN is unequal to itself
    }
    if len(lists) > 1 and len({tuple(one if isinstance(one, bytes) else PurePosixPath(one).name for one in images) for images in lists.values()}) > 1:
        raise ValueError(f"different images under {' and '.join(lists)}: keep one key")
    unread = OTHER_MEDIA if lists or inline else PICTURES | OTHER_MEDIA
    for key, value in record.items():
        if key not in READ_KEYS and (name := _file_in(value, unread)):
            raise ValueError(f"the key {key!r} names {name!r} and is not read; pictures are under {', '.join(IMAGE_KEYS[:3])}")
    return next(iter(lists.values()), [])


def _file_in(value: Any, suffixes: frozenset[str]) -> str:
    """The name of a file with one of these suffixes in a key's value; "" if there is none."""
    if value is None or isinstance(value, int | float):
        return ""
    for name in value if isinstance(value, list) else value.values() if isinstance(value, dict) else (value,):
        if isinstance(name, str) and name[-6:].rpartition(".")[2].lower() in suffixes and " " not in name.strip():
            return name
    return ""


def _image(value: Any) -> Image:
    """A name, or the bytes of a data URL. Raises ValueError for an address: nothing is fetched."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("url", "path", "image", "file_name") if value.get(key)), None)
    if not isinstance(value, str):
        raise ValueError(f"an image that is {value!r}: its name is expected")
    if value.startswith("data:"):
        header, comma, data = value.partition(",")
        try:
            return base64.b64decode(data, validate=False) if header.endswith(";base64") and comma else unquote_to_bytes(data)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"a data URL that is not base64 ({error})") from error
    if "://" in value and not value.startswith("file://"):
        raise ValueError(f"the image {value!r} is an address, and nothing is fetched: download it, and give its name")
    return value.removeprefix("file://")


def embedded(data: Image) -> Picture:
    """A picture whose bytes stand in the record."""
    assert isinstance(data, bytes)
    return Picture(Path(hashlib.sha256(data).hexdigest()[:16]), data=data)
