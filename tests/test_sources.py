"""Sources: pools by reference, and every kind of bad file."""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter

import lcl_adapter
from lcl_adapter import recipe
from lcl_adapter.data.episodes import Episode
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import (
    READERS,
    ClassPool,
    InspectionPool,
    Picture,
    PictureClass,
    open_reader,
    read_class_folders,
    read_image,
    read_llava_json,
    read_pocket,
)
from lcl_adapter.data.sources.held_out import in_split, is_held_out, split_of
from lcl_adapter.errors import DataError, RecipeError
from lcl_adapter.pocket import DATA
from lcl_adapter.recipe import sources
from lcl_adapter.recipe.schema import register_sources
from lcl_adapter.recipe.sources import ClassReader, Registered, TaggedSource
from tests.conftest import paint


def broken(path: Path, make: Callable[[Path], object], message: str) -> None:
    make(path)
    with pytest.raises(DataError, match=message) as caught:
        read_image(Picture(path))
    assert path.name in str(caught.value)


def huge_png(path: Path) -> None:
    """A valid header that claims 30,000 x 30,000 pixels."""
    header = b"\x00\x00\x75\x30\x00\x00\x75\x30\x08\x02\x00\x00\x00"
    chunk = b"IHDR" + header
    data = zlib.compress(b"\x00" * 90_001)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + len(header).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        + len(data).to_bytes(4, "big") + b"IDAT" + data + zlib.crc32(b"IDAT" + data).to_bytes(4, "big")
    )  # fmt: skip


def truncated(path: Path) -> None:
    paint(path, (9, 99, 200), size=(200, 200))
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("empty.png", lambda p: p.write_bytes(b""), "is empty"),
        ("text.jpg", lambda p: p.write_text("<html>not an image</html>"), "not an image"),
        ("cut.png", truncated, "broken"),
        ("dot.png", lambda p: Image.new("RGB", (1, 1)).save(p), "shows nothing"),
        ("huge.png", huge_png, "bound of"),
        ("missing.png", lambda p: None, "no such file"),
    ],
)
def test_bad_images_are_named(tmp_path: Path, name: str, make: Callable[[Path], object], message: str) -> None:
    broken(tmp_path / name, make, message)


def test_images_of_unusual_modes_are_read_as_rgb(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 400).reshape(20, 20)
    made = {
        "cmyk.jpg": Image.new("CMYK", (20, 20), (0, 255, 255, 0)),
        "deep.png": Image.fromarray(ramp.astype(np.uint16)),
        "float.tif": Image.fromarray((ramp / 65535 * 255).astype(np.float32)),
        "grey.png": Image.new("L", (20, 20), 90),
        "palette.gif": Image.new("P", (20, 20)),
        "alpha.png": Image.new("RGBA", (20, 20), (255, 0, 0, 0)),
    }
    for name, image in made.items():
        image.save(tmp_path / name)
        read = read_image(Picture(tmp_path / name))
        assert (read.mode, read.size) == ("RGB", (20, 20)), name
    assert read_image(Picture(tmp_path / "alpha.png")).getpixel((5, 5)) == (255, 255, 255), "transparent is white paper"
    deep = np.asarray(read_image(Picture(tmp_path / "deep.png")))
    assert deep.min() < 5
    assert deep.max() > 250, "16 bits are scaled, not cut"
    red = read_image(Picture(tmp_path / "cmyk.jpg")).getpixel((5, 5))
    assert red[0] > 200
    assert red[1] < 60


def test_exif_turn_and_first_frame(tmp_path: Path) -> None:
    sideways = Image.new("RGB", (40, 20), "blue")
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(Picture(tmp_path / "turned.jpg")).size == (20, 40)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(Picture(tmp_path / "moving.gif")).getpixel((4, 4)) == (255, 0, 0)


def test_further_views_differ_and_repeat(photos: Path) -> None:
    picture = Picture(photos / "good" / "0.png")
    plain, one, again, two = (np.asarray(read_image(picture.in_view(v))) for v in (0, 1, 1, 2))
    assert (one == again).all()
    assert plain.shape == one.shape
    assert (plain != one).any()
    assert (one != two).any()


def test_class_folders(photos: Path) -> None:
    (photos / "good" / "notes.txt").write_text("x")
    (photos / ".hidden").mkdir()
    pool = read_class_folders(photos)
    assert [c.name for c in pool.classes] == ["dented", "good", "scratched"]
    assert [len(c.pictures) for c in pool.classes] == [4, 4, 4]
    assert pool.skipped == {"not an image file": 1}


def test_unusual_class_names_stay_as_they_are(tmp_path: Path) -> None:
    names = ["with space", "日本語", "🙂 face", 'quo"ted', "it's"]
    for number, name in enumerate(names):
        paint(tmp_path / name / "same.png", (number * 40, 90, 90))
    assert sorted(c.name for c in read_class_folders(tmp_path).classes) == sorted(names)


def test_faulty_folders(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_class_folders(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        read_class_folders(tmp_path / "bare")
    (photos / "void").mkdir()
    with pytest.raises(DataError, match="'void' has no images") as caught:
        read_class_folders(photos, min_pictures=5)
    assert str(caught.value).count("has 4 images, 5 are needed") == 3, "all faults at once"


def test_only_the_name_decides_what_is_held_out(tmp_path: Path) -> None:
    for number in range(20):
        paint(tmp_path / f"class{number}" / "0.png", (number, 0, 0))
    train = {c.name for c in read_class_folders(tmp_path, split="train", hold_out=0.3).classes}
    held = {c.name for c in read_class_folders(tmp_path, split="held_out", hold_out=0.3).classes}
    assert train | held == {f"class{n}" for n in range(20)}
    assert not train & held
    paint(tmp_path / "another" / "0.png", (1, 1, 1))
    assert held <= {c.name for c in read_class_folders(tmp_path, split="held_out", hold_out=0.3).classes}


@given(st.text(min_size=1), st.floats(0, 0.5), st.floats(0, 0.5, exclude_max=True))
def test_a_class_is_in_one_split_and_more_validation_moves_no_held_out_one(name: str, hold_out: float, validation: float) -> None:
    splits = [split for split in ("train", "validation", "held_out") if in_split(name, split, hold_out, validation)]
    assert splits == [split_of(name, hold_out, validation)]
    assert in_split(name, "all", hold_out, validation)
    assert (splits == ["held_out"]) == is_held_out(name, hold_out)


def names_in(split: str, **options: object) -> set[str]:
    """The classes or categories that a reader gives of a split."""
    pool = open_reader("mine", TypeAdapter(TaggedSource).validate_python({**options, "split": split}))
    assert isinstance(pool, ClassPool | InspectionPool)
    return {part.name for part in (pool.classes if isinstance(pool, ClassPool) else pool.categories)}


def test_classes_of_every_reader_are_validated_on_and_not_trained_on(tmp_path: Path) -> None:
    for number in range(30):
        paint(tmp_path / "photos" / f"class{number}" / "0.png", (number, 0, 0))
        for photo in ("train/good/0", "train/good/1", "test/good/2", "test/scratch/3"):
            paint(tmp_path / "parts" / f"class{number}" / f"{photo}.png", (number, 0, 0))
    rows = [f"class{number}/0.png,class{number}" for number in range(30)]
    (tmp_path / "list.csv").write_text("\n".join(["image,class", *rows]))
    columns = {"image": "image", "class": "class"}
    for source in (
        {"type": "class-folder", "path": tmp_path / "photos"},
        {"type": "manifest", "file": tmp_path / "list.csv", "images": tmp_path / "photos", "columns": columns},
        {"type": "mvtec", "path": tmp_path / "parts", "on_fault": "skip"},
    ):
        names = [names_in(split, **source, hold_out=0.3, validation=0.2) for split in ("train", "validation", "held_out")]
        assert set.union(*names) == {f"class{number}" for number in range(30)}
        assert sum(map(len, names)) == 30
        assert names[1] == {f"class{n}" for n in range(30) if not is_held_out(f"class{n}", 0.3) and is_held_out(f"class{n}", 0.5)}
    named = {"type": "mvtec", "path": tmp_path / "parts", "on_fault": "skip", "held_out": ["class3"], "validation": 0.2}
    assert names_in("held_out", **named) == {"class3"}
    assert names_in("validation", **named) == {f"class{n}" for n in range(30) if n != 3 and is_held_out(f"class{n}", 0.2)}


def test_shipped_data_is_split_by_class_and_licensed() -> None:
    pools = {split: read_pocket(split) for split in ("train", "validation", "held_out")}
    pictures = [{(p.path, p.member) for c in pool.classes for p in c.pictures} for pool in pools.values()]
    assert not pictures[0] & pictures[1]
    assert not pictures[0] & pictures[2]
    assert not pictures[1] & pictures[2]
    assert len(pools["held_out"]) > 250
    assert sum(f.stat().st_size for f in DATA.rglob("*") if f.is_file()) < 15_000_000
    artists = {p.artist for pool in pools.values() for c in pool.classes for p in c.pictures}
    attribution = (DATA / "ATTRIBUTION.md").read_text()
    assert all(f"| {artist} " in attribution for artist in artists)
    for licence in ("Apache-2.0", "CC-BY-4.0", "MIT"):
        assert (DATA / "LICENSES" / f"{licence}.txt").stat().st_size > 900
        assert licence in attribution
    one = pools["held_out"].classes[0].pictures[0]
    assert read_image(one).size == (64, 64)


def test_neighbours_come_from_near_to_far() -> None:
    pool = read_pocket("train")
    one = next(i for i, c in enumerate(pool.classes) if c.groups[0] == "food/food-fruit")
    ranked = list(pool.neighbours(one))
    assert sorted([*ranked, one]) == list(range(len(pool)))
    near = [pool.classes[i].groups[0] == "food/food-fruit" for i in ranked]
    assert near[0]
    assert near == sorted(near, reverse=True)
    assert all(pool.classes[i].groups[0] == "food/food-fruit" for i in pool.hard_neighbours(one))


RECORD = {"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A cat."}]}


def written(folder: Path, records: object) -> Path:
    path = folder / "vqa.json"
    path.write_text(json.dumps(records))
    return path


def test_llava_json(tmp_path: Path) -> None:
    two = {
        "id": 2,
        "image": ["a.png", "b.png"],
        "conversations": [
            {"from": "human", "value": "<image>\nFirst?"},
            {"from": "gpt", "value": "one"},
            {"from": "human", "value": "<image>\nSecond?"},
            {"from": "gpt", "value": "two"},
        ],
    }
    none = {"id": 3, "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}
    pool = read_llava_json(written(tmp_path, [RECORD, two, none]), tmp_path)
    first = pool.dialogues[0].exchanges[0]
    assert (first.question, first.answer, first.picture) == ("What?", "A cat.", Picture(tmp_path / "a.png"))
    assert [e.picture.path.name for e in pool.dialogues[1].exchanges if e.picture] == ["a.png", "b.png"]
    assert pool.dialogues[2].exchanges[0].picture is None
    assert len(read_llava_json(written(tmp_path, [RECORD, two, none]), tmp_path, limit=2)) == 2
    assert len(read_llava_json(written(tmp_path, [{**none, "image": None}]), tmp_path)) == 1
    assert read_llava_json(written(tmp_path, [RECORD, "x"]), tmp_path, on_fault="skip").skipped == {"bad record": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": ["a.png", "b.png"]}, "2 images, 1 <image>"),
        ({"image": []}, "more <image> than its 0 images"),
        ({"conversations": RECORD["conversations"][:1]}, "pairs of human and gpt"),
        ({"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]}, "must alternate"),
        ({"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "  "}]}, "empty answer"),
        ({"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "x"}]}, "not of the form"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = written(tmp_path, [RECORD, {**RECORD, "id": "bad", **change}])
    with pytest.raises(DataError, match=message) as caught:
        read_llava_json(path, tmp_path)
    assert "record 2 (id 'bad')" in str(caught.value)
    skipped = read_llava_json(path, tmp_path, on_fault="skip")
    assert (len(skipped), skipped.skipped) == (1, {"bad record": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[{]", "line 1: not JSON"), ('["é"]'.encode("latin-1"), "not UTF-8"), (b"{}", "line 1: no key 'conversations'"), (b"[]", "nothing of use")],
)
def test_bad_json_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_llava_json(path, tmp_path)


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "bom.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([RECORD]).encode())
    assert len(read_llava_json(path, tmp_path)) == 1


class Swatches(ClassReader):
    """All that a new source needs: its keys, and how they become a pool."""

    type: Literal["swatches"]
    folder: Path

    def open(self, name: str, min_pictures: int = 1) -> ClassPool:
        names = ("red", "green", "blue")
        return ClassPool(name, tuple(PictureClass(c, tuple(Picture(self.folder / f"{c}{n}.png") for n in range(min_pictures))) for c in names))


@pytest.fixture
def with_swatches() -> Iterator[None]:
    register_sources((*READERS, Swatches))
    yield
    register_sources(READERS)


SWATCHES = "base: pocket\nsources: {mine: {type: swatches, folder: colours, ways: 3, shots: [2], queries: 2, share: 2}}\n"
SWATCHES += "evaluate: {suites: {mine: {kind: lcl, source: {type: swatches, folder: colours}}}}\n"


def test_a_new_source_is_one_class_and_one_line_of_the_table(tmp_path: Path, with_swatches: None) -> None:
    (tmp_path / "mine.yaml").write_text(SWATCHES)
    read = recipe.load(tmp_path / "mine.yaml", [f"data.root={tmp_path}"])
    episode = Mixture(read).draw(7)
    assert isinstance(episode, Episode)
    assert len(episode.support) == 6
    assert all(e.picture.path.parent == tmp_path / "colours" for e in (*episode.support, *episode.queries)), "paths start at data.root"
    assert isinstance(read.evaluate.suites["mine"].source, Swatches)
    recipe.save(read, tmp_path / "saved.yaml")
    assert recipe.load(tmp_path / "saved.yaml") == read == pickle.loads(pickle.dumps(read))
    for old, new, message in (
        ("folder", "foldr", r"bad.yaml, line 2: unknown key 'sources.mine.foldr' \(did you mean 'folder'\?\)"),
        ("swatches", "swatch", r"type 'swatch' is none of pocket, .*, swatches"),
        ("colours}}}}", "colours, share: 1}}}}", r"unknown key 'evaluate.suites.mine.source.share'"),
    ):
        (tmp_path / "bad.yaml").write_text(SWATCHES.replace(old, new, 1))
        with pytest.raises(RecipeError, match=message):
            recipe.load(tmp_path / "bad.yaml")


def test_a_source_that_is_not_in_the_table_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(SWATCHES)
    with pytest.raises(RecipeError, match="'swatches' is none of pocket,"):
        recipe.load(tmp_path / "mine.yaml")


def test_without_any_registered_source_the_error_says_what_to_import(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lcl_adapter.load_recipe("pocket").sources
    monkeypatch.setattr(sources, "_readers", [])
    with pytest.raises(RuntimeError, match=r"import lcl_adapter\.data\.sources"):
        Registered().union()
