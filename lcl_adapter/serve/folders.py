"""A support set as a folder: photos by class, which every command reads, and an index with order and question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lcl_adapter import reading
from lcl_adapter.answering import api_types
from lcl_adapter.data.sources import read_class_folders
from lcl_adapter.data.sources.base import remarks
from lcl_adapter.data.sources.images import read_bytes
from lcl_adapter.errors import DataError, RunError
from lcl_adapter.files import read_object, whole_folder, write_json
from lcl_adapter.serve.images import Bounds, check
from lcl_adapter.terminal import show_notes

INDEX = "support-set.json"  # name, version, question, and label and file of each example in order
MAX_BYTES = 256 * 2**20  # of a set's photos together


@dataclass(frozen=True)
class SetFolder:
    """A folder's content.

    name, question: None if it has no index. examples: (label, the image file's bytes), in order.
    """

    name: str | None
    question: str | None
    examples: tuple[tuple[str, bytes], ...]


def write(out: Path, name: str, version: int, question: str | None, examples: Sequence[tuple[str, bytes]]) -> None:
    """Write ``out/<label>/000.png``… and the index. Raises RunError if ``out`` exists."""
    if out.exists():
        raise RunError(f"{out}: exists already, and nothing is overwritten. Give another folder.")
    label_folders = {label: _folder_name(label, n) for n, label in enumerate(dict.fromkeys(label for label, _ in examples))}
    entries = []
    with whole_folder(out) as partial:
        for number, (label, data) in enumerate(examples):
            file = Path(label_folders[label]) / f"{number:03d}{api_types.suffix(data)}"
            (partial / file).parent.mkdir(exist_ok=True)
            (partial / file).write_bytes(data)
            entries.append({"label": label, "file": str(file)})
        write_json(partial / INDEX, {"name": name, "version": version, "question": question, "examples": entries})


def read_photos(source: Path, shots: int | None = None) -> tuple[tuple[str, bytes], ...]:
    """Read ``source/<label>/*``, at most ``shots`` of each label. What is passed over is printed.

    Raises DataError, with the photo's name if a photo is the cause.
    """
    pool = read_class_folders(source)
    show_notes(remarks(pool))
    pictures = [(folder.name, picture) for folder in pool.classes for picture in folder.pictures[:shots]]
    return tuple((label, _checked(read_bytes(picture), str(picture))) for label, picture in pictures)


def read(source: Path) -> SetFolder:
    """Read a folder that :func:`write` wrote, or a folder of photos by class.

    Raises DataError, with the photo's name if a photo is the cause.
    """
    index = source / INDEX
    if not index.exists():
        return SetFolder(None, None, read_photos(source))
    try:
        fields = read_object(index)
        entries = [(str(entry["label"]), str(entry["file"])) for entry in fields["examples"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{index}: not a file that `support export` wrote ({error}).") from error
    if len(entries) > api_types.MAX_IMAGES:
        raise DataError(f"{index}: names {len(entries)} photos; a set has at most {api_types.MAX_IMAGES}.")
    examples, total = [], 0
    for label, file in entries:
        path = (source / file).resolve()
        if not path.is_relative_to(source.resolve()) or not path.is_file():
            raise DataError(f"{index}: {file!r} is not a photo in this folder.")
        total += path.stat().st_size
        if total > MAX_BYTES:
            raise DataError(f"{index}: its photos have more than {MAX_BYTES >> 20} MiB.")
        examples.append((label, _checked(reading.read_bytes(path, MAX_BYTES), str(path))))
    name, question = fields.get("name"), fields.get("question")
    return SetFolder(None if name is None else str(name), None if question is None else str(question), tuple(examples))


def _checked(data: bytes, name: str) -> bytes:
    try:
        check(data, Bounds())
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    return data


def _folder_name(label: str, number: int) -> str:
    """The label, if every file system allows it as a folder's name; otherwise ``label-<number>``."""
    valid = re.fullmatch(r"[^\x00-\x1f/\\:*?\"<>|.][^\x00-\x1f/\\:*?\"<>|]{0,99}", label) and not label.endswith((" ", "."))
    return label if valid else f"label-{number}"
