"""Lists of pictures with their class: CSV, TSV, space-separated text, JSON Lines (also gzipped), and COCO JSON.

A column map says which column has what, so that any product catalogue can be read:

    Stanford Online Products   {image: path, class: class_id, group: super_class_id}, Ebay_train.txt
    Products-10K               {image: name, class: class, group: group}, train.csv
    ABO                        {image: [main_image_id, other_image_id], class: item_id, group: product_type}, with `lookup`
    RPC                        {image: image, class: class, group: group, box: box}: COCO JSON; its fields have these names
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from lcl_adapter.data.sources.base import ClassPool, Fault, PictureClass, PixelBox, check_faults, pixel_box
from lcl_adapter.data.sources.held_out import HeldOut, in_split
from lcl_adapter.data.sources.tree import Tree
from lcl_adapter.errors import DataError
from lcl_adapter.recipe.options import as_list
from lcl_adapter.recipe.sources import ClassReader

Row = tuple[str, dict[str, Any]]  # where it was read, and its values by column
LINES = (".jsonl", ".json")
Columns = Annotated[list[str], BeforeValidator(as_list), Field(min_length=1)]


class Manifest(ClassReader, HeldOut):
    """``type: manifest``. A product catalogue: CSV, TSV, JSON Lines or COCO JSON, with a column map.

    where: only rows with this value in this column are used.
    """

    type: Literal["manifest"]
    file: Path
    images: Path
    columns: dict[Literal["image", "class", "group", "artist", "box"], Columns] = {"image": ["image"], "class": ["class"]}
    where: dict[str, str | int] = {}
    lookup: Path | None = Field(None, description="a CSV with image_id and path, where `image` is an id (ABO)")

    @model_validator(mode="after")
    def _mapped(self) -> Self:
        missing = [c for c in ("image", "class") if c not in self.columns]
        several = [c for c, names in self.columns.items() if c != "image" and len(names) > 1]
        if several:
            raise ValueError(f"`columns`: {several[0]} is one column; only `image` may be several")
        if missing:
            raise ValueError(f"`columns` must say which column is {' and which is '.join(missing)}")
        return self

    def open(self, name: str, min_pictures: int = 1) -> ClassPool:
        columns = {str(k): v for k, v in self.columns.items()}
        where = {k: str(v) for k, v in self.where.items()}
        return read_manifest(self.file, self.images, columns, name, min_pictures, self.split, self.hold_out, self.on_fault, where, self.lookup)


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
) -> ClassPool:
    """The classes of a list. ``files`` may contain ``*``; ``images`` is a folder or a zip archive.

    columns: ``image`` (several columns are allowed, and lists in them; every value is used) and ``class``; optionally
    ``group`` (near classes), ``artist`` (who photographed it), ``box`` ("x0 y0 x1 y1").
    where: only rows with this value in this column. lookup: a CSV with ``image_id`` and ``path``, if ``image`` is an
    id.

    Raises DataError for a missing column (with a list of the columns), a missing file and, unless ``on_fault`` is
    "skip", a bad row.
    """
    tree = Tree(images)
    paths = _lookup(lookup) if lookup else None
    listed: dict[str, dict[str, tuple[str | None, PixelBox | None]]] = {}  # class -> path -> artist and box
    columns_read: set[str] = set()
    groups: dict[str, str] = {}
    faults: list[Fault] = []
    for origin, row in _rows(files, columns):
        if "fault" in row:
            faults.append(Fault("broken line", f"{origin}: {row['fault']}"))
            continue
        columns_read |= row.keys()
        if where and any(str(row.get(k)) != str(v) for k, v in where.items()):
            continue
        label = _value(row, columns["class"])
        image_names = list(dict.fromkeys(_values(row, columns["image"])))
        if not image_names or not label:
            empty = columns["class"] if image_names else columns["image"]
            faults.append(Fault("bad record", f"{origin}: no value for {', '.join(map(repr, empty))}"))
            continue
        try:
            box = pixel_box(row.get(columns["box"][0])) if "box" in columns else None
        except ValueError as error:
            faults.append(Fault("box out of range", f"{origin}: {error}"))
            continue
        for image in image_names:
            if paths is not None and image not in paths:
                faults.append(Fault("missing image", f"{origin}: the image id {image!r} is not in {lookup}"))
                continue
            path = PurePosixPath(paths[image] if paths is not None else image).as_posix()  # a/./b is a/b
            fault = _misplaced(path, tree, origin)
            if fault is None and path in listed.get(label, {}):
                if box is not None:  # a picture may show an object twice, with a box for each: the first box is used
                    continue
                fault = Fault("duplicate record", f"{origin}: the image {path!r} is listed twice")
            if fault is not None:
                faults.append(fault)
                continue
            listed.setdefault(label, {})[path] = (_value(row, columns.get("artist", ())) or None, box)
        if group := _value(row, columns.get("group", ())):
            groups[label] = group
    mapped = {c for names in columns.values() for c in names}.union(where or ())
    missing = sorted(mapped - columns_read) if columns_read else []
    if missing:
        raise DataError(f"{files}: no column {', '.join(map(repr, missing))}; there are {', '.join(map(repr, sorted(columns_read)))}.")
    if split != "all":
        listed = {n: p for n, p in listed.items() if in_split(n, split, hold_out)}
    classes, too_small = [], 0
    for label, entries in sorted(listed.items()):
        if len(entries) < min_pictures:
            too_small += 1
            continue
        pictures = tuple(tree.picture(path, artist) for path, (artist, _) in entries.items())
        boxes = tuple(box for _, box in entries.values())
        classes.append(PictureClass(label, pictures, (groups[label],) if label in groups else (), boxes=boxes if any(boxes) else ()))
    skipped = {f"class of fewer than {min_pictures} images": too_small} if too_small else {}
    return check_faults(ClassPool(name or files.stem, tuple(classes), skipped, tuple(faults)), on_fault)


def _misplaced(path: str, tree: Tree, origin: str) -> Fault | None:
    """The fault of an image that leads out of the folder, or does not exist."""
    try:
        tree.picture(path)
    except DataError as error:
        return Fault("path that climbs out", f"{origin}: {error}")
    return None if path in tree else Fault("missing image", f"{origin}: no image {path!r} under {tree.root}")


def _rows(files: Path, columns: Mapping[str, Sequence[str]]) -> Iterator[Row]:
    matches = sorted(files.parent.glob(files.name)) if "*" in files.name else [files]
    if not matches:
        raise DataError(f"{files}: no such file.")
    for file in matches:
        text = _text(file)
        stem = Path(file.stem) if file.suffix == ".gz" else file
        if stem.suffix == ".json" and text.lstrip().startswith("{") and '"annotations"' in text:
            yield from _coco(file, text)
        elif stem.suffix in LINES:
            yield from _json_lines(file, text)
        else:
            yield from _table(file, text, columns)


def _text(file: Path) -> str:
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return raw.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 (byte {error.start}: {error.reason}). Save it as UTF-8.") from error
    except (OSError, EOFError) as error:
        raise DataError(f"{file}: cannot be read ({error}).") from error


def _table(file: Path, text: str, columns: Mapping[str, Sequence[str]]) -> Iterator[Row]:
    head = text.split("\n", 1)[0]
    delimiter = "\t" if "\t" in head else "," if "," in head else ";" if ";" in head else " "
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    header = reader.fieldnames or []
    wanted = {c: None for names in columns.values() for c in names}
    missing = [c for c in wanted if c not in header]
    if missing:
        raise DataError(f"{file}: no column {', '.join(map(repr, missing))}; there are {', '.join(map(repr, header))}. Set `columns` in the recipe.")
    try:
        for row in reader:
            inside = sum(str(value).count("\n") for value in row.values())
            origin = f"{file}, line {reader.line_num - inside}"
            if any("\n" in str(row.get(c)) for c in wanted):
                yield origin, {"fault": f"a quote that is not closed: the row runs to line {reader.line_num}"}
            elif None in row or None in row.values():
                yield origin, {"fault": f"{len(header)} columns are expected ({', '.join(header)}), this line has another number"}
            else:
                yield origin, dict(row)
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: not a table that can be read ({error}); is a quote not closed?") from error


def _json_lines(file: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would split at other characters too, which JSON text may contain
        if line.strip():
            try:
                row = json.loads(line)
                yield f"{file}, line {number}", row if isinstance(row, dict) else {"fault": "not a JSON object"}
            except ValueError as error:
                yield f"{file}, line {number}", {"fault": f"not JSON ({error})"}


def _coco(file: Path, text: str) -> Iterator[Row]:
    try:
        raw = json.loads(text)
        names = {c["id"]: (c["name"], c.get("supercategory", "")) for c in raw["categories"]}
        paths = {i["id"]: i["file_name"] for i in raw["images"]}
        for number, annotation in enumerate(raw["annotations"], 1):
            label, group = names[annotation["category_id"]]
            x, y, width, height = annotation["bbox"]
            box = f"{x} {y} {x + width} {y + height}"
            yield f"{file}: annotation {number}", {"image": paths[annotation["image_id"]], "class": label, "group": group, "box": box}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not COCO JSON with images, annotations and categories ({error!r}).") from error


def _lookup(file: Path) -> dict[str, str]:
    """image id -> path."""
    paths = {}
    for origin, row in _rows(file, {"id": ["image_id"], "path": ["path"]}):
        if "fault" in row:
            raise DataError(f"{origin}: {row['fault']}")
        paths[str(row["image_id"])] = str(row["path"])
    return paths


def _value(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """The first column's value as text; of a list (ABO has values in several languages), the first."""
    return next(iter(_values(row, columns[:1])), "")


def _values(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """All values of these columns as text. A list gives all its elements; an element may be {"value": ...}."""
    texts = []
    for column in columns:
        value = row.get(column)
        for element in value if isinstance(value, list) else [value]:
            text = element.get("value") if isinstance(element, dict) else element
            if text is not None and str(text).strip():
                texts.append(str(text).strip())
    return texts
