"""A zip archive's names and bytes. Names are shown in one form; the archive's own are in whatever its writer used.

A name with the UTF-8 flag is UTF-8. Others are, in this order: in the given encoding, UTF-8 (macOS), Shift-JIS (Explorer on
Japanese Windows), or the standard's cp437 where that gives Latin letters. Anything else is refused, and never shown as garbage.
"""

from __future__ import annotations

import unicodedata
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from lcl_adapter import reading
from lcl_adapter.data.sources.encodings import JAPANESE, SUGGESTED, is_japanese, nfc
from lcl_adapter.errors import DataError
from lcl_adapter.reading import brief

UTF8_FLAG = 0x800
STANDARD = "cp437"
GIVEN = (  # what `encoding` may be for names in an archive: a member is read by a name in any of them
    JAPANESE, "shift_jis", "euc_jp", "gbk", "gb18030", "big5", "euc_kr", "cp949", "cp1252", "cp1250",
    "cp852", "iso8859-1", "iso8859-2", "cp850", "cp1251", "cp866", STANDARD
)  # fmt: skip


class Names(NamedTuple):
    """stored: shown name -> the archive's own name. same: :func:`same_names`. note: what was guessed."""

    stored: dict[str, str]
    same: list[str]
    note: str


def names_of_archive(path: Path, members: list[zipfile.ZipInfo], encoding: str | None = None) -> Names:
    """The names of an archive's members, folders left out.

    Raises DataError where they are in no encoding that can be recognised, and none is given.
    """
    files = [m for m in members if m.filename and not m.filename.endswith("/") and not (m.filename.isascii() and m.filename.endswith("\\"))]
    foreign = [m for m in files if not m.flag_bits & UTF8_FLAG and not m.filename.isascii()]
    chosen, note = _encoding_of(path, foreign, encoding)
    unflagged = {m.filename for m in foreign}
    names: list[tuple[str, str]] = []
    for member in files:
        try:
            shown = _raw(member.filename).decode(chosen) if member.filename in unflagged else member.filename
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: the name {member.filename!r} is not {chosen} ({error.reason}). Give another `encoding`.") from error
        shown = nfc(shown.replace("\\", "/") if _written_on_windows(shown) else shown)
        names.append((shown, member.filename))
    return Names(dict(reversed(names)), same_names(names), note)


def same_names(names: Sequence[tuple[str, str]]) -> list[str]:
    """Shown names that several files have, or several folders, with a slash behind. Of a folder, what is in it is not named too.

    names: (shown, stored) of every file.
    """
    stored_of: dict[str, set[str]] = {}
    forms_of: dict[str, set[str]] = {}
    for shown, stored in names:
        forms_of.setdefault(shown, set()).add(stored)
        if not shown.isascii():
            parts, own = shown.split("/"), stored.replace("\\", "/").split("/")
            for depth in range(1, len(parts)):
                stored_of.setdefault("/".join(parts[:depth]) + "/", set()).add("/".join(own[:depth]))
    folders = sorted(folder for folder, forms in stored_of.items() if len(forms) > 1)
    outermost = [folder for folder in folders if not any(folder != other and folder.startswith(other) for other in folders)]
    files = sorted(name for name, forms in forms_of.items() if len(forms) > 1 and not name.startswith(tuple(outermost)))
    return [*outermost, *files]


def _encoding_of(path: Path, foreign: list[zipfile.ZipInfo], given: str | None) -> tuple[str, str]:
    """The encoding of names that are not ASCII and have no flag, and a note where it is a guess."""
    together = b"\n".join(_raw(member.filename) for member in foreign)
    with suppress(UnicodeDecodeError):
        together.decode("utf-8")
        return "utf-8", ""
    if given and not given.startswith("utf"):  # which may be the encoding of the list alone
        if given not in GIVEN:
            raise DataError(f"{path}: names in an archive cannot be in {given}; `encoding` may be {', '.join(GIVEN)}.")
        return given, ""
    note = f"{path}: {len(foreign):,} names are not UTF-8; read as {{}}, for instance {{!r}}; if that is wrong, give `encoding`"
    if is_japanese(together):
        return JAPANESE, note.format(f"Shift-JIS ({JAPANESE})", _raw(foreign[0].filename).decode(JAPANESE))
    if all(letter.isascii() or unicodedata.name(letter, "").startswith("LATIN ") for member in foreign for letter in member.filename):
        return STANDARD, note.format(STANDARD, foreign[0].filename)
    raise DataError(f"{path}: {len(foreign):,} names are neither UTF-8 nor Shift-JIS, and would be garbage. Set {SUGGESTED}, or pack it again.")


def _raw(name: str) -> bytes:
    """The bytes of a name that ``zipfile`` has read as cp437."""
    return name.encode(STANDARD)


def _written_on_windows(name: str) -> bool:
    """Some programs of Windows write backslashes into archives, against the standard."""
    return "\\" in name and "/" not in name


@contextmanager
def opened_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive that is a regular file. Raises OSError, ValueError."""
    with reading.open_file(path) as file:
        with _one_error():
            archive = zipfile.ZipFile(file)
        with archive:
            yield archive


def read_member(archive: zipfile.ZipFile, stored: str | zipfile.ZipInfo, limit: int = reading.MAX_UNPACKED) -> bytes:
    """The bytes of a member, by the archive's own name: at most ``limit`` of them, whatever the archive says.

    Raises KeyError; OSError, ValueError.
    """
    info = archive.getinfo(stored) if isinstance(stored, str) else stored
    if info.file_size > limit:
        raise reading.too_large(info.file_size, limit)
    bounded = info.compress_type in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
    with _one_error(), archive.open(info) as member:
        return reading.read_stream(member, limit, piece=reading.PIECE if bounded else reading.COMPRESSED_PIECE)


@contextmanager
def _one_error() -> Iterator[None]:
    """What zipfile and each decompressor raise on broken bytes, a password or an unknown compression becomes a ValueError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(brief(error)) from error


class Archive:
    """An open archive, whose members are read by their shown names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = reading.open_file(path)
        with _one_error():
            self._zip = zipfile.ZipFile(self._file)
        self._by_name: dict[str, str] | None = None

    def __del__(self) -> None:
        if "_file" in vars(self):
            self._file.close()

    def read(self, name: str) -> bytes:
        """The bytes of a member, by its own name or by the name that is shown for it. Raises as :func:`read_member`."""
        return read_member(self._zip, self.info(name))

    def info(self, name: str) -> zipfile.ZipInfo:
        """Size and checksum of a member. Raises KeyError."""
        try:
            return self._zip.getinfo(name)
        except KeyError:
            return self._zip.getinfo(self._stored(name))

    def _stored(self, name: str) -> str:
        """The archive's own name of a shown one, in whichever encoding it is. Raises KeyError."""
        if self._by_name is None:
            members, table = self._zip.infolist(), dict[str, str]()
            for encoding in (None, *GIVEN):
                with suppress(DataError):
                    table = {**names_of_archive(self.path, members, encoding).stored, **table}
            self._by_name = table
        return self._by_name[name]


@lru_cache(maxsize=16)
def open_archive(path: Path, _process: int) -> Archive:
    """One open archive for each process. Forked workers with a common one would share its file position."""
    return Archive(path)
