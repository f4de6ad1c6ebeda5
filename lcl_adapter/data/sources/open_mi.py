"""Open MiniImageNet, a test of VL-ICL Bench (ys-zong/VL-ICL, arXiv 2403.13164).

``query.json`` is a JSON list. A record is one question: ``image`` is the query, ``answer`` its class, a made-up word, and
``support`` has the pictures of each class, ``{"dax": {"images": [...]}, ...}``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcl_adapter.data.sources.base import ClassPool, Fault, PictureClass, check_faults
from lcl_adapter.data.sources.imagenet_lcl import listed_pictures, read_lines, wrong_form
from lcl_adapter.data.sources.picture import Picture
from lcl_adapter.data.sources.tree import Tree

KEYS = "image, answer, support"


@dataclass(frozen=True)
class OpenMiQuestion:
    """A query picture, the name of its class, and the support pictures of every class in their order."""

    query: Picture
    gold: str
    support: dict[str, tuple[Picture, ...]]


def read_open_mi(file: Path, images: Path, name: str = "") -> tuple[OpenMiQuestion, ...]:
    """Every question, in order. images: the folder or zip that the listed names are relative to. Raises DataError that lists
    the faults.
    """
    tree = Tree(images)
    faults: list[Fault] = []
    questions = []
    for record, origin in read_lines(file, faults):
        try:
            question = _question(record, tree, origin, faults)
        except (KeyError, TypeError, AttributeError) as error:
            faults.append(wrong_form(record, origin, error, KEYS))
            continue
        if question is not None:
            questions.append(question)
    classes = tuple(PictureClass(question.gold, (question.query,)) for question in questions)
    check_faults(ClassPool(name or file.name, classes, {}, tuple(faults)), "refuse")
    return tuple(questions)


def _question(record: Any, tree: Tree, origin: str, faults: list[Fault]) -> OpenMiQuestion | None:
    """One record; None where it has a fault, which is added to ``faults``."""
    before = len(faults)
    image = record["image"]
    query = listed_pictures(image if isinstance(image, list) else [image], tree, origin, faults)
    support = {str(label): listed_pictures(shown["images"], tree, origin, faults) for label, shown in record["support"].items()}
    gold = str(record["answer"])
    if len(query) > 1:
        faults.append(Fault("bad record", f"{origin}: {len(query)} pictures as the query; one is expected"))
    if gold not in support:
        faults.append(Fault("bad record", f"{origin}: the answer {gold!r} is no class of `support`, which has {', '.join(support) or 'none'}"))
    elif len(support) < 2:
        faults.append(Fault("bad record", f"{origin}: `support` has the class {gold!r} alone; two are compared"))
    return OpenMiQuestion(query[0], gold, support) if len(faults) == before else None
