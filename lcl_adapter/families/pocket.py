"""The base that ships with the project: marks of its own, no system text."""

from __future__ import annotations

from lcl_adapter.families.base import Family

MARKS = ("<|user|>", "<|assistant|>")

POCKET = Family(
    "pocket",
    lambda config, tokenizer: config.model_type == "llava" and "<|user|>" in tokenizer.get_vocab(),
    system="",
    user="<|user|>{image}{text}",
    assistant="<|assistant|>",
    answer="{text}",
    end="</s>",
    marks=MARKS,
)
