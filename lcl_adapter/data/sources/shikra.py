"""Shikra's JSON Lines (arXiv 2306.15195): referring boxes, questions, captions.

rec       {"img_path", "expression", "bbox": [x0, y0, x1, y1] in pixels}
vqa       {"image_path", "question", "annotation": {"multiple_choice_answer"}}
caption   {"img_path", "caption"}
gqa       {"imageId", "question", "answer"}
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lcl_adapter.data.sources.base import ClassPool, Dialogue, Exchange, Fault, PictureClass, QuestionPool, Region, check_faults
from lcl_adapter.data.sources.llava_json import picture, record_name
from lcl_adapter.data.sources.picture import Picture, PixelBox, pixel_box
from lcl_adapter.data.sources.records import Records, describe_record, read_dialogues, unreadable
from lcl_adapter.errors import DataError
from lcl_adapter.reading import brief
from lcl_adapter.recipe.sources import ClassReader, FileReader, QuestionReader
from lcl_adapter.recipe.wording import phrase

CAPTION = "Describe the image in one sentence."


class Shikra(QuestionReader):
    """``type: shikra``. Shikra's JSON Lines of one kind; ``rec`` asks for a box as text."""

    type: Literal["shikra"]
    file: Path
    images: Path
    kind: Literal["rec", "vqa", "gqa", "caption"] = "rec"
    templates: Path | None = None
    limit: int | None = Field(None, ge=1)

    def open(self, name: str, min_pictures: int = 1) -> QuestionPool:
        return read_shikra(self.file, self.images, self.kind, name, self.on_fault, self.limit, self.templates)


class ShikraBoxes(ClassReader, FileReader):
    """``type: shikra-boxes``. Shikra's REC records as classes with boxes: records of one expression are one class."""

    type: Literal["shikra-boxes"]
    file: Path
    images: Path

    def open(self, name: str, min_pictures: int = 1) -> ClassPool:
        return read_shikra_classes(self.file, self.images, name, self.on_fault, min_pictures)


def read_shikra(
    file: Path, images: Path, kind: str, name: str = "", on_fault: str = "refuse", limit: int | None = None, templates: Path | None = None
) -> QuestionPool:
    """One question a record.

    A box becomes text later, when the picture's size is read; a box that can never be valid is a fault.
    """
    records = Records(file)
    archive = images.suffix.lower() == ".zip"
    parse = partial(_parse, records=records, images=images, archive=archive, kind=kind, templates=templates)
    dialogues, faults = read_dialogues(records, parse, limit=limit)
    return check_faults(QuestionPool(name or file.stem, dialogues, {}, tuple(faults), records.sha256), on_fault)


def _parse(record: Any, number: int, records: Records, images: Path, archive: bool, kind: str, templates: Path | None) -> Dialogue:
    match kind:
        case "rec":
            image = picture(images, archive, record["img_path"])
            words = phrase("rec", templates, number).filled(thing=record["expression"])
            exchange = Exchange(words.query, "", image, region=Region(image, pixel_box(record["bbox"])))
        case "vqa":
            exchange = Exchange(record["question"], record["annotation"]["multiple_choice_answer"], picture(images, archive, record["image_path"]))
        case "gqa":
            exchange = Exchange(record["question"], record["answer"], picture(images, archive, f"{record['imageId']}.jpg"))
        case _:
            exchange = Exchange(CAPTION, record["caption"], picture(images, archive, record["img_path"]))
    return Dialogue((exchange,), record_name(records, number, record))


def read_shikra_classes(file: Path, images: Path, name: str = "", on_fault: str = "refuse", min_pictures: int = 1) -> ClassPool:
    """Referring boxes as classes, for few-shot detection: all records of one expression are one class."""
    records = Records(file)
    faults: list[Fault] = []
    archive = images.suffix.lower() == ".zip"
    boxes: dict[str, dict[Picture, PixelBox]] = {}  # expression -> picture -> box
    for number in range(len(records)):
        try:
            record = records[number]
            expression = str(record["expression"]).strip().lower()
            boxes.setdefault(expression, {})[picture(images, archive, record["img_path"])] = pixel_box(record["bbox"])
        except DataError as error:
            faults.append(unreadable(records, number, error))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            faults.append(Fault("bad record", f"{describe_record(records, number)}: {type(error).__name__} {brief(error)}"))
    enough = {n: b for n, b in boxes.items() if len(b) >= min_pictures}
    classes = tuple(PictureClass(n, tuple(b), boxes=tuple(b.values())) for n, b in sorted(enough.items()))
    skipped = {f"expression with fewer than {min_pictures} pictures": len(boxes) - len(enough)} if len(enough) < len(boxes) else {}
    return check_faults(ClassPool(name or file.stem, classes, skipped, tuple(faults)), on_fault)
