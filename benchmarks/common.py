"""What the benchmarks share: random models, child processes with a peak memory of their own, and the final table."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
THREADS = 2


@dataclass(frozen=True)
class Size:
    """The size of a random LLaVA: its language model, and the side of its pictures in pixels.

    The patches have 14 pixels.

    With 336 pixels the vision tower has the size of LLaVA-1.5's, else it is small.
    """

    width: int
    mlp: int
    layers: int
    heads: int
    pixels: int = 112
    tied: bool = False
    context: int = 8192

    def config(self, tokenizer: Any = None) -> LlavaConfig:
        """Transformers' config. The vocabulary has 32,000 words; the tokenizer, by default pocket's, uses some of them."""
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(BASE)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        tower = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
        if self.pixels == 336:
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


def random_model() -> Path:
    """About 150 M parameters, 144 tokens an image (168 pixels), 5 language layers of 1,280."""
    return random_llava(RANDOM, Size(1280, 3520, 5, 10, pixels=168, tied=True))


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


def finish(name: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], ratios: dict[str, float]) -> None:
    """Print the table, and then the line with the JSON object."""
    table = Table(title=name, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    print(json.dumps({"name": name, "ratios": {k: round(v, 3) for k, v in ratios.items()}}))
