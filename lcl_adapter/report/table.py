"""The table that ends a run: every figure with its base, its chance level and the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from lcl_adapter.terminal import console


def show_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the suites. ``untrained`` is what a method without training reaches on the base's tower; ``text``, how often the adapter's
    greedy answer is the right one, word for word (left out where there is no room; the report has it)."""
    roomy = console.width >= 100
    table = Table(title="base against adapter, the same questions", title_justify="left", box=SIMPLE if roomy else None, padding=(0, 1, 0, 0))
    columns = ["suite", "n", "figure", "chance", "untrained", "base", "adapter", "95 %", *(["text"] if roomy else [])]
    for column in columns:
        left = column in {"suite", "figure"}
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "figure")
    for row in rows:
        base, adapter = row["base"], row["adapter"]
        cells = [
            escape(row["name"]),
            str(row["n"]),
            row["metric"],
            f"{row['chance']:.2f}",
            figure(row["baseline"] and row["baseline"]["value"]),
            figure(base["value"]),
            f"[bold]{adapter['value']:.3f}[/bold]",
            f"{adapter['ci95'][0]:.3f}-{adapter['ci95'][1]:.3f}",
            figure(adapter["greedy"]),
        ]
        table.add_row(*cells[: len(columns)])
    console.print(table)


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
