"""Classes that are held out, for evaluation and for the weights of a judgement. Their names alone decide, so that every run holds
out the same ones.
"""

from __future__ import annotations

import hashlib
from typing import Literal, Self

from pydantic import Field, model_validator

from lcl_adapter.data.sources.encodings import nfc
from lcl_adapter.recipe.options import Share
from lcl_adapter.recipe.sources import FileReader

Split = Literal["all", "train", "validation", "held_out"]


class HeldOut(FileReader):
    """Options of a reader that can hold classes out.

    hold_out: the share of classes that are held out for evaluation. validation: the share of those that are neither trained on nor
    evaluated; ``evaluate.validation`` fits the weights of a judgement on them.
    """

    split: Split = "all"
    hold_out: Share = 0.2
    validation: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _hold_out_needs_a_split(self) -> Self:
        if self.split == "all" and self.hold_out != HeldOut.model_fields["hold_out"].default:
            raise ValueError("`hold_out` without `split` holds nothing out: set `split: train` here and `split: held_out` in the suite")
        if self.split == "all" and self.validation:
            raise ValueError("`validation` without `split` holds nothing out: set `split: train` here and `split: validation` in the suite")
        if self.split == "validation" and not self.validation:
            raise ValueError("`split: validation` needs `validation`, the share of classes, here and in the training source")
        if self.validation and self.hold_out + self.validation >= 1:
            raise ValueError(f"`hold_out` and `validation` are {self.hold_out + self.validation:g} of the classes together: none is left to train on")
        return self


def is_held_out(class_name: str, share: float) -> bool:
    """Whether a class is held out. Its name alone decides, so that a new class changes nothing for the others."""
    digest = hashlib.sha256(nfc(class_name).encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < share


def split_of(class_name: str, hold_out: float, validation: float = 0.0) -> Split:
    """The split of a class: "held_out", "validation" or "train"."""
    if is_held_out(class_name, hold_out):
        return "held_out"
    return "validation" if is_held_out(class_name, hold_out + validation) else "train"


def in_split(class_name: str, split: str, hold_out: float, validation: float = 0.0) -> bool:
    """Whether a class belongs to ``split``, which may be "all"."""
    return split in {"all", split_of(class_name, hold_out, validation)}


def held_out_shares(hold_out: float, validation: float) -> str:
    """As a recipe has them, for messages."""
    return f"`hold_out: {hold_out}`" + (f" and `validation: {validation}`" if validation else "")
