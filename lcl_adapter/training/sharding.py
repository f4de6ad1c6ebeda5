"""A base whose weights are shared out among processes (FSDP2, DeepSpeed ZeRO-3): what it cannot do, and what it needs."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor

from lcl_adapter import processes
from lcl_adapter.errors import RunError
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.schema import QUANTISED


def check(recipe: Recipe) -> None:
    """Raises RunError for what cannot be done with weights that are shared out among processes."""
    if not processes.sharded():
        return
    if recipe.precision in QUANTISED:
        raise RunError(f"precision: {recipe.precision} weights cannot be shared out; use data parallel (launch/ddp.yaml), each GPU holds them whole.")
    if recipe.precision == "auto":
        raise RunError("precision: auto may choose 4 bits, which cannot be shared out; give precision=bf16.")
    if recipe.adapter.pissa:
        raise RunError("adapter.pissa: its start is a change of the base's own weights, which are shared out; give adapter.pissa=false.")
    if recipe.evaluate.every:
        raise RunError("evaluate.every: nothing is measured during a run with shared-out weights, but at its end; give evaluate.every=null.")


def halves(precision: str) -> dict[str, bool]:
    """SFTConfig's ``bf16`` and ``fp16``: only DeepSpeed wants to be told; it then keeps fp32 copies of what is trained."""
    return {"bf16": processes.uses_deepspeed() and precision == "bf16", "fp16": processes.uses_deepspeed() and precision == "fp16"}


def share_out(model: nn.Module, config: dict[str, Any]) -> None:
    """ZeRO-3, weight by weight from the host's memory, so that no device ever holds all of them. FSDP2 does so by itself.

    config: DeepSpeed's, of which only where the weights are kept is read here.
    """
    from deepspeed import zero

    kept = {key: value for key, value in config["zero_optimization"].items() if key in {"stage", "offload_param"}}
    zero.Init(module=model, config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": kept})


def whole(model: PeftModel) -> dict[str, torch.Tensor] | None:
    """The trained weights put together from all processes, each of which has to ask; None where every process has them whole."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if any(hasattr(parameter, "ds_id") for parameter in trained.values()):
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(parameter).detach().cpu() for name, parameter in trained.items()}
    if not any(isinstance(parameter, DTensor) for parameter in trained.values()):
        return None
    return {name: p.full_tensor().detach().cpu() if isinstance(p, DTensor) else p.detach().cpu() for name, p in trained.items()}
