"""Bytes of lists and of names in archives -> text: the given encoding, what the bytes say, else a guess, with a note.

UTF-8 is not assumed in silence: other bytes are guessed only where the guess can be checked, and refused otherwise.
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Iterable
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field

from lcl_adapter.errors import DataError

MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
JAPANESE = "cp932"  # Shift-JIS as Windows writes it
SUGGESTED = "`encoding: cp932` (Japanese Windows), gbk, euc-kr, big5, cp1252 or another"
CHECKED = 1 << 16  # bytes at the start of a list that show what it is


def _known(encoding: str | None) -> str | None:
    try:
        return None if encoding is None else codecs.lookup(encoding).name
    except LookupError as error:
        raise ValueError(f"no encoding {encoding!r}: give {SUGGESTED} of Python's") from error


Encoding = Annotated[
    str | None,
    AfterValidator(_known),
    Field(description="of the list, and of names in an archive that are not UTF-8, for instance cp932 or gbk; by default it is recognised"),
]


class Decoded(NamedTuple):
    """note: what was guessed; "" where nothing was."""

    text: str
    note: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        return (self.note,) if self.note else ()


def nfc(text: str) -> str:
    """A name in the form in which names are compared, hashed and shown. A Mac writes them decomposed (NFD)."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def decode(raw: bytes, what: str, encoding: str | None = None) -> Decoded:
    """The text of a list. what: its name, for messages.

    Raises DataError where it is neither in the given encoding, nor UTF-8, UTF-16 or Shift-JIS.
    """
    if encoding is not None:
        try:
            return Decoded(raw.decode(encoding).removeprefix("\ufeff"))
        except UnicodeDecodeError as error:
            raise DataError(f"{what}: not {encoding} (byte {error.start}: {error.reason}). Give its own `encoding`.") from error
    for mark, marked in MARKS:
        if raw.startswith(mark):
            try:
                return Decoded(raw.decode(marked))
            except UnicodeDecodeError as error:
                raise DataError(f"{what}: begins like {marked} and is not ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    if raw[1:2] == b"\0" or raw[:1] == b"\0":
        half = "utf-16-le" if raw[1:2] == b"\0" else "utf-16-be"
        try:
            return Decoded(raw.decode(half), f"{what}: read as {half}; if that is wrong, give `encoding`")
        except UnicodeDecodeError:
            raise DataError(f"{what}: has zero bytes, and is not UTF-16. Is it a text file?") from None
    try:
        return Decoded(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        if is_japanese(raw):
            return Decoded(raw.decode(JAPANESE), f"{what}: not UTF-8; read as Shift-JIS ({JAPANESE}); if that is wrong, give `encoding`")
        raise DataError(f"{what}: not UTF-8 (byte {error.start}: {error.reason}). Save it as UTF-8, or set {SUGGESTED}.") from error


def is_japanese(raw: bytes) -> bool:
    """Whether bytes that are not UTF-8 are Shift-JIS: all of them can be, and most of what is not ASCII is Japanese letters that
    stand by themselves. Beside an ASCII letter, a kanji is rather an accented letter with the letter behind it: "L把her" is Löcher.
    """
    try:
        text = raw.decode(JAPANESE)
    except UnicodeDecodeError:
        return False
    other = [place for place, letter in enumerate(text) if not letter.isascii()]
    alone = [place for place in other if _is_japanese_letter(text[place]) and not _beside_ascii_letter(text, place)]
    return 2 * len(alone) > len(other)


def _beside_ascii_letter(text: str, place: int) -> bool:
    beside = text[max(0, place - 1) : place] + text[place + 1 : place + 2]
    return any(letter.isascii() and letter.isalpha() for letter in beside)


def _is_japanese_letter(letter: str) -> bool:
    """Kana, kanji or Japanese punctuation of full width. Half-width katakana are single bytes, as accented Latin letters are."""
    return "\u3000" <= letter <= "\u30ff" or "\u4e00" <= letter <= "\u9fff"


def names_in_other_case(where: str, names: Iterable[str]) -> list[str]:
    """A note for each class name that is there in several forms, which differ in capital letters only. where: begins a note."""
    forms: dict[str, dict[str, None]] = {}
    for name in names:
        forms.setdefault(name.casefold(), {})[name] = None
    listed = [", ".join(map(repr, same)) for same in forms.values() if len(same) > 1]
    return [f"{where}: the classes {same} differ in capital letters only, and are read as different classes" for same in listed]
