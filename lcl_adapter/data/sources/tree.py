"""A folder or a zip archive as a list of names, so that a reader works with either.

Names that lead out of it (``../``), absolute names and circular links are refused before anything is read.
"""

from __future__ import annotations

import os
import zipfile
from functools import cached_property
from pathlib import Path, PurePosixPath

from lcl_adapter.data.sources.base import Picture
from lcl_adapter.errors import DataError

ARCHIVES = frozenset({".zip"})


class Tree:
    """``root`` is a folder or a zip archive; names are relative, with forward slashes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.archive = root.suffix.lower() in ARCHIVES and root.is_file()
        if not self.archive and not root.is_dir():
            packed = " (an archive must be a .zip: unpack others first)" if root.is_file() else ""
            raise DataError(f"{root}: no such folder or archive{packed}.")

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Every file's name, sorted, without hidden files.

        Raises DataError for a name that leads out, or for a circle of links.
        """
        names = self._members() if self.archive else self._walk(self.root, "", frozenset())
        for name in names:
            if not name.isprintable() and any("\ud800" <= c <= "\udfff" for c in name):
                raise DataError(f"{self.root}: the name {name!r} is not UTF-8. Rename it.")
        return tuple(sorted(n for n in names if not any(part.startswith((".", "__MACOSX")) for part in n.split("/"))))

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.files)

    def __contains__(self, name: str) -> bool:
        """Looks one name up. A folder is not listed for that: it may have a million files."""
        if self.archive or not isinstance(name, str) or not name:
            return name in self._known
        try:
            check_inside(name, str(self.root))
            return (self.root / name).is_file()
        except (OSError, DataError):  # too long for any file, or outside
            return False

    @cached_property
    def _by_folder(self) -> dict[str, list[str]]:
        table: dict[str, list[str]] = {}
        for name in self.files:
            folder, slash, _ = name.rpartition("/")
            table.setdefault(folder + slash, []).append(name)
        return table

    def folders(self, under: str = "") -> list[str]:
        """Names of the folders directly below ``under`` that have a file at any depth. On disk, empty folders too."""
        names = {n[len(under) :].split("/")[0] for n in self._by_folder if n.startswith(under) and n != under}
        if not self.archive and (self.root / under).is_dir():
            names |= {p.name for p in (self.root / under).iterdir() if p.is_dir() and not p.name.startswith(".")}
        return sorted(names)

    def within(self, folder: str) -> list[str]:
        """Files directly in a folder (``a/b/``), sorted."""
        return self._by_folder.get(folder, [])

    def picture(self, name: str, artist: str | None = None) -> Picture:
        """A reference to one file. Raises DataError for a name that leads out."""
        check_inside(name, str(self.root))
        return Picture(self.root, name, artist) if self.archive else Picture(self.root / name, None, artist)

    def text(self, name: str) -> str:
        """One file's text. Raises DataError if there is no such file, or if it is not UTF-8."""
        try:
            raw = zipfile.ZipFile(self.root).read(name) if self.archive else (self.root / name).read_bytes()
            return raw.decode("utf-8-sig")
        except (OSError, KeyError, UnicodeDecodeError) as error:
            raise DataError(f"{self.root}: {name} cannot be read ({error}).") from error

    def _members(self) -> list[str]:
        try:
            with zipfile.ZipFile(self.root) as archive:
                names = [i.filename for i in archive.infolist() if not i.is_dir()]
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.root}: cannot be read as an archive ({error}).") from error
        for name in names:
            check_inside(name, str(self.root))
        return names

    def _walk(self, folder: Path, prefix: str, above: frozenset[str]) -> list[str]:
        real = os.path.realpath(folder)
        if real in above:
            raise DataError(f"{folder}: a link that leads back to a folder above it. Remove the link.")
        names = []
        try:
            with os.scandir(folder) as scanned:
                entries = list(scanned)
        except OSError as error:
            raise DataError(f"{folder}: cannot be read ({error.strerror}).") from error
        for entry in entries:
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError as error:
                raise DataError(f"{entry.path}: a link that leads nowhere ({error.strerror}). Remove the link.") from error
            if is_folder:
                if not entry.name.startswith("."):
                    names += self._walk(Path(entry.path), f"{prefix}{entry.name}/", above | {real})
            elif is_file:
                names.append(prefix + entry.name)
        return names


def check_inside(name: str, where: str) -> None:
    """Raises DataError for a name that is absolute or leads out of its folder."""
    if ".." not in name and "\\" not in name and ":" not in name and not name.startswith("/"):
        return  # nearly every name
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        raise DataError(f"{where}: the name {name!r} leads out of it. Names must stay inside; nothing was read.")
