"""Sixteen photos a class for the price of two: 2-way 16-shot with pooled supports against 2-way 2-shot with whole pictures.

    python -m benchmarks.long [--small] [--store] [--rounds 3]

Both sides train the same random LLaVA of about 150 M parameters with 576 tokens an image, LoRA of rank 16, fp32, one question
a row, short wording. Short: 2 photos of each class, 576 tokens each. Long: 16 photos of each class, 64 tokens each
(`image_tokens.support`); the photo that is asked about has 576 on both sides. The frozen tower's features of all pictures are
cached before, as after the first pass of a run. Each ratio is the median of several rounds.

Memory is the peak of a process of its own for each side. Time is measured in one process in which the sides take turns, a step
each, at a learning rate of 0. It is the processor time of one thread. Three runs with a process for each side, in two threads on
a machine that others used too, gave 1.16, 1.20 and 1.36 for the time, and differed by more than is measured.

The last two figures are forecasts of `lcl-adapter plan` for the same two rows on LLaVA-1.5-7B's config in nf4, with the adapter and
the checkpointing of recipes/mix.yaml, on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.common import THREADS, child, finish, options_of, parser, random_model, random_wide_model, write_config
from benchmarks.plan import SIZES
from benchmarks.train import ROUNDS, Layout, peak
from lcl_adapter.base.encoder import IGNORED
from lcl_adapter.base.model import attach, load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.memory.plan import Plan
from lcl_adapter.recipe import Recipe
from lcl_adapter.training.collate import Collator
from lcl_adapter.training.trainer import LclTrainer

CLASSES = ("red", "blue")
PHOTOS = 17  # of each class: 16 that are shown and one that is asked about
STEPS = 3


@dataclass(frozen=True)
class Side:
    """shots: of each class. support: tokens of a photo that is shown, of 576 and of the 4 of ``--small``; None for all."""

    shots: int
    support: int | None = None
    small_support: int | None = None


SIDES = {"short": Side(2), "long": Side(16, 64, 1)}


def write_photos(folder: Path, side: int) -> Path:
    """Noise, in a folder for each class. Returns the folder."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(PHOTOS):
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / name / f"{number}.png")
    return folder


def recipe_of(base: Path, side: Side, folder: Path, small: bool, steps: int, **changes: Any) -> Recipe:
    """A row is one episode with one question."""
    return Recipe.model_validate(
        {
            "base": str(base),
            "output": str(folder / "run"),
            "image_tokens": {"support": side.small_support if small else side.support},
            "sources": {"lcl": {"type": "class-folder", "path": str(folder / "photos"), "shots": [side.shots]}},
            "train": {"max_steps": steps, "bucket": 1, "logging_steps": 1, "save_steps": 10_000, "threads": THREADS},
            **changes,
        }
    )


def trained(side: Side, small: bool) -> dict[str, float]:
    """Peaks in bytes, the tokens and pictures of a row, and the learned tokens of all."""
    steps = 2 if small else STEPS
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_photos(folder / "photos", 28 if small else 336)
        settings = recipe_of(random_model(small=True) if small else random_wide_model(), side, folder, small, steps)
        base = attach(load_base(BaseRef.of(settings)), settings.adapter)
        loaded = peak()
        vision, collator = VisionFeatures(base), Collator(Mixture(settings), base.encoder())
        rows = [collator.row(index) for index in range(steps)]
        for picture in dict.fromkeys(picture for row in rows for picture in row.pictures):
            vision.tower_features([picture])
        trainer = LclTrainer(base, settings, collator, vision, steps)
        trainer.train()
        largest = peak()
    return {
        "peak": largest,
        "above_model": largest - loaded,
        "tokens": max(map(len, rows)),
        "pictures": len(rows[0].pictures),
        "learned": sum(label != IGNORED for row in rows for label in row.labels),
    }


def times(small: bool, rounds: int) -> dict[str, list[float]]:
    """Seconds a question of each round, by side. The sides take turns on the same model."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_photos(folder / "photos", 28 if small else 336)
        model = random_model(small=True) if small else random_wide_model()
        settings = {name: recipe_of(model, side, folder, small, 1 + rounds) for name, side in SIDES.items()}
        base = attach(load_base(BaseRef.of(settings["short"])), settings["short"].adapter)
        base.model.train()
        vision = VisionFeatures(base)
        sides = {
            name: Layout(base.with_supports(recipe.image_tokens.most, "ordered"), recipe, vision, Mixture(recipe))
            for name, recipe in settings.items()
        }
        for side in sides.values():
            side.begin()
            for index in range(1 + rounds):
                vision.tower_features(side.collator.row(index).pictures)
        for number in range(1 + rounds):
            for name, side in sides.items():
                before = side.seconds
                side.step()
                if number:  # the first is a warm-up
                    seconds[name].append(side.seconds - before)
    torch.set_num_threads(THREADS)
    return seconds


def forecast(side: Side) -> float:
    """GB that training takes with LLaVA-1.5-7B's config in nf4."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_photos(folder / "photos", 28)
        base = write_config(folder / "base", SIZES["7B"], torch.float16)
        adapter = {"rank": 64, "alpha": 128, "dropout": 0.05}
        train = {"max_steps": 100, "gradient_checkpointing": True}
        settings = recipe_of(base, side, folder, False, 1, precision="nf4", adapter=adapter, train=train)
        return Plan(settings, "cuda", Mixture(settings), 16 * 10**9).training().total / 1e9


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=ROUNDS, help="how often each side runs [default: %(default)s]")
    made.add_argument("--side", choices=(*SIDES, "times"), help=argparse.SUPPRESS)  # a child process
    options = options_of(made, "benchmarks.long", arguments)
    torch.set_num_threads(THREADS)
    if options.side:
        here: dict[str, Any] = times(options.small, options.rounds) if options.side == "times" else trained(SIDES[options.side], options.small)
        print(json.dumps(here))
        return here
    Path("build").mkdir(exist_ok=True)
    random_model(small=True) if options.small else random_wide_model()
    small = ["--small"] if options.small else []
    rounds = [{name: child("benchmarks.long", "--side", name, *small) for name in SIDES} for _ in range(1 if options.small else options.rounds)]
    seconds = child("benchmarks.long", "--side", "times", "--rounds", str(options.rounds), *small)
    ratios = {"time_a_question": statistics.median(a / b for a, b in zip(seconds["long"], seconds["short"], strict=True))}
    ratios |= {
        name: statistics.median(one["long"][figure] / one["short"][figure] for one in rounds)
        for name, figure in (("peak_memory", "peak"), ("memory_above_model", "above_model"))
    }
    sides = rounds[0]
    figures: dict[str, float] = {f"{name}_{figure}": sides[name][figure] for name in SIDES for figure in ("tokens", "pictures", "learned")}
    figures |= {f"7B_nf4_{name}_GB": forecast(side) for name, side in SIDES.items()}
    rows = [
        ("tokens of a row", *(f"{sides[name]['tokens']}" for name in ("long", "short")), ""),
        ("pictures of a row", *(f"{sides[name]['pictures']}" for name in ("long", "short")), ""),
        ("time a question", "", "", f"{ratios['time_a_question']:.2f}"),
        ("peak memory", "", "", f"{ratios['peak_memory']:.2f}"),
        ("memory above the loaded model", "", "", f"{ratios['memory_above_model']:.2f}"),
        ("forecast, LLaVA-1.5-7B in nf4", *(f"{figures[f'7B_nf4_{name}_GB']:.1f} GB" for name in ("long", "short")), ""),
    ]
    return finish(options, "long", ("2-way", "16-shot, 64 tokens", "2-shot, 576 tokens", "ratio"), rows, ratios, figures)


if __name__ == "__main__":
    main()
