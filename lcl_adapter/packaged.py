"""The bases and adapters that the package knows by name, and the files that a recipe names by ``pocket:NAME`` or ``photo:NAME``.

They ship with the package, or are made on first use.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lcl_adapter import pocket
from lcl_adapter.errors import DataError, RunError
from lcl_adapter.files import cache_folder, sha256_of, whole_folder

POCKET, PHOTO = "pocket", "photo"
BASES = (POCKET, PHOTO)  # names of bases, in the place of a folder
PREFIXES = tuple(f"{name}:" for name in BASES)
ADAPTERS = {"photo-lcl": Path(__file__).parent / "photo" / "adapter"}  # adapters that ship, by name
PHOTO_EXAMPLE = Path(__file__).parent / "photo" / "example"
PHOTO_DATA = Path(__file__).parent / "photo" / "data"
PHOTO_VERSION = "v1"  # of the fetched photos: raise it when the code that prepares them changes


def photo_data_folder() -> Path:
    """The folder that ``make photos-data`` writes."""
    return cache_folder() / f"photo-data-{PHOTO_VERSION}"


def adapter_folder(path: Path | str) -> Path:
    """The folder of an adapter: ``path``, or for the name of a shipped adapter a copy of it in the cache folder.

    A folder of that name comes first. In the copy, evaluations can be stored beside the adapter.
    Raises RunError where the copy cannot be written.
    """
    shipped = ADAPTERS.get(str(path))
    if shipped is None or Path(path).exists():
        return Path(path)
    copy = cache_folder() / "adapters" / f"{path}-{sha256_of(shipped / 'lcl_adapter.json')[:8]}"
    if not copy.exists():
        try:
            with whole_folder(copy) as partial:
                for file in shipped.iterdir():
                    shutil.copyfile(file, partial / file.name)
        except RunError:
            if not copy.exists():  # else another process has written it meanwhile
                raise
    return copy


def is_packaged(path: Path | str) -> bool:
    return str(path).startswith(PREFIXES)


def packaged(path: Path | str) -> Path:
    """The file that ``pocket:NAME`` or ``photo:NAME`` names; any other path unchanged.

    Raises DataError for a photo file that was not fetched; RunError where a drawn file cannot be written.
    """
    prefix, _, name = str(path).partition(":")
    if f"{prefix}:" not in PREFIXES:
        return Path(path)
    if prefix == "pocket":
        return pocket.shipped(name)
    candidates = (PHOTO_DATA / name, photo_data_folder() / name)
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise DataError(f"{path}: not fetched yet ({candidates[1]} is missing). Fetch the photos once with `make photos-data` (docs/photo.md).")
