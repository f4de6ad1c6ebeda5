"""Lists of pictures with their class: CSV, TSV, space-separated text, JSON Lines (also gzipped), a JSON list, COCO JSON, and
Label Studio's JSON (``tables``).

A column map says which column has what, so that any product catalogue can be read:

    Stanford Online Products   {image: path, class: class_id, group: super_class_id}, Ebay_train.txt
    Products-10K               {image: name, class: class, group: group}, train.csv
    ABO                        {image: [main_image_id, other_image_id], class: item_id, group: product_type}, with `lookup`
    RPC                        {image: image, class: class, group: group, box: box}: COCO JSON; its fields have these names
    Roboflow, TensorFlow       {image: filename, class: class, box: [xmin, ymin, xmax, ymax], size: [width, height]}, _annotations.csv
    Roboflow, one column of 0 and 1 a class    {image: filename, class: class}, _classes.csv
    Label Studio               {image: image, class: choice}: its CSV, JSON or JSON-MIN; `choice` is the name of the control
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import BeforeValidator, Field, model_validator

from lcl_adapter.data.sources.base import ClassPool, Fault, PictureClass, check_faults, first_names
from lcl_adapter.data.sources.copies import in_two_classes
from lcl_adapter.data.sources.encodings import Encoding, names_in_other_case, nfc
from lcl_adapter.data.sources.held_out import HeldOut, in_split
from lcl_adapter.data.sources.picture import Picture, PixelBox, pixel_box
from lcl_adapter.data.sources.tables import ANNOTATION, COLUMNS, FAULT, LEFT_OUT, SEVERAL, Table, value, values
from lcl_adapter.data.sources.tree import Tree, relative_name
from lcl_adapter.errors import DataError
from lcl_adapter.recipe.options import as_list
from lcl_adapter.recipe.sources import ClassReader

LABEL_STUDIO = re.compile(r"[0-9a-f]{8}-")  # what it puts before the name of an uploaded file
Columns = Annotated[list[str], BeforeValidator(as_list), Field(min_length=1)]


class Manifest(ClassReader, HeldOut):
    """``type: manifest``. A product catalogue: CSV, TSV, JSON Lines or COCO JSON, with a column map.

    where: only rows with this value in this column are used.
    """

    type: Literal["manifest"]
    file: Path
    images: Path
    columns: dict[Literal["image", "class", "group", "artist", "box", "size"], Columns] = {"image": ["image"], "class": ["class"]}
    where: dict[str, str | int] = {}
    crop: bool = Field(False, description="show each object of a detection export by itself, cut out at its box")
    lookup: Path | None = Field(None, description="a CSV with image_id and path, where `image` is an id (ABO)")
    encoding: Encoding = None

    @model_validator(mode="after")
    def _mapped(self) -> Self:
        missing = [c for c in ("image", "class") if c not in self.columns]
        several = [c for c, names in self.columns.items() if c not in {"image", "box", "size"} and len(names) > 1]
        if several:
            raise ValueError(f"`columns`: {several[0]} is one column; only `image` may be several")
        if len(self.columns.get("box", ["box"])) not in {1, 4}:
            raise ValueError("`columns`: box is one column, or four: x0, y0, x1, y1")
        if len(self.columns.get("size", ["width", "height"])) != 2:
            raise ValueError("`columns`: size is two columns: width, height")
        if missing:
            raise ValueError(f"`columns` must say which column is {' and which is '.join(missing)}")
        if self.crop and "box" not in self.columns:
            raise ValueError("`crop` cuts pictures at their boxes: `columns` must say which column is box")
        return self

    def open(self, name: str, min_pictures: int = 1) -> ClassPool:
        columns = {str(k): v for k, v in self.columns.items()}
        where = {k: str(v) for k, v in self.where.items()}
        rest = (self.on_fault, where, self.lookup, self.crop, self.encoding, self.validation)
        return read_manifest(self.file, self.images, columns, name, min_pictures, self.split, self.hold_out, *rest)


def read_manifest(
    files: Path,
    images: Path,
    columns: Mapping[str, Sequence[str]],
    name: str = "",
    min_pictures: int = 1,
    split: str = "all",
    hold_out: float = 0.0,
    on_fault: str = "refuse",
    where: Mapping[str, str] | None = None,
    lookup: Path | None = None,
    crop: bool = False,
    encoding: str | None = None,
    validation: float = 0.0,
) -> ClassPool:
    """The classes of a list. ``files`` may contain ``*``; ``images`` is a folder or a zip archive.

    columns: ``image`` (several columns are allowed, and lists in them; every value is used) and ``class``; optionally
    ``group`` (near classes), ``artist`` (who photographed it), ``box`` ("x0 y0 x1 y1", or four columns), ``size`` (two
    columns, width and height, which COCO has by itself).
    where: only rows with this value in this column. lookup: a CSV with ``image_id`` and ``path``, if ``image`` is an
    id. crop: cut every object out at its box. encoding: of the list and of an archive's names.

    A picture that is listed in several classes, without boxes, is left out and counted: shown whole, it would have two
    true names.

    Raises DataError for a missing column (with a list of the columns), a missing file and, unless ``on_fault`` is
    "skip", a bad row.
    """
    tree = Tree(images, encoding)
    find = _Finder(tree, _lookup(lookup, encoding) if lookup else None)
    mapped = tuple(dict.fromkeys([c for names in columns.values() for c in names] + list(where or ())))
    table = Table(files, mapped, encoding, columns["class"][0])
    listed: dict[str, dict[Picture, PixelBox | None]] = {}  # class -> picture -> box
    columns_read: set[str] = set()
    groups: dict[str, str] = {}
    faults: list[Fault] = []
    skipped: dict[str, int] = {}
    boxed = "box" in columns
    for origin, row in table:
        if FAULT in row:
            faults.append(Fault("broken line", f"{origin}: {row[FAULT]}"))
            continue
        columns_read |= row.keys() - {ANNOTATION, LEFT_OUT}
        if where and any(str(row.get(k)) != str(v) for k, v in where.items()):
            continue
        if LEFT_OUT in row:
            skipped[row[LEFT_OUT]] = skipped.get(row[LEFT_OUT], 0) + 1
            continue
        if len(set(_plain(row.get(columns["class"][0])))) > 1:
            skipped[SEVERAL] = skipped.get(SEVERAL, 0) + 1
            continue
        label = nfc(value(row, columns["class"]))
        image_names = list(dict.fromkeys(values(row, columns["image"])))
        if not image_names or not label:
            empty = columns["class"] if image_names else columns["image"]
            faults.append(Fault("bad record", f"{origin}: no value for {', '.join(map(repr, empty))}"))
            continue
        try:
            box = _box(row, columns["box"]) if boxed else None
        except ValueError as error:
            faults.append(Fault("box out of range", f"{origin}: {error}"))
            continue
        for image in image_names:
            try:
                picture = find(image, origin, value(row, columns.get("artist", ())) or None, box if crop else None)
            except _MissingError as missing:
                faults.append(missing.fault)
                continue
            if boxed and (size := _size(row, columns.get("size", ("width", "height")))):
                picture = replace(picture, listed_size=size)
            if picture in listed.get(label, {}):
                if not boxed and ANNOTATION not in row:
                    faults.append(Fault("duplicate record", f"{origin}: the image {PurePosixPath(image).as_posix()!r} is listed twice"))
                continue  # a picture may show an object twice, with a box for each: the first box is used
            listed.setdefault(label, {})[picture] = None if crop else box
        if group := value(row, columns.get("group", ())):
            groups[label] = group
    missing_columns = sorted(set(mapped) - columns_read) if columns_read else []
    if missing_columns:
        there = first_names([repr(name) for name in sorted(columns_read)], COLUMNS)
        raise DataError(f"{files}: no column {', '.join(map(repr, missing_columns))}; there are {there}.")
    notes = [*tree.notes, *table.notes, *find.notes]
    if not boxed and (several := _of_several_classes(listed)):
        skipped[SEVERAL] = skipped.get(SEVERAL, 0) + len(several)
        named = first_names([str(p.member or p.path.name) for p in several])
        notes.append(f"{files}: listed in several classes, and left out: {named}; with boxes, `crop: true` shows each object by itself")
        listed = {label: {p: b for p, b in entries.items() if p not in several} for label, entries in listed.items()}
    if not boxed:
        twice = in_two_classes({label: list(entries) for label, entries in listed.items()})
        faults += twice.faults
        listed = {label: {p: b for p, b in entries.items() if p not in twice.pictures} for label, entries in listed.items()}
    if split != "all":
        listed = {n: p for n, p in listed.items() if in_split(n, split, hold_out, validation)}
    notes += names_in_other_case(str(files), list(listed))
    classes, too_small = [], 0
    for label, entries in sorted((label, entries) for label, entries in listed.items() if entries):
        if len(entries) < min_pictures:
            too_small += 1
            continue
        boxes = tuple(entries.values())
        classes.append(PictureClass(label, tuple(entries), (groups[label],) if label in groups else (), boxes=boxes if any(boxes) else ()))
    if too_small:
        skipped[f"class of fewer than {min_pictures} images"] = too_small
    return check_faults(ClassPool(name or files.stem, tuple(classes), skipped, tuple(faults), tuple(notes)), on_fault)


def _plain(cell: Any) -> list[str]:
    """The labels in a cell's list. Mappings are left out: ABO's are one value in several languages."""
    return [str(element) for element in cell if not isinstance(element, dict)] if isinstance(cell, list) else []


def _box(row: Mapping[str, Any], columns: Sequence[str]) -> PixelBox:
    """Raises ValueError."""
    return pixel_box(row.get(columns[0]) if len(columns) == 1 else [row.get(column) for column in columns])


def _size(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[int, int] | None:
    """Width and height by the list; None where it has none."""
    try:
        width, height = (int(float(str(row.get(column)))) for column in columns)
    except (ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None


def _of_several_classes(listed: Mapping[str, Mapping[Picture, object]]) -> dict[Picture, int]:
    """The pictures that are listed in more than one class, with the number of classes."""
    counts = Counter(picture for entries in listed.values() for picture in entries)
    return {picture: count for picture, count in counts.items() if count > 1}


class _MissingError(Exception):
    """An image that is not there, or not inside."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


@dataclass
class _Finder:
    """Finds a list's pictures under the names that tools write: Windows separators, absolute paths inside the folder, and
    Label Studio's paths of uploaded files.

    paths: image id -> path, of a lookup. renamed: listed names that are there under another one.
    """

    tree: Tree
    paths: Mapping[str, str] | None = None
    renamed: dict[str, str] = field(default_factory=dict)

    def __call__(self, image: str, origin: str, artist: str | None, crop: PixelBox | None) -> Picture:
        """The picture of a listed image. Raises _MissingError."""
        if self.paths is not None:
            if image not in self.paths:
                raise _MissingError(Fault("missing image", f"{origin}: the image id {image!r} is not in the lookup's list"))
            image = self.paths[image]
        outside: DataError | None = None
        for candidate, is_other in self._candidates(image):
            if candidate in self.tree:
                if is_other:
                    self.renamed[image] = candidate
                try:
                    return self.tree.picture(candidate, artist) if crop is None else self.tree.picture(candidate, artist).cropped(crop)
                except DataError as error:
                    outside = error
        try:
            self.tree.picture(image)
        except DataError as error:
            outside = outside or error
        if outside is not None:
            raise _MissingError(Fault("path that climbs out", f"{origin}: {outside}"))
        raise _MissingError(
            Fault(
                "missing image",
                f"{origin}: no image {image if '://' in image else PurePosixPath(image).as_posix()!r} under {self.tree.root}{self._remedy(image)}",
            )
        )

    @property
    def notes(self) -> list[str]:
        if not self.renamed:
            return []
        listed, there = next(iter(self.renamed.items()))
        return [f"{self.tree.root}: {len(self.renamed):,} listed images are there under other names, for instance {listed!r} as {there!r}"]

    def _candidates(self, image: str) -> list[tuple[str, bool]]:
        """Names to look for, and whether a match is reported."""
        plain = PurePosixPath(image).as_posix()  # a/./b is a/b
        names = [(plain, False)]
        if "\\" in image:
            plain = PurePosixPath(image.replace("\\", "/")).as_posix()
            names.append((plain, False))
        if not self.tree.archive:
            names.append((relative_name(self.tree.root, plain), False))
        if plain.startswith("/data/"):
            local = parse_qs(urlsplit(plain).query).get("d", [])  # /data/local-files/?d=folder/photo.jpg
            uploaded = PurePosixPath(urlsplit(plain).path).name
            names += [(name, True) for given in local for name in (given, PurePosixPath(given).name)]
            names += [(uploaded, True), (LABEL_STUDIO.sub("", uploaded, count=1), True)] if uploaded else []
        return names

    def _remedy(self, image: str) -> str:
        """What the image may be instead: a link that leads nowhere, or a name in another case."""
        if "://" in image:
            return ": it is an address; fetch the pictures first"
        name = nfc(PurePosixPath(image.replace("\\", "/")).as_posix())
        if name in self.tree.dangling:
            return f": it is a link to {self.tree.dangling[name]}, which is not there. Is it mounted?"
        other = self._by_lower_case.get(name.lower())
        return f"; there is {other!r}" if other else ""

    @property
    def _by_lower_case(self) -> dict[str, str]:
        if "_lower" not in vars(self):
            self._lower = {name.lower(): name for name in self.tree.files}
        return self._lower


def _lookup(file: Path, encoding: str | None) -> dict[str, str]:
    """image id -> path."""
    paths = {}
    for origin, row in Table(file, ("image_id", "path"), encoding):
        if FAULT in row:
            raise DataError(f"{origin}: {row[FAULT]}")
        paths[str(row["image_id"])] = str(row["path"])
    return paths
