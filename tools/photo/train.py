"""The classes to train on: photo cut-outs and emoji on backgrounds, and nothing that the real photos hold.

    train.csv   image, class, group, split     split: train, or validation for choosing steps and temperatures

A class is held out for validation by the word that says what it is (:func:`tools.photo.words.head`), so that a stamp of a
zebra and the emoji zebra are in one split.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.progress import track

from lcl_adapter.data.sources.held_out import is_held_out
from lcl_adapter.pocket import DATA, products
from lcl_adapter.randomness import generator
from lcl_adapter.terminal import console
from tools.photo import drawing, words
from tools.photo.sources import RealClass, Sources, real_classes, stamp_classes

VALIDATION = 0.12  # share of the classes
COMPOSITES = 6  # photos of each stamp
ARTISTS = 4  # drawings of each emoji, one photo each
COLUMNS = ("image", "class", "group", "split")


@dataclass(frozen=True)
class TrainingClass:
    """One class. ``stamps``: references; ``emoji``: its code points and the artists who drew it."""

    name: str
    group: str
    stamps: tuple[str, ...] = ()
    emoji: str = ""
    artists: tuple[str, ...] = ()

    @property
    def split(self) -> str:
        return "validation" if is_held_out(words.head(self.name), VALIDATION) else "train"


def stamp_group(reference: str) -> str:
    """The folder that a stamp is in, as its kind: ``animals/birds``."""
    return reference.partition(":")[2].rpartition("/")[0].removesuffix("/toys")


def all_stamp_classes() -> list[TrainingClass]:
    return [TrainingClass(name, stamp_group(stamps[0]), tuple(stamps)) for name, stamps in stamp_classes().items()]


def emoji_classes() -> list[TrainingClass]:
    """The shipped emoji of split train that draw a thing, an animal or a person.

    Left out are symbols and smileys, which no tower trained on photos tells apart, and those that differ in one detail.
    """
    records = json.loads((DATA / "classes.json").read_text(encoding="utf-8"))
    return [
        TrainingClass(r["name"], f"emoji/{r['kind']}/{r['subcategory']}", (), r["id"], tuple(r["drawings"]))
        for r in records
        if r["split"] == "train" and not r["lookalike"] and r["kind"] not in {"symbol", "feeling"}
    ]


def left_out(real: list[RealClass] | None = None) -> dict[str, str]:
    """Name of a stamp or an emoji -> the evaluated class that it has a word in common with."""
    evaluated = {c.name: c.others for c in real or real_classes()}
    return words.excluded([c.name for c in (*all_stamp_classes(), *emoji_classes())], evaluated)


def training_classes(real: list[RealClass] | None = None) -> list[TrainingClass]:
    """The classes of ``train.csv``. An emoji of a stamp's name is "drawn NAME"."""
    without = left_out(real)
    stamps = [c for c in all_stamp_classes() if c.name not in without]
    names = {c.name for c in stamps}
    emoji = [
        TrainingClass(f"drawn {c.name}" if c.name in names else c.name, c.group, (), c.emoji, c.artists)
        for c in emoji_classes()
        if c.name not in without
    ]
    return [*stamps, *emoji]


def photos_of(one: TrainingClass, sources: Sources, drawings: zipfile.ZipFile) -> Iterator[tuple[str, Image.Image]]:
    """Name and picture of each photo of a class."""
    for stamp in one.stamps:
        cut = sources.cut_out(stamp)
        stem = stamp.partition(":")[2].removesuffix(".png")
        for number in range(COMPOSITES):
            rng = generator("view", "photo train", stamp, number)
            yield f"stamps/{stem}/{number}.jpg", drawing.composite(rng, cut, drawing.background(rng, sources.wallpapers))
    artists = generator("view", "photo train", one.emoji).permutation(len(one.artists))[:ARTISTS]
    for index in sorted(int(i) for i in artists):
        artist = one.artists[index]
        rng = generator("view", "photo train", one.emoji, artist)
        small = Image.open(io.BytesIO(drawings.read(f"{one.emoji}/{artist}.webp"))).convert("RGB")
        cut = drawing.cropped(products.cut_out(small).resize((256, 256), Image.Resampling.BICUBIC))
        yield f"emoji/{one.emoji}/{artist}.jpg", drawing.composite(rng, cut, drawing.background(rng, sources.wallpapers), mirror=False)


def write(sources: Sources, archive_file: Path, table_file: Path) -> None:
    """Draw the photos into an archive, and list them in a table."""
    with (
        zipfile.ZipFile(DATA / "drawings.zip") as drawings,
        zipfile.ZipFile(archive_file, "w", zipfile.ZIP_STORED) as archive,
        table_file.open("w", newline="", encoding="utf-8") as file,
    ):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for one in track(training_classes(), "train.zip", console=console, transient=True, disable=not console.is_terminal):
            for name, photo in photos_of(one, sources, drawings):
                drawing.add_photo(archive, name, photo)
                rows.writerow([name, one.name, one.group, one.split])


def write_left_out(_: Sources, file: Path) -> None:
    """List the classes that are not trained on, and why."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        rows = csv.writer(opened, lineterminator="\n")
        rows.writerow(["class", "evaluated class with the same word"])
        rows.writerows(sorted(left_out().items()))
