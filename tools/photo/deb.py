"""Read the files of a Debian package without dpkg: an ``ar`` archive whose member ``data.tar.xz`` holds them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from lcl_adapter.errors import DataError

MAGIC = b"!<arch>\n"
READERS: dict[str, Callable[[Any], Any]] = {"xz": lzma.open, "gz": gzip.open, "bz2": bz2.open, "": lambda section: section}  # by suffix
CHUNK = 2**20  # bytes
HEADER = 60  # bytes: name 16, date 12, owner 6, group 6, mode 8, size 10, end 2
LARGEST = 64 * 2**20  # bytes of one unpacked file; the largest of the pinned packages has 12 MB


class Section(io.RawIOBase):
    """``size`` bytes of a file from ``start`` on, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._left = file, size
        file.seek(start)

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data


def data_member(file: BinaryIO, where: Path) -> tuple[str, int, int]:
    """Name, first byte and size of the ``data.tar.*`` in an opened package.

    Raises DataError: no ``ar`` archive, a member that is longer than the file, no such member.
    """
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    if file.read(len(MAGIC)) != MAGIC:
        raise DataError(f"{where}: not a Debian package (it does not begin with {MAGIC!r}). Fetch it again.")
    position = len(MAGIC)
    while position + HEADER <= length:
        file.seek(position)
        header = file.read(HEADER)
        name, size = header[:16].decode("ascii", "replace").rstrip(" /"), header[48:58].strip()
        if header[58:] != b"`\n" or not size.isdigit():
            raise DataError(f"{where}: the header at byte {position} is broken. Fetch the package again.")
        position += HEADER
        if position + int(size) > length:
            raise DataError(f"{where}: {name} has {int(size)} bytes, the file ends after {length - position}. Fetch the package again.")
        if name.startswith("data.tar"):
            return name, position, int(size)
        position += int(size) + int(size) % 2  # members begin at even bytes
    raise DataError(f"{where}: no data.tar in it. Fetch the package again.")


def files(package: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every regular file whose name is ``wanted``. Names have no leading ``./``; links are left out.

    The archive is read once, in its own order, and nothing is written.

    Raises DataError: no Debian package, a compression that the standard library cannot read, a truncated archive, a
    name that leads out of the archive, a file of more than 64 MiB.
    """
    try:
        with package.open("rb") as opened:
            name, start, size = data_member(opened, package)
            form = name.removeprefix("data.tar").removeprefix(".")
            if form not in READERS:
                raise DataError(f"{package}: {name} is compressed with {form}, which this reader cannot read. Fetch the pinned version.")
            content = READERS[form](Section(opened, start, size))
            with tarfile.open(fileobj=content, mode="r|") as archive:
                yield from _members(archive, package, wanted)
            while content.read(CHUNK):  # to the end, where a truncated stream and a wrong checksum show
                pass
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise DataError(f"{package}: its archive is truncated or broken ({error}). Fetch the package again.") from error
    except OSError as error:
        raise DataError(f"{package}: cannot be read ({error.strerror or error}).") from error


def _members(archive: tarfile.TarFile, package: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise DataError(f"{package}: the name {member.name!r} leads out of the archive. This is not the pinned package.")
        name = path.as_posix()
        if not member.isfile() or not wanted(name):
            continue
        if member.size > LARGEST:
            raise DataError(f"{package}: {name} has {member.size} bytes, more than {LARGEST}. This is not the pinned package.")
        content = archive.extractfile(member)
        assert content is not None  # a regular file
        data = content.read()
        if len(data) != member.size:
            raise DataError(f"{package}: {name} is truncated. Fetch the package again.")
        yield name, data
