"""The retention gate: how far did each suite under ``evaluate.retention`` fall below the base, and is that allowed?

The paired interval of the fall decides, not its measured value: base and adapter answered the same questions, and the
difference on resamples of them says how much of the fall is chance.

    lost        the whole interval is above the allowance: the gate does not pass
    retained    the whole interval is within the allowance
    undecided   the interval contains the allowance: too few questions to say; the gate passes, with a warning

Of a perplexity, the fall is its relative rise in percent, over the same sentences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lcl_adapter.evaluate.metrics import Estimate, mean_estimate
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.schema import amount_of

Fall = tuple[str, int, Estimate]  # the suite of a cell, its number of questions, and base minus adapter


def retention_of(falls: Sequence[Fall], recipe: Recipe) -> list[dict[str, Any]]:
    """One row for each suite under ``evaluate.retention`` that was measured. For a suite of several cells, the mean of
    their falls counts.

    ``fell``, ``interval`` (95 %) and ``allowed`` are in points, or in percent of the base's perplexity (``unit``).
    ``verdict`` follows from ``interval`` and ``allowed``.
    ``retained`` is false for the verdict "lost" only. ``n`` is the number of questions.
    """
    rows = []
    for suite, allowance in recipe.evaluate.retention.items():
        own = [(count, fall) for name, count, fall in falls if name == suite]
        if own:
            fall = mean_estimate([estimate for _, estimate in own])
            allowed = amount_of(allowance)
            fell, low, high = (_in_unit(value, fall) for value in (fall.value, *fall.interval(-1.0, 1.0)))
            verdict = "lost" if low > allowed else "retained" if high <= allowed else "undecided"
            rows.append(
                {
                    "suite": suite,
                    "n": sum(count for count, _ in own),
                    "fell": round(fell, 2),
                    "interval": [round(low, 2), round(high, 2)],
                    "allowed": allowed,
                    "unit": "points" if fall.unit == "share" else "%",
                    "verdict": verdict,
                    "retained": verdict != "lost",
                }
            )
    return rows


def _in_unit(fall: float, of: Estimate) -> float:
    """Points of a share; of a mean log-likelihood, the perplexity's rise in percent."""
    return 100 * (fall if of.unit == "share" else math.expm1(fall))


def allowance_met(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether every measured fall is within its allowance, chance left aside. It orders checkpoints; it is no verdict."""
    return all(row["fell"] <= row["allowed"] for row in rows)
