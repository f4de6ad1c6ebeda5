"""A reference to a base and how it is loaded: one value from the command line to the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.schema import Attention, Precision, Supports


@dataclass(frozen=True)
class BaseRef:
    """A reference to a base. A field that is None was not given: an adapter's manifest or the default decides it.

    name: ``pocket`` (the default), ``photo``, a folder in either layout, or a name in the local Hugging Face cache.
    precision: fp32 by default; nf4 and int8 quantise the linear layers of the language model only; ``auto`` chooses.
    device: "cuda", "mps" or "cpu"; the GPU by default, where the machine has one.
    tower: the vision tower's folder, where the one in an original config is not on this machine.
    tiles: for LLaVA-NeXT and OneVision, reads pictures at twice the size in tiles; off by default.
    attn_implementation: how attention is computed; SDPA by default.
    support_tokens: of a picture that is shown with a label; all of them by default.
    supports: whether such a picture sees those before it; "ordered" by default.
    shots: such pictures of a label that are read together at most; all of them by default.
    orientations: of labelled pictures and a query, in which a question is asked; one by default.
    readings: of an ordered set, before the question; one by default.
    """

    name: str | None = None
    precision: Precision | None = None
    device: str | None = None
    tower: str | None = None
    tiles: bool | None = None
    attn_implementation: Attention | None = None
    support_tokens: int | None = None
    supports: Supports | None = None
    shots: int | None = None
    orientations: int | None = None
    readings: int | None = None

    @classmethod
    def of(cls, base: BaseRef | Recipe | str) -> BaseRef:
        """The reference of a base's name or of a recipe; a reference is returned unchanged."""
        if isinstance(base, Recipe):
            return cls(
                base.base, base.precision, tower=base.vision_tower, tiles=base.tiles, attn_implementation=base.attn_implementation,
                support_tokens=base.image_tokens.most, supports=base.supports, shots=base.most_shots, orientations=base.orientations,
                readings=base.readings,
            )  # fmt: skip
        return cls(base) if isinstance(base, str) else base

    def defaulting_to(self, **values: Any) -> BaseRef:
        """The same reference with these values in the fields that were not given."""
        given = {field.name for field in fields(self) if getattr(self, field.name) is not None}
        return replace(self, **{name: value for name, value in values.items() if name not in given})


NOT_GIVEN = BaseRef()
