"""Keys of a recipe that have another name now.

The old name is still read, and a note on the terminal gives the new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from lcl_adapter.terminal import console

Key = tuple[str, ...]
Places = dict[Key, str]  # where each key was written: "file, line 3" or "override 'a=b'"

# The old key -> its last part's new name. A star stands for any name.
RENAMED: Mapping[Key, str] = {
    ("evaluate", "keep"): "retention",
    ("sources", "*", "other_hands"): "other_artists",
    ("sources", "*", "columns", "hand"): "artist",
    ("sources", "*", "keep"): "cache_size",
    ("evaluate", "suites", "*", "source", "columns", "hand"): "artist",
    ("evaluate", "suites", "*", "source", "keep"): "cache_size",
}
# Two names of one key, both in use: transformers 5 has the first, TRL's own documents and these recipes the second.
SYNONYMS: Mapping[Key, str] = {
    ("train", "activation_checkpointing"): "gradient_checkpointing",
    ("train", "activation_checkpointing_kwargs"): "gradient_checkpointing_kwargs",
}


def new_key(key: Sequence[str]) -> Key:
    """The key under its new names: ``evaluate.keep.vqa`` -> ``evaluate.retention.vqa``."""
    renamed: Key = ()
    for part in key:
        renamed = (*renamed, _new_name((*renamed, part)) or part)
    return renamed


def rename_keys(values: dict[str, Any], places: Places) -> tuple[dict[str, Any], list[str]]:
    """One file's values, or one override's, under new names, and the faults: an old name beside its new one.

    ``places`` is changed to the new names too, so that later faults are placed where the user wrote the old name.
    """
    faults: list[str] = []

    def visit(value: Any, key: Key) -> Any:
        if not isinstance(value, dict):
            return value
        renamed = {}
        for name, inner in value.items():
            new = _new_name((*key, str(name)))
            if new is not None:
                place = places.get((*key, str(name)), "the recipe")
                old_key, key_now = ".".join((*key, str(name))), ".".join((*key, new))
                if new in value:
                    faults.append(both_given(place, old_key, key_now))
                    continue
                if (*key, str(name)) not in SYNONYMS:
                    _print_once(f"{place}: the key `{old_key}` is called `{key_now}` now; the old name is still read")
            renamed[new or name] = visit(inner, (*key, new or str(name)))
        return renamed

    result: dict[str, Any] = visit(values, ())
    for key in list(places):
        if (renamed := new_key(key)) != key:
            place = places.pop(key)
            places.setdefault(renamed, place)
    return result, faults


def both_given(place: str, old: str, new: str) -> str:
    """The fault of a key that is given under both of its names."""
    kind = "another name" if tuple(old.split(".")) in SYNONYMS else "the old name"
    return f"{place}: `{old}` is {kind} of `{new}`, and both are given; leave `{old}` out"


def _new_name(key: Key) -> str | None:
    for old, new in (*RENAMED.items(), *SYNONYMS.items()):
        if len(old) == len(key) and all(a in {"*", b} for a, b in zip(old, key, strict=True)):
            return new
    return None


@cache
def _print_once(message: str) -> None:
    console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)
