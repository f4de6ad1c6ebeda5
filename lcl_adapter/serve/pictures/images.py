"""Images from a client: base64 in a data URL, with bounds that are checked before decoding.

The server never fetches a URL. Pictures are decoded in processes of their own, with limits of time and memory.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from lcl_adapter.data.sources.images import DEEP_MODES, FORMATS, open_image
from lcl_adapter.data.sources.images import read as read_image
from lcl_adapter.data.sources.picture import Picture
from lcl_adapter.errors import DataError
from lcl_adapter.serve.pictures.costs import check_parts
from lcl_adapter.serve.pictures.pool import DECODERS

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
PIXEL_BYTES = {"1": 1, "L": 1, "P": 4, "I;16": 8, "I;16B": 8, "I;16L": 8, "I;16N": 8, "I": 12, "F": 12}  # others: 4; deep ones are scaled to 8 bits


# The thread of the model decodes every picture that it is shown, while nobody else is answered. Of a picture that needs more than so
# many seconds it is shown a small copy. A picture of more than 8 bits is scaled with its set, so it has no copy, and a limit instead
COSTLY_SECONDS = 0.03
MAX_DEEP_SECONDS = 1.0
MAX_PREPARED = 64 * 2**20  # bytes of the copies of one request
DEEP_REASON = f"the image of more than 8 bits takes more than {MAX_DEEP_SECONDS:g} s to decode. {SMALLER}"


@dataclass(frozen=True)
class Bounds:
    """Limits for one request.

    bytes, pixels, side (the longer one, in pixels): of each image. images: in a conversation.
    The side is bounded because a picture is padded to a square before the model reads it.
    decoded: bytes of an image's pixels while it is read. memory: bytes that its decoder may use.
    seconds: of a processor, to decode an image. request_seconds: to decode all images of a request or of a set.
    """

    bytes: int = 10 * 2**20
    pixels: int = 40_000_000
    side: int = 8192
    images: int = 256
    decoded: int = 160_000_000
    memory: int = 768 * 2**20
    seconds: float = 4.0
    request_seconds: float = 20.0


@dataclass
class Spent:
    """Seconds of a processor that the images of one request have needed so far, and bytes of small copies. caller: who sent it."""

    caller: str = ""
    seconds: float = 0.0
    prepared: int = 0


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def from_data_url(url: str, bounds: Bounds) -> bytes:
    """The image file's bytes, not decoded yet. Raises DataError: another kind of URL, another type, too large, or broken base64."""
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
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError("the image's base64 is broken.") from error


def check(data: bytes, bounds: Bounds, spent: Spent | None = None, side: int | None = None) -> bytes | None:
    """Check an image file by its header, then decode it once, in another process.

    spent: on the request's images so far; this one is added. side: that a model reads; None if no model reads it.
    Returns a small copy, of which the model reads the same pixels, if the image costs much; None if it costs little.
    Raises DataError for an image that is broken or beyond a bound; TimeoutError if too many images wait.
    """
    if not data:
        raise DataError("the image is empty.")
    if len(data) > bounds.bytes:
        raise DataError(_too_many_bytes(len(data), bounds))
    if spent is not None and spent.prepared > MAX_PREPARED:
        raise DataError(f"the images before this one are costly to decode. {SMALLER}")
    if spent is not None and spent.seconds > bounds.request_seconds:
        raise DataError(f"the images before this one took more than {bounds.request_seconds:g} s to decode. Send fewer or smaller ones at a time.")
    decoded = DECODERS.decode(data, asdict(bounds), spent.caller if spent else "", side)
    if spent is not None:
        spent.seconds += decoded.seconds
        spent.prepared += len(decoded.prepared or b"")
    if decoded.error is not None:
        raise DataError(decoded.error)
    return decoded.prepared


def decode(data: bytes, bounds: Bounds) -> bool:
    """Decode an image file once, in this process. Returns whether it has more than 8 bits. Raises DataError, MemoryError."""
    check_parts(data)
    try:
        with open_image(data) as opened:
            size = f"the image is {opened.width} x {opened.height} pixels"
            if opened.width * opened.height > bounds.pixels:
                raise DataError(f"{size}; at most {bounds.pixels:,} pixels in all are allowed. {SMALLER}")
            if max(opened.size) > bounds.side:
                raise DataError(f"{size}; at most {bounds.side:,} per side are allowed. {SMALLER}")
            if min(opened.size) < 2:
                raise DataError(f"{size}; at least 2 per side are needed.")
            if (decoded := opened.width * opened.height * PIXEL_BYTES.get(opened.mode, 4)) > bounds.decoded:
                raise DataError(f"{size} of {opened.mode}, {decoded >> 20} MiB to read; at most {bounds.decoded >> 20} are allowed. {SMALLER}")
            opened.load()
            return opened.mode in DEEP_MODES
    except Image.DecompressionBombError as error:
        raise DataError(f"the image has far more than the {bounds.pixels:,} pixels that are allowed. {SMALLER}") from error
    except OSError as error:
        raise DataError("the image cannot be read: the file is broken or not an image. Save it again as JPEG or PNG.") from error


def prepared(data: bytes, side: int) -> bytes:
    """A PNG of what a model with pictures of this side reads of an image file of 8 bits. Raises DataError, MemoryError."""
    image = read_image(Picture(Path("image"), data=data), side)
    image.info.clear()
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _too_many_bytes(size: int, bounds: Bounds) -> str:
    return f"the image has {size / 2**20:.1f} MiB; at most {bounds.bytes / 2**20:g} are allowed. {SMALLER}"
