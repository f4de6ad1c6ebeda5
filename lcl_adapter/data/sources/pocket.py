"""The emoji that ship with the package: classes by split, drawn by several artists, read on demand from one archive."""

from __future__ import annotations

import json
from typing import ClassVar, Literal

from lcl_adapter.data.sources.base import ClassPool, PictureClass
from lcl_adapter.data.sources.picture import Picture
from lcl_adapter.errors import DataError
from lcl_adapter.pocket import DATA
from lcl_adapter.recipe.sources import ClassReader

SPLITS = ("train", "validation", "held_out")


class PocketClasses(ClassReader):
    """``type: pocket``. The emoji that ship with the package."""

    shipped: ClassVar[bool] = True

    type: Literal["pocket"]
    split: Literal["train", "validation", "held_out"] = "train"

    def open(self, name: str, min_pictures: int = 1) -> ClassPool:
        return read_pocket(self.split, name, min_pictures)


def read_pocket(split: str, name: str = "pocket", min_pictures: int = 1) -> ClassPool:
    """Classes of one split with at least ``min_pictures`` drawings; the others are counted as skipped.

    Raises DataError for an unknown split, or if fewer than two classes have enough drawings.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r} is none of {', '.join(SPLITS)}.")
    records = json.loads((DATA / "classes.json").read_text(encoding="utf-8"))
    chosen = [r for r in records if r["split"] == split]
    enough = [r for r in chosen if len(r["drawings"]) >= min_pictures]
    if len(enough) < 2:
        raise DataError(f"the shipped data has no two {split} classes with {min_pictures} drawings. Lower `shots`.")
    classes = tuple(
        PictureClass(
            name=r["name"],
            pictures=tuple(Picture(DATA / "drawings.zip", f"{r['id']}/{artist}.webp", artist) for artist in r["drawings"]),
            groups=(f"{r['kind']}/{r['subcategory']}", r["kind"]),
            hard=not r["lookalike"],
        )
        for r in enough
    )
    skipped = {f"fewer than {min_pictures} drawings": len(chosen) - len(enough)} if len(chosen) > len(enough) else {}
    return ClassPool(name, classes, skipped)
