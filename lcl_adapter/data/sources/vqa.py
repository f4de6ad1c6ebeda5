"""Questions with short answers: LLaVA's question and answer JSON Lines, VQAv2, POPE.

LLaVA   {"question_id", "image", "text", "category"?}; answers {"question_id", "text"} in a file of their own
VQAv2   {"questions": [{"image_id", "question", "question_id"}]}; {"annotations": [{"question_id", "multiple_choice_answer", "answers"}]}
POPE    {"question_id", "image", "text", "label": "yes"|"no"}
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lcl_adapter.data.sources.base import Dialogue, Exchange, Fault, QuestionPool, check_faults
from lcl_adapter.data.sources.llava_json import picture, record_name
from lcl_adapter.data.sources.records import Records, describe_record, read_dialogues, unreadable
from lcl_adapter.errors import DataError
from lcl_adapter.reading import brief
from lcl_adapter.recipe.sources import QuestionReader

SHORT = "Answer the question using a single word or phrase."  # LLaVA-1.5's suffix for VQA


def _words(value: object) -> object:
    """YAML reads an unquoted yes or no as true or false; in a list of answers they are words."""
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

    image_name: a pattern for the images' names, by default ``COCO_val2014_{image_id:012}.jpg`` or the same of
    train2014.
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
    """LLaVA's questions, joined with their answers by ``question_id``.

    ``closed``: the only answers that are allowed.
    """
    records = Records(file)
    answer_of, answer_faults = _answers_by_id(answers)
    parse = partial(_llava_question, records=records, answer_of=answer_of, answers=answers, images=images, closed=closed)
    dialogues, faults = read_dialogues(records, parse, lambda r: r["question_id"], limit)
    sums = records.sha256 + Records(answers).sha256
    return check_faults(QuestionPool(name or file.stem, dialogues, {}, (*answer_faults, *faults), sums), on_fault)


def _llava_question(
    record: Any, number: int, records: Records, answer_of: Mapping[str, str], answers: Path, images: Path, closed: tuple[str, ...]
) -> Dialogue:
    answer = answer_of.get(str(record["question_id"]))
    if answer is None:
        raise ValueError(f"no answer with this question_id in {answers}")
    if closed and answer not in closed:
        raise ValueError(f"the answer {answer!r} is not in the closed list {', '.join(closed)}")
    image = picture(images, images.suffix.lower() == ".zip", record["image"]) if record.get("image") else None
    return Dialogue((Exchange(_without_image_tag(record["text"]), answer, image),), record_name(records, number, record))


def _answers_by_id(file: Path) -> tuple[dict[str, str], list[Fault]]:
    """question_id -> answer. A broken line, a missing key and a repeated id are faults."""
    records = Records(file)
    answers: dict[str, str] = {}
    faults: list[Fault] = []
    for number, raw in enumerate(records.scan(len(records))):
        try:
            record = records.read(number, raw)
            key, text = str(record["question_id"]), str(record["text"])
        except DataError as error:
            faults.append(unreadable(records, number, error))
            continue
        except (KeyError, TypeError, RecursionError) as error:
            faults.append(Fault("bad record", f"{records.origin(number)}: question_id and text are expected ({brief(error)})"))
            continue
        if key in answers:
            faults.append(Fault("duplicate id", f"{describe_record(records, number)}: an earlier answer has the same question_id; it is used"))
        else:
            answers[key] = text
    return answers, faults


def _without_image_tag(text: str) -> str:
    return text.replace("<image>", "").strip()


def read_vqav2(
    questions: Path, annotations: Path, images: Path, name: str = "", on_fault: str = "refuse", limit: int | None = None, pattern: str = ""
) -> QuestionPool:
    """VQAv2's two files. ``pattern`` gives an image's name from its id, by default ``COCO_val2014_{image_id:012}.jpg``.

    Each question has its ten answers, for the soft score; the learned answer is ``multiple_choice_answer``.
    """
    question_records, annotation_records = Records(questions, "questions"), Records(annotations, "annotations")
    number_of: dict[str, int] = {}
    annotation_faults: list[Fault] = []
    for index, raw in enumerate(annotation_records.scan(len(annotation_records))):
        try:
            number_of[str(annotation_records.read(index, raw)["question_id"])] = index
        except DataError as error:
            annotation_faults.append(unreadable(annotation_records, index, error))
        except (KeyError, TypeError, RecursionError) as error:
            message = f"{annotation_records.origin(index)}: an annotation with question_id is expected ({brief(error)})"
            annotation_faults.append(Fault("bad record", message))
    form = pattern or f"COCO_{'train' if 'train' in questions.name else 'val'}2014_{{image_id:012}}.jpg"
    parse = partial(_vqav2, questions=questions, annotations=annotation_records, number_of=number_of, images=images, form=form)
    dialogues, faults = read_dialogues(question_records, parse, lambda r: r["question_id"], limit)
    sums = question_records.sha256 + annotation_records.sha256
    return check_faults(QuestionPool(name or questions.stem, dialogues, {}, (*annotation_faults, *faults), sums), on_fault)


def _vqav2(record: Any, number: int, questions: Path, annotations: Records, number_of: Mapping[str, int], images: Path, form: str) -> Dialogue:
    index = number_of.get(str(record["question_id"]))
    if index is None:
        raise ValueError(f"no annotation with this question_id in {annotations.file}")
    annotation = annotations[index]
    answers = tuple(str(a["answer"]) for a in annotation.get("answers", ()))
    try:
        image = picture(images, images.suffix.lower() == ".zip", form.format(image_id=record["image_id"]))
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"`image_name` {form!r} does not fit: it may hold {{image_id}} ({error!r})") from error
    exchange = Exchange(f"{record['question']}\n{SHORT}", str(annotation["multiple_choice_answer"]), image, answers=answers)
    return Dialogue((exchange,), f"{questions}: question {number + 1} (question_id {record['question_id']!r})")


def read_pope(file: Path, images: Path, name: str = "", on_fault: str = "refuse", limit: int | None = None) -> QuestionPool:
    """POPE's questions; the answer is the label, yes or no."""
    records = Records(file)
    parse = partial(_pope, records=records, images=images, archive=images.suffix.lower() == ".zip")
    dialogues, faults = read_dialogues(records, parse, lambda r: r["question_id"], limit)
    return check_faults(QuestionPool(name or file.stem, dialogues, {}, tuple(faults), records.sha256), on_fault)


def _pope(record: Any, number: int, records: Records, images: Path, archive: bool) -> Dialogue:
    if record["label"] not in {"yes", "no"}:
        raise ValueError(f"the answer {record['label']!r} is not in the closed list yes, no")
    text = f"{_without_image_tag(record['text'])}\n{SHORT}"
    return Dialogue((Exchange(text, record["label"], picture(images, archive, record["image"])),), record_name(records, number, record))
