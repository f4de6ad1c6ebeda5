"""Files that a stranger made: each is refused with a reason of one line, or is a fault of its record. Nothing hangs, grows, runs or
ends with a traceback.
"""

from __future__ import annotations

import gzip
import io
import json
import logging.config
import os
import pickle
import re
import resource
import shutil
import socket
import tarfile
import time
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from pydantic import TypeAdapter
from rich.table import Table

from lcl_adapter import reading, recipe, terminal
from lcl_adapter.base import adapter
from lcl_adapter.base.model import load_base, load_encoder
from lcl_adapter.cli import main
from lcl_adapter.data.sources import Picture, open_reader, read_class_folders, read_image
from lcl_adapter.data.sources.boxes import stored_size
from lcl_adapter.data.sources.manifest import read_manifest
from lcl_adapter.data.sources.shards import expanded, members_of, read_shards
from lcl_adapter.data.sources.text import read_text
from lcl_adapter.errors import DataError, LclError, ModelError, RecipeError, RunError
from lcl_adapter.files import only_writer
from lcl_adapter.page.photos import unpack
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.sources import TaggedSource
from lcl_adapter.serve import folders
from lcl_adapter.serve.pictures.images import Bounds, check
from lcl_adapter.serve.store import Store
from lcl_adapter.training import trainer
from tests.conftest import paint
from tests.forked import Forked
from tests.tiny import save_tiny

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lcl_adapter"
SECONDS = 20  # far above what a refusal takes here, far below what was measured before there was one


@pytest.fixture(autouse=True)
def _ends_soon() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 4 * SECONDS


def run(*arguments: object) -> Result:
    """A command's result. Whatever a person gives, there is no traceback: a message of a few lines, and an exit code."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def refused(*arguments: object, lines: int = 2) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) <= lines + 3, result.stderr  # click prints its usage before a wrong option
    return str(result.stderr)


@contextmanager
def memory_level(most: int) -> Iterator[None]:
    """The process's largest memory grows by at most so many bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < most, f"{grown / 2**20:.0f} MiB"


def read(options: dict[str, Any]) -> Any:
    return open_reader("mine", TypeAdapter(TaggedSource).validate_python(options))


# What is no regular file

IRREGULAR: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "zeros": lambda path: path.symlink_to("/dev/zero"),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
}


@pytest.fixture(params=IRREGULAR)
def irregular(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a pipe, a link to a device, or a socket, under a name in the test's folder."""
    if request.param == "socket":
        monkeypatch.chdir(tmp_path)  # a socket's name has at most 107 bytes

    def make(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if request.param == "socket":
            with socket.socket(socket.AF_UNIX) as opened:
                opened.bind(os.path.relpath(path))
        else:
            IRREGULAR[request.param](path)
        return path

    return make


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_is_no_regular_file_is_refused_at_once_by_every_reader(irregular: Callable[[str], Path], photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a file is expected"):
        read_image(Picture(irregular("photo.png")))
    with pytest.raises(DataError, match="a file is expected"):
        stored_size(Picture(tmp_path / "photo.png"))
    for name in ("list.csv", "list.jsonl", "list.json", "list.csv.gz"):
        with pytest.raises(DataError, match="a file is expected"):
            read_manifest(irregular(name), photos, {"image": ["photo"], "class": ["label"]})
    questions = irregular("questions.jsonl")
    for options in (
        {"type": "llava-json", "file": questions, "images": photos},
        {"type": "pope", "file": questions, "images": photos},
        {"type": "vqav2", "questions": questions, "annotations": questions, "images": photos},
        {"type": "shikra", "file": questions, "images": photos},
        {"type": "self", "prompts": questions},
        {"type": "imagenet-lcl", "pairs": questions, "images": photos},
        {"type": "isekai", "file": questions, "images": photos},
        {"type": "class-folder", "path": irregular("photos.zip")},
        {"type": "shards", "urls": "a-{0..1}.tar", "index": questions},
    ):
        with pytest.raises(DataError, match=r"a file is expected|no such folder"):
            read(options)
    (tmp_path / "shards").mkdir()
    irregular("shards/a.tar")
    with pytest.raises(DataError, match="a file is expected"):
        read_shards(tmp_path / "shards", "", None, tmp_path, 1, 1)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_is_no_regular_file_is_refused_at_once_by_every_command(
    irregular: Callable[[str], Path], photos: Path, tmp_path: Path, pocket_tiny: Path
) -> None:
    for command in (("train",), ("plan",), ("data", "check"), ("recipes", "copy")):
        assert "a recipe is expected" in refused(*command, irregular(f"{command[-1]}.yaml"))
    assert "a file is expected" in refused("serve", pocket_tiny, "--api-key-file", irregular("keys.txt"), "--port", 0, "--store", tmp_path / "store")
    asked = run("ask", photos, irregular("new.png"), "--base", pocket_tiny)
    assert asked.exit_code in {1, 2}
    assert "a file is expected" in asked.output
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        folder = save_tiny(tmp_path / f"base {name}", "pocket")
        (folder / name).unlink()
        irregular(f"base {name}/{name}")
        assert f"{name} is a" in refused("inspect", folder)
    (tmp_path / "run").mkdir()
    irregular("run/lcl_adapter.json")
    assert "lcl_adapter.json is a" in refused("ask", photos, photos / "good" / "0.png", "--adapter", tmp_path / "run")
    (tmp_path / "set").mkdir()
    irregular("set/support-set.json")
    assert "support-set.json" in refused("support", "import", tmp_path / "set", "--store", tmp_path / "store")


# Formats of pictures

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%stdout) (w) file (ran) writestring showpage\n%%EOF\n"
QOI = b"qoif" + (9).to_bytes(4, "big") + (9).to_bytes(4, "big") + b"\x03\x00" + b"\xfe\x01"
DDS = b"DDS " + (124).to_bytes(4, "little") + b"\xff" * 120


def test_a_programs_picture_format_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An EPS named photo.png would start Ghostscript: here a program of that name writes that it was started."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    (tmp_path / "photo.png").write_bytes(EPS)
    with pytest.raises(DataError, match="not an image"):
        read_image(Picture(tmp_path / "photo.png"))
    with pytest.raises(DataError, match="not an image"):
        check(EPS, Bounds())
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("data", [EPS, QOI, DDS, b"\x00\x00\x00\x20ftypavif" + b"\xff" * 60], ids=["eps", "qoi", "dds", "avif"])
def test_a_broken_picture_of_any_format_is_a_fault_of_the_picture(data: bytes, tmp_path: Path, photos: Path, pocket_tiny: Path) -> None:
    path = tmp_path / "new.png"
    path.write_bytes(data)
    for reader in (read_image, stored_size):
        with pytest.raises(DataError, match=re.escape(str(path))):
            reader(Picture(path))
    with pytest.raises(DataError, match="cannot be read"):
        check(data, Bounds())
    result = run("ask", photos, path, photos / "good" / "0.png", "--base", pocket_tiny)
    assert result.exit_code == 1
    assert "new.png" in result.output


def test_pictures_are_opened_in_one_place_and_of_one_list_of_formats() -> None:
    """So is every other file that a person can name. What ships with the package is read as it is."""
    opening = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if re.search(r"Image\.open\((?![^\n]*formats=)", p.read_text())}
    assert not opening
    formats = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if "formats=FORMATS" in p.read_text()}
    assert formats == {"data/sources/images.py"}
    of_the_package = {  # that ships, or that this package has written, or whose hash is known
        "pocket/parts.py", "pocket/products.py", "data/sources/pocket.py", "recipe/suites.py", "recipe/shipped.py",
        "page/blocks.py", "page/visitors.py", "photo/build.py", "photo/packages.py",
        "checkpoints/exchange/ask_upstream.py", "evaluate/caching.py", "serve/store.py", "report/pages.py",
    }  # fmt: skip
    readers = {"reading.py", "files.py", "data/sources/archive.py"}
    pattern = re.compile(r"json\.loads?\(|yaml\.(safe_load|load|compose)\(|\.read_text\(|\.read_bytes\(|ZipFile\(|gzip\.decompress|torch\.load\(")
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if name not in of_the_package | readers:
            lines = enumerate(path.read_text().splitlines(), 1)
            wrong += [f"{name}, line {n}: {line.strip()}" for n, line in lines if pattern.search(line) and "reading.read_" not in line]
    assert [line for line in wrong if "base/layouts/tensors.py" not in line or "weights_only=True" not in line] == []


# Sizes

ZEROS = b"\0" * 2**20


def bomb(path: Path, member: str, size: int, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """An archive of a member of zeros, a thousand times larger than the archive."""
    with zipfile.ZipFile(path, "w", method) as archive, archive.open(member, "w", force_zip64=True) as opened:
        for _ in range(size >> 20):
            opened.write(ZEROS)
    return path


def with_size(path: Path, size: int) -> Path:
    """The same archive, whose only member is said to have another size."""
    raw = bytearray(path.read_bytes())
    central = raw.rindex(b"PK\x01\x02")
    raw[central + 24 : central + 28] = size.to_bytes(4, "little")
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archives_member_is_bounded_by_what_it_unpacks_to(tmp_path: Path, method: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_UNPACKED", 2**26)
    monkeypatch.setattr("lcl_adapter.data.sources.archive.read_member.__defaults__", (2**26,))
    big = bomb(tmp_path / "big.zip", "good/0.png", 2**27, method)
    assert big.stat().st_size < 2**18
    with memory_level(2**26):
        with pytest.raises(DataError, match="134,217,728 bytes; at most 67,108,864 bytes are read"):
            read_image(Picture(big, "good/0.png"))
        with_size(big, 1000)  # what it says is checked by what comes out
        with pytest.raises(DataError, match=r"cannot be read|is larger|not an image"):
            read_image(Picture(big, "good/0.png"))


def test_texts_of_archives_and_compressed_lists_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_UNPACKED", 2**26)
    monkeypatch.setattr("lcl_adapter.data.sources.archive.read_member.__defaults__", (2**26,))
    with zipfile.ZipFile(bomb(tmp_path / "photos.zip", "neighbours.json", 2**27), "a") as archive:
        archive.write(paint(tmp_path / "0.png", (1, 2, 3)), "good/0.png")
    with gzip.open(tmp_path / "list.csv.gz", "wb") as packed:
        for _ in range(128):
            packed.write(ZEROS)
    with memory_level(2**27):
        with pytest.raises(DataError, match="at most 67,108,864 bytes are read"):
            read_class_folders(tmp_path / "photos.zip")
        with pytest.raises(DataError, match="at most 67,108,864 bytes are read"):
            read_text(tmp_path / "list.csv.gz")


def test_a_sparse_file_is_bounded(tmp_path: Path) -> None:
    """A terabyte that takes no place on the disk."""
    with (tmp_path / "photo.png").open("wb") as file:
        file.truncate(2**40)
    for call in (lambda: read_image(Picture(tmp_path / "photo.png")), lambda: read_text(tmp_path / "photo.png")):
        with pytest.raises(DataError, match=r"1,099,511,627,776 bytes; at most [\d,]+ bytes are read"):
            call()


def tar_of(path: Path, header: tarfile.TarInfo, kind: bytes) -> Path:
    header.type = kind
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT))
    with path.open("r+b") as file:
        file.truncate(min(header.size, 2**34) + 2048 if header.size > 0 else 4096)
    return path


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_tars_name_is_bounded(tmp_path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("long")
    header.size = 2**33
    path = tar_of(tmp_path / "a.tar", header, kind)
    with memory_level(2**26), path.open("rb") as file, pytest.raises(DataError, match="a name or a field of 8,589,934,592 bytes"):
        members_of(file, "a.tar")


def test_a_tars_member_with_a_size_below_zero_and_a_chain_of_headers_end(tmp_path: Path) -> None:
    raw = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    raw[124:136] = (2**96 - 512).to_bytes(12, "big")  # -512, as GNU writes numbers
    raw[148:156] = b"        "
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    chained = tarfile.TarInfo("a")
    chained.type, chained.size = tarfile.GNUTYPE_LONGNAME, 2
    for number, data in enumerate((bytes(raw) + b"\0" * 1024, (chained.tobuf(tarfile.GNU_FORMAT) + b"a\0".ljust(512, b"\0")) * 3000)):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(data)
        with path.open("rb") as file, pytest.raises(DataError, match=r"below 0|cannot be read|can be read"):
            members_of(file, path.name)


def test_a_shards_sample_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_UNPACKED", 2**20)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("s.json", b'{"question": "q", "answer": "a"}'), ("s.1.jpg", ZEROS), ("s.2.jpg", ZEROS)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    pool = read_shards(tmp_path, "", None, tmp_path, 1, 1)
    with pytest.raises(DataError, match="sample 's' has 2,097,184 bytes; at most 1,048,576 are read"):
        pool.dialogues[0]


@pytest.mark.parametrize("pattern", ["{0..999999999}", "a{0..99999}b{0..99999}", "{" + "1" * 5000 + ".." + "2" * 5000 + "}"])
def test_a_pattern_of_shards_is_bounded(pattern: str) -> None:
    with memory_level(2**26), pytest.raises(DataError, match=r"more than 1,000,000 shards|digits in a pattern"):
        expanded(pattern)
    assert len(expanded("a-{000..012}-{0..9}.tar")) == 130


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], k{n}: 1}}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"base: pocket\n{LAUGHS}", "aliases stand for"),
        (f"base: pocket\n{MERGES}", "aliases stand for"),
        ("base: &a [*a]", "alias that contains itself"),
        ("base: " + "[" * 20_000, "nested too deep|not YAML"),
        ("base: " + "{a: " * 3000, "nested too deep|not YAML"),
        (f"base: {'9' * 10_000}", "not YAML"),
        ("base: 2024-99-99", "not YAML"),
        ("base: !!int ''", "not YAML"),
        ("base: !!python/object/apply:os.system ['touch ran']", "not YAML"),
        ("base: " + "x" * 2**20, "at most 524,288 bytes are read|cannot be read"),
    ],
)
def test_yaml_that_grows_or_nests_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    """As a recipe, as the saved recipe of a run that `serve` loads, and as templates: all are read by one function."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with memory_level(2**27):
        for resolved in (False, True):
            with pytest.raises(RecipeError, match=reason):
                recipe.load(path, resolved=resolved)
        with pytest.raises(RecipeError):
            recipe.wording.load(path)
    assert not Path("ran").exists()
    assert "recipe.yaml" in refused("plan", path)


def test_a_wrong_value_is_cut_in_its_message(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: pocket\nprecision: [{'x, ' * 5000}]\nsources: {{a: {{type: pocket}}}}\n")
    with pytest.raises(RecipeError) as caught:
        recipe.load(tmp_path / "mine.yaml")
    assert len(str(caught.value)) < 2000


# Records

DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 10_000
MANY = "9" * 4000  # within what Python parses, and beyond any float
BAD = {"deep": DEEP, "digits": DIGITS, "many": MANY, "nearly as deep as allowed": "[" * 900 + "]" * 900}


@pytest.fixture(params=BAD)
def bad(request: pytest.FixtureRequest) -> str:
    return BAD[request.param]


def lines(*records: object) -> str:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)


def test_one_bad_record_is_a_fault_of_that_record(tmp_path: Path, photos: Path, bad: str) -> None:
    """Of lists of questions. The others are read."""
    image = "good/0.png"
    llava = {"image": image, "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]}
    rec = {"img_path": image, "expression": "it", "bbox": [1, 1, 9, 9]}
    vqa_question, vqa_answer = {"question_id": 1, "image_id": 0, "question": "?"}, {"question_id": 1, "multiple_choice_answer": "a"}
    cases: list[tuple[str, dict[str, Any]]] = [
        (lines(llava, json.dumps({**llava, "id": 2}).replace('"What?"', '"Why?"'), f'{{"id": {bad}}}'), {"type": "llava-json"}),
        (f"[{json.dumps(llava)}, {bad}, {{'a': 1}}]".replace("'", '"'), {"type": "llava-json"}),
        (lines({"question_id": 1, "image": image, "text": "?", "label": "yes"}, f'{{"question_id": {bad}}}'), {"type": "pope"}),
        (lines(rec, f'{{"img_path": "{image}", "expression": "x", "bbox": [1, 1, {bad}, 9]}}'), {"type": "shikra"}),
        (lines(rec, f'{{"img_path": "{image}", "expression": "x", "bbox": {bad}}}'), {"type": "shikra-boxes"}),
    ]
    for number, (text, options) in enumerate(cases):
        file = tmp_path / f"{number}.json"
        file.write_text(text)
        pool = read({**options, "file": file, "images": photos, "on_fault": "skip"})
        assert len(pool) >= 1
        assert sum(pool.skipped.values()) >= 1, (number, pool)
        assert all(len(fault.message) < 1000 for fault in pool.faults)
    (tmp_path / "q.json").write_text(json.dumps({"questions": [vqa_question]}))
    (tmp_path / "a.json").write_text(f'{{"annotations": [{json.dumps(vqa_answer)}, {{"question_id": 2, "x": {bad}}}, {{"question_id": {bad}}}]}}')
    named = {"questions": tmp_path / "q.json", "annotations": tmp_path / "a.json", "image_name": "good/{image_id}.png"}
    assert len(read({"type": "vqav2", **named, "images": photos, "on_fault": "skip"})) == 1


def test_one_bad_row_is_a_fault_of_that_row(tmp_path: Path, photos: Path, bad: str) -> None:
    """Of lists of pictures: JSON Lines, a list, COCO, Label Studio; and of the files beside class folders."""
    rows = [{"photo": f"{name}/{k}.png", "label": name} for name in ("good", "dented") for k in range(2)]
    row = f'{{"photo": "good/3.png", "label": {bad}}}'
    task = f'{{"data": {{"photo": "good/2.png"}}, "annotations": [{{"result": [{{"value": {{"choices": [{bad}]}}}}]}}]}}'
    for name, text in (
        ("a.jsonl", lines(*rows, row)),
        ("b.json", f"[{json.dumps(rows)[1:-1]}, {row}]"),
        ("c.json", f"[{json.dumps(rows)[1:-1]}, {task}]"),
    ):
        (tmp_path / name).write_text(text)
        pool = read_manifest(tmp_path / name, photos, {"image": ["photo"], "class": ["label"]}, on_fault="skip")
        assert {"good", "dented"} <= {one.name for one in pool.classes}, name
        assert {one.name: len(one.pictures) for one in pool.classes}["dented"] == 2
    coco = {
        "images": [{"id": n, "file_name": r["photo"]} for n, r in enumerate(rows)],
        "categories": [{"id": 0, "name": "good"}, {"id": 1, "name": "dented"}],
        "annotations": [{"image_id": n, "category_id": n // 2, "bbox": [1, 1, 9, 9]} for n in range(4)],
    }
    for spoilt in (f'{{"image_id": 0, "category_id": {bad}}}', f'{{"image_id": 0, "category_id": 0, "bbox": [0, 0, {bad}, 1]}}'):
        (tmp_path / "coco.json").write_text(json.dumps(coco).replace('"annotations": [', f'"annotations": [{spoilt}, '))
        pool = read_manifest(tmp_path / "coco.json", photos, {"image": ["image"], "class": ["class"], "box": ["box"]}, on_fault="skip", crop=True)
        assert {one.name: len(one.pictures) for one in pool.classes} == {"good": 2, "dented": 2}
        assert len(pool.faults) == 1
    (photos / "boxes.jsonl").write_text(lines({"image": "good/0.png", "bbox": [1, 1, 9, 9]}, f'{{"image": "good/1.png", "bbox": {bad}}}'))
    assert sum(read_class_folders(photos, on_fault="skip").skipped.values()) == 1
    (photos / "neighbours.json").write_text(f'{{"group": {bad}}}')
    with pytest.raises(DataError, match=r"neighbours\.json"):
        read_class_folders(photos)


def test_a_bad_sample_of_a_shard_is_a_fault_of_that_sample(tmp_path: Path, bad: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("s.json", f'{{"question": "q", "answer": "a", "x": {bad}}}'), ("t.json", f'{{"question": {bad}, "answer": ""}}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data.encode()))
    pool = read_shards(tmp_path, "", None, tmp_path, 1, 1)
    with pytest.raises(DataError, match="sample 't'"):
        pool.dialogues[1]


def test_fields_of_a_table_that_are_too_long_are_reported(tmp_path: Path) -> None:
    root = tmp_path / "visa"
    (root / "split_csv").mkdir(parents=True)
    (root / "split_csv" / "1cls.csv").write_text("object,split,label,image,mask\na,train,normal," + "x" * 200_000 + ",\n")
    with pytest.raises(DataError, match=r"1cls\.csv, line \d: not a table"):
        read({"type": "visa", "path": root})


# Names

LONG = "n" * 300


@pytest.mark.parametrize("name", [LONG, "é" * 200, "~nouser-of-this-machine/photos", f"{'d/' * 3000}photo.png"])
def test_names_that_no_file_can_have_are_refused_in_a_line(tmp_path: Path, photos: Path, pocket_tiny: Path, name: str) -> None:
    photo = photos / "good" / "0.png"
    for arguments in (
        ("train", name), ("data", "check", name), ("inspect", name),
        ("recipes", "copy", "pocket", "--to", name if "~" not in name else tmp_path / LONG),
        ("ask", name, photo, "--base", pocket_tiny), ("ask", photos, name, "--base", pocket_tiny),
        ("ask", photos, photo, "--base", name), ("ask", photos, photo, "--adapter", name),
        ("ask", photos, photo, "--base", pocket_tiny, "--out", name),
        ("support", "add", "set", name, "--store", tmp_path / "store"), ("support", "list", "--store", name),
        ("merge", name, "--out", tmp_path / "merged"), ("convert", pocket_tiny, name), ("eval", name),
        ("train", "pocket", f"output={name}"), ("train", "pocket", f"data.root={name}"), ("plan", "pocket", f"base={name}"),
        ("serve", pocket_tiny, "--adapter", f"a={name}", "--port", 0), ("serve", pocket_tiny, "--api-key-file", name, "--port", 0),
    ):  # fmt: skip
        refused(*arguments)


def test_a_list_with_a_long_name_has_a_fault(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "list.csv").write_text(f"photo,label\ngood/0.png,good\n{LONG},good\n{'é' * 200},good\n~nouser/x.png,good\n")
    pool = read_manifest(tmp_path / "list.csv", photos, {"image": ["photo"], "class": ["label"]}, on_fault="skip")
    assert pool.skipped == {"missing image": 3}


# Checkpoints

ODD_VALUES = (0, -1, 10_000_000, 10**400, 0.5, "x", [], {}, None, True, [[1]], {"a": 1})
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")


def values_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of a JSON value's values, down to the third level."""
    if path:
        yield path
    if len(path) < 3 and isinstance(value, dict):
        for key, inner in value.items():
            yield from values_of(inner, (*path, key))


@pytest.mark.parametrize("family", ["pocket", "llava-next-mistral", "llava-v1"])
def test_a_checkpoint_with_odd_values_is_loaded_or_refused(tmp_path: Path, family: str) -> None:
    """Every value of its config in turn, and of the other files at random, replaced by one of another kind or size."""
    folder = save_tiny(tmp_path / "base", family)
    rng = np.random.default_rng(0)
    messages: list[str] = []
    for name in FILES:
        file = folder / name
        if not file.exists():
            continue
        good = file.read_text()
        places = [p for p in values_of(json.loads(good)) if p[0] not in {"model", "added_tokens"}] if name != "tokenizer.json" else []
        chosen = places if name == "config.json" else [places[i] for i in rng.permutation(len(places))[:8]]
        changes: list[str] = ["[]", "null", '"x"', "{}", "[" * 100_000, DIGITS, "", good[: len(good) // 2]]
        for place in chosen:
            for value in (ODD_VALUES[i] for i in rng.permutation(len(ODD_VALUES))[: 3 if name == "config.json" else 2]):
                changed = json.loads(good)
                inner = changed
                for key in place[:-1]:
                    inner = inner[key]
                inner[place[-1]] = value
                changes.append(json.dumps(changed))
        for text in changes:
            file.write_text(text)
            try:
                load_encoder(str(folder))
            except LclError as error:
                messages.append(str(error))
            except Exception as error:
                pytest.fail(f"{name} {text[:300]!r}: {error!r}")
        file.write_text(good)
    load_base(str(folder))
    assert len(messages) > 20
    assert max(map(len, messages)) < 1500


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vision_config": "x"}, "vision_config is 'x'; an object is expected"),
        ({"vision_config.patch_size": 0}, "patch_size is 0"),
        ({"text_config.num_hidden_layers": 10_000_000}, "num_hidden_layers is 10000000; a whole number from 1 to 1,000"),
        ({"vision_config.num_hidden_layers": 10_000_000}, "num_hidden_layers is 10000000"),
        ({"text_config.vocab_size": 10**12}, "vocab_size is"),
        ({"vision_feature_layer": 99}, "vision_feature_layer is 99"),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_one_is_made(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    folder = save_tiny(tmp_path / "base", "llava-1.5")
    config = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        inner = config
        *parents, last = key.split(".")
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    for arguments in (("inspect", folder), ("plan", "pocket", f"base={folder}")):
        assert reason in refused(*arguments)
    with pytest.raises(ModelError, match=re.escape(reason)):
        load_base(str(folder))


# A run that is resumed


class _Runs:
    """Unpickled, it would make a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def small_run(base: Path, output: Path, **train: Any) -> Recipe:
    options = {"max_steps": 2, "per_device_train_batch_size": 1, "save_steps": 1, "logging_steps": 1, **train}
    lcl = {"type": "pocket", "shots": [1], "queries": 1, "share": 1}
    return Recipe.model_validate({"base": str(base), "output": str(output), "adapter": {"rank": 2}, "sources": {"lcl": lcl}, "train": options})


@pytest.fixture(scope="module")
def stopped(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a checkpoint of the first, as if it had been stopped before its end."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    trainer.train(small_run(tiny_folder("pocket"), output))
    (output / "lcl_adapter.json").unlink()
    shutil.rmtree(output / "checkpoints" / "checkpoint-2")
    return output


def plain(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


SPOILT: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a pickle as the optimizer": ("optimizer.pt", lambda path: path.write_bytes(pickle.dumps(_Runs(path.parents[3] / "ran")))),
    "a pickle as the schedule": ("scheduler.pt", plain({"x": _Runs(Path("ran"))})),
    "a pickle as random states": ("rng_state.pth", plain({"python": _Runs(Path("ran"))})),
    "no optimizer's state": ("optimizer.pt", plain({"a": torch.zeros(2)})),
    "a list": ("optimizer.pt", plain([1, 2])),
    "an optimizer of other weights": ("optimizer.pt", lambda path: torch.save(_with_moments(torch.load(path)), path)),
    "text": ("scheduler.pt", lambda path: path.write_text("lr")),
    "a schedule of other kinds": ("scheduler.pt", plain({"base_lrs": "x", "get_lr": 1})),
    "an empty file": ("optimizer.pt", lambda path: path.write_bytes(b"")),
    "a state of another step": ("trainer_state.json", lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "global_step": "x"}))),
    "a state that is no object": ("trainer_state.json", lambda path: path.write_text("[" * 100_000)),
    "no progress": ("progress.json", lambda path: path.write_text('{"seconds": []}')),
    "weights that are text": ("adapter_model.safetensors", lambda path: path.write_text("weights")),
    "a pipe": ("optimizer.pt", lambda path: (path.unlink(), os.mkfifo(path))[0]),  # type: ignore[func-returns-value]
}


def _with_moments(state: dict[str, Any]) -> dict[str, Any]:
    for moments in state["state"].values():
        moments["exp_avg"] = torch.zeros(3)
    return state


@pytest.mark.parametrize("case", SPOILT)
def test_a_checkpoint_that_is_not_what_a_training_wrote_ends_with_a_message(
    stopped: Path, tmp_path: Path, pocket_tiny: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "run"
    shutil.copytree(stopped, output)
    text = (output / "recipe.yaml").read_text().replace(str(stopped), str(output))
    (output / "recipe.yaml").write_text(text)
    name, spoil = SPOILT[case]
    spoil(output / "checkpoints" / "checkpoint-1" / name)
    with pytest.raises(RunError) as caught:
        trainer.train(small_run(pocket_tiny, output), resume=True)
    assert "checkpoint-1" in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert not list(tmp_path.rglob("ran"))


def test_an_untouched_checkpoint_is_resumed(stopped: Path, tmp_path: Path, pocket_tiny: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    assert trainer.train(small_run(pocket_tiny, tmp_path / "run"), resume=True)["training_seconds"] > 0


# Two trainings into one folder

TRAINS = """
import sys
from pathlib import Path
from lcl_adapter.errors import RunError
from lcl_adapter.serve.store import Store
from lcl_adapter.training import trainer
from tests.test_attacks_files import small_run
try:
    trainer.train(small_run(Path({base!r}), Path({output!r}), max_steps=3))
except RunError as error:
    print("refused:", error)
else:
    print("saved")
"""


def test_of_two_trainings_into_one_folder_one_is_refused_by_name(tmp_path: Path, pocket_tiny: Path) -> None:
    """Started together, as two processes. On the same machine and in the same second, one of them has the folder."""
    code = TRAINS.format(base=str(pocket_tiny), output=str(tmp_path / "run"))
    both = [Forked(code) for _ in range(2)]
    ended = [process.wait() for process in both]
    assert [exit_code for exit_code, _, _ in ended] == [0, 0], ended
    printed = sorted(out.strip() for _, out, _ in ended)
    assert printed[1] == "saved"
    assert printed[0].startswith("refused:")
    holder = re.search(r"another command is writing it: process (\d+) on \S+, since \d{4}-\d\d-\d\d", printed[0])
    assert holder or "exists already" in printed[0]  # the later one began after the end of the earlier one
    if holder:
        assert int(holder[1]) in {process.pid for process in both}
    assert adapter.read_manifest(tmp_path / "run")
    assert not list(tmp_path.glob("*.lock"))


def test_a_run_that_is_written_is_not_evaluated_merged_or_trained(
    tmp_path: Path, stopped: Path, photos: Path, pocket_tiny: Path, tiny_folder: Callable[[str], Path]
) -> None:
    """The same for every folder that a command works for a while to fill."""
    run = tmp_path / "run"
    shutil.copytree(stopped, run)

    def elsewhere(*arguments: object) -> str:
        """In another thread: a thread may write more than once into what it has."""
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(refused, *arguments).result()

    with only_writer(run):
        assert f"process {os.getpid()} on" in elsewhere("eval", run)
        assert f"process {os.getpid()} on" in elsewhere("train", run / "recipe.yaml", f"output={run}", "resume=true")
    outs = {
        "llava-merged": ("convert", tiny_folder("llava-1.5")),
        "judged": ("ask", photos, photos / "good" / "0.png", "--base", pocket_tiny, "--out"),
    }
    for out, arguments in outs.items():
        with only_writer(tmp_path / out):
            assert f"process {os.getpid()} on" in elsewhere(*arguments, tmp_path / out)


# Sets by label


LABELS = (
    "label-1", "a/b", "a_b", "a\\b", "LABEL_2", "傷のある部品" * 30, "傷のある部品" * 29 + "も",
    "__MACOSX", "CON", "NUL", "com1", "con.txt", "aux .png", "..", ".", ".hidden", "~",
    "support-set.json", "neighbours.json", "boxes.jsonl", "good.", "a:b", 'a"b', "a|b?*<>",
    "é" * 200, "train", "test", "한국어", "👩‍🔧",
)  # fmt: skip


def png(number: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 90, 200 - number)).save(data, "PNG")
    return data.getvalue()


def examples_of(labels: Sequence[str]) -> list[tuple[str, bytes]]:
    return [(label, png(5 * number + k)) for number, label in enumerate(labels) for k in range(2)]


def test_folders_of_labels_are_names_on_every_system(tmp_path: Path) -> None:
    """Windows, a Mac and Linux; whatever the order of the labels."""
    for labels in (LABELS, tuple(reversed(LABELS)), ("Straße", "STRASSE", "Ａ", "a", "e\u0301", "\u00e9")):
        names = folders.folder_names(labels)
        assert list(names) == list(labels)
        assert len({unicodedata.normalize("NFKC", name).casefold() for name in names.values()}) == len(labels)
        for name in names.values():
            assert len(name.encode()) <= 100
            assert not re.search(r'[\x00-\x1f/\\:*?"<>|]', name)
            assert name == name.strip(" .")
            assert not name.startswith((".", "__MACOSX"))
            assert not re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)( *\..*)?", name.casefold())
    assert folders.folder_names(["a_b", "good"]) == {"a_b": "a_b", "good": "good"}


def test_labels_round_trip_through_export_import_and_the_pages_archive(tmp_path: Path) -> None:
    """And `ask`, `support add` and training read the exported folder under the same labels."""
    examples = examples_of(LABELS)
    folders.write(tmp_path / "out", "parts", 3, "Which?", examples)
    assert len([path for path in (tmp_path / "out").iterdir() if path.is_dir()]) == len(LABELS)
    assert list(folders.read(tmp_path / "out").examples) == examples
    archive = Path(shutil.make_archive(str(tmp_path / "out"), "zip", tmp_path / "out"))  # as the page does
    assert list(folders.read(unpack(archive, tmp_path / "in")).examples) == examples
    pool = read_class_folders(tmp_path / "out")
    assert {one.name for one in pool.classes} == set(LABELS)
    assert {one.name for one in read_class_folders(archive).classes} == set(LABELS)
    assert sorted(folders.read_photos(tmp_path / "out")) == sorted(examples)
    names = folders.folder_names(LABELS)
    by_label = {one.name: {p.path.parent.name for p in one.pictures} for one in pool.classes}
    assert by_label == {label: {names[label]} for label in LABELS}


def test_a_set_is_exported_and_imported_by_the_commands(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.put("local", "parts", examples_of(LABELS[:8]), "Which?")
    store.close()
    for arguments in (("export", "parts", tmp_path / "out"), ("import", tmp_path / "out", "--name", "again"), ("add", "photos", tmp_path / "out")):
        assert run("support", *arguments, "--store", tmp_path / "store").exit_code == 0
    store = Store(tmp_path / "store")
    sets = {name: [e.label for e in store.get("local", name).examples] for name in ("parts", "again", "photos")}
    store.close()
    assert sets["again"] == sets["parts"] == [label for label in LABELS[:8] for _ in range(2)]
    assert sorted(sets["photos"]) == sorted(sets["parts"])


def test_exports_of_earlier_versions_are_imported(tmp_path: Path) -> None:
    """One folder of two labels, as they wrote some; and a folder without an index."""
    old = tmp_path / "old"
    for number, (folder, name) in enumerate((("label-1", "0.png"), ("label-1", "1.png"), ("good", "2.png"))):
        (old / folder).mkdir(parents=True, exist_ok=True)
        (old / folder / name).write_bytes(png(number))
    listed = [("label-1", "label-1/0.png"), ("a/b", "label-1/1.png"), ("good", "good/2.png")]
    (old / "support-set.json").write_text(json.dumps({"name": "x", "examples": [{"label": label, "file": file} for label, file in listed]}))
    assert [label for label, _ in folders.read(old).examples] == ["label-1", "a/b", "good"]
    assert {one.name for one in read_class_folders(old).classes} == {"label-1", "good"}
    (old / "support-set.json").unlink()
    assert [label for label, _ in folders.read(old).examples] == ["good", "label-1", "label-1"]


@pytest.mark.parametrize("file", ["../secret.png", "/etc/passwd", "good/none.png", "good", "x\0y", LONG, 7, None, ["a"]])
def test_an_index_that_names_other_files_is_refused(tmp_path: Path, file: object) -> None:
    folders.write(tmp_path / "out", "parts", 1, None, examples_of(["good", "bad"]))
    (tmp_path / "secret.png").write_bytes(png(1))
    index = tmp_path / "out" / "support-set.json"
    fields = json.loads(index.read_text())
    fields["examples"][0]["file"] = file
    index.write_text(json.dumps(fields))
    assert "support-set.json" in refused("support", "import", tmp_path / "out", "--store", tmp_path / "store")


# What a terminal would obey


NASTY = "a\x1b]0;title\x07\x1b[2J\x9b31m\u202egnp.exe\u2066\u200f.png"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069]")


def test_names_and_labels_are_shown_and_not_obeyed(tmp_path: Path, pocket_tiny: Path) -> None:
    photos = tmp_path / "photos"
    for number, label in enumerate(("good", NASTY.replace("]0;title\x07", ""))):
        for k in range(2):
            paint(photos / label / f"{k} {NASTY}", (90, 80, 70), seed=2 * number + k)
    (photos / NASTY).write_text("loose")
    (tmp_path / NASTY).write_bytes(b"no picture")
    store = tmp_path / "store"
    opened = Store(store)
    opened.put("local", "old", [(NASTY, png(1)), ("b", png(2))], NASTY)  # of a version that allowed such labels
    opened.close()
    commands: list[tuple[object, ...]] = [
        ("ask", photos, tmp_path / NASTY, photos / "good", "--base", pocket_tiny),
        ("support", "list", "--store", store), ("support", "show", "old", "--store", store),
        ("support", "add", "x", photos, "--store", store), ("support", "import", photos, "--store", store),
        ("inspect", tmp_path / NASTY), ("train", tmp_path / NASTY), ("data", "check", tmp_path / NASTY),
    ]  # fmt: skip
    for command in commands:
        for more in ((), ("--json",)) if command[0] not in {"train", "data"} else ((),):
            result = run(*command, *more)
            assert not OBEYED.search(result.output), (command[:2], result.output)
            assert result.output
    shown = run("support", "show", "old", "--store", store, "--json").stdout
    assert json.loads(shown)["question"] == NASTY, "the same value, in escapes"


def test_a_terminal_with_colours_shows_them_too() -> None:
    for text, rendered in ((NASTY, terminal.shown(NASTY)), ("a\tb\n傷 é 👩‍🔧", None)):
        console = terminal._Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=200)
        console.print(text, style="red")
        table = Table("x")
        table.add_row(text)
        console.print(table)
        printed = console.file.getvalue()  # type: ignore[attr-defined]
        plain_text = re.sub(r"\x1b\[[\d;]*m", "", printed)
        assert plain_text != printed
        assert not OBEYED.search(plain_text), "nothing but colours of our own"
        assert rendered is None or plain_text.count(rendered) == 2, plain_text
    assert terminal.printable("傷 é 👩‍🔧.png") == "傷 é 👩‍🔧.png"


def test_a_log_shows_them_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logging.config.dictConfig(terminal.LOGGING)
    try:
        for name in ("lcl_adapter.serve", "uvicorn.error"):
            logging.getLogger(name).error("a label %s\nERROR: forged", NASTY)
            try:
                raise ValueError(NASTY)
            except ValueError:
                logging.getLogger(name).exception("unexpected")
    finally:
        for name in ("lcl_adapter", "uvicorn"):
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True
    printed = capsys.readouterr().err
    assert not OBEYED.search(printed)
    assert "\nERROR: forged" not in printed
    assert printed.count("a label") == 2


# The server's options


@pytest.mark.parametrize("name", ["", "a/b", ".", "..", "-a", "a b", "a?b", "a" * 65, "a\nb"])
def test_an_adapter_under_a_name_that_no_route_reaches_is_refused(tmp_path: Path, pocket_tiny: Path, name: str) -> None:
    message = refused("serve", pocket_tiny, "--adapter", f"{name}={tmp_path}", "--port", 0, "--store", tmp_path / "store")
    assert "is no name for a model" in message
    assert "two adapters are named 'a'" in refused("serve", pocket_tiny, "--adapter", f"a={tmp_path}", "--adapter", f"a={tmp_path}")


@pytest.mark.parametrize("seconds", ["nan", "inf", "-inf", "0", "x"])
def test_a_time_limit_is_a_number_of_seconds(pocket_tiny: Path, seconds: str) -> None:
    assert "--timeout" in refused("serve", pocket_tiny, "--timeout", seconds)


def test_every_test_that_the_promises_name_is_there() -> None:
    named = set(re.findall(r"\btest_[a-z0-9_]+\b(?!\.py)", (ROOT / "docs" / "security.md").read_text(encoding="utf-8")))
    there = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 10
    assert not [name for name in named if f"def {name}(" not in there]
