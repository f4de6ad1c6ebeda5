"""``ask``: folders of new photos, broken ones among them, pictures of every kind and size, and the folder of results."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lcl_adapter import report
from lcl_adapter.answering import ask as asking
from lcl_adapter.answering.ask import ask_model
from lcl_adapter.answering.client.messages import LARGEST_SENT, REDUCED_SIDE, image_of
from lcl_adapter.answering.judged import CLOSE_MARGIN, Judged
from lcl_adapter.answering.predict import Predictor, Question
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.cli import main
from lcl_adapter.cli.asking import write_results
from lcl_adapter.data.conversations import WORDINGS, Turn, support_turns
from lcl_adapter.data.sources import Picture, read_class_folders, read_image
from lcl_adapter.data.sources.images import REDUCING_GAP
from lcl_adapter.data.sources.new_photos import list_photos
from lcl_adapter.errors import DataError, RunError
from lcl_adapter.recipe import load
from lcl_adapter.report.judged import FORMULA, table_rows
from lcl_adapter.terminal import printable
from tests.conftest import paint
from tests.test_merge import adapter_on


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """Five new photos, in two folders, and files beside them that are none."""
    root = tmp_path / "new"
    for number, name in enumerate(("b.png", "a.jpg", "deep/er/d.png", "deep/c.webp", "写真 １.png")):
        paint(root / name, (40 * number, 160, 60), seed=50 + number)
    (root / "notes.txt").write_text("none")
    (root / ".hidden.png").write_bytes(b"")
    (root / ".cache").mkdir()
    paint(root / ".cache" / "e.png", (1, 2, 3))
    return root


def ask(base: Path, photos: Path, *queries: Path, **options: Any) -> Judged:
    return ask_model(photos, queries, base=BaseRef(str(base), precision="fp32"), **options)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# Which photos


def test_a_folder_is_listed_in_a_stable_order(new: Path) -> None:
    listed = list_photos([new])
    assert [str(picture.path.relative_to(new)) for picture in listed.pictures] == ["a.jpg", "b.png", "写真 １.png", "deep/c.webp", "deep/er/d.png"]
    assert listed.skipped == (new / "notes.txt",)
    assert not listed.repeated


def test_what_is_given_twice_is_asked_about_once(new: Path) -> None:
    (new / "link.png").symlink_to(new / "b.png")
    listed = list_photos([new / "a.jpg", new, new])
    assert [picture.path.name for picture in listed.pictures] == ["a.jpg", "b.png", "写真 １.png", "c.webp", "d.png"]
    assert len(listed.repeated) == 2 + 6
    assert len(list_photos([new / "a.jpg", new / "a.jpg"]).pictures) == 2, "two files are two answers, as they were given"


def test_links_in_a_circle_and_pipes_end(new: Path) -> None:
    (new / "deep" / "up").symlink_to(new)
    os.mkfifo(new / "pipe.png")
    listed = list_photos([new])
    assert len(listed.pictures) == 5
    assert [path.name for path in listed.skipped] == ["notes.txt", "pipe.png"]


def test_a_folder_without_pictures_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures in this folder"):
        list_photos([tmp_path / "empty"])


# Answers


def test_blocks_give_the_answers_of_single_photos(photos: Path, tmp_path: Path, pocket_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more than a block is decoded at a time."""
    for number in range(asking.BLOCK + 5):
        paint(tmp_path / "many" / f"{number:02}.png", (7 * number, 90, 200 - 7 * number), seed=number)
    decoded: list[int] = []
    pixels = VisionFeatures.pixels

    def counted(self: VisionFeatures, pictures: Any) -> Any:
        decoded.append(len(pictures))
        return pixels(self, pictures)

    monkeypatch.setattr(VisionFeatures, "pixels", counted)
    together = ask(pocket_tiny, photos, tmp_path / "many")
    assert max(decoded) <= asking.BLOCK
    assert sum(decoded) == 12 + asking.BLOCK + 5, "each picture went through the tower once"
    for place in (0, asking.BLOCK, asking.BLOCK + 4):
        alone = ask(pocket_tiny, photos, together.queries[place].path).answers[0]
        assert alone["label"] == together.answers[place]["label"]
        assert list(alone["scores"].values()) == pytest.approx(list(together.answers[place]["scores"].values()), abs=1e-4)
        assert alone["most_alike"]["example"] == together.answers[place]["most_alike"]["example"]


def test_the_most_alike_photo_of_a_copy_is_its_original(photos: Path, tmp_path: Path) -> None:
    """On the shipped base. A copy under another name is no labelled photo."""
    shutil.copy(photos / "good" / "2.png", tmp_path / "copy.png")
    answer = ask(Path("pocket"), photos, tmp_path / "copy.png").answers[0]
    assert answer["most_alike"]["photo"] == str(photos / "good" / "2.png")
    assert answer["most_alike"]["label"] == "good"
    assert answer["most_alike"]["cosine"] == pytest.approx(1, abs=1e-4)
    assert answer["margin"] == pytest.approx(np.subtract(*sorted(answer["scores"].values())[:-3:-1]))
    assert answer["unsure"] == (answer["margin"] < CLOSE_MARGIN)


def test_compare_asks_the_base_too(photos: Path, tmp_path: Path, pocket_tiny: Path) -> None:
    run = adapter_on(pocket_tiny, tmp_path / "run")
    query = paint(tmp_path / "q.png", (90, 160, 60))
    compared = ask_model(photos, [query], adapter=run, compare=True).answers[0]
    adapted = ask_model(photos, [query], adapter=run).answers[0]
    assert "base" not in adapted
    assert compared["scores"] == pytest.approx(adapted["scores"], abs=1e-5)
    assert compared["base"]["label"] == max(compared["base"]["scores"], key=compared["base"]["scores"].__getitem__)
    assert compared["base"]["probability"] == max(compared["base"]["scores"].values())
    alone = Predictor(load_base(BaseRef(str(pocket_tiny), precision="fp32")))
    wording = WORDINGS[load(run / "recipe.yaml").wording]
    shown = [(picture, c.name) for c in read_class_folders(photos).classes for picture in c.pictures]
    question = Question(0, Turn("user", wording.query, Picture(query)), tuple(map(wording.answered, compared["scores"])))
    reply = alone.ask(alone.prefill([support_turns(shown, wording)]), [question])[0]
    assert list(compared["base"]["scores"].values()) == pytest.approx(reply.probabilities, rel=1e-3)
    assert list(compared["scores"].values()) != pytest.approx(reply.probabilities, rel=0.1)
    assert call("ask", photos, query, "--compare").exit_code == 2


def test_the_answers_are_on_standard_output_and_notes_are_not(photos: Path, pocket_tiny: Path) -> None:
    """``lcl-adapter ask … > answers.txt`` holds the answers."""
    result = call("ask", photos, photos / "good", "--base", pocket_tiny)
    assert result.exit_code == 0, result.output
    assert "good" in result.stdout
    assert "%" in result.stdout
    assert "note: " not in result.stdout
    assert "note: " in result.stderr
    as_json = call("ask", photos, photos / "good", "--base", pocket_tiny, "--json")
    assert json.loads(as_json.stdout)["answers"]
    assert "%" in as_json.stderr


def test_a_labelled_photo_may_be_asked_about(photos: Path, pocket_tiny: Path) -> None:
    result = call("ask", photos, photos / "good", photos / "good", "--base", pocket_tiny, "--json")
    assert result.exit_code == 0, result.output
    answers = json.loads(result.stdout)
    assert len(answers["answers"]) == 4
    assert [answer["most_alike"]["photo"] for answer in answers["answers"]] == [answer["query"] for answer in answers["answers"]]
    assert result.stderr.count("that are labelled photos too") == 1
    assert result.stderr.count("given twice") == 1
    assert len(answers["notes"]) == 2


def test_a_class_with_one_photo(tmp_path: Path, pocket_tiny: Path) -> None:
    for number, label in enumerate(("one", "other")):
        paint(tmp_path / "photos" / label / "only.png", (200 * number, 90, 90), seed=number)
    answer = ask(pocket_tiny, tmp_path / "photos", paint(tmp_path / "q.png", (190, 90, 90))).answers[0]
    assert sum(answer["scores"].values()) == pytest.approx(1)


BROKEN = {
    "zero.png": (b"", "the file is empty"),
    "page.jpg": (b"<html>", "not an image"),
    "pixel.png": (None, "1 x 1 pixels shows nothing"),
    "=1+1 <b>\n\udcff.png": (b"x", "not an image"),
    "gone.png": (None, "no such file"),
    "cut.jpg": (None, "truncated"),
}


@pytest.fixture
def with_broken(new: Path) -> Path:
    for name, (data, _) in BROKEN.items():
        if data is not None:
            (new / name).write_bytes(data)
    Image.new("RGB", (1, 1)).save(new / "pixel.png")
    (new / "gone.png").symlink_to(new / "nowhere.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    noise.save(new / "cut.jpg")
    (new / "cut.jpg").write_bytes((new / "cut.jpg").read_bytes()[:3000])
    return new


def test_broken_photos_are_named_and_do_not_stop(photos: Path, with_broken: Path, pocket_tiny: Path, tmp_path: Path) -> None:
    result = call("ask", photos, with_broken, "--base", pocket_tiny, "--out", tmp_path / "judged", "--json")
    assert result.exit_code == 1, result.output
    answers = {answer["query"]: answer for answer in json.loads(result.stdout)["answers"]}
    assert len(answers) == 5 + len(BROKEN)
    page = (tmp_path / "judged" / "index.html").read_text(encoding="utf-8")
    table = read_table(tmp_path / "judged")
    for name, (_, reason) in BROKEN.items():
        shown = f"{with_broken}/{printable(name)}"
        assert reason in answers[shown]["error"]
        assert not answers[shown]["error"].startswith(shown), "the name is in a field of its own"
        assert [row for row in table if reason in row["error"] and row["file"].endswith(printable(name))]
        assert re.search(rf"{reason}", page)
    assert sum("error" not in answer for answer in answers.values()) == 5
    last = result.stderr.replace("\n", " ").rpartition("11 photos: ")[2]
    assert f"{len(BROKEN)} failed" in last
    assert "wrote" not in last
    assert "<b>" + printable("\n") not in page


def test_if_all_are_broken_it_is_an_error(photos: Path, tmp_path: Path, pocket_tiny: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    result = call("ask", photos, tmp_path / "a.png", tmp_path / "b.png", "--base", pocket_tiny, "--out", tmp_path / "judged")
    assert result.exit_code == 2
    assert "none of the 2 pictures has an answer" in result.output
    assert not (tmp_path / "judged").exists()
    assert not list(tmp_path.glob("*.partial"))


# Kinds and sizes of pictures

PIXELS = np.random.default_rng(5).integers(0, 255, (24, 30, 3), dtype=np.uint8)


def exif_turned(path: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(path.with_suffix(".png"), exif=exif)
    return path.with_suffix(".png")


def sixteen_bit(path: Path) -> Path:
    Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257).save(path.with_suffix(".png"))
    return path.with_suffix(".png")


def cmyk(path: Path) -> Path:
    Image.fromarray(PIXELS).convert("CMYK").save(path.with_suffix(".tif"))
    return path.with_suffix(".tif")


def palette(path: Path) -> Path:
    """Transparent where the first channel is bright."""
    image = Image.fromarray(PIXELS).quantize(16)
    image.info["transparency"] = image.getpixel((0, 0))
    image.save(path.with_suffix(".png"), transparency=image.getpixel((0, 0)))
    return path.with_suffix(".png")


def animated(suffix: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        frames = [Image.fromarray(PIXELS), Image.new("RGB", (30, 24), "blue")]
        exact = {"lossless": True} if suffix == ".webp" else {}
        frames[0].save(path.with_suffix(suffix), save_all=True, append_images=frames[1:], **exact)
        return path.with_suffix(suffix)

    return write


def black(path: Path) -> Path:
    Image.new("RGB", (40, 40)).save(path.with_suffix(".png"))
    return path.with_suffix(".png")


def on_white(path: Path) -> Image.Image:
    """What a viewer shows: Pillow's own pixels on white."""
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@pytest.mark.parametrize(
    ("write", "shown"),
    [
        (exif_turned, lambda path: Image.fromarray(PIXELS).transpose(Image.Transpose.ROTATE_270)),
        (sixteen_bit, lambda path: Image.fromarray(PIXELS[..., 0])),
        (cmyk, lambda path: Image.fromarray(PIXELS).convert("CMYK").convert("RGB")),
        (palette, on_white),
        (animated(".webp"), lambda path: Image.fromarray(PIXELS)),
        (animated(".gif"), on_white),
        (black, lambda path: Image.new("L", (40, 40))),
    ],
    ids=["exif", "16 bit", "cmyk", "palette", "webp", "gif", "black"],
)
def test_every_kind_of_picture_is_read_as_it_is_shown(
    write: Callable[[Path], Path], shown: Callable[[Path], Image.Image], photos: Path, tmp_path: Path, pocket_tiny: Path
) -> None:
    """The answer is that to a plain PNG of what a viewer shows."""
    path = write(tmp_path / "kind")
    shown(path).convert("RGB").save(tmp_path / "plain.png")
    kind, plain = ask(pocket_tiny, photos, path, tmp_path / "plain.png").answers
    assert kind["scores"] == pytest.approx(plain["scores"], abs=1e-4)
    assert kind["most_alike"]["cosine"] == pytest.approx(plain["most_alike"]["cosine"], abs=1e-4)
    assert -1.0001 <= kind["most_alike"]["cosine"] <= 1.0001


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JPEG of 50 megapixels with large shapes."""
    path = tmp_path_factory.mktemp("large") / "large.jpg"
    small = Image.fromarray(np.random.default_rng(3).integers(0, 255, (4, 6, 3), dtype=np.uint8))
    small.resize((8660, 5774), Image.Resampling.BILINEAR).save(path, quality=80)
    return path


def test_a_photo_of_50_megapixels_is_read_as_if_it_were_decoded_in_full(large: Path, photos: Path, pocket_tiny: Path) -> None:
    """Up to a level of brightness, at the side that a tower reads."""
    whole, reduced = read_image(Picture(large)), read_image(Picture(large), 224)
    assert whole.size == (8660, 5774)
    assert reduced.size == (1083, 722)
    expected, read = (np.asarray(image.resize((224, 149), Image.Resampling.BICUBIC), dtype=np.int16) for image in (whole, reduced))
    assert np.abs(expected - read).mean() < 1
    answer = ask(pocket_tiny, photos, large).answers[0]
    assert sum(answer["scores"].values()) == pytest.approx(1)


def test_a_large_jpeg_needs_little_memory(large: Path) -> None:
    """In a process of its own: decoded in full, it would need 150 MB, and 225 MB padded to a square."""
    code = (
        "import resource, sys\nfrom lcl_adapter.data.sources import Picture, read_image\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak()\nimage = read_image(Picture(sys.argv[1]), 224)\nprint(peak() - before, *image.size)"
    )
    printed = subprocess.run([sys.executable, "-c", code, str(large)], check=True, capture_output=True, text=True).stdout
    megabytes, width, height = map(int, printed.split())
    assert megabytes < 60
    assert (width, height) == (1083, 722)


@settings(deadline=None, max_examples=40)
@given(width=st.integers(2, 1500), height=st.integers(2, 1500), side=st.integers(1, 200), suffix=st.sampled_from(["JPEG", "PNG"]))
def test_a_reduced_picture_is_large_enough(width: int, height: int, side: int, suffix: str) -> None:
    """Of the same shape, and never below the gap; a picture below it is the whole one."""
    written = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(written, suffix)
    image = read_image(Picture(Path("red"), data=written.getvalue()), side)
    longest = max(width, height)
    if longest < 2 * REDUCING_GAP * side:
        assert image.size == (width, height)
    else:
        assert REDUCING_GAP * side <= max(image.size) <= 2 * REDUCING_GAP * side
        assert image.width / width == pytest.approx(image.height / height, abs=2 / min(width, height))


def test_a_photo_that_is_too_large_for_a_server_is_sent_reduced(large: Path, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1700, 1700, 3), dtype=np.uint8))
    noise.save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > LARGEST_SENT
    assert len(image_of(Picture(tmp_path / "large.png"))) < LARGEST_SENT * 4 / 3
    sent = Image.open(io.BytesIO(base64.b64decode(image_of(Picture(large)).partition(",")[2])))
    assert sent.size == (REDUCED_SIDE, round(REDUCED_SIDE * 5774 / 8660))


# Results


def read_table(folder: Path) -> list[dict[str, str]]:
    data = (folder / "judged.csv").read_bytes()
    assert data.startswith(b"\xef\xbb\xbf"), "Excel reads UTF-8 by this mark"
    return list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))


def judged_of(tmp_path: Path, margins: dict[str, tuple[str | None, float]], **fields: Any) -> Judged:
    """Results that no model gave. margins: photo -> label and margin."""
    shown = tuple((Picture(paint(tmp_path / "photos" / label / "1.png", (200, 90, 40))), label) for label in ("良品", "<i>傷</i>"))
    rows = []
    for name, (label, margin) in margins.items():
        first = "良品" if label is None else label
        scores = {own: (1 + margin) / 2 if own == first else (1 - margin) / 2 for _, own in shown}
        row = {"query": str(tmp_path / name), "answer": first, "label": label, "margin": margin, "unsure": margin < CLOSE_MARGIN, "scores": scores}
        rows.append({**row, "most_alike": {"example": 0, "photo": "photos/1.png", "label": "良品", "cosine": -0.25}, **fields})
    queries = tuple(Picture(paint(tmp_path / name, (90, 90, 200), seed=number)) for number, name in enumerate(margins))
    return Judged(shown, queries, {"answers": rows, "notes": [], "skipped": ["a.txt"]})


def test_the_page_has_the_unsure_ones_first(tmp_path: Path) -> None:
    margins = {"a.png": ("良品", 0.9), "b.png": ("良品", 0.1), "c.png": ("<i>傷</i>", 0.05), "d.png": ("良品", 0.5), "e.png": ("<i>傷</i>", 0.99)}
    (tmp_path / "out").mkdir()
    report.write_judged(judged_of(tmp_path, margins), tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    headings = re.findall(r"<h2>(.*?) <small>(\d+)", page)
    assert headings == [("Unsure", "2"), ("良品", "3"), ("&lt;i&gt;傷&lt;/i&gt;", "2")]
    assert re.findall(r'class="file"[^>]*>([^<]+)<', page) == ["c.png", "b.png", "b.png", "d.png", "a.png", "c.png", "e.png"]
    assert f"less than {CLOSE_MARGIN} apart" in page
    assert "<i>" not in page
    assert "<script" not in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith(("data:image/webp", "#")) for source in sources), "nothing is read from another file or address"
    assert "Skipped files: 1" in page


def test_a_table_has_every_field(tmp_path: Path) -> None:
    base = {"label": "良品", "probability": 0.6, "scores": {"良品": 0.6, "<i>傷</i>": 0.4}}
    (tmp_path / "out").mkdir()
    judged = judged_of(tmp_path, {"a.png": ("良品", 0.5), "-b.png": (None, 0.1)}, base=base, nearest="良品", none_of_these=True)
    report.write_judged(judged, tmp_path / "out")
    first, second = read_table(tmp_path / "out")
    assert list(first) == [
        "file", "label", "unsure", "probability", "margin", "probability of 良品", "probability of <i>傷</i>", "most alike", "label of most alike",
        "likeness", "base alone", "probability by base alone", "error",
    ]  # fmt: skip
    assert [first[name] for name in ("label", "unsure", "probability", "margin", "likeness", "base alone")] == [
        "良品",
        "",
        "0.7500",
        "0.5000",
        "-0.2500",
        "良品",
    ]
    assert (second["label"], second["unsure"]) == ("none of these", "unsure")
    written = json.loads((tmp_path / "out" / "judged.json").read_text(encoding="utf-8"))
    assert written["answers"] == judged.answers


@given(name=st.text(min_size=1, max_size=12), start=st.sampled_from(["", *FORMULA]))
def test_no_cell_is_a_formula(name: str, start: str) -> None:
    row = {"query": start + name, "error": start + name}
    cells = [cell for line in table_rows(Judged((), (Picture("x"),), {"answers": [row]})) for cell in line]
    assert not [cell for cell in cells if cell.startswith(FORMULA)]


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Z", "C"]), max_size=30))
def test_names_can_be_printed(name: str) -> None:
    shown = printable(name)
    shown.encode("utf-8")
    assert len(shown.splitlines()) <= 1
    if name.isprintable():
        assert shown == name
    assert printable("写真　１👩‍🔧.jpg") == "写真　１👩‍🔧.jpg"


def test_results_replace_earlier_ones_and_nothing_else(photos: Path, new: Path, tmp_path: Path, pocket_tiny: Path) -> None:
    out = tmp_path / "judged"

    def judge(*queries: Path) -> Judged:
        return write_results(lambda: ask(pocket_tiny, photos, *queries, brief=True), out)

    judge(new)
    assert {path.name for path in out.iterdir()} == {"judged.csv", "judged.json", "index.html"}
    assert len(read_table(out)) == 5
    judge(new / "a.jpg")
    assert len(read_table(out)) == 1
    earlier = {path.name: path.read_bytes() for path in out.iterdir()}

    with pytest.raises(DataError):
        judge(tmp_path / "nowhere.png")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == earlier

    (out / "mine.txt").write_text("notes")
    asked: list[int] = []
    with pytest.raises(RunError, match="something else than an earlier result"):
        write_results(lambda: asked.append(1), out)  # type: ignore[arg-type, return-value, func-returns-value]
    assert not asked, "refused before anything is asked"
    with pytest.raises(RunError, match="something else"):
        write_results(lambda: asked.append(1), photos)  # type: ignore[arg-type, return-value, func-returns-value]
    assert not list(tmp_path.glob("*.partial"))


def test_a_failed_write_leaves_the_earlier_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "judged"
    judged = judged_of(tmp_path, {"a.png": ("良品", 0.9)})
    write_results(lambda: judged, out)
    earlier = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lcl_adapter.report.judged._page_fields", full)
    with pytest.raises(RunError, match="the disk is full"):
        write_results(lambda: judged, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == earlier
    assert not list(tmp_path.glob("*.partial"))


def test_ask_a_folder_from_the_command_line(photos: Path, new: Path, tmp_path: Path, pocket_tiny: Path) -> None:
    run = adapter_on(pocket_tiny, tmp_path / "run")
    result = call("ask", photos, new, "--adapter", run, "--compare", "--out", tmp_path / "judged", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    written = json.loads((tmp_path / "judged" / "judged.json").read_text(encoding="utf-8"))
    assert {key: written[key] for key in printed} == printed
    assert [row["file"] for row in read_table(tmp_path / "judged")] == [answer["query"] for answer in printed["answers"]]
    assert printed["skipped"] == [str(new / "notes.txt")]
    assert "notes.txt" in result.stderr
    assert f"wrote {tmp_path / 'judged' / 'index.html'}" in result.stderr.replace("\n", "")
    assert report.is_judged(tmp_path / "judged")
