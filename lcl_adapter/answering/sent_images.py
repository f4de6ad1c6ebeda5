"""Image files as the API sends and receives them: data URLs and their media types."""

from __future__ import annotations

import base64


def data_url(data: bytes) -> str:
    """An image file's bytes as a URL."""
    return data_url_head(data) + base64.b64encode(data).decode()


def data_url_head(data: bytes) -> str:
    """What comes before the base64, by the first bytes of an image file."""
    return f"data:image/{media_type(data)};base64,"


def media_type(data: bytes) -> str:
    """What follows ``image/`` in a media type, by the first bytes of an image file."""
    if data[4:8] == b"ftyp":
        return "avif" if data[8:12] in {b"avif", b"avis"} else "heic"
    if data[:1] == b"P" and data[1:2] in b"123456Ff":
        return "x-portable-pixmap"
    heads = {
        b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tiff", b"MM\0*": "tiff",
        b"\0\0\0\x0cjP": "jp2",
    }  # fmt: skip
    return next((name for head, name in heads.items() if data.startswith(head)), "png")


def suffix(data: bytes) -> str:
    """The suffix of an image file's name, with its dot, by the first bytes."""
    return {"jpeg": ".jpg", "x-portable-pixmap": ".ppm"}.get(media_type(data), f".{media_type(data)}")
