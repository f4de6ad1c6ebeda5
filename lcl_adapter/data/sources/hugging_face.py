"""Any dataset that ``datasets`` saved to disk, with its columns named in the recipe; its images stay where they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from lcl_adapter.data.sources.base import ClassPool, Dialogue, Exchange, Fault, Picture, PictureClass, QuestionPool, check_faults
from lcl_adapter.data.sources.held_out import HeldOut, in_split
from lcl_adapter.data.sources.images import saved_dataset
from lcl_adapter.errors import DataError
from lcl_adapter.recipe.sources import ClassReader, QuestionReader


class HfClasses(ClassReader, HeldOut):
    """``type: hf-classes``. A dataset that ``datasets`` saved to disk, one row a picture."""

    type: Literal["hf-classes"]
    path: Path
    columns: dict[Literal["image", "class", "group"], str] = {"image": "image", "class": "label"}

    def open(self, name: str, min_pictures: int = 1) -> ClassPool:
        columns = {str(k): v for k, v in self.columns.items()}
        return read_hf_classes(self.path, columns, name, min_pictures, self.split, self.hold_out, self.on_fault)


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
) -> ClassPool:
    """Columns ``image`` and ``class``, and if there is one ``group``. A ClassLabel column gives its names.

    Raises DataError: no saved dataset, a missing column (with those there are).
    """
    found = _columns(folder, columns, ("image", "class"))
    feature = found.features[columns["class"]]
    names = getattr(feature, "names", None)
    labels = found[columns["class"]]
    groups = found[columns["group"]] if "group" in columns else [None] * len(found)
    rows: dict[str, list[int]] = {}
    group_of: dict[str, str] = {}
    faults = []
    for row, (label, group) in enumerate(zip(labels, groups, strict=True)):
        if label is None or label == -1:
            faults.append(Fault("bad record", f"{folder}: row {row} has no class"))
            continue
        told = names[label] if names else str(label)
        rows.setdefault(told, []).append(row)
        if group is not None:
            group_of[told] = str(group)
    if split != "all":
        rows = {n: r for n, r in rows.items() if in_split(n, split, hold_out)}
    few = [n for n, r in rows.items() if len(r) < min_pictures]
    classes = tuple(
        PictureClass(n, tuple(Picture(folder, f"{columns['image']}/{i}") for i in r), (group_of[n],) if n in group_of else ())
        for n, r in sorted(rows.items())
        if n not in few
    )
    skipped = {f"class of fewer than {min_pictures} images": len(few)} if few else {}
    return check_faults(ClassPool(name or folder.name, classes, skipped, tuple(faults)), on_fault)


def read_hf_questions(folder: Path, columns: Mapping[str, str], name: str = "", on_fault: str = "refuse", limit: int | None = None) -> QuestionPool:
    """Columns ``question`` and ``answer``, and if there is one ``image``."""
    found = _columns(folder, columns, ("question", "answer"))
    size = min(len(found), limit or len(found))
    dialogues, faults = [], []
    asked, answered = found[columns["question"]], found[columns["answer"]]
    for row in range(size):
        answer = answered[row]
        several = tuple(map(str, answer)) if isinstance(answer, list) else ()
        answer = answer[0] if isinstance(answer, list) and answer else answer
        if not asked[row] or not answer:
            faults.append(Fault("bad record", f"{folder}: row {row} has no question or no answer"))
            continue
        shown = Picture(folder, f"{columns['image']}/{row}") if "image" in columns else None
        dialogues.append(Dialogue((Exchange(str(asked[row]), str(answer), shown, answers=several),), f"{folder}: row {row}"))
    return check_faults(QuestionPool(name or folder.name, tuple(dialogues), {}, tuple(faults), found._fingerprint), on_fault)


def _columns(folder: Path, columns: Mapping[str, str], needed: tuple[str, ...]):  # type: ignore[no-untyped-def]
    found = saved_dataset(folder)
    missing = [c for c in columns.values() if c not in found.column_names] + [k for k in needed if k not in columns]
    if missing:
        raise DataError(
            f"{folder}: no column {', '.join(map(repr, missing))}; there are {', '.join(found.column_names)}. Set `columns` in the recipe."
        )
    return found
