"""LLaVA v1 and the published LCL model: LLaVA-1.5's conversation, each image between two extra tokens, white padding.

It is recognised by its linear projector. Hugging Face's LLaVA has two layers; for v1 the second is the identity.
LCL pads with white (mllm/dataset/utils/transform.py of isekai-portal/Link-Context-Learning). v1 itself crops, which
would lose the edges of a picture.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lcl_adapter.base.families.base import IMAGE, is_llava
from lcl_adapter.base.families.llava_15 import LLAVA_15

START, PATCH, END = "<im_start>", "<im_patch>", "<im_end>"


def _matches(config: Any, tokenizer: Any) -> bool:
    return is_llava(config, "llava", "llama") and config.projector_hidden_act == "linear" and START in tokenizer.get_vocab()


LLAVA_V1 = replace(
    LLAVA_15,
    name="llava-v1",
    matches=_matches,
    special_tokens=(START, PATCH, END),
    image=START + IMAGE + END + "\n",
    padding="white",
)
