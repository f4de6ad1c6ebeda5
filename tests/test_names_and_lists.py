"""Names and lists as people's tools write them: read, with a note where something was guessed, or refused by name."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import shutil
import unicodedata
import zipfile
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lcl_adapter.data.sources import Picture, read_class_folders, read_image
from lcl_adapter.data.sources.base import remarks
from lcl_adapter.data.sources.boxes import region_box
from lcl_adapter.data.sources.encodings import decode
from lcl_adapter.data.sources.held_out import is_held_out
from lcl_adapter.data.sources.manifest import read_manifest
from lcl_adapter.data.sources.tables import Table
from lcl_adapter.data.sources.tree import Tree
from lcl_adapter.errors import DataError, LclError
from lcl_adapter.recipe import Recipe
from lcl_adapter.report.pages import _url
from lcl_adapter.training import preflight
from tests.conftest import paint

COLUMNS = {"image": ["photo"], "class": ["label"]}
ROWS = [(f"p{i}.png", ("ネジ", "ボルト")[i % 2]) for i in range(6)]


class WithoutFlag(zipfile.ZipInfo):
    """A member whose name is in ``encoding`` and not marked, as Explorer writes it."""

    encoding = "cp932"

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802
        return self.filename.encode(self.encoding), self.flag_bits & ~0x800


def packed(path: Path, names: list[str], encoding: str = "cp932") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names):
            data = BytesIO()
            Image.fromarray(np.random.default_rng(number).integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(data, "PNG")
            member = WithoutFlag(name)
            member.encoding = encoding
            archive.writestr(member, data.getvalue())
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number, (name, _) in enumerate(ROWS):
        for folder in ("images", "images/sub"):
            paint(tmp_path / folder / name, (100, 90, 80), seed=number + 10 * len(folder))
    return tmp_path / "images"


def table(between: str = ",", end: str = "\r\n", named: Callable[[str], str] = str) -> str:
    return "".join(between.join(row) + end for row in [("photo", "label"), *((named(image), label) for image, label in ROWS)])


@pytest.mark.parametrize(
    ("raw", "note"),
    [
        (table().encode("utf-8-sig"), ""),
        (table(";").encode(), ""),
        (table(end="\r").encode(), ""),  # a classic Mac's
        (("sep=;\r\n" + table(";")).encode(), ""),
        (table(", ").encode(), ""),
        (table().encode("cp932"), "read as Shift-JIS"),
        (table("\t").encode("utf-16"), ""),
        (table("\t").encode("utf-16-le"), "read as utf-16-le"),
        (('"photo";"label";"note, free"\r\n' + "".join(f"{a};{b};x, y\r\n" for a, b in ROWS)).encode(), ""),
        ((table() + ",\r\n,,\r\n").encode(), ""),
        (table(named=lambda name: "sub\\" + name).encode(), ""),
        (table(named=lambda name: "/data/upload/1/ab12cd34-" + name).encode(), "there under other names"),
        (table(named=lambda name: "/data/local-files/?d=sub/" + name).encode(), "there under other names"),
    ],
)
def test_every_form_of_a_table_is_read(images: Path, raw: bytes, note: str) -> None:
    (images.parent / "list.csv").write_bytes(raw)
    pool = read_manifest(images.parent / "list.csv", images, COLUMNS)
    assert {one.name: len(one.pictures) for one in pool.classes} == {"ネジ": 3, "ボルト": 3}
    assert all(read_image(picture).size for one in pool.classes for picture in one.pictures)
    assert pool.skipped == {}
    assert note in "".join(pool.notes)
    assert bool(note) == bool(pool.notes)


def test_absolute_paths_inside_are_read_and_others_are_refused(images: Path) -> None:
    file = images.parent / "list.csv"
    file.write_text(table(named=lambda name: str(images / name)), encoding="utf-8")
    assert len(read_manifest(file, images, COLUMNS).classes) == 2
    file.write_text(table(named=lambda name: "/elsewhere/" + name), encoding="utf-8")
    with pytest.raises(DataError, match="leads out of it"):
        read_manifest(file, images, COLUMNS)


def test_a_name_in_another_case_is_told(images: Path) -> None:
    (images.parent / "list.csv").write_text(table(named=str.upper), encoding="utf-8")
    with pytest.raises(DataError, match=r"no image 'P0\.PNG'.*there is 'p0\.png'"):
        read_manifest(images.parent / "list.csv", images, COLUMNS)


def test_an_encoding_is_given_or_recognised_or_refused(images: Path) -> None:
    file = images.parent / "list.csv"
    file.write_bytes(table().replace("ネジ", "螺丝").replace("ボルト", "螺栓").encode("gbk"))
    assert [one.name for one in read_manifest(file, images, COLUMNS, encoding="gbk").classes] == ["螺丝", "螺栓"]
    with pytest.raises(DataError, match="not ascii"):
        read_manifest(file, images, COLUMNS, encoding="ascii")
    file.write_bytes(table().replace("ネジ", "Größe").replace("ボルト", "Öse").encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 .* set `encoding: cp932`"):
        read_manifest(file, images, COLUMNS)
    recipe = {"sources": {"a": {"type": "manifest", "file": "a", "images": "b", "encoding": "klingon"}}}
    with pytest.raises(ValueError, match="no encoding 'klingon'"):
        Recipe.model_validate(recipe)


@pytest.mark.parametrize("empty", [float("nan"), None, "NaN", "null", " "])
def test_nothing_is_no_value(images: Path, empty: Any) -> None:
    records = [{"photo": image, "label": label} for image, label in ROWS] + [{"photo": ROWS[0][0], "label": empty}]
    (images.parent / "list.json").write_text(json.dumps(records))  # a list, and not lines
    with pytest.raises(DataError, match="record 7: no value for 'label'"):
        read_manifest(images.parent / "list.json", images, COLUMNS)


def test_label_studios_export_is_read(images: Path) -> None:
    def task(image: str, label: str, **more: Any) -> dict[str, Any]:
        result = {"from_name": "choice", "type": "choices", "value": {"choices": [label]}}
        return {"data": {"image": f"/data/upload/1/0a1b2c3d-{image}"}, "annotations": [{"result": [result], **more}]}

    tasks = [task(image, label) for image, label in ROWS] + [task("sub/p0.png", "wrong", was_cancelled=True)]
    (images.parent / "export.json").write_text(json.dumps(tasks))
    with pytest.raises(DataError, match="record 7: no value for 'choice'"):
        read_manifest(images.parent / "export.json", images, {"image": ["image"], "class": ["choice"]})
    pool = read_manifest(images.parent / "export.json", images, {"image": ["image"], "class": ["choice"]}, on_fault="skip")
    assert {one.name: len(one.pictures) for one in pool.classes} == {"ネジ": 3, "ボルト": 3}
    box = {"x": 10, "y": 20, "width": 50, "height": 40, "rectanglelabels": ["scratch"]}
    boxed = {"from_name": "label", "original_width": 200, "original_height": 100, "value": box}
    (images.parent / "export.json").write_text(json.dumps([{"data": {"image": "p0.png"}, "annotations": [{"result": [boxed]}]}]))
    pool = read_manifest(images.parent / "export.json", images, {"image": ["image"], "class": ["label"], "box": ["box"]})
    assert pool.classes[0].boxes == ((20.0, 20.0, 120.0, 60.0),)


def one_hot(path: Path, *rows: str, heading: str = "filename, good, scratched, dented") -> Path:
    """Roboflow's export of a classification with several labels."""
    path.write_text("\n".join((heading, *rows)) + "\n")
    return path


def test_one_column_a_class_is_read(images: Path, tmp_path: Path) -> None:
    """Roboflow's ``_classes.csv``; rows with several classes or with none are left out and counted."""
    names = sorted(path.name for path in images.iterdir())
    file = one_hot(tmp_path / "_classes.csv", f"{names[0]}, 1, 0, 0", f"{names[1]}, 0, 1, 0", f"{names[2]}, 1, 1, 0", f"{names[3]}, 0, 0, 0")
    columns = {"image": ["filename"], "class": ["class"]}
    pool = read_manifest(file, images, columns)
    assert {c.name: [p.path.name for p in c.pictures] for c in pool.classes} == {"good": [names[0]], "scratched": [names[1]]}
    assert pool.skipped == {"picture of several classes": 1, "picture of no class": 1}
    assert [note.partition("; ")[2] for note in pool.notes] == ["each of good, scratched, dented is read as a class, with 1 for its pictures"]
    split = one_hot(tmp_path / "split.csv", f"{names[0]},train,1.0,0.0", f"{names[1]},test,0.0,0.0", heading="filename,split,good,bad")
    assert read_manifest(split, images, columns, where={"split": "train"}).skipped == {}, "a row that is not asked for is not counted"


def test_columns_that_are_no_classes_are_not_read_as_such(images: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in images.iterdir())
    columns = {"image": ["filename"], "class": ["class"]}
    for heading, row in (("filename,label,flipped", f"{names[0]},good,1"), ("filename,defect", f"{names[0]},1"), ("filename,a,b", "")):
        with pytest.raises(DataError, match="no column 'class'"):
            read_manifest(one_hot(tmp_path / "list.csv", row, heading=heading), images, columns)
    file = one_hot(tmp_path / "_classes.csv", f"{names[0]}, 1, 0, 0", f"{names[1]}, 0, 0.7, 0", f"{names[2]}, 0, 1")
    with pytest.raises(DataError) as refused:
        read_manifest(file, images, columns)
    assert "line 3: '0.7' in column 'scratched' is neither 0 nor 1" in str(refused.value)
    assert "line 4: 4 columns are expected" in str(refused.value)


OWN = {"image": ["image"], "class": ["class"]}


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("list.xlsx", b"PK\x03\x04\x14\x00\x06\x00", "an Excel workbook or another zip archive, not a text file. Save it as CSV"),
        ("list.csv", b"\xd0\xcf\x11\xe0\xa1\xb1", "an old Excel workbook"),
        ("list.parquet", b"PAR1" + bytes(40) + b"PAR1", "a Parquet file"),
        ("voc.xml", b"<?xml version='1.0'?><annotation/>", "XML, not a text file"),
        ("voc.xml", b"<annotation><filename>a.png</filename></annotation>", "Pascal VOC"),
        ("list.csv", b"<!DOCTYPE html><html>", "a web page"),
        ("list.csv", b"", "its first line is empty; it must name the columns"),
        ("list.csv", b"\n\n\n", "its first line is empty"),
        ("list.csv", b"a.png,good\nb.png,bad\n", "Its first line is a picture, and must name the columns"),
        ("list.csv", b"image,class,class\na.png,x,y\n", "several columns are called 'class'"),
        ("list.csv", ",".join(f"c{n}" for n in range(500)).encode() + b"\n", "'c19' and 480 more"),
        ("list.json", json.dumps({f"c{n}": "a" for n in range(500)}).encode(), "and 480 more"),
        (
            "list.csv",
            b"image,class\nhttps://example.org/a.png,x\n",
            "no image 'https://example.org/a.png' under .*: it is an address; fetch the pictures",
        ),
    ],
)
def test_what_is_no_list_is_named(tmp_path: Path, images: Path, name: str, raw: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=expected) as refused:
        read_manifest(tmp_path / name, images, OWN)
    assert len(str(refused.value)) < 600


def test_a_label_by_name_is_a_list(tmp_path: Path, images: Path) -> None:
    """``{"a.jpg": "good"}``, as scripts write it; a single record in the form of a list's line stays one."""
    names = sorted(path.name for path in images.glob("*.*"))[:3]
    (tmp_path / "list.json").write_text(json.dumps({names[0]: "good", names[1]: "bad", names[2]: "good"}))
    pool = read_manifest(tmp_path / "list.json", images, OWN)
    assert {c.name: [p.path.name for p in c.pictures] for c in pool.classes} == {"bad": [names[1]], "good": [names[0], names[2]]}
    (tmp_path / "list.json").write_text(json.dumps({"image": names[0], "class": "good"}))
    assert [c.name for c in read_manifest(tmp_path / "list.json", images, OWN).classes] == ["good"]
    (tmp_path / "list.json").write_text(json.dumps({names[0]: None, "gone.png": "good"}))
    with pytest.raises(DataError, match=r"no value for 'class'(.|\n)*no image 'gone.png'"):
        read_manifest(tmp_path / "list.json", images, OWN)


def test_a_list_of_labels_is_of_several_classes(tmp_path: Path, images: Path) -> None:
    """The first label is not read as the only one. One value in several languages is one label."""
    names = sorted(path.name for path in images.glob("*.*"))[:4]
    in_languages = [{"language_tag": "en", "value": "good"}, {"language_tag": "de", "value": "gut"}]
    labels = [["good", "scratched"], ["good"], in_languages, ["good", "good"]]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({"image": n, "class": label}) for n, label in zip(names, labels, strict=True)))
    pool = read_manifest(tmp_path / "list.jsonl", images, OWN)
    assert {c.name: len(c.pictures) for c in pool.classes} == {"good": 3}
    assert pool.skipped == {"picture of several classes": 1}


def test_labels_of_a_list_in_other_capital_letters_are_noted(tmp_path: Path, images: Path) -> None:
    names = sorted(path.name for path in images.glob("*.*"))[:3]
    (tmp_path / "list.csv").write_text("image,class\n" + "".join(f"{n},{c}\n" for n, c in zip(names, ("Good", "good", "bad"), strict=True)))
    pool = read_manifest(tmp_path / "list.csv", images, OWN)
    assert [note.partition(": ")[2].partition(", and")[0] for note in pool.notes] == ["the classes 'Good', 'good' differ in capital letters only"]


def coco(path: Path, **changed: Any) -> Path:
    categories = [{"id": 1, "name": "screw", "supercategory": "parts"}, {"id": 2, "name": "nut", "supercategory": "none"}]
    annotations = [{"id": 10 * c + i, "image_id": i, "category_id": c, "bbox": [2 * c, 3, 12, 9]} for c in (1, 2) for i in range(4)]
    listed = [{"id": i, "file_name": f"p{i}.png", "width": 48, "height": 40} for i in range(4)]
    path.write_text(json.dumps({"images": listed, "categories": categories, "annotations": annotations, **changed}))
    return path


def test_objects_of_a_detection_export_are_cut_out_or_their_pictures_left_out(images: Path) -> None:
    columns = {"image": ["image"], "class": ["class"]}
    file = coco(images.parent / "coco.json")
    with pytest.raises(DataError, match=r"4 x picture of several classes.*`crop: true` shows each object"):
        read_manifest(file, images, columns)
    pool = read_manifest(file, images, {**columns, "box": ["box"]}, crop=True)
    assert {one.name: len(one.pictures) for one in pool.classes} == {"nut": 4, "screw": 4}
    (nut, screw) = (one.pictures[0] for one in pool.classes)
    whole = np.asarray(read_image(Picture(nut.path)))
    assert np.array_equal(np.asarray(read_image(nut)), whole[3:12, 4:16])
    assert np.array_equal(np.asarray(read_image(screw)), whole[3:12, 2:14])
    assert Picture.parse(str(nut)) == nut


def test_categories_of_one_name_are_one_class_with_a_note(images: Path) -> None:
    """As an export of two merged projects has them. One id for two names says nothing."""
    columns = {"image": ["image"], "class": ["class"]}
    annotations = [{"image_id": i, "category_id": 1 + i % 3} for i in range(4)]
    names = [{"id": 1, "name": "screw"}, {"id": 2, "name": "nut"}, {"id": 3, "name": "screw"}]
    pool = read_manifest(coco(images.parent / "coco.json", annotations=annotations, categories=names), images, columns)
    assert {one.name: len(one.pictures) for one in pool.classes} == {"nut": 1, "screw": 3}
    assert [note.partition(": ")[2] for note in pool.notes] == ["the categories 1, 3 all have the name 'screw'; they are read as one class"]
    names[2]["id"] = 1
    with pytest.raises(DataError, match="two categories have the id 1"):
        read_manifest(coco(images.parent / "coco.json", annotations=annotations, categories=names), images, columns)


def test_one_odd_annotation_does_not_refuse_the_file(images: Path) -> None:
    annotations = [{"image_id": i, "category_id": 1 + i % 2} for i in range(4)] + [{"image_id": 77, "category_id": 1}, 3]
    file = coco(images.parent / "coco.json", annotations=annotations)
    pool = read_manifest(file, images, {"image": ["image"], "class": ["class"]}, on_fault="skip")
    assert {one.name: len(one.pictures) for one in pool.classes} == {"nut": 2, "screw": 2}
    assert [fault.message.partition(": ")[2] for fault in pool.faults] == [
        "annotation 5: image_id 77 is no image of the file",
        "annotation 6: not a JSON object",
    ]
    rounded = [{"image_id": 0, "category_id": 1, "bbox": [-0.4, 0, 10, 10]}, {"image_id": 1, "category_id": 1, "bbox": [-4, 0, 10, 10]}]
    pool = read_manifest(
        coco(file, annotations=rounded), images, {"image": ["image"], "class": ["class"], "box": ["box"]}, on_fault="skip", crop=True
    )
    assert pool.classes[0].pictures[0].crop == (0.0, 0.0, 9.6, 10.0)
    assert [fault.kind for fault in pool.faults] == ["box out of range"]


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
def test_boxes_on_stored_pixels_of_a_turned_photo_are_turned(tmp_path: Path, orientation: int) -> None:
    """A white object on black, drawn on the stored picture; its box is listed on stored or on upright pixels."""
    stored = np.zeros((40, 60, 3), np.uint8)
    stored[10:20, 5:35] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "images").mkdir()
    Image.fromarray(stored).save(tmp_path / "images" / "p0.png", exif=exif)
    upright = np.asarray(read_image(Picture(tmp_path / "images" / "p0.png")))
    rows, columns = np.flatnonzero(upright.any((1, 2))), np.flatnonzero(upright.any((0, 2)))
    on_upright = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    for box, size in (([5, 10, 35, 20], (60, 40)), (on_upright, upright.shape[1::-1])):
        (tmp_path / "list.csv").write_text(f"file,class,x0,y0,x1,y1,w,h\np0.png,a,{','.join(map(str, box))},{size[0]},{size[1]}\n")
        mapped = {"image": ["file"], "class": ["class"], "box": ["x0", "y0", "x1", "y1"], "size": ["w", "h"]}
        cut = read_manifest(tmp_path / "list.csv", tmp_path / "images", mapped, crop=True).classes[0].pictures[0]
        assert np.asarray(read_image(cut)).min() == 255
        assert Picture.parse(str(cut)) == cut, "a report's thumbnail shows the same part"
        thumbnail = Image.open(io.BytesIO(base64.b64decode(_url(str(cut)).partition(",")[2])))
        assert np.asarray(thumbnail.convert("L"))[40:56, 40:56].min() > 250
        (region,) = read_manifest(tmp_path / "list.csv", tmp_path / "images", mapped).regions["a"]
        assert region_box(region) == region_box(replace(region, box=tuple(map(float, on_upright)), picture=Picture(region.picture.path)))
    (tmp_path / "list.csv").write_text("file,class,x0,y0,x1,y1,w,h\np0.png,a,5,10,35,20,600,400\n")
    with pytest.raises(DataError, match="its list says 600 x 400 pixels, the file has 60 x 40: was it resized"):
        read_image(read_manifest(tmp_path / "list.csv", tmp_path / "images", mapped, crop=True).classes[0].pictures[0])


@pytest.mark.parametrize(
    "picture",
    [
        Picture(Path("new!/wow!.jpg")),
        Picture(Path("set.ZIP"), "new!/a.jpg"),
        Picture(Path("a.zip.jpg")),
        Picture(Path("two\nlines.jpg"), view=3, turned=2),
        Picture(Path("photo (view 2).jpg"), tile=(2, 3, 5)),
        Picture(Path("large.png"), crop=(0.1, 12345.6, 3e-5, 1e6), listed_size=(20000, 2000000)),
        Picture(Path("plain.jpg"), crop=(1, 2, 3, 4)),
        Picture(Path("deep.png"), white=4095.0, turned=1),
        Picture(Path("deep.tif"), tile=(2, 2, 0), white=0.25),
    ],
    ids=str,
)
def test_a_pictures_name_says_which_it_is(picture: Picture) -> None:
    assert Picture.parse(str(picture)) == picture


def test_a_zip_of_japanese_windows_has_its_names(tmp_path: Path) -> None:
    names = [f"{label}/写真{number}.png" for label in ("ネジ", "ボルト", "表面傷") for number in range(2)]
    pool = read_class_folders(packed(tmp_path / "photos.zip", names))
    assert [one.name for one in pool.classes] == ["ネジ", "ボルト", "表面傷"]
    assert all(read_image(picture).size == (9, 9) for one in pool.classes for picture in one.pictures)
    assert "6 names are not UTF-8; read as Shift-JIS (cp932), for instance 'ネジ/写真0.png'" in pool.notes[0]


def test_names_of_an_archive_are_never_garbage(tmp_path: Path) -> None:
    chinese = packed(tmp_path / "chinese.zip", [f"{label}/{n}.png" for label in ("螺丝", "垫圈", "弹簧") for n in range(2)], "gbk")
    with pytest.raises(DataError, match="neither UTF-8 nor Shift-JIS, and would be garbage"):
        read_class_folders(chinese)
    pool = read_class_folders(chinese, encoding="gbk")
    assert [one.name for one in pool.classes] == ["垫圈", "弹簧", "螺丝"]
    assert all(read_image(picture).size for one in pool.classes for picture in one.pictures)
    western = read_class_folders(packed(tmp_path / "western.zip", ["café/0.png", "Öse/0.png"], "cp437"))
    assert [one.name for one in western.classes] == ["café", "Öse"]
    mac = read_class_folders(packed(tmp_path / "mac.zip", [unicodedata.normalize("NFD", "ガスケット/0.png"), "ring/0.png"], "utf-8"))
    assert ([one.name for one in mac.classes], mac.notes) == (["ring", "ガスケット"], ())


@pytest.mark.parametrize("label", ["Löcher", "Ölfleck", "schön", "pièce", "modèle", "défaut"])
def test_accented_letters_are_not_taken_for_kanji(tmp_path: Path, images: Path, label: str) -> None:
    """Ö with the letter behind it is a kanji in Shift-JIS."""
    archive = packed(tmp_path / "photos.zip", [f"{label}/0.png", "gut/0.png"], "cp850")
    assert {one.name for one in read_class_folders(archive).classes} == {label, "gut"}
    (tmp_path / "list.csv").write_bytes(table().replace("ネジ", label).replace("ボルト", "gut").encode("cp1252"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_manifest(tmp_path / "list.csv", images, COLUMNS)


def test_an_encoding_of_the_list_leaves_an_archives_utf8_names(tmp_path: Path) -> None:
    archive = packed(tmp_path / "photos.zip", ["ネジ/0.png", "ボルト/1.png"], "utf-8")
    (tmp_path / "list.csv").write_bytes("photo,label\nネジ/0.png,ネジ\nボルト/1.png,ボルト\n".encode("cp932"))
    for encoding in (None, "cp932"):
        assert len(read_manifest(tmp_path / "list.csv", archive, COLUMNS, encoding=encoding).classes) == 2


def test_an_archive_with_a_repeated_entry_is_read(tmp_path: Path) -> None:
    names = ["nut/0.png", "nut/0.png", "__MACOSX/nut/._0.png", "__MACOSX/nut/._0.png", "screw/0.png"]
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive = packed(tmp_path / "photos.zip", names)
    assert [one.name for one in read_class_folders(archive).classes] == ["nut", "screw"]


def test_columns_may_have_any_name(images: Path) -> None:
    (images.parent / "list.csv").write_text("image,fault,annotation\n" + "".join(f"p{i}.png,{'ab'[i % 2]},x\n" for i in range(6)))
    pool = read_manifest(images.parent / "list.csv", images, {"image": ["image"], "class": ["fault"]})
    assert {one.name: len(one.pictures) for one in pool.classes} == {"a": 3, "b": 3}


def test_a_macs_names_are_those_that_were_typed(tmp_path: Path) -> None:
    def decomposed(text: str) -> str:
        return unicodedata.normalize("NFD", text)

    for number, name in enumerate(("ボルト", "ガスケット")):
        for copy in range(2):
            paint(tmp_path / "images" / decomposed(name) / decomposed(f"{name}{copy}.png"), (90, 90, 90), seed=2 * number + copy)
    with (tmp_path / "list.csv").open("w", newline="", encoding="utf-8") as out:
        listed = [(f"{name}/{name}{copy}.png", name) for name in ("ボルト", "ガスケット") for copy in range(2)]
        csv.writer(out).writerows([("photo", "label"), *listed])
    for pool in (read_manifest(tmp_path / "list.csv", tmp_path / "images", COLUMNS), read_class_folders(tmp_path / "images")):
        assert [one.name for one in pool.classes] == ["ガスケット", "ボルト"]
        assert all(read_image(picture).size for one in pool.classes for picture in one.pictures)
    for name in ("プラグ", "バルブ", "ギア"):
        assert is_held_out(name, 0.5) == is_held_out(decomposed(name), 0.5)
    paint(tmp_path / "images" / "ガスケット" / "other.png", (90, 90, 90), seed=9)
    with pytest.raises(DataError, match="'ガスケット/' is there twice, in two ways of writing its letters"):
        read_class_folders(tmp_path / "images")


def test_links_that_lead_nowhere_are_faults(tmp_path: Path) -> None:
    for number, name in enumerate(("nut", "screw")):
        paint(tmp_path / "photos" / name / "0.png", (90, 90, 90), seed=number)
    (tmp_path / "photos" / "screw" / "far.png").symlink_to("/mnt/nas/screw/x.png")
    (tmp_path / "photos" / "washer").symlink_to("/mnt/nas/washer")
    (tmp_path / "photos" / "loop").symlink_to("loop")
    pool = read_class_folders(tmp_path / "photos", on_fault="skip")
    assert [one.name for one in pool.classes] == ["nut", "screw"]
    assert pool.skipped == {"link that leads nowhere": 3}
    with pytest.raises(DataError, match=r"screw/far\.png is a link to /mnt/nas/screw/x\.png, which is not there: is it mounted"):
        read_class_folders(tmp_path / "photos")


def test_photos_in_other_places_are_named(tmp_path: Path) -> None:
    for number, name in enumerate(("nut/0.png", "nut/day 2/1.png", "screw/0.png", "loose.png")):
        paint(tmp_path / "photos" / name, (90, 90, 90), seed=number)
    pool = read_class_folders(tmp_path / "photos")
    assert pool.skipped == {"photo one folder too deep": 1, "photo beside the class folders": 1}
    told = "\n".join(remarks(pool))
    assert "not used, photo one folder too deep: nut/day 2/1.png; move it up into its class" in told
    assert "not used, photo beside the class folders: loose.png; move it into a class" in told
    paint(tmp_path / "photos" / "ring" / "day 1" / "0.png", (90, 90, 90), seed=9)
    with pytest.raises(DataError, match=r"class 'ring' has its 1 images one folder too deep \(ring/day 1/0\.png\)"):
        read_class_folders(tmp_path / "photos")


def test_folders_that_systems_add_are_no_classes(tmp_path: Path) -> None:
    for label in ("good", "bad"):
        paint(tmp_path / "photos" / label / "0.png", (90, 80, 70), seed=len(label))
        for folder in ("@eaDir/0.png", "__MACOSX", ".thumbnails"):
            paint(tmp_path / "photos" / label / folder / "THUMB_M.jpg", (90, 80, 70), seed=9)
    for folder in ("@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"):
        paint(tmp_path / "photos" / folder / "0.png", (1, 2, 3), seed=7)
    pool = read_class_folders(tmp_path / "photos")
    assert ([c.name for c in pool.classes], pool.notes, pool.skipped) == (["bad", "good"], (), {})
    archive = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", tmp_path / "photos"))
    assert [c.name for c in read_class_folders(archive).classes] == ["bad", "good"]


def test_names_that_differ_in_blanks_or_in_capital_letters(tmp_path: Path) -> None:
    for number, label in enumerate(("good", "good ", "Bad", "bad", " dented ")):
        paint(tmp_path / "photos" / label / "0.png", (90, 80, 70), seed=number)
    with pytest.raises(DataError, match="the classes 'good', 'good ' differ in blanks only; join or rename them"):
        read_class_folders(tmp_path / "photos")
    shutil.rmtree(tmp_path / "photos" / "good ")
    pool = read_class_folders(tmp_path / "photos")
    assert [c.name for c in pool.classes] == ["dented", "Bad", "bad", "good"]
    assert [note.partition(": ")[2] for note in pool.notes] == [
        "the classes 'Bad', 'bad' differ in capital letters only, and are read as different classes"
    ]


def test_further_formats_of_photos(tmp_path: Path) -> None:
    """JPEG 2000 and Targa are read; JPEG XL is named as a photo."""
    for label in ("good", "bad"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number, suffix in enumerate(("jp2", "tga")):
            Image.fromarray(np.full((20, 20, 3), 40 * number + 20 * len(label), np.uint8)).save(tmp_path / "photos" / label / f"0.{suffix}")
    pictures = [p for c in read_class_folders(tmp_path / "photos").classes for p in c.pictures]
    assert [np.asarray(read_image(p)).max() for p in pictures] == [60, 100, 80, 120]
    xl = tmp_path / "photos" / "good" / "1.jxl"
    xl.write_bytes(b"\xff\x0a" + bytes(40))
    assert xl in [p.path for c in read_class_folders(tmp_path / "photos").classes for p in c.pictures]
    with pytest.raises(DataError, match="A JPEG XL photo is not read here: save it as JPEG or PNG"):
        read_image(Picture(xl))


def test_folders_of_splits_are_no_classes(tmp_path: Path) -> None:
    for number, name in enumerate(("train/nut/0.png", "train/screw/0.png", "valid/nut/0.png", "Test/nut/0.png")):
        paint(tmp_path / "photos" / name, (90, 90, 90), seed=number)
    with pytest.raises(DataError, match=r"Test, train, valid are splits.*give .*photos/train as the path"):
        read_class_folders(tmp_path / "photos")
    assert [one.name for one in read_class_folders(tmp_path / "photos" / "train").classes] == ["nut", "screw"]


def test_one_photo_has_one_label(tmp_path: Path, pocket_tiny: Path) -> None:
    for number, name in enumerate(("nut/0.png", "nut/1.png", "nut/2.png", "screw/0.png", "screw/1.png", "ring/0.png", "ring/1.png")):
        paint(tmp_path / "photos" / name, (90, 90, 90), seed=number)
    (tmp_path / "photos/screw/copy.png").write_bytes((tmp_path / "photos/nut/0.png").read_bytes())
    drawn = Image.fromarray(np.add.outer(np.arange(0, 128, 2), np.arange(0, 128, 2)).astype(np.uint8))
    drawn.save(tmp_path / "photos/nut/1.png")
    drawn.resize((50, 50)).save(tmp_path / "photos/ring/again.jpg", quality=95)
    with pytest.raises(DataError, match=r"nut/0\.png \('nut'\) and .*screw/copy\.png \('screw'\) are the same file: which is it"):
        read_class_folders(tmp_path / "photos")
    pool = read_class_folders(tmp_path / "photos", on_fault="skip")
    assert {one.name: len(one.pictures) for one in pool.classes} == {"nut": 2, "ring": 3, "screw": 2}
    source = {"type": "class-folder", "path": str(tmp_path / "photos"), "shots": [1]}
    recipe = {"base": str(pocket_tiny), "output": str(tmp_path / "run"), "sources": {"a": {**source, "on_fault": "skip", "ways": [2]}}}
    checked = preflight.check(Recipe.model_validate(recipe))
    assert [fault["kind"] for fault in checked["faults"]] == ["one photo in two classes"]
    (note,) = (note for note in checked["notes"] if "nearly the same" in note)
    assert "1 pair of photos of two classes in a look nearly the same" in note
    assert "again.jpg" in note


def test_a_training_photo_is_no_test_photo(tmp_path: Path, pocket_tiny: Path) -> None:
    for number in range(8):
        paint(tmp_path / ("train" if number < 4 else "test") / f"class {number // 2}" / f"{number}.png", (90, 90, 90), seed=number)
    (tmp_path / "test/class 3/copy.png").write_bytes((tmp_path / "train/class 0/0.png").read_bytes())
    made = {
        "base": str(pocket_tiny),
        "output": str(tmp_path / "run"),
        "sources": {"a": {"type": "class-folder", "path": str(tmp_path / "train"), "shots": [1]}},
        "evaluate": {"suites": {"2way": {"kind": "lcl", "source": {"type": "class-folder", "path": str(tmp_path / "test")}, "shots": [1]}}},
    }
    (fault,) = preflight.check(Recipe.model_validate(made))["faults"]
    assert fault["kind"] == "training photo held out"
    assert "class 0/0.png (a) and" in fault["message"]


def test_check_tells_every_fault_where_nothing_is_left(tmp_path: Path, images: Path, pocket_tiny: Path) -> None:
    (tmp_path / "list.csv").write_text(table(named=lambda name: "other/" + name), encoding="utf-8")
    source = {"type": "manifest", "file": str(tmp_path / "list.csv"), "images": str(images), "columns": {"image": "photo", "class": "label"}}
    checked = preflight.check(Recipe.model_validate({"base": str(pocket_tiny), "output": str(tmp_path / "run"), "sources": {"a": source}}))
    assert [fault["kind"] for fault in checked["faults"]] == ["missing image"] * 6


def test_a_colon_is_a_letter_where_it_is_one(tmp_path: Path) -> None:
    paint(tmp_path / "2026-11-27T10:00.png", (90, 90, 90), seed=0)
    assert read_image(Tree(tmp_path).picture("2026-11-27T10:00.png")).size
    with pytest.raises(DataError, match="leads out"):
        Tree(tmp_path).picture("C:\\photos\\0.png")


@given(st.binary(max_size=400), st.sampled_from([".csv", ".json", ".jsonl", ".csv.gz"]))
def test_any_bytes_are_a_list_or_an_error(tmp_path_factory: pytest.TempPathFactory, raw: bytes, suffix: str) -> None:
    file = tmp_path_factory.getbasetemp() / f"any{suffix}"
    file.write_bytes(raw)
    with contextlib.suppress(LclError):
        list(Table(file, ("photo", "label")))


@given(st.text(alphabet=st.characters(min_codepoint=0x3041, max_codepoint=0x30FA, categories=["Lo"]), min_size=3, max_size=40))
def test_kana_of_windows_are_themselves(text: str) -> None:
    try:
        raw = text.encode("cp932")
    except UnicodeEncodeError:  # a few rare kana
        return
    decoded = decode(raw, "list.csv")
    assert decoded.text == text
    assert "Shift-JIS" in decoded.note
