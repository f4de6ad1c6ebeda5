"""This project's trainer against the stock SFTTrainer with the stock collator, on the same episodes.

    python -m benchmarks.train [--small] [--store]             # both models
    python -m benchmarks.train pocket [--small] [--store]      # only this model; stored as train-pocket

Each side runs in a process of its own. An episode is 2-way 2-shot with 4 queries. Stock: every query is a row with the
whole support set before it, and all images run through the tower every time. Ours: the 4 queries share one support set,
the frozen tower's features are cached, and only supervised positions reach the head. Both: LoRA of rank 16, fp32, no
gradient checkpointing, the same learned tokens per step. Time is measured over the steps after the first. Memory is the
peak of the whole process, and the part of it above the loaded model. Both sides run several rounds in turn; each figure
is the median of the rounds' ratios, because one round's speed varies by 15 % (docs/lab.md).
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.common import THREADS, child, finish, options_of, parser, random_model
from lcl_adapter.base.model import Base, attach, load_base
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.conversations import WORDINGS, Conversation, to_conversation
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import read_image
from lcl_adapter.recipe import Recipe
from lcl_adapter.training.collate import Collator
from lcl_adapter.training.trainer import LclTrainer

QUERIES = 4
SIZES = {"random-150m": (1, 5), "pocket": (24, 15)}  # (episodes per step, steps); the pocket recipe too has 24
SMALL = (1, 2)
ROUNDS = 3


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """From the end of the first step to the end of the last."""
        return self.ends[-1] - self.ends[0]

    @property
    def median(self) -> float:
        """Of a step, without the first."""
        return statistics.median(after - before for before, after in itertools.pairwise(self.ends))


def recipe(base: str, episodes: int, steps: int, output: str) -> Recipe:
    return Recipe.model_validate(
        {
            "base": base,
            "output": output,
            "sources": {"lcl": {"type": "pocket", "shots": [2], "queries": QUERIES, "learn": "query"}},
            "train": {
                "max_steps": steps,
                "per_device_train_batch_size": episodes,
                "bucket": 1,
                "logging_steps": 1,
                "save_steps": 10_000,
                "threads": THREADS,
            },
        }
    )


def peak() -> int:
    """Largest resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(trainer: Any, loaded: int, queries: int) -> dict[str, float]:
    """Queries per second after the first step, peak memory, and the loss of the first step."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return {"queries_a_second": queries / clock.seconds, "peak": peak(), "above_model": peak() - loaded, "first_loss": loss}


def ours(name: str, small: bool) -> dict[str, float]:
    episodes, steps = SMALL if small else SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        settings = recipe(base_of(name, small), episodes, steps, folder)
        base = attach(load_base(settings.base), settings.adapter)
        loaded = peak()
        collator = Collator(Mixture(settings), base.encoder())
        trainer = LclTrainer(base, settings, collator, VisionFeatures(base), episodes * steps)
        return measured(trainer, loaded, episodes * QUERIES * (steps - 1))


def stock_row(conversation: Conversation, branch: int) -> dict[str, Any]:
    """Prompt, completion and images, in the format that TRL's documentation gives for vision models."""
    turns = [*conversation.shared, *conversation.branches[branch]]
    messages = [{"role": t.role, "content": ([{"type": "image"}] if t.picture else []) + [{"type": "text", "text": t.text}]} for t in turns]
    images = [read_image(t.picture) for t in turns if t.picture is not None]
    return {"prompt": messages[:-1], "completion": messages[-1:], "images": images}


class Unhashed:
    """A transform of ``datasets``, which hashes transforms by pickling them with everything that they reach: seconds for a mixture."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform

    def __call__(self, batch: Any) -> Any:
        return self.transform(batch)

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.transform.__qualname__,)


def stock_trainer(base: Base, settings: Recipe, queries: int, processor: Any = None) -> Any:
    """TRL's trainer on a recipe's episodes, a row for each of an episode's queries."""
    from transformers import AutoProcessor
    from trl import SFTConfig, SFTTrainer

    from datasets import Dataset

    mixture, train = Mixture(settings), settings.train
    gpu = torch.cuda.is_available()

    def rows(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        stock_rows = [stock_row(to_conversation(mixture.draw(i // queries), WORDINGS[settings.wording]), i % queries) for i in batch["index"]]
        return {key: [row[key] for row in stock_rows] for key in stock_rows[0]}

    config = SFTConfig(
        output_dir=str(settings.output),
        max_steps=train.max_steps,
        per_device_train_batch_size=train.per_device_train_batch_size * queries,
        learning_rate=train.learning_rate,
        max_length=None,
        gradient_checkpointing=train.gradient_checkpointing,
        remove_unused_columns=False,
        logging_steps=train.logging_steps,
        report_to="none",
        train_sampling_strategy="sequential",  # the same episodes in the same steps as ours
        disable_tqdm=True,
        use_cpu=not gpu,
        bf16=gpu,
        save_strategy="no",
    )
    data = Dataset.from_dict({"index": range(mixture.total * queries)}).with_transform(Unhashed(rows))
    return SFTTrainer(model=base.model, args=config, train_dataset=data, processing_class=processor or AutoProcessor.from_pretrained(base.path))


def stock(name: str, small: bool) -> dict[str, float]:
    episodes, steps = SMALL if small else SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        settings = recipe(base_of(name, small), episodes, steps, folder)
        base = attach(load_base(settings.base), settings.adapter)
        loaded = peak()
        return measured(stock_trainer(base, settings, QUERIES), loaded, episodes * QUERIES * (steps - 1))


def base_of(name: str, small: bool) -> str:
    return "pocket" if name == "pocket" else str(random_model(small))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    made = parser(__doc__)
    made.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(SIZES)} [default: both]")
    made.add_argument("--side", choices=("ours", "stock"), help=argparse.SUPPRESS)  # a child process: one side on one model
    options = options_of(made, "benchmarks.train", arguments)
    names = options.models or list(SIZES)
    if unknown := set(names) - set(SIZES):
        made.error(f"no model {', '.join(sorted(unknown))}; there are {', '.join(SIZES)}")
    torch.set_num_threads(THREADS)
    if options.side:
        figures = {"ours": ours, "stock": stock}[options.side](names[0], options.small)
        print(json.dumps(figures))
        return figures
    Path("build").mkdir(exist_ok=True)
    random_model(options.small)
    small = ["--small"] if options.small else []
    rows: list[tuple[str, ...]] = []
    ratios: dict[str, float] = {}
    figures = {}
    for name in names:
        pairs = [
            {side: child("benchmarks.train", name, "--side", side, *small) for side in ("stock", "ours")}
            for _ in range(1 if options.small else ROUNDS)
        ]
        speed, memory, above = (
            statistics.median(pair["ours"][figure] / pair["stock"][figure] for pair in pairs)
            for figure in ("queries_a_second", "peak", "above_model")
        )
        key = name.replace("-", "_")
        ratios |= {f"{key}_queries_a_second": speed, f"{key}_peak_memory": memory, f"{key}_memory_above_model": above}
        figures |= {f"{key}_first_loss_{side}": pairs[0][side]["first_loss"] for side in pairs[0]}
        rows.append((name, f"{speed:.2f}", f"{memory:.2f}", f"{above:.2f}"))
    name = "train" if names == list(SIZES) else "-".join(["train", *names])
    return finish(options, name, ("ours / stock", "queries a second", "peak memory", "above the loaded model"), rows, ratios, figures)


if __name__ == "__main__":
    main()
