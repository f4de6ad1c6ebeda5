"""A tiny random LLaVA (under 1 MB) in each prompt family, made on the spot: real classes, no meaning."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lcl_adapter.pocket import tokenizer as tk

WORDS = ["what", "is", "this", "the", "names", "learn", "now", "image", "good", "scratched", "question", "assistant", "user"]


def pocket_tokenizer() -> PreTrainedTokenizerFast:
    return tk.train_tokenizer(WORDS, ["What is this?", "Learn the names. What is this?", "Now, what is this?"])


def vicuna_tokenizer() -> PreTrainedTokenizerFast:
    """Sentencepiece-like BPE with byte fall-back and ▁ for spaces, as Llama 1 and 2 and Vicuna have."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    corpus = ["USER: What is this? ASSISTANT: " + w for w in WORDS] * 4 + [chr(c) for c in range(32, 127)]
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False))
    bpe.pre_tokenizer = None
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )


def save_tiny(folder: Path, family: str = "pocket", seed: int = 0) -> Path:
    """Write a random LLaVA of about 500 kB: 4 tokens an image, width 64 (4-bit blocks are 64 wide), 2 layers."""
    tokenizer = pocket_tokenizer() if family == "pocket" else vicuna_tokenizer()
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=family == "pocket",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=4,
        tie_word_embeddings=family == "pocket",
    )
    side = {"height": 32, "width": 32}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tk.CHAT_TEMPLATE if family == "pocket" else None,
    )
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name and "vision_tower" not in name and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
