"""The console for messages: standard error, so that standard output holds only results (``--json``)."""

from collections.abc import Iterable

from rich.console import Console

console = Console(stderr=True)


def show_notes(notes: Iterable[str]) -> None:
    for note in notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
