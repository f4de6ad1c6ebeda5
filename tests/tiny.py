"""Tiny random bases (under 1 MB) of each prompt family and both layouts, of the real model classes."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
)

from lcl_adapter.base.layouts.tensors import tensors_in_folder
from lcl_adapter.photo import EfficientNetLiteConfig
from tools.pocket import tokenizer as tk

WORDS = ["what", "is", "this", "the", "names", "learn", "now", "image", "good", "scratched", "question", "assistant", "user"]
CORPUS = ["USER: What is this? ASSISTANT: " + w for w in WORDS] * 4
SIDE = 32  # of an image, in pixels; patches are of 16
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLVLM = (
    "{% for m in messages %}{% if loop.first %}<|im_start|>{% endif %}{{ m['role'] | capitalize + ':' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ ' ' + c['text'] }}{% endif %}{% endfor %}{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def pocket_tokenizer() -> PreTrainedTokenizerFast:
    return tk.train_tokenizer(WORDS, ["What is this?", "Learn the names. What is this?", "Now, what is this?"])


def vicuna_tokenizer(special: Sequence[str] = (), **named: Any) -> PreTrainedTokenizerFast:
    """BPE like sentencepiece's, with byte fall-back and ▁ for spaces: as in Llama 1 and 2, Vicuna and Mistral."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    first = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    bpe.train_from_iterator(CORPUS + [chr(c) for c in range(32, 127)], trainers.BpeTrainer(vocab_size=700, special_tokens=first, show_progress=False))
    bpe.pre_tokenizer = None
    bpe.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", **named},
        clean_up_tokenization_spaces=False,
    )


def byte_tokenizer(special: Sequence[str], eos: str, image: str, bos: str | None = None, **named: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in Qwen2 and Llama 3."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens([*special, image])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=special[0], extra_special_tokens={"image_token": image, **named}
    )


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    match family:
        case "pocket":
            return pocket_tokenizer()
        case "llava-v1":
            return vicuna_tokenizer(["<im_patch>", "<im_start>", "<im_end>"], image_token="<im_patch>")
        case "llava-next-llama-3":
            special = ["<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
            return byte_tokenizer(special, "<|eot_id|>", "<image>", "<|begin_of_text|>")
        case "photo" | "llava-onevision" | "llava-interleave":
            return byte_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", "<image>")
        case "qwen2-vl":
            special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
            return byte_tokenizer(special, "<|im_end|>", "<|image_pad|>", video_token="<|video_pad|>")
        case "smolvlm":
            special = ["<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>"]
            return byte_tokenizer(
                special, "<end_of_utterance>", "<image>", "<|im_start|>",
                fake_image_token="<fake_token_around_image>", global_image_token="<global-img>", end_of_utterance_token="<end_of_utterance>",
            )  # fmt: skip
        case _:
            return vicuna_tokenizer()


def language(kind: type, tokenizer: Any, **more: Any) -> Any:
    """A language model's config of width 64 (4-bit blocks are 64 wide) and 2 layers."""
    return kind(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def config_of(family: str, tokenizer: Any) -> Any:
    image = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16}
    if family == "qwen2-vl":
        sections = {"rope_type": "default", "type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
        text = language(Qwen2Config, tokenizer).to_dict() | {"model_type": "qwen2_vl_text", "rope_parameters": sections}
        vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 16, "hidden_size": 64, "mlp_ratio": 1, "spatial_merge_size": 2}
        video = tokenizer.convert_tokens_to_ids("<|video_pad|>")
        begin, end = (tokenizer.convert_tokens_to_ids(f"<|vision_{w}|>") for w in ("start", "end"))
        ids = {"image_token_id": image, "video_token_id": video, "vision_start_token_id": begin, "vision_end_token_id": end}
        return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    if family == "smolvlm":
        return SmolVLMConfig(
            text_config=language(LlamaConfig, tokenizer).to_dict(),
            vision_config=small | {"image_size": SIDE},
            image_token_id=image,
            scale_factor=1,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
    clip = CLIPVisionConfig(**small, image_size=SIDE)
    siglip = SiglipVisionConfig(**small, image_size=SIDE)
    tied = family in {"pocket", "photo"}
    common = {"image_token_id": image, "image_seq_length": 4, "vision_feature_layer": -2, "tie_word_embeddings": tied}
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    match family:
        case "llava-onevision":
            return LlavaOnevisionConfig(
                vision_config=siglip, text_config=language(Qwen2Config, tokenizer), image_grid_pinpoints=pinpoints,
                vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9", **{**common, "vision_feature_layer": -1},
                video_token_id=len(tokenizer) + 5,
            )  # fmt: skip
        case "photo":
            # The tower's widths are fixed; 9 MB are its smallest size.
            text = language(LlamaConfig, tokenizer, tie_word_embeddings=tied)
            options = {**common, "image_seq_length": 2, "vision_feature_layer": -1, "projector_hidden_act": "linear"}
            return LlavaConfig(
                vision_config=EfficientNetLiteConfig(image_size=SIDE), text_config=text, vision_feature_select_strategy="full", **options
            )
        case "llava-interleave":
            text = language(Qwen2Config, tokenizer)
            return LlavaConfig(
                vision_config=siglip, text_config=text, vision_feature_select_strategy="full", **{**common, "vision_feature_layer": -1}
            )
        case "llava-next-vicuna" | "llava-next-mistral" | "llava-next-llama-3":
            text = language(MistralConfig, tokenizer, sliding_window=None) if "mistral" in family else language(LlamaConfig, tokenizer)
            return LlavaNextConfig(vision_config=clip, text_config=text, image_grid_pinpoints=pinpoints, **common)
        case _:
            text = language(LlamaConfig, tokenizer, tie_word_embeddings=tied)
            act = "linear" if family == "llava-v1" else "gelu"
            return LlavaConfig(vision_config=clip, text_config=text, vision_feature_select_strategy="default", projector_hidden_act=act, **common)


def save_tiny(folder: Path, family: str = "pocket", seed: int = 0) -> Path:
    """Write a random base in Hugging Face's layout, with 4 tokens for each image; of the family ``photo``, with 2."""
    tokenizer = tokenizer_of(family)
    config = config_of(family, tokenizer)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    enlarge_weights(model)
    if family == "llava-v1":
        projector = model.model.multi_modal_projector.linear_2
        torch.nn.init.eye_(projector.weight)
        torch.nn.init.zeros_(projector.bias)
    model.half().save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    options: dict[str, Any] = {}
    match family:
        case "qwen2-vl":
            images: Any = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64})
            options = {"processor_class": "Qwen2VLProcessor"}
            tokenizer.chat_template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
        case "smolvlm":
            images = SmolVLMImageProcessorPil(size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE})
            options = {"processor_class": "SmolVLMProcessor", "image_seq_len": 4}
            tokenizer.chat_template = SMOLVLM
        case "llava-onevision":
            images = LlavaOnevisionImageProcessorPil(size=side, image_grid_pinpoints=config.image_grid_pinpoints)
        case _ if family.startswith("llava-next"):
            clip = {"size": {"shortest_edge": SIDE}, "crop_size": side}
            images = LlavaNextImageProcessorPil(**clip, image_grid_pinpoints=config.image_grid_pinpoints)
        case _:
            images = CLIPImageProcessorPil(size=side, crop_size=side)
            template = tk.CHAT_TEMPLATE if family == "pocket" else None
            settings = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
            if family == "photo":
                settings |= {"patch_size": SIDE, "vision_feature_select_strategy": "full"}
            LlavaProcessor(images, tokenizer, **settings, chat_template=template).save_pretrained(folder)
            return folder
    images.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(options))
    return folder


def enlarge_weights(model: torch.nn.Module) -> None:
    """Make the weights so large that every part of the model changes the logits."""
    for name, parameter in model.named_parameters():
        if "norm" not in name and "vision_tower" not in name and "visual" not in name and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)


VERSIONS = ("v1", "v1.5", "v1.6")


def sentencepiece_model() -> bytes:
    """A tiny sentencepiece model with Llama's settings."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, model_type="bpe", vocab_size=400, byte_fallback=True, character_coverage=1.0,
        split_digits=True, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False, required_chars="".join(map(chr, range(33, 127))), minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


def save_original(
    folder: Path, version: str = "v1.5", seed: int = 0, pickled: bool = False, shards: int = 1, tower_inside: int = 32, tower_layers: int = 2
) -> Path:
    """Write a random base in the original layout, with upstream's keys and fields; its tower is in ``<folder>-tower``.

    tower_inside: the width inside the tower's layers.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tower = folder.with_name(folder.name + "-tower")
    torch.manual_seed(seed)
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=tower_inside, num_hidden_layers=tower_layers, num_attention_heads=2, patch_size=16, image_size=SIDE
        )
    )
    tower.mkdir(exist_ok=True)
    vision.config.save_pretrained(tower)
    named = {f"vision_model.{k.removeprefix('vision_model.')}": v.contiguous() for k, v in vision.state_dict().items()}
    save_file(named, tower / "model.safetensors", metadata={"format": "pt"})
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(tower)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    token = {"content": "", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    special = {"bos_token": token | {"content": "<s>"}, "eos_token": token | {"content": "</s>"}, "unk_token": token | {"content": "<unk>"}}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False, "pad_token": "<unk>",
                    "model_max_length": 2048, **{k: {**v, "__type": "AddedToken"} for k, v in special.items()}})
    )  # fmt: skip
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": "<unk>"}))
    words = 400
    if version == "v1":
        (folder / "added_tokens.json").write_text(json.dumps({"<im_patch>": 400, "<im_start>": 401, "<im_end>": 402}))
        words += 3
    fields: dict[str, Any] = {
        "v1": {"model_type": "llava", "mm_use_im_start_end": True},
        "v1.5": {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
                 "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"},
        "v1.6": {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
                 "mm_vision_select_feature": "patch", "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad",
                 "image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]], "unfreeze_mm_vision_tower": True},
    }[version.removesuffix("-mistral")]  # fmt: skip
    if version.endswith("-mistral"):
        fields = {**fields, "model_type": "llava_mistral", "sliding_window": 4096}
    config = {
        "architectures": ["LlavaLlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 1024, "vocab_size": words,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True,
        "mm_hidden_size": 32, "mm_vision_select_layer": -2, "mm_vision_tower": str(tower), "use_mm_proj": True, "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False, "transformers_version": "4.37.2", **fields,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}))

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) * 0.3).half()

    state = {"model.embed_tokens.weight": random(words, 64), "lm_head.weight": random(words, 64), "model.norm.weight": torch.ones(64).half()}
    for n in range(2):
        layer = f"model.layers.{n}."
        state |= {f"{layer}self_attn.{p}_proj.weight": random(64, 64) for p in "qkvo"}
        state |= {
            f"{layer}mlp.gate_proj.weight": random(128, 64),
            f"{layer}mlp.up_proj.weight": random(128, 64),
            f"{layer}mlp.down_proj.weight": random(64, 128),
        }
        state |= {f"{layer}{norm}.weight": torch.ones(64).half() for norm in ("input_layernorm", "post_attention_layernorm")}
        state[f"{layer}self_attn.rotary_emb.inv_freq"] = torch.arange(16).half()
    if version == "v1":
        state |= {"model.mm_projector.weight": random(64, 32), "model.mm_projector.bias": random(64)}
    else:
        state |= {"model.mm_projector.0.weight": random(64, 32), "model.mm_projector.0.bias": random(64)}
        state |= {"model.mm_projector.2.weight": random(64, 64), "model.mm_projector.2.bias": random(64)}
    if version.startswith("v1.6"):
        state["model.image_newline"] = random(64)
        state |= {f"model.vision_tower.vision_tower.{k}": v.half() for k, v in named.items()}
    # No byte token is ever generated: slow and fast tokenizers decode broken UTF-8 differently
    state["lm_head.weight"][3:259] = 0
    keys = list(state)
    size = -(-len(keys) // shards)
    parts = [{key: state[key] for key in keys[start : start + size]} for start in range(0, len(keys), size)]
    suffix = "bin" if pickled else "safetensors"
    stem = "pytorch_model" if pickled else "model"
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{number:05d}-of-{len(parts):05d}.{suffix}"
        torch.save(part, folder / name) if pickled else save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        index = "pytorch_model.bin.index.json" if pickled else "model.safetensors.index.json"
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder


def save_language(folder: Path, llava: Path, pickled: bool = False) -> Path:
    """The language model alone of a base in the original layout: the input of upstream's `finetune_lora.sh`.

    pickled: in two shards, as Vicuna was published.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for file in llava.iterdir():
        if file.suffix not in {".safetensors", ".bin"} and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((llava / "config.json").read_text())
    language_config = {
        key: value for key, value in config.items() if not key.startswith(("mm_", "image_", "use_mm", "tune_", "freeze_", "unfreeze_"))
    }
    (folder / "config.json").write_text(json.dumps({**language_config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    state = {
        key: tensor.read() for key, tensor in tensors_in_folder(llava).items() if not key.startswith(("model.mm_", "model.vision", "model.image"))
    }
    if not pickled:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for number, keys in enumerate((list(state)[:9], list(state)[9:]), 1):
        name = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({key: state[key] for key in keys}, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder
