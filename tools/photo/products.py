"""Photos of products: ``products.zip``, and ``products.csv`` with image, class, group and split.

A product is one photo cut-out. Its photos differ in background, size, position, angle and light.

    train      stamps of training classes
    held_out   stamps of classes that are in no training set: those that the real photos hold, and those of validation
"""

from __future__ import annotations

import csv
import zipfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.progress import track

from lcl_adapter.pocket import products as pocket
from lcl_adapter.pocket.products import PHOTOS
from lcl_adapter.randomness import generator
from lcl_adapter.terminal import console
from tools.photo import drawing
from tools.photo.sources import Sources
from tools.photo.train import COLUMNS, all_stamp_classes, left_out, stamp_group

SCENES = 0.3  # share of the photos on a scene; the others are on a sheet or on a shelf


@dataclass(frozen=True)
class Product:
    """One cut-out. ``name``: of its class where that has no other, else of its file, "apple fuji"."""

    name: str
    group: str
    stamp: str
    split: str


def all_products() -> list[Product]:
    """Every stamp that is a photograph, once for each name."""
    without = left_out()
    products: dict[str, Product] = {}
    for one in all_stamp_classes():
        split = "held_out" if one.name in without or one.split != "train" else "train"
        for stamp in one.stamps:
            name = stamp.rpartition("/")[2].removesuffix(".png").replace("_", " ").replace("-", " ").lower() if one.stamps[1:] else one.name
            products.setdefault(name, Product(name, stamp_group(stamp), stamp, split))
    return sorted(products.values(), key=lambda product: product.name)


def products_of_split(split: str) -> list[Product]:
    """The products of "train" or "held_out"."""
    return [product for product in all_products() if product.split == split]


def page(rng: drawing.Rng, sources: Sources) -> Image.Image:
    """A shelf, a sheet or a scene."""
    choice = rng.random()
    if choice < SCENES:
        return drawing.scene(rng, sources.wallpapers)
    if choice < SCENES + 0.2:
        return drawing.plain(rng)
    return pocket.background(rng).resize((drawing.SIDE, drawing.SIDE), Image.Resampling.BICUBIC)


def write(sources: Sources, archive_file: Path, table_file: Path) -> None:
    """Draw the photos into an archive, and list them in a table."""
    with zipfile.ZipFile(archive_file, "w", zipfile.ZIP_STORED) as archive, table_file.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for product in track(all_products(), "products.zip", console=console, transient=True, disable=not console.is_terminal):
            cut = sources.cut_out(product.stamp)
            for number in range(PHOTOS):
                rng = generator("view", "photo products", product.stamp, number)
                name = f"{product.stamp.partition(':')[2].removesuffix('.png')}/{number}.jpg"
                drawing.add_photo(archive, name, drawing.composite(rng, cut, page(rng, sources), 25, (0.6, 0.95)))
                rows.writerow([name, product.name, product.group, product.split])
