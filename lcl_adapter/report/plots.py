"""Plots: loss by step, accuracy by shots, and ROC curves, for base, adapter, baseline and chance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from sklearn.metrics import roc_curve

from lcl_adapter.evaluate.metrics import log_odds
from lcl_adapter.files import read_lines, whole_file

mpl.use("Agg")
from matplotlib import pyplot as plt

BASE, ADAPTER, PROTOTYPE, CHANCE = "#8a8f98", "#0b6e4f", "#c77d0a", "#b0b4ba"
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "figure.dpi": 130}


def plot_loss(metrics: Path, out: Path) -> None:
    """Plot the training loss of ``metrics.jsonl``, as logged and as a running mean."""
    lines = [value for _, value in read_lines(metrics)]
    if not lines:
        return
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    smooth = [sum(losses[max(0, i - 4) : i + 1]) / len(losses[max(0, i - 4) : i + 1]) for i in range(len(losses))]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 3.4))
        axis.plot(steps, losses, color=BASE, alpha=0.5, linewidth=1, label="logged")
        axis.plot(steps, smooth, color=ADAPTER, linewidth=2, label="mean of 5")
        axis.set(xlabel="step", ylabel="loss on learned tokens", ylim=(0, None), title="Training loss")
        axis.legend(frameon=False)
        _save(figure, out)


def plot_accuracy(rows: Sequence[dict[str, Any]], out: Path) -> bool:
    """Plot accuracy by shots or references, one panel for each suite and kind of neighbours.

    Returns False if there is nothing to plot.
    """
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["shots"] is not None and row["control"] is None:
            title = f"{row['ways']}-way, {row['neighbours']}" if row["kind"] == "lcl" else row["suite"]
            title += {"naming": ", naming", "locate": ", boxes"}.get(row["kind"], "")
            panels.setdefault(title, []).append(row)
    if not panels:
        return False
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(down, across, figsize=(3.3 * across, 3.7 * down), squeeze=False)
        all_axes = list(axes.flat)
        for axis, (title, cells) in zip(all_axes, panels.items(), strict=False):
            _panel(axis, sorted(cells, key=lambda r: int(r["shots"])), title)
        for axis in all_axes[len(panels) :]:
            axis.set_axis_off()
        handles, names = max((axis.get_legend_handles_labels() for axis in all_axes), key=lambda legend: len(legend[0]))
        figure.legend(handles, names, loc="lower center", ncols=4, frameon=False, bbox_to_anchor=(0.5, -0.04))
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        _save(figure, out)
    return True


def _panel(axis: Any, cells: Sequence[dict[str, Any]], title: str) -> None:
    shots = [str(c["shots"]) for c in cells]
    for name, colour in (("base", BASE), ("adapter", ADAPTER)):
        values = [c[name]["value"] for c in cells]
        low = [v - c[name]["ci95"][0] for v, c in zip(values, cells, strict=True)]
        high = [c[name]["ci95"][1] - v for v, c in zip(values, cells, strict=True)]
        axis.errorbar(shots, values, yerr=[low, high], color=colour, marker="o", linewidth=2, capsize=3, label=name)
    baseline = [(s, c["baseline"]["value"]) for s, c in zip(shots, cells, strict=True) if c["baseline"]]
    if baseline:
        axis.plot(*zip(*baseline, strict=True), color=PROTOTYPE, marker="x", linestyle="--", label="without training")
    axis.axhline(cells[0]["chance"], color=CHANCE, linestyle=":", label="chance")
    unit = "references" if cells[0]["kind"] == "inspection" else "shots per class"
    axis.set(title=title, xlabel=unit, ylabel=cells[0]["metric"], ylim=(0, 1.02))


def plot_roc(rows: Sequence[dict[str, Any]], predictions: Sequence[dict[str, Any]], out: Path) -> bool:
    """Plot ROC curves over all categories, one panel for each inspection cell. Returns False if there is none."""
    cells = [row for row in rows if row["kind"] == "inspection"]
    if not cells:
        return False
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(cells), figsize=(3.2 * len(cells), 3.4), sharey=True, squeeze=False)
        for axis, row in zip(axes[0], cells, strict=True):
            own = [p for p in predictions if p["cell"] == row["name"]]
            truth = [p["defect"] is not None for p in own]
            for name, colour in (("base", BASE), ("adapter", ADAPTER)):
                false_alarms, hits, _ = roc_curve(truth, [defect_score(p, name) for p in own])
                axis.plot(false_alarms, hits, color=colour, linewidth=2, label=f"{name} {row[name]['value']:.2f}")
            axis.plot([0, 1], [0, 1], color=CHANCE, linestyle=":")
            axis.set(title=row["name"], xlabel="good parts called defective", xlim=(0, 1), ylim=(0, 1.02))
            axis.legend(frameon=False, loc="lower right", title="mean AUROC", fontsize=8, title_fontsize=8)
        axes[0][0].set_ylabel("defective parts called defective")
        _save(figure, out)
    return True


def defect_score(line: dict[str, Any], who: str) -> float:
    """The log-odds of "defective" of a prediction, from the scores of its two answers; the report's AUROC is of these."""
    scores = line[who]["log_likelihoods"]
    good = line["gold"] if line["defect"] is None else next(label for label in scores if label != line["gold"])
    return -log_odds(list(scores.values()), list(scores).index(good))


def _save(figure: Any, out: Path) -> None:
    with whole_file(out) as partial:
        figure.savefig(partial, format="png", bbox_inches="tight")
    plt.close(figure)
