"""A folder of class folders: ``photos/<class>/*.jpg``. The folder's name is the class's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from lcl_adapter.data.sources.base import ClassPool, Fault, PictureClass, PixelBox, check_faults, pixel_box
from lcl_adapter.data.sources.held_out import HeldOut, in_split
from lcl_adapter.data.sources.images import SUFFIXES
from lcl_adapter.data.sources.tree import Tree
from lcl_adapter.errors import DataError, did_you_mean
from lcl_adapter.recipe.sources import ClassReader

NEIGHBOURS = "neighbours.json"
BOXES = "boxes.jsonl"


class ClassFolders(ClassReader, HeldOut):
    """``type: class-folder``. A user's ``photos/<class>/*.jpg``, a folder or a zip archive; ``boxes.jsonl`` in it may give boxes."""

    type: Literal["class-folder"]
    path: Path

    def open(self, name: str, min_pictures: int = 1) -> ClassPool:
        return read_class_folders(self.path, name, min_pictures, self.split, self.hold_out, self.on_fault)


def read_class_folders(
    root: Path, name: str = "", min_pictures: int = 1, split: str = "all", hold_out: float = 0.0, on_fault: str = "refuse"
) -> ClassPool:
    """Every sub-folder is a class, in the order of names; hidden files are passed over, other files counted as skipped.

    ``min_pictures``: how many pictures a class needs to be of use (shots + 1 query); fewer is a fault of the class.
    ``split`` keeps the classes of one side of :func:`~lcl_adapter.data.sources.held_out.is_held_out`. ``root`` may be a zip archive.
    ``neighbours.json`` beside the folders may group classes, ``{"group": ["class", ...]}``, or rank them,
    ``{"ranked": {"class": ["nearest", ...]}}``. ``boxes.jsonl`` may say where the thing is: ``{"image": "class/a.jpg", "bbox": [x0, y0, x1, y1]}``.

    Raises DataError: no such folder, no class folders, and, unless ``on_fault`` is "skip", an empty class or too few pictures.
    """
    if not root.exists():
        raise DataError(f"{root}: no such folder. A class folder holds one folder of photos a class: photos/<class>/*.jpg.")
    tree = Tree(root)
    skipped: dict[str, int] = {}
    found: dict[str, list[str]] = {}
    for folder in tree.folders():
        files = tree.within(f"{folder}/")
        found[folder] = [n for n in files if Path(n).suffix.lower() in SUFFIXES]
        if len(found[folder]) < len(files):
            skipped["not an image file"] = skipped.get("not an image file", 0) + len(files) - len(found[folder])
    if split != "all":
        found = {n: p for n, p in found.items() if in_split(n, split, hold_out)}
        if not found:
            raise DataError(f"{root}: no class falls into split {split!r} with `hold_out: {hold_out}`; add classes or change `hold_out`.")
    if not found:
        raise DataError(f"{root}: no class folders in it: put the photos of each class into a folder of its own, photos/<class>/*.jpg.")
    only = next(iter(found))
    if len(found) == 1 and not found[only] and tree.folders(f"{only}/"):
        raise DataError(f"{root}: its only folder {only!r} holds folders itself; give {root / only} as the path, or pack what is in it.")
    groups, ranked = neighbours(tree)
    boxes, faults = _boxes(tree)
    unknown = sorted({*groups, *ranked} - set(tree.folders()))
    if unknown:
        told = ", ".join(f"{n!r}{did_you_mean(n, list(found))}" for n in unknown[:5])
        faults.append(Fault("unknown class", f"{root}: {NEIGHBOURS} names {told}, which is no folder here"))
    classes = []
    for one, names in found.items():
        if not names:
            faults.append(Fault("empty class", f"{root}: class {one!r} has no images ({', '.join(sorted(SUFFIXES))}): add some or remove the folder"))
        elif len(names) < min_pictures:
            message = f"{root}: class {one!r} has {len(names)} images, {min_pictures} are needed: add photos or lower `shots`"
            faults.append(Fault("class of too few images", message))
        else:
            known = tuple(boxes.get(n) for n in names) if boxes else ()
            pictures = tuple(tree.picture(n) for n in names)
            classes.append(PictureClass(one, pictures, groups.get(one, ()), boxes=known, ranked=ranked.get(one, ())))
    return check_faults(ClassPool(name or root.name, tuple(classes), skipped, tuple(faults)), on_fault)


def neighbours(tree: Tree) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Groups of each class, and its nearest classes, from ``neighbours.json``. Raises DataError where it has another form."""
    if NEIGHBOURS not in tree:
        return {}, {}
    where = f"{tree.root}: {NEIGHBOURS}"
    try:
        told = json.loads(tree.text(NEIGHBOURS))
        ranked = told.pop("ranked", {}) if isinstance(told.get("ranked"), dict) else {}
        if any(isinstance(members, str) for members in (*told.values(), *ranked.values())):
            raise TypeError("a list of classes is expected")
        groups: dict[str, tuple[str, ...]] = {member: (str(group),) for group, members in told.items() for member in members}
        return groups, {one: tuple(map(str, near)) for one, near in ranked.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f'{where}: neither {{"group": ["class", ...]}} nor {{"ranked": {{"class": ["nearest", ...]}}}} ({error}).') from error


def _boxes(tree: Tree) -> tuple[dict[str, PixelBox], list[Fault]]:
    if BOXES not in tree:
        return {}, []
    found: dict[str, PixelBox] = {}
    faults = []
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
            found[image] = pixel_box(box)
        except ValueError as error:
            faults.append(Fault("box out of range", f"{where}: {error}"))
    return found, faults
