"""Configs of both layouts, each made from the other.

The meaning of upstream's fields: llava/model/llava_arch.py and multimodal_projector/builder.py of haotian-liu/LLaVA.
"""

from __future__ import annotations

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


def projector_type(raw: dict[str, Any]) -> str:
    """Upstream's name of the projector. Raises ModelError for one that Hugging Face's LLaVA does not have."""
    kind = raw.get("mm_projector_type") or "linear"
    if kind not in PROJECTORS:
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
    if feature not in FEATURES:
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


def to_original(config: Any, tower: str, rows: int, family: str) -> dict[str, Any]:
    """Hugging Face's config as upstream's fields.

    tower: the value of ``mm_vision_tower``. rows: of the embedding that is written.

    Raises ModelError for a language model that upstream has no class for.
    """
    text = config.text_config
    kinds = {"llama": ("llava_llama", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM")}
    if text.model_type not in kinds or config.model_type not in UPSTREAM_TYPES:
        raise ModelError(f"upstream LLaVA has no class for {config.model_type} on {text.model_type}; its original layout cannot be written.")
    kind, architecture = kinds[text.model_type]
    language = {k: v for k, v in text.to_dict().items() if not isinstance(v, dict) and k not in {"model_type", "architectures", "dtype", "id2label"}}
    theta = (getattr(text, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    raw: dict[str, Any] = {
        **language,
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": rows,
        "rope_theta": theta,
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
