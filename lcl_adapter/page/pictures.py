"""The page's files on disk: pictures that are decoded and encoded again, in the folder of the visitor who sent them.

Nothing of a file is stored as it was sent, nor its metadata. A file that is no picture becomes an empty file, so that the
page can say which one it was.
"""

from __future__ import annotations

import io
import re
import shutil
import tempfile
import time
from pathlib import Path, PurePosixPath

from PIL import Image, JpegImagePlugin

from lcl_adapter import reading
from lcl_adapter.data.sources import Picture, read_image
from lcl_adapter.data.sources.images import MAX_PIXELS, open_image
from lcl_adapter.errors import DataError
from lcl_adapter.serve.pictures.images import Bounds, Spent, check

OPENED, UPLOADS, ARCHIVES, EXPORTS = "opened", "uploads", "archives", "exports"  # folders of a visitor
SECONDS = {OPENED: 3600, UPLOADS: 24 * 3600, ARCHIVES: 3600, EXPORTS: 3600}  # that a file stays on disk
SERVED = {
    (OPENED, ".png"): "image/png",
    (OPENED, ".jpg"): "image/jpeg",
    (UPLOADS, ".png"): "image/png",
    (UPLOADS, ".jpg"): "image/jpeg",
    (EXPORTS, ".zip"): "application/zip",
}  # the type of every file that is served, by folder and suffix
# What arrives here is encoded anew before the API's bounds apply, so it may be larger than they are
BOUNDS = Bounds(bytes=reading.MAX_UNPACKED, pixels=MAX_PIXELS, side=MAX_PIXELS, decoded=8 * MAX_PIXELS)
MAX_STEM = 80  # characters of a file's name
QUALITY = 95  # of a JPEG whose picture is too large as a PNG


def new_folder(visitor: Path, kind: str) -> Path:
    """A new folder of a visitor. Older ones, of the same kind, are removed after their time.

    kind: of SECONDS.
    """
    parent = visitor / kind
    parent.mkdir(parents=True, exist_ok=True)
    for folder in parent.iterdir():
        try:
            if folder.stat().st_mtime < time.time() - SECONDS[kind]:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:  # another request removed it
            continue
    return Path(tempfile.mkdtemp(dir=parent))


def type_of(visitor: Path, path: str) -> str | None:
    """The type of a visitor's file that is served. None: no such file, or not of this visitor."""
    file = resolved(visitor, path)
    if file is None or not file.stat().st_size:
        return None
    return SERVED.get((file.relative_to(visitor.resolve()).parts[0], file.suffix))


def resolved(visitor: Path, path: object) -> Path | None:
    """A visitor's file by its path. None: no such file, or not of this visitor."""
    try:
        file = Path(str(path)).resolve()
        return file if file.is_relative_to(visitor.resolve()) and file.is_file() else None
    except (OSError, ValueError, RuntimeError):  # a name too long, a zero byte, a circle of links
        return None


def store_picture(folder: Path, name: str, data: bytes, visitor: str = "") -> Path:
    """Decode a picture and store it anew in ``folder``: as JPEG if it was one, else as PNG.

    name: a file's name, from anywhere. visitor: who sent it. A file that is no picture, or costs too much to decode, is stored empty.
    Raises TimeoutError if too many pictures wait to be decoded.
    """
    stem = re.sub(r"[^\w.+ -]+", "_", PurePosixPath(name.replace("\\", "/")).stem).strip(". ")[:MAX_STEM] or "photo"
    try:
        check(data, BOUNDS, Spent(visitor))
        encoded, suffix = encode(Picture(Path(stem), data=data))
    except DataError:
        encoded, suffix = b"", ".png"
    path = folder / f"{stem}{suffix}"
    number = 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}{suffix}"
    path.write_bytes(encoded)
    return path


def encode(picture: Picture) -> tuple[bytes, str]:
    """The picture's pixels as a new file, and the file's suffix.

    A JPEG is written with its own tables, so it changes little and has about its size. Others are PNG, without loss, unless
    the API would refuse the PNG for its size. Raises DataError.
    """
    image = read_image(picture)
    image.info.clear()  # Pillow would write a file's comment and profile into the new file
    buffer = io.BytesIO()
    if tables := _jpeg_tables(picture.data or b""):
        try:
            image.save(buffer, "JPEG", **tables)
            return buffer.getvalue(), ".jpg"
        except (OSError, ValueError, TypeError):  # tables that this encoder does not write
            buffer = io.BytesIO()
    else:
        image.save(buffer, "PNG", compress_level=3)
        if buffer.tell() <= Bounds().bytes:
            return buffer.getvalue(), ".png"
        buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue(), ".jpg"


def _jpeg_tables(data: bytes) -> dict[str, object]:
    """A JPEG's quantization tables and subsampling, as Pillow's options. Empty: not a JPEG."""
    try:
        with open_image(data) as opened:
            if not isinstance(opened, JpegImagePlugin.JpegImageFile) or not opened.quantization:
                return {}
            subsampling = JpegImagePlugin.get_sampling(opened)
            return {"qtables": opened.quantization, "subsampling": max(subsampling, 0)}
    except (OSError, Image.DecompressionBombError):
        return {}
