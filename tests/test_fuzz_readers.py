"""Readers on spoilt files: 2,000 lists and archives, and 2,000 pictures of all formats, cut, overwritten, doubled, or in another
encoding. Each is read, or refused with an error of this package.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lcl_adapter.data.sources import Picture, images, read_class_folders, read_image, read_llava_json
from lcl_adapter.data.sources.base import pictures_of
from lcl_adapter.data.sources.manifest import read_manifest
from lcl_adapter.data.sources.mvtec import read_mvtec
from lcl_adapter.errors import LclError
from lcl_adapter.serve.pictures.images import Bounds, decode
from tests.conftest import paint

CASES = 2000
LABELS = ("ネジ", "café", "nut", "M3 x 10")
NASTY = (
    b"\0",
    b"\xff\xfe",
    b'"',
    b"\\",
    b"../",
    b"{",
    b"[",
    b"]",
    b"NaN",
    b"null",
    b"1e999",
    b"\r",
    b"\n\n",
    b",,,",
    b"[" * 500,
    b"\xed\xa0\x80",
    b"-1",
)


def make(root: Path) -> dict[str, Path]:
    for number, label in enumerate(LABELS):
        for k in range(2):
            paint(root / "photos" / label / f"{k}.png", (90, 90, 90), seed=2 * number + k)
    images = [f"{label}/{k}.png" for label in LABELS for k in range(2)]
    files = {
        "list.csv": "photo,label,box\n" + "".join(f"{image},{image.split('/')[0]},1 1 9 9\n" for image in images),
        "list.jsonl": "".join(json.dumps({"photo": image, "label": image.split("/")[0]}, ensure_ascii=False) + "\n" for image in images),
        "coco.json": json.dumps(
            {
                "images": [{"id": n, "file_name": image, "width": 48, "height": 40} for n, image in enumerate(images)],
                "categories": [{"id": n, "name": label} for n, label in enumerate(LABELS)],
                "annotations": [{"image_id": n, "category_id": n // 2, "bbox": [1, 1, 9, 9]} for n in range(len(images))],
            },
            ensure_ascii=False,
        ),
        "llava.json": json.dumps(
            [{"image": i, "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]} for i in images]
        ),
        "messages.jsonl": "".join(
            json.dumps({"images": [i], "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}]}) + "\n"
            for i in images
        ),
        "boxes.jsonl": "".join(json.dumps({"image": image, "bbox": [1, 1, 9, 9]}) + "\n" for image in images),
        "neighbours.json": json.dumps({"round": list(LABELS[:2]), "ranked": {"nut": ["café"]}}),
    }
    for name, text in files.items():
        (root / name).write_text(text, encoding="utf-8")
    with zipfile.ZipFile(root / "photos.zip", "w") as archive:
        for image in images:
            archive.write(root / "photos" / image, image)
    with zipfile.ZipFile(root / "parts.zip", "w") as archive:
        for number, name in enumerate(("part/train/good/0.png", "part/test/good/0.png", "part/test/hole/0.png", "part/ground_truth/hole/0_mask.png")):
            archive.write(root / "photos" / images[number], name)
    return {name: root / name for name in (*files, "photos.zip", "parts.zip")}


def spoilt(raw: bytes, rng: random.Random) -> bytes:
    """The file after one to three accidents."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(7):
            case 0:
                raw = raw[:at]
            case 1:
                raw = raw[:at] + rng.choice(NASTY) + raw[at:]
            case 2:
                raw = raw[:at] + rng.randbytes(rng.randint(1, 8)) + raw[at + rng.randint(0, 8) :]
            case 3:
                raw = raw[at:]
            case 4:
                raw = raw[:at] + raw[max(0, at - rng.randint(1, 60)) :]
            case 5:
                raw = raw.decode("utf-8", "ignore").encode(rng.choice(["cp932", "utf-16", "utf-16-be", "latin-1", "euc_jp", "utf-8-sig"]), "ignore")
            case 6:
                raw = rng.randbytes(at % 200)
    return raw


def readers(file: Path, photos: Path) -> list[Callable[[], Any]]:
    mapped = {"image": ["photo"], "class": ["label"]}
    of_coco = {"image": ["image"], "class": ["class"], "box": ["box"]}
    match file.name:
        case "coco.json":
            return [lambda: read_manifest(file, photos, of_coco, on_fault="skip", crop=True)]
        case "llava.json" | "messages.jsonl":
            return [lambda: read_llava_json(file, photos, on_fault="skip")]
        case "boxes.jsonl" | "neighbours.json":
            return [lambda: read_class_folders(photos, on_fault="skip")]
        case "photos.zip":
            return [
                lambda: read_class_folders(file, on_fault="skip"),
                lambda: read_manifest(photos.parent / "list.csv", file, mapped, on_fault="skip"),
            ]
        case "parts.zip":
            return [lambda: read_mvtec(file, on_fault="skip")]
        case _:
            columns = {**mapped, "box": ["box"]} if file.name == "list.csv" else mapped
            return [lambda: read_manifest(file, photos, columns, on_fault="skip")]


KINDS = ("list.csv", "list.jsonl", "coco.json", "llava.json", "messages.jsonl", "boxes.jsonl", "neighbours.json", "photos.zip", "parts.zip")


@pytest.mark.parametrize("kind", KINDS)
def test_spoilt_files_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    good = make(tmp_path)[kind]
    raw = good.read_bytes()
    refused = 0
    for case in range(-(-CASES // len(KINDS))):
        rng = random.Random(f"{kind} {case}")
        file = (tmp_path / "photos" if kind in {"boxes.jsonl", "neighbours.json"} else tmp_path / f"case {case}") / good.name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(spoilt(raw, rng))
        for read in readers(file, tmp_path / "photos"):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # zipfile's, of a name that is there twice
                    pool = read()
                    for picture in list(pictures_of(pool))[:3]:
                        read_image(picture)
            except LclError:
                refused += 1
            except Exception as error:
                pytest.fail(f"{kind}, case {case}: {error!r}")
        if file.parent != tmp_path / "photos":
            shutil.rmtree(file.parent)
    assert refused, "accidents that harm nothing test nothing"


# Pictures


MODES = {"GIF": "P", "PPM": "L"}  # of the pictures in these formats; others are in RGB, and the deep ones in 16 bits
DEEP = ("PNG", "TIFF", "PPM", "JPEG2000")
OPTIONS: dict[str, dict[str, Any]] = {"JPEG": {"progressive": True, "comment": b"a comment"}, "TIFF": {"compression": "tiff_lzw"}}


def pictures_of_every_format() -> dict[str, bytes]:
    """Files by format and kind: plain ones, deep ones, and those with several frames."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 255, (24, 20, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65535, (24, 20), dtype=np.uint16))
    files = {}
    for name in images.FORMATS:
        for kind, image, options in (
            ("plain", colour.convert(MODES.get(name, "RGB")), {}),
            ("other", colour.convert(MODES.get(name, "RGB")), OPTIONS.get(name, {})),
            ("deep", deep if name in DEEP else None, {}),
            ("frames", colour if name in {"GIF", "WEBP", "PNG", "TIFF"} else None, {"save_all": True, "append_images": [colour] * 2}),
        ):
            if image is not None:
                buffer = io.BytesIO()
                image.save(buffer, name, **options)
                files[f"{name} {kind}"] = buffer.getvalue()
    return files


def spoilt_picture(raw: bytes, rng: random.Random) -> bytes:
    """The file after one to four accidents, most of them in its first bytes, where its header and its sizes are."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(raw), 100) if rng.random() < 0.7 else len(raw)) if raw else 0
        match rng.randrange(5):
            case 0:
                raw = raw[:at] + bytes([rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])]) + raw[at + 1 :]
            case 1:
                raw = raw[:at] + rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", rng.randbytes(4)]) + raw[at + 4 :]
            case 2:
                raw = raw[: at + rng.randrange(len(raw) + 1)]
            case 3:
                raw = raw[:at] + raw[max(0, at - rng.randint(1, 60)) :]
            case 4:
                raw = raw[:at] + rng.randbytes(rng.randint(1, 40)) + raw[at:]
    return raw


def test_pictures_of_every_format_are_fuzzed() -> None:
    """All that are read, and as they are written."""
    files = pictures_of_every_format()
    assert {name.partition(" ")[0] for name in files} == set(images.FORMATS)
    for name, raw in files.items():
        assert images.read(Picture(Path(name), data=raw)).size == (20, 24)
        decode(raw, Bounds())


@pytest.mark.parametrize("kind", pictures_of_every_format())
@pytest.mark.filterwarnings("ignore")  # Pillow's, of broken metadata
def test_spoilt_pictures_are_read_or_refused(kind: str) -> None:
    """As training and the commands read them, and as the server's processes decode them."""
    files = pictures_of_every_format()
    raw, read, refused = files[kind], 0, 0
    for case in range(-(-CASES // len(files))):
        data = spoilt_picture(raw, random.Random(f"{kind} {case}"))
        for reader in (lambda data: images.read(Picture(Path("photo"), data=data), 28), lambda data: decode(data, Bounds())):
            try:
                reader(data)
                read += 1
            except LclError:
                refused += 1
            except Exception as error:
                pytest.fail(f"{kind}, case {case}: {error!r}")
    assert refused, "accidents that harm nothing test nothing"
