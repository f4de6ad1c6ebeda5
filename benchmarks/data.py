"""Data: does the loader keep up with the trainer, and does a large file cost memory?

    python -m benchmarks.data [--small] [--store]    # 2 workers against the trainer's own pace; 1,000,000 lines against 10,000

Loader: the rows of ``recipes/mix-pocket.yaml``, with every picture opened as in training, against a short training on
the same rows. The trainer sorts the rows by length in its own process, which is part of its time. Large file: LLaVA
instruction records as JSON Lines. They are opened, and records are drawn at random, for each file in a process of its
own.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.common import THREADS, child, finish, options_of, parser
from lcl_adapter import recipe
from lcl_adapter.base.model import load_encoder
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import read_image, read_llava_json
from lcl_adapter.files import whole_file
from lcl_adapter.training import trainer
from lcl_adapter.training.collate import Collator

LARGE, SMALL, DRAWN = 1_000_000, 10_000, 20_000
FOLDER = Path("build/data")
STEPS, WORKERS = 30, 2
SMALL_SIZES = (2_000, 200, 100)  # instead of LARGE, SMALL and DRAWN


def records_file(lines: int) -> Path:
    """A file of instruction records of about 250 bytes each. It is written once."""
    path = FOLDER / f"{lines}.jsonl"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial, partial.open("w") as file:
        for number in range(lines):
            turns = [
                {"from": "human", "value": f"<image>\nWhat is wrong with part {number}?"},
                {"from": "gpt", "value": f"A scratch near edge {number % 97}."},
            ]
            file.write(json.dumps({"id": str(number), "image": f"parts/{number % 4096:04}.jpg", "conversations": turns}) + "\n")
    return path


def measure(path: Path, drawn: int) -> dict[str, float]:
    """Measure in this process.

    Returns seconds to open the file and for a plain pass of json.loads, and resident MiB before, after opening and
    after drawing.
    """

    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    before, began = resident(), time.perf_counter()
    pool = read_llava_json(path, Path("images"))
    opening, after = time.perf_counter() - began, resident()
    rng = np.random.default_rng(0)
    began = time.perf_counter()
    for index in rng.integers(0, len(pool), drawn):
        _ = pool.dialogues[int(index)]
    drawing, at_the_end = time.perf_counter() - began, resident()
    began = time.perf_counter()
    with path.open() as file:
        count = sum(1 for line in file if json.loads(line))
    assert count == len(pool)
    plain = time.perf_counter() - began
    return {"open": opening, "plain": plain, "drawn_a_second": drawn / drawing, "before": before, "after": after, "drawn": at_the_end}


def loader_pace(small: bool) -> dict[str, Any]:
    """Rows per second of the loader alone, and of a training on the same rows; and whether a worker makes the same rows
    as this process.
    """
    with tempfile.TemporaryDirectory() as folder:
        sizes = ["train.max_steps=2", "train.per_device_train_batch_size=2"] if small else [f"train.max_steps={STEPS}"]
        settings = recipe.load("pocket" if small else "mix-pocket", [*sizes, f"output={folder}/run", "train.threads=2"])
        mixture = Mixture(settings)
        collator = Collator(mixture, load_encoder(BaseRef.of(settings)), check=read_image)
        rows = [{"index": i} for i in range(mixture.total)]
        batch = settings.train.per_device_train_batch_size
        began = time.perf_counter()
        loaded = None
        for made in DataLoader(rows, batch, num_workers=WORKERS, collate_fn=collator):  # type: ignore[arg-type]
            loaded = made if loaded is None else loaded
        loading = mixture.total / (time.perf_counter() - began)
        here = collator(rows[:batch])
        same = loaded is not None and all(torch.equal(here[key], loaded[key]) for key in ("input_ids", "labels"))
        facts = trainer.train(settings)
        return {"loader": loading, "trainer": mixture.total / facts["training_seconds"], "same": same}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    made = parser(__doc__)
    made.add_argument("--open", type=Path, help=argparse.SUPPRESS)  # a child process: one file
    options = options_of(made, "benchmarks.data", arguments)
    lines, fewer, drawn = SMALL_SIZES if options.small else (LARGE, SMALL, DRAWN)
    if options.open:
        measured = measure(options.open, drawn)
        print(json.dumps(measured))
        return measured
    more = ["--small"] if options.small else []
    large, small = (child("benchmarks.data", "--open", str(records_file(count)), *more) for count in (lines, fewer))
    pace = loader_pace(options.small)
    grown, grown_small = large["drawn"] - large["before"], small["drawn"] - small["before"]
    size = records_file(lines).stat().st_size / 2**20
    ratios = {
        "loader_over_trainer": pace["loader"] / pace["trainer"],
        "open_over_plain_pass": large["open"] / large["plain"],
        "memory_over_file": grown / size,
        "draws_large_over_small": large["drawn_a_second"] / small["drawn_a_second"],
        "same_rows": float(pace["same"]),
    }
    figures = {
        "rows a second, loader": pace["loader"],
        "rows a second, trainer": pace["trainer"],
        "file MiB": size,
        "seconds to open": large["open"],
        "memory growth MiB": grown,
        "memory growth MiB, small file": grown_small,
    }
    rows = [
        (f"rows a second, loader with {WORKERS} workers / trainer on {THREADS} threads", f"{pace['loader']:.0f} / {pace['trainer']:.0f}"),
        (f"opening {lines:,} lines ({size:.0f} MiB), every one parsed and checked", f"{large['open']:.1f} s"),
        ("the same against a plain pass of json.loads", f"{ratios['open_over_plain_pass']:.2f}"),
        (f"memory grown after opening and {drawn:,} draws, {lines:,} lines / {fewer:,} lines", f"{grown:.1f} / {grown_small:.1f} MiB"),
        ("that memory against the file's size", f"{ratios['memory_over_file']:.3f}"),
        (f"records drawn a second, {lines:,} lines / {fewer:,} lines", f"{ratios['draws_large_over_small']:.2f}"),
        ("the first batch of a worker equals this process's", "yes" if pace["same"] else "NO"),
    ]
    return finish(options, "data", ("measure", "figure"), rows, ratios, figures)


if __name__ == "__main__":
    main()
