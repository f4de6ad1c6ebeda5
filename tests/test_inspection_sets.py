"""Inspection sets as they are published and as people keep them: categories, good parts, masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lcl_adapter.data.sources.boxes import region_box
from lcl_adapter.data.sources.inspection import read_mvtec
from lcl_adapter.errors import DataError
from tests.conftest import paint


def tree(root: Path, *files: str) -> Path:
    """Photos, and masks that are white from 8 x 16 to 24 x 32 for the first one of a photo and further to the right for others."""
    for number, name in enumerate(files):
        if "ground_truth" in name:
            mask = np.zeros((64, 64), np.uint8)
            shift = 16 if name.endswith("001.png") else 0
            mask[16:32, 8 + shift : 24 + shift] = 255
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(root / name)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / name)
    return root


PHOTOS = ("part/train/good/0.png", "part/train/good/1.png", "part/test/good/0.png", "part/test/hole/000.png")


@pytest.mark.parametrize(
    ("files", "good", "references", "box"),
    [
        ((*PHOTOS, "part/ground_truth/hole/000_mask.png"), ["good"], 2, (8, 24)),  # MVTec AD
        ((*PHOTOS, "part/ground_truth/hole/000.bmp"), ["good"], 2, (8, 24)),
        ((*PHOTOS, "part/ground_truth/hole/000/000.png", "part/ground_truth/hole/000/001.png"), ["good"], 2, (8, 40)),  # LOCO
        ((*PHOTOS, "part/validation/good/0.png", "part/ground_truth/hole/000/000.png"), ["good"], 3, (8, 24)),
        (
            (
                "part/train/good/0.png",
                "part/test_public/good/0.png",
                "part/test_public/hole/000.png",
                "part/test_public/ground_truth/hole/000_mask.png",
            ),
            ["good"],
            1,
            (8, 24),
        ),  # AD 2
        (("part/train/ok/0.bmp", "part/test/ok/1.bmp", "part/test/hole/000.bmp", "part/ground_truth/hole/000.png"), ["ok"], 1, (8, 24)),  # BTAD
        (tuple(name.removeprefix("part/") for name in (*PHOTOS, "part/ground_truth/hole/000_mask.png")), ["good"], 2, (8, 24)),  # one category
        (("part/normal/0.png", "part/normal/1.png", "part/hole/0.png"), ["normal"], 1, None),
        (("normal/0.png", "normal/1.png", "hole/0.png"), ["normal"], 1, None),
        (("train/ok/0.png", "train/def/9.png", "test/ok/1.png", "test/hole/2.png"), ["ok"], 1, None),
    ],
)
def test_layouts(tmp_path: Path, files: tuple[str, ...], good: list[str], references: int, box: tuple[int, int] | None) -> None:
    pool = read_mvtec(tree(tmp_path / "part", *files), good=good)
    (category,) = pool.categories
    assert (category.name, len(category.references), len(category.good)) == ("part", references, 1)
    assert {kind: len(specimens) for kind, specimens in category.defects.items()} == {"hole": 1}
    assert not set(category.references) & {s.picture for s in category.specimens}
    region = category.defects["hole"][0].region
    if box is None:
        assert region.mask is None
    else:
        assert region_box(region).text() == f"[{box[0] / 64:.3f},0.250,{box[1] / 64:.3f},0.500]"
    assert pool.skipped == ({"defective training photo": 1} if "train/def/9.png" in files else {})


@pytest.mark.parametrize("name", ["OK", "Good", "normal", "良品"])
def test_good_parts_by_another_name_are_no_defect(tmp_path: Path, name: str) -> None:
    root = tree(tmp_path / "set", "part/train/good/0.png", f"part/test/{name}/0.png", "part/test/NG/1.png")
    with pytest.raises(DataError, match=rf"test/{name} looks like good parts, and would be a defect: set `good: \[good, {name}\]`"):
        read_mvtec(root)
    assert set(read_mvtec(root, good=["good", name]).categories[0].defects) == {"NG"}


def test_a_kind_without_masks_is_kept_and_a_photo_without_one_is_a_fault(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", *PHOTOS, "part/test/dent/0.png", "part/ground_truth/hole/000_mask.png")
    pool = read_mvtec(root)
    assert set(pool.categories[0].defects) == {"hole", "dent"}
    assert set(pool.regions) == {"hole on the part", "dent on the part"}
    assert (len(pool.regions["hole on the part"]), pool.regions["dent on the part"]) == (1, ())
    assert "part/test/dent has no masks: it is used for good or defective" in pool.notes[0]
    paint(root / "part/test/hole/001.png", (90, 90, 90), seed=77)
    with pytest.raises(DataError, match=r"part/test/hole/001\.png has no mask"):
        read_mvtec(root)


def test_visa_as_mvtec_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="use `type: visa`"):
        read_mvtec(tree(tmp_path / "VisA", "pcb/Data/Images/Normal/0.png"))
