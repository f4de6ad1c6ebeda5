"""Inspection sets as they are published and as people keep them: categories, good parts, masks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lcl_adapter.data.sources.base import PartCategory
from lcl_adapter.data.sources.boxes import Box, region_box
from lcl_adapter.data.sources.mvtec import read_mvtec
from lcl_adapter.data.sources.visa import read_visa
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


@pytest.mark.parametrize(
    "mask",
    ["part/{}/hole/000_mask.png", "part/{}/hole/000_gt.png", "part/{}/hole_mask/000.png", "part/{}/hole_masks/000_mask.png", "part/{}/masks/000.png"],
)
@pytest.mark.parametrize("test", ["test", ""])
def test_masks_beside_photos_are_no_photos(tmp_path: Path, mask: str, test: str) -> None:
    """They would be defective parts, or a kind of defect of their own."""
    photos = PHOTOS if test else ("part/good/0.png", "part/good/1.png", "part/hole/000.png")
    name = mask.format(test).replace("//", "/")
    root = tree(tmp_path / "set", *photos)
    values = np.zeros((64, 64), np.uint8)
    values[16:32, 8:24] = 255
    (root / name).parent.mkdir(exist_ok=True)
    Image.fromarray(values).save(root / name)
    [part] = read_mvtec(root).categories
    assert {kind: [s.picture.path.name for s in own] for kind, own in part.defects.items()} == {"hole": ["000.png"]}
    box = region_box(part.defects["hole"][0].region)
    assert (box.x0, box.x1) == (8 / 64, 24 / 64)
    tree(root, f"part/{test}/hole/001.png".replace("//", "/"))
    with pytest.raises(DataError, match=r"001\.png has no mask, but others of its kind have one"):
        read_mvtec(root)


def test_masks_of_good_photos_are_no_good_photos(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", *PHOTOS, "part/test/good/0_mask.png", "part/test/cut_mask/0.png")
    [part] = read_mvtec(root).categories
    assert [s.picture.path.name for s in part.good] == ["0.png"]
    assert sorted(part.defects) == ["cut mask", "hole"], "without a folder `cut`, it is a kind"


def test_two_categories_of_one_name(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", *(name.replace("part", form) for form in ("metal nut", "metal_nut") for name in PHOTOS))
    with pytest.raises(DataError, match="'metal nut', 'metal_nut' are one category; join or rename them"):
        read_mvtec(root)


def test_where_categories_may_be_instead(tmp_path: Path) -> None:
    tree(tmp_path / "outer", *(f"mvtec_ad/{name}" for name in PHOTOS))
    with pytest.raises(DataError, match=f"deeper: give {tmp_path / 'outer' / 'mvtec_ad'}"):
        read_mvtec(tmp_path / "outer")
    tree(tmp_path / "case", *(name.replace("train", "Train").replace("test", "Test") for name in PHOTOS))
    with pytest.raises(DataError, match="A folder is called 'Test': rename it to 'test'"):
        read_mvtec(tmp_path / "case")


def test_visa_as_mvtec_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="use `type: visa`"):
        read_mvtec(tree(tmp_path / "VisA", "pcb/Data/Images/Normal/0.png"))


FIXTURE = Path(__file__).parent.parent / "datasets" / "fixtures" / "visa"


def visa_without_split(root: Path, good: int) -> Path:
    """VisA's folders with ``good`` good photos of each of two objects, and no split_csv."""
    shutil.copytree(FIXTURE, root, ignore=shutil.ignore_patterns("split_csv"))
    for name in ("candle", "pcb1"):
        folder = root / name / "Data" / "Images" / "Normal"
        for number in range(6, good):
            paint(folder / f"{number:04}.JPG", (90, 90, 90), seed=number)
    return root


def test_visa_without_its_split_is_divided_by_name(tmp_path: Path) -> None:
    pool = read_visa(visa_without_split(tmp_path / "visa", 25))
    published = read_visa(FIXTURE)
    for part, as_published in zip(pool.categories, published.categories, strict=True):
        assert part.name == as_published.name
        assert [s.picture.path.stem for s in part.good] == ["0009", "0019"]
        assert len(part.references) == 23
        assert places_of(part) == places_of(as_published), "kinds and masks are the same"
    assert ["every 10th good photo" in note for note in pool.notes] == [True]
    assert not published.notes
    assert read_visa(tmp_path / "visa").categories == pool.categories


def places_of(part: PartCategory) -> dict[str, list[tuple[str, Box]]]:
    """Kind of defect -> names of its photos, and the boxes of their masks."""
    return {kind: [(s.picture.path.name, region_box(s.region)) for s in own] for kind, own in part.defects.items()}


def test_visa_without_its_split_in_other_forms(tmp_path: Path) -> None:
    """One object as the root, a zip, few photos, no masks, a missing mask, folders too deep, and nothing at all."""
    root = visa_without_split(tmp_path / "visa", 6)
    [one] = read_visa(root / "pcb1").categories
    assert (one.name, len(one.references), len(one.good), sorted(one.defects)) == ("pcb1", 5, 1, ["hole", "scratch"])
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", root))
    assert [(len(c.references), len(c.good)) for c in read_visa(archive).categories] == [(5, 1), (5, 1)]
    (root / "pcb1" / "Data" / "Masks" / "Anomaly" / "001.png").unlink()
    with pytest.raises(DataError, match=r"pcb1/Data/Images/Anomaly/001.JPG has no mask 'pcb1/Data/Masks/Anomaly/001.png'"):
        read_visa(root)
    shutil.rmtree(root / "pcb1" / "Data" / "Masks")
    without = read_visa(root)
    assert [s.mask for s in without.categories[1].specimens] == [None] * 4
    assert any("pcb1/Data/Masks/Anomaly/ has no masks" in note for note in without.notes)
    with pytest.raises(DataError, match=f"deeper: give {root}"):
        read_visa(tmp_path)
    with pytest.raises(DataError, match="use `type: mvtec`"):
        read_visa(tree(tmp_path / "mvtec", "part/test/good/0.png"))
    with pytest.raises(DataError, match="no <object>/Data/Images/Normal/ with good photos"):
        read_visa(tree(tmp_path / "empty", "part/good/0.png"))


def test_visas_split_may_end_early(tmp_path: Path) -> None:
    root = tmp_path / "visa"
    shutil.copytree(FIXTURE, root)
    with (root / "split_csv" / "1cls.csv").open("a") as file:
        file.write("pcb1,test,anomaly,pcb1/Data/Images/Anomaly/000.JPG\n,,\n")
    with pytest.raises(DataError, match="has no mask ''"):
        read_visa(root)
