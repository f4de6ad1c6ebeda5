"""Questions with short answers: LLaVA's question and answer JSON Lines, VQAv2, POPE.

LLaVA   {"question_id", "image", "text", "category"?}; answers {"question_id", "text"} in a file of their own
VQAv2   {"questions": [{"image_id", "question", "question_id"}]}; {"annotations": [{"question_id", "multiple_choice_answer", "answers"}]}
POPE    {"question_id", "image", "text", "label": "yes"|"no"}
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lcl_adapter.data.sources.base import Dialogue, Exchange, Fault, QuestionPool, check_faults
from lcl_adapter.data.sources.llava_json import named_once, picture
from lcl_adapter.data.sources.records import Records, broken, dialogues, named
from lcl_adapter.errors import DataError
from lcl_adapter.recipe.sources import QuestionReader

SHORT = "Answer the question using a single word or phrase."  # LLaVA-1.5's suffix for VQA


def _words(value: object) -> object:
    """YAML reads a bare yes or no as true or false; in a list of answers the words are meant."""
    return [{True: "yes", False: "no"}.get(v, v) if isinstance(v, bool) else v for v in value] if isinstance(value, list) else value


class LlavaQuestions(QuestionReader):
    """``type: llava-questions``. LLaVA's question and answer JSON Lines, joined by question_id.

    closed: the only answers that are allowed.
    """

    type: Literal["llava-questions"]
    file: Path
    answers: Path
    images: Path
    closed: Annotated[list[str], BeforeValidator(_words)] = []
    limit: int | None = Field(None, ge=1)

    def open(self, name: str, min_pictures: int = 1) -> QuestionPool:
        return read_llava_questions(self.file, self.answers, self.images, name, self.on_fault, self.limit, tuple(self.closed))


class VqaV2(QuestionReader):
    """``type: vqav2``. VQAv2's questions and annotations.

    image_name: a pattern for the images' names, by default ``COCO_val2014_{image_id:012}.jpg`` or the same of train2014.
    """

    type: Literal["vqav2"]
    questions: Path
    annotations: Path
    images: Path
    image_name: str = ""
    limit: int | None = Field(None, ge=1)

    def open(self, name: str, min_pictures: int = 1) -> QuestionPool:
        return read_vqav2(self.questions, self.annotations, self.images, name, self.on_fault, self.limit, self.image_name)


class Pope(QuestionReader):
    """``type: pope``. POPE's questions: is there such a thing in the image, yes or no."""

    type: Literal["pope"]
    file: Path
    images: Path
    limit: int | None = Field(None, ge=1)

    def open(self, name: str, min_pictures: int = 1) -> QuestionPool:
        return read_pope(self.file, self.images, name, self.on_fault, self.limit)


def read_llava_questions(
    file: Path, answers: Path, images: Path, name: str = "", on_fault: str = "refuse", limit: int | None = None, closed: tuple[str, ...] = ()
) -> QuestionPool:
    """LLaVA's questions, joined with their answers by ``question_id``. ``closed``: the only answers there may be."""
    records = Records(file)
    told, broken_answers = _by_id(answers)
    archive = images.suffix.lower() == ".zip"

    def parse(record: Any, number: int) -> Dialogue:
        answer = told.get(str(record["question_id"]))
        if answer is None:
            raise ValueError(f"no answer with this question_id in {answers}")
        if closed and answer not in closed:
            raise ValueError(f"the answer {answer!r} is not in the closed list {', '.join(closed)}")
        shown = picture(images, archive, record["image"]) if record.get("image") else None
        return Dialogue((Exchange(_bare(record["text"]), answer, shown),), named_once(records, number, record))

    found, faults = dialogues(records, parse, lambda r: r["question_id"], limit)
    sums = records.sha256 + Records(answers).sha256
    return check_faults(QuestionPool(name or file.stem, found, {}, (*broken_answers, *faults), sums), on_fault)


def _by_id(file: Path) -> tuple[dict[str, str], list[Fault]]:
    """question_id -> answer; a broken line, a missing key and an id that is there twice are faults."""
    records, found = Records(file), {}
    faults: list[Fault] = []
    for number, raw in enumerate(records.scan(len(records))):
        try:
            record = records.read(number, raw)
            key, text = str(record["question_id"]), str(record["text"])
        except DataError as error:
            faults.append(broken(records, number, error))
            continue
        except (KeyError, TypeError) as error:
            faults.append(Fault("bad record", f"{records.origin(number)}: question_id and text are expected ({error})"))
            continue
        if key in found:
            faults.append(Fault("duplicate id", f"{named(records, number)}: the question_id was there before; the first answer is kept"))
        else:
            found[key] = text
    return found, faults


def _bare(text: str) -> str:
    return text.replace("<image>", "").strip()


def read_vqav2(
    questions: Path, annotations: Path, images: Path, name: str = "", on_fault: str = "refuse", limit: int | None = None, pattern: str = ""
) -> QuestionPool:
    """VQAv2's two files. ``pattern`` names an image: ``COCO_val2014_{image_id:012}.jpg`` where left out.

    Each question carries its ten answers, for the soft score; what is learned is ``multiple_choice_answer``.
    """
    asked, told = Records(questions, "questions"), Records(annotations, "annotations")
    places: dict[str, int] = {}
    for place, raw in enumerate(told.scan(len(told))):
        try:
            places[str(told.read(place, raw)["question_id"])] = place
        except (KeyError, TypeError) as error:
            raise DataError(f"{told.origin(place)}: an annotation with question_id is expected ({error!r}).") from error
    archive = images.suffix.lower() == ".zip"
    form = pattern or f"COCO_{'train' if 'train' in questions.name else 'val'}2014_{{image_id:012}}.jpg"

    def parse(record: Any, number: int) -> Dialogue:
        place = places.get(str(record["question_id"]))
        if place is None:
            raise ValueError(f"no annotation with this question_id in {annotations}")
        annotation = told[place]
        answers = tuple(str(a["answer"]) for a in annotation.get("answers", ()))
        try:
            shown = picture(images, archive, form.format(image_id=record["image_id"]))
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"`image_name` {form!r} does not fit: it may hold {{image_id}} ({error!r})") from error
        text = f"{record['question']}\n{SHORT}"
        exchange = Exchange(text, str(annotation["multiple_choice_answer"]), shown, answers=answers)
        return Dialogue((exchange,), f"{questions}: question {number + 1} (question_id {record['question_id']!r})")

    found, faults = dialogues(asked, parse, lambda r: r["question_id"], limit)
    return check_faults(QuestionPool(name or questions.stem, found, {}, tuple(faults), asked.sha256 + told.sha256), on_fault)


def read_pope(file: Path, images: Path, name: str = "", on_fault: str = "refuse", limit: int | None = None) -> QuestionPool:
    """POPE's questions; the answer is the label, yes or no."""
    records = Records(file)
    parse = partial(_pope, records=records, images=images, archive=images.suffix.lower() == ".zip")
    found, faults = dialogues(records, parse, lambda r: r["question_id"], limit)
    return check_faults(QuestionPool(name or file.stem, found, {}, tuple(faults), records.sha256), on_fault)


def _pope(record: Any, number: int, records: Records, images: Path, archive: bool) -> Dialogue:
    if record["label"] not in {"yes", "no"}:
        raise ValueError(f"the answer {record['label']!r} is not in the closed list yes, no")
    text = f"{_bare(record['text'])}\n{SHORT}"
    return Dialogue((Exchange(text, record["label"], picture(images, archive, record["image"])),), named_once(records, number, record))
