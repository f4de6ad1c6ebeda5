"""What an adapter adds to the weights of its base, computed one weight at a time with PEFT's own layers.

LoRA, rsLoRA, DoRA and starts such as PiSSA are therefore merged exactly as PEFT merges them. The whole model is never
in memory.

Shapes: O output width of a layer, I its input width, R rank of the adapter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from lcl_adapter.base.layouts.tensors import tensors_in_file
from lcl_adapter.errors import AdapterError

PREFIX = "base_model.model."
PART_NAMES = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude"}


@dataclass(frozen=True)
class Adapter:
    """An adapter folder as PEFT writes it. ``weight`` multiplies what the adapter adds."""

    folder: Path
    weight: float = 1.0

    @cached_property
    def config(self) -> LoraConfig:
        """PEFT's config of the folder. Raises AdapterError if it is not a LoRA config."""
        try:
            config = LoraConfig.from_pretrained(str(self.folder))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise AdapterError(f"{self.folder}: PEFT cannot read its adapter_config.json ({error}).") from error
        if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
            raise AdapterError(f"{self.folder}: this is a {config.peft_type} adapter; only LoRA and its variants can be merged.")
        return config

    @cached_property
    def _tensors(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        file = self.folder / "adapter_model.safetensors"
        if not file.exists():
            raise AdapterError(f"{self.folder}: no adapter_model.safetensors in it.")
        tensors_in_file(file)  # raises an error that names the file, if the file is incomplete
        layers: dict[str, dict[str, torch.Tensor]] = {}
        full_weights = {}
        for key, value in load_file(file).items():
            name = key.removeprefix(PREFIX)
            module, _, part = name.rpartition(".lora_")
            if module:
                if f"lora_{part}" not in PART_NAMES:
                    raise AdapterError(f"{self.folder}: {key} is an unknown kind of adapter weight.")
                layers.setdefault(module, {})[PART_NAMES[f"lora_{part}"]] = value
            else:
                full_weights[name] = value
        return layers, full_weights

    @property
    def layers(self) -> dict[str, dict[str, torch.Tensor]]:
        """Module name -> its tensors: "A" [R, I], "B" [O, R], and for DoRA "magnitude" [O]."""
        return self._tensors[0]

    @property
    def full_weights(self) -> dict[str, torch.Tensor]:
        """Weights that were trained in full, such as the projector's, by the model's own names."""
        return self._tensors[1]

    @property
    def changed_weights(self) -> list[str]:
        """The weights of the base that this adapter changes, by the model's own names."""
        return [f"{module}.weight" for module in self.layers] + list(self.full_weights)

    def load_into(self, layer: Linear, module: str, name: str, rows: slice) -> None:
        """Copy this adapter's tensors for some output rows of ``module`` into the adapter ``name`` of a PEFT layer."""
        parts = self.layers[module]
        layer.lora_A[name].weight = nn.Parameter(parts["A"].float())
        layer.lora_B[name].weight = nn.Parameter(parts["B"][rows].float())
        if "magnitude" in parts:
            layer.lora_magnitude_vector[name].weight = nn.Parameter(parts["magnitude"][rows].float())
        layer.scaling[name] *= self.weight

    @property
    def scaling(self) -> float:
        """The factor of B @ A in a layer of the adapter's own rank, see :meth:`scaling_of`."""
        return self._factor(self.config.r, self.config.lora_alpha)

    def scaling_of(self, module: str) -> float:
        """The factor of B @ A in ``module``: alpha / R for LoRA, alpha / sqrt(R) for rsLoRA (arXiv 2312.03732)."""
        return self._factor(*self.rank_and_alpha(module))

    def _factor(self, rank: int, alpha: float) -> float:
        return float(alpha) / (math.sqrt(rank) if self.config.use_rslora else rank)

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(parts["A"].shape[0] for parts in self.layers.values())

    def of_one_rank(self) -> dict[str, dict[str, torch.Tensor]]:
        """The layers with the largest rank, filled up with zeros, and with one scaling: programs that know no other layers read these."""
        rank, layers = self.rank, {}
        for module, parts in self.layers.items():
            missing, factor = rank - parts["A"].shape[0], self.scaling_of(module) / self.scaling
            down, up = functional.pad(parts["A"], (0, 0, 0, missing)), functional.pad(parts["B"], (0, missing))
            layers[module] = {**parts, "A": down.contiguous(), "B": (up if factor == 1 else up * factor).contiguous()}
        return layers

    @property
    def starts_from_weight(self) -> bool:
        """Whether A and B were initialised from the base's weight, as PiSSA does. Such a start needs the whole weight."""
        return isinstance(self.config.init_lora_weights, str) and self.config.init_lora_weights.startswith(("pissa", "olora"))

    def rank_and_alpha(self, module: str) -> tuple[int, float]:
        config = self.config
        pattern = get_pattern_key((config.alpha_pattern or {}).keys(), module)
        return self.layers[module]["A"].shape[0], (config.alpha_pattern or {}).get(pattern, config.lora_alpha)


def check_combinable(adapters: Sequence[Adapter]) -> None:
    """Raises AdapterError if these adapters cannot be added to one base together."""
    if len(adapters) < 2:
        return
    for adapter in adapters:
        if adapter.config.use_dora:
            raise AdapterError(f"{adapter.folder}: DoRA changes a weight's length and cannot be added to another adapter; merge it alone.")
    trained = [adapter for adapter in adapters if adapter.full_weights]
    if len(trained) > 1:
        name = next(iter(trained[0].full_weights))
        raise AdapterError(f"{trained[0].folder} and {trained[1].folder} have both trained {name} in full; only one may.")


def merged_rows(module: str, weight: Iterable[torch.Tensor], adapters: Sequence[Adapter]) -> Iterator[torch.Tensor]:
    """Merge adapters into a weight [O, I], given as consecutive blocks of rows. Yields the merged blocks in fp32.

    LoRA and DoRA can be merged block by block because no row of the result depends on another row. Raises AdapterError
    if the result is not finite.
    """
    if any(adapter.starts_from_weight for adapter in adapters if module in adapter.layers):
        weight = [torch.cat(list(weight))]
    first = 0
    for block_OI in weight:
        layer = _layer_with_adapters(module, block_OI.float(), adapters, slice(first, first + len(block_OI)))
        layer.merge()
        merged_OI = layer.get_base_layer().weight.data
        del layer.get_base_layer().weight  # PEFT's layers form a reference cycle, which would hold this memory until it is collected
        if not all(edge.isfinite() for edge in torch.aminmax(merged_OI)):
            raise AdapterError(f"{module}: the merged weight is not finite (NaN or infinity); the adapter is broken.")
        yield merged_OI
        first += len(block_OI)


def weight_at_start(module: str, weight_OI: torch.Tensor, adapters: Sequence[Adapter]) -> torch.Tensor:
    """The weight that adapters are added to which were initialised from it, as PiSSA's: PEFT subtracts their start."""
    start: torch.Tensor = _layer_with_adapters(module, weight_OI.float().clone(), adapters, slice(None)).get_base_layer().weight.data
    return start


def _layer_with_adapters(module: str, weight_OI: torch.Tensor, adapters: Sequence[Adapter], rows: slice) -> Linear:
    """PEFT's layer for some rows of a weight in fp32, with the adapters in it. Merging changes ``weight_OI`` in place."""
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    layer: Linear | None = None
    for number, adapter in enumerate(a for a in adapters if module in a.layers):
        rank, alpha = adapter.rank_and_alpha(module)
        config = copy.copy(adapter.config)
        # PiSSA's start changes the base's weight, so it is computed again. Any other start is overwritten by load_into.
        config.init_lora_weights = config.init_lora_weights if adapter.starts_from_weight else False
        config.lora_dropout = 0.0
        name = f"adapter{number}"
        with nullcontext() if adapter.starts_from_weight else init_empty_weights():
            if layer is None:
                layer = Linear(linear, name, config, r=rank, lora_alpha=alpha)  # type: ignore[arg-type]
            else:
                layer.update_layer(name, rank, lora_alpha=alpha, config=config)  # type: ignore[arg-type]
        adapter.load_into(layer, module, name, rows)
    assert layer is not None
    layer.set_adapter(list(layer.lora_A.keys()))
    layer.requires_grad_(False)
    return layer.eval()


def blended_weight(name: str, adapters: Sequence[Adapter], base_weight: torch.Tensor) -> torch.Tensor:
    """A weight that an adapter trained in full, in fp32.

    An adapter's ``weight`` below 1 interpolates from the base's weight.
    """
    adapter = next(a for a in adapters if name in a.full_weights)
    trained = adapter.full_weights[name]
    if trained.shape != base_weight.shape:
        raise AdapterError(
            f"{adapter.folder}: {name} has shape {list(trained.shape)}, the base's has {list(base_weight.shape)}; it belongs to another base."
        )
    return torch.lerp(base_weight.float(), trained.float(), adapter.weight)


def check_fits(adapters: Sequence[Adapter], base_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare every adapter's shapes with the base's, before anything is written.

    Raises AdapterError if an adapter changes a weight that the base does not have, or one of another shape.
    """
    for adapter in adapters:
        for module, parts in adapter.layers.items():
            shape = base_shapes.get(f"{module}.weight")
            if shape is None:
                raise AdapterError(f"{adapter.folder}: changes {module}, which the base does not have.")
            up, down = parts.get("B"), parts.get("A")
            if up is None or down is None:
                raise AdapterError(f"{adapter.folder}: {module} has only one of its two matrices, A and B; copy the adapter again.")
            if (up.shape[0], down.shape[1]) != shape:
                raise AdapterError(
                    f"{adapter.folder}: changes {module} from width {down.shape[1]} to {up.shape[0]}, the base's is {shape[1]} to {shape[0]}; "
                    "it belongs to a base of another size."
                )
        for name, trained in adapter.full_weights.items():
            if name not in base_shapes:
                raise AdapterError(f"{adapter.folder}: trained {name} in full, which the base does not have.")
            if tuple(trained.shape) != base_shapes[name]:
                raise AdapterError(
                    f"{adapter.folder}: {name} has shape {list(trained.shape)}, the base's has {list(base_shapes[name])}; it belongs to another base."
                )
