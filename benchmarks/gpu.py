"""What only a GPU can show, in one command, from random weights and without network.

    python -m benchmarks.gpu --minutes 8                # on one GPU: LLaVA-1.5-7B's shape
    python -m benchmarks.gpu --shape tiny --out build   # the same script on a CPU, as the tests run it

Parts, each in a process of its own with a time limit. A part that fails is reported, and the others go on.

    model      write the random base, in LLaVA-1.5's family and fp16
    nf4        2-way 2-shot, rank 64: peak against forecast and seconds a step, against stock SFTTrainer on the same rows
    pooled     2-way 16-shot, photos that are shown pooled to 64 tokens, beside 2-way 2-shot with whole ones, in nf4
    bf16       2-way 2-shot in 16 bits, against stock too; then an 8-shot set asked by a stored prefix, against plain ``generate``
    forecasts  forecast against measured peak of the small models of ``benchmarks.plan``
    files      times of a conversion into the original layout, and of a merge

The context is 16,384 tokens instead of LLaVA-1.5's 4,096, because 16 pictures of 576 tokens would not fit. The result is
one JSON object in ``benchmarks/results/`` and a page of tables, ``docs/gpu-results.md``, with the card's name.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from benchmarks import plan, predict, train
from benchmarks.common import Peak, Size, commit, random_llava, versions, write_config
from lcl_adapter import devices
from lcl_adapter.answering.predict import Predictor
from lcl_adapter.answering.room import Load
from lcl_adapter.base.adapter import save_adapter
from lcl_adapter.base.model import Base, attach, load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.checkpoints.convert import convert
from lcl_adapter.checkpoints.merge import merge
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.memory import budget
from lcl_adapter.memory.plan import Plan
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.schema import AdapterOptions
from lcl_adapter.training.collate import Collator
from lcl_adapter.training.trainer import LclTrainer
from tests.tiny import sentencepiece_model, vicuna_tokenizer


@dataclass(frozen=True)
class Shape:
    """steps: of a training; the first is not timed. questions: about the set of ``shots`` a class. plain: of them, those
    that plain ``generate`` answers too. cases: of ``benchmarks.plan``.
    """

    size: Size
    steps: int
    shots: int
    questions: int
    plain: int
    cases: str


SHAPES = {
    "7b": Shape(Size(4096, 11008, 32, 32, pixels=336, context=16384), steps=9, shots=8, questions=32, plain=4, cases="abcdefghij"),
    "tiny": Shape(Size(64, 128, 2, 2, pixels=28, context=16384), steps=2, shots=1, questions=3, plain=2, cases=""),
}
LIMITS = {"model": 120, "nf4": 200, "pooled": 120, "bf16": 160, "forecasts": 120, "files": 300}  # seconds
BENCHMARK = "python -m benchmarks.gpu"
# LLaVA-1.5's prompt, for TRL's collator; this project's encoder needs none
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for c in m['content'] %}{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    "{{ ' ' if m['role'] == 'user' else eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
Result = dict[str, Any]


def base_folder(shape: str, folder: Path) -> Path:
    size, shards = SHAPES[shape].size, 5 if shape == "7b" else 1
    made = random_llava(folder / "base", size, torch.float16, shards, vicuna_tokenizer(), template=None)
    (made / "tokenizer.model").write_bytes(sentencepiece_model())  # the original layout has one
    return made


def recipe_of(base: Path, precision: str, output: str, steps: int, row: Result) -> Recipe:
    """2-way episodes of the shipped drawings, a row a step. row: ``shots`` a class, ``queries`` a set, ``support_tokens`` of a
    photo that is shown (None: all).
    """
    return Recipe.model_validate(
        {
            "base": str(base), "precision": precision, "output": output,
            "adapter": {"rank": 64, "alpha": 128, "dropout": 0.05},
            "image_tokens": {"support": row.get("support_tokens")},
            "sources": {"lcl": {"type": "pocket", "shots": [row["shots"]], "queries": row["queries"], "learn": "query",
                                "further_views": 0 if row["shots"] < 5 else 4}},  # a class has six drawings or fewer
            "train": {"max_steps": steps, "per_device_train_batch_size": 1, "gradient_checkpointing": True, "bucket": 1, "save_steps": 10_000,
                      "logging_steps": 1, "feature_cache": "1GB"},
        }
    )  # fmt: skip


def trained(base: Base, recipe: Recipe) -> Result:
    """Train the recipe's steps with this project's trainer: forecast and peak bytes, seconds a step, losses."""
    device = base.device.type
    forecast = Plan(recipe, device, Mixture(recipe), 10**12).training().total
    base = base.with_supports(recipe.image_tokens.most, recipe.supports)
    collator = Collator(Mixture(recipe), base.encoder())
    peak = Peak()
    trainer = LclTrainer(base, recipe, collator, VisionFeatures(base), Mixture(recipe).steps)
    figures = _run(trainer) | {"longest_row": max(len(collator.row(number)) for number in range(Mixture(recipe).steps))}
    measured = peak.total
    return {**figures, "forecast": forecast, "peak": measured, "error": forecast / measured - 1}


def stock(base: Base, recipe: Recipe) -> Result:
    """The same episodes with TRL's trainer and collator."""
    peak = Peak()
    processor = AutoProcessor.from_pretrained(base.path)
    processor.chat_template = TEMPLATE
    figures = _run(train.stock_trainer(base, recipe, processor))
    return {**figures, "peak": peak.total}


def _run(trainer: Any) -> Result:
    clock = train.Clock()
    trainer.add_callback(clock)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.accelerator.free_memory()
    return {"seconds_a_step": clock.median, "losses": losses}


def without_adapter(base: Base) -> Base:
    """The base as it was loaded, for the next adapter."""
    llava = base.model.unload()
    llava.requires_grad_(False).eval()
    llava._forward_hooks.clear()
    llava._forward_pre_hooks.clear()
    llava._forward_pre_hooks_with_kwargs.clear()
    return base.with_model(llava)


def model_part(shape: str, folder: Path) -> Result:
    began = time.perf_counter()
    made = base_folder(shape, folder)
    size = sum(file.stat().st_size for file in made.glob("*.safetensors"))
    return {"seconds": time.perf_counter() - began, "bytes": size}


def loaded(shape: str, folder: Path, precision: str) -> tuple[Base, float]:
    began = time.perf_counter()
    base = load_base(BaseRef(str(base_folder(shape, folder)), precision, device=devices.training_device()))  # type: ignore[arg-type]
    return base, time.perf_counter() - began


def nf4_part(shape: str, folder: Path) -> Result:
    return training_part(shape, folder, "nf4", [{"shots": 2, "queries": 1}, {"shots": 2, "queries": 4}])


def pooled_part(shape: str, folder: Path) -> Result:
    """Sixteen photos of each class beside two, as the same recipe would train both."""
    side = SHAPES[shape].size.pixels // 14  # patches
    rows = [{"shots": 2, "queries": 1}, {"shots": 16, "queries": 1, "support_tokens": max(1, side // 3) ** 2}]
    return training_part(shape, folder, "nf4", rows, beside_stock=False)


def training_part(shape: str, folder: Path, precision: str, rows: Sequence[Result], beside_stock: bool = True) -> Result:
    """A training for each of ``rows`` (see :func:`recipe_of`). beside_stock: with TRL's trainer too, on the same base."""
    base, seconds = loaded(shape, folder, precision)
    result: Result = {"loading_seconds": seconds, "trainings": []}
    for row in rows:
        with tempfile.TemporaryDirectory() as output:
            recipe = recipe_of(folder / "base", precision, output, SHAPES[shape].steps, row)
            tokens = len(Plan(recipe, base.device.type, Mixture(recipe), 10**12).row)
            base = attach(base, recipe.adapter)
            measured: Result = {"precision": precision, **row, "tokens": tokens, "ours": trained(base, recipe)}
            base = without_adapter(base)
            if beside_stock:
                base = attach(base, recipe.adapter)
                measured["stock"] = _reported(partial(stock, base, recipe))
                base = without_adapter(base)
            result["trainings"].append(measured)
            print(json.dumps(result), flush=True)  # if the next one runs out of time, this much is known
    return result


def bf16_part(shape: str, folder: Path) -> Result:
    result = training_part(shape, folder, "bf16", [{"shots": 2, "queries": 1}])
    base, _ = loaded(shape, folder, "bf16")
    return result | {"asking": _reported(partial(asking, base, SHAPES[shape]))}


def asking(base: Base, shape: Shape) -> Result:
    """Questions about one set, from its stored keys and values, and with the whole prompt each time."""
    support, queries = predict.episode(shape.shots, shape.questions)
    predict.prefilled(base, support, queries[:2])  # warm-up
    predict.plain(base, support, queries[:1])
    peak = Peak()
    texts, seconds, asked = predict.prefilled(base, support, queries)
    measured = peak.total
    predictor = Predictor(base, max_new_tokens=predict.NEW_TOKENS)
    encoder = predictor.encoder
    question = max(len(encoder.turns([query], opened=True)[0]) for query in queries)
    load = Load(1, len(encoder.turns(support)[0]), question, 1, predict.NEW_TOKENS).times(1, predictor.pack)
    sizes = budget.shape_of(base.llava.config)
    pictures = len({turn.picture for turn in (*support, *queries)})
    forecast = budget.answering(sizes, base.precision, base.device.type, NO_ADAPTER, load, pictures).total
    peak = Peak()
    plain_texts, plain_seconds = predict.plain(base, support, queries[: shape.plain])
    return {
        "shots": shape.shots,
        "tokens": load.support,
        "questions": len(queries),
        "seconds": seconds,
        "images_a_second": len(queries) / seconds,
        "images_a_second_after_the_prefill": len(queries) / asked,
        "plain_images_a_second": shape.plain / plain_seconds,
        "ratio": (len(queries) / seconds) / (shape.plain / plain_seconds),
        "same_answers": sum(a == b for a, b in zip(texts, plain_texts, strict=False)) / shape.plain,
        "peak": measured,
        "plain_peak": peak.total,
        "load": asdict(load),
        "pictures": pictures,
        "forecast": forecast,
        "error": forecast / measured - 1,
    }


NO_ADAPTER = AdapterOptions(rank=1)


def forecasts_part(shape: str, _: Path) -> Result:
    """Each small training of ``benchmarks.plan`` in this process: forecast and peak."""
    rows = []
    for name in SHAPES[shape].cases:
        rows.append({"name": plan.CASES[name].name, **_reported(partial(plan.measured_here, name))})
        print(json.dumps({"rows": rows}), flush=True)
    return {"rows": rows}


def files_part(shape: str, folder: Path) -> Result:
    """Seconds to convert the base into the original layout, and to merge an adapter of rank 64 into it."""
    source = base_folder(shape, folder)
    result: Result = {"bytes": sum(file.stat().st_size for file in source.glob("*.safetensors"))}

    def timed(work: Callable[[Path], Any], out: Path) -> Result:
        began = time.perf_counter()
        work(out)
        seconds = time.perf_counter() - began
        shutil.rmtree(out, ignore_errors=True)
        return {"seconds": seconds}

    run = folder / "run"
    base = attach(load_base(BaseRef(str(source), "fp16", device=devices.training_device())), AdapterOptions(rank=64, alpha=128))
    torch.manual_seed(1)
    for name, parameter in base.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    run.mkdir(parents=True, exist_ok=True)
    save_adapter(base, run, str(source), {})
    del base
    devices.release_memory()
    result["merge"] = _reported(lambda: timed(lambda out: merge(run, out, verify="layers"), folder / "merged"))
    print(json.dumps(result), flush=True)
    result["convert"] = _reported(lambda: timed(lambda out: convert(str(source), out, verify="tensors"), folder / "llava-original"))
    return result


def figures_of(result: Result) -> dict[str, float]:
    """The figures that documents cite (``benchmarks.figures``)."""
    figures: dict[str, float] = {}
    for name in ("nf4", "bf16"):
        for row in result["parts"].get(name, {}).get("trainings", []):
            figures[f"{name}, {row['queries']} question(s): peak in GB"] = row["ours"]["peak"] / 1e9
            if "failed" not in row["stock"]:
                figures[f"{name}, {row['queries']} question(s): times stock's speed"] = row["stock"]["seconds_a_step"] / row["ours"]["seconds_a_step"]
                figures[f"{name}, {row['queries']} question(s): peak / stock's"] = row["ours"]["peak"] / row["stock"]["peak"]
    if len(rows := result["parts"].get("pooled", {}).get("trainings", [])) == 2:
        two, sixteen = (row["ours"] for row in rows)
        figures |= {
            "pooled, 16 shots: peak in GB": sixteen["peak"] / 1e9,
            "pooled, 16 shots: peak / 2 whole shots'": sixteen["peak"] / two["peak"],
            "pooled, 16 shots: time / 2 whole shots'": sixteen["seconds_a_step"] / two["seconds_a_step"],
        }
    if "ratio" in (asked := result["parts"].get("bf16", {}).get("asking", {})):
        figures |= {"asking: times plain's speed": asked["ratio"], "asking: images a second": asked["images_a_second"]}
    for name in ("merge", "convert"):
        if "seconds" in (work := result["parts"].get("files", {}).get(name, {})):
            figures[f"{name}: seconds"] = work["seconds"]
    return figures


def with_forecasts(result: Result) -> Result:
    """A stored result with the forecasts of the formulas as they are now. Needs no GPU and no weights."""
    shape = SHAPES[result["shape"]]

    def put(row: Result, total: int) -> None:
        row |= {"forecast": total, "error": total / row["peak"] - 1}

    with tempfile.TemporaryDirectory() as scratch:
        base = write_config(Path(scratch) / "base", shape.size, torch.float16, vicuna_tokenizer(), None)
        sizes = budget.shape_of(shape.size.config(vicuna_tokenizer()))
        for name in ("nf4", "pooled", "bf16"):
            for row in result["parts"].get(name, {}).get("trainings", []):
                recipe = recipe_of(base, row["precision"], scratch, shape.steps, row)
                put(row["ours"], Plan(recipe, "cuda", Mixture(recipe), 10**12).training().total)
        asked = result["parts"].get("bf16", {}).get("asking", {})
        if "load" in asked:
            put(asked, budget.answering(sizes, "bf16", "cuda", NO_ADAPTER, Load(**asked["load"]), asked["pictures"]).total)
        for row in result["parts"].get("forecasts", {}).get("rows", []):
            [case] = [case for case in plan.CASES.values() if case.name == row["name"]]
            folder = write_config(Path(scratch) / case.size, plan.SIZES[case.size], torch.float16)
            recipe = plan.recipe_of(case, scratch, folder)
            put(row, Plan(recipe, "cuda", Mixture(recipe), 10**12).training().total)
    return {**result, "figures": figures_of(result), "forecasts_of": commit()}


PARTS = {"model": model_part, "nf4": nf4_part, "pooled": pooled_part, "bf16": bf16_part, "forecasts": forecasts_part, "files": files_part}


def _reported(work: Callable[[], Result]) -> Result:
    """The result, or the error, so that a fault in one figure does not cost the others."""
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}


def run_part(name: str, shape: str, folder: Path, limit: float) -> Result:
    """One part in a process of its own. Its last line of JSON is its result, also where it was stopped."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--part", name, "--shape", shape, "--folder", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TRANSFORMERS_VERBOSITY": "error"}
    began = time.perf_counter()
    log = folder / f"{name}.out"
    fault = ""
    with log.open("w", encoding="utf-8") as out:
        try:
            code = subprocess.run(command, stdout=out, env=environment, timeout=limit, check=False).returncode
            fault = f"ended with code {code}" if code else ""
        except subprocess.TimeoutExpired:
            fault = f"stopped after {limit:.0f} s"
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    result: Result = json.loads(lines[-1]) if lines else {}
    return {**result, "wall_seconds": round(time.perf_counter() - began, 1), **({"failed": fault} if fault else {})}


def card() -> Result:
    if not torch.cuda.is_available():
        return {"name": "CPU", "memory": 0}
    properties = torch.cuda.get_device_properties(0)
    return {"name": properties.name, "memory": properties.total_memory, "driver": torch.version.cuda}


def main(arguments: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=8, help="for all parts together")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--only", choices=sorted(PARTS), action="append", help="only this part; may be given several times")
    parser.add_argument("--folder", type=Path, help="for the base and what is written from it: 45 GB for 7b")
    parser.add_argument("--out", type=Path, help="where the JSON and the page go [default: benchmarks/results and docs]")
    parser.add_argument("--forecasts", type=Path, metavar="FILE", help="compute a stored result's forecasts again, and write its page")
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        print(json.dumps(PARTS[options.part](options.shape, options.folder)))
        return {}
    from benchmarks.gpu_page import page

    if options.forecasts:
        stored = with_forecasts(json.loads(options.forecasts.read_text(encoding="utf-8")))
        options.forecasts.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        ((options.out or Path("docs")) / "gpu-results.md").write_text(page(stored), encoding="utf-8")
        return stored
    scratch = options.folder or Path(tempfile.mkdtemp())
    scratch.mkdir(parents=True, exist_ok=True)
    result: Result = {"command": BENCHMARK, "commit": commit(), "card": card(), "versions": versions(), "shape": options.shape, "parts": {}}
    slug = "".join(c if c.isalnum() else "-" for c in result["card"]["name"].lower()).strip("-")
    json_path = (options.out or Path("benchmarks/results")) / f"gpu-{slug}.json"
    page_path = (options.out or Path("docs")) / "gpu-results.md"
    deadline = time.perf_counter() + 60 * options.minutes
    for name in PARTS:
        if options.only and name not in options.only and name != "model":
            continue
        remaining = deadline - time.perf_counter()
        if remaining < 5:
            result["parts"][name] = {"failed": f"not started: the {options.minutes:g} minutes were over"}
        else:
            result["parts"][name] = run_part(name, options.shape, scratch, min(LIMITS[name], remaining))
        print(json.dumps({name: result["parts"][name]}), flush=True)
        result["figures"] = figures_of(result)
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        page_path.write_text(page(result), encoding="utf-8")
    if options.folder is None:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{json_path}, {page_path}", file=sys.stderr)
    print(json.dumps({"name": "gpu", "parts": {name: part.get("failed", "ran") for name, part in result["parts"].items()}}))
    return result


if __name__ == "__main__":
    main()
