"""The photo data sets: what is trained on is not evaluated; files are whole; the sources of recipes read them."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw

from lcl_adapter.data.sources.manifest import read_manifest
from lcl_adapter.data.sources.mvtec import read_mvtec
from lcl_adapter.errors import DataError, RunError
from lcl_adapter.packaged import packaged, photo_data_folder
from tests.test_photo_packages import package_of, resource
from tools.photo import attribution, data, drawing, inspection, products, real, sources, train, words
from tools.photo.packages import GCOMPRIS, STAMPS, WALLPAPERS, Package

TRUE_FOLDER = photo_data_folder()
REAL = sources.real_classes()


# The lists


def plain_words(name: str) -> set[str]:
    """Its words and their singulars, by another rule than the tool's."""
    every = set(re.findall("[a-z]+", name.lower())) - {"of", "and", "with", "in", "the", "a"}
    return every | {word[:-1] for word in every if word.endswith("s")} | {word[:-2] for word in every if word.endswith("es")}


def test_no_training_class_has_a_word_of_an_evaluated_class() -> None:
    evaluated = {word: one.name for one in REAL for name in (one.name, *one.others) for word in plain_words(name)}
    common = {one.name: word for one in train.training_classes() for word in plain_words(one.name) if word in evaluated}
    assert not common


def test_no_photo_of_an_evaluated_class_is_drawn_for_training() -> None:
    evaluated = {photo for one in REAL for photo in one.photos}
    assert not evaluated & {stamp for one in train.training_classes() for stamp in one.stamps}
    assert not evaluated & {product.stamp for product in products.products_of_split("train")}


def test_every_evaluated_class_has_several_photos_and_a_near_class() -> None:
    assert all(len(one.photos) >= 2 for one in REAL)
    assert len({one.name for one in REAL}) == len(REAL) >= 36
    assert min(Counter(one.group for one in REAL).values()) >= 2, "hard pairs are two classes of one group"
    listed = Counter(photo for one in REAL for photo in one.photos)
    assert max(listed.values()) == 1


def test_the_classes_are_split_by_what_they_are() -> None:
    classes = train.training_classes()
    names = [one.name for one in classes]
    assert len(names) == len(set(names))
    split_of: dict[str, set[str]] = {}
    for one in classes:
        split_of.setdefault(words.head(one.name), set()).add(one.split)
    assert max(map(len, split_of.values())) == 1
    share = np.mean([one.split == "validation" for one in classes])
    assert 0.08 < share < 0.16


def test_held_out_products_are_of_no_training_class() -> None:
    trained = {stamp for one in train.training_classes() if one.split == "train" for stamp in one.stamps}
    assert trained >= {product.stamp for product in products.products_of_split("train")}
    assert not trained & {product.stamp for product in products.products_of_split("held_out")}


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("claw hammers", "hammer"),
        ("clownfish", "fish"),
        ("Knives", "knife"),
        ("bowl", None),
        ("hammerhead shark", "hammer"),
        ("mice", "mouse"),
        ("catalog", None),
    ],
)
def test_common_words(name: str, word: str | None) -> None:
    held_out = {words.singular(w) for w in ("hammer", "fish", "knife", "owl", "mouse", "cat")}
    assert words.common_word(name, held_out) == (word and words.singular(word))


def test_an_excluded_class_comes_with_its_reason() -> None:
    assert words.excluded(["clownfish", "cat face", "tram"], {"fish": (), "kitten": ("cat",)}) == {"clownfish": "fish", "cat face": "kitten"}


# The data sets, from small packages


def stamp(seed: int) -> bytes:
    """A thing with an alpha channel: a disc with spots."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(60, 200, (150, 150, 4), np.uint8), "RGBA")
    alpha = Image.new("L", image.size)
    ImageDraw.Draw(alpha).ellipse((20, 10, 130, 140), fill=255)
    image.putalpha(alpha)
    return encoded(image, "PNG")


def encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


GPL = "Files: *\nCopyright: 2002 Somebody\nLicense: GPL-2\n"
COPYRIGHT = f"""Format: x

{GPL}
Files: src/activities/erase/resource/*.svg
Copyright: Nobody
License: CC0-1.0

Files: src/activities/erase/resource/a.jpg
Copyright: 2011 Ann
  2012 Ben
License: CC-BY-SA-3.0
Comment: https://example.org/a
"""
STAMP_NAMES = ("tools/saw", "tools/drill", "tools/chisel", "tools/file", "animals/emu", "animals/duck")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the data sets, with packages and lists of a few pictures."""
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "real.yaml").write_text(json.dumps({"bird": {"duck": {"stamps": ["animals/duck"], "erase": ["a"], "others": ["drake"]}}}))
    (lists / "stamps.csv").write_text("stamp,class\n" + "".join(f"{name},{name.partition('/')[2]}\n" for name in STAMP_NAMES))
    (lists / "wallpapers.txt").write_text("Kite/a.jpg\n")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 130, 3), np.uint8))
    pictures = {"a.webp": encoded(photo, "WEBP"), "other.webp": b"not listed"}
    content = {
        GCOMPRIS: {"./usr/share/gcompris-qt/rcc/erase.rcc": resource(pictures, folder="gcompris/src/activities/erase/resource")},
        STAMPS: {f"./usr/share/tuxpaint/stamps/{name}.png": stamp(number) for number, name in enumerate(STAMP_NAMES)},
        WALLPAPERS: {"./usr/share/wallpapers/Kite/a.jpg": encoded(photo.resize((800, 600)), "JPEG")},
    }
    for package, files in content.items():
        files[f"./usr/share/doc/{package.name}/copyright"] = (COPYRIGHT if package is GCOMPRIS else GPL).encode()

    def package_file(package: Package, given: Path | None) -> Path:
        path = tmp_path / package.file
        path.write_bytes(package_of(content[package]))
        return path

    emoji = [one for one in train.emoji_classes() if one.name in {"bell", "duck"}]
    monkeypatch.setattr(sources, "HERE", lists)
    monkeypatch.setattr(sources, "package_file", package_file)
    monkeypatch.setattr(train, "emoji_classes", lambda: emoji)
    monkeypatch.setenv("LCL_ADAPTER_CACHE", str(tmp_path / "cache"))
    return photo_data_folder()


@pytest.fixture(scope="module")
def first_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test that needs all data sets leaves a copy for the others."""
    return tmp_path_factory.mktemp("photo") / "data"


@pytest.fixture
def built(small: Path, first_build: Path) -> Path:
    """The folder of :func:`small` with all data sets in it."""
    if first_build.exists():
        shutil.copytree(first_build, small)
    else:
        data.build(small)
        shutil.copytree(small, first_build)
    return small


def test_the_sources_of_recipes_read_the_data_sets(built: Path) -> None:
    small = built
    assert sorted(file.name for file in small.iterdir()) == sorted(name for one in data.DATA_SETS for name in one.files), "nothing else is left"
    columns = {"image": ["image"], "class": ["class"], "group": ["group"]}
    pool = read_manifest(packaged(Path("photo:real.csv")), packaged(Path("photo:real.zip")), columns)
    assert [(one.name, one.groups, len(one.pictures)) for one in pool.classes] == [("duck", ("bird",), 2)]
    trained = read_manifest(small / "train.csv", small / "train.zip", columns, where={"split": "train"})
    assert {one.name for one in trained.classes} == {"saw", "drill", "chisel", "file", "emu", "bell"}, "the emoji duck is left out too"
    assert {one.name: len(one.pictures) for one in trained.classes}["saw"] == train.COMPOSITES
    assert {one.groups for one in trained.classes if one.name == "saw"} == {("tools",)}
    for split, names in (("train", {"saw", "drill", "chisel", "file", "emu"}), ("held_out", {"duck"})):
        sold = read_manifest(small / "products.csv", small / "products.zip", columns, where={"split": split})
        assert {one.name for one in sold.classes} == names
        parts = read_mvtec(small / f"inspection-{split.replace('_', '-')}.zip")
        assert {one.name for one in parts.categories} == names
        assert all(set(one.defects) == set(inspection.DEFECTS) for one in parts.categories)
        assert all(specimen.mask for one in parts.categories for kind in one.defects.values() for specimen in kind)
    assert (small / "left-out.csv").read_text().splitlines()[1:] == ["duck,duck"]


def test_the_licences_are_those_that_the_packages_declare(built: Path) -> None:
    lines = (built / "ATTRIBUTION.md").read_text().splitlines()
    assert "| tuxpaint-stamps-default | 2022.06.04-1 | 2002 Somebody | GPL-2 |" in lines
    assert "| erase/resource/a.webp | 2011 Ann; 2012 Ben | CC-BY-SA-3.0 | https://example.org/a |" in lines


def test_the_last_paragraph_that_names_a_file_decides() -> None:
    declared = attribution.licences(COPYRIGHT)
    assert [one.licence for one in declared] == ["GPL-2", "CC0-1.0", "CC-BY-SA-3.0"]
    licence_of = {name: attribution.licence_of(f"src/activities/erase/resource/{name}", declared).licence for name in ("a.webp", "b.webp", "b.svg")}
    assert licence_of == {"a.webp": "CC-BY-SA-3.0", "b.webp": "GPL-2", "b.svg": "CC0-1.0"}


def test_two_runs_write_the_same_bytes(built: Path) -> None:
    first = {file.name: file.read_bytes() for file in built.iterdir()}
    shutil.rmtree(built)
    data.build(built)
    assert {file.name: file.read_bytes() for file in built.iterdir()} == first


def test_a_stopped_run_leaves_no_half_file_and_is_resumed(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while the products are drawn: the data sets before them stay, and are not made again."""
    drawn: list[str] = []
    add_photo = drawing.add_photo

    def stopping(archive: zipfile.ZipFile, name: str, image: Image.Image, quality: int = drawing.QUALITY) -> None:
        drawn.append(name)
        if "products" in str(archive.filename):
            raise KeyboardInterrupt
        add_photo(archive, name, image, quality)

    monkeypatch.setattr(drawing, "add_photo", stopping)
    with pytest.raises(KeyboardInterrupt):
        data.build(small)
    assert {file.name for file in small.iterdir()} == {"real.zip", "real.csv", "train.zip", "train.csv", "left-out.csv", data.UNPACKED}
    monkeypatch.setattr(drawing, "add_photo", add_photo)
    monkeypatch.setattr(train, "write", lambda *_: pytest.fail("train.zip is there"))
    before = (small / "train.zip").stat().st_mtime_ns
    data.build(small)
    assert (small / "train.zip").stat().st_mtime_ns == before
    assert zipfile.ZipFile(small / "products.zip").testzip() is None
    assert not (small / data.UNPACKED).exists()


def test_half_a_data_set_is_made_again(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the renaming of the archive and that of its table."""
    monkeypatch.setattr(train, "write", lambda *_: pytest.fail("train.zip is there"))
    table = (built / "real.csv").read_bytes()
    (built / "real.csv").unlink()
    data.build(built)
    assert (built / "real.csv").read_bytes() == table


def test_a_finished_folder_needs_no_package(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "package_file", lambda *_: pytest.fail("no package is needed"))
    data.build(built)


def test_a_file_that_the_package_lacks_is_named(small: Path) -> None:
    with (sources.HERE / "stamps.csv").open("a") as file:
        file.write("tools/nothing,nothing\n")
    with pytest.raises(DataError, match=r"tuxpaint-stamps-default.*lacks tools/nothing\.png"):
        data.build(small)
    assert not (small / data.UNPACKED / STAMPS.name).exists()


def test_a_small_disk_is_noticed_before_anything_is_fetched(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "NEEDED", 10**18)
    monkeypatch.setattr(sources, "package_file", lambda *_: pytest.fail("nothing is fetched"))
    with pytest.raises(RunError, match="are free"):
        data.build(small)


def test_the_command_prints_an_error_and_exits_with_2(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> Path:
        raise DataError("no network")

    monkeypatch.setattr(sources, "package_file", refused)
    ran = CliRunner().invoke(data.main, [])
    assert ran.exit_code == 2


# What is drawn


def cut_out(seed: int = 0) -> Image.Image:
    with Image.open(io.BytesIO(stamp(seed))) as image:
        return drawing.cropped(image)


@pytest.mark.parametrize("kind", inspection.DEFECTS)
@pytest.mark.parametrize("seed", range(4))
def test_a_defect_is_where_its_mask_says(kind: str, seed: int) -> None:
    part = drawing.cropped(cut_out(seed), inspection.LONGEST)
    page = Image.new("RGB", (224, 224), "white")
    defect = inspection.damaged(np.random.default_rng(seed), part, page, kind)
    assert defect is not None
    changed, mask = (np.asarray(image, dtype=int) for image in defect)
    inside = np.asarray(part)[..., 3] > 128
    assert inspection.CHANGED[0] <= (mask > 0).sum() / inside.sum() <= inspection.CHANGED[1]
    same = mask == 0
    assert np.abs(changed - np.asarray(part, dtype=int))[same][:, :3].max() <= inspection.VISIBLE + 1 or kind in {"hole", "missing corner"}
    good, _ = inspection.photo(np.random.default_rng(1), part, page)
    bad, moved = inspection.photo(np.random.default_rng(1), defect[0], page, defect[1])
    assert moved is not None
    assert moved.size == bad.size == (224, 224)
    difference = np.abs(np.asarray(good, dtype=int) - np.asarray(bad, dtype=int)).max(-1)
    assert difference[np.asarray(moved) > 0].mean() > 5 * difference[np.asarray(moved) == 0].mean()


def test_a_composite_shows_the_thing_whole_on_its_page() -> None:
    page = Image.new("RGB", (224, 224), (0, 0, 255))
    for seed in range(5):
        pixels = np.asarray(drawing.composite(np.random.default_rng(seed), cut_out(), page), dtype=int)
        thing = np.abs(pixels - pixels[0, 0]).max(-1) > 40
        sides = [np.ptp(np.argwhere(thing)[:, axis]) + 1 for axis in (0, 1)]
        assert 0.45 * 224 < max(sides) <= 224
        assert pixels.shape == (224, 224, 3)


def test_a_transparent_photo_is_laid_on_white() -> None:
    page = real.on_white(Image.new("RGBA", (2000, 400), (0, 0, 0, 0)))
    assert page.size == (512, 102)
    assert page.getpixel((9, 9)) == (255, 255, 255)


# The true data sets, where they were fetched


@pytest.mark.skipif(not (TRUE_FOLDER / "ATTRIBUTION.md").exists(), reason=f"the photos are not fetched into {TRUE_FOLDER} (make photos-data)")
def test_the_fetched_data_sets_are_those_of_the_lists() -> None:
    with (TRUE_FOLDER / "real.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["class"]) for row in rows] == [(real.photo_name(photo), one.name) for one in REAL for photo in one.photos]
    with (TRUE_FOLDER / "train.csv").open(newline="") as file:
        listed = {(row["class"], row["split"]) for row in csv.DictReader(file)}
    assert listed == {(one.name, one.split) for one in train.training_classes()}
    for name in ("real.zip", "train.zip", "products.zip"):
        with zipfile.ZipFile(TRUE_FOLDER / name) as archive:
            for member in archive.namelist()[:: max(1, len(archive.namelist()) // 20)]:
                Image.open(io.BytesIO(archive.read(member))).load()
