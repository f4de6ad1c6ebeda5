"""ISEKAI-10 and ISEKAI-pair (isekai-portal/Link-Context-Learning, CC BY-NC 2.0).

The files are JSON Lines, though named ``.json``.

A line is one question. ``image_name`` is the query. ``positive_list`` and ``negative_list`` are the support pictures;
their names are ``positive_promt`` and ``negative_promt`` (this is their spelling). ``label_name`` is the correct one of
the two names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lcl_adapter.data.sources.base import ClassPool, Fault, PictureClass, check_faults
from lcl_adapter.data.sources.imagenet_lcl import listed_pictures, read_lines, wrong_form
from lcl_adapter.data.sources.picture import Picture
from lcl_adapter.data.sources.tree import Tree
from lcl_adapter.recipe.sources import ClassReader, FileReader

KEYS = "image_name, positive_list, negative_list, positive_promt, negative_promt, label_name"


class Isekai(ClassReader, FileReader):
    """``type: isekai``. ISEKAI-10 or ISEKAI-pair: unreal concepts and their real counterparts."""

    type: Literal["isekai"]
    file: Path
    images: Path

    def open(self, name: str, min_pictures: int = 1) -> ClassPool:
        return read_isekai(self.file, self.images, name, self.on_fault, min_pictures)


@dataclass(frozen=True)
class IsekaiQuestion:
    """Two concepts, the support pictures of each in their order, and a query picture of concept ``gold`` (0 or 1)."""

    names: tuple[str, str]
    support: tuple[tuple[Picture, ...], tuple[Picture, ...]]
    query: Picture
    gold: int


def read_isekai_questions(file: Path, images: Path, name: str = "", on_fault: str = "refuse") -> tuple[IsekaiQuestion, ...]:
    """Every question, in order. Raises DataError for faults, unless ``on_fault`` is "skip"."""
    questions, faults = _questions(file, images)
    check_faults(ClassPool(name or file.name, tuple(PictureClass(q.names[0], q.support[0]) for q in questions), {}, tuple(faults)), on_fault)
    return tuple(questions)


def read_isekai(file: Path, images: Path, name: str = "", on_fault: str = "refuse", min_pictures: int = 1) -> ClassPool:
    """The concepts as classes.

    A concept and its counterpart have the same group, so they are hard neighbours of each other.
    """
    questions, faults = _questions(file, images)
    pictures: dict[str, dict[Picture, None]] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for question in questions:
        for side, concept in enumerate(question.names):
            own = (*question.support[side], question.query) if side == question.gold else question.support[side]
            pictures.setdefault(concept, {}).update(dict.fromkeys(own))
            groups.setdefault(concept, ("|".join(sorted(question.names)),))
    enough = {n: tuple(p) for n, p in pictures.items() if len(p) >= min_pictures}
    skipped = {f"concept with fewer than {min_pictures} pictures": len(pictures) - len(enough)} if len(enough) < len(pictures) else {}
    classes = tuple(PictureClass(n, p, groups[n]) for n, p in enough.items())
    return check_faults(ClassPool(name or file.stem, classes, skipped, tuple(faults)), on_fault)


def _questions(file: Path, images: Path) -> tuple[list[IsekaiQuestion], list[Fault]]:
    tree = Tree(images)
    faults: list[Fault] = []
    questions: list[IsekaiQuestion] = []
    for record, origin in read_lines(file, faults):
        try:
            support = tuple(listed_pictures(record[key], tree, origin, faults) for key in ("positive_list", "negative_list"))
            names = (str(record["positive_promt"]).lower(), str(record["negative_promt"]).lower())
            query = listed_pictures([record["image_name"]], tree, origin, faults)
            label = str(record["label_name"]).lower()
            if label not in names:
                faults.append(Fault("bad record", f"{origin}: the answer {label!r} is not in the closed list {', '.join(names)}"))
            elif query and all(support):
                questions.append(IsekaiQuestion(names, (support[0], support[1]), query[0], names.index(label)))
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            faults.append(wrong_form(record, origin, error, KEYS))
    return questions, faults
