"""Any dataset that ``datasets`` saved to disk. The recipe names its columns; its images are read in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lcl_adapter.data.sources.base import ClassPool, Dialogue, Exchange, Fault, PictureClass, QuestionPool, check_faults
from lcl_adapter.data.sources.held_out import HeldOut, in_split
from lcl_adapter.data.sources.images import saved_dataset
from lcl_adapter.data.sources.picture import Picture
from lcl_adapter.errors import DataError
from lcl_adapter.recipe.sources import ClassReader, QuestionReader


class HfClasses(ClassReader, HeldOut):
    """``type: hf-classes``. A dataset that ``datasets`` saved to disk, one row a picture."""

    type: Literal["hf-classes"]
    path: Path
    columns: dict[Literal["image", "class", "group"], str] = {"image": "image", "class": "label"}

    def open(self, name: str, min_pictures: int = 1) -> ClassPool:
        columns = {str(k): v for k, v in self.columns.items()}
        return read_hf_classes(self.path, columns, name, min_pictures, self.split, self.hold_out, self.on_fault, self.validation)


class HfQuestions(QuestionReader):
    """``type: hf-questions``. A dataset that ``datasets`` saved to disk, one row a question."""

    type: Literal["hf-questions"]
    path: Path
    columns: dict[Literal["question", "answer", "image"], str] = {"question": "question", "answer": "answer"}
    limit: int | None = Field(None, ge=1)

    def open(self, name: str, min_pictures: int = 1) -> QuestionPool:
        return read_hf_questions(self.path, {str(k): v for k, v in self.columns.items()}, name, self.on_fault, self.limit)


def read_hf_classes(
    folder: Path,
    columns: Mapping[str, str],
    name: str = "",
    min_pictures: int = 1,
    split: str = "all",
    hold_out: float = 0.0,
    on_fault: str = "refuse",
    validation: float = 0.0,
) -> ClassPool:
    """Columns ``image`` and ``class``, and optionally ``group``. A ClassLabel column gives the classes' names.

    Raises DataError for a folder that is no saved dataset, or for a missing column (with a list of the columns).
    """
    dataset = _open_dataset(folder, columns, ("image", "class"))
    feature = dataset.features[columns["class"]]
    names = getattr(feature, "names", None)
    labels = dataset[columns["class"]]
    groups = dataset[columns["group"]] if "group" in columns else [None] * len(dataset)
    rows: dict[str, list[int]] = {}
    group_of: dict[str, str] = {}
    faults = []
    for row, (label, group) in enumerate(zip(labels, groups, strict=True)):
        if label is None or label == -1:
            faults.append(Fault("bad record", f"{folder}: row {row} has no class"))
            continue
        class_name = names[label] if names else str(label)
        rows.setdefault(class_name, []).append(row)
        if group is not None:
            group_of[class_name] = str(group)
    if split != "all":
        rows = {n: r for n, r in rows.items() if in_split(n, split, hold_out, validation)}
    few = [n for n, r in rows.items() if len(r) < min_pictures]
    classes = tuple(
        PictureClass(n, tuple(Picture(folder, f"{columns['image']}/{i}") for i in r), (group_of[n],) if n in group_of else ())
        for n, r in sorted(rows.items())
        if n not in few
    )
    skipped = {f"class of fewer than {min_pictures} images": len(few)} if few else {}
    return check_faults(ClassPool(name or folder.name, classes, skipped, tuple(faults)), on_fault)


def read_hf_questions(folder: Path, columns: Mapping[str, str], name: str = "", on_fault: str = "refuse", limit: int | None = None) -> QuestionPool:
    """Columns ``question`` and ``answer``, and optionally ``image``. Of a list of answers, the first is learned."""
    dataset = _open_dataset(folder, columns, ("question", "answer"))
    size = min(len(dataset), limit or len(dataset))
    dialogues, faults = [], []
    questions, answers = dataset[columns["question"]], dataset[columns["answer"]]
    for row in range(size):
        question, answer = questions[row], answers[row]
        several = tuple(map(str, answer)) if isinstance(answer, list) else ()
        answer = answer[0] if isinstance(answer, list) and answer else answer
        if not question or not answer:
            faults.append(Fault("bad record", f"{folder}: row {row} has no question or no answer"))
            continue
        image = Picture(folder, f"{columns['image']}/{row}") if "image" in columns else None
        dialogues.append(Dialogue((Exchange(str(question), str(answer), image, answers=several),), f"{folder}: row {row}"))
    return check_faults(QuestionPool(name or folder.name, tuple(dialogues), {}, tuple(faults), dataset._fingerprint), on_fault)


def _open_dataset(folder: Path, columns: Mapping[str, str], needed: tuple[str, ...]) -> Any:
    """The dataset in ``folder``. Raises DataError if a column is missing."""
    dataset = saved_dataset(folder)
    missing = [c for c in columns.values() if c not in dataset.column_names] + [k for k in needed if k not in columns]
    if missing:
        raise DataError(
            f"{folder}: no column {', '.join(map(repr, missing))}; there are {', '.join(dataset.column_names)}. Set `columns` in the recipe."
        )
    return dataset
