"""Opens one image of any format, from a file or an archive: bounded in size, upright, in RGB.

A broken image raises :class:`DataError` with its name and what is wrong, and no other error.
"""

from __future__ import annotations

import io
import math
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError, features

from lcl_adapter import reading
from lcl_adapter.data.sources.archive import open_archive
from lcl_adapter.data.sources.encodings import nfc
from lcl_adapter.data.sources.picture import ROUNDED, Picture, PixelBox
from lcl_adapter.errors import DataError, LclError
from lcl_adapter.randomness import generator

# Every format that is read, wherever a picture is read: training, the command line, the server, the page. Pillow knows forty more,
# and recognises them whatever the file's name; one of them, EPS, runs a program.
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA")
with suppress(ImportError):  # optional
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS += ("HEIF",)
if features.check("avif"):
    FORMATS += ("AVIF",)

READ = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".jp2", ".tga"})
# Photos too, so that none is passed over in silence: HEIC is read where pillow-heif is installed, AVIF where Pillow has it
HEIF = frozenset({".heic", ".heif", ".hif"})
RAW = frozenset({".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"})
SUFFIXES = READ | HEIF | RAW | {".avif", ".jxl"}
MAX_PIXELS = 64_000_000  # 8,000 x 8,000: more than a factory camera has, less than a decompression bomb
MIN_SIDE = 2
REDUCING_GAP = 3  # Pillow's documentation of `reducing_gap`: from here on nearly the same as resizing the whole picture
DEEP_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N", "F"})  # of more than 8 bits
RANGES = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0)  # of floats from 0 to 1, and of 8, 10, 12, 14 and 16 bits
ORIENTED = {  # by EXIF's number
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
ORIENTATION, SIDEWAYS = 0x0112, frozenset({5, 6, 7, 8})  # EXIF's tag, and its values that exchange width and height
BITS_PER_SAMPLE, LARGEST_SAMPLE = 258, 281  # TIFF's tags
STRIP = 64  # rows of a picture of more than 8 bits that are scaled at a time
LARGE = 16_000_000  # pixels; of such pictures, one at a time is decoded


def read(picture: Picture, side: int | None = None) -> Image.Image:
    """The picture, decoded: RGB, upright (EXIF), transparency on white, the first of several frames.

    A blend is mixed in pixels, for people; the model mixes features (``VisionFeatures``).

    side: pixels that the longer side will be resized to. A picture with more than REDUCING_GAP times as many is returned
    at a whole fraction of its size, and not below that. A large JPEG is then decoded in a part of the time and memory.
    Further views and tiles are cut from the whole picture.

    Raises DataError for a file that is missing, empty, truncated, no image, too large, or smaller than 2 pixels.
    """
    try:
        with open_image(read_bytes(picture)) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise DataError(f"{picture}: {opened.width} x {opened.height} pixels is over the bound of {MAX_PIXELS:,}. Scale it down first.")
            if min(opened.size) < MIN_SIDE:
                raise DataError(f"{picture}: {opened.width} x {opened.height} pixels shows nothing. Remove it.")
            box = picture.crop and upright_box(picture.crop, picture, opened.size, orientation_of(opened))
            whole = side is None or picture.view or picture.tile or picture.crop
            image = _decoded(opened, None if whole else side, picture.white)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{picture}: not an image that can be read. {_remedy(picture)}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{picture}: over the bound of {MAX_PIXELS:,} pixels. Scale it down first.") from error
    except OSError as error:
        raise DataError(f"{picture}: the image is broken ({error}). Remove it or save it again.") from error
    except MemoryError as error:
        raise DataError(f"{picture}: the image needs more memory than there is. Scale it down first.") from error
    if box:
        image = _cut_out(image, box, picture)
    if picture.turned:
        image = image.rotate(90 * picture.turned, expand=True)
    if picture.tile:
        rows, columns, place = picture.tile
        row, column = divmod(place, columns)
        edges = (column * image.width / columns, row * image.height / rows, (column + 1) * image.width / columns, (row + 1) * image.height / rows)
        image = image.crop(tuple(round(e) for e in edges))  # type: ignore[arg-type]
    if picture.view:
        image = further_view(image, nfc(picture.member or picture.path.name), picture.view)
    if picture.orientation > 1:
        image = image.transpose(ORIENTED[picture.orientation])
    if picture.blend is not None:
        other, weight = picture.blend
        image = Image.blend(image, read(other).resize(image.size), weight)
    return image


PLAIN = frozenset({"PNG", "JPEG", "WEBP"})


def fault_of(picture: Picture) -> str | None:
    """What is wrong with a picture; None where it can be read."""
    try:
        read(picture)
    except DataError as error:
        return str(error)
    return None


def is_whole(picture: Picture) -> bool:
    """Whether the picture is the whole of its file, as it stands there."""
    return not (picture.view or picture.turned or picture.tile or picture.crop or picture.blend or picture.orientation > 1)


def is_plain(image: Image.Image) -> bool:
    """Whether every program that decodes an opened file has the same picture: upright, 8-bit RGB, one frame."""
    alike = image.format in PLAIN and image.mode == "RGB" and not image.has_transparency_data
    return alike and getattr(image, "n_frames", 1) == 1 and orientation_of(image) == 1


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """An image file's bytes as a picture of one of FORMATS, of which only the header is decoded yet. All reading goes through here.

    Whatever a decoder raises on broken bytes, then or inside the block, is an OSError; UnidentifiedImageError for no image.
    Raises DecompressionBombError for far more pixels than MAX_PIXELS; MemoryError where it does not fit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warning of a decompression bomb: callers have bounds of their own
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                yield opened
        except (OSError, MemoryError, LclError, Image.DecompressionBombError):
            raise
        except Exception as error:
            raise OSError(str(error) or type(error).__name__) from error


def orientation_of(image: Image.Image) -> int:
    """1 to 8 (EXIF): how an opened picture must be turned to be upright."""
    return int(image.getexif().get(ORIENTATION, 1))


def upright_box(box: PixelBox, picture: Picture, stored: tuple[int, int], orientation: int) -> PixelBox:
    """The box on the upright picture, where the list's own size says that it is on the picture as it is stored.

    stored: the file's width and height. Raises DataError where the listed size is neither the stored nor the upright one.
    """
    width, height = stored
    upright = (height, width) if orientation in SIDEWAYS else stored
    if picture.listed_size in {None, upright}:
        return box
    if picture.listed_size != stored:
        listed = "{} x {}".format(*picture.listed_size or ())
        raise DataError(f"{picture}: its list says {listed} pixels, the file has {width} x {height}: was it resized after its boxes were drawn?")
    corners = [_turned(x, y, width, height, orientation) for x, y in ((box[0], box[1]), (box[2], box[3]))]
    (x0, x1), (y0, y1) = (sorted(values) for values in zip(*corners, strict=True))
    return x0, y0, x1, y1


def _turned(x: float, y: float, width: int, height: int, orientation: int) -> tuple[float, float]:
    """A point of a stored picture, on the upright one. Only sideways orientations change the size."""
    return {5: (y, x), 6: (height - y, x), 7: (height - y, width - x), 8: (y, width - x)}[orientation]


def _cut_out(image: Image.Image, box: PixelBox, picture: Picture) -> Image.Image:
    """Raises DataError for a box outside of the picture, or of less than MIN_SIDE pixels."""
    left, top, right, bottom = box
    if right > image.width + ROUNDED or bottom > image.height + ROUNDED:
        raise DataError(f"{picture}: the box is out of range; the picture is {image.width} x {image.height} pixels, upright.")
    edges = (math.floor(left), math.floor(top), min(image.width, math.ceil(right)), min(image.height, math.ceil(bottom)))
    if min(edges[2] - edges[0], edges[3] - edges[1]) < MIN_SIDE:
        raise DataError(f"{picture}: a box of {edges[2] - edges[0]} x {edges[3] - edges[1]} pixels shows nothing. Remove it.")
    return image.crop(edges)


def _remedy(picture: Picture) -> str:
    """What to do with a photo that Pillow does not recognise, by its suffix."""
    suffix = PurePosixPath(picture.member or picture.path.name).suffix.lower()
    if suffix in HEIF:
        return "A phone's HEIC photo needs pillow-heif: pip install pillow-heif, or save it as JPEG."
    if suffix in RAW:
        return "A camera's raw photo is not developed here: save it as JPEG, PNG or TIFF."
    if suffix == ".jxl":
        return "A JPEG XL photo is not read here: save it as JPEG or PNG."
    return "Remove it or save it again as JPEG or PNG."


def read_bytes(picture: Picture) -> bytes:
    """The bytes of the file, of the archive's member, or of the row in a saved Hugging Face dataset.

    Raises DataError.
    """
    try:
        if picture.data is not None:
            data = picture.data
        elif picture.member and picture.path.is_dir():
            data = _row(picture.path, picture.member)
        else:
            data = open_archive(picture.path, os.getpid()).read(picture.member) if picture.member else reading.read_bytes(picture.path)
    except FileNotFoundError as error:
        raise DataError(f"{picture}: no such file.") from error
    except KeyError as error:
        raise DataError(f"{picture}: no such member in the archive.") from error
    except OSError as error:
        raise DataError(f"{picture}: cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise DataError(f"{picture}: cannot be read ({error}).") from error
    if not data:
        raise DataError(f"{picture}: the file is empty. Remove it or copy it again.")
    return data


def _row(folder: Path, member: str) -> bytes:
    """``column/3``: the image of row 3 of a saved dataset."""
    column, _, row = member.rpartition("/")
    value = saved_dataset(folder)[int(row)][column]
    if value is None:
        raise DataError(f"{folder}: row {row} has no image in {column!r}.")
    if isinstance(value, dict):
        return value["bytes"] or reading.read_bytes(Path(value["path"]))
    return value if isinstance(value, bytes) else reading.read_bytes(Path(value))


@lru_cache(maxsize=4)
def saved_dataset(folder: Path) -> Any:
    """A dataset that ``datasets`` saved to disk, with images not decoded.

    It is memory-mapped and uses no memory of its own.

    Raises DataError if the folder is no saved dataset, or has several splits.
    """
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise DataError(f"{folder}: not a dataset saved by `Dataset.save_to_disk` ({error}).") from error
    if isinstance(dataset, datasets.DatasetDict):
        raise DataError(f"{folder}: holds the splits {', '.join(dataset)}; name one of their folders, for instance {folder / next(iter(dataset))}.")
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _decoded(image: Image.Image, side: int | None, white: float | None) -> Image.Image:
    """An opened picture in RGB, reduced for ``side`` if that is given. white: as in :class:`Picture`."""
    image.seek(0)
    if side is not None:
        fraction = REDUCING_GAP * side / max(image.size)
        if fraction < 1:  # a JPEG is decoded at 1/2, 1/4 or 1/8; other formats ignore it
            image.draft(None, (max(1, round(image.width * fraction)), max(1, round(image.height * fraction))))
    with _large(os.getpid()) if image.width * image.height > LARGE else nullcontext():
        upright = _rgb(image, white)
        factor = 1 if side is None else max(upright.size) // (REDUCING_GAP * side)
        if factor > 1:
            return upright.reduce(factor)
        return upright.copy() if upright is image else upright  # without the file


@lru_cache(maxsize=2)
def _large(_process: int) -> threading.Lock:
    """Held while a large picture is decoded. A forked process has one of its own, for another thread may hold this one."""
    return threading.Lock()


def _rgb(upright: Image.Image, white: float | None) -> Image.Image:
    """In place, where nothing but the orientation changes: of a large picture each copy counts."""
    deep_white = None
    if upright.mode in DEEP_MODES:  # before it is turned, which loses the file's tags
        values = np.asarray(upright)
        lowest, highest = _extremes(values)
        from_0_to_1 = upright.mode == "F" and lowest >= 0 and highest <= 1  # beside pictures of whole numbers too
        deep_white = white_of(upright, values) if white is None or (from_0_to_1 and white > 1) else white
    ImageOps.exif_transpose(upright, in_place=True)
    if deep_white is not None:
        return _scaled(np.asarray(upright), deep_white)
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        page = Image.new("RGBA", upright.size, "white")
        page.alpha_composite(upright)
        return page.convert("RGB")
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _scaled(values: np.ndarray, white: float) -> Image.Image:
    """Values of more than 8 bits in RGB, a strip at a time: as floats, a whole picture would need ten times its memory."""
    darkest, _ = _extremes(values)
    scaled = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), STRIP):
        # Where nothing was measured, a depth or height map has NaN or an infinity: black, or white where it is beyond all values
        strip = np.nan_to_num(values[top : top + STRIP].astype(np.float32), nan=darkest, posinf=white + darkest, neginf=darkest)
        scaled[top : top + STRIP] = ((strip - darkest) * (255.0 / white)).clip(0, 255).round()
    return Image.fromarray(scaled).convert("RGB")


def white_of(image: Image.Image, values: np.ndarray) -> float:
    """The value that is white, of an opened picture in one of DEEP_MODES."""
    tags = getattr(image, "tag_v2", {})
    if largest := tags.get(LARGEST_SAMPLE):
        return float(largest[0] if isinstance(largest, tuple) else largest)
    bits = tags.get(BITS_PER_SAMPLE)
    bits = bits[0] if isinstance(bits, tuple) else bits
    if bits and 8 < bits < 16:
        return float(2**bits - 1)
    lowest, highest = _extremes(values)
    # Of values on both sides of 0, all are shown: black is the lowest one
    return highest - lowest if lowest < 0 else range_of(highest, image.mode == "F")


def _extremes(values: np.ndarray) -> tuple[float, float]:
    """The lowest and the highest of the values and 0. NaN and infinities do not count."""
    known = np.isfinite(values) if values.dtype.kind == "f" else True
    return float(values.min(initial=0, where=known)), float(values.max(initial=0, where=known))


def range_of(highest: float, floats: bool) -> float:
    """The smallest usual range that holds a value; of whole numbers, from 255 on."""
    usual = RANGES if floats else RANGES[1:]
    return next((top for top in usual if highest <= top), highest)


def further_view(image: Image.Image, name: str, view: int) -> Image.Image:
    """Another view of the image: other background tint, scale, place, rotation and light, by its name and number only."""
    rng = generator("view", name, view)
    width, height = image.size
    scale, turn = rng.uniform(0.75, 1.0), rng.uniform(-20, 20)
    small = image.resize((max(2, round(width * scale)), max(2, round(height * scale))), Image.Resampling.BICUBIC)
    turned = small.convert("RGBA").rotate(turn, Image.Resampling.BICUBIC, expand=True)
    spare = (width - turned.width, height - turned.height)
    place = tuple(int(rng.integers(s + 1)) if s > 0 else 0 for s in spare)
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(turned.crop(_centre_crop(turned.size, image.size)), (place[0], place[1]))
    paper = rng.uniform(0.88, 1.0, 3)
    lit = Image.fromarray((np.asarray(page.convert("RGB")) * paper).astype(np.uint8))
    for light, low, high in ((ImageEnhance.Brightness, 0.85, 1.1), (ImageEnhance.Contrast, 0.8, 1.15), (ImageEnhance.Color, 0.6, 1.3)):
        lit = light(lit).enhance(rng.uniform(low, high))
    return lit


def _centre_crop(size: tuple[int, int], bound: tuple[int, int]) -> tuple[int, int, int, int]:
    left, top = max(0, (size[0] - bound[0]) // 2), max(0, (size[1] - bound[1]) // 2)
    return left, top, min(size[0], left + bound[0]), min(size[1], top + bound[1])
