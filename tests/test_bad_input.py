"""Bad input is normal input: each is named with its place, then refused, or left out and counted."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from pydantic import TypeAdapter

from lcl_adapter import recipe
from lcl_adapter.cli import main
from lcl_adapter.data import episodes
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import open_reader
from lcl_adapter.errors import DataError, EpisodeError, RecipeError
from lcl_adapter.evaluate import check_held_out
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.sources import InspectionOptions, TaggedSource
from lcl_adapter.training.preflight import check
from lcl_adapter.training.trainer import train
from tests.conftest import paint
from tests.test_formats import FIXTURES, SOURCES, P, Q


def read(options: dict[str, Any], **changes: object):  # type: ignore[no-untyped-def]
    return open_reader("mine", TypeAdapter(TaggedSource).validate_python({**options, **changes}))


def refused(options: dict[str, Any], *messages: str, skipped: dict[str, int] | None = None, **changes: object) -> None:
    """Refused with these messages; with ``on_fault: skip``, left out and counted."""
    with pytest.raises(DataError) as caught:
        read(options, **changes)
    for message in messages:
        assert message in str(caught.value), str(caught.value)
    if skipped is not None:
        assert read(options, on_fault="skip", **changes).skipped == skipped


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "mvtec", tmp_path / "mvtec"))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return Path(shutil.copytree(Q, tmp_path / "questions"))


def test_a_missing_mask(parts: Path) -> None:
    (parts / "tile" / "ground_truth" / "hole" / "001_mask.png").unlink()
    refused(SOURCES["mvtec"], "tile/test/hole/001.png has no mask", path=parts, skipped={"missing mask": 1})
    assert len(read(SOURCES["mvtec"], path=parts, on_fault="skip").categories[2].defects["hole"]) == 2


def test_a_defect_folder_without_images(parts: Path) -> None:
    (parts / "screw" / "test" / "bent").mkdir()
    refused(SOURCES["mvtec"], "screw/test/bent has no images", path=parts, skipped={"empty defect folder": 1})


def test_no_good_part_to_show(parts: Path) -> None:
    shutil.rmtree(parts / "screw" / "train")
    refused(SOURCES["mvtec"], "screw/train/good has no images", path=parts, skipped={"no references": 1})


def test_a_held_out_category_that_is_not_there(parts: Path) -> None:
    refused(SOURCES["mvtec"], "'scrw' (did you mean 'screw'?)", path=parts, split="held_out", held_out=["scrw"])


def test_a_test_category_that_is_trained_on(pocket_tiny: Path) -> None:
    made = Recipe.model_validate({
        "base": str(pocket_tiny),
        "sources": {"parts": {**SOURCES["mvtec"], "split": "train", "held_out": ["screw"]}},
        "evaluate": {"suites": {"parts": {"kind": "inspection", "source": {**SOURCES["mvtec"], "split": "held_out", "held_out": ["screw", "tile"]}}}},
    })  # fmt: skip
    with pytest.raises(RecipeError, match="tile are trained on too"):
        check_held_out(made, Mixture(made))


def appended(path: Path, *lines: str) -> Path:
    path.write_bytes(path.read_bytes() + "".join(f"{line}\n" for line in lines).encode())
    return path


def test_a_broken_line(questions: Path) -> None:
    file = appended(questions / "coco_pope_random.jsonl", '{"question_id": 99, "image": ')
    refused(SOURCES["pope"], f"{file}, line 13: not JSON", file=file, skipped={"broken line": 1})


def test_a_line_that_is_not_utf_8(questions: Path) -> None:
    file = questions / "coco_pope_random.jsonl"
    file.write_bytes(file.read_bytes() + '{"text": "é"}\n'.encode("latin-1"))
    refused(SOURCES["pope"], "line 13: not UTF-8", file=file, skipped={"broken line": 1})


def test_a_byte_order_mark_and_blank_lines_are_ignored(questions: Path) -> None:
    file = questions / "coco_pope_random.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\n\n"))
    assert len(read(SOURCES["pope"], file=file)) == 12


def test_a_duplicate_id(questions: Path) -> None:
    file = questions / "coco_pope_random.jsonl"
    appended(file, file.read_text().splitlines()[3])
    refused(SOURCES["pope"], "line 13 (question_id 3): an earlier record has the same id", file=file, skipped={"duplicate id": 1})


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (["a.jpg", "b.jpg"], "<image>\nWhat?", "2 images, 1 <image>"),
        ("a.jpg", "What?", "1 images, 0 <image>"),
        ("a.jpg", "<image> and <image>", "more <image> than its 1 images"),
    ],
)
def test_more_or_fewer_images_than_image_tags(questions: Path, image: object, text: str, message: str) -> None:
    records = json.loads((questions / "instruct.json").read_text())
    records.append({"id": "bad", "image": image, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "x"}]})
    (questions / "instruct.json").write_text(json.dumps(records))
    refused(SOURCES["llava-json"], "record 15 (id 'bad')", message, file=questions / "instruct.json", skipped={"bad record": 1})


def test_a_missing_column_lists_those_there_are() -> None:
    refused(SOURCES["manifest-csv"], "no column 'product'", "there are 'photo', 'sku', 'family'", columns={"image": "photo", "class": "product"})


def test_a_line_of_another_length(tmp_path: Path) -> None:
    file = appended(Path(shutil.copy(P / "products.csv", tmp_path)), "bar/1.png,bar")
    refused(SOURCES["manifest-csv"], "line 26: 3 columns are expected", file=file, skipped={"broken line": 1})


def test_an_image_that_is_listed_and_not_there(tmp_path: Path) -> None:
    file = appended(Path(shutil.copy(P / "products.csv", tmp_path)), "bar/99.png,bar,straight")
    refused(SOURCES["manifest-csv"], "line 26: no image 'bar/99.png'", file=file, skipped={"missing image": 1})


def test_an_answer_that_is_not_in_the_closed_list(questions: Path) -> None:
    closed = ["circle", "square", "triangle", "cross", "ring"]
    refused(SOURCES["llava-questions"], "the answer 'bar' is not in the closed list", closed=closed, skipped={"bad record": 2})
    file = appended(questions / "coco_pope_random.jsonl", '{"question_id": 99, "image": "a.jpg", "text": "?", "label": "maybe"}')
    refused(SOURCES["pope"], "'maybe' is not in the closed list yes, no", file=file, skipped={"bad record": 1})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sources: {a: {type: pocket, share: -1}}", "greater than or equal to 0"),
        ("sources: {a: {type: pocket, share: 0}}", "all shares are 0"),
        ("sources: {a: {type: pocket}}\nshares: {0: {a: 0}}", "all shares are 0: nothing would be trained from 0 of the run on"),
        ("sources: {lcl: {type: pocket}}\nshares: {0.5: {lcll: 1}}", "no source 'lcll' (did you mean 'lcl'?)"),
        ("sources: {a: {type: pocket}}\nshares: {0.5: {a: -2}}", "greater than or equal to 0"),
        ("sources: {a: {type: pocket}}\nshares: {1.5: {a: 1}}", "less than or equal to 1"),
    ],
)
def test_impossible_shares(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: pocket\n{line}\n")
    with pytest.raises(RecipeError) as caught:
        recipe.load(tmp_path / "mine.yaml")
    assert message in str(caught.value)


def test_an_archive_member_that_climbs_out(tmp_path: Path) -> None:
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("good/0.png", b"x")
        archive.writestr("../outside.png", b"x")
    refused({"type": "class-folder", "path": path}, "'../outside.png' leads out of it")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b.png", "C:\\a.png"])
def test_a_record_that_climbs_out(questions: Path, tmp_path: Path, name: str) -> None:
    line = json.dumps({"question_id": 99, "image": name, "text": "?", "label": "no"})
    refused(
        SOURCES["pope"],
        "line 13 (question_id 99)",
        "leads out of it",
        file=appended(questions / "coco_pope_random.jsonl", line),
        skipped={"path that climbs out": 1},
    )
    file = appended(Path(shutil.copy(P / "products.csv", tmp_path)), f"{name},bar,straight")
    refused(SOURCES["manifest-csv"], "leads out of it", file=file, skipped={"path that climbs out": 1})


def test_circular_links(tmp_path: Path) -> None:
    paint(tmp_path / "photos" / "good" / "0.png", (1, 2, 3))
    (tmp_path / "photos" / "good" / "again").symlink_to(tmp_path / "photos")
    refused({"type": "class-folder", "path": tmp_path / "photos"}, "a link that leads back to a folder above it")


def test_what_does_not_fit_the_context_is_refused_by_name(pocket_tiny: Path, tmp_path: Path) -> None:
    """Tiny bases hold 1,024 tokens."""
    source = {**SOURCES["mvtec"], "shots": [4], "queries": 32, "forms": {"one-class": 1}}
    big = {"type": "pocket", "ways": [16], "shots": [2], "policy": "n-way", "further_views": 16}
    made = Recipe.model_validate({"base": str(pocket_tiny), "output": tmp_path / "run", "sources": {"big": big, "parts": source}})
    with pytest.raises(EpisodeError, match=r"big: its longest episode, 16 ways of 8 shots, .*: \d+ tokens .* do not fit the context of 1024"):
        train(Recipe.model_validate({**made.model_dump(), "sources": {"big": {**big, "shots": [8]}, "parts": source}}))


def test_boxes_out_of_range(tmp_path: Path, questions: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "boxes", tmp_path / "boxes"))
    appended(folder / "boxes.jsonl", '{"image": "circle/0.png", "bbox": [10, 10, 5, 20]}')
    refused({"type": "class-folder", "path": folder}, "boxes.jsonl, line 13: the box [10, 10, 5, 20]", skipped={"box out of range": 1})
    file = appended(questions / "REC_val.jsonl", '{"img_path": "a.jpg", "expression": "it", "bbox": [-3, 0, 5, 5]}')
    refused(SOURCES["shikra-rec"], "line 13", "out of range", file=file, skipped={"bad record": 1})


def test_the_test_file_that_is_a_copy_of_the_training_file(tmp_path: Path) -> None:
    pairs = FIXTURES / "imagenet-lcl" / "train900_pairs.jsonl"
    suite = {"kind": "imagenet-100", "pairs": pairs, "images": FIXTURES / "imagenet-lcl" / "images"}
    made = Recipe.model_validate({"base": "pocket", "sources": {"a": {"type": "pocket"}}, "evaluate": {"suites": {"imagenet-100": suite}}})
    report = check(made)
    assert any("copy of train900_pairs.jsonl" in f["message"] for f in report["faults"])


def test_a_hundred_planted_faults_of_24_kinds_are_all_reported(tmp_path: Path) -> None:
    """10,000 images in six layouts; every fault is named, and nothing else."""
    rng = np.random.default_rng(0)

    def picture() -> Image.Image:
        return Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))

    photos, tree, files = tmp_path / "photos", tmp_path / "parts", tmp_path / "files"
    for n in range(100):
        (photos / f"class {n:03}").mkdir(parents=True)
        for k in range(80):
            picture().save(photos / f"class {n:03}" / f"{k:02}.png")
    files.mkdir()
    for n in range(1600):
        picture().save(files / f"{n:04}.png")
    mask = Image.new("L", (8, 8))
    mask.paste(255, (2, 2, 5, 5))
    for n in range(10):
        for place, count in (("train/good", 10), ("test/good", 10), ("test/scratch", 20)):
            (tree / f"part {n}" / place).mkdir(parents=True)
            for k in range(count):
                picture().save(tree / f"part {n}" / place / f"{k:03}.png")
        (tree / f"part {n}" / "ground_truth" / "scratch").mkdir(parents=True)
        for k in range(20):
            mask.save(tree / f"part {n}" / "ground_truth" / "scratch" / f"{k:03}_mask.png")
    questions = [{"question_id": n, "image": f"{n:04}.png", "text": "?", "label": "yes"} for n in range(800)]
    boxes = [{"img_path": f"{800 + n:04}.png", "expression": f"thing {n}", "bbox": [1, 1, 6, 6]} for n in range(800)]
    planted: Counter[str] = Counter()

    def plant(kind: str, count: int) -> None:
        planted[kind] += count

    for n in range(6):
        (photos / f"class {n:03}" / "00.png").write_bytes(b"")
    plant("empty image", 6)
    for n in range(5):
        (photos / f"class {10 + n:03}" / "01.png").write_bytes((photos / f"class {10 + n:03}" / "01.png").read_bytes()[:60])
    plant("broken image", 5)
    for n in range(5):
        (photos / f"class {20 + n:03}" / "02.png").write_text("<html>gone</html>")
    plant("not an image", 5)
    for n in range(4):
        Image.new("RGB", (1, 1)).save(photos / f"class {30 + n:03}" / "03.png")
    plant("image too small", 4)
    for n in range(3):
        (photos / f"void {n}").mkdir()
    plant("empty class", 3)
    for n in range(4):
        (tree / f"part {n}" / "ground_truth" / "scratch" / "001_mask.png").unlink()
    plant("missing mask", 4)
    for n in range(4):
        Image.new("L", (8, 8)).save(tree / f"part {n}" / "ground_truth" / "scratch" / "002_mask.png")
    plant("bad mask", 4)
    (tree / "part 9" / "test" / "hole").mkdir()
    (tree / "part 8" / "test" / "hole").mkdir()
    plant("empty defect folder", 2)
    for n in range(4):
        (files / f"{10 + n:04}.png").unlink()
    plant("missing image", 4)
    for n in range(5):
        boxes[20 + n]["bbox"] = [1, 1, 60, 6]
    plant("box out of range", 5)
    lines = [json.dumps(q) for q in questions]
    lines[100] = lines[101] = lines[102] = lines[103] = '{"question_id": '
    plant("broken line", 4)
    lines += [json.dumps({**questions[n], "text": "again?"}) for n in range(200, 204)]
    plant("duplicate id", 4)
    (tmp_path / "pope.jsonl").write_text("\n".join(lines))
    (tmp_path / "rec.jsonl").write_text("\n".join(json.dumps(b) for b in boxes))
    for n in range(10):
        (photos / f"class {50 + n:03}" / "far.png").symlink_to(f"/mnt/share/{n}.png")
    plant("link that leads nowhere", 10)
    for n in range(5):
        (photos / f"class {60 + n:03}" / "copy.png").write_bytes((photos / f"class {70 + n:03}" / "05.png").read_bytes())
    plant("one photo in two classes", 5)
    for n in range(3):
        (photos / f"few {n}").mkdir()
        picture().save(photos / f"few {n}" / "0.png")
    plant("class of too few images", 3)
    for number, form in enumerate(("NFC", "NFD")):
        for name in ("café", "größe"):
            (photos / unicodedata.normalize(form, name)).mkdir()
            for k in range(5):
                picture().save(photos / unicodedata.normalize(form, name) / f"{number}{k}.png")
    plant("two names that are one", 2)
    (photos / "neighbours.json").write_text('{"round": ["class 000", "clas 001"]}')
    plant("unknown class", 1)
    for n in range(2):
        Image.new("1", (8_100, 8_100)).save(photos / f"class {80 + n:03}" / "06.png")
    plant("image too large", 2)
    for n, folders in enumerate((("train/good", "test/OK"), ("train/good", "test/normal"), ("test/good", "test/dent"), ("test/good", "test/dent"))):
        for place in folders:
            (tree / f"odd {n}" / place).mkdir(parents=True)
            picture().save(tree / f"odd {n}" / place / "0.png")
    plant("good parts by another name", 2)
    plant("no references", 2)
    listed = [(f"{n:04}.png", f"product {n % 40}") for n in range(200, 400)]
    rows = [*listed, *((f"../{n}.png", "product 1") for n in range(5)), *((f"{n:04}.png", "") for n in range(400, 407)), *listed[:7]]
    (tmp_path / "list.csv").write_text("image,class\n" + "".join(f"{image},{label}\n" for image, label in rows))
    plant("path that climbs out", 5)
    plant("bad record", 7)
    plant("duplicate record", 7)
    for n in range(4):
        (tmp_path / "test" / f"new {n}").mkdir(parents=True)
        for k in range(5):
            picture().save(tmp_path / "test" / f"new {n}" / f"{k}.png")
        (tmp_path / "test" / "new 0" / f"old {n}.png").write_bytes((photos / f"class {90 + n:03}" / "07.png").read_bytes())
    plant("training photo held out", 4)
    assert (sum(planted.values()), len(planted)) == (100, 24)
    assert sum(p.suffix == ".png" for p in tmp_path.rglob("*")) > 9_990
    made = {
        "base": "pocket",
        "sources": {
            "photos": {"type": "class-folder", "path": photos},
            "parts": {"type": "mvtec", "path": tree},
            "pope": {"type": "pope", "file": tmp_path / "pope.jsonl", "images": files},
            "rec": {"type": "shikra", "file": tmp_path / "rec.jsonl", "images": files},
            "products": {"type": "manifest", "file": tmp_path / "list.csv", "images": files},
        },
        "evaluate": {"suites": {"new": {"kind": "lcl", "source": {"type": "class-folder", "path": tmp_path / "test"}, "shots": [1]}}},
    }
    report = check(Recipe.model_validate(made))
    assert Counter(f["kind"] for f in report["faults"]) == planted
    assert len({f["message"] for f in report["faults"]}) == 100, "each with its own place"
    assert all(str(tmp_path) in f["message"] for f in report["faults"])
    listed = [f["message"] for f in report["faults"] if f["kind"] == "missing image"]
    assert all("pope.jsonl, line 1" in message for message in listed), "the record that names the picture"


def test_data_check_on_the_command_line(tmp_path: Path, photos: Path, pocket_tiny: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: {pocket_tiny}\nsources: {{photos: {{type: class-folder, path: {photos}, shots: 1}}}}\n")
    clean = CliRunner().invoke(main, ["data", "check", str(tmp_path / "mine.yaml"), "--json"])
    assert clean.exit_code == 0, clean.output
    result = json.loads(clean.stdout)
    assert result["sources"]["photos"] == {"entries": 3, "pictures": 12, "left_out": {}}
    assert result["rows"]["longest"]["photos"] > 20
    (photos / "good" / "0.png").write_bytes(b"")
    faulty = CliRunner().invoke(main, ["data", "check", str(tmp_path / "mine.yaml"), "--json"])
    assert faulty.exit_code == 1
    assert json.loads(faulty.stdout)["faults"][0]["kind"] == "empty image"
    assert "good/0.png" in faulty.stderr.replace("\n", "")


def test_parts_without_any_mask_are_inspected_and_not_located(parts: Path, pocket_tiny: Path) -> None:
    for category in parts.iterdir():
        shutil.rmtree(category / "ground_truth")
    pool = read(SOURCES["mvtec"], path=parts)
    assert [len(p.defects["hole"]) for p in pool.categories] == [3, 3, 3]
    drawn = [episodes.draw(pool, InspectionOptions(shots=[1], queries=4), 0, 0, i) for i in range(60)]
    share = np.mean([q.label == "good" for e in drawn for q in e.queries])
    assert 0.35 < share < 0.65
    with pytest.raises(EpisodeError, match="no defect has a mask"):
        episodes.draw(pool, InspectionOptions(forms={"localise": 1}), 0, 0, 0)


def test_parts_without_good_photos_are_refused(parts: Path) -> None:
    for category in parts.iterdir():
        shutil.rmtree(category / "test" / "good")
    with pytest.raises(EpisodeError, match=r"no category has both good and defective photos \(0 good and 18 defective"):
        episodes.draw(read(SOURCES["mvtec"], path=parts), InspectionOptions(), 0, 0, 0)


@pytest.mark.parametrize("options", [{"hold_out": 0.4}, {"held_out": ["screw"]}, {"validation": 0.1}])
def test_what_is_held_out_without_a_split_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="without `split` holds nothing out"):
        read(SOURCES["mvtec"], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "validation"}, "`split: validation` needs `validation`, the share of classes"),
        ({"split": "train", "hold_out": 0.6, "validation": 0.4}, "are 1 of the classes together: none is left to train on"),
    ],
)
def test_shares_of_classes_that_leave_nothing_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(SOURCES["mvtec"], **options)


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "photos") + b"/sch\xe4fer"
    os.makedirs(folder)  # noqa: PTH103
    Path(os.fsdecode(folder + b"/0.png")).write_bytes(paint(tmp_path / "x.png", (1, 2, 3)).read_bytes())
    refused({"type": "class-folder", "path": tmp_path / "photos"}, "is not UTF-8. Rename it")


def test_a_record_that_is_too_long_is_left_out_or_refused(pocket_tiny: Path, tmp_path: Path, questions: Path) -> None:
    records = json.loads((questions / "instruct.json").read_text())[:6]
    records[2]["conversations"][1]["value"] = "long " * 3000
    (questions / "instruct.json").write_text(json.dumps(records))
    source = {**SOURCES["llava-json"], "file": questions / "instruct.json"}
    made = {"base": str(pocket_tiny), "train": {"max_steps": 2, "per_device_train_batch_size": 3}}
    with pytest.raises(EpisodeError, match=r"record 3 \(id '2'\).*set `on_fault: skip` for its source"):
        train(Recipe.model_validate({**made, "output": tmp_path / "a", "sources": {"long": source}}))
    facts = train(Recipe.model_validate({**made, "output": tmp_path / "b", "sources": {"long": {**source, "on_fault": "skip"}}}))
    assert facts["tokens"]["long"]["rows"] == 6


def test_a_run_is_measured_where_its_data_has_moved(pocket_tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(P / "images", tmp_path / "here" / "photos")
    (tmp_path / "mine.yaml").write_text(
        f"base: {pocket_tiny}\noutput: {tmp_path / 'run'}\ndata: {{root: {tmp_path / 'here'}}}\n"
        "sources: {photos: {type: class-folder, path: photos, shots: 1, split: train, hold_out: 0.4}}\ntrain: {max_steps: 1}\n"
        "evaluate: {suites: {mine: {kind: lcl, source: {type: class-folder, path: photos, split: held_out, hold_out: 0.4}, shots: 1, episodes: 4}}}\n"
    )
    assert CliRunner().invoke(main, ["train", str(tmp_path / "mine.yaml")]).exit_code == 0
    (tmp_path / "here").rename(tmp_path / "there")
    assert CliRunner().invoke(main, ["eval", str(tmp_path / "run"), "--fresh"]).exit_code == 2
    moved = CliRunner().invoke(main, ["eval", str(tmp_path / "run"), f"data.root={tmp_path / 'there'}", "--fresh", "--json"])
    assert moved.exit_code == 0, moved.output
    assert json.loads(moved.stdout)["suites"][0]["n"] == 4


def test_a_later_measurement_of_trained_classes_is_refused(pocket_tiny: Path, tmp_path: Path) -> None:
    source = {**SOURCES["mvtec"], "split": "train", "held_out": ["screw"], "shots": 1}
    run = tmp_path / "run"
    train(Recipe.model_validate({"base": str(pocket_tiny), "output": run, "sources": {"parts": source}, "train": {"max_steps": 1}}))
    result = CliRunner().invoke(main, ["eval", str(run), "--suite", "mvtec-all", f"data.root={FIXTURES}"])
    assert result.exit_code == 2
    assert "metal nut, tile are trained on too" in result.stderr


@pytest.mark.parametrize(("kind", "message"), [("encrypted", "cannot be read"), ("nested", "its only folder 'photos' holds folders itself")])
def test_archives_that_cannot_be_used(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("bolt", "nut"):
            for k in range(2):
                archive.write(P / "images" / "ring" / f"{k}.png", f"{'photos/' if kind == 'nested' else ''}{name}/{k}.png")
    if kind == "nested":
        refused({"type": "class-folder", "path": path}, message)
        return
    raw = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the bit that says a member has a password
        start = raw.find(mark)
        while start >= 0:
            raw[start + place] |= 1
            start = raw.find(mark, start + 4)
    path.write_bytes(bytes(raw))
    report = check(Recipe.model_validate({"base": "pocket", "sources": {"a": {"type": "class-folder", "path": path, "shots": 1}}}))
    assert any("encrypted" in f["message"] for f in report["faults"])


def test_a_quote_that_is_not_closed_is_named_where_it_begins(tmp_path: Path) -> None:
    lines = (P / "products.csv").read_text().splitlines()
    lines[5] = '"' + lines[5]
    (tmp_path / "products.csv").write_text("\n".join(lines))
    refused(SOURCES["manifest-csv"], "line 6: a quote that is not closed", file=tmp_path / "products.csv")


def test_a_misspelt_column_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"photo": "ring/0.png", "sku": "ring"}\n{"photo": "bar/0.png", "sku": "bar"}\n')
    columns = {"image": "photo", "class": "sku", "group": "famly"}
    options = {"type": "manifest", "file": tmp_path / "p.jsonl", "images": P / "images", "columns": columns}
    refused(options, "no column 'famly'; there are 'photo', 'sku'")


def test_neighbours_of_no_class(photos: Path) -> None:
    (photos / "neighbours.json").write_text('{"bad ones": ["scratchd", "dented"]}')
    refused({"type": "class-folder", "path": photos}, "names 'scratchd' (did you mean 'scratched'?)", skipped={"unknown class": 1})
    (photos / "neighbours.json").write_text('{"bad ones": "scratched"}')
    refused({"type": "class-folder", "path": photos}, "a list of classes is expected")


def test_boxes_of_some_pictures_only(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "boxes", tmp_path / "boxes"))
    (folder / "boxes.jsonl").write_text('{"image": "circle/0.png", "bbox": [1, 1, 20, 20]}\n\n{"image": "circle/1.png", "bbox": [1, 1, 20, 20]}\n')
    pool = read({"type": "class-folder", "path": folder})
    assert [len(c.pictures) for c in pool.classes] == [4, 4, 4], "no picture is lost for want of a box"
    assert {n: len(r) for n, r in pool.regions.items()} == {"circle": 2}


def test_a_huge_picture_with_a_box(tmp_path: Path) -> None:
    from tests.test_sources import huge_png

    folder = Path(shutil.copytree(FIXTURES / "boxes", tmp_path / "boxes"))
    huge_png(folder / "circle" / "0.png")
    made = Recipe.model_validate({"base": "pocket", "sources": {"a": {"type": "class-folder", "path": folder, "policy": "locate", "shots": 1}}})
    assert {f["kind"] for f in check(made)["faults"]} == {"image too large"}


@pytest.mark.parametrize(
    ("suites", "message"),
    [
        ("{mvtec: {preset: mvtec, source: plant}}", "`source` is a mapping of keys"),
        ("{mvtec: {preset: [mvtec]}}", "no suite named ['mvtec']"),
        ("{rec: {kind: rec, source: {type: shikra, kind: caption, file: a, images: b}}}", "has `kind: caption`"),
        ("{'../../out': {preset: mvtec}}", "may hold letters, digits"),
        ("{'[/b] x': {preset: mvtec}}", "may hold letters, digits"),
    ],
)
def test_impossible_suites(tmp_path: Path, suites: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: pocket\nsources: {{a: {{type: pocket}}}}\nevaluate: {{suites: {suites}}}\n")
    with pytest.raises(RecipeError) as caught:
        recipe.load(tmp_path / "mine.yaml")
    assert message in str(caught.value)


def test_a_broken_test_picture_is_left_out_of_the_measurement(pocket_tiny: Path, parts: Path) -> None:
    from lcl_adapter.answering.predict import Predictor
    from lcl_adapter.base.model import load_base
    from lcl_adapter.evaluate import build_cells
    from lcl_adapter.evaluate.runner import ModelPair, measure_cell

    (parts / "tile" / "test" / "hole" / "000.png").write_bytes(b"")
    suite = {"kind": "inspection", "source": {**SOURCES["mvtec"], "path": parts}, "references": 1}
    made = Recipe.model_validate({"base": str(pocket_tiny), "sources": {"a": {"type": "pocket"}}, "evaluate": {"suites": {"m": suite}}})
    row = measure_cell(next(iter(build_cells(made))), ModelPair.local(Predictor(load_base(str(pocket_tiny)), max_new_tokens=2)))["row"]
    assert (row["n"], row["left_out"]) == (26, 1)


def test_a_folder_that_is_changed_is_another_folder(tmp_path: Path) -> None:
    """A resumed run notices other boxes, groups and phrasings, not only other pictures."""
    folder = Path(shutil.copytree(FIXTURES / "boxes", tmp_path / "boxes"))
    own = tmp_path / "mine.yaml"
    own.write_text('locate: {en: [{question: "Where?", query: "And where?"}]}')
    made = Recipe.model_validate(
        {"base": "pocket", "sources": {"a": {"type": "class-folder", "path": folder, "policy": "locate", "shots": 1, "templates": own}}}
    )
    hashes = {Mixture(made).hashes()["a"]}
    appended(folder / "boxes.jsonl", '{"image": "circle/0.png", "bbox": [1, 1, 9, 9]}')
    hashes.add(Mixture(made).hashes()["a"])
    (folder / "neighbours.json").write_text('{"round": ["circle"]}')
    hashes.add(Mixture(made).hashes()["a"])
    own.write_text('locate: {en: [{question: "Where?", query: "Where now?"}]}')
    hashes.add(Mixture(made).hashes()["a"])
    assert len(hashes) == 4


def test_a_suite_passes_over_masks_that_cannot_be_used(parts: Path, pocket_tiny: Path) -> None:
    from lcl_adapter.evaluate import build_cells

    for number in range(2):
        Image.new("L", (9, 9), 255).save(parts / "tile" / "ground_truth" / "hole" / f"{number:03}_mask.png")
    suite = {"kind": "locate", "source": {**SOURCES["mvtec"], "path": parts}, "shots": 1, "episodes": 40}
    for fault, count in (("skip", 40), ("refuse", 0)):
        source = {**suite["source"], "on_fault": fault}  # type: ignore[dict-item]
        made = Recipe.model_validate(
            {"base": "pocket", "sources": {"a": {"type": "pocket"}}, "evaluate": {"suites": {"m": {**suite, "source": source}}}}
        )
        if count:
            assert [len(c.cases) for c in build_cells(made)] == [count]
        else:
            with pytest.raises(DataError, match="the mask is 9 x 9 pixels, its picture 48 x 40"):
                list(build_cells(made))


def test_too_few_classes_are_held_out(photos: Path) -> None:
    from lcl_adapter.evaluate import build_cells

    source = {"type": "class-folder", "path": photos, "split": "held_out", "hold_out": 0.3}
    made = Recipe.model_validate(
        {"base": "pocket", "sources": {"a": {"type": "pocket"}}, "evaluate": {"suites": {"m": {"kind": "lcl", "source": source, "shots": 1}}}}
    )
    with pytest.raises(RecipeError, match=r"1 class to measure on, but `ways` is 2; raise `hold_out`"):
        list(build_cells(made))


def test_yes_and_no_are_words(questions: Path) -> None:
    assert TypeAdapter(TaggedSource).validate_python({**SOURCES["llava-questions"], "closed": [True, False, "maybe"]}).closed == [
        "yes",
        "no",
        "maybe",
    ]


def test_an_alias_that_contains_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: pocket\nsources: &s {a: *s}\n")
    with pytest.raises(RecipeError, match="a YAML alias that contains itself"):
        recipe.load(tmp_path / "mine.yaml")


def test_data_check_reports_what_is_too_long(pocket_tiny: Path, questions: Path) -> None:
    records = json.loads((questions / "instruct.json").read_text())
    records[2]["conversations"][1]["value"] = "long " * 3000
    (questions / "instruct.json").write_text(json.dumps(records))
    made = Recipe.model_validate({"base": str(pocket_tiny), "sources": {"a": {**SOURCES["llava-json"], "file": questions / "instruct.json"}}})
    assert [f["kind"] for f in check(made)["faults"]] == ["does not fit"]


def test_only_a_runs_own_paths_move_with_its_root(tmp_path: Path) -> None:
    own_path = tmp_path / "photos"
    sources = f"{{a: {{type: class-folder, path: {own_path}}}, b: {{type: class-folder, path: b}}}}"
    (tmp_path / "mine.yaml").write_text(f"base: pocket\ndata: {{root: {tmp_path}}}\nsources: {sources}\n")
    other = f"sources.b.path={tmp_path / 'other'}"
    plain = recipe.load(tmp_path / "mine.yaml", ["data.root=/data", other]).sources
    assert [s.path for s in plain.values()] == [tmp_path / "photos", tmp_path / "other"]  # type: ignore[union-attr]
    own = recipe.load(tmp_path / "mine.yaml", ["data.root=/data", other], resolved=True).sources
    assert [s.path for s in own.values()] == [Path("/data/photos"), tmp_path / "other"]  # type: ignore[union-attr]


def test_a_visa_row_that_is_cut_short(tmp_path: Path) -> None:
    tree = Path(shutil.copytree(FIXTURES / "visa", tmp_path / "visa"))
    appended(tree / "split_csv" / "1cls.csv", "pcb1,test,anomaly,pcb1/Data/Images/Anomaly/000.JPG", "pcb1,test,normal,../out.JPG,")
    refused(SOURCES["visa"], "line 20", path=tree, skipped={"missing mask": 1, "missing image": 1})


def test_other_forms_of_one_name_are_one_picture(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("photo,sku\nring/0.png,ring\n./ring//0.png,ring\nbar/0.png,bar\n")
    options = {"type": "manifest", "file": tmp_path / "p.csv", "images": P / "images", "columns": {"image": "photo", "class": "sku"}}
    refused(options, "line 3: the image 'ring/0.png' is listed twice", skipped={"duplicate record": 1})
    with pytest.raises(ValueError, match="only `image` may be several"):
        read(options, columns={"image": "photo", "class": ["sku", "photo"]})


def test_a_rec_suite_passes_over_a_box_outside_its_picture(pocket_tiny: Path, questions: Path) -> None:
    from lcl_adapter.base.model import load_encoder
    from lcl_adapter.evaluate import build_cells, check_suites

    image = json.loads((questions / "REC_val.jsonl").read_text().splitlines()[0])["img_path"]
    file = appended(questions / "REC_val.jsonl", json.dumps({"img_path": image, "expression": "it", "bbox": [1, 1, 500, 500]}))
    for fault in ("skip", "refuse"):
        source = {**SOURCES["shikra-rec"], "file": file, "on_fault": fault}
        suites = {"rec": {"kind": "rec", "source": source}}
        made = Recipe.model_validate({"base": str(pocket_tiny), "sources": {"a": {"type": "pocket"}}, "evaluate": {"suites": suites}})
        if fault == "skip":
            check_suites(made, load_encoder(str(pocket_tiny)))
            assert [len(c.cases) for c in build_cells(made)] == [12]
        else:
            with pytest.raises(DataError, match="out of range"):
                list(build_cells(made))


def test_a_broken_picture_does_not_end_a_watched_training(pocket_tiny: Path, tmp_path: Path, parts: Path) -> None:
    from lcl_adapter.training.during import MeasureDuring

    (parts / "screw" / "test" / "hole" / "000.png").write_bytes(b"")
    held = {**SOURCES["mvtec"], "path": parts, "held_out": ["screw"]}
    made = Recipe.model_validate({
        "base": str(pocket_tiny),
        "output": tmp_path / "run",
        "sources": {"parts": {**held, "split": "train", "shots": 1}},
        "train": {"max_steps": 2, "per_device_train_batch_size": 2},
        "evaluate": {"every": 1, "suites": {"m": {"kind": "inspection", "source": {**held, "split": "held_out"}, "references": 1}}},
    })  # fmt: skip
    train(made, make_callback=lambda base, save: MeasureDuring(made, base, save))
    result = json.loads((tmp_path / "run" / "watched.json").read_text())
    assert [s["step"] for s in result["steps"]] == [1, 2]


def test_phrasings_in_one_language_of_two(pocket_tiny: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text('inspection.one-class: {en: [{question: "Ok?", query: "And this?"}]}')
    source = {**SOURCES["mvtec"], "templates": own, "languages": ["en", "ja"], "shots": 1}
    train(Recipe.model_validate({"base": str(pocket_tiny), "output": tmp_path / "run", "sources": {"parts": source}, "train": {"max_steps": 1}}))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_records_are_the_same_for_every_chunk_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Strings that hold brackets, commas, quotes and backslashes, cut anywhere."""
    from lcl_adapter.data.sources import records

    monkeypatch.setattr(records, "CHUNK", chunk)
    values = [{"a": 'x"],[{\\'}, {"b": [1, {"c": []}]}, {}, {"é": "日本\n"}, {"e": "\\"}, {"f": "{"}]
    for name, text, key in (
        ("list.json", json.dumps(values, indent=1, ensure_ascii=False), None),
        ("key.json", json.dumps({"other": [9, "rows"], "rows": values, "more": {"rows": [1]}}, ensure_ascii=False), "rows"),
        ("lines.jsonl", "\r\n".join(json.dumps(v, ensure_ascii=False) for v in values) + "\n\n", None),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        read = records.Records(tmp_path / name, key)
        assert [read[i] for i in range(len(read))] == values
        assert [json.loads(raw) for raw in read.scan(len(read))] == values


def test_all_sources_that_cannot_be_read_are_in_one_error(tmp_path: Path) -> None:
    made = recipe.load("mix", [f"data.root={tmp_path}", "base=pocket"])
    with pytest.raises(DataError) as caught:
        Mixture(made)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [f"sources.{n}" for n in made.sources]
    assert str(caught.value).count(str(tmp_path)) == len(made.sources)
