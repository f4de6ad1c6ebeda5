"""What every part of a recipe is built on: strict mappings, shares, and lists that may be written as a single value."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


IntList = Annotated[list[Annotated[int, Field(ge=0, le=64)]], BeforeValidator(as_list), Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Options(BaseModel):
    """Base of every part of a recipe: unknown keys are refused, values cannot be changed after reading.

    Each model's validator is built when it is first used, because the sources register themselves after this package is
    imported.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
