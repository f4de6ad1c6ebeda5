"""The retention gate: how far did each suite under ``evaluate.retention`` fall below the base, and is that allowed?

The paired interval of the fall decides, not its measured value: base and adapter answered the same questions, and the
difference on resamples of them says how much of the fall is chance.

    lost        the whole interval is above the allowance: the gate does not pass
    retained    the whole interval is within the allowance
    undecided   the interval contains the allowance: too few questions to say; the gate passes, with a warning
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lcl_adapter.evaluate.metrics import Estimate, mean_estimate
from lcl_adapter.recipe import Recipe

Fall = tuple[str, int, Estimate]  # the suite of a cell, its number of questions, and base minus adapter


def retention_of(falls: Sequence[Fall], recipe: Recipe) -> list[dict[str, Any]]:
    """One row for each suite under ``evaluate.retention`` that was measured. For a suite of several cells, the mean of
    their falls counts.

    ``fell``, ``interval`` (95 %) and ``allowed`` are in points. ``verdict`` follows from ``interval`` and ``allowed``.
    ``retained`` is false for the verdict "lost" only. ``n`` is the number of questions.
    """
    rows = []
    for suite, allowed in recipe.evaluate.retention.items():
        own = [(count, fall) for name, count, fall in falls if name == suite]
        if own:
            fall = mean_estimate([estimate for _, estimate in own])
            low, high = fall.interval(-1.0, 1.0)
            verdict = "lost" if 100 * low > allowed else "retained" if 100 * high <= allowed else "undecided"
            rows.append(
                {
                    "suite": suite,
                    "n": sum(count for count, _ in own),
                    "fell": round(100 * fall.value, 2),
                    "interval": [round(100 * low, 2), round(100 * high, 2)],
                    "allowed": allowed,
                    "verdict": verdict,
                    "retained": verdict != "lost",
                }
            )
    return rows


def allowance_met(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether every measured fall is within its allowance, chance left aside. It orders checkpoints; it is no verdict."""
    return all(row["fell"] <= row["allowed"] for row in rows)
