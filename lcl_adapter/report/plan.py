"""A forecast and a path's facts, as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from lcl_adapter.terminal import console


def show_plan(found: Mapping[str, Any]) -> None:
    """Memory by part for training, evaluation and serving; what fits; ways to make it fit."""
    forecasts = found["forecasts"]
    table = Table("memory", *forecasts, box=box.SIMPLE)
    for part in dict.fromkeys(p for f in forecasts.values() for p in f["parts"]):
        table.add_row(part, *(_marked(f["parts"].get(part)) for f in forecasts.values()))
    for moment in dict.fromkeys(m for f in forecasts.values() for m in f["moments"]):
        table.add_row(f"  or {moment}", *(_marked(f["moments"].get(moment), f["moments"]) for f in forecasts.values()), style="dim")
    table.add_row("peak", *(_size(f["total"]) for f in forecasts.values()), style="bold")
    console.print(table)
    rows = (
        f"longest row {found['longest_row']:,} tokens with {found['images_in_it']} images of {found['tokens_an_image']}; context {found['context']:,}"
    )
    console.print(rows, highlight=False)
    device = "GPU" if found["device"] == "cuda" else "CPU"
    fit = "training fits" if found["fits"] else "training DOES NOT FIT"
    console.print(f"{found['precision']} on a {device} of {_size(found['memory'])}: {fit}", style="bold" if found["fits"] else "bold red")
    if found["support_sets_beside"]:
        console.print(f"serving leaves room for {found['support_sets_beside']:,} support sets of that length", highlight=False)
    for remedy in found["remedies"]:
        console.print(
            f"  {' '.join(remedy['overrides'])}: {_size(remedy['total'])}; costs {remedy['cost']}", highlight=False, markup=False, soft_wrap=True
        )
    if not found["fits"] and not found["remedies"]:
        console.print("  nothing that was tried is enough: take a smaller base", highlight=False)
    if "probe" in found:
        peak = f", peak {found['probe']['peak'] / 1e9:.2f} GB" if "peak" in found["probe"] else ""
        console.print(f"a step took {found['probe']['seconds_a_step']:.2f} s{peak}", highlight=False)


def _marked(size: int | None, among: Mapping[str, int] | None = None) -> str:
    if size is None:
        return "-"
    mark = "*" if among and size == max(among.values()) else ""
    return _size(size) + mark


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.0f} MB"


def lines_of(found: Mapping[str, Any]) -> list[str]:
    """A fact a line."""
    lines = []
    for name, one in found.items():
        told = ", ".join(f"{k} {_number(v)}" for k, v in one.items()) if isinstance(one, Mapping) else _number(one)
        lines.append(f"{name}: {told}")
    return lines


def _number(value: Any) -> str:
    return (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else repr(value)
        if isinstance(value, str) and "\n" in value
        else str(value)
    )
