"""The bases that the package knows by name, and the files that a recipe names by ``pocket:NAME`` or ``photo:NAME``.

They ship with the package, or are made on first use.
"""

from __future__ import annotations

from pathlib import Path

from lcl_adapter import pocket
from lcl_adapter.errors import DataError
from lcl_adapter.files import cache_folder

BASES = ("pocket", "photo")  # names of bases, in the place of a folder
PREFIXES = tuple(f"{name}:" for name in BASES)
PHOTO_DATA = Path(__file__).parent / "photo" / "data"
PHOTO_VERSION = "v1"  # of the fetched photos: raise it when the code that prepares them changes


def photo_data_folder() -> Path:
    """The folder that ``make photos-data`` writes."""
    return cache_folder() / f"photo-data-{PHOTO_VERSION}"


def is_packaged(path: Path | str) -> bool:
    return str(path).startswith(PREFIXES)


def packaged(path: Path) -> Path:
    """The file that ``pocket:NAME`` or ``photo:NAME`` names; any other path unchanged.

    Raises DataError for a photo file that was not fetched; RunError where a drawn file cannot be written.
    """
    prefix, _, name = str(path).partition(":")
    if f"{prefix}:" not in PREFIXES:
        return path
    if prefix == "pocket":
        return pocket.shipped(name)
    candidates = (PHOTO_DATA / name, photo_data_folder() / name)
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise DataError(f"{path}: not fetched yet ({candidates[1]} is missing). Fetch the photos once with `make photos-data` (docs/photo.md).")
