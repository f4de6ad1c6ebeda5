"""The table at the end of a run: every figure with the base's, the chance level and the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from lcl_adapter.evaluate.runner import count_of
from lcl_adapter.terminal import console, results


def show_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the suites.

    ``untrained`` is the figure of a method without training, on the base's tower. ``tower`` and ``both`` are those of judgements
    by the tower, and by model and tower, with fitted weights. ``text`` is how often the adapter's
    greedy answer is exactly right; it is left out on a narrow terminal.
    """
    wide = console.width >= 100
    table = Table(title="base against adapter, the same questions", title_justify="left", box=SIMPLE if wide else None, padding=(0, 1, 0, 0))
    judged = any("both" in row for row in rows)
    columns = [
        "suite",
        "n",
        "figure",
        "chance",
        "untrained",
        "base",
        "adapter",
        "95 %",
        *(["tower", "both"] if judged else []),
        *(["text"] if wide else []),
    ]
    for column in columns:
        left = column in {"suite", "figure"}
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "figure")
    for row in rows:
        base, adapter = row["base"], row["adapter"]
        cells = [
            escape(row["name"]),
            count_of(row),
            row["metric"],
            format_chance(row),
            format_figure(row["baseline"] and row["baseline"]["value"]),
            format_figure(base["value"]),
            f"[bold]{adapter['value']:.3f}[/bold]",
            f"{adapter['ci95'][0]:.3f}-{adapter['ci95'][1]:.3f}",
            *([format_judge(row, "tower"), format_judge(row, "both")] if judged else []),
            format_figure(adapter["greedy"]),
        ]
        table.add_row(*cells[: len(columns)])
    results().print(table)


def format_figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def format_judge(row: Mapping[str, Any], name: str) -> str:
    """The figure of a judge; "-" where there is none."""
    return f"{row[name]['value']:.3f}" if name in row else "-"


def format_chance(row: Mapping[str, Any]) -> str:
    """The chance level; "-" where there is none."""
    return "-" if row["chance"] is None else f"{row['chance']:.2f}"


VERDICTS = {"retained": "retained", "lost": "NOT RETAINED", "undecided": "UNDECIDED, {n} {cases} are too few to say"}


def verdict_of(row: Mapping[str, Any]) -> str:
    """The verdict of a suite's retention. Reports of 0.4 and earlier have only ``kept``, by the measured fall."""
    if "verdict" in row:
        return str(row["verdict"])
    return "retained" if row.get("retained", row.get("kept")) else "lost"


def retention_line(row: Mapping[str, Any]) -> str:
    """How far a suite is from the base in points, its paired 95 % interval, what may be lost, and the verdict. Of a
    perplexity, by how many percent it rose.
    """
    if row.get("unit") == "%":
        verdict = VERDICTS[verdict_of(row)].format(n=row["n"], cases="sentences")
        low, high = row["interval"]
        change = f"perplexity {row['fell']:+.1f} % against the base (95 %: {low:+.1f} to {high:+.1f})"
        return f"{row['suite']}: {change}, {row['allowed']:+.1f} % is allowed: {verdict}."
    interval = f" (95 %: {-row['interval'][1]:+.1f} to {-row['interval'][0]:+.1f})" if "interval" in row else ""
    verdict = VERDICTS[verdict_of(row)].format(n=row.get("n"), cases="questions")
    return f"{row['suite']}: {-row['fell']:+.1f} points against the base{interval}, {row['allowed']:.1f} may be lost: {verdict}."
