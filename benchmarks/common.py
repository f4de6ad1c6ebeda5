"""The random model of about 150 M parameters, children with their own peak memory, and the table that ends a benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
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

from lcl_adapter.pocket import BASE
from lcl_adapter.pocket.tokenizer import CHAT_TEMPLATE

RANDOM = Path("build/random-150m")
THREADS = 2


def random_model(folder: Path = RANDOM) -> Path:
    """A random LLaVA: 144 tokens an image (168 pixels, patch 14), 5 language layers of 1,280, 32,000 words. Made once."""
    if (folder / "done").exists():
        return folder
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6, image_size=168, patch_size=14
        ),
        text_config=LlamaConfig(
            vocab_size=32_000,
            hidden_size=1280,
            intermediate_size=3520,
            num_hidden_layers=5,
            num_attention_heads=10,
            num_key_value_heads=10,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=144,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    print(f"made a random LLaVA of {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters", file=sys.stderr)
    model.save_pretrained(folder)
    side = {"height": 168, "width": 168}
    LlavaProcessor(
        CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    (folder / "done").touch()
    return folder


def child(module: str, *arguments: str) -> dict[str, Any]:
    """Run ``python -m module arguments`` alone; its last line is a JSON object."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", module, *arguments], stdout=subprocess.PIPE, text=True, env=environment, check=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def finish(name: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], ratios: dict[str, float]) -> None:
    """Print the table, then the JSON line."""
    table = Table(title=name, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    print(json.dumps({"name": name, "ratios": {k: round(v, 3) for k, v in ratios.items()}}))
