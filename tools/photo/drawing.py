"""Photos out of cut-outs: a thing with its alpha channel, laid on a background, and photographed in some light.

Every random draw is from a generator that the caller makes from the name of what is drawn, so that a picture does not
depend on the others.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from lcl_adapter.pocket import products

SIDE = 224  # pixels of a drawn photo
QUALITY = 90  # of its JPEG
WORKING = 256  # longest side of a cut-out before it is scaled down and turned
Rng = np.random.Generator


def cropped(cut: Image.Image, longest: int = WORKING) -> Image.Image:
    """The thing without the empty margin around it, RGBA, at most ``longest`` pixels."""
    image = cut.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 if alpha > 16 else 0).getbbox())
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return image


def plain(rng: Rng, side: int = SIDE) -> Image.Image:
    """A sheet of one colour: white, nearly white, or any."""
    choice = rng.random()
    if choice < 0.4:
        colour = (255, 255, 255)
    else:
        level = rng.uniform(215, 250, 3) if choice < 0.6 else rng.uniform(0, 255, 3)
        colour = tuple(int(v) for v in level)  # type: ignore[assignment]
    return Image.new("RGB", (side, side), colour)


def scene(rng: Rng, wallpapers: Sequence[Image.Image], side: int = SIDE) -> Image.Image:
    """A piece of a wallpaper: cropped, often mirrored, recoloured, out of focus."""
    page = wallpapers[int(rng.integers(len(wallpapers)))]
    extent = int(rng.integers(min(page.size) // 3, min(page.size) + 1))
    left, top = (int(rng.integers(length - extent + 1)) for length in page.size)
    piece = page.crop((left, top, left + extent, top + extent)).resize((side, side), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:  # other colours: the channels in another order
        bands = piece.split()
        piece = Image.merge("RGB", [bands[int(i)] for i in rng.permutation(3)])
    if rng.random() < 0.5:
        piece = piece.filter(ImageFilter.GaussianBlur(float(rng.uniform(1, 4))))
    return ImageEnhance.Brightness(piece).enhance(rng.uniform(0.6, 1.4))


def background(rng: Rng, wallpapers: Sequence[Image.Image], side: int = SIDE) -> Image.Image:
    """A sheet, a shaded or striped page, or a scene."""
    choice = rng.random()
    if choice < 0.3:
        return plain(rng, side)
    if choice < 0.45:
        return products.background(rng).resize((side, side), Image.Resampling.BICUBIC)
    return scene(rng, wallpapers, side)


def tilted(rng: Rng, cut: Image.Image, strength: float) -> Image.Image:
    """The thing from a slightly different angle: each corner moved by up to ``strength`` of the side."""
    width, height = cut.size
    corners = np.array([[0, 0], [0, 1], [1, 1], [1, 0]]) + rng.uniform(-strength, strength, (4, 2))
    quad = [float(v) for v in (corners * [width, height]).ravel()]
    return cut.transform(cut.size, Image.Transform.QUAD, quad, Image.Resampling.BICUBIC)


def lit(rng: Rng, photo: Image.Image, strength: float = 1.0) -> Image.Image:
    """Other brightness, contrast and saturation. ``strength`` 1 changes each by up to a quarter."""
    for adjustment in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        photo = adjustment(photo).enhance(1 + strength * rng.uniform(-0.25, 0.2))
    return photo


def composite(
    rng: Rng, cut: Image.Image, page: Image.Image, turn: float = 20, scale: tuple[float, float] = (0.55, 0.98), mirror: bool = True
) -> Image.Image:
    """The thing on a page: tilted, turned by up to ``turn`` degrees, scaled, somewhere on it.

    scale: the longest side of the thing, as a share of the page's.
    mirror: mirrored half of the time. Not for emoji, some of which differ by their direction alone.
    """
    side = page.width
    if mirror and rng.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    longest = rng.uniform(*scale) * side
    cut = cut.resize([max(8, round(length * longest / max(cut.size))) for length in cut.size], Image.Resampling.BICUBIC)
    cut = tilted(rng, cut, 0.06).rotate(rng.uniform(-turn, turn), Image.Resampling.BICUBIC, expand=True)
    cut = cut.crop(cut.getchannel("A").getbbox())
    cut.thumbnail((side, side), Image.Resampling.BICUBIC)  # turned, it may be larger than the page
    left, top = (int(rng.integers(side - length + 1)) for length in cut.size)
    page = page.copy()
    page.paste(cut, (left, top), cut)
    return lit(rng, page)


def add_photo(archive: zipfile.ZipFile, name: str, image: Image.Image, quality: int = QUALITY) -> None:
    """Add a picture as JPEG. The file date is fixed, so that the same pictures give the same archive."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    archive.writestr(zipfile.ZipInfo(name), buffer.getvalue())
