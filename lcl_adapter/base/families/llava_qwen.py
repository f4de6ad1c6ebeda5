"""LLaVA-OneVision and LLaVA-Interleave on Qwen2: ``qwen_1_5`` of LLaVA-VL/LLaVA-NeXT (llava/conversation.py).

They were trained with this prompt. Hugging Face's template for them lacks the system text and the line breaks.
"""

from __future__ import annotations

from dataclasses import replace

from lcl_adapter.base.families.base import Family, Match

LLAVA_ONEVISION = Family(
    "llava-onevision",
    Match("llava_onevision", "qwen2", "<|im_end|>"),
    system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>",
    user="\n<|im_start|>user\n{image}{text}<|im_end|>",
    assistant="\n<|im_start|>assistant\n",
    answer="{text}",
    end="<|im_end|>",
    special_tokens=("<|im_start|>",),
)
LLAVA_INTERLEAVE = replace(
    LLAVA_ONEVISION,
    name="llava-interleave",
    matches=Match("llava", "qwen2", "<|im_end|>"),
)
