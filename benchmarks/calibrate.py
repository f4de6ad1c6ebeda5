"""Are the served probabilities calibrated, and does "none of these" reject unknown classes?

    python -m benchmarks.calibrate [runs/quickstart] [--small] [--store]    # an adapter on the shipped base; sets of 2 labels

Every second held-out class of the shipped data is used. The constants of "none of these" (serve/calibrate.py) were
chosen on the others. Each support set has two classes, and gets four queries: one of each of its classes, and one of
each of two other classes.

ECE is the expected calibration error of the likeliest label's probability in ten bins, over the queries whose class is
in the set. Rejections are those of the "none of these" threshold. AUC says how well a score separates known from
unknown classes; the scores are the vision tower's similarity and the likeliest label's likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.common import THREADS, finish, options_of, parser
from lcl_adapter.answering.judgement import familiarity
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.data.conversations import Turn, shown_order, support_turns
from lcl_adapter.data.sources import Picture
from lcl_adapter.data.sources.pocket import read_pocket
from lcl_adapter.serve.calibrate import calibrate
from lcl_adapter.serve.engine import Engine

SETS = 300
SHOTS = (1, 2, 4, 5)  # no held-out class has more than six drawings
BINS = 10


class Row(NamedTuple):
    """One query. ``probability`` is the likeliest label's; ``known`` says whether the query's class is in the set."""

    probability: float
    right: bool
    known: bool
    rejected: bool
    familiarity: float
    log_likelihood: float


def one_set(engine: Engine, rng: np.random.Generator, shots: int, test: frozenset[str]) -> list[Row]:
    pool = read_pocket("held_out", min_pictures=shots + 1)
    classes = [pool_class for pool_class in pool.classes if pool_class.name in test]
    chosen = [classes[i] for i in rng.choice(len(classes), 4, replace=False)]
    pictures = [[pool_class.pictures[i] for i in rng.permutation(len(pool_class.pictures))] for pool_class in chosen]
    shown: list[tuple[Picture, str]] = [(picture, chosen[n].name) for n in (0, 1) for picture in pictures[n][:shots]]
    wording = engine.models["adapter"].wording
    labels = [chosen[0].name, chosen[1].name]
    answers = tuple(wording.answered(label) for label in labels)
    with engine.using("adapter"):
        steps = calibrate(engine, "adapter", shown, wording, None)
        while True:
            try:
                next(steps)
            except StopIteration as finished:
                calibration = finished.value
                break
        queries = [pictures[0][shots], pictures[1][shots], pictures[2][0], pictures[3][0]]
        questions = [(Turn("user", wording.query, query), answers) for query in queries]
        replies = engine.judge("adapter", support_turns(shown, wording), questions, "both")
        cosines = engine.vectors("adapter", queries) @ engine.vectors("adapter", [shown[place][0] for place in shown_order(len(shown))]).T
    rows = []
    for number, reply in enumerate(replies):
        probabilities = calibration.probabilities(reply.log_likelihoods)
        own = [float(c) for c, place in zip(cosines[number], shown_order(len(shown)), strict=True) if shown[place][1] == labels[reply.best]]
        score = familiarity(own)
        rejected = calibration.threshold is not None and score < calibration.threshold
        rows.append(Row(max(probabilities), reply.best == number, number < 2, rejected, score, max(reply.log_likelihoods)))
    return rows


def ece(rows: list[Row]) -> float:
    """Expected calibration error over the queries of known classes.

    The bins divide 0.5 to 1, because there are two labels.
    """
    known = [row for row in rows if row.known]
    bin_of_row = np.minimum(((np.array([row.probability for row in known]) - 0.5) * 2 * BINS).astype(int), BINS - 1)
    weighted_gaps = []
    for number in range(BINS):
        in_bin = [known[i] for i in np.nonzero(bin_of_row == number)[0]]
        if in_bin:
            confidence, accuracy = float(np.mean([row.probability for row in in_bin])), float(np.mean([row.right for row in in_bin]))
            weighted_gaps.append(len(in_bin) * abs(confidence - accuracy))
    return sum(weighted_gaps) / len(known)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    made = parser(__doc__)
    made.add_argument("run", type=Path, nargs="?", default=Path("runs/quickstart"))
    options = options_of(made, "benchmarks.calibrate", arguments)
    sets, all_shots = (2, SHOTS[:1]) if options.small else (SETS, SHOTS)
    torch.set_num_threads(THREADS)
    engine = Engine(load_base(BaseRef("pocket", device="cpu")), 10**9)
    engine.load_adapter("adapter", options.run)
    test = frozenset(pool_class.name for pool_class in read_pocket("held_out", min_pictures=3).classes[1::2])
    table: list[tuple[str, ...]] = []
    ratios: dict[str, float] = {}
    for shots in all_shots:
        rng = np.random.default_rng(shots)
        rows = [row for _ in range(sets) for row in one_set(engine, rng, shots, test)]
        known, unknown = [row for row in rows if row.known], [row for row in rows if not row.known]
        truth = [row.known for row in rows]
        figures = {
            "right": float(np.mean([row.right for row in known])),
            "ECE": ece(rows),
            "wrongly rejected": float(np.mean([row.rejected for row in known])),
            "strangers rejected": float(np.mean([row.rejected for row in unknown])),
            "AUC, tower": float(roc_auc_score(truth, [row.familiarity for row in rows])),
            "AUC, likelihood": float(roc_auc_score(truth, [row.log_likelihood for row in rows])),
        }
        table.append((f"{shots} shots", *(f"{value:.3f}" for value in figures.values())))
        ratios |= {f"{shots} shots: {name}": value for name, value in figures.items()}
    spans = {
        f"{word} {name}": choose(ratios[f"{shots} shots: {name}"] for shots in all_shots)
        for name in figures
        for word, choose in (("smallest", min), ("largest", max))
    }
    return finish(options, "calibrate", ("set", *figures), table, ratios, spans)


if __name__ == "__main__":
    main()
