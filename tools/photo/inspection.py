"""Parts to inspect, in MVTec's layout: ``inspection-train.zip`` and ``inspection-held-out.zip``.

A category is one photo cut-out on one background, photographed again and again: a few degrees, a few pixels, a little light.
A defect is drawn on the thing before it is photographed:

    scratch  a thin line            hole            a piece out of its middle      missing corner  an end of it
    crack    a branching line       stain           a dark blotch
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from rich.progress import track

from lcl_adapter.pocket.parts import EACH, GOOD, REFERENCES, add, blob
from lcl_adapter.randomness import generator
from lcl_adapter.terminal import console
from tools.photo import drawing
from tools.photo.products import Product, products_of_split
from tools.photo.sources import Sources

LONGEST = 180  # pixels of a part in its photo of 224
SMALLEST = 6000  # pixels of a part: on less, a defect is not visible
CHANGED = (0.015, 0.3)  # share of the part that a defect changes
VISIBLE = 45  # difference in a channel, of 255
TRIES = 50
QUALITY = 92  # of the JPEG: JPEG's own blocks must not look like defects
Rng = np.random.Generator
Point = tuple[float, float]
Defect = Callable[[Rng, np.ndarray, np.ndarray], np.ndarray]

# A defect gets the pixels of a cut-out, float [H, W, 4] in 0..255, and where it is opaque, bool [H, W].
# It returns changed pixels.


def _point(rng: Rng, inside: np.ndarray) -> Point:
    """A place on the part: column, row."""
    row, column = np.argwhere(inside)[rng.integers(int(inside.sum()))]
    return float(column), float(row)


def _extent(inside: np.ndarray) -> float:
    """The side of a square as large as the part, in pixels."""
    return float(np.sqrt(inside.sum()))


def _line(rng: Rng, start: Point, length: float, bends: int, roughness: float) -> list[Point]:
    """The corners of a line from ``start``: ``bends`` pieces, each turned by up to ``roughness`` radians."""
    angle = rng.uniform(0, 2 * np.pi)
    corners = [start]
    for _ in range(bends):
        angle += rng.uniform(-roughness, roughness)
        x, y = corners[-1]
        corners.append((x + length / bends * np.cos(angle), y + length / bends * np.sin(angle)))
    return corners


def _drawn(inside: np.ndarray, lines: list[list[Point]], width: int) -> np.ndarray:
    """Where the lines are on the part, soft, float [H, W] in 0..1."""
    canvas = Image.new("L", inside.shape[::-1])
    for line in lines:
        ImageDraw.Draw(canvas).line(line, fill=255, width=width, joint="curve")
    return np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.5)), dtype=float) / 255 * inside


def _painted(pixels: np.ndarray, cover: np.ndarray, colour: np.ndarray | float) -> np.ndarray:
    changed = pixels.copy()
    changed[..., :3] += (colour - changed[..., :3]) * cover[..., None]
    return changed


def scratch(rng: Rng, pixels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """One to three nearly straight lines, dark on a light part and light on a dark one."""
    extent = _extent(inside)
    lines = [_line(rng, _point(rng, inside), extent * rng.uniform(0.5, 0.9), 3, 0.15) for _ in range(int(rng.integers(1, 4)))]
    cover = _drawn(inside, lines, int(rng.integers(2, 5)))
    light = pixels[..., :3][inside].mean() < 120
    return _painted(pixels, 0.9 * cover, rng.uniform(215, 250) if light else rng.uniform(25, 70))


def crack(rng: Rng, pixels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """A jagged line with a branch or two, dark on a light part and light on a dark one."""
    extent = _extent(inside)
    trunk = _line(rng, _point(rng, inside), extent * rng.uniform(0.8, 1.3), int(rng.integers(6, 11)), 0.8)
    lines = [trunk]
    for _ in range(int(rng.integers(1, 3))):
        lines.append(_line(rng, trunk[int(rng.integers(1, len(trunk) - 1))], extent * rng.uniform(0.25, 0.5), 4, 0.9))
    light = pixels[..., :3][inside].mean() < 75
    return _painted(pixels, 0.92 * _drawn(inside, lines, int(rng.integers(2, 4))), rng.uniform(160, 210) if light else rng.uniform(5, 35))


def stain(rng: Rng, pixels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """A dark blotch with soft edges."""
    extent = _extent(inside)
    cover = np.zeros(inside.shape)
    for _ in range(int(rng.integers(2, 5))):
        cover = np.maximum(cover, blob(rng, inside, extent * rng.uniform(0.06, 0.12)))
    soft = np.asarray(Image.fromarray((cover * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(3)), dtype=float) / 255
    tint = np.array([[62, 44, 20], [25, 25, 30], [70, 20, 60], [120, 90, 20]][int(rng.integers(4))], dtype=float)
    return _painted(pixels, 0.85 * soft * inside, tint)


def hole(rng: Rng, pixels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """A piece out of the part, with a dark rim. The background shows through."""
    gone = blob(rng, inside, _extent(inside) * rng.uniform(0.09, 0.17)) & inside
    rim = np.asarray(Image.fromarray((gone * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(5))) > 0
    changed = _painted(pixels, 0.6 * (rim & inside), 25.0)
    changed[..., 3][gone] = 0
    return changed


def missing_corner(rng: Rng, pixels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """An end of the part is broken off, along a jagged line."""
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[: inside.shape[0], : inside.shape[1]]
    along = columns * np.cos(angle) + rows * np.sin(angle)
    across = rows * np.cos(angle) - columns * np.sin(angle)
    knots = np.linspace(across.min(), across.max(), 12)
    edge = np.interp(across, knots, rng.uniform(-1, 1, 12)) * _extent(inside) * 0.05
    changed = pixels.copy()
    changed[..., 3][along + edge > np.quantile(along[inside], 1 - rng.uniform(0.07, 0.18))] = 0
    return changed


DEFECTS: dict[str, Defect] = {"scratch": scratch, "crack": crack, "stain": stain, "hole": hole, "missing corner": missing_corner}


def damaged(rng: Rng, part: Image.Image, page: Image.Image, kind: str) -> tuple[Image.Image, Image.Image] | None:
    """The part with a defect, RGBA, and the mask of the changed pixels. None if no try gives a visible defect.

    page: what shows through a hole.
    """
    pixels = np.asarray(part, dtype=float)
    inside = pixels[..., 3] > 128
    colour = np.asarray(page, dtype=float).mean((0, 1))

    def flat(image: np.ndarray) -> np.ndarray:
        return np.asarray(colour + (image[..., :3] - colour) * image[..., 3:] / 255)

    for _ in range(TRIES):
        changed = DEFECTS[kind](rng, pixels, inside)
        mask = np.abs(flat(changed) - flat(pixels)).max(-1) > VISIBLE
        if CHANGED[0] <= mask.sum() / inside.sum() <= CHANGED[1]:
            return Image.fromarray(changed.clip(0, 255).astype(np.uint8), "RGBA"), Image.fromarray((mask * 255).astype(np.uint8))
    return None


def photo(rng: Rng, part: Image.Image, page: Image.Image, mask: Image.Image | None = None) -> tuple[Image.Image, Image.Image | None]:
    """A photo of the part on the page: turned by up to 4 degrees, moved by a few pixels, in varied light, with noise.

    The mask, if given, is moved in the same way.
    """
    turn, scale, shift = rng.uniform(-4, 4), rng.uniform(0.94, 1.0), rng.integers(-6, 7, 2)

    def placed(image: Image.Image, base: Image.Image, resample: Image.Resampling) -> Image.Image:
        turned = image.rotate(turn, resample, expand=True)
        turned = turned.resize((round(turned.width * scale), round(turned.height * scale)), resample)
        left, top = ((drawing.SIDE - length) // 2 + int(d) for length, d in zip(turned.size, shift, strict=True))
        base = base.copy()
        base.paste(turned, (left, top), turned)
        return base

    pixels = np.asarray(placed(part, page, Image.Resampling.BICUBIC), dtype=float)
    lit = pixels * rng.uniform(0.9, 1.04) * rng.uniform(0.98, 1.02, 3) + rng.normal(0, 2.5, pixels.shape)
    image = Image.fromarray(lit.clip(0, 255).astype(np.uint8))
    return image, placed(mask, Image.new("L", image.size), Image.Resampling.NEAREST) if mask else None


def surface(rng: Rng) -> Image.Image:
    """What the part lies on: a white or a greyish sheet, half of the time with a light texture."""
    level = 255 if rng.random() < 0.4 else rng.uniform(90, 245) + rng.uniform(-25, 25, 3)
    page = Image.fromarray(np.full((drawing.SIDE, drawing.SIDE, 3), np.clip(level, 0, 255), dtype=np.uint8))
    if rng.random() < 0.5:
        grain = Image.fromarray(rng.uniform(0, 255, (drawing.SIDE // 2, drawing.SIDE // 2)).astype(np.uint8))
        grain = grain.filter(ImageFilter.GaussianBlur(1.5)).resize(page.size, Image.Resampling.BICUBIC)
        texture = (np.asarray(grain, dtype=float)[..., None] - 127) * rng.uniform(0.3, 0.8)
        page = Image.fromarray((np.asarray(page, dtype=float) + texture).clip(0, 255).astype(np.uint8))
    return page


def category(product: Product, sources: Sources) -> dict[str, Image.Image] | None:
    """All files of one category, by name. None if the part is too small, or a defect on it not visible."""
    rng = generator("view", "photo inspection", product.stamp)
    part = drawing.cropped(sources.cut_out(product.stamp), LONGEST)
    if (np.asarray(part.getchannel("A")) > 128).sum() < SMALLEST:
        return None
    page = surface(rng)
    files: dict[str, Image.Image] = {}
    for folder, count in (("train/good", REFERENCES), ("test/good", GOOD)):
        for number in range(count):
            files[f"{folder}/{number:03}.jpg"], _ = photo(rng, part, page)
    for kind in DEFECTS:
        for number in range(EACH):
            defect = damaged(rng, part, page, kind)
            if defect is None:
                return None
            image, mask = photo(rng, defect[0], page, defect[1])
            assert mask is not None
            files[f"test/{kind}/{number:03}.jpg"] = image
            files[f"ground_truth/{kind}/{number:03}_mask.png"] = mask
    return files


def write(sources: Sources, archive_file: Path, split: str) -> None:
    """Draw the categories of a split, "train" or "held_out", into an archive: ``<category>/{train,test,ground_truth}/…``."""
    with zipfile.ZipFile(archive_file, "w", zipfile.ZIP_STORED) as archive:
        for product in track(products_of_split(split), archive_file.name, console=console, transient=True, disable=not console.is_terminal):
            for name, image in (category(product, sources) or {}).items():
                if image.mode == "L":
                    add(archive, f"{product.name}/{name}", image)
                else:
                    drawing.add_photo(archive, f"{product.name}/{name}", image, QUALITY)
