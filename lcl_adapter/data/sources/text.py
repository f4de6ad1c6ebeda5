"""Plain text files."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from lcl_adapter import reading
from lcl_adapter.data.sources.encodings import Decoded, decode
from lcl_adapter.errors import DataError

# Files that are given as a list by mistake, by their first bytes
OTHER_FILES = {
    b"PK\x03\x04": "an Excel workbook or another zip archive",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"<?xml": "XML",
    b"<annotation": "XML, one picture's annotation in Pascal VOC's form",
    b"<!DOCTYPE": "a web page",
}


def read_text(file: Path, encoding: str | None = None) -> Decoded:
    """The file's text, also of one that ends in .gz, with a note where its encoding was guessed.

    Raises DataError where it cannot be read or is too large, or where its encoding cannot be recognised.
    """
    try:
        if file.suffix == ".gz":
            with reading.open_file(file) as packed, gzip.open(packed) as opened:
                raw = reading.read_stream(opened, reading.MAX_UNPACKED, file)
        else:
            raw = reading.read_bytes(file, reading.MAX_TEXT)
        if kind := next((kind for begins, kind in OTHER_FILES.items() if raw.startswith(begins)), None):
            raise DataError(f"{file}: {kind}, not a text file. Save it as CSV or JSON Lines.")
        return decode(raw, str(file), encoding)
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such file.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error}). A text file is expected.") from error
