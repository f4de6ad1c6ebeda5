"""A folder of class folders: ``photos/<class>/*.jpg``. The folder's name is the class's name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lcl_adapter.errors import DataError
from lcl_adapter.sources.base import ClassPool, Picture, PictureClass
from lcl_adapter.sources.images import SUFFIXES

NEIGHBOURS = "neighbours.json"


def read_class_folders(root: Path, name: str = "", min_pictures: int = 1, split: str = "all", hold_out: float = 0.0) -> ClassPool:
    """Every sub-folder is a class, in the order of names; hidden files are passed over, other files counted as skipped.

    ``min_pictures``: how many pictures a class needs to be of use (shots + 1 query); fewer is an error that lists the
    classes. ``split`` keeps the classes of one side of :func:`is_held_out`.
    ``neighbours.json`` beside the folders may group classes: ``{"group": ["class", ...]}``.

    Raises DataError: no such folder, no class folders, an empty class, too few pictures.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. A class folder holds one folder of photos a class: photos/<class>/*.jpg.")
    skipped: dict[str, int] = {}
    found: dict[str, list[Picture]] = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        pictures = [Picture(p) for p in files if p.suffix.lower() in SUFFIXES]
        if len(pictures) < len(files):
            skipped["not an image file"] = skipped.get("not an image file", 0) + len(files) - len(pictures)
        found[folder.name] = pictures
    if split != "all":
        found = {n: p for n, p in found.items() if is_held_out(n, hold_out) == (split == "held_out")}
        if not found:
            raise DataError(f"{root}: no class falls into split {split!r} with `hold_out: {hold_out}`; add classes or change `hold_out`.")
    faults = []
    if not found:
        faults.append("no class folders in it: put the photos of each class into a folder of its own, photos/<class>/*.jpg")
    for class_name, pictures in found.items():
        if not pictures:
            faults.append(f"class {class_name!r} has no images ({', '.join(sorted(SUFFIXES))}): add some or remove the folder")
        elif len(pictures) < min_pictures:
            faults.append(f"class {class_name!r} has {len(pictures)} images, {min_pictures} are needed: add photos or lower `shots`")
    if faults:
        raise DataError("\n".join([f"{root}:", *(f"  {fault}" for fault in faults)]))
    groups = _groups(root)
    classes = tuple(PictureClass(n, tuple(p), groups.get(n, ())) for n, p in found.items())
    return ClassPool(name or root.name, classes, skipped)


def is_held_out(class_name: str, share: float) -> bool:
    """Whether a class is set apart for evaluation: decided by its name alone, so that adding classes moves no other."""
    digest = hashlib.sha256(class_name.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < share


def _groups(root: Path) -> dict[str, tuple[str, ...]]:
    path = root / NEIGHBOURS
    if not path.exists():
        return {}
    try:
        grouped = json.loads(path.read_text(encoding="utf-8"))
        return {member: (str(group),) for group, members in grouped.items() for member in members}
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f'{path}: not of the form {{"group": ["class", ...]}} ({error}).') from error
