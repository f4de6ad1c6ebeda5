"""How often the nearest class mean is right, by how a tower's features are compared.

    python -m tools.lab.likeness photo-lcl
    python -m tools.lab.likeness runs/mix-pocket --shots 1 --shots 2 --pairs easy

Pairs of classes are drawn from every source of a suite of kind `lcl` or `product` in the adapter's recipe, validation suites
included: one query, and photos of both classes. Printed for each source and number of shots are the shares of right queries where
features are compared as they are, standardised, limited to a few deviations too, and less along what varies within a class too.

Shapes: N photos, C width of a patch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import click
import numpy as np
import torch
from torch.nn import functional

from lcl_adapter.answering.judgement import read_weighing
from lcl_adapter.base.adapter import load_adapter
from lcl_adapter.base.prototypes import class_means
from lcl_adapter.base.tower_space import LIMIT, TowerSpace
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.sources import ClassPool, open_reader
from lcl_adapter.packaged import adapter_folder
from lcl_adapter.recipe import Recipe, load
from lcl_adapter.recipe.suites import LclSuite, ProductSuite


def pools(recipe: Recipe) -> Iterator[tuple[str, ClassPool]]:
    """The classes of each source that suites are drawn from, once."""
    seen: list[object] = []
    for part, suites in (("validation", recipe.evaluate.validation), ("suites", recipe.evaluate.suites)):
        for name, options in suites.items():
            if isinstance(options, LclSuite | ProductSuite) and options.source not in seen:
                seen.append(options.source)
                yield f"{part}.{name}", open_reader(name, options.source)


def pairs(pool: ClassPool, shots: int, count: int, hard: bool, rng: np.random.Generator) -> list[tuple[list[int], list[int], int]]:
    """Photos of a class, photos of another, and a query of the first, as places in the pool's list of photos. Hard: of one group."""
    starts = np.cumsum([0, *(len(one.pictures) for one in pool.classes)])
    enough = [index for index, one in enumerate(pool.classes) if len(one.pictures) > shots]
    groups = {index: pool.classes[index].groups[:1] if hard else () for index in enough}
    others = {index: [other for other in enough if other != index and groups[other] == groups[index]] for index in enough}
    first_ones = [index for index in enough if others[index]]
    drawn: list[tuple[list[int], list[int], int]] = []
    for _ in range(count if first_ones else 0):
        first = rng.choice(first_ones)
        own, other = ((starts[index] + rng.permutation(len(pool.classes[index].pictures))).tolist() for index in (first, rng.choice(others[first])))
        drawn.append((own[:shots], other[:shots], own[shots]))
    return drawn


def right(vectors_NC: torch.Tensor, drawn: Sequence[tuple[list[int], list[int], int]]) -> float:
    """The share of queries that are more like the photos of their own class."""
    shots = len(drawn[0][0])
    owners = [0] * shots + [1] * shots
    nearest = [(class_means(vectors_NC[own + other], owners) @ vectors_NC[query]).tolist() for own, other, query in drawn]
    return sum(own > other for own, other in nearest) / len(drawn)


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.argument("adapter")
@click.option("--shots", multiple=True, type=click.IntRange(1), default=(1, 2, 4), show_default=True)
@click.option("--pairs", "kind", type=click.Choice(["easy", "hard"]), default="hard", show_default=True)
@click.option("--count", type=click.IntRange(1), default=4000, show_default=True, help="Pairs of each line.")
def main(adapter: str, shots: tuple[int, ...], kind: Literal["easy", "hard"], count: int) -> None:
    folder = adapter_folder(adapter)
    recipe = load(folder / "recipe.yaml", resolved=True)
    base, manifest = load_adapter(folder)
    weighed = read_weighing(folder, manifest)
    if weighed is None:
        raise click.UsageError(f"{adapter}: no weights were fitted, so its tower has no statistics; run `lcl-adapter eval {adapter}`")
    space, vision = weighed[1], VisionFeatures(base)
    plain = TowerSpace(space.statistics)
    click.echo(f"{'':<28} {'n':>5}  as they are  standardised  limited  less within classes")
    for name, pool in pools(recipe):
        features_NC = vision.mean_patches([picture for one in pool.classes for picture in one.pictures])
        compared = [
            functional.normalize(features_NC, dim=1),
            *(own.vectors(features_NC) for own in (plain, replace(plain, limit=LIMIT), space)),
        ]
        for number in shots:
            drawn = pairs(pool, number, count, kind == "hard", np.random.default_rng(0))
            if drawn:
                shares = "".join(f"{right(vectors_NC, drawn):>13.3f}" for vectors_NC in compared)
                click.echo(f"{f'{name}, {number}-shot':<28} {len(drawn):>5}{shares}")


if __name__ == "__main__":
    main()
