"""Are the served probabilities what they say, and does "none of these" know a stranger? On held-out classes of the shipped data.

python -m benchmarks.calibrate runs/quickstart        # an adapter on the shipped base; sets of 2 labels

Every second held-out class is used: the numbers that "none of these" goes by (serve/calibrate.py) were chosen on the others. For each set: a
query of each of its two classes, and one each of two others. ECE is the expected calibration error of the likeliest label's probability in ten
bins, over the queries whose class is in the set; rejections are of the "none of these" threshold. AUC: how well the vision tower's likeness,
and the likeliest label's likelihood, tell a known class from a stranger.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.common import THREADS, finish
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.data.conversations import Turn, shown_order, support_turns
from lcl_adapter.data.sources import Picture
from lcl_adapter.data.sources.pocket import read_pocket
from lcl_adapter.serve.calibrate import calibrate, familiarity
from lcl_adapter.serve.engine import Engine

SETS = 300
SHOTS = (2, 4, 5)  # no held-out class has more than six drawings
BINS = 10


class Row(NamedTuple):
    """One query: the likeliest label's probability, whether it is right, whether its class is in the set, and what that could be told by."""

    chance: float
    right: bool
    known: bool
    rejected: bool
    familiarity: float
    log_likelihood: float


def one_set(engine: Engine, rng: np.random.Generator, shots: int, test: frozenset[str]) -> list[Row]:
    pool = read_pocket("held_out", min_pictures=shots + 1)
    classes = [one for one in pool.classes if one.name in test]
    kinds = [classes[i] for i in rng.choice(len(classes), 4, replace=False)]
    drawn = [[kind.pictures[i] for i in rng.permutation(len(kind.pictures))] for kind in kinds]
    shown: list[tuple[Picture, str]] = [(picture, kinds[n].name) for n in (0, 1) for picture in drawn[n][:shots]]
    wording = engine.models["adapter"].wording
    labels = [kinds[0].name, kinds[1].name]
    answers = tuple(wording.answered(label) for label in labels)
    with engine.using("adapter"):
        steps = calibrate(engine, shown, wording, None)
        while True:
            try:
                next(steps)
            except StopIteration as finished:
                found = finished.value
                break
        ready = engine.prefill(support_turns(shown, wording))
        queries = [drawn[0][shots], drawn[1][shots], drawn[2][0], drawn[3][0]]
        replies = engine.ask(ready, [(Turn("user", wording.query, query), answers) for query in queries])
        cosines = engine.vectors(queries) @ engine.vectors([shown[place][0] for place in shown_order(len(shown))]).T
    rows = []
    for number, reply in enumerate(replies):
        chances = found.probabilities(reply.log_likelihoods)
        own = [float(c) for c, place in zip(cosines[number], shown_order(len(shown)), strict=True) if shown[place][1] == labels[reply.best]]
        score = familiarity(own)
        rejected = found.threshold is not None and score < found.threshold
        rows.append(Row(max(chances), reply.best == number, number < 2, rejected, score, max(reply.log_likelihoods)))
    return rows


def ece(rows: list[Row]) -> float:
    known = [(row.chance, row.right) for row in rows if row.known]
    place = np.minimum(((np.array([c for c, _ in known]) - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = []
    for one in range(BINS):
        chosen = [known[i] for i in np.nonzero(place == one)[0]]
        if chosen:
            gaps.append(len(chosen) * abs(float(np.mean([c for c, _ in chosen])) - float(np.mean([r for _, r in chosen]))))
    return sum(gaps) / len(known)


def main(run: Path) -> None:
    torch.set_num_threads(THREADS)
    engine = Engine(load_base(BaseRef("pocket", device="cpu")), 10**9)
    engine.load_adapter("adapter", run)
    test = frozenset(one.name for one in read_pocket("held_out", min_pictures=3).classes[1::2])
    table: list[tuple[str, ...]] = []
    ratios: dict[str, float] = {}
    for shots in SHOTS:
        rng = np.random.default_rng(shots)
        rows = [row for _ in range(SETS) for row in one_set(engine, rng, shots, test)]
        known, strange = [row for row in rows if row.known], [row for row in rows if not row.known]
        truth = [row.known for row in rows]
        figures = {
            "right": float(np.mean([row.right for row in known])),
            "ECE": ece(rows),
            "wrongly rejected": float(np.mean([row.rejected for row in known])),
            "strangers rejected": float(np.mean([row.rejected for row in strange])),
            "AUC, tower": float(roc_auc_score(truth, [row.familiarity for row in rows])),
            "AUC, likelihood": float(roc_auc_score(truth, [row.log_likelihood for row in rows])),
        }
        table.append((f"{shots} shots", *(f"{value:.3f}" for value in figures.values())))
        ratios |= {f"{shots} shots: {name}": value for name, value in figures.items()}
    finish("calibrate", ("set", *figures), table, ratios)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart"))
