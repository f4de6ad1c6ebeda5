"""Merging shard by shard against PEFT's `merge_and_unload` and `save_pretrained`: peak memory, time, equal weights.

    python -m benchmarks.merge [--small] [--store]    # a random LLaVA of 1.1 B parameters in 5 shards

Each side runs in a process of its own. The two sides alternate four times, each time in the other order. Times are
medians, memory is the largest peak.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from benchmarks.common import Size, child, finish, options_of, parser, random_llava
from lcl_adapter.base.adapter import save_adapter
from lcl_adapter.base.layouts import keys, open_checkpoint
from lcl_adapter.base.layouts.tensors import PlannedTensor, Shards
from lcl_adapter.base.model import attach, load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.checkpoints.convert import convert
from lcl_adapter.checkpoints.merge import merge
from lcl_adapter.recipe.schema import AdapterOptions
from tests.tiny import save_original

FOLDER = Path("build/merge")
CHILD = ("make", "ours", "theirs", "converted", "gap")
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Scale:
    """What is merged: the folder for everything, the base's size, bytes of a shard, and how often each side runs."""

    folder: Path
    size: Size
    shard: int
    rounds: int


def scale_of(small: bool) -> Scale:
    """The base has 1.1 B parameters: 19 layers of width 2,048, in 5 or 6 shards."""
    if small:
        return Scale(FOLDER / "small", Size(64, 176, 2, 2, pixels=28), 4 * 10**6, 1)
    return Scale(FOLDER, Size(2048, 5632, 19, 32), 900 * 10**6, 4)


def base_of(kind: str, scale: Scale) -> Path:
    """A random base of this type."""
    return random_llava(scale.folder / f"base-{kind}", scale.size, KINDS[kind], shards=5)


def run_of(kind: str, scale: Scale) -> Path:
    """A run folder with a random adapter of rank 64 on that base."""
    folder = scale.folder / f"run-{kind}"
    if (folder / "lcl_adapter.json").exists():
        return folder
    base = attach(load_base(BaseRef(str(base_of(kind, scale)), "bf16")), AdapterOptions(rank=64, alpha=128))
    torch.manual_seed(1)
    for name, parameter in base.model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.02
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(base, folder, str(base_of(kind, scale)), {})
    return folder


def original_of(kind: str, scale: Scale) -> Path:
    """The same weights in the original layout, with a tiny sentencepiece tokenizer.

    It is written once, without ``convert``.
    """
    folder = scale.folder / f"llava-original-{kind}"
    if (folder / "done").exists():
        return folder
    small = save_original(scale.folder / "llava-small", "v1.5")
    source = open_checkpoint(str(base_of(kind, scale)))
    folder.mkdir(parents=True, exist_ok=True)
    tower = folder.with_name(folder.name + "-tower")
    tower.mkdir(exist_ok=True)
    for file in small.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    shutil.copyfile(scale.folder / "llava-small-tower" / "preprocessor_config.json", tower / "preprocessor_config.json")
    text = source.config.text_config
    raw = json.loads((small / "config.json").read_text())
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    raw |= {name: getattr(text, name) for name in fields} | {"mm_hidden_size": source.config.vision_config.hidden_size, "mm_vision_tower": str(tower)}
    (folder / "config.json").write_text(json.dumps(raw))
    source.config.vision_config.save_pretrained(tower)
    parts: dict[Path, list[PlannedTensor]] = {folder: [], tower: []}
    for name, weight in source.weights.items():
        key = "vision_model." + name.removeprefix(keys.TOWER) if name.startswith(keys.TOWER) else keys.to_original(name, linear=False)
        parts[tower if name.startswith(keys.TOWER) else folder].append(PlannedTensor(key, weight.dtype, weight.shape, weight.blocks))
    for place, planned in parts.items():
        for _ in Shards(planned, scale.shard).write(place):
            pass
    (folder / "done").touch()
    return folder


def converted(kind: str, out: Path, scale: Scale) -> None:
    convert(str(original_of(kind, scale)), out, shard_size=scale.shard, verify="tensors")


def ours(kind: str, out: Path, scale: Scale) -> None:
    merge(run_of(kind, scale), out, verify="layers", shard_size=scale.shard)


def theirs(kind: str, out: Path, scale: Scale) -> None:
    base = AutoModelForImageTextToText.from_pretrained(base_of(kind, scale), dtype=KINDS[kind])
    merged: Any = PeftModel.from_pretrained(base, str(run_of(kind, scale))).merge_and_unload(safe_merge=True)
    merged.save_pretrained(out, max_shard_size=scale.shard)


def measure(side: str, kind: str, scale: Scale) -> dict[str, float]:
    out = scale.folder / f"{side}-{kind}"
    shutil.rmtree(out, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    {"ours": ours, "theirs": theirs, "converted": converted}[side](kind, out, scale)
    return {"seconds": time.perf_counter() - began, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "before": before * 1024}


def unit(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A unit in the last place for numbers of this size."""
    return torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(value.clamp(min=torch.finfo(dtype).tiny))))


def largest_gap(kind: str, scale: Scale) -> tuple[float, int]:
    """Largest distance between the two results, and the number of tensors compared.

    The distance is in units in the last place of the largest of three numbers: the weight, the adapter's product, and
    their sum. The unit of the sum alone would mislead: PEFT rounds the product to bf16 before it adds, and the two may
    nearly cancel.
    """
    base, our_result, their_result = (
        open_checkpoint(str(place)) for place in (base_of(kind, scale), scale.folder / f"ours-{kind}", scale.folder / f"theirs-{kind}")
    )
    worst = 0.0
    for name, weight in our_result.stored.items():
        a, b = weight.read(), their_result.stored[name].read()
        if not torch.equal(a, b):
            before = base.stored[name].read().double()
            size = torch.stack([before.abs(), (a.double() - before).abs(), a.double().abs()]).amax(0)
            worst = max(worst, float(((a.double() - b.double()).abs() / unit(size, KINDS[kind])).max()))
    return worst, len(our_result.stored)


def alternate(kind: str, scale: Scale, more: Sequence[str]) -> dict[str, dict[str, float]]:
    """Side -> its median time and its largest peak memory."""
    runs: dict[str, list[dict[str, float]]] = {"theirs": [], "ours": []}
    for number in range(scale.rounds):
        for side in list(runs)[:: 1 if number % 2 == 0 else -1]:
            runs[side].append(child("benchmarks.merge", "--child", side, "--kind", kind, *more))
    return {
        side: {"seconds": median(run["seconds"] for run in of_side), "peak": max(run["peak"] for run in of_side)} for side, of_side in runs.items()
    }


def child_result(task: str, kind: str, scale: Scale) -> dict[str, Any]:
    """What a child process does: write what is merged, merge or convert, or compare the two results."""
    if task == "make":
        run_of(kind, scale)
        original_of(kind, scale)
        return {}
    if task == "gap":
        return {"gap": largest_gap(kind, scale)}
    return measure(task, kind, scale)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    made = parser(__doc__)
    made.add_argument("--child", choices=CHILD, help=argparse.SUPPRESS)
    made.add_argument("--kind", choices=sorted(KINDS), help=argparse.SUPPRESS)
    options = options_of(made, "benchmarks.merge", arguments)
    scale, more = scale_of(options.small), ["--small"] if options.small else []
    if options.child:
        result = child_result(options.child, options.kind, scale)
        print(json.dumps(result))
        return result
    rows: list[tuple[str, ...]] = []
    ratios: dict[str, float] = {}
    for kind in KINDS:
        child("benchmarks.merge", "--child", "make", "--kind", kind, *more)  # a process started from this one begins with its peak memory
        figures = alternate(kind, scale, more)
        # PEFT's side writes no tokenizer, and the result cannot be opened without one.
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(base_of(kind, scale) / file, scale.folder / f"theirs-{kind}" / file)
        gap, count = child("benchmarks.merge", "--child", "gap", "--kind", kind, *more)["gap"]
        memory = figures["ours"]["peak"] / figures["theirs"]["peak"]
        seconds = figures["ours"]["seconds"] / figures["theirs"]["seconds"]
        ratios |= {f"{kind}: peak memory, ours / PEFT's": memory, f"{kind}: time, ours / PEFT's": seconds, f"{kind}: ulp": float(gap)}
        cells = [f"{figures[side]['peak'] / 1e9:.2f} GB, {figures[side]['seconds']:.0f} s" for side in ("theirs", "ours")]
        rows.append((kind, *cells, f"{memory:.2f}", f"{seconds:.2f}", f"{gap:.2g} ulp in {count} tensors"))
    for kind in KINDS:
        peak = child("benchmarks.merge", "--child", "converted", "--kind", kind, *more)["peak"]
        largest = max(file.stat().st_size for file in (scale.folder / f"converted-{kind}").glob("*.safetensors"))
        ratios[f"{kind}: peak of converting / (1.3 shards + 500 MB)"] = peak / (1.3 * largest + 5e8)
        rows.append((f"{kind}, converted", "-", f"{peak / 1e9:.2f} GB", f"{peak / (1.3 * largest + 5e8):.2f} of 1.3 shards + 500 MB", "", ""))
    return finish(options, "merge", ("weights", "PEFT", "shard by shard, verified", "memory", "time", "difference"), rows, ratios)


if __name__ == "__main__":
    main()
