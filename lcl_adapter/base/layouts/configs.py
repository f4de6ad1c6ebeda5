"""Configs of both layouts, each made from the other.

The meaning of upstream's fields: llava/model/llava_arch.py and multimodal_projector/builder.py of haotian-liu/LLaVA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig, MistralConfig

from lcl_adapter.errors import ModelError

NEXT = "llava_next"  # LLaVA-1.6
LLAVA_TYPES = ("llava", NEXT, "llava_onevision")  # transformers' model types of LLaVA
TILED_TYPES = (NEXT, "llava_onevision")  # those that can read a picture in tiles, with line breaks between
UPSTREAM_TYPES = ("llava", NEXT)  # those that upstream has classes for
LANGUAGE_TYPES = {"llava": LlamaConfig, "llava_llama": LlamaConfig, "llava_mistral": MistralConfig}
PROJECTORS = {"linear": "linear", "mlp2x_gelu": "gelu"}  # upstream's name -> Hugging Face's activation
FEATURES = {"patch": "default", "cls_patch": "full"}
NOT_LANGUAGE_PREFIXES = (
    "mm_",
    "image_",
    "tune_",
    "freeze_",
    "unfreeze_",
    "use_mm",
    "tokenizer_",
    "model_type",
    "architectures",
    "auto_map",
    "_name_or_path",
)


MOST = {  # of a config, whole numbers from 1: what is far beyond any model would only fill the memory
    "num_hidden_layers": 1000, "num_layers": 1000, "n_layer": 1000, "depth": 1000, "encoder_layers": 1000, "decoder_layers": 1000,
    "num_attention_heads": 2**14, "num_key_value_heads": 2**14, "num_heads": 2**14, "head_dim": 2**14, "hidden_size": 2**20, "embed_dim": 2**20,
    "mm_hidden_size": 2**20, "intermediate_size": 2**22, "vocab_size": 2**24, "max_position_embeddings": 2**31, "num_experts": 2**14,
    "num_local_experts": 2**14, "patch_size": 2**12, "image_size": 2**14, "image_seq_length": 2**20, "num_channels": 2**10,
}  # fmt: skip
PARTS = ("vision_config", "text_config")
UPSTREAM_SCALES = {"llama": ("linear", "dynamic"), "mistral": ()}  # transformers 4.37, modeling_llama.py and modeling_mistral.py


def check_values(raw: dict[str, Any], name: str = "config.json") -> None:
    """Raises ModelError for sizes and counts that no model has, and for a part that is no object.

    They are checked before a model is made of them: ten million layers take hours, also without weights.
    """
    for key, most in MOST.items():
        value = raw.get(key)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= most):
                raise ModelError(f"{name}: {key} is {repr(value)[:60]}; a whole number from 1 to {most:,} is expected.")
    for part in PARTS:
        if part in raw:
            if not isinstance(raw[part], dict):
                raise ModelError(f"{name}: {part} is {repr(raw[part])[:60]}; an object is expected.")
            check_values(raw[part], f"{name}, {part}")
    vision = raw.get("vision_config", {})
    layers, chosen = vision.get("num_hidden_layers"), raw.get("vision_feature_layer")
    for layer in chosen if isinstance(chosen, list) else [chosen]:
        if layer is not None and (not isinstance(layer, int) or (layers is not None and not -layers - 1 <= layer <= layers)):
            raise ModelError(f"{name}: vision_feature_layer is {repr(chosen)[:60]}; the tower has {layers or 'other'} layers.")


def projector_type(raw: dict[str, Any]) -> str:
    """Upstream's name of the projector. Raises ModelError for one that Hugging Face's LLaVA does not have."""
    kind = raw.get("mm_projector_type") or "linear"
    if not isinstance(kind, str) or kind not in PROJECTORS:
        raise ModelError(f"mm_projector_type {kind!r} is not known; there are {', '.join(PROJECTORS)}.")
    return str(kind)


def is_next(raw: dict[str, Any]) -> bool:
    """Whether it is a LLaVA-1.6, which has any-resolution tiles with a line-break vector."""
    return "unpad" in str(raw.get("mm_patch_merge_type") or "")


def from_original(raw: dict[str, Any], vision: CLIPVisionConfig, rows: int, image_token_id: int) -> LlavaConfig | LlavaNextConfig:
    """An original config as Hugging Face's class. rows: of the embedding, the image token's row included.

    Raises ModelError: a language model, projector or feature choice that Hugging Face's classes lack.
    """
    kind = str(raw.get("model_type"))
    if kind not in LANGUAGE_TYPES:
        raise ModelError(f"model_type {kind!r} in the original layout is not known; there are {', '.join(LANGUAGE_TYPES)}.")
    language = {k: v for k, v in raw.items() if not k.startswith(NOT_LANGUAGE_PREFIXES)}
    feature = raw.get("mm_vision_select_feature") or "patch"
    if not isinstance(feature, str) or feature not in FEATURES:
        raise ModelError(f"mm_vision_select_feature {feature!r} is not known; there are {', '.join(FEATURES)}.")
    common = {
        "vision_config": vision,
        "text_config": LANGUAGE_TYPES[kind](**{**language, "vocab_size": rows}),
        "image_token_id": image_token_id,
        "projector_hidden_act": PROJECTORS[projector_type(raw)],
        "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": FEATURES[feature],
        "tie_word_embeddings": False,
        "dtype": raw.get("torch_dtype") or raw.get("dtype"),
    }
    side = vision.image_size // vision.patch_size
    if not is_next(raw):
        return LlavaConfig(**common, image_seq_length=side * side + (feature == "cls_patch"))
    pinpoints = raw.get("image_grid_pinpoints") or []
    if not isinstance(pinpoints, list) or not pinpoints:
        raise ModelError("image_grid_pinpoints: a list of [width, height] is expected beside mm_patch_merge_type spatial_unpad.")
    return LlavaNextConfig(**common, image_grid_pinpoints=[[high, wide] for wide, high in pinpoints], image_seq_length=side * side)


def _scaled_positions(rope: Mapping[str, Any], language: str) -> dict[str, Any]:
    """Upstream's field of scaled positions, in the form of its transformers; empty where they are not scaled. Raises ModelError."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}
    if kind not in UPSTREAM_SCALES[language]:
        raise ModelError(
            f"the positions of this {language} model are scaled ({kind}), which upstream LLaVA cannot do; its original layout cannot be written."
        )
    return {"rope_scaling": {"type": kind, "factor": float(rope["factor"])}}


def to_original(config: Any, tower: str, rows: int, family: str) -> dict[str, Any]:
    """Hugging Face's config as upstream's fields.

    tower: the value of ``mm_vision_tower``. rows: of the embedding that is written.

    Raises ModelError for a language model that upstream has no class for, or positions that it cannot scale.
    """
    text = config.text_config
    kinds = {"llama": ("llava_llama", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM")}
    if text.model_type not in kinds or config.model_type not in UPSTREAM_TYPES:
        raise ModelError(f"upstream LLaVA has no class for {config.model_type} on {text.model_type}; its original layout cannot be written.")
    kind, architecture = kinds[text.model_type]
    language = {k: v for k, v in text.to_dict().items() if not isinstance(v, dict) and k not in {"model_type", "architectures", "dtype", "id2label"}}
    rope = getattr(text, "rope_parameters", None) or {}
    raw: dict[str, Any] = {
        **language,
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": rows,
        "rope_theta": rope.get("rope_theta", 10000.0),
        **_scaled_positions(rope, text.model_type),
        "torch_dtype": str(config.dtype or "float16").removeprefix("torch."),
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": next(name for name, activation in PROJECTORS.items() if activation == config.projector_hidden_act),
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": next(name for name, strategy in FEATURES.items() if strategy == config.vision_feature_select_strategy),
        "mm_vision_tower": tower,
        "use_mm_proj": True,
        "mm_use_im_start_end": family == "llava-v1",
        "mm_use_im_patch_token": family == "llava-v1",
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    if config.model_type == NEXT:
        raw |= {
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": [[wide, high] for high, wide in config.image_grid_pinpoints],
            "unfreeze_mm_vision_tower": True,
        }
    elif family != "llava-v1":
        raw |= {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}
    return raw
