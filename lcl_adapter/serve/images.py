"""Images from a client: base64 in a data URL, bounded before they are decoded. Nothing is ever fetched.

A decoded image has no path of its own on this machine; it is a :class:`Picture` in a scratch folder for as long as it is asked
about, and never shown in an error.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import warnings
from dataclasses import dataclass

from PIL import Image

from lcl_adapter.errors import DataError

TYPES = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP", "image/gif": "GIF", "image/bmp": "BMP", "image/tiff": "TIFF"}
HEAD = re.compile(r"data:([\w.+-]+/[\w.+-]+);base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Bounds:
    """What one client may send: bytes, pixels and the longer side of an image, images a request.

    The side, because a picture is padded to a square before the model sees it.
    """

    bytes: int = 10 * 2**20
    pixels: int = 40_000_000
    side: int = 8192
    images: int = 256


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def from_data_url(url: str, bounds: Bounds) -> bytes:
    """The image's bytes, as they were given. Raises DataError: another kind of URL, too large, no image, broken."""
    head = HEAD.match(url)
    if head is None:
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,20}:", url)
        what = f"a URL of {scheme[0]}" if scheme and scheme[0].lower() != "data:" else "not a base64 data URL"
        raise DataError(f"the image is {what}: nothing is fetched here. Send data:image/png;base64,… with the image's own bytes.")
    if head[1].lower() not in TYPES:
        raise DataError(f"the image says it is {head[1][:40]}; {', '.join(TYPES)} are taken.")
    size = (len(url) - head.end()) * 3 // 4
    if size > bounds.bytes:
        raise DataError(f"the image is {size / 2**20:.1f} MiB, {bounds.bytes / 2**20:g} are allowed. Scale it down first.")
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError("the image's base64 is broken.") from error
    check(data, bounds)
    return data


def check(data: bytes, bounds: Bounds) -> None:
    """By its header alone, and then by decoding it once. Raises DataError."""
    if not data:
        raise DataError("the image is empty.")
    if len(data) > bounds.bytes:
        raise DataError(f"the image is {len(data) / 2**20:.1f} MiB, {bounds.bytes / 2**20:g} are allowed. Scale it down first.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning: the bound is ours
            with Image.open(io.BytesIO(data), formats=list(TYPES.values())) as opened:
                if opened.width * opened.height > bounds.pixels:
                    raise DataError(
                        f"the image is {opened.width} x {opened.height} pixels, {bounds.pixels:,} in all are allowed. Scale it down first."
                    )
                if max(opened.size) > bounds.side:
                    raise DataError(f"the image is {opened.width} x {opened.height} pixels, {bounds.side:,} a side are allowed. Scale it down first.")
                if min(opened.size) < 2:
                    raise DataError(f"the image is {opened.width} x {opened.height} pixels, which shows nothing.")
                opened.load()
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"the image has far more than the {bounds.pixels:,} pixels that are allowed. Scale it down first.") from error
    except Exception as error:  # Pillow's decoders raise whatever the bytes make them raise
        raise DataError("the image cannot be read: broken, or no image at all. Save it again as JPEG or PNG.") from error
