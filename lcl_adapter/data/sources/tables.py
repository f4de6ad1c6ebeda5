"""Lists as tools write them -> rows: CSV and its relatives, JSON Lines, a JSON list, COCO JSON, Label Studio's JSON.

A row is a mapping from column to value. What is wrong with one row stands in it under FAULT, so that the rest is read.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from lcl_adapter import reading
from lcl_adapter.data.sources.base import first_names
from lcl_adapter.data.sources.images import SUFFIXES
from lcl_adapter.data.sources.records import Records
from lcl_adapter.data.sources.text import read_text
from lcl_adapter.errors import DataError, did_you_mean
from lcl_adapter.reading import brief

Row = tuple[str, dict[str, Any]]  # where it was read, and its values by column
LINES = (".jsonl", ".json", ".ndjson")
DELIMITERS = ("\t", ",", ";", "|", " ")
NO_VALUE = frozenset({"", "nan", "null", "<na>"})  # what pandas and JSON write where there is nothing
SEVERAL, NO_CLASS = "picture of several classes", "picture of no class"
COLUMNS = 20  # how many an error lists
FAULT = "\0fault"  # no name of a column
LEFT_OUT = "\0left out"
MAX_DEPTH = 64  # levels of one record
ANNOTATION = "\0annotation"  # in a row that stands for one object of a picture, its number: a picture may have several


@dataclass
class Table:
    """The rows of one list or of several.

    label: the wanted column that a table may have as one column of 0 and 1 for each class instead (Roboflow's ``_classes.csv``).
    notes: of guessed encodings and such columns, complete once the rows are read.
    """

    files: Path
    wanted: tuple[str, ...]
    encoding: str | None = None
    label: str | None = None
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Row]:
        """Raises DataError for a file that cannot be read, or that lacks a wanted column."""
        matches = sorted(self.files.parent.glob(self.files.name)) if "*" in self.files.name else [self.files]
        if not matches:
            raise DataError(f"{self.files}: no such file.")
        for file in matches:
            text, note = read_text(file, self.encoding)
            self.notes += [note] if note else []
            stem = Path(file.stem) if file.suffix == ".gz" else file
            begins = text.lstrip()[:1]
            if stem.suffix not in LINES:
                yield from self._delimited(file, text)
            elif begins == "[":
                yield from _listed(file, text)
            elif begins == "{" and '"annotations"' in text and '"categories"' in text:
                yield from _coco(file, text, self.notes)
            elif begins == "{" and (pairs := self._label_by_name(text)):
                yield from pairs
            else:
                yield from _json_lines(file, text)

    def _label_by_name(self, text: str) -> list[Row]:
        """The rows of one JSON object with a label for each picture's name, ``{"a.jpg": "good"}``; none for anything else."""
        image = [name for name in self.wanted if name != self.label]
        if self.label is None or len(image) != 1:
            return []
        try:
            labels = reading.parse_json(text)
        except ValueError:
            return []
        if not isinstance(labels, dict) or {*self.wanted} & {*labels} or not all(PurePosixPath(name).suffix.lower() in SUFFIXES for name in labels):
            return []
        return [(f"{self.files}: {name!r}", {image[0]: name, self.label: label}) for name, label in labels.items()]

    def _delimited(self, file: Path, text: str) -> Iterator[Row]:
        """CSV, TSV and what else has a heading. Any line break; the delimiter is the one that splits the wanted columns."""
        wanted = self.wanted
        lines = text.replace("\r\n", "\n").replace("\r", "\n")
        first, _, rest = lines.partition("\n")
        given = first.strip(' "')
        skipped = 0
        if given.lower().startswith("sep=") and len(given) == 5:  # Excel's line that names the delimiter
            delimiter, lines, skipped = given[4], rest, 1
        else:
            delimiter = _delimiter(first, wanted)
        try:
            reader = csv.reader(io.StringIO(lines), delimiter=delimiter, skipinitialspace=True)
            header = [name.strip() for name in next(reader, [])]
            if not any(header):
                raise DataError(f"{file}: its first line is empty; it must name the columns.")
            if repeated := [name for name in wanted if header.count(name) > 1]:
                raise DataError(f"{file}: several columns are called {repeated[0]!r}. Rename or remove one.")
            missing = [name for name in wanted if name not in header]
            rows = self._rows(file, reader, header, skipped)
            if missing == [self.label] and len(classes := [n for n in header if n and n not in wanted]) > 1:
                head = next(rows, None)
                if head is not None and all(_flag(head[1].get(name)) is not None for name in classes):
                    self.notes.append(f"{file}: no column {self.label!r}; each of {first_names(classes)} is read as a class, with 1 for its pictures")
                    yield from self._one_of(classes, chain([head], rows))
                    return
            if missing:
                near = ", ".join(f"{name!r}{did_you_mean(name, header)}" for name in missing)
                pictures = any(PurePosixPath(name).suffix.lower() in SUFFIXES for name in header)
                remedy = "Its first line is a picture, and must name the columns." if pictures else "Set `columns` in the recipe."
                raise DataError(f"{file}: no column {near}; there are {first_names([repr(name) for name in header], COLUMNS)}. {remedy}")
            yield from rows
        except csv.Error as error:
            raise DataError(f"{file}, line {reader.line_num + skipped}: not a table that can be read ({error}); is a quote not closed?") from error

    def _rows(self, file: Path, reader: Any, header: Sequence[str], skipped: int) -> Iterator[Row]:
        """The rows of a table under its heading. skipped: lines before it. Raises csv.Error."""
        for cells in reader:
            inside = sum(cell.count("\n") for cell in cells)
            origin = f"{file}, line {reader.line_num - inside + skipped}"
            if not any(map(str.strip, cells)):  # a spreadsheet's empty row
                continue
            while len(cells) > len(header) and not cells[-1].strip():
                cells.pop()
            row = dict(zip(header, cells, strict=False))
            if any("\n" in str(row.get(name)) for name in self.wanted):
                yield origin, {FAULT: f"a quote that is not closed: the row runs to line {reader.line_num + skipped}"}
            elif len(cells) != len(header):
                yield origin, {FAULT: f"{len(header)} columns are expected ({', '.join(header)}), this line has {len(cells)}"}
            else:
                yield origin, row

    def _one_of(self, classes: Sequence[str], rows: Iterable[Row]) -> Iterator[Row]:
        """Rows with one column a class -> rows with the class in ``label``. In those without one class, LEFT_OUT says why."""
        assert self.label is not None
        for origin, row in rows:
            if FAULT in row:
                yield origin, row
                continue
            wrong = next((name for name in classes if _flag(row.get(name)) is None), None)
            if wrong is not None:
                yield origin, {FAULT: f"{row.get(wrong)!r} in column {wrong!r} is neither 0 nor 1"}
                continue
            own = [name for name in classes if _flag(row.get(name))]
            yield origin, {**row, self.label: own[0]} if len(own) == 1 else {**row, LEFT_OUT: SEVERAL if own else NO_CLASS}


def _flag(cell: Any) -> bool | None:
    """Whether a cell is 1, or 0; None for anything else."""
    return {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}.get(str(cell).strip().lower())


def value(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """The first column's value as text; of a list (ABO has values in several languages), the first. "" where there is none."""
    return next(iter(values(row, columns[:1])), "")


def values(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """All values of these columns as text. A list gives all its elements; an element may be {"value": ...}."""
    texts = []
    for column in columns:
        cell = row.get(column)
        for element in cell if isinstance(cell, list) else [cell]:
            inner = element.get("value") if isinstance(element, dict) else element
            if not is_empty(inner):
                texts.append(str(inner).strip())
    return texts


def is_empty(cell: Any) -> bool:
    """Whether a cell has no value: nothing, blanks, null, or NaN."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell)) or str(cell).strip().lower() in NO_VALUE


def _delimiter(heading: str, wanted: Sequence[str]) -> str:
    """The first delimiter that splits all wanted columns from the heading; else the first that is in it."""
    for delimiter in DELIMITERS:
        try:
            names = {name.strip() for name in next(csv.reader([heading], delimiter=delimiter, skipinitialspace=True), [])}
        except csv.Error:
            continue
        if set(wanted) <= names and (len(names) > 1 or len(wanted) < 2):
            return delimiter
    return next((delimiter for delimiter in DELIMITERS if delimiter in heading), ",")


def _json_lines(file: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would split at other characters too, which JSON text may contain
        if line.strip():
            yield from _record(f"{file}, line {number}", lambda line=line: reading.parse_json(line))  # type: ignore[misc]


def _listed(file: Path, text: str) -> Iterator[Row]:
    """A JSON list of records, or Label Studio's tasks."""
    try:
        records: Iterable[Any] = reading.parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: not JSON ({error}).") from error
    except ValueError:  # one record has a value that cannot be read
        records = _one_by_one(file, None)
    for number, record in enumerate(records, 1):
        yield from _record(f"{file}: record {number}", lambda record=record: _given(record))  # type: ignore[misc]


def _one_by_one(file: Path, key: str | None) -> Iterator[Any]:
    """The records of a list, each parsed by itself; a DataError in the place of one that cannot be read."""
    records = Records(file, key)
    for number in range(len(records)):
        try:
            yield records[number]
        except DataError as error:
            yield error


def _given(record: Any) -> Any:
    """Raises ValueError for a record that could not be parsed."""
    if isinstance(record, DataError):
        raise ValueError(brief(record).rpartition("cannot be read ")[2].strip("()."))
    return record


def _whole(file: Path, text: str) -> Any:
    try:
        return reading.parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: not JSON ({error}).") from error
    except ValueError:
        return {key: [*_one_by_one(file, key)] for key in ("categories", "images", "annotations")}


def _record(origin: str, parse: Any) -> Iterator[Row]:
    try:
        record = parse()
    except ValueError as error:
        yield origin, {FAULT: f"not JSON ({brief(error)})"}
        return
    if not isinstance(record, dict):
        yield origin, {FAULT: "not a JSON object"}
    elif _is_deep(record):
        yield origin, {FAULT: f"nested more than {MAX_DEPTH} deep"}
    elif isinstance(record.get("data"), dict) and isinstance(record.get("annotations"), list):
        yield from _label_studio(origin, record)
    else:
        yield origin, record


def _is_deep(record: Any) -> bool:
    """Whether a record has more than MAX_DEPTH levels. Whatever shows or compares it would go through all of them."""
    level = [record]
    for _ in range(MAX_DEPTH):
        level = [v for one in level for v in (one.values() if isinstance(one, dict) else one) if isinstance(v, dict | list)]
        if not level:
            return False
    return True


def _label_studio(origin: str, task: Mapping[str, Any]) -> Iterator[Row]:
    """A task of Label Studio's JSON: a row for each choice and each box, in the columns of its data and of its controls.

    A box is in the column ``box``, in pixels. A cancelled annotation has no row; a task without annotations has one
    without its label.
    """
    rows = 0
    for annotation in task["annotations"]:
        if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
            continue
        results = annotation.get("result")
        for result in results if isinstance(results, list) else ():
            if not isinstance(result, dict) or not isinstance(result.get("value"), dict):
                continue
            control, marked = str(result.get("from_name", "label")), result["value"]
            labels: list[Any] = next((marked[kind] for kind in ("choices", "rectanglelabels", "labels") if isinstance(marked.get(kind), list)), [])
            row: dict[str, Any] = dict(task["data"])
            try:
                width, height = float(result["original_width"]), float(result["original_height"])
                x, y = float(marked["x"]) * width / 100, float(marked["y"]) * height / 100
                row["box"] = [x, y, x + float(marked["width"]) * width / 100, y + float(marked["height"]) * height / 100]
            except (KeyError, TypeError, ValueError, OverflowError):  # a choice has no place
                pass
            for label in labels:
                rows += 1
                yield origin, {**row, control: label, ANNOTATION: rows}
    if not rows:
        yield origin, dict(task["data"])


def _coco(file: Path, text: str, notes: list[str]) -> Iterator[Row]:
    """COCO JSON: a row for each annotation. Its columns are image, class, group, box, width, height.

    Categories of one name are one class, with a note. Raises DataError where two categories have one id.
    """
    raw = _whole(file, text)
    try:
        ids = [c["id"] for c in raw["categories"] if isinstance(c, dict)]
        if twice := [number for number, count in Counter(ids).items() if count > 1]:
            raise DataError(f"{file}: two categories have the id {brief(twice[0])}; an annotation of it could be of either. Give each its own.")
        names = {c["id"]: (str(c["name"]), str(c.get("supercategory") or "")) for c in raw["categories"] if isinstance(c, dict)}
        images = {i["id"]: i for i in raw["images"] if isinstance(i, dict)}
        paths = {key: str(image["file_name"]) for key, image in images.items()}
        annotations: Iterable[Any] = raw["annotations"]
        iter(annotations)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: not COCO JSON with images, annotations and categories ({type(error).__name__} {brief(error)}).") from error
    for label, count in Counter(label for label, _ in names.values()).items():
        if count > 1:
            alike = ", ".join(str(number) for number, (name, _) in names.items() if name == label)
            notes.append(f"{file}: the categories {alike} all have the name {label!r}; they are read as one class")
    for number, annotation in enumerate(annotations, 1):
        origin = f"{file}: annotation {number}"
        if not isinstance(annotation, dict) or _is_deep(annotation):
            yield origin, {FAULT: brief(annotation) if isinstance(annotation, DataError) else "not a JSON object"}
            continue
        category, image = annotation.get("category_id"), annotation.get("image_id")
        if _hashable(category) not in names or _hashable(image) not in paths:
            what = f"category_id {brief(category)} is no category" if _hashable(category) not in names else f"image_id {brief(image)} is no image"
            yield origin, {FAULT: f"{what} of the file"}
            continue
        label, group = names[category]
        row: dict[str, Any] = {ANNOTATION: number, "image": paths[image], "class": label, "group": "" if group.lower() == "none" else group}
        try:
            x, y, width, height = map(float, annotation["bbox"])
            row["box"] = [x, y, x + width, y + height]
        except (KeyError, TypeError, ValueError, OverflowError):  # a classification has no boxes; where one is wanted, it is missing
            row["box"] = annotation.get("bbox") or None
        yield origin, {**row, "width": images[image].get("width"), "height": images[image].get("height")}


def _hashable(key: Any) -> Any:
    return key if isinstance(key, int | str | float) else None
