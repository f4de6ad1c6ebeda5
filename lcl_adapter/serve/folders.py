"""A support set as a folder: photos by class, which every command takes, and a sheet with their order and the question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lcl_adapter.answering import api_types
from lcl_adapter.data.sources import read_class_folders
from lcl_adapter.data.sources.images import read_bytes
from lcl_adapter.errors import DataError, RunError
from lcl_adapter.files import read_object, whole_folder, write_json
from lcl_adapter.serve.images import Bounds, check

SHEET = "support-set.json"
LARGEST = 256 * 2**20  # bytes of a set's photos


@dataclass(frozen=True)
class Written:
    """examples: (label, the image file's bytes), in their order."""

    name: str | None
    question: str | None
    examples: tuple[tuple[str, bytes], ...]


def write(out: Path, name: str, version: int, question: str | None, examples: Sequence[tuple[str, bytes]]) -> None:
    """``out/<label>/000.png``… and the sheet. Raises RunError where ``out`` exists."""
    if out.exists():
        raise RunError(f"{out}: exists already; nothing is overwritten. Give another place.")
    places = {label: _folder_name(label, n) for n, label in enumerate(dict.fromkeys(label for label, _ in examples))}
    sheet = []
    with whole_folder(out) as partial:
        for number, (label, data) in enumerate(examples):
            suffix = api_types.data_url(data[:16]).partition("/")[2].partition(";")[0].replace("jpeg", "jpg")
            file = Path(places[label]) / f"{number:03d}.{suffix}"
            (partial / file).parent.mkdir(exist_ok=True)
            (partial / file).write_bytes(data)
            sheet.append({"label": label, "file": str(file)})
        write_json(partial / SHEET, {"name": name, "version": version, "question": question, "examples": sheet})


def read_photos(source: Path, shots: int | None = None) -> tuple[tuple[str, bytes], ...]:
    """``source/<label>/*``, at most ``shots`` of each. Raises DataError with the photo's name."""
    pool = read_class_folders(source)
    shown = [(one.name, picture) for one in pool.classes for picture in one.pictures[:shots]]
    return tuple((label, _checked(read_bytes(picture), str(picture))) for label, picture in shown)


def read(source: Path) -> Written:
    """A folder that :func:`write` wrote, or one of photos a class. Raises DataError with the photo's name."""
    sheet_file = source / SHEET
    if not sheet_file.exists():
        return Written(None, None, read_photos(source))
    try:
        sheet = read_object(sheet_file)
        listed = [(str(one["label"]), str(one["file"])) for one in sheet["examples"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{sheet_file}: not a sheet that `support export` wrote ({error}).") from error
    if len(listed) > api_types.MAX_IMAGES:
        raise DataError(f"{sheet_file}: names {len(listed)} photos, {api_types.MAX_IMAGES} are the most that a set has.")
    examples, total = [], 0
    for label, file in listed:
        place = (source / file).resolve()
        if not place.is_relative_to(source.resolve()) or not place.is_file():
            raise DataError(f"{sheet_file}: {file!r} is no photo in this folder.")
        total += place.stat().st_size
        if total > LARGEST:
            raise DataError(f"{sheet_file}: its photos are more than {LARGEST >> 20} MiB.")
        examples.append((label, _checked(place.read_bytes(), str(place))))
    name, question = sheet.get("name"), sheet.get("question")
    return Written(None if name is None else str(name), None if question is None else str(question), tuple(examples))


def _checked(data: bytes, name: str) -> bytes:
    try:
        check(data, Bounds())
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    return data


def _folder_name(label: str, number: int) -> str:
    """The label, where that can be a folder's name everywhere."""
    plain = re.fullmatch(r"[^\x00-\x1f/\\:*?\"<>|.][^\x00-\x1f/\\:*?\"<>|]{0,99}", label) and not label.endswith((" ", "."))
    return label if plain else f"label-{number}"
