"""Parts to inspect in MVTec AD's tree and its relatives.

    MVTec AD   <category>/train/good/000.png   test/{good,<defect>}/000.png   ground_truth/<defect>/000_mask.png
    MVTec LOCO the same, ground_truth/<defect>/000/000.png; validation/good are references too
    MVTec AD 2 <category>/train/good   test_public/{good,bad}   test_public/ground_truth/bad/000_mask.png
    BTAD       <category>/train/ok   test/{ok,ko}   ground_truth/ko/0000.bmp, with `good: ok`
    folders    [<category>/]{normal,abnormal}/000.png, with `good: normal`

References are the training photos, so that no test photo is ever in a support set.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from lcl_adapter.data.sources.base import Fault, InspectionPool, PartCategory, Specimen, check_faults
from lcl_adapter.data.sources.parts import Parts, categories_of_split, images_in, spaced
from lcl_adapter.data.sources.tree import Tree
from lcl_adapter.errors import DataError
from lcl_adapter.recipe.options import as_list

GOOD = "good"
LOOKS_GOOD = frozenset({"good", "ok", "okay", "normal", "pass", "passed", "fine", "io", "nodefect", "no_defect", "non_defective", "良品", "正常"})
TESTS = ("test", "test_public")
TRAININGS = ("train", "validation")
MASKS = "ground_truth"
MASK_ENDS = ("_mask", "_gt", "_label")  # of files
MASK_FOLDERS = ("masks", "mask", "gt")  # beside the folders of photos: alone, or behind a kind's name
DEFECTIVE_TRAINING = "defective training photo"


class Mvtec(Parts):
    """``type: mvtec``. MVTec AD's tree, or anything laid out like it, a folder or a zip archive: one category or several."""

    type: Literal["mvtec"]
    good: Annotated[list[str], BeforeValidator(as_list), Field(min_length=1, description="names of the folders of good parts")] = [GOOD]

    def open(self, name: str, min_pictures: int = 1) -> InspectionPool:
        return read_mvtec(self.path, name, self.split, self.held_out, self.hold_out, self.on_fault, self.good, self.validation)


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
        photos = [folder for folder in inside if images_in(tree, f"{prefix}{folder}/")]
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
            names, masks = _with_masks(images_in(self.tree, f"{test}{kind}/"))
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
        names = images_in(self.tree, folder)
        for kind in self.tree.folders(folder):
            own = images_in(self.tree, f"{folder}{kind}/")
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
        for name in images_in(self.tree, folder):
            stem = PurePosixPath(name).stem
            masks.setdefault(stem, []).append(name)
            if stem.endswith(MASK_ENDS):
                masks.setdefault(stem.rpartition("_")[0], []).append(name)
        for stem in self.tree.folders(folder):
            masks.setdefault(stem, []).extend(images_in(self.tree, f"{folder}{stem}/"))
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
