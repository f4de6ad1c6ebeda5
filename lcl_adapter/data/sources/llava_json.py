"""LLaVA's training JSON, as a list or as JSON Lines: ``{"id", "image"?, "conversations": [{"from": "human"|"gpt", "value"}]}``.

One ``<image>`` an image, in order. A lone ``<image>`` anywhere in its turn is moved to the front, as upstream does; where a
turn has several, each stays where it stands in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lcl_adapter.data.sources.base import Dialogue, Exchange, Picture, QuestionPool, check_faults
from lcl_adapter.data.sources.records import Records, dialogues
from lcl_adapter.data.sources.tree import check_inside
from lcl_adapter.recipe.sources import QuestionReader

MARK = "<image>"


class LlavaJson(QuestionReader):
    """``type: llava-json``. LLaVA's training JSON (a list or JSON Lines); ``images`` is a folder or a zip archive.

    limit: use only this many records, from the start of the file.
    """

    type: Literal["llava-json"]
    file: Path
    images: Path
    limit: int | None = Field(None, ge=1)

    def open(self, name: str, min_pictures: int = 1) -> QuestionPool:
        return read_llava_json(self.file, self.images, name, self.on_fault, self.limit)


def read_llava_json(file: Path, images: Path, name: str = "", on_fault: str = "refuse", limit: int | None = None) -> QuestionPool:
    """Read the records; images are looked up under ``images``, a folder or a zip archive, and not opened.

    ``on_fault``: "refuse" raises one DataError that lists the first faults; "skip" leaves bad records out and counts
    them. ``limit`` takes the first records only. A record that is there twice, word for word, is a fault.
    """
    records = Records(file)
    archive = images.suffix.lower() == ".zip"
    parse = partial(_dialogue, records=records, images=images, archive=archive)
    found, faults = dialogues(records, parse, limit=limit)
    return check_faults(QuestionPool(name or file.stem, found, {}, tuple(faults), records.sha256), on_fault)


def picture(images: Path, archive: bool, name: str) -> Picture:
    """A record's image. Raises DataError for a name that climbs out."""
    check_inside(name, str(images))
    return Picture(images, name) if archive else Picture(images / name)


def _dialogue(record: Any, number: int, records: Records, images: Path, archive: bool) -> Dialogue:
    listed = record.get("image") or []
    pictures = [picture(images, archive, p) for p in ([listed] if isinstance(listed, str) else list(listed))]
    return Dialogue(exchanges_of(record["conversations"], pictures), named_once(records, number, record))


def exchanges_of(turns: Any, pictures: Sequence[Picture]) -> tuple[Exchange, ...]:
    """LLaVA's ``conversations`` with their images. Raises ValueError, KeyError, TypeError for what is none."""
    if len(turns) < 2 or len(turns) % 2:
        raise ValueError(f"{len(turns)} turns; pairs of human and gpt are expected")
    exchanges: list[Exchange] = []
    used = 0
    for human, gpt in zip(turns[::2], turns[1::2], strict=True):
        if human["from"] != "human" or gpt["from"] != "gpt":
            raise ValueError(f"turns must alternate human, gpt; here {human['from']!r}, {gpt['from']!r}")
        marks = human["value"].count(MARK)
        if used + marks > len(pictures):
            raise ValueError(f"more <image> than its {len(pictures)} images")
        shown = pictures[used : used + marks]
        used += marks
        if MARK in gpt["value"]:
            raise ValueError("an answer with <image> in it; images belong to the questions")
        if not gpt["value"].strip():
            raise ValueError("an empty answer: nothing to learn")
        text = human["value"] if marks > 1 else human["value"].replace(MARK, "")
        exchanges.append(Exchange(text.strip(), gpt["value"].strip(), shown[0] if shown else None, tuple(shown[1:])))
    if used < len(pictures):
        raise ValueError(f"{len(pictures)} images, {used} <image>")
    return tuple(exchanges)


def named_once(records: Records, number: int, record: Any) -> str:
    """The sample's name, without counting lines where that takes long: file, line or record, its id."""
    told = f" (id {record['id']!r})" if isinstance(record, dict) and "id" in record else ""
    return f"{records.file}{records.place(number)}{told}"
