"""Images from a client: base64 in a data URL, with bounds that are checked before decoding.

The server never fetches a URL.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass

from PIL import Image

from lcl_adapter.data.sources.images import FORMATS, open_image
from lcl_adapter.errors import DataError

# Of the others, it is image/ and the format's name
TYPE_OF = {
    "PPM": "image/x-portable-pixmap",
    "JPEG2000": "image/jp2",
    "TGA": "image/x-tga",
    "HEIF": "image/heic",
}  # of the others, it is image/ and the format's name
TYPES = [TYPE_OF.get(name, f"image/{name.lower()}") for name in FORMATS]
OTHER_TYPES = {
    "image/heif",
    "image/jpg",
    "image/pjpeg",
    "image/x-png",
    "image/x-ms-bmp",
    "application/octet-stream",
}  # as clients write them; the bytes decide
DATA_URL_HEAD = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[\w-]+=[\w.-]+)*;base64,", re.IGNORECASE)
URL_SAFE = str.maketrans("-_", "+/")
SMALLER = "Make it smaller first."


@dataclass(frozen=True)
class Bounds:
    """Limits for one request.

    bytes, pixels, side (the longer one, in pixels): of each image. images: in a conversation.
    The side is bounded because a picture is padded to a square before the model reads it.
    """

    bytes: int = 10 * 2**20
    pixels: int = 40_000_000
    side: int = 8192
    images: int = 256


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def from_data_url(url: str, bounds: Bounds) -> bytes:
    """The image file's bytes. Raises DataError: another kind of URL, too large, not an image, or broken."""
    head = DATA_URL_HEAD.match(url)
    if head is None:
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,20}:", url)
        kind = f"a URL of {scheme[0]}" if scheme and scheme[0].lower() != "data:" else "not a base64 data URL"
        raise DataError(f"the image is {kind}. The server fetches nothing: send data:image/png;base64,… with the image file's bytes.")
    if head[1].lower() not in {*TYPES, *OTHER_TYPES}:
        raise DataError(f"the image has type {head[1][:40]}; the server accepts {', '.join(TYPES)}.")
    size = (len(url) - head.end()) * 3 // 4
    if size > bounds.bytes:
        raise DataError(_too_many_bytes(size, bounds))
    try:
        text = "".join(url[head.end() :].split()).translate(URL_SAFE).rstrip("=")
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError("the image's base64 is broken.") from error
    check(data, bounds)
    return data


def check(data: bytes, bounds: Bounds) -> None:
    """Check an image file by its header, then decode it once. Raises DataError."""
    if not data:
        raise DataError("the image is empty.")
    if len(data) > bounds.bytes:
        raise DataError(_too_many_bytes(len(data), bounds))
    try:
        with open_image(data) as opened:
            size = f"the image is {opened.width} x {opened.height} pixels"
            if opened.width * opened.height > bounds.pixels:
                raise DataError(f"{size}; at most {bounds.pixels:,} pixels in all are allowed. {SMALLER}")
            if max(opened.size) > bounds.side:
                raise DataError(f"{size}; at most {bounds.side:,} per side are allowed. {SMALLER}")
            if min(opened.size) < 2:
                raise DataError(f"{size}; at least 2 per side are needed.")
            opened.load()
    except Image.DecompressionBombError as error:
        raise DataError(f"the image has far more than the {bounds.pixels:,} pixels that are allowed. {SMALLER}") from error
    except OSError as error:
        raise DataError("the image cannot be read: the file is broken or not an image. Save it again as JPEG or PNG.") from error


def _too_many_bytes(size: int, bounds: Bounds) -> str:
    return f"the image has {size / 2**20:.1f} MiB; at most {bounds.bytes / 2**20:g} are allowed. {SMALLER}"
