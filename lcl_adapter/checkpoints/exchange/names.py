"""Names of an adapter's weights, here and upstream (llava/train/train.py, llava/model/builder.py), and of the folders that hold them."""

from __future__ import annotations

import re

import torch

from lcl_adapter.base.layouts import keys
from lcl_adapter.errors import AdapterError

PREFIX = "base_model.model."
LAYER = r"(\d+)\.((?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj)"
# Upstream's own names, PEFT's on transformers 4 and on transformers 5.
PLACES = r"(?:model\.layers|language_model\.model\.layers|model\.language_model\.layers)"
TARGETS_THERE = rf"model\.layers\.{LAYER}"


def to_upstream(module: str) -> str:
    """``model.language_model.layers.0.mlp.up_proj`` -> ``model.layers.0.mlp.up_proj``. Raises AdapterError for any other place."""
    match = re.fullmatch(rf"{PLACES}\.{LAYER}", module)
    if match is None:
        raise AdapterError(f"the adapter changes {module}, which is no projection of the language model; upstream cannot take it. Merge it instead.")
    return f"model.layers.{match[1]}.{match[2]}"


def from_anywhere(key: str) -> tuple[str, str] | None:
    """A LoRA key of upstream's or of PEFT on Hugging Face's layout -> (module here, what follows); None for anything else."""
    match = re.fullmatch(rf"base_model\.model\.{PLACES}\.{LAYER}\.(lora_[AB])(?:\.default)?\.weight", key)
    return (f"{keys.LANGUAGE}layers.{match[1]}.{match[2]}", f"{match[3]}.weight") if match else None


def projector_to_upstream(weights: dict[str, torch.Tensor], linear: bool) -> dict[str, torch.Tensor]:
    """A projector trained in full, as ``non_lora_trainables.bin`` has it; v1's two layers become its one."""
    if not linear:
        return {PREFIX + keys.to_original(name, linear=False): value for name, value in weights.items()}
    one = {name.rpartition("multi_modal_projector.")[2]: value.double() for name, value in weights.items()}
    return {
        f"{PREFIX}model.mm_projector.weight": (one["linear_2.weight"] @ one["linear_1.weight"]).float(),
        f"{PREFIX}model.mm_projector.bias": (one["linear_2.weight"] @ one["linear_1.bias"] + one["linear_2.bias"]).float(),
    }


def projector_from_upstream(weights: dict[str, torch.Tensor], linear: bool) -> dict[str, torch.Tensor]:
    """The other way; a single layer is followed by an identity. Raises AdapterError where the base's projector has another number of layers."""
    found: dict[str, torch.Tensor] = {}
    for key, value in weights.items():
        name = keys.from_original(re.sub(r"^(base_model\.)?(model\.)?(?=model\.mm_projector)", "", key))
        assert name is not None
        found[name] = value
    single = bool(found) and not any("linear_2" in name for name in found)
    if found and single != linear:
        layers = ("one layer", "two")
        raise AdapterError(f"its projector has {layers[not single]}, the base's {layers[not linear]}; it belongs to another base.")
    if single:
        width = found[f"{keys.PROJECTOR}linear_1.weight"].shape[0]
        found |= {f"{keys.PROJECTOR}linear_2.weight": torch.eye(width), f"{keys.PROJECTOR}linear_2.bias": torch.zeros(width)}
    return found
