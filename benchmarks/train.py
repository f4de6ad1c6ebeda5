"""This project's trainer against the stock SFTTrainer with the stock collator, on the same episodes.

    python -m benchmarks.train [--small] [--store]             # all three
    python -m benchmarks.train pocket [--small] [--store]      # only this model; stored as train-pocket

Each side runs in a process of its own. An episode is 2-way 2-shot with 4 queries. Stock: every query is a row with the
whole support set before it, and all images run through the tower every time. Ours: the 4 queries share one support set,
the frozen tower's features are cached, and only supervised positions reach the head. Both: LoRA of rank 16, fp32, no
gradient checkpointing, the same learned tokens per step. Time is measured over the steps after the first. Memory is the
peak of the whole process, and the part of it above the loaded model. Both sides run several rounds in turn; each figure
is the median of the rounds' ratios, because one round's speed varies by 15 % (docs/lab.md).

``mixture`` has the sources of recipes/mix-pocket.yaml, on the pocket base. There ours packs whole rows into longer ones
(`train.tokens_per_batch`). Stock has each question as a row, so many a step as ours has on average. A process of its own
compares packed rows with rows as they are, in the schedule's order and sorted by length (`bucket`, today's default): the same
conversations in turn, each a whole step at a learning rate of 0, so the losses must be the same. The features are cached
before, as after the first passes of a run. Its time is the processor time of one thread, because both sides share a process.
On ``mixture`` stock and ours are measured in processor time too, so that other programs count less.
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
from lcl_adapter.base.encoder import IGNORED
from lcl_adapter.base.model import Base, attach, load_base
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.conversations import Conversation, to_conversation, wording_of
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import read_image
from lcl_adapter.recipe import Recipe, load
from lcl_adapter.training.collate import BucketedOrder, Collator
from lcl_adapter.training.trainer import LclTrainer

QUERIES = 4
MIXTURE = "mixture"
SIZES = {"random-150m": (1, 5), "pocket": (24, 15), MIXTURE: (24, 3)}  # (conversations per step, steps); the pocket recipes too have 24
SMALL = (1, 2)
SMALL_MIXTURE = (4, 2)
ROUNDS = 3
TOKENS = 512  # of a packed row
SORTED = 8  # batches that are sorted together: the default of `train.bucket`
LAYOUTS = {"as_they_are": (1, None), "packed": (1, TOKENS), "sorted": (SORTED, None), "sorted_packed": (SORTED, TOKENS)}  # (bucket, tokens_per_batch)


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


class ProcessorClock(Clock):
    """The processor time at each step's end, of all threads."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append(time.process_time())


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


def mixture_recipe(base: str, rows: int, steps: int, output: str, bucket: int, tokens: int | None) -> Recipe:
    """The sources of recipes/mix-pocket.yaml, and its rows a step."""
    return load("recipes/mix-pocket.yaml", [
        f"base={base}", f"output={output}/run", f"train.max_steps={steps}", f"train.per_device_train_batch_size={rows}", f"train.bucket={bucket}",
        f"train.tokens_per_batch={json.dumps(tokens)}", "train.logging_steps=1", "train.warmup_steps=0", "train.save_steps=10000",
        f"train.threads={THREADS}",
    ])  # fmt: skip


def recipe_of(name: str, small: bool, output: str) -> Recipe:
    rows, steps = sizes_of(name, small)
    return mixture_recipe("pocket", rows, steps, output, *LAYOUTS["packed"]) if name == MIXTURE else recipe(base_of(name, small), rows, steps, output)


def sizes_of(name: str, small: bool) -> tuple[int, int]:
    return SIZES[name] if not small else SMALL_MIXTURE if name == MIXTURE else SMALL


def clock_of(name: str) -> Clock:
    return ProcessorClock() if name == MIXTURE else Clock()


def peak() -> int:
    """Largest resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(trainer: Any, loaded: int, queries: int, clock: Clock) -> dict[str, float]:
    """Queries per second of the clock after the first step, peak memory, and the loss of the first step."""
    trainer.add_callback(clock)
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return {"queries_a_second": queries / clock.seconds, "peak": peak(), "above_model": peak() - loaded, "first_loss": loss}


def ours(name: str, small: bool) -> dict[str, float]:
    rows, steps = sizes_of(name, small)
    with tempfile.TemporaryDirectory() as folder:
        settings = recipe_of(name, small, folder)
        base = attach(load_base(settings.base), settings.adapter)
        loaded = peak()
        collator = Collator(Mixture(settings), base.encoder())
        trainer = LclTrainer(base, settings, collator, VisionFeatures(base), rows * steps)
        return measured(trainer, loaded, sum(questions_of(collator.mixture, range(rows, rows * steps))), clock_of(name))


def questions_of(mixture: Mixture, indices: Sequence[int]) -> list[int]:
    """How many questions each row has."""
    return [len(to_conversation(mixture.draw(index), wording_of(mixture.recipe)).branches) for index in indices]


class Layout:
    """Steps of one layout of a mixture's rows. They change no weight, so that all layouts can be compared on the same model."""

    def __init__(self, base: Base, settings: Recipe, vision: VisionFeatures, mixture: Mixture) -> None:
        """mixture: of any layout; they read the same files."""
        self.base, self.settings, self.total = base, settings, mixture.total
        self.collator = Collator(Mixture(settings, mixture.pools), base.encoder())
        self.trainer = LclTrainer(base, settings, self.collator, vision, self.total)
        self.optimizer = torch.optim.AdamW([p for p in base.model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)

    def begin(self) -> None:
        """From the schedule's first row on, with all counts at 0."""
        train = self.settings.train
        self.order = iter(BucketedOrder(self.collator, self.total, train.per_device_train_batch_size, train.bucket, train.seed))
        self.seconds = self.loss = 0.0
        self.tokens = self.cells = self.learned = 0

    def step(self) -> None:
        began = time.process_time()
        batch = self.collator([{"index": index} for index in itertools.islice(self.order, self.settings.train.per_device_train_batch_size)])
        loss = self.trainer.compute_loss(self.base.model, batch, num_items_in_batch=1)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds += time.process_time() - began
        self.loss += loss.item()
        self.tokens += sum(tokens for _, tokens, _ in batch["counts"])
        self.cells += batch["labels"].numel()
        self.learned += int((batch["labels"][:, 1:] != IGNORED).sum())


def layouts(small: bool) -> dict[str, Any]:
    """Packed rows and rows as they are, in both orders, over the same conversations.

    Returns by layout: seconds of each round, the loss of a learned token, the learned tokens, and the share of padding.
    """
    rows, steps = SMALL_MIXTURE if small else (SIZES[MIXTURE][0], SORTED)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = {name: mixture_recipe("pocket", rows, steps, folder, *layout) for name, layout in LAYOUTS.items()}
        base = attach(load_base("pocket"), settings["packed"].adapter)
        base.model.train()
        vision = VisionFeatures(base)
        mixture = Mixture(settings["packed"])
        for index in range(mixture.total):
            if pictures := to_conversation(mixture.draw(index), wording_of(mixture.recipe)).pictures:
                vision.tower_features(pictures)
        sides = {name: Layout(base, recipe, vision, mixture) for name, recipe in settings.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(1 if small else ROUNDS):
            for side in sides.values():
                side.begin()
            for step in range(steps):
                for number in range(len(sides)):  # none is always first
                    list(sides.values())[(step + number) % len(sides)].step()
            for name, side in sides.items():
                seconds[name].append(side.seconds)
    torch.set_num_threads(THREADS)
    return {
        name: {"seconds": seconds[name], "loss": side.loss / side.learned, "learned": side.learned, "padding": 1 - side.tokens / side.cells}
        for name, side in sides.items()
    }


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


def stock_trainer(base: Base, settings: Recipe, processor: Any = None) -> Any:
    """TRL's trainer on a recipe's rows, a row for each of a row's questions. A step has as many as ours has on average."""
    from transformers import AutoProcessor
    from trl import SFTConfig, SFTTrainer

    from datasets import Dataset

    mixture, train = Mixture(settings), settings.train
    gpu = torch.cuda.is_available()

    asked = [(row, branch) for row, count in enumerate(questions_of(mixture, range(mixture.total))) for branch in range(count)]
    wording = wording_of(settings)

    def rows(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        stock_rows = [stock_row(to_conversation(mixture.draw(row), wording), branch) for row, branch in (asked[i] for i in batch["index"])]
        return {key: [row[key] for row in stock_rows] for key in stock_rows[0]}

    config = SFTConfig(
        output_dir=str(settings.output),
        max_steps=train.max_steps,
        per_device_train_batch_size=len(asked) // mixture.steps,
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
    data = Dataset.from_dict({"index": range(len(asked))}).with_transform(Unhashed(rows))
    return SFTTrainer(model=base.model, args=config, train_dataset=data, processing_class=processor or AutoProcessor.from_pretrained(base.path))


def stock(name: str, small: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        settings = recipe_of(name, small, folder)
        base = attach(load_base(settings.base), settings.adapter)
        loaded = peak()
        trainer = stock_trainer(base, settings)
        return measured(trainer, loaded, trainer.args.per_device_train_batch_size * (trainer.args.max_steps - 1), clock_of(name))


def base_of(name: str, small: bool) -> str:
    return "pocket" if name == "pocket" else str(random_model(small))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    made = parser(__doc__)
    made.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(SIZES)} [default: all]")
    made.add_argument("--rounds", type=int, default=ROUNDS, help="how often each side runs [default: %(default)s]")
    made.add_argument("--side", choices=("ours", "stock", "layouts"), help=argparse.SUPPRESS)  # a child process: one side on one model
    options = options_of(made, "benchmarks.train", arguments)
    names = options.models or list(SIZES)
    if unknown := set(names) - set(SIZES):
        made.error(f"no model {', '.join(sorted(unknown))}; there are {', '.join(SIZES)}")
    torch.set_num_threads(THREADS)
    if options.side:
        measured_here = layouts(options.small) if options.side == "layouts" else {"ours": ours, "stock": stock}[options.side](names[0], options.small)
        print(json.dumps(measured_here))
        return measured_here
    Path("build").mkdir(exist_ok=True)
    random_model(options.small)
    small = ["--small"] if options.small else []
    rows: list[tuple[str, ...]] = []
    ratios: dict[str, float] = {}
    figures: dict[str, Any] = {}
    for name in names:
        pairs = [
            {side: child("benchmarks.train", name, "--side", side, *small) for side in ("stock", "ours")}
            for _ in range(1 if options.small else options.rounds)
        ]
        speed, memory, above = (
            statistics.median(pair["ours"][figure] / pair["stock"][figure] for pair in pairs)
            for figure in ("queries_a_second", "peak", "above_model")
        )
        key = name.replace("-", "_")
        ratios |= {f"{key}_queries_a_second": speed, f"{key}_peak_memory": memory}
        if name == MIXTURE:  # a step of stock has other questions, and opening the sources takes more memory than a step of ours
            rows.append((name, f"{speed:.2f}", f"{memory:.2f}", ""))
        else:
            ratios[f"{key}_memory_above_model"] = above
            figures |= {f"{key}_first_loss_{side}": pairs[0][side]["first_loss"] for side in pairs[0]}
            rows.append((name, f"{speed:.2f}", f"{memory:.2f}", f"{above:.2f}"))
    if MIXTURE in names:
        sides = child("benchmarks.train", MIXTURE, "--side", "layouts", *small)
        for one, other in (("packed", "as_they_are"), ("sorted_packed", "sorted"), ("packed", "sorted")):
            pairs_of_rounds = zip(sides[one]["seconds"], sides[other]["seconds"], strict=True)
            ratios[f"{one}_to_{other}"] = statistics.median(theirs / own for own, theirs in pairs_of_rounds)
            padding = " / ".join(f"{sides[side]['padding']:.1%} padding" for side in (one, other))
            rows.append((f"mixture: {one} / {other}".replace("_", " "), f"{ratios[f'{one}_to_{other}']:.2f}", padding, ""))
        figures |= {f"{name}_{figure}": side[figure] for name, side in sides.items() for figure in ("loss", "learned", "padding")}
    name = "train" if names == list(SIZES) else "-".join(["train", *names])
    return finish(options, name, ("ours / stock", "queries a second", "peak memory", "above the loaded model"), rows, ratios, figures)


if __name__ == "__main__":
    main()
