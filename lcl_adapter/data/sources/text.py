"""Plain text files."""

from __future__ import annotations

from pathlib import Path

from lcl_adapter.errors import DataError


def read_text(file: Path) -> str:
    """The file's text. Raises DataError where it cannot be read, or is not UTF-8."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}). A text file is expected.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 (byte {error.start}: {error.reason}). Save it as UTF-8.") from error
