"""Visual inspection: MVTec AD's tree and its relatives, and VisA's.

    MVTec AD   <category>/train/good/000.png   test/{good,<defect>}/000.png   ground_truth/<defect>/000_mask.png
    MVTec LOCO the same, ground_truth/<defect>/000/000.png; validation/good are references too
    MVTec AD 2 <category>/train/good   test_public/{good,bad}   test_public/ground_truth/bad/000_mask.png
    BTAD       <category>/train/ok   test/{ok,ko}   ground_truth/ko/0000.bmp, with `good: ok`
    folders    [<category>/]{normal,abnormal}/000.png, with `good: normal`
    VisA       <object>/Data/Images/{Normal,Anomaly}/*.JPG   Data/Masks/Anomaly/*.png   image_anno.csv   split_csv/1cls.csv (or none)

References are the training photos, so that no test photo is ever in a support set.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from lcl_adapter.data.sources.base import Fault, InspectionPool, PartCategory, Picture, Specimen, check_faults
from lcl_adapter.data.sources.held_out import HeldOut, split_of
from lcl_adapter.data.sources.images import SUFFIXES
from lcl_adapter.data.sources.tree import Tree
from lcl_adapter.errors import DataError, did_you_mean
from lcl_adapter.recipe.options import as_list
from lcl_adapter.recipe.sources import PartReader

GOOD = "good"
LOOKS_GOOD = frozenset({"good", "ok", "okay", "normal", "pass", "passed", "fine", "io", "nodefect", "no_defect", "non_defective", "良品", "正常"})
TESTS = ("test", "test_public")
TRAININGS = ("train", "validation")
MASKS = "ground_truth"
MASK_ENDS = ("_mask", "_gt", "_label")  # of files
MASK_FOLDERS = ("masks", "mask", "gt")  # beside the folders of photos: alone, or behind a kind's name
DEFECTIVE_TRAINING = "defective training photo"
VISA_SPLIT = "split_csv/1cls.csv"
VISA_NORMAL, VISA_ANOMALY, VISA_MASKS = "Data/Images/Normal/", "Data/Images/Anomaly/", "Data/Masks/Anomaly/"
VISA_TESTED = 10  # without the split file, every tenth good photo is asked about; in the published split, a tenth is


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
    """``type: mvtec``. MVTec AD's tree, or anything laid out like it, a folder or a zip archive: one category or several."""

    type: Literal["mvtec"]
    good: Annotated[list[str], BeforeValidator(as_list), Field(min_length=1, description="names of the folders of good parts")] = [GOOD]

    def open(self, name: str, min_pictures: int = 1) -> InspectionPool:
        return read_mvtec(self.path, name, self.split, self.held_out, self.hold_out, self.on_fault, self.good, self.validation)


class Visa(Parts):
    """``type: visa``. VisA as it is published."""

    type: Literal["visa"]

    def open(self, name: str, min_pictures: int = 1) -> InspectionPool:
        return read_visa(self.path, name, self.split, self.held_out, self.hold_out, self.on_fault, self.validation)


def categories_of_split(
    categories: Sequence[str], split: str, held_out: Sequence[str], hold_out: float, root: Path, validation: float = 0.0
) -> list[str]:
    """The categories of a split.

    ``held_out`` names those that are held out; if it is empty, their names decide. validation: the share of the split "validation",
    of the others where ``held_out`` names some.

    Raises DataError for a name that is no category, or if the split is empty.
    """
    unknown = [n for n in held_out if n not in categories]
    if unknown:
        listed = ", ".join(f"{n!r}{did_you_mean(n, categories)}" for n in unknown)
        raise DataError(f"{root}: `held_out` names {listed}; there are {', '.join(categories) or 'no categories'}.")

    def own_split(name: str) -> str:
        if name in held_out:
            return "held_out"
        return split_of(name, 0.0 if held_out else hold_out, validation)

    chosen = [n for n in categories if split in {"all", own_split(n)}]
    if not chosen:
        raise DataError(f"{root}: no category falls into split {split!r}; name some under `held_out`, or change `hold_out`.")
    return chosen


def read_mvtec(
    root: Path,
    name: str = "",
    split: str = "all",
    held_out: Sequence[str] = (),
    hold_out: float = 0.0,
    on_fault: str = "refuse",
    good: Sequence[str] = (GOOD,),
    validation: float = 0.0,
) -> InspectionPool:
    """Every folder with a ``test`` folder is a category; so is the root, if it has one. A folder of folders of photos, one of
    them good, is a category too: every second good photo is then a reference.

    ``root`` may be a zip archive. An underscore in a name is a space. good: names of folders with good parts.

    Raises DataError for no category or an unknown held-out one and, unless ``on_fault`` is "skip", for a missing mask,
    an empty folder, or a folder whose name says that its parts are good, which is not in ``good``.
    """
    tree = Tree(root)
    faults, notes = list(tree.faults), list(tree.notes)
    prefixes = _categories(tree, tuple(good))
    if not prefixes:
        raise DataError(
            f"{root}: no category in it; MVTec's layout is <category>/train/good, <category>/test/<defect>, ground_truth/<defect>.{_hint(tree)}"
        )
    categories = []
    skipped: dict[str, int] = {}
    by_name: dict[str, list[str]] = {}
    for category in sorted(prefixes):
        by_name.setdefault(spaced(category), []).append(category)
    same = [", ".join(map(repr, folders)) for folders in by_name.values() if len(folders) > 1]
    faults += [
        Fault("two names that are one", f"{root}: an underscore is a space, so {listed} are one category; join or rename them") for listed in same
    ]
    for category in categories_of_split(sorted(prefixes), split, held_out, hold_out, root, validation):
        reader = _Category(tree, prefixes[category], tuple(good))
        part = reader.read()
        faults += reader.faults
        notes += reader.notes
        for reason, count in reader.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
        if part is not None:
            categories.append(part)
    return check_faults(InspectionPool(name or root.stem, tuple(categories), skipped, tuple(faults), tuple(notes)), on_fault)


def _categories(tree: Tree, good: tuple[str, ...]) -> dict[str, str]:
    """category -> the prefix of its files."""

    def is_category(prefix: str) -> bool:
        inside = tree.folders(prefix)
        if any(test in inside for test in TESTS):
            return True
        photos = [folder for folder in inside if _images(tree, f"{prefix}{folder}/")]
        return len(photos) > 1 and any(folder in good or _looks_good(folder) for folder in photos)

    if is_category(""):
        return {tree.root.stem if tree.archive else tree.root.name: ""}
    return {folder: f"{folder}/" for folder in tree.folders() if is_category(f"{folder}/")}


def _hint(tree: Tree) -> str:
    """What a tree without a category may be instead."""
    if any("/Data/Images/" in name for name in tree.files):
        return " This looks like VisA as it is published: use `type: visa`."
    deeper = next((n.split("/test/")[0] for n in tree.files if "/test/" in n), None)
    if deeper is not None and "/" in deeper:
        inner = PurePosixPath(deeper).parent
        return (
            f" There are categories deeper: unpack it, and give {inner}."
            if tree.archive
            else f" There are categories deeper: give {tree.root / inner}."
        )
    other = next((part for n in tree.files for part in n.split("/")[:-1] if part.lower() in {*TESTS, *TRAININGS} and part != part.lower()), None)
    if other is not None:
        return f" A folder is called {other!r}: rename it to {other.lower()!r}, and others alike."
    return ""


def _looks_good(folder: str) -> bool:
    return folder.lower() in LOOKS_GOOD


class _Category:
    """Reads one category. prefix: of its files, with a slash behind, or "" for the root."""

    def __init__(self, tree: Tree, prefix: str, good: tuple[str, ...]) -> None:
        self.tree, self.prefix, self.good = tree, prefix, good
        self.name = prefix.rstrip("/") or (tree.root.stem if tree.archive else tree.root.name)
        self.faults: list[Fault] = []
        self.notes: list[str] = []
        self.skipped: dict[str, int] = {}

    def read(self) -> PartCategory | None:
        """None, with its faults, where nothing can be shown or asked about."""
        inside = self.tree.folders(self.prefix)
        test = next((f"{self.prefix}{folder}/" for folder in TESTS if folder in inside), self.prefix)
        kinds = [kind for kind in self.tree.folders(test) if kind not in {*TRAININGS, MASKS}]
        folders_of = _mask_folders(kinds)
        kinds = [kind for kind in kinds if kind not in folders_of.values()]
        named_good = [kind for kind in kinds if kind not in self.good and _looks_good(kind)]
        if named_good:
            remedy = f"set `good: [{', '.join(dict.fromkeys((*self.good, *named_good)))}]`"
            self.faults.append(
                Fault("good parts by another name", f"{self.tree.root}: {test}{named_good[0]} looks like good parts, and would be a defect: {remedy}")
            )
            return None
        references = [n for folder in TRAININGS if folder in inside for n in self._training(f"{self.prefix}{folder}/")]
        good: list[str] = []
        defects: dict[str, tuple[Specimen, ...]] = {}
        for kind in kinds:
            names, masks = _with_masks(_images(self.tree, f"{test}{kind}/"))
            if not names:
                self.faults.append(Fault("empty defect folder", f"{self.tree.root}: {test}{kind} has no images: add some or remove the folder"))
            elif kind in self.good:
                good += names
            else:
                folder = folders_of.get(kind, folders_of.get("")) if not masks else None
                masks = masks or (self._masks(f"{test}{folder}/") if folder else {})
                defects[spaced(kind)] = tuple(self._defective(test, kind, names, masks))
        if test == self.prefix:  # without a division into training and test photos
            references, good = good[::2], good[1::2]
        if not references:
            folders = " or ".join(f"{self.prefix}train/{name}" for name in self.good)
            self.faults.append(Fault("no references", f"{self.tree.root}: {folders} has no images: no good part can be shown"))
        if not references or not (good or defects):
            return None
        picture = self.tree.picture
        specimens = tuple(Specimen(picture(n)) for n in good)
        return PartCategory(spaced(self.name), tuple(map(picture, references)), specimens, {k: s for k, s in defects.items() if s})

    def _training(self, folder: str) -> list[str]:
        """Good training photos. Others are counted: a support set of good parts shows none of them."""
        names = _images(self.tree, folder)
        for kind in self.tree.folders(folder):
            own = _images(self.tree, f"{folder}{kind}/")
            if kind in self.good or _looks_good(kind):
                names += own
            elif own:
                self.skipped[DEFECTIVE_TRAINING] = self.skipped.get(DEFECTIVE_TRAINING, 0) + len(own)
        return names

    def _defective(self, test: str, kind: str, names: Sequence[str], beside: dict[str, list[str]]) -> list[Specimen]:
        """The photos of one kind of defect. Without any mask they can be used too, but not to locate defects.

        beside: a photo's stem -> its masks, where they are not in ``ground_truth``.
        """
        roots = [root for root in (f"{self.prefix}{MASKS}/", f"{test}{MASKS}/") if kind in self.tree.folders(root)]
        if not roots and not beside:
            if any(self.tree.folders(root) for root in (f"{self.prefix}{MASKS}/", f"{test}{MASKS}/")):
                self.notes.append(f"{self.tree.root}: {test}{kind} has no masks: it is used for good or defective, and not to locate defects")
            return [Specimen(self.tree.picture(name), spaced(kind)) for name in names]
        masks_of = self._masks(f"{roots[0]}{kind}/") if roots else beside
        specimens = []
        for name in names:
            masks = masks_of.get(PurePosixPath(name).stem, [])
            if not masks:
                expected = f" {roots[0]}{kind}/{PurePosixPath(name).stem}_mask.png" if roots else ", but others of its kind have one"
                self.faults.append(Fault("missing mask", f"{self.tree.root}: {name} has no mask{expected}"))
                continue
            first, *others = map(self.tree.picture, masks)
            specimens.append(Specimen(self.tree.picture(name), spaced(kind), first, tuple(others)))
        return specimens

    def _masks(self, folder: str) -> dict[str, list[str]]:
        """A photo's stem -> its masks: ``<stem>_mask.*`` (MVTec AD), ``<stem>.*`` (BTAD), or all of ``<stem>/`` (MVTec LOCO)."""
        masks: dict[str, list[str]] = {}
        for name in _images(self.tree, folder):
            stem = PurePosixPath(name).stem
            masks.setdefault(stem, []).append(name)
            if stem.endswith(MASK_ENDS):
                masks.setdefault(stem.rpartition("_")[0], []).append(name)
        for stem in self.tree.folders(folder):
            masks.setdefault(stem, []).extend(_images(self.tree, f"{folder}{stem}/"))
        return masks


def _with_masks(names: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The photos among the files of a folder, and by their stems the masks that lie beside them, ``000_mask.png``."""
    stems = {PurePosixPath(name).stem for name in names}
    photos: list[str] = []
    masks: dict[str, list[str]] = {}
    for name in names:
        stem, _, _ = PurePosixPath(name).stem.rpartition("_")
        if stem in stems and PurePosixPath(name).stem.endswith(MASK_ENDS):
            masks.setdefault(stem, []).append(name)
        else:
            photos.append(name)
    return photos, masks


def _mask_folders(kinds: Sequence[str]) -> dict[str, str]:
    """Kind of defect -> the folder of its masks, among the folders of photos: ``hole_mask``. A folder ``masks`` is of every kind, "".

    A folder ``hole_mask`` without a ``hole`` is a kind of its own.
    """
    folders: dict[str, str] = {}
    for folder in kinds:
        kind, _, end = folder.rpartition("_")
        if end.lower() in MASK_FOLDERS and (kind in kinds or not kind):
            folders[kind] = folder
    return folders


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
    objects = {own: ""} if _images(tree, VISA_NORMAL) else {n: f"{n}/" for n in tree.folders() if _images(tree, f"{n}/{VISA_NORMAL}")}
    if not objects:
        raise DataError(f"{tree.root}: no {VISA_SPLIT}, and no <object>/{VISA_NORMAL} with good photos{_not_visa(tree)}.")
    rows = []
    for category, folder in objects.items():
        masks = {PurePosixPath(n).stem: n for n in _images(tree, f"{folder}{VISA_MASKS}")}
        if not masks:
            notes.append(f"{tree.root}: {folder}{VISA_MASKS} has no masks: {category} is used for good or defective, and not to locate defects")
        normal = _images(tree, f"{folder}{VISA_NORMAL}")
        asked = set(normal[VISA_TESTED - 1 :: VISA_TESTED] or normal[1:][-1:])
        origin = f"{tree.root}"
        rows += [_VisaRow(category, folder, name not in asked, True, name, None, origin) for name in normal]
        for name in _images(tree, f"{folder}{VISA_ANOMALY}"):
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


def _images(tree: Tree, folder: str) -> list[str]:
    return [n for n in tree.within(folder) if Path(n).suffix.lower() in SUFFIXES]


def spaced(name: str) -> str:
    """``metal_nut`` -> "metal nut", as in a sentence."""
    return name.replace("_", " ")
