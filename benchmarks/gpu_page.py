"""The page of a run of ``benchmarks.gpu``: its JSON as tables."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def page(result: dict[str, Any]) -> str:
    """Markdown. A part that failed or did not run is named with its reason."""
    card, parts = result["card"], result["parts"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    shape = "LLaVA-1.5-7B's shape" if result["shape"] == "7b" else "a tiny shape"
    memory = f", {gigabytes(card['memory'])}" if card["memory"] else ""
    sections = [
        "# Measured on a GPU",
        f"Printed by `{result['command']}` at commit {result['commit']} on one {card['name']}{memory}, with {versions}. "
        f"The weights are random, in {shape}, so nothing here says how well a model answers."
        + (f" The forecasts are of the formulas at commit {result['forecasts_of']}." if "forecasts_of" in result else ""),
    ]
    for name, write in (("nf4", _training), ("pooled", _training), ("bf16", _training), ("forecasts", _forecasts), ("files", _files)):
        part = parts.get(name)
        if part is None:
            continue
        sections.append(f"## {TITLES[name]}")
        sections += write(part)
        if "failed" in part:
            sections.append(f"This part did not finish: {part['failed']}.")
    if "failed" in parts.get("model", {}):
        sections.append(f"The base was not written: {parts['model']['failed']}.")
    return "\n\n".join(section if section.startswith(("|", "#")) else _wrapped(section) for section in sections) + "\n"


def _wrapped(prose: str) -> str:
    return textwrap.fill(prose, 100, break_long_words=False, break_on_hyphens=False)


OURS = ("training", "forecast", "peak", "error", "a step")
TITLES = {
    "nf4": "Training in 4 bits",
    "pooled": "Sixteen photos of each class beside two",
    "bf16": "Training and asking in 16 bits",
    "forecasts": "Forecast against measured peak, small models",
    "files": "Merge and conversion",
}


def _training(part: dict[str, Any]) -> list[str]:
    sections = []
    rows = []
    for row in part.get("trainings", []):
        ours, stock = row["ours"], row.get("stock")
        pooled = f" of {row['support_tokens']} tokens a photo that is shown" if row.get("support_tokens") else ""
        name = f"{row['precision']}, 2-way {row['shots']}-shot{pooled}, {row['queries']} question(s) a set, {row['tokens']:,} tokens"
        own = [gigabytes(ours["forecast"]), gigabytes(ours["peak"]), f"{ours['error']:+.1%}", f"{ours['seconds_a_step']:.2f} s"]
        if stock is None:
            rows.append([name, *own])
        elif "failed" in stock:
            rows.append([name, *own, stock["failed"], "-", "-"])
        else:
            speed = stock["seconds_a_step"] / ours["seconds_a_step"]
            rows.append([name, *own, gigabytes(stock["peak"]), f"{stock['seconds_a_step']:.2f} s", f"{speed:.2f}"])
    if rows:
        beside_stock = len(rows[0]) > len(OURS)
        stock_is = " Stock is TRL's SFTTrainer with its own collator, on the same rows." if beside_stock else ""
        sections.append(f"Rank 64, dropout 0.05, gradient checkpointing.{stock_is}")
        sections.append(table((*OURS, "stock: peak", "stock: a step", "times stock's speed") if beside_stock else OURS, rows))
    if "pooled" in part:
        sections.append(f"16 shots a class with pooled supports: {part['pooled']}.")
    asking = part.get("asking")
    if asking and "failed" in asking:
        sections.append(f"Asking failed: {asking['failed']}.")
    elif asking:
        rows = [
            ["images a second, stored prefix, prefill included", f"{asking['images_a_second']:.2f}"],
            ["images a second, after the prefill", f"{asking['images_a_second_after_the_prefill']:.2f}"],
            ["images a second, plain `generate`", f"{asking['plain_images_a_second']:.2f}"],
            ["times plain's speed", f"{asking['ratio']:.1f}"],
            ["same answers", f"{asking['same_answers']:.0%}"],
            ["peak, stored prefix", gigabytes(asking["peak"])],
            ["its forecast", f"{gigabytes(asking['forecast'])} ({asking['error']:+.1%})"],
            ["peak, plain", gigabytes(asking["plain_peak"])],
        ]
        sections.append(f"{asking['questions']} questions about a set of {asking['shots']} shots a class, {asking['tokens']:,} tokens:")
        sections.append(table(("asking", "figure"), rows))
    return sections


def _forecasts(part: dict[str, Any]) -> list[str]:
    rows = []
    for row in part.get("rows", []):
        figures = [row["failed"], "-", "-"] if "failed" in row else [gigabytes(row["forecast"]), gigabytes(row["peak"]), f"{row['error']:+.1%}"]
        rows.append([row["name"], *figures])
    if not rows:
        return []
    notes = [f"CUDA's context was measured in a process of its own: {gigabytes(part['outside'])}."] if "outside" in part else []
    return [*notes, table(("training", "forecast", "measured peak", "error"), rows)]


def _files(part: dict[str, Any]) -> list[str]:
    rows = []
    for name, title in (("merge", "merge of an adapter of rank 64, verified by layers"), ("convert", "conversion, every tensor read again")):
        timed = part.get(name)
        if timed:
            rows.append([title, timed["failed"] if "failed" in timed else f"{timed['seconds']:.0f} s"])
    return [f"A checkpoint of {gigabytes(part['bytes'])}.", table(("work", "time"), rows)] if rows else []
