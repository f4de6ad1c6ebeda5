"""``data check``: the photos of all sources and suites, compared with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lcl_adapter.data.sources import Fault, Picture
from lcl_adapter.data.sources.copies import COMPARED, nearly_equal, one_held_out, two_labels


@dataclass
class Photo:
    """A photo of a class or category that was opened.

    where: the source or suite. label: what it is shown as. category: of parts, without what is wrong with them: a good part and
    a defective one look alike. digest: of the file's bytes.
    """

    where: str
    label: str
    category: str
    picture: Picture
    digest: bytes
    signature: np.ndarray


def same_files(photos: Sequence[Photo]) -> list[tuple[str, Fault]]:
    """The same file, byte for byte: in two classes of one source, or in training and among what is held out."""
    by_digest: dict[bytes, list[Photo]] = {}
    for photo in photos:
        by_digest.setdefault(photo.digest, []).append(photo)
    faults: list[tuple[str, Fault]] = []
    for first, *others in by_digest.values():
        for other in others:
            if first.where == other.where and first.label != other.label:
                faults.append((other.where, two_labels(first.picture, first.label, other.picture, other.label)))
            elif _is_held_out(first.where) != _is_held_out(other.where):
                trained, held_out = (other, first) if _is_held_out(first.where) else (first, other)
                faults.append((held_out.where, one_held_out(trained.picture, trained.where, held_out.picture, held_out.where)))
    return faults


def _is_held_out(where: str) -> bool:
    return where.startswith(("suite ", "validation "))


def nearly_the_same(photos: Sequence[Photo]) -> list[str]:
    """A note for each source with photos of two classes that look alike as one photo in two sizes does, and for training and
    held-out photos.
    """
    if not 1 < len(photos) <= COMPARED:
        return []
    pairs_of: dict[tuple[str, ...], list[tuple[Photo, Photo]]] = {}
    for i, j in nearly_equal(np.stack([photo.signature for photo in photos])):
        one, other = photos[i], photos[j]
        if one.digest == other.digest:
            continue
        if one.where == other.where and one.category != other.category:
            pairs_of.setdefault((one.where,), []).append((one, other))
        elif _is_held_out(one.where) != _is_held_out(other.where):
            pairs_of.setdefault((one.where, other.where), []).append((one, other))
    notes = []
    for where, pairs in pairs_of.items():
        one, other = pairs[0]
        between = f"of two classes in {where[0]}" if len(where) == 1 else f"of {where[0]} and {where[1]}"
        count = "1 pair" if len(pairs) == 1 else f"{len(pairs):,} pairs"
        example = f"{one.picture} ({one.label!r}) and {other.picture} ({other.label!r})"
        notes.append(f"{count} of photos {between} look nearly the same, for instance {example}: one photo twice?")
    return notes
