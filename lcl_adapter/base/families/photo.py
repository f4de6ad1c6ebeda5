"""The photo base, on SmolLM2-135M-Instruct: the chat format of that model, with its own system text."""

from __future__ import annotations

from lcl_adapter.base.families.base import Family, Match

PHOTO = Family(
    "photo",
    Match("llava", "llama", "<|im_start|>", "<|im_end|>", towers=("efficientnet_lite",)),
    system="<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>",
    user="\n<|im_start|>user\n{image}{text}<|im_end|>",
    assistant="\n<|im_start|>assistant\n",
    answer="{text}",
    end="<|im_end|>",
    special_tokens=("<|im_start|>",),
    image="<image>",
    wording="short",
)
