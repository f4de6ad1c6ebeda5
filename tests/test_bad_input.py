"""Bad input is normal input: each is named with its place, then refused, or left out and counted."""

from __future__ import annotations

import json
import shutil
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
from lcl_adapter.check import check
from lcl_adapter.cli import main
from lcl_adapter.errors import DataError, EpisodeError, RecipeError
from lcl_adapter.evaluate import check_held_out
from lcl_adapter.mixture import Mixture
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.sources import TaggedSource
from lcl_adapter.sources import open_reader
from lcl_adapter.trainer import train
from tests.conftest import paint
from tests.test_formats import FIXTURES, SOURCES, P, Q


def read(options: dict[str, Any], **changes: object):  # type: ignore[no-untyped-def]
    return open_reader("mine", TypeAdapter(TaggedSource).validate_python({**options, **changes}))


def refused(options: dict[str, Any], *said: str, skipped: dict[str, int] | None = None, **changes: object) -> None:
    """Refused with these words; with ``on_fault: skip``, left out and counted."""
    with pytest.raises(DataError) as caught:
        read(options, **changes)
    for words in said:
        assert words in str(caught.value), str(caught.value)
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
    assert len(read(SOURCES["mvtec"], path=parts, on_fault="skip").parts[2].defects["hole"]) == 2


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


def test_a_byte_order_mark_and_blank_lines_are_read_over(questions: Path) -> None:
    file = questions / "coco_pope_random.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\n\n"))
    assert len(read(SOURCES["pope"], file=file)) == 12


def test_a_duplicate_id(questions: Path) -> None:
    file = questions / "coco_pope_random.jsonl"
    appended(file, file.read_text().splitlines()[3])
    refused(SOURCES["pope"], "line 13 (question_id 3): its id was there before", file=file, skipped={"duplicate id": 1})


@pytest.mark.parametrize(
    ("image", "text", "said"),
    [
        (["a.jpg", "b.jpg"], "<image>\nWhat?", "2 images, 1 <image>"),
        ("a.jpg", "What?", "1 images, 0 <image>"),
        ("a.jpg", "<image> and <image>", "more <image> than its 1 images"),
    ],
)
def test_more_or_fewer_images_than_marks(questions: Path, image: object, text: str, said: str) -> None:
    records = json.loads((questions / "instruct.json").read_text())
    records.append({"id": "bad", "image": image, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "x"}]})
    (questions / "instruct.json").write_text(json.dumps(records))
    refused(SOURCES["llava-json"], "record 15 (id 'bad')", said, file=questions / "instruct.json", skipped={"bad record": 1})


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
    ("line", "said"),
    [
        ("sources: {a: {type: pocket, share: -1}}", "greater than or equal to 0"),
        ("sources: {a: {type: pocket, share: 0}}", "all shares are 0"),
        ("sources: {a: {type: pocket}}\nshares: {0: {a: 0}}", "all shares are 0: nothing would be trained from 0 of the run on"),
        ("sources: {lcl: {type: pocket}}\nshares: {0.5: {lcll: 1}}", "no source 'lcll' (did you mean 'lcl'?)"),
        ("sources: {a: {type: pocket}}\nshares: {0.5: {a: -2}}", "greater than or equal to 0"),
        ("sources: {a: {type: pocket}}\nshares: {1.5: {a: 1}}", "less than or equal to 1"),
    ],
)
def test_shares_that_cannot_be(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: pocket\n{line}\n")
    with pytest.raises(RecipeError) as caught:
        recipe.load(tmp_path / "mine.yaml")
    assert said in str(caught.value)


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


def test_a_circle_of_links(tmp_path: Path) -> None:
    paint(tmp_path / "photos" / "good" / "0.png", (1, 2, 3))
    (tmp_path / "photos" / "good" / "again").symlink_to(tmp_path / "photos")
    refused({"type": "class-folder", "path": tmp_path / "photos"}, "a link that leads back to a folder above it")


def test_what_does_not_fit_the_context_is_refused_by_name(pocket_tiny: Path, tmp_path: Path) -> None:
    """Tiny bases hold 1,024 tokens."""
    source = {**SOURCES["mvtec"], "shots": [4], "queries": 32, "forms": {"one-class": 1}}
    big = {"type": "pocket", "ways": [16], "shots": [2], "policy": "n-way", "further_views": 16}
    made = Recipe.model_validate({"base": str(pocket_tiny), "output": tmp_path / "run", "sources": {"big": big, "parts": source}})
    with pytest.raises(EpisodeError, match=r"big episode \d+: \d+ tokens .* do not fit the context of 1024"):
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
    found = check(made)
    assert any("copy of train900_pairs.jsonl" in f["message"] for f in found["faults"])


def test_fifty_planted_faults_of_twelve_kinds_are_all_found(tmp_path: Path) -> None:
    """10,000 images in four layouts; every fault is named, and nothing else."""
    rng = np.random.default_rng(0)
    flat = [Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(8)]
    photos, tree, files = tmp_path / "photos", tmp_path / "parts", tmp_path / "files"
    for n in range(100):
        (photos / f"class {n:03}").mkdir(parents=True)
        for k in range(80):
            flat[(n + k) % 8].save(photos / f"class {n:03}" / f"{k:02}.png")
    files.mkdir()
    for n in range(1600):
        flat[n % 8].save(files / f"{n:04}.png")
    mask = Image.new("L", (8, 8))
    mask.paste(255, (2, 2, 5, 5))
    for n in range(10):
        for place, count in (("train/good", 10), ("test/good", 10), ("test/scratch", 20)):
            (tree / f"part {n}" / place).mkdir(parents=True)
            for k in range(count):
                flat[k % 8].save(tree / f"part {n}" / place / f"{k:03}.png")
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
    assert (sum(planted.values()), len(planted)) == (50, 12)
    assert sum(p.suffix == ".png" for p in tmp_path.rglob("*")) > 9_990
    made = {
        "base": "pocket",
        "sources": {
            "photos": {"type": "class-folder", "path": photos},
            "parts": {"type": "mvtec", "path": tree},
            "pope": {"type": "pope", "file": tmp_path / "pope.jsonl", "images": files},
            "rec": {"type": "shikra", "file": tmp_path / "rec.jsonl", "images": files},
        },
    }
    found = check(Recipe.model_validate(made))
    assert Counter(f["kind"] for f in found["faults"]) == planted
    assert len({f["message"] for f in found["faults"]}) == 50, "each with its own place"
    assert all(str(tmp_path) in f["message"] for f in found["faults"])


def test_data_check_on_the_command_line(tmp_path: Path, photos: Path, pocket_tiny: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: {pocket_tiny}\nsources: {{photos: {{type: class-folder, path: {photos}, shots: 1}}}}\n")
    clean = CliRunner().invoke(main, ["data", "check", str(tmp_path / "mine.yaml"), "--json"])
    assert clean.exit_code == 0, clean.output
    told = json.loads(clean.stdout)
    assert told["sources"]["photos"] == {"entries": 3, "pictures": 12, "left_out": {}}
    assert told["rows"]["longest"]["photos"] > 20
    (photos / "good" / "0.png").write_bytes(b"")
    faulty = CliRunner().invoke(main, ["data", "check", str(tmp_path / "mine.yaml"), "--json"])
    assert faulty.exit_code == 1
    assert json.loads(faulty.stdout)["faults"][0]["kind"] == "empty image"
    assert "good/0.png" in faulty.stderr.replace("\n", "")
