"""How an adapter was trained to read the pictures of a support set, as its manifest says, and notes where that is not what happens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcl_adapter.base.model import Base
from lcl_adapter.recipe.schema import Supports


def trained_supports(manifest: Mapping[str, Any]) -> Supports:
    """Whether a labelled picture saw those before it."""
    supports: Supports = manifest.get("supports", "ordered")
    return supports


def trained_tokens(manifest: Mapping[str, Any]) -> tuple[int, ...]:
    """The numbers of tokens that a picture shown with a label had, from the largest on; empty for all tokens."""
    given = manifest.get("support_tokens") or []
    return tuple(sorted(given if isinstance(given, list) else [given], reverse=True))


def most_tokens(manifest: Mapping[str, Any]) -> int | None:
    """The largest of them, with which an adapter is asked where nothing else is said; None for all tokens."""
    return max(trained_tokens(manifest), default=None)


def trained_shots(manifest: Mapping[str, Any]) -> int | None:
    """Photos of a label that training showed together, at most; None where the manifest does not say it."""
    shots: int | None = manifest.get("shots")
    return shots


def orientations_of(manifest: Mapping[str, Any]) -> int:
    """In how many orientations a question about labelled pictures is asked."""
    return int(manifest.get("orientations", 1))


def readings_of(manifest: Mapping[str, Any]) -> int:
    """How often an ordered set is read before a question."""
    return int(manifest.get("readings", 1))


def asked_otherwise(manifest: Mapping[str, Any], asked: Base) -> list[str]:
    """Notes where an adapter is asked in another form than it was trained in."""
    notes = []
    trained, supports, whole = trained_tokens(manifest), trained_supports(manifest), asked.tokens_an_image
    if (asked.support_tokens or whole) not in (trained or (whole,)):
        differ = f"{_tokens(*trained)} for a picture shown with a label, and is asked with {_tokens(*filter(None, [asked.support_tokens]))}"
        notes.append(f"the adapter was trained with {differ}")
    if supports != asked.supports:
        notes.append(f"the adapter was trained with {supports} support sets, and is asked with {asked.supports} ones")
    if (own := orientations_of(manifest)) != asked.orientations:
        notes.append(f"the adapter's recipe asks a question in {_orientations(own)}, and here it is asked in {_orientations(asked.orientations)}")
    if (own := readings_of(manifest)) != asked.readings:
        notes.append(f"the adapter's recipe reads a set {_times(own)} before a question, and here it is read {_times(asked.readings)}")
    return notes


def spent_elsewhere(manifest: Mapping[str, Any]) -> list[str]:
    """Notes for an adapter that leaves this package: only this package pools pictures, and reads them without each other."""
    notes = []
    if trained := trained_tokens(manifest):
        notes.append(
            f"trained with {_tokens(*trained)} for a picture shown with a label; vLLM, upstream LLaVA and other programs spend all tokens on every "
            "picture. What that changes is measured by `lcl-adapter eval RUN image_tokens.support=ALL`, where ALL is the tokens of a whole picture"
        )
    if (supports := trained_supports(manifest)) != "ordered":
        words = ", and of which a question sees only the words beside them" if supports == "compressed" else ""
        notes.append(
            f"trained with labelled pictures that do not see each other{words}; in vLLM, upstream LLaVA and other programs they are read as in any "
            "chat. What that changes is measured by `lcl-adapter eval RUN supports=ordered`"
        )
    if (own := orientations_of(manifest)) > 1:
        notes.append(
            f"asked in {_orientations(own)} here; vLLM, upstream LLaVA and other programs ask a question once. What that changes is measured by "
            "`lcl-adapter eval RUN orientations=1`"
        )
    if (own := readings_of(manifest)) > 1:
        notes.append(
            f"a set is read {_times(own)} here; send its labelled photos {_times(own)}, one set after the other, in vLLM, upstream LLaVA and other "
            "programs. What is lost without it is measured by `lcl-adapter eval RUN readings=1`"
        )
    return notes


def trained_otherwise(first: Mapping[str, Any], second: Mapping[str, Any], name: str) -> list[str]:
    """Notes where two adapters of one merge were trained to read support sets differently. name: the second one's."""
    notes = []
    if trained_supports(first) != trained_supports(second):
        notes.append(f"{name} was trained with {trained_supports(second)} support sets, the first adapter with {trained_supports(first)} ones")
    if trained_tokens(first) != trained_tokens(second):
        differ = f"{_tokens(*trained_tokens(second))} for a picture shown with a label, the first adapter with {_tokens(*trained_tokens(first))}"
        notes.append(f"{name} was trained with {differ}")
    if (own := readings_of(second)) != readings_of(first):
        notes.append(
            f"{name} was trained with sets that are read {_times(own)}, the first adapter with sets that are read {_times(readings_of(first))}"
        )
    return notes


def _orientations(count: int) -> str:
    return f"{count} orientations" if count > 1 else "one orientation"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _tokens(*counts: int) -> str:
    return f"{' or '.join(map(str, counts))} tokens" if counts else "all tokens"
