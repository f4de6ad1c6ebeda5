"""Where commands print: results on standard output, progress and notes on standard error.

With ``--json``, standard output holds one JSON object, and the results for people are on standard error too.
"""

from collections.abc import Iterable

from rich.console import Console

WIDTH_OF_FILES = 160  # columns of a table that is written to a file or a pipe

console = Console(stderr=True)
_results = Console(soft_wrap=True)
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
