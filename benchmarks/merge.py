"""Merging shard by shard against PEFT's `merge_and_unload` and `save_pretrained`: peak memory, time, equal weights.

    python -m benchmarks.merge            # a random LLaVA of 1.1 B parameters in 5 shards

Each side runs in a process of its own. The two sides alternate ROUNDS times, each time in the other order. Times are
medians, memory is the largest peak.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from benchmarks.common import Size, child, finish, random_llava
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
SHARD = 900 * 10**6
ROUNDS = 4
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def base_of(kind: str) -> Path:
    """A base of 1.1 B parameters: 19 layers of width 2,048, in 5 or 6 shards."""
    return random_llava(FOLDER / f"base-{kind}", Size(2048, 5632, 19, 32), KINDS[kind], shards=5)


def run_of(kind: str) -> Path:
    """A run folder with a random adapter of rank 64 on that base."""
    folder = FOLDER / f"run-{kind}"
    if (folder / "lcl_adapter.json").exists():
        return folder
    base = attach(load_base(BaseRef(str(base_of(kind)), "bf16")), AdapterOptions(rank=64, alpha=128))
    torch.manual_seed(1)
    for name, parameter in base.model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.02
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(base, folder, str(base_of(kind)), {})
    return folder


def original_of(kind: str) -> Path:
    """The same weights in the original layout, with a tiny sentencepiece tokenizer.

    It is written once, without ``convert``.
    """
    folder = FOLDER / f"llava-original-{kind}"
    if (folder / "done").exists():
        return folder
    small = save_original(FOLDER / "llava-small", "v1.5")
    source = open_checkpoint(str(base_of(kind)))
    folder.mkdir(parents=True, exist_ok=True)
    tower = folder.with_name(folder.name + "-tower")
    tower.mkdir(exist_ok=True)
    for file in small.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    shutil.copyfile(FOLDER / "llava-small-tower" / "preprocessor_config.json", tower / "preprocessor_config.json")
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
        for _ in Shards(planned, SHARD).write(place):
            pass
    (folder / "done").touch()
    return folder


def converted(kind: str, out: Path) -> None:
    convert(str(original_of(kind)), out, shard_size=SHARD, verify="tensors")


def ours(kind: str, out: Path) -> None:
    merge(run_of(kind), out, verify="layers", shard_size=SHARD)


def theirs(kind: str, out: Path) -> None:
    base = AutoModelForImageTextToText.from_pretrained(base_of(kind), dtype=KINDS[kind])
    merged: Any = PeftModel.from_pretrained(base, str(run_of(kind))).merge_and_unload(safe_merge=True)
    merged.save_pretrained(out, max_shard_size=SHARD)


def measure(side: str, kind: str) -> dict[str, float]:
    out = FOLDER / f"{side}-{kind}"
    shutil.rmtree(out, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    {"ours": ours, "theirs": theirs, "converted": converted}[side](kind, out)
    return {"seconds": time.perf_counter() - began, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "before": before * 1024}


def unit(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A unit in the last place for numbers of this size."""
    return torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(value.clamp(min=torch.finfo(dtype).tiny))))


def largest_gap(kind: str) -> tuple[float, int]:
    """Largest distance between the two results, and the number of tensors compared.

    The distance is in units in the last place of the largest of three numbers: the weight, the adapter's product, and
    their sum. The unit of the sum alone would mislead: PEFT rounds the product to bf16 before it adds, and the two may
    nearly cancel.
    """
    base, our_result, their_result = (open_checkpoint(str(place)) for place in (base_of(kind), FOLDER / f"ours-{kind}", FOLDER / f"theirs-{kind}"))
    worst = 0.0
    for name, weight in our_result.stored.items():
        a, b = weight.read(), their_result.stored[name].read()
        if not torch.equal(a, b):
            before = base.stored[name].read().double()
            size = torch.stack([before.abs(), (a.double() - before).abs(), a.double().abs()]).amax(0)
            worst = max(worst, float(((a.double() - b.double()).abs() / unit(size, KINDS[kind])).max()))
    return worst, len(our_result.stored)


def alternate(kind: str) -> dict[str, dict[str, float]]:
    """Side -> its median time and its largest peak memory."""
    runs: dict[str, list[dict[str, float]]] = {"theirs": [], "ours": []}
    for number in range(ROUNDS):
        for side in list(runs)[:: 1 if number % 2 == 0 else -1]:
            runs[side].append(child("benchmarks.merge", "--child", side, kind))
    return {
        side: {"seconds": median(run["seconds"] for run in of_side), "peak": max(run["peak"] for run in of_side)} for side, of_side in runs.items()
    }


def main() -> None:
    rows: list[tuple[str, ...]] = []
    ratios: dict[str, float] = {}
    for kind in KINDS:
        child("benchmarks.merge", "--make", kind)  # in a child: a process started from this one begins with its peak memory
        figures = alternate(kind)
        # PEFT's side writes no tokenizer, and the result cannot be opened without one.
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(base_of(kind) / file, FOLDER / f"theirs-{kind}" / file)
        gap, count = child("benchmarks.merge", "--gap", kind)["gap"]
        memory = figures["ours"]["peak"] / figures["theirs"]["peak"]
        seconds = figures["ours"]["seconds"] / figures["theirs"]["seconds"]
        ratios |= {f"{kind}: peak memory, ours / PEFT's": memory, f"{kind}: time, ours / PEFT's": seconds, f"{kind}: ulp": float(gap)}
        cells = [f"{figures[side]['peak'] / 1e9:.2f} GB, {figures[side]['seconds']:.0f} s" for side in ("theirs", "ours")]
        rows.append((kind, *cells, f"{memory:.2f}", f"{seconds:.2f}", f"{gap:.2g} ulp in {count} tensors"))
    for kind in KINDS:
        peak = child("benchmarks.merge", "--child", "converted", kind)["peak"]
        largest = max(file.stat().st_size for file in (FOLDER / f"converted-{kind}").glob("*.safetensors"))
        ratios[f"{kind}: peak of converting / (1.3 shards + 500 MB)"] = peak / (1.3 * largest + 5e8)
        rows.append((f"{kind}, converted", "-", f"{peak / 1e9:.2f} GB", f"{peak / (1.3 * largest + 5e8):.2f} of 1.3 shards + 500 MB", "", ""))
    finish("merge", ("weights", "PEFT", "shard by shard, verified", "memory", "time", "difference"), rows, ratios)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(*sys.argv[2:4])))
    elif sys.argv[1:2] == ["--gap"]:
        print(json.dumps({"gap": largest_gap(sys.argv[2])}))
    elif sys.argv[1:2] == ["--make"]:
        run_of(sys.argv[2])
        original_of(sys.argv[2])
        print("{}")
    else:
        main()
