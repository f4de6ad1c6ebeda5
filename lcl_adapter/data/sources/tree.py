"""A folder or a zip archive as a list of names, so that a reader works with either.

Names are shown in one form (:func:`~lcl_adapter.data.sources.encodings.nfc`), and files are opened by their names on disk.
Names that lead out of it (``../``), absolute names and circular links are refused before anything is read.
"""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from lcl_adapter import reading
from lcl_adapter.data.sources.archive import names_of_archive, opened_zip, read_member, same_names
from lcl_adapter.data.sources.base import Fault
from lcl_adapter.data.sources.encodings import Decoded, decode, nfc
from lcl_adapter.data.sources.picture import Picture
from lcl_adapter.errors import DataError

ARCHIVES = frozenset({".zip"})
DRIVE = re.compile(r"[A-Za-z]:[\\/]")  # of Windows; elsewhere a colon is a letter as any other


@dataclass
class _Listing:
    """stored: shown name -> name on disk or in the archive. same: shown names that several files or folders have. dangling:
    links that lead nowhere, with their targets. note: how names were read, if that was a guess.
    """

    stored: dict[str, str] = field(default_factory=dict)
    same: list[str] = field(default_factory=list)
    dangling: dict[str, str] = field(default_factory=dict)
    note: str = ""


class Tree:
    """``root`` is a folder or a zip archive; names are relative, with forward slashes.

    encoding: of an archive's names that have no mark of their own; None recognises it.
    """

    def __init__(self, root: Path, encoding: str | None = None) -> None:
        self.root = root
        self.encoding = encoding
        self.archive = root.suffix.lower() in ARCHIVES and root.is_file()
        if not self.archive and not root.is_dir():
            packed = " (an archive must be a .zip: unpack others first)" if root.is_file() else ""
            raise DataError(f"{root}: no such folder or archive{packed}.")

    @cached_property
    def _listing(self) -> _Listing:
        listing = self._members() if self.archive else _Listing()
        if not self.archive:
            names: list[tuple[str, str]] = []
            self._walk(self.root, "", frozenset(), listing, names)
            listing.stored = dict(reversed(names))  # the first of a name
            listing.same = same_names(names)
        for name in listing.stored:
            if not name.isprintable() and any("\ud800" <= c <= "\udfff" for c in name):
                raise DataError(f"{self.root}: the name {name!r} is not UTF-8. Rename it.")
        return listing

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Every file's name, sorted, without hidden files.

        Raises DataError for a name that leads out, or for a circle of links.
        """
        return tuple(sorted(name for name in self._listing.stored if not _is_hidden(name)))

    @property
    def faults(self) -> list[Fault]:
        """Links that lead nowhere, and names that cannot be distinguished."""
        dangling = [
            Fault("link that leads nowhere", f"{self.root}: {name} is a link to {target}, which is not there: is it mounted, or fetched?")
            for name, target in sorted(self.dangling.items())
        ]
        same = [
            Fault("two names that are one", f"{self.root}: {name!r} is there twice, in two ways of writing its letters; join or rename them")
            for name in self._listing.same
            if not _is_hidden(name)
        ]
        return dangling + same

    @property
    def dangling(self) -> dict[str, str]:
        """Links that lead nowhere, with their targets."""
        return self._listing.dangling

    @property
    def notes(self) -> tuple[str, ...]:
        """How an archive's names were read, if that was a guess."""
        return (self._listing.note,) if self.archive and self._listing.note else ()

    def __contains__(self, name: str) -> bool:
        """Looks one name up. A folder is not listed for that, if the name is on disk as it is: it may have a million files."""
        if not isinstance(name, str) or not name:
            return False
        if self.archive:
            return nfc(name) in self._listing.stored
        return self._on_disk(name) is not None

    def _on_disk(self, name: str) -> str | None:
        """The name on disk of a shown name; None if there is no such file."""
        try:
            check_inside(name, str(self.root))
            if (self.root / (form := on_disk(self.root, name))).is_file():
                return form
        except (OSError, ValueError, DataError):  # too long for any file, or outside
            return None
        return None if name.isascii() else self._listing.stored.get(nfc(name))

    @cached_property
    def _by_folder(self) -> dict[str, list[str]]:
        table: dict[str, list[str]] = {}
        for name in self.files:
            folder, slash, _ = name.rpartition("/")
            table.setdefault(folder + slash, []).append(name)
        return table

    @cached_property
    def _folders_below(self) -> dict[str, set[str]]:
        """Folder -> the names of the folders directly below it that have a file at any depth."""
        table: dict[str, set[str]] = {}
        for folder in self._by_folder:
            start = 0
            while (end := folder.find("/", start)) >= 0:
                table.setdefault(folder[:start], set()).add(folder[start:end])
                start = end + 1
        return table

    def folders(self, under: str = "") -> list[str]:
        """Names of the folders directly below ``under`` (``a/b/``) that have a file at any depth. On disk, empty folders too."""
        names = set(self._folders_below.get(under, ()))
        if not self.archive and (self.root / under).is_dir():
            names |= {nfc(p.name) for p in (self.root / under).iterdir() if p.is_dir() and not _is_hidden(p.name)}
        return sorted(names)

    def within(self, folder: str) -> list[str]:
        """Files directly in a folder (``a/b/``), sorted."""
        return self._by_folder.get(folder, [])

    @cached_property
    def deeper(self) -> dict[str, list[str]]:
        """Folder at the root -> the files in folders of it, at any depth, sorted."""
        table: dict[str, list[str]] = {}
        for name in self.files:
            if name.count("/") > 1:
                table.setdefault(name.partition("/")[0], []).append(name)
        return table

    def picture(self, name: str, artist: str | None = None) -> Picture:
        """A reference to one file. Raises DataError for a name that leads out."""
        check_inside(name, str(self.root))
        if self.archive:
            return Picture(self.root, nfc(name), artist)
        return Picture(self.root / (name if name.isascii() else self._on_disk(name) or name), None, artist)

    def text(self, name: str) -> Decoded:
        """One file's text. Raises DataError if there is no such file, or if its encoding cannot be recognised."""
        try:
            if self.archive:
                with opened_zip(self.root) as archive:
                    raw = read_member(archive, self._listing.stored[nfc(name)])
            else:
                raw = reading.read_bytes(self.root / name, reading.MAX_TEXT)
        except OSError as error:
            raise DataError(f"{self.root}: {name} cannot be read ({error.strerror or error}).") from error
        except (KeyError, ValueError) as error:
            raise DataError(f"{self.root}: {name} cannot be read ({error}).") from error
        return decode(raw, f"{self.root}: {name}", self.encoding)

    def _members(self) -> _Listing:
        try:
            with opened_zip(self.root) as archive:
                members = archive.infolist()
        except (OSError, ValueError) as error:
            raise DataError(f"{self.root}: cannot be read as an archive ({error}).") from error
        names = names_of_archive(self.root, members, self.encoding)
        for name in names.stored:
            check_inside(name, str(self.root))
        return _Listing(names.stored, names.same, note=names.note)

    def _walk(self, folder: Path, prefix: str, above: frozenset[str], listing: _Listing, names: list[tuple[str, str]]) -> None:
        """Adds the files of a folder and of those in it to ``names``, as shown and as stored. prefix: the folder's name below
        the root, on disk.
        """
        real = os.path.realpath(folder)
        if real in above:
            raise DataError(f"{folder}: a link that leads back to a folder above it. Remove the link.")
        try:
            with os.scandir(folder) as scanned:
                entries = list(scanned)
        except OSError as error:
            raise DataError(f"{folder}: cannot be read ({error.strerror}).") from error
        for entry in entries:
            name = prefix + entry.name
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError as error:  # a link to itself
                listing.dangling[nfc(name)] = f"itself ({error.strerror})"
                continue
            if is_folder:
                if not _is_hidden(entry.name):
                    self._walk(Path(entry.path), f"{name}/", above | {real}, listing, names)
            elif is_file:
                names.append((nfc(name), name))
            elif entry.is_symlink() and not entry.name.startswith("."):
                listing.dangling[nfc(name)] = str(Path(entry.path).readlink())


# Folders that systems add: a Mac's in archives, a Synology's with thumbnails, and those of recycled files
OF_SYSTEMS = frozenset({"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__"})


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part.lower() in OF_SYSTEMS for part in name.split("/"))


def relative_name(root: Path, name: str) -> str:
    """An absolute name that lies inside the root, relative to it; any other name as it is."""
    if os.path.isabs(name):  # noqa: PTH117
        for folder in (root.absolute(), root.resolve()):
            if Path(name).is_relative_to(folder):
                return Path(name).relative_to(folder).as_posix()
    return name


def on_disk(root: Path, name: str) -> str:
    """The form of a name under which there is a file; the name itself if there is none."""
    if name.isascii():
        return name
    try:
        return next((form for form in (name, nfc(name), unicodedata.normalize("NFD", name)) if (root / form).is_file()), name)
    except (OSError, ValueError):  # too long for any file
        return name


def check_inside(name: str, where: str) -> None:
    """Raises DataError for a name that is absolute or leads out of its folder."""
    if ".." not in name and "\\" not in name and ":" not in name and not name.startswith("/"):
        return  # nearly every name
    path = PurePosixPath(name.replace("\\", "/"))
    drive = DRIVE.match(name) or (os.name == "nt" and ":" in name)
    if path.is_absolute() or ".." in path.parts or drive:
        raise DataError(f"{where}: the name {name!r} leads out of it. Names must stay inside; nothing was read.")
