"""Classes that are held out for evaluation. Their names alone decide, so that every run holds out the same ones."""

from __future__ import annotations

import hashlib
from typing import Literal, Self

from pydantic import model_validator

from lcl_adapter.data.sources.encodings import nfc
from lcl_adapter.recipe.options import Share
from lcl_adapter.recipe.sources import FileReader

Split = Literal["all", "train", "held_out"]


class HeldOut(FileReader):
    """Options of a reader that can hold classes out. ``hold_out`` is the share of classes that are held out."""

    split: Split = "all"
    hold_out: Share = 0.2

    @model_validator(mode="after")
    def _hold_out_needs_a_split(self) -> Self:
        if self.split == "all" and self.hold_out != HeldOut.model_fields["hold_out"].default:
            raise ValueError("`hold_out` without `split` holds nothing out: set `split: train` here and `split: held_out` in the suite")
        return self


def is_held_out(class_name: str, share: float) -> bool:
    """Whether a class is held out. Its name alone decides, so that a new class changes nothing for the others."""
    digest = hashlib.sha256(nfc(class_name).encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < share


def in_split(class_name: str, split: str, hold_out: float) -> bool:
    """Whether a class belongs to ``split``: "all", "train" or "held_out"."""
    return split == "all" or is_held_out(class_name, hold_out) == (split == "held_out")
