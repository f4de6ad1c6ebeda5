"""What an adapter's files add to the weights of its base, a weight at a time, by PEFT's own layers.

So LoRA, rsLoRA, DoRA and a start such as PiSSA's merge exactly as PEFT merges them, and the whole model is never there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from lcl_adapter.base.layouts.tensors import stored_in_file
from lcl_adapter.errors import AdapterError

PREFIX = "base_model.model."
INPUTS = 4
PARTS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude"}


@dataclass(frozen=True)
class Adapter:
    """An adapter folder as PEFT writes it, and how much of it counts."""

    folder: Path
    weight: float = 1.0

    @cached_property
    def config(self) -> LoraConfig:
        """Raises AdapterError where it is no LoRA."""
        try:
            config = LoraConfig.from_pretrained(str(self.folder))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise AdapterError(f"{self.folder}: its adapter_config.json is none of PEFT's ({error}).") from error
        if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
            raise AdapterError(f"{self.folder}: a {config.peft_type} adapter; LoRA and its kin are merged here.")
        return config

    @cached_property
    def _parts(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        file = self.folder / "adapter_model.safetensors"
        if not file.exists():
            raise AdapterError(f"{self.folder}: no adapter_model.safetensors in it.")
        stored_in_file(file)  # one that was cut short is told of with its name
        layers: dict[str, dict[str, torch.Tensor]] = {}
        whole = {}
        for key, value in load_file(file).items():
            bare = key.removeprefix(PREFIX)
            module, _, part = bare.rpartition(".lora_")
            if module:
                if f"lora_{part}" not in PARTS:
                    raise AdapterError(f"{self.folder}: {key} is a kind of adapter weight that is not known here.")
                layers.setdefault(module, {})[PARTS[f"lora_{part}"]] = value
            else:
                whole[bare] = value
        return layers, whole

    @property
    def layers(self) -> dict[str, dict[str, torch.Tensor]]:
        """Module -> "A" [r, in], "B" [out, r], and of DoRA "magnitude" [out]."""
        return self._parts[0]

    @property
    def whole(self) -> dict[str, torch.Tensor]:
        """Weights that were trained in full, such as the projector's, by the model's own names."""
        return self._parts[1]

    @property
    def modules(self) -> list[str]:
        """What it changes, by the model's own names of weights."""
        return [f"{module}.weight" for module in self.layers] + list(self.whole)

    def put_on(self, layer: Linear, module: str, name: str, rows: slice) -> None:
        """Its values for these rows of ``module``, in a PEFT layer that has an adapter of this name."""
        parts = self.layers[module]
        layer.lora_A[name].weight = nn.Parameter(parts["A"].float())
        layer.lora_B[name].weight = nn.Parameter(parts["B"][rows].float())
        if "magnitude" in parts:
            layer.lora_magnitude_vector[name].weight = nn.Parameter(parts["magnitude"][rows].float())
        layer.scaling[name] *= self.weight

    @property
    def scaling(self) -> float:
        """What B @ A is multiplied by, of all layers: alpha / r, of rsLoRA alpha / sqrt(r) (arXiv 2312.03732)."""
        return float(self.config.lora_alpha) / (math.sqrt(self.config.r) if self.config.use_rslora else self.config.r)

    @property
    def starts_from_weight(self) -> bool:
        """Like PiSSA, whose two halves are taken out of the whole weight."""
        return isinstance(self.config.init_lora_weights, str) and self.config.init_lora_weights.startswith(("pissa", "olora"))

    def rank_and_alpha(self, module: str) -> tuple[int, float]:
        config = self.config
        pattern = get_pattern_key((config.alpha_pattern or {}).keys(), module)
        return self.layers[module]["A"].shape[0], (config.alpha_pattern or {}).get(pattern, config.lora_alpha)


def refuse_together(adapters: Sequence[Adapter]) -> None:
    """Raises AdapterError: adapters that cannot be added up."""
    if len(adapters) < 2:
        return
    for one in adapters:
        if one.config.use_dora:
            raise AdapterError(f"{one.folder}: DoRA changes a weight's length and cannot be added to another adapter; merge it alone.")
    trained = [one for one in adapters if one.whole]
    if len(trained) > 1:
        raise AdapterError(f"{trained[0].folder} and {trained[1].folder} have both trained {next(iter(trained[0].whole))} in full; only one may.")


def with_adapters(module: str, weight: Iterable[torch.Tensor], adapters: Sequence[Adapter]) -> Generator[torch.Tensor, None, Expected]:
    """Rows of a weight [out, in], block by block, with its adapters in them, added up in fp32; returns what PEFT's own layer answers before that.

    LoRA and DoRA allow it: every row of the product is its own. Raises AdapterError where an adapter does not answer in
    finite numbers.
    """
    if any(one.starts_from_weight for one in adapters if module in one.layers):
        weight = [torch.cat(list(weight))]
    told, first = [], 0
    for block in weight:
        layer = _layer_of(module, block.float(), adapters, slice(first, first + len(block)))
        told.append(_asked(module, layer))
        layer.merge()
        merged = layer.get_base_layer().weight.data
        del layer.get_base_layer().weight  # PEFT's layers hold each other, and would keep it until they are collected
        yield merged
        first += len(block)
    return Expected(torch.cat([one.answers for one in told], 1), max(one.effect for one in told))


def _layer_of(module: str, weight: torch.Tensor, adapters: Sequence[Adapter], rows: slice) -> Linear:
    """PEFT's layer of these rows of a weight in fp32, which it may change, with the adapters on it."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    layer: Linear | None = None
    for number, one in enumerate(a for a in adapters if module in a.layers):
        rank, alpha = one.rank_and_alpha(module)
        config = copy.copy(one.config)
        # A start from the weight itself is made again; any other is overwritten at once.
        config.init_lora_weights = config.init_lora_weights if one.starts_from_weight else False
        config.lora_dropout = 0.0
        name = f"adapter{number}"
        with nullcontext() if one.starts_from_weight else init_empty_weights():
            if layer is None:
                layer = Linear(linear, name, config, r=rank, lora_alpha=alpha)  # type: ignore[arg-type]
            else:
                layer.update_layer(name, rank, lora_alpha=alpha, config=config)  # type: ignore[arg-type]
        one.put_on(layer, module, name, rows)
    assert layer is not None
    layer.set_adapter(list(layer.lora_A.keys()))
    layer.requires_grad_(False)
    return layer.eval()


@dataclass(frozen=True)
class Expected:
    """What a layer with its adapters beside it answers to a few random inputs, [INPUTS, out], and how far that is from the layer alone."""

    answers: torch.Tensor
    effect: float

    def distance(self, merged: Iterable[torch.Tensor]) -> float:
        """How far a merged weight, given as rows, answers from it; infinite where its answers are not finite."""
        found = torch.cat([functional.linear(inputs_of(block.shape[1]), block.float()) for block in merged], 1)
        return float((found - self.answers).abs().max()) if found.isfinite().all() else math.inf


@cache
def inputs_of(width: int) -> torch.Tensor:
    """The same random inputs each time, [INPUTS, in]."""
    return torch.randn(INPUTS, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _asked(module: str, layer: Linear) -> Expected:
    """Of PEFT's own layer before anything is merged. Raises AdapterError where it does not answer in finite numbers."""
    alone: list[torch.Tensor] = []
    hook = layer.get_base_layer().register_forward_hook(lambda _, __, output: alone.append(output.clone()))
    answers = layer(inputs_of(layer.in_features))
    hook.remove()
    if not answers.isfinite().all():
        raise AdapterError(f"{module}: with the adapter on it its answers are not finite (NaNs or infinities); the adapter is broken.")
    return Expected(answers, float((answers - alone[0]).abs().max()))


def whole_of(name: str, adapters: Sequence[Adapter], weight: torch.Tensor) -> torch.Tensor:
    """A weight that an adapter trained in full; with a weight of less than one, that much of the way."""
    one = next(a for a in adapters if name in a.whole)
    if one.whole[name].shape != weight.shape:
        raise AdapterError(f"{one.folder}: {name} is {list(one.whole[name].shape)}, the base's {list(weight.shape)}; it belongs to another base.")
    return torch.lerp(weight.float(), one.whole[name].float(), one.weight)


def check_fits(adapters: Sequence[Adapter], base: Mapping[str, tuple[int, ...]]) -> None:
    """Before anything is written. Raises AdapterError: a weight the base does not have, or of another width."""
    for one in adapters:
        for module in one.layers:
            shape = base.get(f"{module}.weight")
            if shape is None:
                raise AdapterError(f"{one.folder}: changes {module}, which the base does not have.")
            up, down = one.layers[module].get("B"), one.layers[module].get("A")
            if up is None or down is None:
                raise AdapterError(f"{one.folder}: {module} has only one half of its two; copy the adapter again.")
            if (up.shape[0], down.shape[1]) != shape:
                raise AdapterError(
                    f"{one.folder}: changes {module} of {down.shape[1]} to {up.shape[0]}, the base's is {shape[1]} to {shape[0]}; "
                    "it belongs to a base of another size."
                )
        for name in one.whole:
            if name not in base:
                raise AdapterError(f"{one.folder}: trained {name} in full, which the base does not have.")
            if tuple(one.whole[name].shape) != base[name]:
                raise AdapterError(
                    f"{one.folder}: {name} is {list(one.whole[name].shape)}, the base's {list(base[name])}; it belongs to another base."
                )
