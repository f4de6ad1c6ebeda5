"""Where people read: everything but results goes to standard error, so that ``--json`` leaves standard output clean."""

from rich.console import Console

console = Console(stderr=True)
