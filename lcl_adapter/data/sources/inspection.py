"""Visual inspection: MVTec AD's tree, and VisA's.

    MVTec AD   <category>/train/good/000.png   test/{good,<defect>}/000.png   ground_truth/<defect>/000_mask.png
    VisA       <object>/Data/Images/{Normal,Anomaly}/*.JPG   Data/Masks/Anomaly/*.png   image_anno.csv   split_csv/1cls.csv

References are the training photos, so that no test photo is ever in a support set.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, model_validator

from lcl_adapter.data.sources.base import Fault, InspectionPool, PartCategory, Picture, Specimen, check_faults
from lcl_adapter.data.sources.held_out import HeldOut, is_held_out
from lcl_adapter.data.sources.images import SUFFIXES
from lcl_adapter.data.sources.tree import Tree
from lcl_adapter.errors import DataError, did_you_mean
from lcl_adapter.recipe.options import as_list
from lcl_adapter.recipe.sources import PartReader

GOOD = "good"
VISA_SPLIT = "split_csv/1cls.csv"


class Parts(PartReader, HeldOut):
    """Categories are trained on or held out. ``held_out`` names the held-out ones; else ``hold_out`` is their share."""

    path: Path
    held_out: Annotated[list[str], BeforeValidator(as_list)] = []

    @model_validator(mode="after")
    def _held_out_needs_a_split(self) -> Self:
        if self.split == "all" and self.held_out:
            raise ValueError("`held_out` without `split` holds nothing out: set `split: train` here and `split: held_out` in the suite")
        return self


class Mvtec(Parts):
    """``type: mvtec``. MVTec AD's tree, or anything laid out like it, a folder or a zip archive."""

    type: Literal["mvtec"]

    def open(self, name: str, min_pictures: int = 1) -> InspectionPool:
        return read_mvtec(self.path, name, self.split, self.held_out, self.hold_out, self.on_fault)


class Visa(Parts):
    """``type: visa``. VisA as it is published."""

    type: Literal["visa"]

    def open(self, name: str, min_pictures: int = 1) -> InspectionPool:
        return read_visa(self.path, name, self.split, self.held_out, self.hold_out, self.on_fault)


def categories_of_split(categories: Sequence[str], split: str, held_out: Sequence[str], hold_out: float, root: Path) -> list[str]:
    """The categories of a split.

    ``held_out`` names those that are held out; if it is empty, :func:`is_held_out` decides.

    Raises DataError for a name that is no category, or if the split is empty.
    """
    unknown = [n for n in held_out if n not in categories]
    if unknown:
        listed = ", ".join(f"{n!r}{did_you_mean(n, categories)}" for n in unknown)
        raise DataError(f"{root}: `held_out` names {listed}; there are {', '.join(categories) or 'no categories'}.")

    def is_evaluated(name: str) -> bool:
        return name in held_out if held_out else is_held_out(name, hold_out)

    chosen = [n for n in categories if split == "all" or is_evaluated(n) == (split == "held_out")]
    if not chosen:
        raise DataError(f"{root}: no category falls into split {split!r}; name some under `held_out`, or change `hold_out`.")
    return chosen


def read_mvtec(
    root: Path, name: str = "", split: str = "all", held_out: Sequence[str] = (), hold_out: float = 0.0, on_fault: str = "refuse"
) -> InspectionPool:
    """Every folder with a ``test`` folder is a category.

    ``root`` may be a zip archive. An underscore in a name is a space.

    Raises DataError for no category or an unknown held-out one and, unless ``on_fault`` is "skip", for a missing mask
    or an empty folder.
    """
    tree = Tree(root)
    faults: list[Fault] = []
    all_categories = [f for f in tree.folders() if "test" in tree.folders(f"{f}/")]
    if not all_categories:
        raise DataError(f"{root}: no category in it; MVTec's layout is <category>/train/good, <category>/test/<defect>, ground_truth/<defect>.")
    categories = []
    for category in categories_of_split(all_categories, split, held_out, hold_out, root):
        references = tuple(tree.picture(n) for n in _images(tree, f"{category}/train/{GOOD}/"))
        if not references:
            faults.append(Fault("no references", f"{root}: {category}/train/{GOOD} has no images: no good part can be shown"))
        good: tuple[Specimen, ...] = ()
        defects: dict[str, tuple[Specimen, ...]] = {}
        for kind in tree.folders(f"{category}/test/"):
            names = _images(tree, f"{category}/test/{kind}/")
            if not names:
                faults.append(Fault("empty defect folder", f"{root}: {category}/test/{kind} has no images: add some or remove the folder"))
            elif kind == GOOD:
                good = tuple(Specimen(tree.picture(n)) for n in names)
            else:
                defects[spaced(kind)] = tuple(_defective(tree, category, kind, names, faults))
        if references and (good or defects):
            categories.append(PartCategory(spaced(category), references, good, {k: s for k, s in defects.items() if s}))
    return check_faults(InspectionPool(name or root.stem, tuple(categories), {}, tuple(faults)), on_fault)


def _defective(tree: Tree, category: str, kind: str, names: Sequence[str], faults: list[Fault]) -> list[Specimen]:
    """The photos of one kind of defect. A category without any mask can be used too, but not to locate defects."""
    specimens = []
    masked = bool(tree.folders(f"{category}/ground_truth/"))
    for name in names:
        mask = f"{category}/ground_truth/{kind}/{Path(name).stem}_mask.png"
        if not masked:
            specimens.append(Specimen(tree.picture(name), spaced(kind)))
        elif mask not in tree:
            faults.append(Fault("missing mask", f"{tree.root}: {name} has no mask {mask}"))
        else:
            specimens.append(Specimen(tree.picture(name), spaced(kind), tree.picture(mask)))
    return specimens


def read_visa(
    root: Path, name: str = "", split: str = "all", held_out: Sequence[str] = (), hold_out: float = 0.0, on_fault: str = "refuse"
) -> InspectionPool:
    """VisA as it is published, with its own one-class split. A defect's kind is the first label in ``image_anno.csv``.

    Raises DataError as :func:`read_mvtec` does, and if the split file or one of its columns is missing.
    """
    tree = Tree(root)
    faults: list[Fault] = []
    if VISA_SPLIT not in tree:
        hint = "; this looks like MVTec's layout: use `type: mvtec`" if any(n.split("/")[1:2] == ["test"] for n in tree.files) else ""
        raise DataError(f"{root}: no {VISA_SPLIT}, which says what is trained on and what is tested{hint}.")
    reader = csv.DictReader(io.StringIO(tree.text(VISA_SPLIT).text))
    expected = ("object", "split", "label", "image", "mask")
    missing = [c for c in expected if c not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{root}: {VISA_SPLIT} has no column {', '.join(missing)}; there are {', '.join(reader.fieldnames or ())}.")
    rows = list(reader)
    categories = []
    for category in categories_of_split(sorted({r["object"] for r in rows}), split, held_out, hold_out, root):
        kinds = _visa_kinds(tree, category)
        references: list[Picture] = []
        good: list[Specimen] = []
        defects: dict[str, list[Specimen]] = {}
        for number, row in enumerate(rows, 2):
            if row["object"] != category:
                continue
            where = f"{root}: {VISA_SPLIT}, line {number}"
            if row["image"] not in tree:
                faults.append(Fault("missing image", f"{where}: no image {row['image']!r}"))
            elif row["split"] == "train":
                references.append(tree.picture(row["image"]))
            elif row["label"] == "normal":
                good.append(Specimen(tree.picture(row["image"])))
            elif row["mask"] not in tree:
                faults.append(Fault("missing mask", f"{where}: {row['image']} has no mask {row['mask']!r}"))
            else:
                kind = kinds.get(row["image"], "anomaly")
                defects.setdefault(kind, []).append(Specimen(tree.picture(row["image"]), kind, tree.picture(row["mask"])))
        if references and (good or defects):
            categories.append(PartCategory(spaced(category), tuple(references), tuple(good), {k: tuple(s) for k, s in sorted(defects.items())}))
        else:
            faults.append(Fault("no references", f"{root}: {category} has no training photo, or nothing to test"))
    return check_faults(InspectionPool(name or root.stem, tuple(categories), {}, tuple(faults)), on_fault)


def _visa_kinds(tree: Tree, category: str) -> dict[str, str]:
    """image -> kind of defect."""
    file = f"{category}/image_anno.csv"
    if file not in tree:
        return {}
    return {row["image"]: row["label"].split(",")[0].strip() for row in csv.DictReader(io.StringIO(tree.text(file).text)) if row.get("image")}


def _images(tree: Tree, folder: str) -> list[str]:
    return [n for n in tree.within(folder) if Path(n).suffix.lower() in SUFFIXES]


def spaced(name: str) -> str:
    """``metal_nut`` -> "metal nut", as in a sentence."""
    return name.replace("_", " ")
