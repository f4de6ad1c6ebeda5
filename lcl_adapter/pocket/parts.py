"""Draw ``pocket:inspection-train.zip`` and ``pocket:inspection-held-out.zip``: parts to inspect, in MVTec's layout.

A category is a part: one drawing of one shipped emoji. Photos of it vary a little in rotation, position, size, light
and noise. A defect is drawn onto the part before it is photographed. There are five kinds, which change 3 to 30 % of
the part (a wrong colour up to 70 %):

    scratch         a line across it            missing piece   a bite out of it
    stain           a dark blotch               wrong colour    another hue on a side of it
    misprint        a band of it, displaced

A category is in the split of its class: ``train`` classes are trained on, ``held_out`` classes never are.

The order of the random draws is part of the data: another order draws other data sets.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from rich.progress import track
from scipy import ndimage

from lcl_adapter.terminal import console

SIZE = 64
DEFECTS = ("scratch", "missing piece", "stain", "wrong colour", "misprint")
TRAIN, HELD_OUT = 240, 60  # categories of each split
REFERENCES, GOOD, EACH = 6, 6, 2  # photos per category: train/good, test/good, test/<defect>
NEARLY_WHITE = 24  # the largest distance from white, summed over a pixel's three channels, of the background
Rng = np.random.Generator


def part_mask(drawing: Image.Image) -> np.ndarray:
    """True for pixels of the part, bool [64, 64]. The background is the white area that is connected to the border."""
    framed = np.pad(np.asarray(drawing.convert("RGB")).astype(int), ((1, 1), (1, 1), (0, 0)), constant_values=255)
    areas, _ = ndimage.label((255 - framed).sum(-1) <= NEARLY_WHITE)
    return np.asarray(areas != areas[0, 0])[1:-1, 1:-1]


def blob(rng: Rng, inside: np.ndarray, radius: float, roughness: float = 0.3) -> np.ndarray:
    """A mask of a rough disc at a random place on the part, bool [H, W]. ``inside``: the part's mask, of the same shape."""
    row, column = np.argwhere(inside)[rng.integers(int(inside.sum()))]
    angles = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    radii = radius * (1 + roughness * rng.uniform(-1, 1, 14))
    canvas = Image.new("L", inside.shape[::-1])
    ImageDraw.Draw(canvas).polygon([(column + r * np.cos(a), row + r * np.sin(a)) for a, r in zip(angles, radii, strict=True)], fill=255)
    return np.asarray(canvas) > 0


# A defect gets the pixels [64, 64, 3] in 0..255 and the part's mask, and returns changed pixels.


def scratch(rng: Rng, pixels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """A line across the part, dark on a light part and light on a dark one."""
    canvas = Image.new("L", (SIZE, SIZE))
    row, column = np.argwhere(inside)[rng.integers(int(inside.sum()))]
    angle, length = rng.uniform(0, np.pi), rng.uniform(22, 40)
    points = [
        (column + t * length * np.cos(angle) + rng.uniform(-3, 3), row + t * length * np.sin(angle) + rng.uniform(-3, 3)) for t in (-0.5, 0, 0.5)
    ]
    ImageDraw.Draw(canvas).line(points, fill=255, width=int(rng.integers(3, 6)), joint="curve")
    line = (np.asarray(canvas) > 0) & inside
    dark = pixels[line].mean() > 110 if line.any() else True
    changed = pixels.copy()
    changed[line] = rng.uniform(20, 60) if dark else rng.uniform(220, 250)
    return changed


def missing_piece(rng: Rng, pixels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """A white hole in the part."""
    changed = pixels.copy()
    changed[blob(rng, inside, rng.uniform(9, 14))] = 255
    return changed


def stain(rng: Rng, pixels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """A dark blotch with soft edges."""
    cover = np.zeros((SIZE, SIZE))
    for _ in range(int(rng.integers(2, 5))):
        cover = np.maximum(cover, blob(rng, inside, rng.uniform(5, 9)))
    soft = np.asarray(Image.fromarray((cover * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.2))) / 255 * inside
    tint = np.array([[62, 44, 20], [25, 25, 30], [70, 20, 60]][int(rng.integers(3))])
    return pixels + (tint - pixels) * 0.85 * soft[..., None]


def wrong_colour(rng: Rng, pixels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Other hues on one side of the part. Grey pixels, which have no hue, are tinted."""
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    along = columns * np.cos(angle) + rows * np.sin(angle)
    side = inside & (along > np.quantile(along[inside], rng.uniform(0.35, 0.65)))
    changed = pixels.copy()
    order = [(1, 2, 0), (2, 0, 1)][int(rng.integers(2))]
    grey = pixels.max(-1) - pixels.min(-1) < 40
    tint = np.array([[1.0, 0.45, 0.45], [0.45, 1.0, 0.5], [0.5, 0.55, 1.0]][int(rng.integers(3))])
    recoloured = np.where(grey[..., None], np.clip(pixels, 90, 255) * tint, pixels[..., list(order)])
    changed[side] = recoloured[side]
    return changed


def misprint(rng: Rng, pixels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """A horizontal band of the part, shifted to one side."""
    rows = np.flatnonzero(inside.any(1))
    height = max(10, int(len(rows) * rng.uniform(0.25, 0.45)))
    top = int(rng.integers(rows[0], max(rows[0] + 1, rows[-1] - height + 2)))
    shift = int(rng.integers(7, 13)) * (1 if rng.random() < 0.5 else -1)
    changed = pixels.copy()
    changed[top : top + height] = np.roll(pixels[top : top + height], shift, axis=1)
    return changed if rng.random() < 0.5 else np.where(inside[..., None], changed, pixels)


DRAW_DEFECT: dict[str, Callable[[Rng, np.ndarray, np.ndarray], np.ndarray]] = {
    "scratch": scratch,
    "missing piece": missing_piece,
    "stain": stain,
    "wrong colour": wrong_colour,
    "misprint": misprint,
}


def damaged(rng: Rng, drawing: Image.Image, kind: str) -> tuple[Image.Image, Image.Image] | None:
    """The drawing with a defect, and the mask of the changed pixels. None if 100 tries give no visible defect."""
    pixels, inside = np.asarray(drawing.convert("RGB"), dtype=float), part_mask(drawing)
    for _ in range(100):
        changed = DRAW_DEFECT[kind](rng, pixels, inside)
        mask = np.abs(changed - pixels).max(-1) > 40
        if 0.03 <= mask.sum() / max(1, inside.sum()) <= (0.3 if kind != "wrong colour" else 0.7):
            return Image.fromarray(changed.clip(0, 255).astype(np.uint8)), Image.fromarray((mask * 255).astype(np.uint8))
    return None


def photo(rng: Rng, drawing: Image.Image, mask: Image.Image | None = None) -> tuple[Image.Image, Image.Image | None]:
    """A photo of the part, rotated by up to 4 degrees and shifted by a few pixels, with varied light and noise.

    The mask, if given, is moved in the same way.
    """
    turn, scale = rng.uniform(-4, 4), rng.uniform(0.92, 1.0)
    side = round(SIZE * scale)
    left, top = (int(v) for v in rng.integers(0, SIZE - side + 1, 2))

    def placed(image: Image.Image, fill: int | tuple[int, int, int], resample: Image.Resampling) -> Image.Image:
        turned = image.rotate(turn, resample, fillcolor=fill).resize((side, side), resample)
        page = Image.new(image.mode, (SIZE, SIZE), fill)
        page.paste(turned, (left, top))
        return page

    page = np.asarray(placed(drawing.convert("RGB"), (255, 255, 255), Image.Resampling.BICUBIC), dtype=float)
    lit = page * rng.uniform(0.93, 1.0) * rng.uniform(0.98, 1.0, 3) + rng.normal(0, 3, page.shape)
    image = Image.fromarray(lit.clip(0, 255).astype(np.uint8))
    return image, placed(mask, 0, Image.Resampling.NEAREST) if mask else None


def write(data: Path, out: Mapping[str, Path], seed: int = 0) -> None:
    """Draw the categories from the classes in ``data`` into one archive per split:
    ``<category>/{train,test,ground_truth}/…``.

    out: split -> the archive to write.
    """
    records = json.loads((data / "classes.json").read_text(encoding="utf-8"))
    order = np.random.default_rng([seed, 0]).permutation(len(records))
    for split, count in (("train", TRAIN), ("held_out", HELD_OUT)):
        with zipfile.ZipFile(data / "drawings.zip") as drawings, zipfile.ZipFile(out[split], "w", zipfile.ZIP_STORED) as archive:
            left = count
            for index in track(order, "drawing parts", console=console, transient=True, disable=not console.is_terminal):
                record = records[index]
                if record["split"] != split or not left:
                    continue
                rng = np.random.default_rng([seed, 1, int(index)])
                artist = str(rng.choice(record["drawings"]))
                photos = _category(rng, Image.open(io.BytesIO(drawings.read(f"{record['id']}/{artist}.webp")), formats=["WEBP"]).convert("RGB"))
                if photos is None:
                    continue
                left -= 1
                for name, image in photos.items():
                    add(archive, f"{record['name']}/{name}", image)


def add(archive: zipfile.ZipFile, name: str, image: Image.Image) -> None:
    """Add a picture as PNG. The file date is fixed, so that the same pictures give the same archive."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    archive.writestr(zipfile.ZipInfo(name), buffer.getvalue())


def _category(rng: Rng, drawing: Image.Image) -> dict[str, Image.Image] | None:
    """All files of one category, by name. None if the part is too small for visible defects."""
    if part_mask(drawing).sum() < 900:
        return None
    files: dict[str, Image.Image] = {}
    for folder, count in (("train/good", REFERENCES), ("test/good", GOOD)):
        for number in range(count):
            files[f"{folder}/{number:03}.png"], _ = photo(rng, drawing)
    for kind in DEFECTS:
        for number in range(EACH):
            defect = damaged(rng, drawing, kind)
            if defect is None:
                return None
            image, mask = photo(rng, *defect)
            assert mask is not None
            files[f"test/{kind}/{number:03}.png"] = image
            files[f"ground_truth/{kind}/{number:03}_mask.png"] = mask
    return files
