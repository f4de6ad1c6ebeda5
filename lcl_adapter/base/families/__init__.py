"""What differs between LLaVA families, one file for each: prompt, end token, image tokens, padding."""

from __future__ import annotations

from typing import Any

from lcl_adapter.base.families.base import IMAGE, Family, Rendered
from lcl_adapter.base.families.llava_15 import LLAVA_15
from lcl_adapter.base.families.llava_next import LLAVA_NEXT_LLAMA_3, LLAVA_NEXT_MISTRAL, LLAVA_NEXT_VICUNA
from lcl_adapter.base.families.llava_qwen import LLAVA_INTERLEAVE, LLAVA_ONEVISION
from lcl_adapter.base.families.llava_v1 import LLAVA_V1
from lcl_adapter.base.families.photo import PHOTO
from lcl_adapter.base.families.pocket import POCKET

# In the order in which they are tried: a specific family before a general one.
FAMILIES = {
    family.name: family
    for family in (POCKET, PHOTO, LLAVA_V1, LLAVA_15, LLAVA_NEXT_MISTRAL, LLAVA_NEXT_LLAMA_3, LLAVA_NEXT_VICUNA, LLAVA_ONEVISION, LLAVA_INTERLEAVE)
}

__all__ = ["FAMILIES", "IMAGE", "Family", "Rendered", "detect"]


def detect(config: Any, tokenizer: Any) -> Family | None:
    """The family of a base by its config and tokenizer; None where no family here matches."""
    return next((family for family in FAMILIES.values() if family.matches(config, tokenizer)), None)
