"""A folder of class folders: ``photos/<class>/*.jpg``. The folder's name is the class's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from lcl_adapter.data.sources.base import ClassPool, Fault, PictureClass, PixelBox, check_faults, pixel_box
from lcl_adapter.data.sources.held_out import HeldOut, in_split
from lcl_adapter.data.sources.images import READ, SUFFIXES
from lcl_adapter.data.sources.tree import Tree
from lcl_adapter.errors import DataError, did_you_mean
from lcl_adapter.recipe.sources import ClassReader

NEIGHBOURS = "neighbours.json"
BOXES = "boxes.jsonl"


class ClassFolders(ClassReader, HeldOut):
    """``type: class-folder``.

    A user's ``photos/<class>/*.jpg``, a folder or a zip archive; ``boxes.jsonl`` in it may give boxes.
    """

    type: Literal["class-folder"]
    path: Path

    def open(self, name: str, min_pictures: int = 1) -> ClassPool:
        return read_class_folders(self.path, name, min_pictures, self.split, self.hold_out, self.on_fault)


def read_class_folders(
    root: Path, name: str = "", min_pictures: int = 1, split: str = "all", hold_out: float = 0.0, on_fault: str = "refuse"
) -> ClassPool:
    """Every sub-folder is a class, sorted by name.

    Hidden files are ignored; other files that are no images are counted as skipped.

    root: a folder or a zip archive.
    min_pictures: how many pictures a class needs (shots + 1 query); a class with fewer is a fault.
    split: only the classes of this split, see :func:`~lcl_adapter.data.sources.held_out.in_split`.
    ``neighbours.json`` beside the folders may group classes, ``{"group": ["class", ...]}``, or rank them,
    ``{"ranked": {"class": ["nearest", ...]}}``. ``boxes.jsonl`` may give boxes:
    ``{"image": "class/a.jpg", "bbox": [x0, y0, x1, y1]}``.

    Raises DataError: no such folder, no class folders, and, unless ``on_fault`` is "skip", a class with no or too few
    pictures.
    """
    if not root.exists():
        raise DataError(f"{root}: no such folder. A class folder holds one folder of photos a class: photos/<class>/*.jpg.")
    tree = Tree(root)
    names_of: dict[str, list[str]] = {}  # class -> names of its images
    other_files = 0
    for folder in tree.folders():
        files = tree.within(f"{folder}/")
        names_of[folder] = [n for n in files if Path(n).suffix.lower() in SUFFIXES]
        other_files += len(files) - len(names_of[folder])
    if split != "all":
        names_of = {n: names for n, names in names_of.items() if in_split(n, split, hold_out)}
        if not names_of:
            raise DataError(f"{root}: no class falls into split {split!r} with `hold_out: {hold_out}`; add classes or change `hold_out`.")
    if not names_of:
        raise DataError(f"{root}: no class folders in it: put the photos of each class into a folder of its own, photos/<class>/*.jpg.")
    first = next(iter(names_of))
    if len(names_of) == 1 and not names_of[first] and tree.folders(f"{first}/"):
        raise DataError(f"{root}: its only folder {first!r} holds folders itself; give {root / first} as the path, or pack what is in it.")
    groups, ranked = neighbours(tree)
    boxes, faults = _boxes(tree)
    unknown = sorted({*groups, *ranked} - set(tree.folders()))
    if unknown:
        listed = ", ".join(f"{n!r}{did_you_mean(n, list(names_of))}" for n in unknown[:5])
        faults.append(Fault("unknown class", f"{root}: {NEIGHBOURS} names {listed}, which is no folder here"))
    classes = []
    for class_name, names in names_of.items():
        if not names:
            suffixes = ", ".join(sorted(READ))
            faults.append(Fault("empty class", f"{root}: class {class_name!r} has no images ({suffixes}): add some or remove the folder"))
        elif len(names) < min_pictures:
            message = f"{root}: class {class_name!r} has {len(names)} images, {min_pictures} are needed: add photos or lower `shots`"
            faults.append(Fault("class of too few images", message))
        else:
            own_boxes = tuple(boxes.get(n) for n in names) if boxes else ()
            pictures = tuple(tree.picture(n) for n in names)
            classes.append(PictureClass(class_name, pictures, groups.get(class_name, ()), boxes=own_boxes, ranked=ranked.get(class_name, ())))
    skipped = {"not an image file": other_files} if other_files else {}
    return check_faults(ClassPool(name or root.name, tuple(classes), skipped, tuple(faults)), on_fault)


def neighbours(tree: Tree) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """class -> its groups, and class -> its nearest classes, from ``neighbours.json``.

    Raises DataError for another form.
    """
    if NEIGHBOURS not in tree:
        return {}, {}
    where = f"{tree.root}: {NEIGHBOURS}"
    try:
        raw = json.loads(tree.text(NEIGHBOURS))
        ranked = raw.pop("ranked", {}) if isinstance(raw.get("ranked"), dict) else {}
        if any(isinstance(members, str) for members in (*raw.values(), *ranked.values())):
            raise TypeError("a list of classes is expected")
        groups: dict[str, tuple[str, ...]] = {member: (str(group),) for group, members in raw.items() for member in members}
        return groups, {class_name: tuple(map(str, nearest)) for class_name, nearest in ranked.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f'{where}: neither {{"group": ["class", ...]}} nor {{"ranked": {{"class": ["nearest", ...]}}}} ({error}).') from error


def _boxes(tree: Tree) -> tuple[dict[str, PixelBox], list[Fault]]:
    """image -> box, from ``boxes.jsonl``, and the faults in it."""
    boxes: dict[str, PixelBox] = {}
    faults: list[Fault] = []
    if BOXES not in tree:
        return boxes, faults
    for number, line in enumerate(tree.text(BOXES).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{tree.root}: {BOXES}, line {number}"
        try:
            record = json.loads(line)
            image, box = record["image"], record["bbox"]
        except (ValueError, KeyError, TypeError) as error:
            faults.append(Fault("broken line", f'{where}: not of the form {{"image": "class/a.jpg", "bbox": [x0, y0, x1, y1]}} ({error})'))
            continue
        if image not in tree:
            faults.append(Fault("missing image", f"{where}: no image {image!r}"))
            continue
        try:
            boxes[image] = pixel_box(box)
        except ValueError as error:
            faults.append(Fault("box out of range", f"{where}: {error}"))
    return boxes, faults
