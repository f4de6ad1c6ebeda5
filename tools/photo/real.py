"""The real photos, for evaluation only: ``real.zip``, and ``real.csv`` with image, class and group.

Nothing is cut off or turned: the whole photo, at most 512 pixels, on white where it is transparent.
"""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

from PIL import Image
from rich.progress import track

from lcl_adapter.terminal import console
from tools.photo import drawing
from tools.photo.sources import Sources, real_classes

LONGEST = 512  # pixels
QUALITY = 92  # of the JPEG


def on_white(picture: Image.Image) -> Image.Image:
    """The picture without transparency, RGB, at most 512 pixels."""
    image = picture.convert("RGBA")
    page = Image.new("RGB", image.size, "white")
    page.paste(image, (0, 0), image)
    page.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return page


def photo_name(reference: str) -> str:
    """The name in the archive: the reference, with the kind as the first folder."""
    return str(Path(reference.replace(":", "/", 1).replace("/resource/", "/")).with_suffix(".jpg"))


def write(sources: Sources, archive_file: Path, table_file: Path) -> None:
    """Write the photos of ``real.yaml`` into an archive, and list them in a table."""
    with zipfile.ZipFile(archive_file, "w", zipfile.ZIP_STORED) as archive, table_file.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["image", "class", "group"])
        for one in track(real_classes(), "real.zip", console=console, transient=True, disable=not console.is_terminal):
            for reference in one.photos:
                name = photo_name(reference)
                drawing.add_photo(archive, name, on_white(sources.picture(reference)), QUALITY)
                rows.writerow([name, one.name, one.group])
