"""A folder of class folders: ``photos/<class>/*.jpg``. The folder's name is the class's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Literal

from lcl_adapter import reading
from lcl_adapter.data.sources.base import ClassPool, Fault, PictureClass, check_faults, first_names
from lcl_adapter.data.sources.copies import in_two_classes
from lcl_adapter.data.sources.encodings import Encoding, names_in_other_case, nfc
from lcl_adapter.data.sources.held_out import HeldOut, held_out_shares, in_split
from lcl_adapter.data.sources.images import READ, SUFFIXES
from lcl_adapter.data.sources.picture import PixelBox, pixel_box
from lcl_adapter.data.sources.tree import Tree
from lcl_adapter.errors import DataError, did_you_mean
from lcl_adapter.reading import brief
from lcl_adapter.recipe.sources import ClassReader

NEIGHBOURS = "neighbours.json"
INDEX = "support-set.json"  # of an exported support set: label and file of each photo
BOXES = "boxes.jsonl"
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})  # folders of splits, as others export them
DEEPER, LOOSE = "photo one folder too deep", "photo beside the class folders"


class ClassFolders(ClassReader, HeldOut):
    """``type: class-folder``.

    A user's ``photos/<class>/*.jpg``, a folder or a zip archive; ``boxes.jsonl`` in it may give boxes.
    """

    type: Literal["class-folder"]
    path: Path
    encoding: Encoding = None

    def open(self, name: str, min_pictures: int = 1) -> ClassPool:
        return read_class_folders(self.path, name, min_pictures, self.split, self.hold_out, self.on_fault, self.encoding, self.validation)


def read_class_folders(
    root: Path,
    name: str = "",
    min_pictures: int = 1,
    split: str = "all",
    hold_out: float = 0.0,
    on_fault: str = "refuse",
    encoding: str | None = None,
    validation: float = 0.0,
) -> ClassPool:
    """Every sub-folder is a class, sorted by name.

    Hidden files are ignored. Other files that are no images are counted as skipped; so are, with a note that names them,
    photos that lie beside the class folders or one folder too deep.

    root: a folder or a zip archive. encoding: of an archive's names, see :class:`~lcl_adapter.data.sources.tree.Tree`.
    min_pictures: how many pictures a class needs (shots + 1 query); a class with fewer is a fault.
    split: only the classes of this split, see :func:`~lcl_adapter.data.sources.held_out.in_split`.
    ``neighbours.json`` beside the folders may group classes, ``{"group": ["class", ...]}``, or rank them,
    ``{"ranked": {"class": ["nearest", ...]}}``. ``boxes.jsonl`` may give boxes:
    ``{"image": "class/a.jpg", "bbox": [x0, y0, x1, y1]}``. In an exported support set, ``support-set.json`` gives the label of a
    folder whose name only resembles it.

    Raises DataError: no such folder, no class folders, folders of splits instead of classes, and, unless ``on_fault`` is
    "skip", a class with no or too few pictures, a photo that is in two classes, a link that leads nowhere.
    """
    if not root.exists():
        raise DataError(f"{root}: no such folder. A class folder holds one folder of photos a class: photos/<class>/*.jpg.")
    tree = Tree(root, encoding)
    folders = tree.folders()
    _refuse_folders_of_splits(tree, folders)
    names_of: dict[str, list[str]] = {}  # class -> names of its images
    deeper_of: dict[str, list[str]] = {}  # class -> names of images in its sub-folders
    other_files = 0
    for folder in folders:
        files = tree.within(f"{folder}/")
        names_of[folder], deeper_of[folder] = _photos(files), _photos(tree.deeper.get(folder, []))
        other_files += len(files) - len(names_of[folder])
    if split != "all":
        names_of = {n: names for n, names in names_of.items() if in_split(n, split, hold_out, validation)}
        if not names_of:
            raise DataError(f"{root}: no class falls into split {split!r} with {held_out_shares(hold_out, validation)}; add classes or change that.")
    if not names_of:
        raise DataError(f"{root}: no class folders in it: put the photos of each class into a folder of its own, photos/<class>/*.jpg.")
    first = next(iter(names_of))
    if len(names_of) == 1 and not names_of[first] and tree.folders(f"{first}/"):
        raise DataError(f"{root}: its only folder {first!r} holds folders itself; give {root / first} as the path, or pack what is in it.")
    labels = _labels(tree, names_of)
    groups, ranked = neighbours(tree)
    boxes, faults = _boxes(tree)
    faults += tree.faults
    faults += _names_alike(root, [labels.get(n, n) for n in names_of])
    unknown = sorted({*groups, *ranked} - {*folders, *labels.values()})
    if unknown:
        listed = ", ".join(f"{n!r}{did_you_mean(n, list(names_of))}" for n in unknown[:5])
        faults.append(Fault("unknown class", f"{root}: {NEIGHBOURS} names {listed}, which is no folder here"))
    pictures_of = {class_name: {n: tree.picture(n) for n in names} for class_name, names in names_of.items()}
    twice = in_two_classes({class_name: list(pictures.values()) for class_name, pictures in pictures_of.items()})
    faults += twice.faults
    classes, of_copies = [], 0
    for class_name, pictures in pictures_of.items():
        usable = {n: picture for n, picture in pictures.items() if picture not in twice.pictures}
        if not pictures:
            faults.append(_empty_class(root, class_name, deeper_of[class_name]))
        elif len(usable) < min(min_pictures, len(pictures)) or not usable:
            of_copies += 1  # each of them is a fault by itself
        elif len(usable) < min_pictures:
            message = f"{root}: class {class_name!r} has {len(usable)} images, {min_pictures} are needed: add photos or lower `shots`"
            faults.append(Fault("class of too few images", message))
        else:
            own_boxes = tuple(boxes.get(n) for n in usable) if boxes else ()
            label = labels.get(class_name, class_name)
            own_ranked = ranked.get(label, ())
            classes.append(PictureClass(label, tuple(usable.values()), groups.get(label, ()), boxes=own_boxes, ranked=own_ranked))
    deeper = [n for class_name, names in deeper_of.items() if names_of.get(class_name) for n in names]
    loose = _photos(tree.within(""))
    skipped = {"class of photos of other classes": of_copies, "not an image file": other_files, DEEPER: len(deeper), LOOSE: len(loose)}
    passed_over = (
        f"{root}: not used, {what}: {first_names(names)}; {remedy}"
        for what, names, remedy in ((DEEPER, deeper, "move it up into its class"), (LOOSE, loose, "move it into a class"))
        if names
    )
    notes = (*tree.notes, *names_in_other_case(str(root), [name.strip() for name in names_of]), *passed_over)
    pool = ClassPool(name or root.name, tuple(classes), {reason: count for reason, count in skipped.items() if count}, tuple(faults), notes)
    return check_faults(pool, on_fault)


def _labels(tree: Tree, folders: Iterable[str]) -> dict[str, str]:
    """Folder -> label, of an exported support set whose labels cannot all be names of folders. Empty for any other folder.

    Raises DataError where two folders stand for one label, and for another form.
    """
    if INDEX not in tree:
        return {}
    try:
        listed: dict[str, set[str]] = {}
        for example in reading.parse_json(tree.text(INDEX).text)["examples"]:
            listed.setdefault(nfc(example["file"].partition("/")[0]), set()).add(nfc(example["label"]))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{tree.root}: {INDEX} is not a file that `support export` wrote ({brief(error)}).") from error
    # A folder of two labels, as earlier versions wrote some, has its own name
    labels = {folder: min(of) if len(of := listed.get(folder, {folder})) == 1 else folder for folder in folders}
    twice = [label for label, count in Counter(labels.values()).items() if count > 1]
    if twice:
        raise DataError(f"{tree.root}: by {INDEX}, two folders are of one label, {first_names(twice)}; join the folders, or remove the file.")
    return labels


def _photos(names: list[str]) -> list[str]:
    return [n for n in names if PurePosixPath(n).suffix.lower() in SUFFIXES]


def _refuse_folders_of_splits(tree: Tree, folders: list[str]) -> None:
    """Raises DataError for ``photos/{train,valid,test}/<class>``: its folders would be three classes."""
    splits = [f for f in folders if f.lower() in SPLITS]
    of_classes = [f for f in splits if not _photos(tree.within(f"{f}/")) and any(_photos(tree.within(f"{f}/{c}/")) for c in tree.folders(f"{f}/"))]
    if not of_classes or len(folders) > len(splits):
        return
    named = ", ".join(of_classes)
    first = next((f for f in of_classes if f.lower().startswith("train")), of_classes[0])
    remedy = "unpack it, and give the folder" if tree.archive else "give"
    raise DataError(f"{tree.root}: its folders {named} are splits, and hold the class folders: {remedy} {tree.root / first} as the path.")


def _names_alike(root: Path, folders: list[str]) -> list[Fault]:
    """Faults of folders whose names differ in blanks around them only."""
    by_name: dict[str, list[str]] = {}
    for folder in folders:
        by_name.setdefault(folder.strip(), []).append(folder)
    listed = [", ".join(map(repr, same)) for same in by_name.values() if len(same) > 1]
    return [Fault("two names that are one", f"{root}: the classes {names} differ in blanks only; join or rename them") for names in listed]


def _empty_class(root: Path, name: str, deeper: list[str]) -> Fault:
    if deeper:
        message = f"{root}: class {name!r} has its {len(deeper)} images one folder too deep ({first_names(deeper)}): move them up into {name!r}"
        return Fault("empty class", message)
    suffixes = ", ".join(sorted(READ))
    return Fault("empty class", f"{root}: class {name!r} has no images ({suffixes}): add some or remove the folder")


def neighbours(tree: Tree) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """class -> its groups, and class -> its nearest classes, from ``neighbours.json``.

    Raises DataError for another form.
    """
    if NEIGHBOURS not in tree:
        return {}, {}
    where = f"{tree.root}: {NEIGHBOURS}"
    try:
        raw = reading.parse_json(tree.text(NEIGHBOURS).text)
        ranked = raw.pop("ranked", {}) if isinstance(raw.get("ranked"), dict) else {}
        if any(isinstance(members, str) for members in (*raw.values(), *ranked.values())):
            raise TypeError("a list of classes is expected")
        groups: dict[str, tuple[str, ...]] = {nfc(member): (nfc(str(group)),) for group, members in raw.items() for member in members}
        return groups, {nfc(class_name): tuple(nfc(str(name)) for name in nearest) for class_name, nearest in ranked.items()}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f'{where}: neither {{"group": ["class", ...]}} nor {{"ranked": {{"class": ["nearest", ...]}}}} ({brief(error)}).') from error


def _boxes(tree: Tree) -> tuple[dict[str, PixelBox], list[Fault]]:
    """image -> box, from ``boxes.jsonl``, and the faults in it."""
    boxes: dict[str, PixelBox] = {}
    faults: list[Fault] = []
    if BOXES not in tree:
        return boxes, faults
    for number, line in enumerate(tree.text(BOXES).text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{tree.root}: {BOXES}, line {number}"
        try:
            record = reading.parse_json(line)
            image, box = record["image"], record["bbox"]
        except (ValueError, KeyError, TypeError) as error:
            faults.append(Fault("broken line", f'{where}: not of the form {{"image": "class/a.jpg", "bbox": [x0, y0, x1, y1]}} ({brief(error)})'))
            continue
        if image not in tree:
            faults.append(Fault("missing image", f"{where}: no image {brief(image)!r}"))
            continue
        try:
            boxes[nfc(PurePosixPath(image).as_posix())] = pixel_box(box)
        except ValueError as error:
            faults.append(Fault("box out of range", f"{where}: {error}"))
    return boxes, faults
