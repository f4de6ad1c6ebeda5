"""The table that ends a run: every figure with its base, its chance level and the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from lcl_adapter.terminal import console


def show_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the suites; ``text`` is how often the greedy answer is the right name, word for word."""
    table = Table(title="base against adapter, the same questions", title_justify="left")
    for column in ("suite", "n", "chance", "prototype", "base", "adapter", "95 %", "text: base", "adapter"):
        table.add_column(column, justify="left" if column == "suite" else "right")
    for row in rows:
        base, adapter = row["base"], row["adapter"]
        table.add_row(
            escape(row["name"]),
            str(row["n"]),
            f"{row['chance']:.2f}",
            _figure(row["prototype"]["accuracy"]),
            _figure(base["accuracy"]),
            f"[bold]{adapter['accuracy']:.3f}[/bold]",
            f"{adapter['ci95'][0]:.3f}-{adapter['ci95'][1]:.3f}",
            _figure(base["greedy"]),
            _figure(adapter["greedy"]),
        )
    console.print(table)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
