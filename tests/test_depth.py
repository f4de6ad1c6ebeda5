"""Pictures with more than 8 bits: read at their own depth, with one scale for all pictures of a source, a set or a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from lcl_adapter.answering.ask import _Labelled, _on_one_scale
from lcl_adapter.data.sources import Picture, open_reader, read_image
from lcl_adapter.data.sources.base import pictures_of
from lcl_adapter.data.sources.class_folder import ClassFolders
from lcl_adapter.data.sources.depth import common_white
from lcl_adapter.data.sources.images import range_of
from lcl_adapter.data.sources.mvtec import Mvtec
from lcl_adapter.data.sources.new_photos import list_photos
from lcl_adapter.recipe import Recipe
from lcl_adapter.training import preflight
from tests.conftest import paint

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


def write(path: Path, values: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def seen(path: Path, white: float | None = None) -> np.ndarray:
    return np.asarray(read_image(Picture(path, white=white)))[..., 0].astype(int)


@pytest.mark.parametrize(
    ("name", "top", "kind"),
    [
        ("10.tif", 1023, np.uint16), ("12.png", 4095, np.uint16), ("14.tif", 16383, np.uint16), ("16.png", 65535, np.uint16),
        ("32.tif", 4095, np.int32), ("01.tif", 1, np.float32), ("12f.tif", 4095, np.float32), ("8f.tif", 255, np.float32), ("8.png", 255, np.uint8),
    ],
)  # fmt: skip
def test_every_depth_is_seen_from_black_to_white(tmp_path: Path, name: str, top: float, kind: Any) -> None:
    pixels = seen(write(tmp_path / name, (RAMP * top).astype(kind)))
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.abs(pixels - RAMP * 255).max() <= 1.5


def test_a_scratch_of_a_few_hundred_steps_is_seen(tmp_path: Path) -> None:
    good = (RAMP * 200 + 900).astype(np.uint16)
    bad = good.copy()
    bad[40:44, 20:50] += 220
    paths = [write(tmp_path / f"{name}.png", values) for name, values in (("good", good), ("bad", bad))]
    white = common_white([Picture(path) for path in paths])
    assert white == 4095
    difference = np.abs(seen(paths[0], white) - seen(paths[1], white)).max()
    assert difference == pytest.approx(220 * 255 / 4095, abs=1)


def test_the_files_own_depth_comes_first(tmp_path: Path) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[281] = 4095  # MaxSampleValue
    dark = write(tmp_path / "dark.tif", (RAMP * 500).astype(np.uint16), tiffinfo=tags)
    assert seen(dark).max() == pytest.approx(500 * 255 / 4095, abs=1)


@given(st.floats(0, 1e6), st.booleans())
@settings(max_examples=50)
def test_a_range_holds_its_values(highest: float, floats: bool) -> None:
    assert range_of(highest, floats) >= highest
    assert range_of(range_of(highest, floats), floats) == range_of(highest, floats)
    assert floats or range_of(highest, floats) >= 255


def test_all_pictures_of_a_source_have_one_scale(tmp_path: Path) -> None:
    for name, top in (("bright", 4000), ("dark", 900)):
        for number in range(3):
            write(tmp_path / "photos" / name / f"{number}.png", (RAMP * top).astype(np.uint16))
    pool = open_reader("photos", ClassFolders(type="class-folder", path=tmp_path / "photos"))
    assert {picture.white for picture in pictures_of(pool)} == {4095}
    dark = next(one for one in pool.classes if one.name == "dark").pictures[0]
    assert np.asarray(read_image(dark)).max() == pytest.approx(900 * 255 / 4095, abs=1), "alone, it would be four times as bright"
    given = open_reader("photos", ClassFolders(type="class-folder", path=tmp_path / "photos", white=65535))
    assert {picture.white for picture in pictures_of(given)} == {65535}


def test_parts_and_their_defects_have_one_scale(tmp_path: Path) -> None:
    for place, top in (("train/good", 900), ("test/good", 900), ("test/scratch", 3000)):
        for number in range(2):
            write(tmp_path / "parts" / "nut" / place / f"{number}.png", (RAMP * top).astype(np.uint16))
    pool = open_reader("parts", Mvtec(type="mvtec", path=tmp_path / "parts"))
    assert {picture.white for picture in pictures_of(pool)} == {4095}


def test_pictures_of_8_bits_have_no_scale(tmp_path: Path) -> None:
    for number in range(3):
        paint(tmp_path / "photos" / "a" / f"{number}.png", (9, 9, 9))
        paint(tmp_path / "photos" / "b" / f"{number}.jpg", (200, 9, 9))
    pool = open_reader("photos", ClassFolders(type="class-folder", path=tmp_path / "photos"))
    assert {picture.white for picture in pictures_of(pool)} == {None}


def test_floats_from_0_to_1_beside_whole_numbers(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.tif", RAMP.astype(np.float32)), write(tmp_path / "b.png", (RAMP * 4095).astype(np.uint16))]
    white = common_white([Picture(path) for path in paths])
    assert [seen(path, white).max() for path in paths] == [255, 255]


def test_a_broken_picture_does_not_stop_the_look_at_depths(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG none")
    whole = write(tmp_path / "whole.png", (RAMP * 1000).astype(np.uint16))
    assert common_white([Picture(tmp_path / "broken.png"), Picture(tmp_path / "missing.png"), Picture(whole)]) == 1023


def test_labelled_and_new_photos_are_read_alike(tmp_path: Path) -> None:
    for name, brightest in (("good", 900), ("scratched", 880)):
        write(tmp_path / "photos" / name / "0.png", (RAMP * brightest).astype(np.uint16))
    query = write(tmp_path / "query.png", (RAMP * 3000).astype(np.uint16))
    labelled, new = _on_one_scale(_Labelled.read(tmp_path / "photos", None), list_photos([query]))
    assert {picture.white for picture, _ in labelled.shown} == {new.pictures[0].white} == {4095}


def test_nearly_black_and_flat_pictures_are_noted(tmp_path: Path, pocket_tiny: Path) -> None:
    for place, name in enumerate(("a", "b")):
        for number in range(4):
            paint(tmp_path / "photos" / name / f"{number}.png", (100, 100, 100), seed=4 * place + number)
    write(tmp_path / "photos" / "a" / "0.png", np.full((9, 9), 12, np.uint8))
    write(tmp_path / "photos" / "b" / "0.png", np.full((9, 9, 3), 200, np.uint8))
    recipe = Recipe.model_validate(
        {"base": str(pocket_tiny), "output": str(tmp_path / "run"), "sources": {"a": {"type": "class-folder", "path": str(tmp_path / "photos")}}}
    )
    found = preflight.check(recipe)
    assert found["faults"] == []
    notes = "\n".join(found["notes"])
    assert "0.png is nearly black (its brightest pixel has 12 of 255); if it has more than 8 bits, give `white`" in notes
    assert "0.png is flat (all its pixels have 200 to 200 of 255)" in notes


@pytest.mark.parametrize("gap", [np.nan, np.inf, -np.inf])
def test_places_without_a_value_leave_the_others(tmp_path: Path, gap: float) -> None:
    """A depth map has no value where nothing was measured. It does not darken itself, or the other pictures of its source."""
    plain = RAMP.astype(np.float32)
    with_gap = plain.copy()
    with_gap[10:20, 10:20] = gap
    for label in ("a", "b"):
        write(tmp_path / "photos" / label / "plain.tif", plain if label == "a" else plain[::-1])
        write(tmp_path / "photos" / label / "gap.tif", with_gap if label == "a" else with_gap[:, ::-1])
    pool = open_reader("photos", ClassFolders(type="class-folder", path=tmp_path / "photos"))
    expected = np.round(255 * RAMP)
    for picture in pool.classes[0].pictures:  # type: ignore[union-attr]
        values = np.asarray(read_image(picture))[..., 0].astype(int)
        outside = np.ones(values.shape, bool)
        outside[10:20, 10:20] = False
        assert np.abs(values - expected)[outside].max() <= 1
    of_gap = next(p for p in pool.classes[0].pictures if p.path.stem == "gap")  # type: ignore[union-attr]
    assert set(np.asarray(read_image(of_gap))[10:20, 10:20].flat) == {255 if gap == np.inf else 0}
    write(tmp_path / "all.tif", np.full((8, 8), gap, np.float32))
    assert seen(tmp_path / "all.tif").shape == (8, 8)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-20.0, 45.0), (-0.5, 0.25)])
def test_values_on_both_sides_of_0_are_all_shown(tmp_path: Path, low: float, high: float) -> None:
    """Signed floats, for instance degrees: neither half is cut off."""
    path = write(tmp_path / "signed.tif", (low + (high - low) * RAMP).astype(np.float32))
    for white in (None, common_white([Picture(path)])):
        assert np.abs(seen(path, white) - 255 * RAMP).max() <= 1
