"""The memory forecast, and the facts of ``inspect``, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from lcl_adapter.terminal import results


def show_plan(plan: Mapping[str, Any]) -> None:
    """Print the memory by part for training, evaluation and serving, whether it fits, and what would make it fit."""
    forecasts = plan["forecasts"]
    table = Table("memory", *forecasts, box=box.SIMPLE)
    for part in dict.fromkeys(p for f in forecasts.values() for p in f["parts"]):
        table.add_row(part, *(_marked_size(f["parts"].get(part)) for f in forecasts.values()))
    for moment in dict.fromkeys(m for f in forecasts.values() for m in f["moments"]):
        table.add_row(f"  or {moment}", *(_marked_size(f["moments"].get(moment), f["moments"]) for f in forecasts.values()), style="dim")
    table.add_row("peak", *(_size(f["total"]) for f in forecasts.values()), style="bold")
    results().print(table)
    pooled = f", {plan['support_tokens']} where shown with a label" if "support_tokens" in plan else ""
    images = f"{plan['images_in_it']} images of {plan['tokens_an_image']}{pooled}"
    rows = f"longest row {plan['longest_row']:,} tokens with {images}; context {plan['context']:,}"
    results().print(rows, highlight=False)
    device = "GPU" if plan["device"] == "cuda" else "CPU"
    names = [name for name in forecasts if name != "serving"]
    all_of_it = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    too_large = [name for name in names if forecasts[name]["total"] > plan["memory"]]
    fit = f"{all_of_it} {'fits' if len(names) == 1 else 'fit'}" if plan["fits"] else f"{' and '.join(too_large)} DO NOT FIT"
    results().print(f"{plan['precision']} on a {device} of {_size(plan['memory'])}: {fit}", style="bold" if plan["fits"] else "bold red")
    if plan["support_sets_beside"]:
        results().print(f"serving leaves room for {plan['support_sets_beside']:,} support sets of that length", highlight=False)
    for remedy in plan["remedies"]:
        results().print(
            f"  {' '.join(remedy['overrides'])}: {_size(remedy['total'])}; costs {remedy['cost']}", highlight=False, markup=False, soft_wrap=True
        )
    if not plan["fits"] and not plan["remedies"]:
        results().print("  none of the known changes is enough: use a smaller base", highlight=False)
    if "probe" in plan:
        peak = f", peak {plan['probe']['peak'] / 1e9:.2f} GB" if "peak" in plan["probe"] else ""
        results().print(f"a step took {plan['probe']['seconds_a_step']:.2f} s{peak}", highlight=False)


def _marked_size(size: int | None, among: Mapping[str, int] | None = None) -> str:
    if size is None:
        return "-"
    mark = "*" if among and size == max(among.values()) else ""
    return _size(size) + mark


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.0f} MB"


def fact_lines(facts: Mapping[str, Any]) -> list[str]:
    """One line for each fact."""
    lines = []
    for name, fact in facts.items():
        text = ", ".join(f"{key} {_format(value)}" for key, value in fact.items()) if isinstance(fact, Mapping) else _format(fact)
        lines.append(f"{name}: {text}")
    return lines


def _format(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return repr(value) if isinstance(value, str) and "\n" in value else str(value)
