"""VisA's parts to inspect, with its published one-class split or without.

    <object>/Data/Images/{Normal,Anomaly}/*.JPG   Data/Masks/Anomaly/*.png   image_anno.csv   split_csv/1cls.csv (or none)

References are the training photos, so that no test photo is ever in a support set.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from lcl_adapter.data.sources.base import Fault, InspectionPool, PartCategory, Specimen, check_faults
from lcl_adapter.data.sources.parts import Parts, categories_of_split, images_in, spaced
from lcl_adapter.data.sources.picture import Picture
from lcl_adapter.data.sources.tree import Tree
from lcl_adapter.errors import DataError

VISA_SPLIT = "split_csv/1cls.csv"
VISA_NORMAL, VISA_ANOMALY, VISA_MASKS = "Data/Images/Normal/", "Data/Images/Anomaly/", "Data/Masks/Anomaly/"
VISA_TESTED = 10  # without the split file, every tenth good photo is asked about; in the published split, a tenth is


class Visa(Parts):
    """``type: visa``. VisA as it is published."""

    type: Literal["visa"]

    def open(self, name: str, min_pictures: int = 1) -> InspectionPool:
        return read_visa(self.path, name, self.split, self.held_out, self.hold_out, self.on_fault, self.validation)


def read_visa(
    root: Path,
    name: str = "",
    split: str = "all",
    held_out: Sequence[str] = (),
    hold_out: float = 0.0,
    on_fault: str = "refuse",
    validation: float = 0.0,
) -> InspectionPool:
    """VisA as it is published, with its own one-class split. A defect's kind is the first label in ``image_anno.csv``.

    Without the split's file, every tenth good photo of an object, by name, is asked about, and the others are references.

    Raises DataError as :func:`read_mvtec` does, and if a column of the split file is missing, or there is no object.
    """
    tree = Tree(root)
    faults, notes = list(tree.faults), list(tree.notes)
    rows = _visa_split(tree) if VISA_SPLIT in tree else _visa_folders(tree, notes)
    categories = []
    for category in categories_of_split(sorted({row.category for row in rows}), split, held_out, hold_out, root, validation):
        kinds = _visa_kinds(tree, rows, category)
        references: list[Picture] = []
        good: list[Specimen] = []
        defects: dict[str, list[Specimen]] = {}
        for row in (row for row in rows if row.category == category):
            if row.image not in tree:
                faults.append(Fault("missing image", f"{row.origin}: no image {row.image!r}"))
            elif row.reference:
                references.append(tree.picture(row.image))
            elif row.normal:
                good.append(Specimen(tree.picture(row.image)))
            elif row.mask is not None and row.mask not in tree:
                faults.append(Fault("missing mask", f"{row.origin}: {row.image} has no mask {row.mask!r}"))
            else:
                kind = kinds.get(row.image, "anomaly")
                defects.setdefault(kind, []).append(Specimen(tree.picture(row.image), kind, tree.picture(row.mask) if row.mask else None))
        if references and (good or defects):
            categories.append(PartCategory(spaced(category), tuple(references), tuple(good), {k: tuple(s) for k, s in sorted(defects.items())}))
        else:
            faults.append(Fault("no references", f"{root}: {category} has no training photo, or nothing to test"))
    return check_faults(InspectionPool(name or root.stem, tuple(categories), {}, tuple(faults), tuple(notes)), on_fault)


class _VisaRow(NamedTuple):
    """A photo of VisA. folder: its object's, "" where the root is one. mask: None where the object has no masks. origin: for messages."""

    category: str
    folder: str
    reference: bool
    normal: bool
    image: str
    mask: str | None
    origin: str


def _visa_split(tree: Tree) -> list[_VisaRow]:
    """The photos by the published one-class split."""
    records = _csv_rows(tree, VISA_SPLIT)
    columns = list(records[0]) if records else []
    missing = [c for c in ("object", "split", "label", "image", "mask") if c not in columns]
    if missing:
        raise DataError(f"{tree.root}: {VISA_SPLIT} has no column {', '.join(missing)}; there are {', '.join(columns)}.")
    rows = []
    for number, row in enumerate(records, 2):
        category, where = str(row["object"]), f"{tree.root}: {VISA_SPLIT}, line {number}"
        rows.append(_VisaRow(category, f"{category}/", row["split"] == "train", row["label"] == "normal", row["image"], row["mask"], where))
    return rows


def _visa_folders(tree: Tree, notes: list[str]) -> list[_VisaRow]:
    """The photos by their folders; good ones divided as VISA_TESTED says. Raises DataError where there is no object."""
    own = tree.root.stem if tree.archive else tree.root.name
    objects = {own: ""} if images_in(tree, VISA_NORMAL) else {n: f"{n}/" for n in tree.folders() if images_in(tree, f"{n}/{VISA_NORMAL}")}
    if not objects:
        raise DataError(f"{tree.root}: no {VISA_SPLIT}, and no <object>/{VISA_NORMAL} with good photos{_not_visa(tree)}.")
    rows = []
    for category, folder in objects.items():
        masks = {PurePosixPath(n).stem: n for n in images_in(tree, f"{folder}{VISA_MASKS}")}
        if not masks:
            notes.append(f"{tree.root}: {folder}{VISA_MASKS} has no masks: {category} is used for good or defective, and not to locate defects")
        normal = images_in(tree, f"{folder}{VISA_NORMAL}")
        asked = set(normal[VISA_TESTED - 1 :: VISA_TESTED] or normal[1:][-1:])
        origin = f"{tree.root}"
        rows += [_VisaRow(category, folder, name not in asked, True, name, None, origin) for name in normal]
        for name in images_in(tree, f"{folder}{VISA_ANOMALY}"):
            stem = PurePosixPath(name).stem
            mask = masks.get(stem, f"{folder}{VISA_MASKS}{stem}.png") if masks else None
            rows.append(_VisaRow(category, folder, False, False, name, mask, origin))
    notes.append(
        f"{tree.root}: no {VISA_SPLIT}: every {VISA_TESTED}th good photo of an object, in the order of names, is asked about, "
        "the others are references. Figures are not those of the published split"
    )
    return rows


def _not_visa(tree: Tree) -> str:
    """What a tree without an object of VisA may be instead."""
    deeper = next((n.partition(f"/{VISA_NORMAL}")[0] for n in tree.files if f"/{VISA_NORMAL}" in n), None)
    if deeper is not None and "/" in deeper:
        return (
            f"; there are such folders deeper: give {tree.root / PurePosixPath(deeper).parent}"
            if not tree.archive
            else f"; unpack it, and give {deeper}"
        )
    return "; this looks like MVTec's layout: use `type: mvtec`" if any(n.split("/")[1:2] == ["test"] for n in tree.files) else ""


def _visa_kinds(tree: Tree, rows: Sequence[_VisaRow], category: str) -> dict[str, str]:
    """image -> kind of defect. Names in the file begin with the object, also where the root is that object."""
    folder = next(row.folder for row in rows if row.category == category)
    file = f"{folder}image_anno.csv"
    if file not in tree:
        return {}
    kinds = {}
    for row in _csv_rows(tree, file):
        if row.get("image") and row.get("label"):
            name = row["image"] if folder else row["image"].partition("/")[2]
            kinds[name] = row["label"].split(",")[0].strip()
    return kinds


def _csv_rows(tree: Tree, file: str) -> list[dict[str, str]]:
    """The rows of a CSV file in the tree; "" where a row ends early. Raises DataError."""
    reader = csv.DictReader(io.StringIO(tree.text(file).text))
    try:
        return [{column: row.get(column) or "" for column in reader.fieldnames or ()} for row in reader]
    except csv.Error as error:
        raise DataError(f"{tree.root}: {file}, line {reader.line_num + 1}: not a table that can be read ({error}).") from error
