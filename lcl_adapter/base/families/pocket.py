"""The base that ships with the project: special tokens of its own, no system text."""

from __future__ import annotations

from lcl_adapter.base.families.base import Family, Match

SPECIAL_TOKENS = ("<|user|>", "<|assistant|>")

POCKET = Family(
    "pocket",
    Match("llava", "llama", "<|user|>", "</s>"),
    system="",
    user="<|user|>{image}{text}",
    assistant="<|assistant|>",
    answer="{text}",
    end="</s>",
    special_tokens=SPECIAL_TOKENS,
    wording="short",
)
