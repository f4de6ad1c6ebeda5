"""Names of weights: the original layout's, Hugging Face's on disk, and the model's own (transformers 5).

The rest of this package uses the model's own.

    original (haotian-liu/LLaVA)                      the model's own
    model.{embed_tokens,layers.N,norm}                model.language_model.…
    lm_head                                           lm_head
    model.mm_projector.{0,2}, or of v1 without one    model.multi_modal_projector.linear_{1,2}
    model.image_newline                               model.image_newline
    model.vision_tower.vision_tower.vision_model.…    model.vision_tower.…

In Hugging Face's layout the names on disk depend on the version that wrote them, so transformers' own renaming rules
read them. The names that are written are those of the published llava-hf checkpoints, which every version and vLLM
read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lcl_adapter import reading
from lcl_adapter.errors import ModelError

PROJECTOR = "model.multi_modal_projector."
TOWER = "model.vision_tower."
LANGUAGE = "model.language_model."
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
# Buffers that older versions saved; the model computes them
DROPPED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


def skeleton(config: Any) -> nn.Module:
    """The model on the meta device: names and shapes, without memory for its weights.

    Raises ModelError where the config's values do not make a model.
    """
    try:
        with reading.one_line(), torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    except ValueError as error:
        raise ModelError(f"base {getattr(config, '_name_or_path', '')}: its config makes no model ({error}).") from error


def language_path(model: nn.Module) -> str:
    """The module path of the language model inside a model, for instance ``model.language_model``.

    Raises ModelError where the language model is not a module of its own.
    """
    decoder = model.get_decoder()  # type: ignore[operator]
    for path, module in model.named_modules():
        if module is decoder and path:
            return path
    raise ModelError("this model has no language model apart from its vision part; it cannot be adapted.")


def from_hugging_face(keys: Iterable[str], model: nn.Module) -> dict[str, str]:
    """Key on disk -> the model's own name, by transformers' rules.

    Keys that it converts instead of renaming are left out.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    known = model.state_dict()
    names = {}
    for key in keys:
        if not DROPPED.search(key):
            name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
            if converted is None:
                names[key] = name
    return names


def to_hugging_face(name: str) -> str:
    """The name that published llava-hf checkpoints give a weight."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    if name.startswith(LANGUAGE):
        return "language_model.model." + name.removeprefix(LANGUAGE)
    if name.startswith(TOWER):
        return "vision_tower.vision_model." + name.removeprefix(TOWER)
    return name.removeprefix("model.")


def from_original(key: str) -> str | None:
    """The model's own name of an original key; None for buffers. Raises ModelError for a key that no LLaVA has."""
    if DROPPED.search(key):
        return None
    if key.startswith("lm_head.") or key == "model.image_newline":
        return key
    if match := re.fullmatch(r"model\.mm_projector\.(?:(0|2)\.)?(weight|bias)", key):
        return f"{PROJECTOR}linear_{2 if match[1] == '2' else 1}.{match[2]}"
    if match := re.fullmatch(r"model\.vision_tower\.vision_tower\.vision_model\.(.+)", key):
        return TOWER + match[1]
    if match := re.fullmatch(r"model\.((?:embed_tokens|layers|norm)\..+)", key):
        return LANGUAGE + match[1]
    raise ModelError(f"{key!r} is no weight that an original LLaVA has; the checkpoint is of another kind, or its keys were renamed.")


def to_original(name: str, linear: bool) -> str:
    """The original key of a weight. linear: v1's projector, whose single layer has no number."""
    if match := re.fullmatch(re.escape(PROJECTOR) + r"linear_(1|2)\.(weight|bias)", name):
        return f"model.mm_projector.{match[2]}" if linear else f"model.mm_projector.{'0' if match[1] == '1' else '2'}.{match[2]}"
    if name.startswith(TOWER):
        return "model.vision_tower.vision_tower.vision_model." + name.removeprefix(TOWER)
    if name.startswith(LANGUAGE):
        return "model." + name.removeprefix(LANGUAGE)
    return name
