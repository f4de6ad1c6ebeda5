"""Training a base whose weights are sharded among processes (FSDP2, DeepSpeed ZeRO-3)."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor

from lcl_adapter import processes
from lcl_adapter.base.precision import TYPES, compute_type
from lcl_adapter.errors import RunError
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.schema import QUANTISED, Precision


def refuse_unsupported(recipe: Recipe) -> None:
    """Raises RunError for recipe options that sharded weights do not support."""
    if not processes.sharded():
        return
    if recipe.precision in QUANTISED:
        raise RunError(
            f"precision: {recipe.precision} weights cannot be sharded; use data parallel (launch/ddp.yaml), where each GPU holds all of them."
        )
    if recipe.precision == "auto":
        raise RunError("precision: auto may choose 4 bits, which cannot be sharded; set precision=bf16.")
    if recipe.adapter.pissa:
        raise RunError("adapter.pissa: it changes the base's own weights, which are sharded; set adapter.pissa=false.")
    if any(getattr(source, "retain", None) == "distribution" for source in recipe.sources.values()):
        raise RunError("retain: distribution asks the base in every step, which is not supported with sharded weights; set retain: answers.")
    if recipe.evaluate.every:
        raise RunError("evaluate.every: a run with sharded weights is measured at its end only; set evaluate.every=null.")


def mixed_precision(precision: Precision, device: str) -> dict[str, bool]:
    """SFTConfig's ``bf16`` and ``fp16``: the type that the adapter is computed in, from fp32 weights.

    On a GPU that is the base's 16 bits. On a CPU they would be slower, so the adapter is computed in fp32. DeepSpeed
    holds fp32 copies of trained weights itself; FSDP shards the adapter in fp32.
    """
    if processes.uses_deepspeed():
        return {"bf16": precision == "bf16", "fp16": precision == "fp16"}
    if device != "cuda" or precision == "fp32" or processes.sharded():
        return {"bf16": False, "fp16": False}
    half = TYPES[precision] if precision in TYPES else compute_type(device)
    return {"bf16": half == torch.bfloat16, "fp16": half == torch.float16}


def shard_weights(model: nn.Module, config: dict[str, Any]) -> None:
    """Shard the weights with ZeRO-3, one at a time from the host's memory, so that no device ever holds all of them.

    FSDP2 does this by itself. config: DeepSpeed's; only the options that place the weights are used here.
    """
    from deepspeed import zero

    placement = {key: value for key, value in config["zero_optimization"].items() if key in {"stage", "offload_param"}}
    zero.Init(module=model, config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": placement})


def full_state(model: PeftModel) -> dict[str, torch.Tensor] | None:
    """The trained weights, gathered from all processes. Every process has to call it. None where nothing is sharded."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if any(hasattr(parameter, "ds_id") for parameter in trained.values()):
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(parameter).detach().cpu() for name, parameter in trained.items()}
    if not any(isinstance(parameter, DTensor) for parameter in trained.values()):
        return None
    return {name: p.full_tensor().detach().cpu() if isinstance(p, DTensor) else p.detach().cpu() for name, p in trained.items()}
