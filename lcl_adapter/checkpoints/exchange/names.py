"""Names of an adapter's weights in this project and in upstream LLaVA (llava/train/train.py, llava/model/builder.py)."""

from __future__ import annotations

import re

import torch

from lcl_adapter.base.layouts import keys
from lcl_adapter.errors import AdapterError

PREFIX = "base_model.model."
LAYER = r"(\d+)\.((?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj)"
# Where the layers are: in upstream's model, in PEFT on transformers 4, in PEFT on transformers 5.
LAYER_PATHS = r"(?:model\.layers|language_model\.model\.layers|model\.language_model\.layers)"
UPSTREAM_TARGETS = rf"model\.layers\.{LAYER}"


def module_to_upstream(module: str) -> str:
    """``model.language_model.layers.0.mlp.up_proj`` -> ``model.layers.0.mlp.up_proj``.

    Raises AdapterError for any other module.
    """
    match = re.fullmatch(rf"{LAYER_PATHS}\.{LAYER}", module)
    if match is None:
        raise AdapterError(
            f"the adapter changes {module}, which is no projection of the language model; upstream cannot load that. Merge the adapter instead."
        )
    return f"model.layers.{match[1]}.{match[2]}"


def parse_lora_key(key: str) -> tuple[str, str] | None:
    """A LoRA key of upstream's, or of PEFT's on Hugging Face's layout -> (this project's module name, "A" or "B").

    None if the key is not one of a projection of the language model.
    """
    match = re.fullmatch(rf"base_model\.model\.{LAYER_PATHS}\.{LAYER}\.lora_([AB])(?:\.default)?\.weight", key)
    return (f"{keys.LANGUAGE}layers.{match[1]}.{match[2]}", match[3]) if match else None


def projector_to_upstream(weights: dict[str, torch.Tensor], linear: bool) -> dict[str, torch.Tensor]:
    """A projector that was trained in full, with the keys of ``non_lora_trainables.bin``.

    linear: the base is LLaVA v1, whose two layers here are multiplied into upstream's single layer.
    """
    if not linear:
        return {PREFIX + keys.to_original(name, linear=False): value for name, value in weights.items()}
    parts = {name.rpartition("multi_modal_projector.")[2]: value.double() for name, value in weights.items()}
    return {
        f"{PREFIX}model.mm_projector.weight": (parts["linear_2.weight"] @ parts["linear_1.weight"]).float(),
        f"{PREFIX}model.mm_projector.bias": (parts["linear_2.weight"] @ parts["linear_1.bias"] + parts["linear_2.bias"]).float(),
    }


def projector_from_upstream(weights: dict[str, torch.Tensor], linear: bool) -> dict[str, torch.Tensor]:
    """The inverse of :func:`projector_to_upstream`. A single layer is followed by an identity layer.

    Raises AdapterError if the base's projector has another number of layers.
    """
    projector: dict[str, torch.Tensor] = {}
    for key, value in weights.items():
        name = keys.from_original(re.sub(r"^(base_model\.)?(model\.)?(?=model\.mm_projector)", "", key))
        assert name is not None
        projector[name] = value
    single = bool(projector) and not any("linear_2" in name for name in projector)
    if projector and single != linear:
        layers = ("one layer", "two")
        raise AdapterError(f"its projector has {layers[not single]}, the base's {layers[not linear]}; it belongs to another base.")
    if single:
        width = projector[f"{keys.PROJECTOR}linear_1.weight"].shape[0]
        projector |= {f"{keys.PROJECTOR}linear_2.weight": torch.eye(width), f"{keys.PROJECTOR}linear_2.bias": torch.zeros(width)}
    return projector
