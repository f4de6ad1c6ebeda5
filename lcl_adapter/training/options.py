"""Training options that only this machine can judge: packages, devices, and arguments that transformers checks.

They are tried on a few numbers before any weight is loaded. What can be judged by itself is in
``lcl_adapter.recipe.training``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler
from trl import SFTConfig

from lcl_adapter.devices import training_device
from lcl_adapter.errors import RecipeError

SIDE = 64  # of the trial weight; bitsandbytes stores 8 bits from 4,096 numbers on


def check_options(make_config: Callable[[], SFTConfig]) -> None:
    """Try a training's optimizer and its schedule of learning rates. Raises RecipeError with all faults."""
    try:
        config = make_config()
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError([f"train: {error}"]) from error
    faults: list[str] = []
    if config.activation_offloading and training_device() == "cpu":
        faults.append("train.activation_offloading: activations leave a GPU for the host's memory, and this machine has no GPU; remove it")
    optimizer: torch.optim.Optimizer | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the trial; the training gives them again
        try:
            faults += [f"train.optim_args: {argument} changes nothing of {config.optim.value}" for argument in _without_effect(config)]
            optimizer = _try_optimizer(config)
        except (ImportError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            faults.append(f"train.optim: {config.optim.value} cannot be used here ({_first_line(error)})")
        try:
            get_scheduler(
                config.lr_scheduler_type,
                optimizer or torch.optim.SGD([nn.Parameter(torch.zeros(1))]),
                config.get_warmup_steps(config.max_steps),
                config.max_steps,
                config.lr_scheduler_kwargs,
            ).step()
        except (ValueError, TypeError, KeyError) as error:
            faults.append(f"train.lr_scheduler_kwargs: {config.lr_scheduler_type.value}: {_first_line(error)}")
    if faults:
        raise RecipeError(faults)


def _try_optimizer(config: SFTConfig) -> torch.optim.Optimizer:
    """One step on one weight, on the device of the training."""
    weight = nn.Parameter(torch.zeros(SIDE, SIDE, device=training_device()))
    weight.grad = torch.ones_like(weight)
    optimizer_class, options = _class_and_options(config)
    optimizer: torch.optim.Optimizer = optimizer_class([{"params": [weight], "weight_decay": config.weight_decay}], **options)
    optimizer.step()
    return optimizer


def _without_effect(config: SFTConfig) -> list[str]:
    """The arguments in ``optim_args`` without which the optimizer would be the same."""
    arguments = [argument.strip() for argument in (config.optim_args or "").split(",") if argument.strip()]
    full = repr(_class_and_options(config)) if arguments else ""
    others = [",".join(a for a in arguments if a != argument) for argument in arguments]
    return [argument for argument, rest in zip(arguments, others, strict=True) if repr(_class_and_options(config, rest)) == full]


def _class_and_options(config: SFTConfig, optim_args: str | None = None) -> Any:
    changed = config if optim_args is None else replace(config, optim_args=optim_args or None)
    return Trainer.get_optimizer_cls_and_kwargs(changed, nn.Identity())  # without random weights: the seed is set already


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
