"""Photos between the browser, files and the API: galleries, folders that the browser fetches from, and zip files of
sets.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from lcl_adapter import reading
from lcl_adapter.answering import api_types
from lcl_adapter.data.sources import Picture
from lcl_adapter.data.sources.archive import names_of_archive, opened_zip, read_member
from lcl_adapter.data.sources.class_folder import INDEX
from lcl_adapter.data.sources.tree import check_inside
from lcl_adapter.errors import DataError
from lcl_adapter.page import MAX_LABELS
from lcl_adapter.page.pictures import OPENED, new_folder, store_picture
from lcl_adapter.serve import folders

Gallery = Sequence[tuple[str, str | None]] | None  # a gallery's value: (file, caption)


def write_photos(visitor: Path, examples: Sequence[tuple[str, bytes]]) -> dict[str, list[Path]]:
    """Photos as files by label, for the browser to fetch: decoded and encoded again, named by the digest of their bytes.

    visitor: the visitor's folder. Raises DataError for more than MAX_LABELS labels.
    """
    labels = len({label for label, _ in examples})
    if labels > MAX_LABELS:
        raise DataError(f"the set has {labels} labels; this page shows at most {MAX_LABELS}. Use `lcl-adapter support` for it.")
    folder = new_folder(visitor, OPENED)
    files: dict[str, list[Path]] = {}
    for number, (label, data) in enumerate(examples):
        files.setdefault(label, []).append(store_picture(folder, f"{number:03d}-{hashlib.sha256(data).hexdigest()}.photo", data))
    return files


def digest_of(path: Path) -> str | None:
    """The digest of the photo that :func:`write_photos` wrote a file of. None: another file."""
    match = re.fullmatch(r"\d{3}-([0-9a-f]{64})", path.stem)
    return match[1] if match and path.parent.parent.name == OPENED else None


def unpack(file: Path, out: Path) -> Path:
    """Unpack a zip file; return the set's folder in it. Raises DataError for more bytes or files than a set can have.

    Names that lead out of it are refused, and links become plain files.
    """
    with opened_zip(file) as archive:
        entries, total = archive.infolist(), 0
        if sum(entry.file_size for entry in entries) > folders.MAX_BYTES or len(entries) > 4 * api_types.MAX_IMAGES:
            raise DataError(f"it unpacks to more than {folders.MAX_BYTES >> 20} MiB or {4 * api_types.MAX_IMAGES} files.")
        for shown, stored in names_of_archive(file, entries).stored.items():
            check_inside(shown, file.name)
            target = out / shown
            target.parent.mkdir(parents=True, exist_ok=True)
            total += target.write_bytes(read_member(archive, stored, folders.MAX_BYTES - total))
    inside = [path for path in out.iterdir() if path.name != "__MACOSX"]
    return inside[0] if len(inside) == 1 and not (out / INDEX).exists() else out


def picture_of(path: str | Path) -> Picture:
    """A picture under the file's name alone, without this machine's folders.

    Raises DataError if the uploaded file was deleted.
    """
    path = Path(path)
    try:
        return Picture(Path(path.name), data=reading.read_bytes(path) or b"\0")
    except OSError as error:
        raise DataError(f"{path.name}: the file was deleted in the meantime; add the photo again.") from error


def paths_of(photos: Gallery) -> list[Path]:
    return [Path(photo[0]) for photo in photos or ()]


def bytes_of(url: str) -> bytes:
    return base64.b64decode(url.partition(",")[2])


def labelled_bytes(stored: api_types.SupportSetWithExamples) -> list[tuple[str, bytes]]:
    return [(example.label, bytes_of(example.image or "")) for example in stored.examples]
