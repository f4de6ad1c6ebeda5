"""Precisions: their types, the choice that ``auto`` makes, and which weights are quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from lcl_adapter.base.layouts.keys import language_path, skeleton
from lcl_adapter.devices import free_memory
from lcl_adapter.errors import ModelError
from lcl_adapter.recipe.schema import Precision

TYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYERS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}  # bitsandbytes' classes of a quantised linear layer


def choose_precision(config: Any, device: str, memory: int | None = None) -> tuple[Precision, str]:
    """The precision that ``auto`` means, and why: the widest whose weights fit into ``memory`` with a third to spare.

    On a CPU that is fp32 where it fits. memory: bytes; the free memory of the device where None.
    """
    count = sum(p.numel() for p in skeleton(config).parameters())
    free = memory or free_memory(device)
    if device == "cpu":
        fits = 1.3 * 4 * count < free
        return ("fp32" if fits else "bf16"), f"{4 * count / 1e9:.1f} GB of weights in fp32, {free / 1e9:.1f} GB of memory free; CPUs are slow in less"
    if device == "mps":
        return "fp16", f"{2 * count / 1e9:.1f} GB of weights in 16 bits, which Apple's GPUs compute fastest in; {free / 1e9:.1f} GB free"
    old = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    half: Precision = "fp16" if old else "bf16"
    if 1.35 * 2 * count < free:
        return half, f"{2 * count / 1e9:.1f} GB of weights in 16 bits, {free / 1e9:.1f} GB free on the GPU"
    return "nf4", f"{2 * count / 1e9:.1f} GB of weights in 16 bits and {free / 1e9:.1f} GB free on the GPU: too tight"


def compute_type(device: str) -> torch.dtype:
    """The type that a quantised base computes in: 16 bits on a GPU; fp32 on a CPU, where 16 bits are slower."""
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def outside_language(config: Any) -> list[str]:
    """Patterns of the modules that are never quantised.

    In transformers 5 any list replaces the automatic skip of lm_head, and a bare name matches nothing.
    """
    model = skeleton(config)
    language = language_path(model)
    parent = language.rpartition(".")[0]
    siblings = [name for name, _ in model.get_submodule(parent).named_children() if f"{parent}.{name}".lstrip(".") != language]
    return ["lm_head", *(f".*{name}.*" for name in siblings)]


def quantisation(precision: Precision, dtype: torch.dtype, config: Any) -> BitsAndBytesConfig:
    """transformers' config to load a base in 4 or 8 bits. nf4 uses double quantisation and computes in ``dtype``."""
    skipped = outside_language(config)
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def check_quantised(model: nn.Module, precision: Precision) -> None:
    """Raises ModelError where loading quantised no module, or one outside the language model."""
    inside = language_path(model)
    quantised = [n for n, m in model.named_modules() if type(m).__name__ == LAYERS[precision]]
    stray = [n for n in quantised if not n.startswith(inside)]
    if not quantised or stray:
        raise ModelError(f"quantised loading changed {len(quantised)} modules, {len(stray)} of them outside the language model: {stray[:1]}.")


def allow_gradients(model: nn.Module) -> None:
    """Stop 4-bit layers from repacking their weights on a CPU.

    Outside of training, bitsandbytes repacks them for good where the CPU has AVX-512 BF16. That form has no gradient, so a
    base that has answered once would pass none on in training.
    """
    module: Any
    for module in model.modules():
        if type(module).__name__ == LAYERS["nf4"]:
            module.support_avx512bf16_for_cpu = False


def quantised_weights(model: nn.Module) -> frozenset[str]:
    """The names of the weights that nf4 and int8 replace: the linear layers of the language model."""
    inside = f"{language_path(model)}."
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(inside))


def nf4_round_trip(weight: torch.Tensor, compute_dtype: torch.dtype) -> torch.Tensor:
    """A weight quantised to nf4 with double quantisation and back, in fp32: what a QLoRA adapter was trained on."""
    from bitsandbytes import functional as bnb

    quantised, state = bnb.quantize_4bit(weight.to(compute_dtype).contiguous(), quant_type="nf4", compress_statistics=True)
    return bnb.dequantize_4bit(quantised, state).reshape(weight.shape).float()
