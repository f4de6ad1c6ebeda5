"""How attention is computed: SDPA, the eager formula, FlexAttention, or FlashAttention.

Rows with several branches have a bool mask [B, 1, T, T] (``lcl_adapter.training.collate``), and so has every question
behind a stored prefix. SDPA reads such a mask. The eager formula and FlexAttention would add it to the scores as zeros
and ones, and FlashAttention reads none; here all of them give SDPA's result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from lcl_adapter.base.layouts.keys import language_path
from lcl_adapter.errors import ModelError
from lcl_adapter.recipe.schema import Attention

FLASH = {
    "flash_attention_2": (is_flash_attn_2_available, "pip install flash-attn --no-build-isolation"),
    "flash_attention_3": (is_flash_attn_3_available, "build its `hopper` folder from github.com/Dao-AILab/flash-attention"),
    "flash_attention_4": (is_flash_attn_4_available, "pip install flash-attn-4"),
}


def check_available(implementation: Attention, device: str, dtype: torch.dtype) -> None:
    """Raises ModelError where this machine or this precision cannot compute attention so."""
    if implementation in {"sdpa", "eager"}:
        return
    if torch.device(device).type != "cuda":
        raise ModelError(f"attn_implementation {implementation} needs a CUDA GPU; this run is on {device}: set `attn_implementation: sdpa`.")
    if implementation in FLASH:
        available, install = FLASH[implementation]
        if not available():
            raise ModelError(f"attn_implementation {implementation}: not installed here. {install}, or set `attn_implementation: sdpa`.")
        if dtype not in {torch.bfloat16, torch.float16}:
            raise ModelError(f"attn_implementation {implementation} computes in 16 bits only: set `precision: bf16`, or `attn_implementation: sdpa`.")


def read_masks(model: nn.Module, implementation: Attention) -> None:
    """Make a model's attention read bool masks [B, 1, T, T] as SDPA does."""
    if implementation in FLASH:
        own = ALL_ATTENTION_FUNCTIONS[implementation]
        ALL_ATTENTION_FUNCTIONS[implementation] = own if isinstance(own, FlashOrSdpa) else FlashOrSdpa(own)
    elif implementation != "sdpa":
        model.get_submodule(language_path(model)).register_forward_pre_hook(_add_mask, with_kwargs=True)


class FlashOrSdpa:
    """FlashAttention where a batch has no mask or one of padding; SDPA where it has a mask [B, 1, T, T]."""

    def __init__(self, flash: Any) -> None:
        self.flash = flash

    def __call__(self, module: nn.Module, query: Any, key: Any, value: Any, attention_mask: torch.Tensor | None, **options: Any) -> Any:
        masked = attention_mask is not None and attention_mask.ndim == 4
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"] if masked else self.flash
        return attend(module, query, key, value, attention_mask, **options)


def _add_mask(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the language model's forward: a bool mask becomes numbers to add, 0 where it allows and the least elsewhere."""
    mask = options.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.dtype == torch.bool:
        dtype = options["inputs_embeds"].dtype
        options = {**options, "attention_mask": torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)}
    return args, options
