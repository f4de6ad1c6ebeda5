"""ImageNet as LCL pairs it: ``train900_pairs.jsonl``, and ``test100_pairs.jsonl``, whose consecutive classes form
pairs.

The formats are those of isekai-portal/Link-Context-Learning. Image names are relative to ImageNet's own folder,
``train/n02119789/….JPEG`` and ``val/….JPEG``; that may be a folder or a zip archive.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lcl_adapter.data.sources.base import ClassPool, Fault, PictureClass, check_faults
from lcl_adapter.data.sources.picture import Picture
from lcl_adapter.data.sources.records import Records
from lcl_adapter.data.sources.tree import Tree
from lcl_adapter.errors import DataError
from lcl_adapter.reading import brief
from lcl_adapter.recipe.sources import ClassReader, FileReader


class ImageNetLcl(ClassReader, FileReader):
    """``type: imagenet-lcl``.

    LCL's ``train900_pairs.jsonl`` over ImageNet's folder or archive; the file ranks the neighbours.
    """

    type: Literal["imagenet-lcl"]
    pairs: Path
    images: Path

    def open(self, name: str, min_pictures: int = 1) -> ClassPool:
        return read_train_pairs(self.pairs, self.images, name, self.on_fault, min_pictures)


def read_train_pairs(file: Path, images: Path, name: str = "", on_fault: str = "refuse", min_pictures: int = 1) -> ClassPool:
    """One class a line: ``class_name``, ``samples`` (paths), ``neighbors`` ([id, name, path] from near to far)."""
    tree = Tree(images)
    faults: list[Fault] = []
    classes: list[PictureClass] = []
    ids: set[str] = set()
    for record, origin in read_lines(file, faults):
        try:
            pictures = listed_pictures(record["samples"], tree, origin, faults)
            ranked = tuple(dict.fromkeys(str(n[1]) for n in record["neighbors"]))
            class_id, class_name = str(record.get("class_id", record["class_name"])), str(record["class_name"])
            if class_id in ids:
                faults.append(Fault("duplicate id", f"{origin}: an earlier line has the class_id {class_id!r} too"))
                continue
            ids.add(class_id)
            if class_name in {c.name for c in classes}:
                class_name = f"{class_name} ({class_id})"  # two classes of ImageNet may have the same name
            if len(pictures) < min_pictures:
                faults.append(Fault("class of too few images", f"{origin}: {len(pictures)} images exist, {min_pictures} are needed"))
            else:
                classes.append(PictureClass(class_name, pictures, ranked=ranked))
        except (KeyError, TypeError, IndexError) as error:
            faults.append(wrong_form(record, origin, error, "class_name, samples, neighbors"))
    return check_faults(ClassPool(name or file.stem, tuple(classes), {}, tuple(faults)), on_fault)


@dataclass(frozen=True)
class ClassPair:
    """Two classes of the test that are compared, each with support pictures and query pictures."""

    names: tuple[str, str]
    support: tuple[tuple[Picture, ...], tuple[Picture, ...]]
    queries: tuple[tuple[Picture, ...], tuple[Picture, ...]]


def read_test_pairs(file: Path, images: Path) -> tuple[ClassPair, ...]:
    """Lines 2k and 2k + 1 form a pair.

    Raises DataError for a fault, and for the published copy of the training file.
    """
    tree = Tree(images)
    faults: list[Fault] = []
    names: list[str] = []
    support: list[tuple[Picture, ...]] = []
    queries: list[tuple[Picture, ...]] = []
    for record, origin in read_lines(file, faults):
        if "neighbors" in record and "context_samples" not in record:
            raise DataError(
                f"{file}: this is a copy of train900_pairs.jsonl (one published revision of the test file is): it has `samples` and `neighbors`, "
                "the test has `context_samples` and `test_samples`. Fetch another revision."
            )
        try:
            context, test = (listed_pictures(record[key], tree, origin, faults) for key in ("context_samples", "test_samples"))
            names.append(str(record["class_name"]))
            support.append(context)
            queries.append(test)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            faults.append(wrong_form(record, origin, error, "class_name, context_samples, test_samples"))
    if len(names) % 2:
        faults.append(Fault("bad record", f"{file}: {len(names)} classes; consecutive classes form pairs, so an even number is needed"))
    check_faults(ClassPool(file.name, tuple(map(PictureClass, names, support)), {}, tuple(faults)), "refuse")
    return tuple(ClassPair((names[n], names[n + 1]), (support[n], support[n + 1]), (queries[n], queries[n + 1])) for n in range(0, len(names), 2))


def read_lines(file: Path, faults: list[Fault]) -> list[tuple[dict[str, Any], str]]:
    """Every record with its origin; a broken line is added to ``faults``."""
    records = Records(file)
    lines = []
    for number in range(len(records)):
        try:
            lines.append((records[number], records.origin(number)))
        except DataError as error:
            faults.append(Fault("broken line", str(error)))
    return lines


def listed_pictures(names: list[str], tree: Tree, origin: str, faults: list[Fault]) -> tuple[Picture, ...]:
    """The pictures that exist. A name without a file, or one that leads out of the folder, is added to ``faults``."""
    pictures = []
    for name in names:
        try:
            picture = tree.picture(name)
        except DataError as error:
            faults.append(Fault("path that climbs out", f"{origin}: {error}"))
            continue
        if name in tree:
            pictures.append(picture)
        else:
            faults.append(Fault("missing image", f"{origin}: no image {name!r} under {tree.root}"))
    return tuple(pictures)


def wrong_form(record: Any, origin: str, error: Exception, expected: str) -> Fault:
    """The fault of a record that lacks an expected key, or has a value of another type."""
    actual = brief(", ".join(record)) if isinstance(record, dict) else type(record).__name__
    return Fault("bad record", f"{origin}: keys {expected} are expected, there are {actual} ({brief(error)})")
