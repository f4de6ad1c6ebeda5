"""LLaVA-1.5 on Vicuna: upstream's ``vicuna_v1`` conversation (llava/conversation.py).

Pictures are padded with the mean colour.
"""

from __future__ import annotations

from lcl_adapter.base.families.base import Family, Match

LLAVA_15 = Family(
    "llava-1.5",
    Match("llava", "llama", end="</s>"),
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
    user="USER: {image}{text} ",
    assistant="ASSISTANT:",
    answer=" {text}",
    end="</s>",
    both_layouts=True,
)
