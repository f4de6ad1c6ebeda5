"""The result of ``data check``, for people."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from lcl_adapter.terminal import results, show_notes


def show_check(result: dict[str, Any]) -> None:
    """Print counts and shares as a table, then every fault and where it is."""
    table = Table(title="data", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("source", "entries", "opened", "share", "realised", "passes", "longest", "left out"):
        table.add_column(column, justify="left" if column in {"source", "left out"} else "right", no_wrap=column == "source")
    rows = result["rows"] or {}
    for name, counts in result["sources"].items():
        passes = rows.get("passes", {}).get(name)
        ended = rows.get("ended", {}).get(name)
        table.add_row(
            name,
            f"{counts['entries']:,}",
            f"{counts['pictures']:,}",
            _format_share(rows.get("requested", {}).get(name)),
            _format_share(rows.get("realised", {}).get(name)),
            ("-" if passes is None else f"{passes:.1f}") + (f", ends ({ended})" if ended else ""),
            str(rows.get("longest", {}).get(name, "-")),
            ", ".join(f"{count} x {reason}" for reason, count in counts["left_out"].items()) or "-",
        )
    results().print(table)
    if "context" in rows:
        results().print(f"the context holds {rows['context']:,} tokens", highlight=False)
    show_notes(result["notes"])
    for fault in result["faults"]:
        results().print(f"{fault['source']}: {fault['kind']}: {fault['message']}", style="red", markup=False, highlight=False, soft_wrap=True)
    count = len(result["faults"])
    results().print("no faults" if not count else f"{count} fault{'s' if count > 1 else ''}", style="bold" if not count else "bold red")


def _format_share(share: float | None) -> str:
    return "-" if share is None else f"{share:.2f}"
