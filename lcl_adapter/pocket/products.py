"""Draw ``pocket:products.zip`` and ``pocket:products.csv``: photos of products, drawn from the shipped emoji.

A product is one drawing of one emoji. Its photos differ in background (tinted, shaded or striped), size, position,
rotation and light, like photos from a catalogue and from a shelf. The table has one row per photo: image, product,
group (of similar products), split.

The order of the random draws is part of the data: another order draws another data set.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance
from rich.progress import track

from lcl_adapter.pocket.parts import SIZE, add, part_mask
from lcl_adapter.terminal import console

TRAIN, HELD_OUT = 500, 150  # products of each split
PHOTOS = 6  # of each product
Rng = np.random.Generator


def background(rng: Rng) -> Image.Image:
    """A page, a shelf or a cloth: a light tint with a gradient, and sometimes stripes."""
    rows, columns = np.mgrid[:SIZE, :SIZE] / SIZE
    tint = rng.uniform(190, 250) + rng.uniform(-18, 18, 3)
    angle = rng.uniform(0, 2 * np.pi)
    along = columns * np.cos(angle) + rows * np.sin(angle)
    light = rng.uniform(0, 22) * along
    if rng.random() < 0.4:
        light = light + rng.uniform(5, 14) * (np.sin(along * rng.uniform(15, 50)) > 0)
    return Image.fromarray((tint - light[..., None]).clip(0, 255).astype(np.uint8))


def cut_out(drawing: Image.Image) -> Image.Image:
    """The product without its background, RGBA."""
    cut = drawing.convert("RGB")
    cut.putalpha(Image.fromarray((part_mask(drawing) * 255).astype(np.uint8)))
    return cut


def photo(rng: Rng, cut: Image.Image) -> Image.Image:
    """A photo of the product on another background."""
    side = round(SIZE * rng.uniform(0.68, 0.98))
    turned = cut.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.BICUBIC)
    page = background(rng)
    left, top = (int(v) for v in rng.integers(0, SIZE - side + 1, 2))
    page.paste(turned, (left, top), turned)
    for adjustment, low, high in ((ImageEnhance.Brightness, 0.85, 1.08), (ImageEnhance.Contrast, 0.85, 1.12), (ImageEnhance.Color, 0.75, 1.2)):
        page = adjustment(page).enhance(rng.uniform(low, high))
    return page


def write(data: Path, pictures: Path, table: Path, seed: int = 0) -> None:
    """Draw the products from the classes in ``data`` into the archive ``pictures``, and list them in ``table``.

    A product is in the split of its class.
    """
    records = json.loads((data / "classes.json").read_text(encoding="utf-8"))
    left = {"train": TRAIN, "held_out": HELD_OUT}
    order = np.random.default_rng([seed, 2]).permutation(len(records))
    with (
        zipfile.ZipFile(data / "drawings.zip") as drawings,
        zipfile.ZipFile(pictures, "w", zipfile.ZIP_STORED) as archive,
        table.open("w", newline="", encoding="utf-8") as file,
    ):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["image", "product", "group", "split"])
        for index in track(order, "drawing products", console=console, transient=True, disable=not console.is_terminal):
            record = records[index]
            if record["lookalike"] or not left.get(record["split"]):
                continue
            left[record["split"]] -= 1
            rng = np.random.default_rng([seed, 3, int(index)])
            artist = str(rng.choice(record["drawings"]))
            cut = cut_out(Image.open(io.BytesIO(drawings.read(f"{record['id']}/{artist}.webp")), formats=["WEBP"]))
            for number in range(PHOTOS):
                name = f"{record['id']}/{number}.png"
                add(archive, name, photo(rng, cut))
                rows.writerow([name, record["name"], f"{record['kind']}/{record['subcategory']}", record["split"]])
