"""The table that ends a run: every figure with its base, its chance level and the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from lcl_adapter.terminal import console


def show_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the suites; ``text`` is how often the greedy answer is the right one, word for word."""
    table = Table(title="base against adapter, the same questions", title_justify="left")
    for column in ("suite", "n", "figure", "chance", "without training", "base", "adapter", "95 %", "text: base", "adapter"):
        table.add_column(column, justify="left" if column in {"suite", "figure"} else "right")
    for row in rows:
        base, adapter = row["base"], row["adapter"]
        table.add_row(
            escape(row["name"]),
            str(row["n"]),
            row["metric"],
            f"{row['chance']:.2f}",
            figure(row["baseline"] and row["baseline"]["value"]),
            figure(base["value"]),
            f"[bold]{adapter['value']:.3f}[/bold]",
            f"{adapter['ci95'][0]:.3f}-{adapter['ci95'][1]:.3f}",
            figure(base["greedy"]),
            figure(adapter["greedy"]),
        )
    console.print(table)


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
