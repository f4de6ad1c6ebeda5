"""LLaVA-NeXT (1.6): one prompt for each language model that it was published on.

Vicuna     as LLaVA-1.5
Mistral    upstream's ``mistral_instruct`` conversation (llava/conversation.py)
Llama 3    ``llava_llama_3`` of LLaVA-VL/LLaVA-NeXT (llava/conversation.py), Llama 3's own header format
"""

from __future__ import annotations

from dataclasses import replace

from lcl_adapter.base.families.base import Family, Match
from lcl_adapter.base.families.llava_15 import LLAVA_15

LLAVA_NEXT_VICUNA = replace(
    LLAVA_15,
    name="llava-next-vicuna",
    matches=Match("llava_next", "llama", end="</s>"),
)

LLAVA_NEXT_MISTRAL = Family(
    "llava-next-mistral",
    Match("llava_next", "mistral", end="</s>"),
    system="",
    user="[INST] {image}{text} ",
    assistant="[/INST]",
    answer=" {text} ",
    end="</s>",
    special_tokens=("[INST]", "[/INST]"),
    both_layouts=True,
)

LLAVA_NEXT_LLAMA_3 = Family(
    "llava-next-llama-3",
    Match("llava_next", "llama", "<|eot_id|>"),
    system="<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language.<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{image}{text}<|eot_id|>",
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
    answer="{text}",
    end="<|eot_id|>",
    special_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"),
)
