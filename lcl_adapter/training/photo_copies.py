"""``data check``: the photos of all sources and suites, compared with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.neighbors import KDTree

from lcl_adapter.data.sources import Fault, Picture
from lcl_adapter.data.sources.copies import COMPARED, one_held_out, two_labels

SIDE = 16  # cells to a side of a picture's signature
NEAR = 2  # mean difference of two signatures, of 255 grey values, below which two pictures are nearly the same
BLOCKS = 4  # to a side
NEIGHBOURS = 8
PLAIN = 6  # deviation of a signature below which a picture shows too little to be compared


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


def signature(grey: Image.Image) -> np.ndarray:
    """A grey picture on a coarse grid, uint8 [SIDE * SIDE]: nearly equal for one photo saved in two sizes or qualities."""
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.uint8).reshape(-1)


def nearly_equal(signatures: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of numbers (i < j) of pictures that look nearly the same: of each picture, its NEIGHBOURS nearest ones at most, for a
    camera in a fixed place makes thousands of such pairs. signatures: uint8 [N, SIDE * SIDE].
    """
    values_NC = signatures.astype(np.float32)
    telling = np.flatnonzero(values_NC.std(1) > PLAIN)
    if len(telling) < 2:
        return []
    values_NC = values_NC[telling]
    # Means of blocks are never further apart than the pictures are, and few enough for a tree.
    blocks_ND = values_NC.reshape(-1, BLOCKS, SIDE // BLOCKS, BLOCKS, SIDE // BLOCKS).mean((2, 4)).reshape(len(values_NC), -1)
    tree = KDTree(blocks_ND, metric="manhattan")
    near = np.flatnonzero(tree.query_radius(blocks_ND, NEAR * blocks_ND.shape[1], count_only=True) > 1)  # each is near itself
    if not len(near):
        return []
    nearest_NK = tree.query(blocks_ND[near], k=min(NEIGHBOURS + 1, len(telling)), return_distance=False)
    pairs = set()
    for number, neighbours in zip(near, nearest_NK, strict=True):
        for other in neighbours[neighbours != number]:
            if np.abs(values_NC[number] - values_NC[other]).mean() < NEAR:
                pairs.add((int(telling[min(number, other)]), int(telling[max(number, other)])))
    return sorted(pairs)
