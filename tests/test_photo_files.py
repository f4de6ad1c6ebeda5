"""Photos as phones, browsers and cameras name them: read, or named with what to do; never passed over in silence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lcl_adapter.answering.ask import ask_model
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.data.sources import Picture, read_class_folders, read_image
from lcl_adapter.data.sources.images import HEIF, RAW, READ, SUFFIXES
from lcl_adapter.data.sources.new_photos import list_photos
from lcl_adapter.errors import DataError
from lcl_adapter.recipe import Recipe
from lcl_adapter.training import preflight
from tests.conftest import paint

HEIC = b"\x00\x00\x00\x18ftypheic" + b"0" * 200


@pytest.mark.parametrize("suffix", sorted(READ))
def test_every_suffix_that_is_read_is_read(tmp_path: Path, suffix: str) -> None:
    kind = {".jfif": "JPEG", ".jpe": "JPEG", ".pgm": "PPM", ".pnm": "PPM"}.get(suffix)
    path = tmp_path / f"photo{suffix.upper()}"
    Image.fromarray(np.full((9, 12, 3), 120, np.uint8)).save(path, format=kind)
    assert read_image(Picture(path)).size == (12, 9)


@pytest.mark.parametrize(
    ("suffix", "remedy"), [(".heic", "pip install pillow-heif"), (".HEIF", "pip install pillow-heif"), (".nef", "not developed here")]
)
def test_a_photo_that_cannot_be_read_has_a_remedy(tmp_path: Path, suffix: str, remedy: str) -> None:
    (tmp_path / f"photo{suffix}").write_bytes(HEIC if suffix.lower() in HEIF else b"raw" * 99)
    with pytest.raises(DataError, match=remedy):
        read_image(Picture(tmp_path / f"photo{suffix}"))
    assert suffix.lower() in HEIF | RAW <= SUFFIXES


def test_phone_photos_in_a_class_are_counted_and_named_by_every_command(tmp_path: Path, pocket_tiny: Path) -> None:
    photos = tmp_path / "photos"
    for place, name in enumerate(("nut", "screw")):
        for number in range(3):
            paint(photos / name / f"{number}.jpg", (100, 90, 80), seed=3 * place + number)
    Image.open(photos / "nut" / "0.jpg").save(photos / "nut" / "saved.jfif", format="JPEG")
    (photos / "screw" / "IMG_0001.HEIC").write_bytes(HEIC)
    (photos / "nut" / "Thumbs.db").write_bytes(b"\xd0\xcf")
    pool = read_class_folders(photos)
    assert {one.name: len(one.pictures) for one in pool.classes} == {"nut": 4, "screw": 4}
    assert pool.skipped == {"not an image file": 1}
    recipe = Recipe.model_validate(
        {"base": str(pocket_tiny), "output": str(tmp_path / "run"), "sources": {"a": {"type": "class-folder", "path": str(photos), "shots": [1]}}}
    )
    faults = preflight.check(recipe)["faults"]
    assert [fault["kind"] for fault in faults] == ["not an image"]
    assert "IMG_0001.HEIC: not an image that can be read. A phone's HEIC photo needs pillow-heif" in faults[0]["message"]
    with pytest.raises(DataError, match=r"IMG_0001\.HEIC.*pillow-heif"):
        ask_model(photos, [photos / "nut" / "0.jpg"], base=BaseRef(str(pocket_tiny)))
    (photos / "screw" / "IMG_0001.HEIC").rename(tmp_path / "new.heic")
    assert [picture.path.name for picture in list_photos([tmp_path / "new.heic"]).pictures] == ["new.heic"]
