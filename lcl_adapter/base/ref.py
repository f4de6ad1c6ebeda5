"""Which base, and how it is to be loaded: one value from the command line to the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.schema import Precision


@dataclass(frozen=True)
class BaseRef:
    """A reference to a base. A field that is None was not given: an adapter's manifest decides it, or the default does.

    name: ``pocket`` (the default), a folder in either layout, or a name in the local Hugging Face cache.
    precision: fp32 by default; nf4 and int8 quantise the linear layers of the language model alone; ``auto`` chooses.
    device: the GPU by default, where there is one.
    tower: the vision tower's folder, where a config in the original layout names one that is elsewhere.
    tiles: LLaVA-NeXT's and OneVision's pictures at twice the size in tiles; off by default.
    """

    name: str | None = None
    precision: Precision | None = None
    device: str | None = None
    tower: str | None = None
    tiles: bool | None = None

    @classmethod
    def of(cls, base: BaseRef | Recipe | str) -> BaseRef:
        """A base's name, or the base of a recipe, as a reference; a reference as it is."""
        if isinstance(base, Recipe):
            return cls(base.base, base.precision, tower=base.vision_tower, tiles=base.tiles)
        return cls(base) if isinstance(base, str) else base

    def defaulting_to(self, **values: Any) -> BaseRef:
        """The same with these values where nothing was given."""
        given = {field.name for field in fields(self) if getattr(self, field.name) is not None}
        return replace(self, **{name: value for name, value in values.items() if name not in given})


NOT_GIVEN = BaseRef()
