"""Where commands print: results on standard output, progress and notes on standard error.

With ``--json``, standard output holds one JSON object, and the results for people are on standard error too.

Names of files, labels and questions are other people's. A terminal would obey the control characters in them: erase lines, set
the window's title, reverse the direction of writing. Here they are shown as escapes.
"""

import json
import logging
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

WIDTH_OF_FILES = 160  # columns of a table that is written to a file or a pipe
DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # marks, as Unicode names their classes
MARKS = frozenset("\u200e\u200f\u061c")  # further marks of direction, which have no width
LAYOUT = frozenset("\n\t")  # what a text of several lines may have


def printable(text: str) -> str:
    """A name as people and UTF-8 files can have it, in one line.

    Bytes that are not UTF-8, control characters, and marks that change the direction of writing become escapes.
    """
    return text if text.isascii() and text.isprintable() else "".join(_escaped(c) if _hidden(c) else c for c in text)


def shown(text: str) -> str:
    """As :func:`printable`, of a text that may have several lines."""
    return "".join(_escaped(c) if c not in LAYOUT and _hidden(c) else c for c in text)


def _escaped(character: str) -> str:
    return ascii(character)[1:-1]


def _hidden(character: str) -> bool:
    if character.isascii():
        return not character.isprintable()
    category = unicodedata.category(character)
    return category in {"Cc", "Cs", "Zl", "Zp"} or character in MARKS or unicodedata.bidirectional(character) in DIRECTIONS


# In JSON, which escapes the control characters of ASCII by itself: those of ISO 8859, surrogates, and marks of direction
IN_JSON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def json_text(value: Any) -> str:
    """A value as JSON of one line, in which nothing is for a terminal to obey."""
    return IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


class _Console(Console):
    """Shows control characters in whatever text it prints; its own colours are not in the text."""

    def render_str(self, text: str, **options: Any) -> Text:
        """What is printed as a string, also in a table, before its width is measured."""
        return super().render_str(shown(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else shown(text), style, control)


class ShownFormatter(logging.Formatter):
    """A log's lines, as :func:`shown`, without line breaks that the message of one event has."""

    def format(self, record: logging.LogRecord) -> str:
        record.msg, record.args = printable(record.getMessage().strip()), ()
        return shown(super().format(record))


LOGGING = {  # what the server's own log and uvicorn's are written with
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"shown": {"()": "lcl_adapter.terminal.ShownFormatter", "format": "%(levelname)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "shown", "stream": "ext://sys.stderr"}},
    "loggers": {name: {"handlers": ["stderr"], "level": "WARNING", "propagate": False} for name in ("uvicorn", "lcl_adapter")},
}


console = _Console(stderr=True)
_results = _Console(soft_wrap=True)
_only_json = False


def results() -> Console:
    """The console for a command's result."""
    if _only_json:
        return console
    if not _results.is_terminal:
        _results.width = WIDTH_OF_FILES
    return _results


def print_json_only(only: bool) -> None:
    """Whether standard output is for a JSON object alone."""
    global _only_json
    _only_json = only


def show_notes(notes: Iterable[str]) -> None:
    for note in notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
