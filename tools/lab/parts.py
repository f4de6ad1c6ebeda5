"""Whether a support set is better asked as a whole, in parts of fewer shots, or in several orders, for an entry in docs/lab.md.

    python -m tools.lab.parts runs/quickstart --suite lcl --parts 4 --parts 2 --orders 3 evaluate.suites.lcl.shots=[4,8,16]

The suite's questions are those of `lcl-adapter eval`; overrides of the run's recipe say which. Each part has at most so many
photos of each label. Of parts and orders, each label's score is the mean of its log-likelihoods (lcl_adapter/answering/chunks.py).
A row for each cell: the share of right questions, of the nearest prototype too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import click
import numpy as np

from lcl_adapter.answering.chunks import divided
from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.adapter import load_adapter
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.data.conversations import Turn
from lcl_adapter.evaluate.baselines import nearest_prototype
from lcl_adapter.evaluate.cases import Case
from lcl_adapter.evaluate.suites import build_cells
from lcl_adapter.packaged import adapter_folder
from lcl_adapter.recipe import load

Support = tuple[Turn, ...]


def in_parts(support: Support, shots: int) -> list[Support]:
    """Parts with at most ``shots`` photos of each label."""
    most = max(Counter(answer.text for answer in support[1::2]).values(), default=1)
    return divided(support, math.ceil(most / shots)) if most > shots else [support]


def in_orders(support: Support, count: int) -> list[Support]:
    """The set as it is, and in further orders."""
    orders = [support]
    for number in range(1, count):
        places = np.random.default_rng(number).permutation(len(support) // 2)
        turns = [turn for place in places for turn in support[2 * place : 2 * place + 2]]
        orders.append((replace(turns[0], text=support[0].text), *(_later(turn, support) for turn in turns[1:])))
    return orders


def _later(turn: Turn, support: Support) -> Turn:
    """A photo behind the first one has the text of those."""
    return replace(turn, text=support[2].text) if turn.role == "user" and len(support) > 2 else turn


def share_right(predictor: Predictor, cases: Sequence[Case], sets_of: Callable[[Support], list[Support]]) -> float:
    """Right answers by the label scores' mean over a question's sets."""
    sets = [sets_of(case.support) for case in cases]
    replies = iter(predictor.run([(one, case.query, case.answers) for case, own in zip(cases, sets, strict=True) for one in own], generate=False))
    right = []
    for case, own in zip(cases, sets, strict=True):
        scores = np.mean([next(replies).log_likelihoods for _ in own], 0)
        right.append(case.labels[int(scores.argmax())] == case.gold)
    return float(np.mean(right))


@click.command(help=__doc__)
@click.argument("run")
@click.argument("overrides", nargs=-1)
@click.option("--suite", default="lcl", help="a suite of the run's recipe, asked about labelled photos")
@click.option("--parts", multiple=True, type=int, help="photos of each label in a part")
@click.option("--orders", multiple=True, type=int, help="orders, whose scores are averaged")
@click.option("--limit", type=int, help="only so many questions of each cell")
def main(run: str, overrides: tuple[str, ...], suite: str, parts: tuple[int, ...], orders: tuple[int, ...], limit: int | None) -> None:
    folder = adapter_folder(run)
    recipe = load(folder / "recipe.yaml", overrides, resolved=True)
    base, _ = load_adapter(folder, BaseRef(device="cpu"))
    predictor = Predictor(base, batch_size=recipe.evaluate.batch_size)
    ways: dict[str, Callable[[Support], list[Support]]] = {"whole": lambda support: [support]}
    ways |= {f"parts of {shots}": partial(in_parts, shots=shots) for shots in parts}
    ways |= {f"{count} orders": partial(in_orders, count=count) for count in orders}
    print("| cell | n | prototype | " + " | ".join(ways) + " |\n" + "|---" * (3 + len(ways)) + "|")
    for cell in build_cells(recipe, limit, (suite,)):
        if not cell.control:
            prototype = np.mean([bool(right) for right in nearest_prototype(cell.cases, predictor.vision)])
            values = [share_right(predictor, cell.cases, sets_of) for sets_of in ways.values()]
            print(f"| {cell.name} | {len(cell.cases)} | {prototype:.3f} | " + " | ".join(f"{value:.3f}" for value in values) + " |", flush=True)


if __name__ == "__main__":
    main()
