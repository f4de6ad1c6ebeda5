"""Every data set's own layout is read, from the fixtures under ``datasets/``."""

from __future__ import annotations

import importlib.util
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from lcl_adapter.data.sources import ClassPool, InspectionPool, QuestionPool, open_reader, read_image, read_isekai_questions, read_test_pairs
from lcl_adapter.data.sources.base import pictures_of
from lcl_adapter.data.sources.boxes import Box, parse, region_box
from lcl_adapter.recipe.sources import TaggedSource

ROOT = Path(__file__).parent.parent / "datasets"
FIXTURES = ROOT / "fixtures"
Q = FIXTURES / "questions"
P = FIXTURES / "products"
SOURCES = {
    "manifest-csv": {
        "type": "manifest",
        "file": P / "products.csv",
        "images": P / "images",
        "columns": {"image": "photo", "class": "sku", "group": "family"},
    },
    "manifest-sop": {
        "type": "manifest",
        "file": P / "Ebay_train.txt",
        "images": P / "images",
        "columns": {"image": "path", "class": "class_id", "group": "super_class_id"},
    },
    "manifest-abo": {
        "type": "manifest",
        "file": P / "listings" / "*.json.gz",
        "images": P / "images",
        "lookup": P / "images.csv.gz",
        "columns": {"image": ["main_image_id", "other_image_id"], "class": "item_id", "group": "product_type"},
    },
    "manifest-coco": {
        "type": "manifest",
        "file": P / "instances_train2019.json",
        "images": P / "images",
        "columns": {"image": "image", "class": "class", "group": "group", "box": "box"},
    },
    "imagenet-lcl": {
        "type": "imagenet-lcl",
        "pairs": FIXTURES / "imagenet-lcl" / "train900_pairs.jsonl",
        "images": FIXTURES / "imagenet-lcl" / "images",
    },
    "isekai": {"type": "isekai", "file": FIXTURES / "isekai" / "ISEKAI-10.json", "images": FIXTURES / "isekai"},
    "class-folder-boxes": {"type": "class-folder", "path": FIXTURES / "boxes"},
    "shikra-boxes": {"type": "shikra-boxes", "file": Q / "REC_val.jsonl", "images": Q / "images"},
    "hf-classes": {"type": "hf-classes", "path": FIXTURES / "hugging-face"},
    "mvtec": {"type": "mvtec", "path": FIXTURES / "mvtec"},
    "visa": {"type": "visa", "path": FIXTURES / "visa"},
    "llava-json": {"type": "llava-json", "file": Q / "instruct.json", "images": Q / "images"},
    "llava-questions": {"type": "llava-questions", "file": Q / "questions.jsonl", "answers": Q / "answers.jsonl", "images": Q / "images"},
    "vqav2": {
        "type": "vqav2",
        "images": Q / "images",
        "questions": Q / "v2_OpenEnded_mscoco_val2014_questions.json",
        "annotations": Q / "v2_mscoco_val2014_annotations.json",
    },
    "pope": {"type": "pope", "file": Q / "coco_pope_random.jsonl", "images": Q / "images"},
    "shikra-rec": {"type": "shikra", "kind": "rec", "file": Q / "REC_val.jsonl", "images": Q / "images"},
    "shikra-vqa": {"type": "shikra", "kind": "vqa", "file": Q / "vqa.jsonl", "images": Q / "images"},
    "shikra-caption": {"type": "shikra", "kind": "caption", "file": Q / "captions.jsonl", "images": Q / "images"},
    "shikra-gqa": {"type": "shikra", "kind": "gqa", "file": Q / "gqa.jsonl", "images": Q / "images"},
    "hf-questions": {
        "type": "hf-questions",
        "path": FIXTURES / "hugging-face",
        "columns": {"question": "question", "answer": "answer", "image": "image"},
    },
}


def opened(name: str, **changes: object):  # type: ignore[no-untyped-def]
    return open_reader(name, TypeAdapter(TaggedSource).validate_python({**SOURCES[name], **changes}))


@pytest.mark.parametrize("name", SOURCES)
def test_every_layout_is_read_and_every_picture_opens(name: str) -> None:
    pool = opened(name)
    assert len(pool) > 0
    assert not pool.faults
    assert not pool.skipped
    pictures = list(pictures_of(pool))
    assert pictures or name == "none"
    for picture in pictures:
        assert min(read_image(picture).size) > 10


def test_the_script_makes_what_is_committed(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_fixtures", ROOT / "make.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    make.main(tmp_path / "again")
    files = sorted(p.relative_to(FIXTURES) for p in FIXTURES.rglob("*") if p.is_file() and "hugging-face" not in p.parts)
    assert files == sorted(
        p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file() and "hugging-face" not in p.parts
    )
    for file in files:
        one, two = FIXTURES / file, tmp_path / "again" / file
        if file.suffix.lower() in {".png", ".jpg", ".jpeg"}:
            apart = np.abs(np.asarray(Image.open(one), dtype=int) - np.asarray(Image.open(two), dtype=int))
            assert apart.max() <= (0 if file.suffix == ".png" else 8), file
        else:
            assert one.read_bytes() == two.read_bytes(), file


def test_catalogues_of_all_kinds_give_the_same_products() -> None:
    pools = [opened(n) for n in ("manifest-csv", "manifest-sop", "manifest-abo", "manifest-coco")]
    for pool in pools:
        assert isinstance(pool, ClassPool)
        assert [len(c.pictures) for c in pool.classes] == [4] * 6
        assert {frozenset(p.path.name for p in c.pictures) for c in pool.classes} == {frozenset(f"{k}.png" for k in range(4))}
    by_name = {c.name: c for c in pools[0].classes}
    assert by_name["circle"].groups == ("round",)
    assert [pools[0].classes[i].name for i in pools[0].siblings([c.name for c in pools[0].classes].index("circle"))] == ["ring"]
    assert pools[1].classes[0].name == "1"
    assert pools[2].classes[0].groups == ("SHAPE",)
    assert len(pools[3].classes[0].boxes) == 4


def test_rows_of_one_value_and_held_out_classes() -> None:
    one = opened("manifest-csv", where={"family": "round"})
    assert [c.name for c in one.classes] == ["circle", "ring"]
    train, held = (opened("manifest-csv", split=s, hold_out=0.4) for s in ("train", "held_out"))
    assert not {c.name for c in train.classes} & {c.name for c in held.classes}
    assert len(train) + len(held) == 6


def test_imagenet_pairs_and_their_neighbours() -> None:
    pool = opened("imagenet-lcl")
    assert [c.name for c in pool.classes] == ["circle", "square", "triangle", "cross"]
    assert [pool.classes[i].name for i in pool.neighbours(1)] == ["triangle", "cross", "circle"], "as the file ranks them"
    pairs = read_test_pairs(FIXTURES / "imagenet-lcl" / "test100_pairs.jsonl", FIXTURES / "imagenet-lcl" / "images")
    assert [p.names for p in pairs] == [("Ring", "Bar"), ("Frame", "Dots")]
    assert [(len(p.support[0]), len(p.queries[1])) for p in pairs] == [(4, 4)] * 2


def test_imagenet_in_an_archive(tmp_path: Path) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "imagenet"), "zip", FIXTURES / "imagenet-lcl" / "images"))
    pool = opened("imagenet-lcl", images=archive)
    assert read_image(pool.classes[0].pictures[0]).size == (48, 40)


def test_isekai_is_one_question_a_line() -> None:
    questions = read_isekai_questions(FIXTURES / "isekai" / "ISEKAI-10.json", FIXTURES / "isekai")
    assert [q.gold for q in questions] == [0, 1, 0, 0, 1, 0]
    assert questions[0].names == ("hollow ring", "circle")
    pool = opened("isekai")
    assert [pool.classes[i].name for i in pool.hard_neighbours(0)] == ["circle"], "a concept's counterpart is its near neighbour"


def test_mvtec_and_visa() -> None:
    for name, categories in (("mvtec", ["metal nut", "screw", "tile"]), ("visa", ["candle", "pcb1"])):
        pool = opened(name)
        assert isinstance(pool, InspectionPool)
        assert [p.name for p in pool.categories] == categories
        for part in pool.categories:
            assert set(part.defects) == {"scratch", "hole"}
            assert len(part.references) == 4
            shown = {str(p) for p in part.references}
            assert not shown & {str(s.picture) for s in part.good}, "no test photo is a reference"
    held = opened("mvtec", split="held_out", held_out=["screw"])
    assert [p.name for p in held.categories] == ["screw"]
    assert [p.name for p in opened("mvtec", split="train", held_out=["screw"]).categories] == ["metal nut", "tile"]


def test_mvtec_in_an_archive(tmp_path: Path) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "parts"), "zip", FIXTURES / "mvtec"))
    pool, folder = opened("mvtec", path=archive), opened("mvtec")
    assert [p.name for p in pool.categories] == [p.name for p in folder.categories]
    assert [region_box(r) for r in pool.regions["hole on the tile"]] == [region_box(r) for r in folder.regions["hole on the tile"]]


def test_questions_carry_their_answers() -> None:
    vqa = opened("vqav2")
    assert isinstance(vqa, QuestionPool)
    assert len(vqa.dialogues[0].exchanges[0].answers) == 10
    assert vqa.dialogues[0].exchanges[0].question.endswith("using a single word or phrase.")
    assert {d.exchanges[0].answer for d in opened("pope").dialogues} == {"yes", "no"}
    joined = opened("llava-questions").dialogues
    assert joined[1].exchanges[0].answer == "square"


def test_several_images_in_one_turn_stay_where_they_stand() -> None:
    two = opened("llava-json").dialogues[-2].exchanges[0]
    assert two.question == "Here <image> and there <image>: the same?"
    assert len(two.further) == 1
    assert opened("llava-json").dialogues[-1].exchanges[0].picture is None


def test_rec_boxes_become_text_on_the_padded_square() -> None:
    one = opened("shikra-rec").dialogues[0].exchanges[0]
    assert one.region is not None
    x0, y0, x1, y1 = one.region.box
    box = region_box(one.region)  # 48 x 40: four pixels of padding above and below
    assert box == Box(x0 / 48, (y0 + 4) / 48, x1 / 48, (y1 + 4) / 48)
    assert parse(f"It is at {box.text()}.").iou(box) > 0.97
    assert parse("nowhere") is None
    assert Box(0, 0, 0.5, 1).iou(Box(0.25, 0, 0.75, 1)) == pytest.approx(1 / 3)


def test_a_mask_becomes_the_smallest_box_around_it() -> None:
    regions = opened("mvtec").regions["scratch on the screw"]
    with Image.open(regions[0].mask.path) as mask:
        left, top, right, bottom = mask.getbbox()
    assert region_box(regions[0]) == Box(left / 48, (top + 4) / 48, right / 48, (bottom + 4) / 48)


def test_a_dataset_on_disk_gives_names_and_pictures() -> None:
    pool = opened("hf-classes")
    assert [(c.name, len(c.pictures)) for c in pool.classes] == [("circle", 3), ("square", 3), ("triangle", 3)]
    assert read_image(pool.classes[1].pictures[2]).size == (48, 40)


def test_archives_of_class_folders(tmp_path: Path) -> None:
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for shape in ("circle", "ring"):
            for k in range(3):
                archive.write(P / "images" / shape / f"{k}.png", f"{shape}/{k}.png")
    pool = open_reader("photos", TypeAdapter(TaggedSource).validate_python({"type": "class-folder", "path": path}))
    assert [c.name for c in pool.classes] == ["circle", "ring"]
