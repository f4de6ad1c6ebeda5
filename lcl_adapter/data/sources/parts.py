"""What readers of parts to inspect share: which categories of a set are read, and what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, model_validator

from lcl_adapter.data.sources.held_out import HeldOut, split_of
from lcl_adapter.data.sources.images import SUFFIXES
from lcl_adapter.data.sources.tree import Tree
from lcl_adapter.errors import DataError, did_you_mean
from lcl_adapter.recipe.options import as_list
from lcl_adapter.recipe.sources import PartReader


class EmptySplitError(DataError):
    """No category falls into a split."""


class Parts(PartReader, HeldOut):
    """Categories are trained on or held out. ``held_out`` names the held-out ones; else ``hold_out`` is their share."""

    path: Path
    held_out: Annotated[list[str], BeforeValidator(as_list)] = []

    @model_validator(mode="after")
    def _held_out_needs_a_split(self) -> Self:
        if self.split == "all" and self.held_out:
            raise ValueError("`held_out` without `split` holds nothing out: set `split: train` here and `split: held_out` in the suite")
        return self


def categories_of_split(
    categories: Sequence[str], split: str, held_out: Sequence[str], hold_out: float, root: Path, validation: float = 0.0
) -> list[str]:
    """The categories of a split.

    ``held_out`` names those that are held out; if it is empty, their names decide. validation: the share of the split "validation",
    of the others where ``held_out`` names some.

    Raises DataError for a name that is no category; EmptySplitError if the split is empty.
    """
    unknown = [n for n in held_out if n not in categories]
    if unknown:
        listed = ", ".join(f"{n!r}{did_you_mean(n, categories)}" for n in unknown)
        raise DataError(f"{root}: `held_out` names {listed}; there are {', '.join(categories) or 'no categories'}.")

    def own_split(name: str) -> str:
        if name in held_out:
            return "held_out"
        return split_of(name, 0.0 if held_out else hold_out, validation)

    chosen = [n for n in categories if split in {"all", own_split(n)}]
    if not chosen:
        shares = "raise `validation`" if split == "validation" else "name some under `held_out`, or change `hold_out`"
        lower = " or lower `validation`" if split == "train" and validation else ""
        raise EmptySplitError(f"{root}: no category of {len(categories)} falls into split {split!r}; {shares}{lower} in training and evaluation.")
    return chosen


def spaced(name: str) -> str:
    """``metal_nut`` -> "metal nut", as in a sentence."""
    return name.replace("_", " ")


def images_in(tree: Tree, folder: str) -> list[str]:
    """The names of a folder's images."""
    return [name for name in tree.within(folder) if Path(name).suffix.lower() in SUFFIXES]
