"""A support set as a folder: photos by class, which every command reads, and an index with labels, order and question.

A label is any text, and a folder's name is not: another label may be the same name to Windows or a Mac. So some folders have
names that only resemble their labels, and the index says which label each of them stands for.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lcl_adapter import reading
from lcl_adapter.answering import api_types
from lcl_adapter.answering.sent_images import suffix
from lcl_adapter.data.sources import Picture, read_class_folders
from lcl_adapter.data.sources.base import remarks
from lcl_adapter.data.sources.class_folder import BOXES, INDEX, NEIGHBOURS
from lcl_adapter.data.sources.images import read_bytes
from lcl_adapter.errors import DataError, RunError
from lcl_adapter.files import read_object, whole_folder, write_json
from lcl_adapter.reading import brief
from lcl_adapter.serve.pictures.images import Bounds, check
from lcl_adapter.terminal import printable, show_notes

LONGEST_FOLDER = 80  # bytes of a label's folder: Windows allows 260 characters of a whole path
# What Windows reads as a device, with any suffix: CON, also con.txt
DEVICES = frozenset({"con", "prn", "aux", "nul", "conin$", "conout$", *(f"{port}{n}" for port in ("com", "lpt") for n in "0123456789¹²³")})
FORBIDDEN = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')
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
    label_folders = folder_names(dict.fromkeys(label for label, _ in examples))
    entries = []
    with whole_folder(out) as partial:
        for number, (label, data) in enumerate(examples):
            file = Path(label_folders[label]) / f"{number:03d}{suffix(data)}"
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


def read_photo(photo: Path) -> bytes:
    """The file's bytes. Raises DataError, with its name, where it is no picture that a set can have."""
    return _checked(read_bytes(Picture(photo)), str(photo))


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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{index}: not a file that `support export` wrote ({brief(error)}).") from error
    if len(entries) > api_types.MAX_IMAGES:
        raise DataError(f"{index}: names {len(entries)} photos; a set has at most {api_types.MAX_IMAGES}.")
    examples, total = [], 0
    for label, file in entries:
        try:
            path = (source / file).resolve()
            if not path.is_relative_to(source.resolve()):
                raise OSError("it is outside")
            data = reading.read_bytes(path, MAX_BYTES)
        except (OSError, ValueError, RuntimeError) as error:  # a name with a zero byte, a circle of links
            reason = getattr(error, "strerror", None) or brief(error)
            raise DataError(f"{index}: {brief(file)!r} is not a photo in this folder ({reason}).") from error
        total += len(data)
        if total > MAX_BYTES:
            raise DataError(f"{index}: its photos have more than {MAX_BYTES >> 20} MiB.")
        examples.append((label, _checked(data, str(path))))
    name, question = fields.get("name"), fields.get("question")
    return SetFolder(None if name is None else str(name), None if question is None else str(question), tuple(examples))


def _checked(data: bytes, name: str) -> bytes:
    try:
        check(data, Bounds())
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    return data


def folder_names(labels: Iterable[str]) -> dict[str, str]:
    """Label -> the name of its folder: the label itself where every file system allows it, and no other label has the same name there.

    Names are compared as Windows and a Mac do: without case, and in one form of Unicode.
    """
    names: dict[str, str] = {}
    used = {_compared(INDEX), _compared(NEIGHBOURS), _compared(BOXES)}
    labels = list(labels)
    # Labels that can be names have them, whatever stands before them
    for label in sorted(labels, key=lambda label: _folder_name(label) != label):
        wanted = _folder_name(label)
        name, number = wanted, 1
        while _compared(name) in used:
            number += 1
            name = f"{wanted}-{number}"
        used.add(_compared(name))
        names[label] = name
    return {label: names[label] for label in labels}


def _compared(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKC", name).casefold())


def _folder_name(label: str) -> str:
    """The label, where it can be a folder's name on Windows, a Mac and Linux, and no reader passes over it; else a name that resembles it."""
    name = printable(unicodedata.normalize("NFC", label))
    name = FORBIDDEN.sub("_", name)
    while len(name.encode("utf-8", "surrogatepass")) > LONGEST_FOLDER:
        name = name[:-1]
    name = name.rstrip(" .").lstrip(" ")
    if not name or name.startswith((".", "__MACOSX", "~")) or name.partition(".")[0].rstrip(" ").casefold() in DEVICES:
        name = f"label-{name}".rstrip("-")
    return name
