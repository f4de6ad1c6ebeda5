"""The console for messages: standard error, so that standard output holds only results (``--json``)."""

from rich.console import Console

console = Console(stderr=True)
