"""Forecast against measured peak memory.

    python -m benchmarks.plan [--small] [--store]    # resident memory on a CPU, torch.cuda.max_memory_allocated on a GPU

Each configuration is trained for two steps in a process of its own. The forecast is made from its config alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import THREADS, Peak, Size, child, finish, options_of, parser, random_llava
from lcl_adapter import devices
from lcl_adapter.base.model import attach, load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.memory import budget, plan
from lcl_adapter.recipe import Recipe, load
from lcl_adapter.recipe.schema import AdapterOptions, TrainOptions
from lcl_adapter.training.collate import Collator
from lcl_adapter.training.trainer import LclTrainer

FOLDER = Path("build/plan")
SIZES = {
    "tiny": Size(64, 176, 2, 2, pixels=28),  # of --small
    "60M": Size(512, 1408, 8, 8),
    "150M": Size(896, 2432, 10, 14),
    "330M": Size(1280, 3456, 14, 20),
    "7B": Size(4096, 11008, 32, 32, pixels=336),  # LLaVA-1.5's
}


@dataclass(frozen=True)
class Case:
    size: str
    precision: str = "fp32"
    shots: int = 1
    rows: int = 1
    queries: int = 1
    checkpointing: bool = False
    dropout: float = 0.0
    projector: bool = False
    rank: int = 16

    @property
    def name(self) -> str:
        text = f"{self.size} {self.precision} {self.shots} shot(s) x {self.rows} row(s), rank {self.rank}"
        return (
            text
            + (", checkpointing" if self.checkpointing else "")
            + (", dropout" if self.dropout else "")
            + (", projector" if self.projector else "")
        )


CASES = {
    "tiny": Case("tiny"),
    "a": Case("60M", shots=2, rows=4, queries=2),
    "b": Case("150M", shots=2, rows=2),
    "c": Case("150M", shots=2, rows=2, checkpointing=True),
    "d": Case("150M", "bf16", shots=2, rows=1),
    "e": Case("150M", "nf4", shots=4, rows=1),
    "f": Case("330M", shots=1),
    "g": Case("330M", shots=4, checkpointing=True),
    "h": Case("330M", "nf4", shots=2, rank=64),
    "i": Case("330M", "bf16", shots=2, checkpointing=True),
    "j": Case("150M", shots=2, rows=2, dropout=0.05, projector=True),
    "7b": Case("7B", "nf4", shots=2, rank=64, checkpointing=True, dropout=0.05),  # only on a GPU
}


def model_of(size: str) -> Path:
    """The folder of a random LLaVA in fp16."""
    return random_llava(FOLDER / size, SIZES[size], torch.float16)


def recipe_of(case: Case, output: str, base: Path | None = None) -> Recipe:
    """base: the folder of the case's model, which is written where it is not given."""
    path = Path(output) / "recipe.yaml"
    path.write_text(
        json.dumps(
            {
                "base": str(base or model_of(case.size)), "precision": case.precision, "output": str(Path(output) / "run"),
                "adapter": {"rank": case.rank, "alpha": 32, "dropout": case.dropout, "projector": case.projector},
                "sources": {"lcl": {"type": "pocket", "shots": [case.shots], "queries": case.queries}},
                "train": {"max_steps": 2, "per_device_train_batch_size": case.rows, "gradient_checkpointing": case.checkpointing,
                          "logging_steps": 1, "threads": THREADS},
            }
        )
    )  # fmt: skip
    return load(str(path))


def forecast(case: Case, device: str) -> budget.Forecast:
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(case, folder)
        return plan.Plan(recipe, device, Mixture(recipe), 10**12).training()


def measure(name: str) -> dict[str, float]:
    """Train two steps. Returns the peak memory after the imports, after loading and at the end."""
    case = CASES[name]
    whole = Peak()
    started = whole.total
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(case, folder)
        base = attach(load_base(BaseRef(recipe.base, recipe.precision)), recipe.adapter)
        loaded = whole.total
        collator = Collator(Mixture(recipe), base.encoder())
        trainer = LclTrainer(base, recipe, collator, VisionFeatures(base), 2 * case.rows)
        trainer.train()
    return {"started": started, "loaded": loaded, "peak": whole.total}


def measured_here(name: str) -> dict[str, float]:
    """Forecast and peak of one training in this process: allocations on a GPU, resident memory on a CPU."""
    case = CASES[name]
    model_of(case.size)
    device = devices.training_device()
    total = forecast(case, device).total
    measured = measure(name)["peak"]
    return {"forecast": total, "peak": measured, "error": total / measured - 1}


def default_cases(small: bool, gpu: bool) -> list[str]:
    return ["tiny"] if small else [name for name in CASES if name != "tiny" and (gpu or name != "7b")]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    made = parser(__doc__)
    made.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)} [default: all that this machine can run]")
    made.add_argument("--child", choices=("make", "measure"), help=argparse.SUPPRESS)
    options = options_of(made, "benchmarks.plan", arguments)
    if unknown := set(options.cases) - set(CASES):
        made.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if options.child == "make":
        model_of(CASES[options.cases[0]].size)
        print("{}")
        return {}
    if options.child:
        peaks = measure(options.cases[0])
        print(json.dumps(peaks))
        return peaks
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    rows: list[tuple[str, ...]] = []
    ratios: dict[str, float] = {}
    for name in options.cases or default_cases(options.small, gpu):
        case = CASES[name]
        child("benchmarks.plan", name, "--child", "make")
        total = forecast(case, device).total
        peaks = child("benchmarks.plan", name, "--child", "measure")
        measured = peaks["peak"]
        ratios[case.name] = total / measured
        rows.append((case.name, f"{total / 1e9:.2f} GB", f"{measured / 1e9:.2f} GB", f"{total / measured - 1:+.1%}"))
    figures = {"smallest": min(ratios.values()), "largest": max(ratios.values())}
    if not gpu:
        case = CASES["7b"]
        adapter, train = AdapterOptions(rank=case.rank, alpha=32, dropout=case.dropout), TrainOptions(gradient_checkpointing=True)
        total = budget.training(budget.shape_of(SIZES[case.size].config()), "nf4", "cuda", adapter, train, budget.Work(1, 3120, 20, 5)).total
        figures["forecast of 7B in GB"] = total / 1e9
        rows.append((f"LLaVA-1.5-7B's shape, nf4, 2-way 2-shot, rank {case.rank}, on a GPU", f"{total / 1e9:.1f} GB", "not run", ""))
    title = f"plan ({torch.cuda.get_device_name() if gpu else 'CPU, resident memory'})"
    return finish(options, "plan", ("training", "forecast", "measured peak", "error"), rows, ratios, figures, title)


if __name__ == "__main__":
    main()
