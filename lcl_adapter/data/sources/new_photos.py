"""Photos to classify: files, and folders at any depth, listed in a stable order. None is opened here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lcl_adapter.data.sources.images import READ, SUFFIXES
from lcl_adapter.data.sources.picture import Picture
from lcl_adapter.errors import DataError


@dataclass(frozen=True)
class NewPhotos:
    """pictures: in the order to ask about. skipped: other files of the folders.

    repeated: pictures of a folder that were listed before, and are asked about once.
    """

    pictures: tuple[Picture, ...]
    skipped: tuple[Path, ...] = ()
    repeated: tuple[Path, ...] = ()


def list_photos(paths: Sequence[Path]) -> NewPhotos:
    """The photos that files and folders stand for.

    A file is a photo whatever its name, and is listed as often as it is given. A folder stands for its picture files,
    then those of its folders, each by name. Hidden files and folders are ignored. A file that several links lead to is
    one photo.

    Raises DataError for a folder that cannot be read or has no picture files.
    """
    pictures: list[Picture] = []
    skipped: list[Path] = []
    repeated: list[Path] = []
    listed: set[str] = set()
    for path in paths:
        if not path.is_dir():
            pictures.append(Picture(path))
            listed.add(os.path.realpath(path))
            continue
        has_pictures = False
        for file in _files_below(path, set()):
            if file.suffix.lower() not in SUFFIXES or (file.exists() and not file.is_file()):  # a pipe would never end
                skipped.append(file)
                continue
            has_pictures = True
            real = os.path.realpath(file)
            if real in listed:
                repeated.append(file)
            else:
                listed.add(real)
                pictures.append(Picture(file))
        if not has_pictures:
            raise DataError(f"{path}: no pictures in this folder ({', '.join(sorted(READ))}). Add some, or name another folder.")
    return NewPhotos(tuple(pictures), tuple(skipped), tuple(repeated))


def _files_below(folder: Path, entered: set[str]) -> Iterator[Path]:
    """Files of a folder by name, then those of its folders. entered: folders that were listed, so that links end."""
    real = os.path.realpath(folder)
    if real in entered:
        return
    entered.add(real)
    try:
        entries = sorted((entry for entry in folder.iterdir() if not entry.name.startswith((".", "__MACOSX"))), key=lambda entry: entry.name)
        is_folder = {entry: entry.is_dir() for entry in entries}
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}).") from error
    yield from (entry for entry in entries if not is_folder[entry])
    for inner in (entry for entry in entries if is_folder[entry]):
        yield from _files_below(inner, entered)
