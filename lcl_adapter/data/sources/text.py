"""Plain text files."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from lcl_adapter.data.sources.encodings import Decoded, decode
from lcl_adapter.errors import DataError


def read_text(file: Path, encoding: str | None = None) -> Decoded:
    """The file's text, also of one that ends in .gz, with a note where its encoding was guessed.

    Raises DataError where it cannot be read, or where its encoding cannot be recognised.
    """
    try:
        raw = file.read_bytes()
        return decode(gzip.decompress(raw) if file.suffix == ".gz" else raw, str(file), encoding)
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such file.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error}). A text file is expected.") from error
