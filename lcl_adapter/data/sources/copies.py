"""One photo under two names: the same file in two classes, or in training and among what is held out, byte for byte.

A photo with two labels teaches a contradiction, and one that is both shown and asked about is no test.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from lcl_adapter import reading
from lcl_adapter.data.sources.archive import open_archive
from lcl_adapter.data.sources.base import Fault
from lcl_adapter.data.sources.images import MAX_PIXELS, MIN_SIDE, open_image, read_bytes
from lcl_adapter.data.sources.picture import Picture
from lcl_adapter.errors import DataError

COMPARED = 20_000  # pictures of a source whose sizes are compared whenever it is opened; `data check` compares all
PIECE = 1 << 16  # bytes of a file that are compared before it is read whole


@dataclass(frozen=True)
class Copies:
    """pictures: those that have more than one label. faults: one for each of them but the first of its copies."""

    pictures: frozenset[Picture]
    faults: list[Fault]


def in_two_classes(pictures_of: Mapping[str, Sequence[Picture]]) -> Copies:
    """The files that are in more than one class, byte for byte. Only files of equal size are read.

    pictures_of: class -> its pictures.
    """
    labelled = [(picture, label) for label, pictures in pictures_of.items() for picture in pictures]
    if len(labelled) > COMPARED:
        return Copies(frozenset(), [])
    twice: set[Picture] = set()
    faults: list[Fault] = []
    for same in identical([picture for picture, _ in labelled]):
        labels = {number: labelled[number][1] for number in same}
        if len(set(labels.values())) > 1:
            first, *others = same
            twice |= {labelled[number][0] for number in same}
            faults += [two_labels(*labelled[first], *labelled[number]) for number in others if labels[number] != labels[first]]
    return Copies(frozenset(twice), faults)


def copies_held_out(trained: Mapping[str, Sequence[Picture]], held_out: Mapping[str, Sequence[Picture]]) -> dict[str, list[str]]:
    """The files that are trained on and held out, byte for byte, under different names: a message for each, by suite.

    trained: source -> its pictures. held_out: suite -> its pictures.
    """
    of_training = {picture: source for source, pictures in trained.items() for picture in pictures}
    of_test = {picture: suite for suite, pictures in held_out.items() for picture in pictures if picture not in of_training}
    pictures = [*of_training, *of_test]
    if len(pictures) > 2 * COMPARED:
        return {}
    messages: dict[str, list[str]] = {}
    for same in identical(pictures):
        first = next((pictures[number] for number in same if pictures[number] in of_training), None)
        for other in (pictures[number] for number in same if pictures[number] in of_test):
            if first is not None:
                messages.setdefault(of_test[other], []).append(one_held_out(first, of_training[first], other, of_test[other]).message)
    return messages


def one_held_out(trained: Picture, source: str, held_out: Picture, suite: str) -> Fault:
    both = f"{trained} ({source}) and {held_out} ({suite})"
    return Fault("training photo held out", f"{both} are the same file: a training photo is a test photo; remove one")


def two_labels(first: Picture, label: str, second: Picture, other: str) -> Fault:
    return Fault("one photo in two classes", f"{first} ({label!r}) and {second} ({other!r}) are the same file: which is it? Remove the wrong one")


def identical(pictures: Sequence[Picture]) -> list[list[int]]:
    """Groups of numbers of pictures that are the same file, byte for byte, in order. A picture that cannot be read is in none."""
    by_size: dict[object, list[int]] = {}
    for number, picture in enumerate(pictures):
        if (size := _size(picture)) is not None:
            by_size.setdefault(size, []).append(number)
    groups: list[list[int]] = []
    for numbers in by_size.values():
        for alike in _by_digest(pictures, numbers, _middle):  # files of one camera may all have one size
            groups += [same for same in _by_digest(pictures, alike, read_bytes) if _can_be_shown(pictures[same[0]])]
    return sorted(groups)


def _by_digest(pictures: Sequence[Picture], numbers: Sequence[int], read: Callable[[Picture], bytes]) -> list[list[int]]:
    """Groups of numbers of pictures for which ``read`` gives the same bytes. A picture that cannot be read is in none."""
    table: dict[bytes, list[int]] = {}
    for number in numbers if len(numbers) > 1 else ():
        try:
            table.setdefault(digest(read(pictures[number])), []).append(number)
        except (DataError, OSError):
            continue
    return [same for same in table.values() if len(same) > 1]


def _middle(picture: Picture) -> bytes:
    """A piece out of the middle of a file; all of what is in no file of its own."""
    if picture.data is not None or picture.member is not None:
        return read_bytes(picture)
    with reading.open_file(picture.path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - PIECE) // 2)
        return file.read(PIECE)


def _can_be_shown(picture: Picture) -> bool:
    """Whether it begins like an image that shows something, and is within the bounds. What does not is a fault of another kind."""
    try:
        with open_image(read_bytes(picture)) as image:
            return min(image.size) >= MIN_SIDE and image.width * image.height <= MAX_PIXELS
    except (DataError, OSError, MemoryError, Image.DecompressionBombError):
        return False


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _size(picture: Picture) -> object | None:
    """What equal files have in common, without reading them: the size; in an archive, the checksum too."""
    try:
        if picture.data is not None:
            return len(picture.data)
        if picture.member is None:
            return picture.path.stat().st_size
        if picture.path.is_dir():  # a row of a saved dataset
            return None
        info = open_archive(picture.path, os.getpid()).info(picture.member)
        return info.file_size, info.CRC
    except (OSError, KeyError):
        return None
