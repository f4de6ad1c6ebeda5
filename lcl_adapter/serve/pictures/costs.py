"""What an image file costs to decode, counted in its bytes before anything is decoded.

A few kB can hold a decoder for seconds: a progressive JPEG is decoded once for each of its scans, and Pillow reads each
segment, chunk and comment in Python, some of them in quadratic time.
"""

from __future__ import annotations

import re
import struct

from lcl_adapter.errors import DataError

MAX_SCANS = 50  # of a JPEG; encoders write about ten
MAX_SEGMENTS = 1000  # of a JPEG, before and between its scans; metadata of 10 MiB are 160 segments
MAX_COMMENT = 256 * 2**10  # bytes before the first frame of a GIF
MAX_CHUNKS = 20_000  # of a PNG; encoders write about 1,300 for 10 MiB

START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})  # JPEG markers that no length follows
MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # in a scan's data, where FF 00 is a byte, and FF D0 to FF D7 restart the decoder
SIMPLER = "Save it again as a plain JPEG or PNG."


def check_parts(data: bytes) -> None:
    """Raises DataError for a file with more parts than any encoder writes. A broken file passes: its decoder refuses it."""
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"GIF8"):
        _check_gif(data)
    elif data.startswith(b"\x89PNG"):
        _check_png(data)


def _check_jpeg(data: bytes) -> None:
    scans = segments = 0
    place = 2
    while marker := MARKER.search(data, place):
        kind, place = marker[1][0], marker.end()
        if kind == END_OF_IMAGE:
            return
        if kind in WITHOUT_LENGTH:
            continue
        segments += 1
        scans += kind == START_OF_SCAN
        if scans > MAX_SCANS:
            raise DataError(f"the image has more than {MAX_SCANS} scans; each is decoded over the whole picture. {SIMPLER}")
        if segments > MAX_SEGMENTS:
            raise DataError(f"the image has more than {MAX_SEGMENTS:,} segments. {SIMPLER}")
        if place + 2 > len(data):
            return
        place += max(2, struct.unpack_from(">H", data, place)[0])


def _check_gif(data: bytes) -> None:
    if len(data) < 13:
        return
    place = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0)  # after the header and the table of colours
    comment = 0
    while place + 1 < len(data) and data[place] == 0x21:  # extensions before the first frame
        place += 2
        while place < len(data) and data[place]:
            comment += data[place] + 1
            place += data[place] + 1
            if comment > MAX_COMMENT:
                raise DataError(f"the image has more than {MAX_COMMENT >> 10} kB of comments. {SIMPLER}")
        place += 1


def _check_png(data: bytes) -> None:
    place = 8
    for _ in range(MAX_CHUNKS):
        if place + 12 > len(data):
            return
        place += 12 + struct.unpack_from(">I", data, place)[0]
    if place + 12 <= len(data):
        raise DataError(f"the image has more than {MAX_CHUNKS:,} chunks. {SIMPLER}")
