"""Load a base of either layout, freeze it, and attach the adapter by full module paths."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForImageTextToText

from lcl_adapter.base.attention import check_available, read_masks
from lcl_adapter.base.encoder import Encoder
from lcl_adapter.base.families import FAMILIES, Family, chat_template, detect
from lcl_adapter.base.layouts import Checkpoint, open_checkpoint
from lcl_adapter.base.layouts.checkpoint import faults_of
from lcl_adapter.base.layouts.configs import LLAVA_TYPES, TILED_TYPES
from lcl_adapter.base.layouts.keys import DROPPED, language_path, skeleton
from lcl_adapter.base.pooling import support_tokens
from lcl_adapter.base.precision import TYPES, check_quantised, choose_precision, compute_type, quantisation
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.devices import default_device
from lcl_adapter.errors import LclError, ModelError
from lcl_adapter.photo import EfficientNetLiteConfig
from lcl_adapter.recipe.schema import QUANTISED, AdapterOptions, Attention, Precision, Supports
from lcl_adapter.terminal import console

# Full path, never a suffix: `q_proj` alone would adapt the vision tower too (peft#2615, LLaVA#1380).
PROJECTIONS = r"(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
PROJECTOR = "multi_modal_projector"


class SupportForm(NamedTuple):
    """In which form the pictures of a support set are read.

    tokens: of each, None for as many as any other has. supports: whether a picture sees those before it.
    shots: of a label that are read together at most, None for all of them. orientations: of all pictures, in which a question
    is asked. readings: how often an ordered set is read.
    """

    tokens: int | None = None
    supports: Supports = "ordered"
    shots: int | None = None
    orientations: int = 1
    readings: int = 1


@dataclass(frozen=True)
class Base:
    """A loaded base with its prompt, its tokenizer and its image processor."""

    model: Any
    checkpoint: Checkpoint
    family: Family
    precision: Precision
    tiles: bool = False
    support_tokens: int | None = None  # of a picture that is shown with a label; None for all of them
    supports: Supports = "ordered"  # whether such a picture sees those before it
    shots: int | None = None  # of an ordered set, the pictures of a label that training showed at most; more are read in parts
    orientations: int = 1  # of such pictures and a query, in which the question is asked
    readings: int = 1  # of an ordered set, one after the other, before the question

    @property
    def form(self) -> SupportForm:
        return SupportForm(self.support_tokens, self.supports, self.shots, self.orientations, self.readings)

    @property
    def support_reading(self) -> list[Any]:
        """What is read in another form than in any chat, for identities; empty for nothing."""
        parts = [f"parts of {self.shots} shots"] if self.shots else []
        parts += [f"{self.orientations} orientations"] if self.orientations > 1 else []
        parts += [f"{self.readings} readings"] if self.readings > 1 else []
        return [*([self.support_tokens] if self.support_tokens else []), *([self.supports] if self.supports != "ordered" else []), *parts]

    @property
    def llava(self) -> Any:
        """The LLaVA itself, without an adapter's wrapper."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def path(self) -> Path:
        return self.checkpoint.folder

    @property
    def tokenizer(self) -> Any:
        return self.checkpoint.tokenizer

    @property
    def image_processor(self) -> Any:
        return self.checkpoint.image_processor

    @property
    def own_projector(self) -> bool:
        """Whether the projector is a module of its own, as in every LLaVA. Other models have one vision module."""
        return self.llava.config.model_type in LLAVA_TYPES

    @property
    def tokens_an_image(self) -> int:
        return self.encoder().tokens_an_image

    @property
    def device(self) -> torch.device:
        return next(self.llava.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations: that of the embedding, which is never quantised."""
        dtype: torch.dtype = self.llava.get_input_embeddings().weight.dtype
        return dtype

    def encoder(self) -> Encoder:
        return _encoder(self.checkpoint, self.family, self.tiles, self.support_tokens, self.supports, self.readings)

    def with_supports(self, tokens: int | None, supports: Supports, shots: int | None = None, orientations: int = 1, readings: int = 1) -> Base:
        """The same model, with so many tokens for a picture that is shown with a label, None for all of them, in an ordered set
        or an independent one, and so many photos of a label in a part of it, None for a whole set. orientations, readings: as of
        :class:`SupportForm`; only an ordered set is read again.

        Raises ModelError where it cannot have so many.
        """
        pooled = tokens and _encoder(self.checkpoint, self.family, self.tiles, tokens).support_tokens
        shots, readings = (shots, readings) if supports == "ordered" else (None, 1)
        return replace(self, support_tokens=pooled, supports=supports, shots=shots, orientations=orientations, readings=readings)

    def with_model(self, model: Any) -> Base:
        return replace(self, model=model)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base alone: adapter and trained projector are switched off."""
        if isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield
        else:
            yield


def side_of(config: Any) -> int:
    """The side in pixels of the square that a picture is resized to; 448 where the model accepts any size."""
    side = getattr(config.vision_config, "image_size", None)
    return int(side) if side else 448


def tokens_an_image(config: Any, tiles: bool = False) -> int:
    """The number of tokens of an image in a LLaVA's prompt.

    They are its patches, the class token where the config selects it, and in NeXT and OneVision a line-break vector.
    With ``tiles``, two by two tiles of the picture at twice the size follow, with a line break for each row.
    """
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    class_token = "clip" in vision.model_type or vision.model_type == EfficientNetLiteConfig.model_type
    patches = side * side + class_token - (config.vision_feature_select_strategy == "default")
    line_break = config.model_type in TILED_TYPES
    return int(patches + (2 * side * (2 * side + 1) if tiles else line_break))


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint. Raises ModelError where neither a family nor a chat template matches."""
    if checkpoint.config.model_type in LLAVA_TYPES and (family := detect(checkpoint.config, checkpoint.tokenizer)):
        return family
    if checkpoint.config.model_type in LLAVA_TYPES:
        raise ModelError(
            f"base {checkpoint.folder}: a {checkpoint.config.model_type!r} on {checkpoint.config.text_config.model_type!r} with end token "
            f"{checkpoint.tokenizer.eos_token!r} is of no family known here. Supported families: {', '.join(FAMILIES)}."
        )
    return chat_template.read_family(checkpoint, side_of(checkpoint.config))


def attention_window(language: Any) -> int | None:
    """How many tokens a token attends to in a language model with a sliding window, itself included; None for all.

    language: its config. Raises ModelError where the layers with a window differ from the others in more than that.
    """
    window, layer_types = getattr(language, "sliding_window", None), getattr(language, "layer_types", None)
    if window is None or (layer_types is not None and "sliding_attention" not in layer_types):
        return None
    if "sliding_attention" in (getattr(language, "rope_parameters", None) or {}):
        raise ModelError("a base whose layers with a sliding window have positions of their own is not supported.")
    return int(window)


def with_full_attention(config: Any) -> Any:
    """The config without a sliding window. Within the window this is the same model, and :func:`load_encoder` limits every
    row to it.

    So several questions can stand behind one support set: together they are longer than the window, each alone is not.
    """
    if attention_window(config.get_text_config()) is None:
        return config
    config = copy.deepcopy(config)
    language = config.get_text_config()
    language.sliding_window = None
    if getattr(language, "layer_types", None) is not None:
        language.layer_types = ["full_attention" if t == "sliding_attention" else t for t in language.layer_types]
    return config


def load_encoder(base: BaseRef | str) -> Encoder:
    """The encoder of a base, without loading its weights: for lengths, masks and previews.

    Raises ModelError as :func:`load_base` does.
    """
    checkpoint = open_checkpoint(base)
    ref = BaseRef.of(base)
    with faults_of(checkpoint.folder, "files do not make a prompt"):
        return _encoder(checkpoint, family_of(checkpoint), bool(ref.tiles), ref.support_tokens, ref.supports or "ordered", ref.readings or 1)


def _encoder(checkpoint: Checkpoint, family: Family, tiles: bool, asked: int | None, supports: Supports = "ordered", readings: int = 1) -> Encoder:
    """asked: tokens of a support picture, None for all. Raises ModelError where it cannot have so many."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    grid = None
    if isinstance(family, chat_template.ChatTemplate):
        image = tokenizer(family.expanded, add_special_tokens=False)["input_ids"]
        # Positions of rows and columns, as in Qwen2-VL
        if "mrope" in str(getattr(config.text_config, "rope_parameters", None)):
            side = math.isqrt(image.count(config.image_token_id))
            grid = (side, side)
    else:
        image = [config.image_token_id] * tokens_an_image(config, tiles)
    pooled = support_tokens(config, len(image), asked, tiles, checkpoint.folder)
    window = attention_window(config.get_text_config())
    context = config.text_config.max_position_embeddings
    width = config.text_config.hidden_size
    return Encoder(family, tokenizer, config.image_token_id, image, context, grid, window, pooled, supports, width, readings)


def load_base(base: BaseRef | str) -> Base:
    """Load a base of either layout, frozen, as its reference specifies.

    nf4 and int8 quantise only the linear layers of the language model, nf4 with double quantisation. ``auto`` chooses.

    Raises ModelError: no such base, no image-text model, weights that do not fit their config, a model without
    ``mm_encoder_outputs``, several readings of pictures that do not see each other.
    """
    ref = BaseRef.of(base).defaulting_to(precision="fp32", device=default_device(), tiles=False, attn_implementation="sdpa")
    supports, readings = ref.supports or "ordered", ref.readings or 1
    if readings > 1 and supports != "ordered":
        raise ModelError(f"readings {readings}: the labelled pictures do not see each other ({supports}), so reading them again changes nothing.")
    precision, device, tiles = cast(Precision, ref.precision), str(ref.device), bool(ref.tiles)
    attention = cast(Attention, ref.attn_implementation)
    checkpoint = open_checkpoint(ref)
    with faults_of(checkpoint.folder, "files do not make a prompt"):
        config, family = with_full_attention(checkpoint.config), family_of(checkpoint)
        pooled = _encoder(checkpoint, family, tiles and config.model_type in TILED_TYPES, ref.support_tokens).support_tokens
    if tiles and config.model_type not in TILED_TYPES:
        raise ModelError(
            f"base {checkpoint.folder}: `tiles` is for LLaVA-NeXT and OneVision; a {config.model_type!r} model reads a picture whole. Remove it."
        )
    _ = checkpoint.image_processor  # a fault in it is reported before any weight is read
    if config.model_type in LLAVA_TYPES:
        _ = checkpoint.weights  # and so is a missing or incomplete shard, or one of another checkpoint
    if precision in QUANTISED and device == "mps":
        raise ModelError(f"precision {precision} is not available on Apple's GPUs: use fp16 (`--precision fp16`).")
    if precision == "auto":
        precision, why = choose_precision(config, device)
        console.print(f"precision auto: {precision}, {why}", highlight=False, markup=False)
    dtype = TYPES.get(precision) or compute_type(device)
    check_available(attention, device, dtype)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention, "config": config}
    if precision in QUANTISED:
        options["quantization_config"] = quantisation(precision, dtype, config)
        options["device_map"] = {"": device}
    try:
        if checkpoint.layout == "hf":
            # transformers' reader accepts pickles that hold tensors only, and never runs code from a checkpoint.
            model, report = AutoModelForImageTextToText.from_pretrained(
                checkpoint.folder, output_loading_info=True, trust_remote_code=False, **options
            )
        else:
            state = {weight_name: weight.read().to(dtype) for weight_name, weight in checkpoint.weights.items()}
            model_class: Any = type(skeleton(config))
            model, report = model_class.from_pretrained(None, state_dict=state, output_loading_info=True, **options)
            del state
            model.name_or_path = str(checkpoint.folder)  # PEFT writes it into an adapter as its base
    except ImportError as error:
        raise ModelError(f'precision {precision} needs bitsandbytes: pip install "lcl-adapter[bnb]", or set `precision: bf16`.') from error
    except LclError:
        raise
    except Exception as error:  # on a config's wrong values, libraries raise anything
        reason = (
            str(error) if isinstance(error, OSError | RuntimeError | ValueError | KeyError | SafetensorError) else f"{type(error).__name__}: {error}"
        )
        raise ModelError(f"base {checkpoint.folder}: the weights cannot be loaded ({reason}).") from error
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = sorted(key for key in map(str, report.get(fault) or ()) if not DROPPED.search(key))
        if keys:
            raise ModelError(f"base {checkpoint.folder}: {fault.replace('_', ' ')} in the weights, for instance {keys[0]}.")
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:  # it would be ignored, and the pictures with it
        raise ModelError(
            f"base {checkpoint.folder}: {type(model).__name__} of transformers {transformers.__version__} accepts no picture features "
            "(`mm_encoder_outputs`). Use another base; for a LLaVA, install transformers 5.23 or newer."
        )
    if precision in QUANTISED:
        check_quantised(model, precision)
    model = model if precision in QUANTISED else model.to(device)
    model.requires_grad_(False).eval()
    read_masks(model, attention)
    return Base(model, checkpoint, family, precision, tiles).with_supports(pooled, supports, ref.shots, ref.orientations or 1, readings)


def lora_targets(model: nn.Module) -> str:
    """A pattern that matches the full module paths of the language model's attention and MLP projections."""
    return rf".*{re.escape(language_path(model).rpartition('.')[2])}\.layers\.\d+\.{PROJECTIONS}"


def attach(base: Base, options: AdapterOptions) -> Base:
    """The base with a new LoRA on the language model, and a trained copy of the projector where the options ask for it.

    Raises ModelError where the projector is to be trained and is no module of its own.
    """
    if options.projector and not base.own_projector:
        raise ModelError(f"`adapter.projector` is for LLaVAs; a {base.llava.config.model_type!r} model has no separate projector. Set it to false.")
    other = {name: options.rank_of(name) for name in ("q_proj", "k_proj") if options.rank_of(name) != options.rank}
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        rank_pattern=other,
        alpha_pattern={name: options.alpha * (rank / options.rank) ** (0.5 if options.rslora else 1) for name, rank in other.items()},
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        use_dora=options.dora,
        init_lora_weights="pissa" if options.pissa else True,
        target_modules=lora_targets(base.llava),
        modules_to_save=[PROJECTOR] if options.projector else None,
        base_model_name_or_path=str(base.path),
    )
    model = get_peft_model(base.llava, config)
    check_adapted(model)
    return base.with_model(model)


def check_adapted(model: PeftModel) -> None:
    """Raises ModelError unless every LoRA layer is in the language model and every language layer has at least one."""
    inside = rf"{re.escape(language_path(model.get_base_model()))}\.layers\.\d+\."
    adapted = [n for n, _ in model.named_modules() if n.endswith(".lora_A")]
    stray = [n for n in adapted if not re.search(inside, n)]
    layers = {match.group(1) for n in adapted if (match := re.search(r"layers\.(\d+)\.", n))}
    count = model.get_base_model().config.text_config.num_hidden_layers
    if stray or len(layers) != count:
        raise ModelError(f"LoRA touches {len(layers)} of {count} language layers and {len(stray)} modules elsewhere: {stray[:1]}.")


def parameters_by_part(model: nn.Module) -> dict[str, dict[str, int]]:
    """{"vision tower" | "projector" | "language model": {"total", "trained"}}.

    A quantised weight is counted by its original shape.
    """
    table = {part: {"total": 0, "trained": 0} for part in ("vision tower", "projector", "language model")}
    llava = model.get_base_model() if isinstance(model, PeftModel) else model
    language = language_path(llava).rpartition(".")[2]
    for name, parameter in model.named_parameters():
        part = "projector" if PROJECTOR in name else "language model" if f"{language}." in name or "lm_head" in name else "vision tower"
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        table[part]["total"] += count
        table[part]["trained"] += count if parameter.requires_grad else 0
    return table
