"""Load a base, freeze it, attach the adapter. The one place that knows about precisions and module paths."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BitsAndBytesConfig, LlavaForConditionalGeneration, LlavaProcessor

from lcl_adapter.batches import Encoder
from lcl_adapter.errors import ModelError
from lcl_adapter.families import Family, detect
from lcl_adapter.pocket import BASE as POCKET_BASE
from lcl_adapter.recipe.schema import AdapterOptions, Precision

# Full path, never a suffix: `q_proj` alone would adapt the vision tower too (peft#2615, LLaVA#1380).
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
PROJECTOR = "multi_modal_projector"
# transformers 5: giving any list drops the automatic skip of lm_head, and bare names match nothing.
NOT_QUANTISED = ["lm_head", ".*vision_tower.*", ".*multi_modal_projector.*"]


@dataclass(frozen=True)
class Base:
    """A loaded base with everything that belongs to its prompt and pixels."""

    model: LlavaForConditionalGeneration | PeftModel
    processor: LlavaProcessor
    family: Family
    path: Path
    precision: Precision

    @property
    def llava(self) -> LlavaForConditionalGeneration:
        """The LLaVA itself, under an adapter's wrapper or not."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def tokens_an_image(self) -> int:
        return tokens_an_image(self.llava.config)

    @property
    def device(self) -> torch.device:
        return next(self.llava.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type activations have: the vision tower's, which is never quantised."""
        return next(self.llava.model.vision_tower.parameters()).dtype

    def encoder(self) -> Encoder:
        return _encoder(self.family, self.processor.tokenizer, self.llava.config)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base alone, adapter and trained projector switched off."""
        if isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield
        else:
            yield


def tokens_an_image(config: Any) -> int:
    """How many places an image takes in a prompt: its patches, and the class token where that is kept."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return int(side * side + (config.vision_feature_select_strategy == "full"))


def load_encoder(name: str) -> Encoder:
    """The prompt side of a base, without its weights: for lengths, masks and previews.

    Raises ModelError as :func:`load_base` does.
    """
    path = find_base(name)
    config, tokenizer = _config(path), _tokenizer(path)
    return _encoder(detect(config, tokenizer), tokenizer, config)


def _encoder(family: Family, tokenizer: Any, config: Any) -> Encoder:
    return Encoder(family, tokenizer, config.image_token_id, tokens_an_image(config), config.text_config.max_position_embeddings)


def find_base(name: str) -> Path:
    """``pocket``, a folder, or a name in the local Hugging Face cache. Nothing is downloaded.

    Raises ModelError where there is none.
    """
    if name == "pocket":
        return POCKET_BASE
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # what it raises differs from version to version
        raise ModelError(
            f"base {name!r}: no such folder, and not in the local Hugging Face cache. Give a folder, or fetch it first: `hf download {name}`."
        ) from error


def load_base(name: str, precision: Precision = "fp32", device: str | None = None) -> Base:
    """Load a LLaVA in Hugging Face layout, frozen, in the precision asked; on ``device``, else on the GPU where there is one.

    nf4 quantises the linear layers of the language model alone, with double quantisation.

    Raises ModelError: no such base, no LLaVA, weights that do not fit their config.
    """
    path = find_base(name)
    config, tokenizer = _config(path), _tokenizer(path)
    family = detect(config, tokenizer)
    processor = _processor(path, tokenizer, config)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if precision == "fp32" or (precision == "nf4" and device == "cpu") else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "attn_implementation": "sdpa"}
    if precision == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=NOT_QUANTISED,
        )
        options["device_map"] = {"": device}
    try:
        model, report = LlavaForConditionalGeneration.from_pretrained(path, config=config, output_loading_info=True, **options)
    except ImportError as error:
        raise ModelError('precision nf4 needs bitsandbytes: pip install "lcl-adapter[bnb]", or set `precision: fp32` or bf16.') from error
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ModelError(f"base {path}: the weights cannot be loaded ({error}).") from error
    for fault in ("missing_keys", "mismatched_keys"):
        if report.get(fault):
            raise ModelError(f"base {path}: {fault.replace('_', ' ')} in the weights, for instance {sorted(map(str, report[fault]))[0]}.")
    if precision == "nf4":
        _check_quantised(model)
    model = model if precision == "nf4" else model.to(device)
    model.requires_grad_(False).eval()
    return Base(model, processor, family, path, precision)


def attach(base: Base, options: AdapterOptions) -> Base:
    """A fresh LoRA on the language model, and the projector as a trained copy where asked."""
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        use_dora=options.dora,
        target_modules=LORA_TARGETS,
        modules_to_save=[PROJECTOR] if options.projector else None,
        base_model_name_or_path=str(base.path),
    )
    model = get_peft_model(base.llava, config)
    check_adapted(model)
    return Base(model, base.processor, base.family, base.path, base.precision)


def check_adapted(model: PeftModel) -> None:
    """Every LoRA layer is in the language model, and there is at least one in every layer.

    Raises ModelError otherwise.
    """
    adapted = [n for n, _ in model.named_modules() if n.endswith(".lora_A")]
    stray = [n for n in adapted if not re.search(r"language_model\.layers\.\d+\.", n)]
    layers = {match.group(1) for n in adapted if (match := re.search(r"layers\.(\d+)\.", n))}
    count = model.get_base_model().config.text_config.num_hidden_layers
    if stray or len(layers) != count:
        raise ModelError(f"LoRA touches {len(layers)} of {count} language layers and {len(stray)} modules elsewhere: {stray[:1]}.")


def parameters_by_part(model: nn.Module) -> dict[str, dict[str, int]]:
    """{"vision tower" | "projector" | "language model": {"total", "trained"}}; 4-bit weights counted as what they stand for."""
    table = {part: {"total": 0, "trained": 0} for part in ("vision tower", "projector", "language model")}
    for name, parameter in model.named_parameters():
        part = "vision tower" if "vision_tower" in name else "projector" if PROJECTOR in name else "language model"
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        table[part]["total"] += count
        table[part]["trained"] += count if parameter.requires_grad else 0
    return table


def _config(path: Path) -> Any:
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"base {path}: no config.json in it, so it is no checkpoint.") from error
    except ValueError as error:
        raise ModelError(f"base {path}: config.json is not JSON ({error}).") from error
    if "mm_vision_tower" in raw and "vision_config" not in raw:
        raise ModelError(f"base {path}: this is the original LLaVA layout; give the same checkpoint in Hugging Face layout (llava-hf/…).")
    if raw.get("model_type") != "llava":
        raise ModelError(f"base {path}: a {raw.get('model_type')!r} model, not a LLaVA (model_type 'llava').")
    return AutoConfig.from_pretrained(path)


def _tokenizer(path: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"base {path}: its tokenizer cannot be loaded ({error}).") from error


def _processor(path: Path, tokenizer: Any, config: Any) -> LlavaProcessor:
    try:
        images = AutoImageProcessor.from_pretrained(path, backend="pil")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"base {path}: its image processor cannot be loaded ({error}).") from error
    settings = {}
    for name in ("processor_config.json", "chat_template.jinja"):
        if (path / name).exists():
            text = (path / name).read_text(encoding="utf-8")
            settings[name] = json.loads(text) if name.endswith(".json") else text
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=settings.get("chat_template.jinja"),
    )


def _check_quantised(model: nn.Module) -> None:
    import bitsandbytes as bnb

    four_bit = [n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    stray = [n for n in four_bit if "language_model" not in n]
    if not four_bit or stray:
        raise ModelError(f"4-bit loading quantised {len(four_bit)} modules, {len(stray)} of them outside the language model: {stray[:1]}.")
