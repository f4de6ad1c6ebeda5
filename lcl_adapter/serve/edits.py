"""A stored set that grows or shrinks by one photo: which examples the next version has."""

from __future__ import annotations

from collections.abc import Sequence

from lcl_adapter.answering import api_types
from lcl_adapter.errors import RequestError
from lcl_adapter.serve.store import Example


def with_photo(examples: Sequence[Example], added: Example) -> tuple[Example, ...]:
    """The examples with one more behind them.

    Raises RequestError: too many, a label that is another spelling of one of the set's, or a photo that has this label already.
    """
    if len(examples) >= api_types.MAX_IMAGES:
        raise RequestError(f"the set has {len(examples)} photos, and a set has at most {api_types.MAX_IMAGES}: drop one first.")
    if added in examples:
        raise RequestError(f"the set has this photo as {added.label!r} already (photo {list(examples).index(added)}): nothing was stored.")
    changed = (*examples, added)
    try:
        api_types.check_labels(changed)
    except ValueError as error:
        raise RequestError(f"{error}: nothing was stored.") from error
    return changed


def without_photo(examples: Sequence[Example], number: int) -> tuple[Example, ...]:
    """The examples without one. number: its place in the set, from 0.

    Raises RequestError: no such photo, or it is the only one of its label.
    """
    if not 0 <= number < len(examples):
        raise RequestError(f"there is no photo {number}: the set has the photos 0 to {len(examples) - 1}.")
    label = examples[number].label
    if sum(example.label == label for example in examples) == 1:
        raise RequestError(
            f"photo {number} is the only one of {label!r}, and the label would go with it: add another first, or store the set without this label."
        )
    return tuple(example for place, example in enumerate(examples) if place != number)
