"""What the benchmarks share: random models, child processes with a peak memory of their own, options, and results.

Every benchmark has ``--small`` (tiny sizes, to see that it runs) and ``--store`` (write benchmarks/results/NAME.json).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from lcl_adapter import devices
from lcl_adapter.pocket import BASE
from tools.pocket.tokenizer import CHAT_TEMPLATE

RANDOM = Path("build/random-150m")
RANDOM_SMALL = Path("build/random-small")
RANDOM_WIDE = Path("build/random-150m-576")
RESULTS = Path(__file__).parent / "results"
THREADS = 2


@dataclass(frozen=True)
class Size:
    """The size of a random LLaVA: its language model, and the side of its pictures in pixels.

    The patches have 14 pixels.

    With 336 pixels the vision tower has the size of LLaVA-1.5's, with 28 it is tiny, else it is small. small_tower: with 336
    pixels too.
    """

    width: int
    mlp: int
    layers: int
    heads: int
    pixels: int = 112
    tied: bool = False
    context: int = 8192
    small_tower: bool = False

    def config(self, tokenizer: Any = None) -> LlavaConfig:
        """Transformers' config. The vocabulary has 32,000 words; the tokenizer, by default pocket's, uses some of them."""
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(BASE)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        tower = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
        if self.pixels == 28:
            tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
        if self.pixels == 336 and not self.small_tower:
            tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        return LlavaConfig(
            vision_config=CLIPVisionConfig(**tower, image_size=self.pixels, patch_size=14),
            text_config=LlamaConfig(
                vocab_size=32_000, hidden_size=self.width, intermediate_size=self.mlp, num_hidden_layers=self.layers,
                num_attention_heads=self.heads, num_key_value_heads=self.heads, max_position_embeddings=self.context,
                tie_word_embeddings=self.tied, **ids,
            ),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-2, vision_feature_select_strategy="default",
            image_seq_length=(self.pixels // 14) ** 2, tie_word_embeddings=self.tied,
        )  # fmt: skip


def random_llava(
    folder: Path, size: Size, dtype: torch.dtype = torch.float32, shards: int = 1, tokenizer: Any = None, template: str | None = CHAT_TEMPLATE
) -> Path:
    """Write a random LLaVA to ``folder`` in this type, in about ``shards`` shards.

    A complete folder is not written again. tokenizer and chat template: pocket's by default.
    """
    if (folder / "done").exists():
        return folder
    write_config(folder, size, dtype, tokenizer, template)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a GPU draws 7 billion numbers in a second
        model = LlavaForConditionalGeneration(size.config(tokenizer))
    torch.set_default_dtype(torch.float32)
    print(f"made a random LLaVA of {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters", file=sys.stderr)
    size_in_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, **({"max_shard_size": size_in_bytes // shards} if shards > 1 else {}))
    (folder / "done").touch()
    return folder


def write_config(folder: Path, size: Size, dtype: torch.dtype, tokenizer: Any = None, template: str | None = CHAT_TEMPLATE) -> Path:
    """A random LLaVA's files without its weights, which is enough for a forecast."""
    config = size.config(tokenizer)
    config.dtype = dtype
    config.save_pretrained(folder)
    side = {"height": size.pixels, "width": size.pixels}
    LlavaProcessor(
        CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer or AutoTokenizer.from_pretrained(BASE),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return folder


def random_model(small: bool = False) -> Path:
    """About 150 M parameters, 144 tokens an image (168 pixels), 5 language layers of 1,280. small: 4 tokens an image."""
    if small:
        return random_llava(RANDOM_SMALL, Size(64, 176, 2, 2, pixels=28, tied=True))
    return random_llava(RANDOM, Size(1280, 3520, 5, 10, pixels=168, tied=True))


def random_wide_model() -> Path:
    """The same language model and tower with LLaVA-1.5's 576 tokens an image: 336 pixels, 24 x 24 patches."""
    return random_llava(RANDOM_WIDE, Size(1280, 3520, 5, 10, pixels=336, tied=True, small_tower=True))


class Peak:
    """The peak of this process's memory since its creation on a GPU; on a CPU, since the process's start."""

    def __init__(self) -> None:
        devices.release_memory()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @property
    def allocated(self) -> int:
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def outside(self) -> int:
        """Bytes of this GPU that are in use and not reserved by torch: CUDA's context and libraries."""
        if not torch.cuda.is_available():
            return 0
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    @property
    def total(self) -> int:
        return self.allocated + self.outside


def child(module: str, *arguments: str) -> dict[str, Any]:
    """Run ``python -m module arguments`` in a process of its own. Returns the JSON object in its last line."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments], stdout=subprocess.PIPE, text=True, env=environment, check=True
    )
    result: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
    return result


def parser(description: str | None, small: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has, and its module's docstring as help. small: whether ``--small`` exists."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if small:
        made.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs; the figures say nothing")
    made.add_argument("--store", action="store_true", help="write the result to benchmarks/results/")
    return made


def options_of(made: argparse.ArgumentParser, module: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options in ``arguments`` (None: the command line's), with the whole command as ``command``."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = made.parse_args(given)
    if options.store and getattr(options, "small", False):
        made.error("a result of --small is not stored, because its figures say nothing")
    options.command = " ".join([f"python -m {module}", *(a for a in given if a != "--store")])
    return options


def finish(
    options: argparse.Namespace,
    name: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    ratios: Mapping[str, float],
    figures: Mapping[str, float] | None = None,
    title: str | None = None,
) -> dict[str, Any]:
    """Print the table, and then the line with the JSON object; with ``--store``, write both to ``results/NAME.json``.

    ratios are comparable across machines, figures are not, or are counts. title: the table's, by default the name.
    Returns name, ratios, figures, columns and rows.
    """
    table = Table(title=title or name, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    print(json.dumps({"name": name, "ratios": {k: round(v, 3) for k, v in ratios.items()}}))
    result = {"name": name, "ratios": _short(ratios), "figures": _short(figures or {}), "columns": list(columns), "rows": [list(r) for r in rows]}
    if options.store:
        write_result(name, result, options.command)
    return result


def _short(numbers: Mapping[str, float]) -> dict[str, float]:
    """Six significant digits of each; whole numbers as they are."""
    return {key: value if isinstance(value, int) else float(f"{value:.6g}") for key, value in numbers.items()}


def write_result(name: str, result: Mapping[str, Any], command: str, **more: Any) -> Path:
    """Write ``results/NAME.json``: the result, and under ``stored`` what it was measured with, and ``more``."""
    path = RESULTS / f"{name}.json"
    stored = {"command": command, "commit": commit(), "date": date.today().isoformat(), "machine": machine(), "versions": versions(), **more}
    path.write_text(json.dumps({**result, "stored": stored}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"stored {path}; `python -m benchmarks.figures` writes it into the documents", file=sys.stderr)
    return path


def commit() -> str:
    """This checkout's, with a plus if its code was changed since. Without git, what ``LCL_COMMIT`` says."""
    if given := os.environ.get("LCL_COMMIT"):
        return given

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=RESULTS, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results", ":(top,exclude)*.md")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, Any]:
    """The processor's name, the cores, and the memory in GB."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "cores": psutil.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9, 1)}


def versions() -> dict[str, str]:
    """Of Python and of the libraries that compute."""
    numbers = {"python": platform.python_version()}
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate"):
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            numbers[name] = "missing"
    return numbers
