"""LLaVA's training JSON, as a list or as JSON Lines:
``{"id", "image"?, "conversations": [{"from": "human"|"gpt", "value"}], "answers"?}``; and the records of other trainers (``chat``).

There is one ``<image>`` for each image, in order. If a turn has one ``<image>``, it is moved to the front, as upstream
does. If a turn has several, each stays at its place in the text.

``answers`` is not LLaVA's. It lists all accepted answers to the last question, for a suite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lcl_adapter.data.sources import chat
from lcl_adapter.data.sources.base import Dialogue, Exchange, QuestionPool, check_faults
from lcl_adapter.data.sources.encodings import nfc
from lcl_adapter.data.sources.picture import Picture
from lcl_adapter.data.sources.records import Records, read_dialogues
from lcl_adapter.data.sources.tree import check_inside, on_disk, relative_name
from lcl_adapter.reading import id_text
from lcl_adapter.recipe.sources import QuestionReader


class LlavaJson(QuestionReader):
    """``type: llava-json``. LLaVA's training JSON (a list or JSON Lines); ``images`` is a folder or a zip archive. Leave it out
    where no record has an image.

    limit: use only this many records, from the start of the file.
    """

    type: Literal["llava-json"]
    file: Path
    images: Path | None = None
    limit: int | None = Field(None, ge=1)

    def open(self, name: str, min_pictures: int = 1) -> QuestionPool:
        return read_llava_json(self.file, self.images, name, self.on_fault, self.limit)


def read_llava_json(file: Path, images: Path | None, name: str = "", on_fault: str = "refuse", limit: int | None = None) -> QuestionPool:
    """Read the records. Images are referred to under ``images``, a folder or a zip archive, and not opened; None where there
    are none.

    on_fault: "refuse" raises one DataError that lists the first faults; "skip" leaves bad records out and counts them.
    limit: use only this many records, from the start. A record that occurs twice, byte for byte, is a fault.
    """
    records = Records(file)
    archive = images is not None and images.suffix.lower() == ".zip"
    parse = partial(_dialogue, records=records, images=images, archive=archive)
    dialogues, faults = read_dialogues(records, parse, limit=limit)
    return check_faults(QuestionPool(name or file.stem, dialogues, {}, tuple(faults), records.sha256), on_fault)


def picture(images: Path, archive: bool, name: str) -> Picture:
    """A record's image. Raises DataError for a name that leads out of the folder."""
    name = name if archive else relative_name(images, name)
    check_inside(name, str(images))
    return Picture(images, nfc(name)) if archive else Picture(images / on_disk(images, name))


def _dialogue(record: Any, number: int, records: Records, images: Path | None, archive: bool) -> Dialogue:
    turns, inline = chat.turns_of(record)
    listed = [*chat.images_of(record, inline), *inline]
    if images is None and any(isinstance(one, str) for one in listed):
        raise ValueError("it has an image, and the source has no `images`: set the folder or archive of its images")
    pictures = [picture(images, archive, one) if images is not None and isinstance(one, str) else chat.embedded(one) for one in listed]
    *earlier, last = exchanges_of(turns, pictures, marked="image" in record)
    accepted = record.get("answers") or []
    if isinstance(accepted, str) or not all(isinstance(answer, str) and answer.strip() for answer in accepted):
        raise ValueError("`answers` is a list of texts, all accepted answers to the last question")
    last = replace(last, answers=tuple(accepted)) if accepted else last
    return Dialogue((*earlier, last), record_name(records, number, record))


def exchanges_of(turns: Sequence[chat.Turn], pictures: Sequence[Picture], marked: bool = True) -> tuple[Exchange, ...]:
    """Questions and answers with their images. Raises ValueError where they do not fit each other.

    marked: whether each image must have its ``<image>``, as in LLaVA's own form. If not, images of a record without any
    are of its first question, as in ms-swift.
    """
    if len(turns) < 2 or len(turns) % 2:
        raise ValueError(f"{len(turns)} turns; pairs of human and gpt are expected")
    exchanges: list[Exchange] = []
    used = 0
    marked = marked or any(chat.IMAGE in turn.text for turn in turns if turn.asks)
    for human, gpt in zip(turns[::2], turns[1::2], strict=True):
        if not human.asks or gpt.asks:
            raise ValueError(f"turns must alternate human, gpt; here {human.role!r}, {gpt.role!r}")
        count = human.text.count(chat.IMAGE) if marked else 0 if exchanges else len(pictures)
        if used + count > len(pictures):
            raise ValueError(f"more <image> than its {len(pictures)} images")
        own = pictures[used : used + count]
        used += count
        if chat.IMAGE in gpt.text:
            raise ValueError("an answer with <image> in it; images belong to the questions")
        if not gpt.text.strip():
            raise ValueError("an empty answer: nothing to learn")
        text = human.text if marked else chat.IMAGE * count + human.text
        exchanges.append(
            Exchange((text if count > 1 else text.replace(chat.IMAGE, "")).strip(), gpt.text.strip(), own[0] if own else None, tuple(own[1:]))
        )
    if used < len(pictures):
        raise ValueError(f"{len(pictures)} images, {used} <image>")
    return tuple(exchanges)


def record_name(records: Records, number: int, record: Any) -> str:
    """The sample's name: file, line or record, and its id.

    Unlike ``describe_record``, it does not count lines, which is slow.
    """
    identity = f" (id {id_text(record['id'])})" if isinstance(record, dict) and "id" in record else ""
    return f"{records.file}{records.place(number)}{identity}"
