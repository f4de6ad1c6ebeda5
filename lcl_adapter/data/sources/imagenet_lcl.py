"""ImageNet as LCL pairs it: ``train900_pairs.jsonl``, and ``test100_pairs.jsonl`` whose classes oppose each other two by two.

Formats of isekai-portal/Link-Context-Learning. Images are named from ImageNet's own folder, ``train/n02119789/….JPEG`` and
``val/….JPEG``; that may be a folder or a zip archive.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lcl_adapter.data.sources.base import ClassPool, Fault, Picture, PictureClass, check_faults
from lcl_adapter.data.sources.records import Records
from lcl_adapter.data.sources.tree import Tree
from lcl_adapter.errors import DataError
from lcl_adapter.recipe.sources import ClassReader, FileReader


class ImageNetLcl(ClassReader, FileReader):
    """``type: imagenet-lcl``. LCL's ``train900_pairs.jsonl`` over ImageNet's folder or archive; the file ranks the neighbours."""

    type: Literal["imagenet-lcl"]
    pairs: Path
    images: Path

    def open(self, name: str, min_pictures: int = 1) -> ClassPool:
        return read_train_pairs(self.pairs, self.images, name, self.on_fault, min_pictures)


def read_train_pairs(file: Path, images: Path, name: str = "", on_fault: str = "refuse", min_pictures: int = 1) -> ClassPool:
    """A class a line: ``class_name``, ``samples`` (paths), ``neighbors`` ([id, name, path] from near to far)."""
    tree = Tree(images)
    faults: list[Fault] = []
    classes: list[PictureClass] = []
    seen: set[str] = set()
    for _, record, origin in read_lines(file, faults):
        try:
            pictures = listed_pictures(record["samples"], tree, origin, faults)
            ranked = tuple(dict.fromkeys(str(n[1]) for n in record["neighbors"]))
            key, name_of = str(record.get("class_id", record["class_name"])), str(record["class_name"])
            if key in seen:
                faults.append(Fault("duplicate id", f"{origin}: class_id {key!r} was there before"))
                continue
            seen.add(key)
            if name_of in {c.name for c in classes}:
                name_of = f"{name_of} ({key})"  # two classes of ImageNet may go by one name
            if len(pictures) < min_pictures:
                faults.append(Fault("class of too few images", f"{origin}: {len(pictures)} images that are there, {min_pictures} are needed"))
            else:
                classes.append(PictureClass(name_of, pictures, ranked=ranked))
        except (KeyError, TypeError, IndexError) as error:
            faults.append(other_form(record, origin, error, "class_name, samples, neighbors"))
    return check_faults(ClassPool(name or file.stem, tuple(classes), {}, tuple(faults)), on_fault)


@dataclass(frozen=True)
class ClassPair:
    """Two classes of the test that are shown against each other, each with pictures to show and pictures to ask about."""

    names: tuple[str, str]
    support: tuple[tuple[Picture, ...], tuple[Picture, ...]]
    queries: tuple[tuple[Picture, ...], tuple[Picture, ...]]


def read_test_pairs(file: Path, images: Path) -> tuple[ClassPair, ...]:
    """Lines 2k and 2k + 1 oppose each other. Raises DataError for a fault, and for the published copy of the training file."""
    tree = Tree(images)
    faults: list[Fault] = []
    pair = []
    for _, record, origin in read_lines(file, faults):
        if "neighbors" in record and "context_samples" not in record:
            raise DataError(
                f"{file}: this is a copy of train900_pairs.jsonl (one published revision of the test file is): it has `samples` and `neighbors`, "
                "the test has `context_samples` and `test_samples`. Fetch another revision."
            )
        try:
            shown, asked = (listed_pictures(record[key], tree, origin, faults) for key in ("context_samples", "test_samples"))
            pair.append((str(record["class_name"]), shown, asked))
        except (KeyError, TypeError) as error:
            faults.append(other_form(record, origin, error, "class_name, context_samples, test_samples"))
    if len(pair) % 2:
        faults.append(Fault("bad record", f"{file}: {len(pair)} classes; they oppose each other two by two, so an even number is needed"))
    check_faults(ClassPool(file.name, tuple(PictureClass(n, s) for n, s, _ in pair), {}, tuple(faults)), "refuse")
    return tuple(ClassPair((one[0], two[0]), (one[1], two[1]), (one[2], two[2])) for one, two in zip(pair[::2], pair[1::2], strict=True))


def read_lines(file: Path, faults: list[Fault]) -> list[tuple[int, dict[str, Any], str]]:
    records, found = Records(file), []
    for number in range(len(records)):
        try:
            found.append((number, records[number], records.origin(number)))
        except DataError as error:
            faults.append(Fault("broken line", str(error)))
    return found


def listed_pictures(names: list[str], tree: Tree, origin: str, faults: list[Fault]) -> tuple[Picture, ...]:
    """Those that are there; what is not, or climbs out, is a fault each."""
    found = []
    for name in names:
        try:
            picture = tree.picture(name)
        except DataError as error:
            faults.append(Fault("path that climbs out", f"{origin}: {error}"))
            continue
        if name in tree:
            found.append(picture)
        else:
            faults.append(Fault("missing image", f"{origin}: no image {name!r} under {tree.root}"))
    return tuple(found)


def other_form(record: Any, origin: str, error: Exception, expected: str) -> Fault:
    there = ", ".join(record) if isinstance(record, dict) else type(record).__name__
    return Fault("bad record", f"{origin}: keys {expected} are expected, there are {there} ({error})")
