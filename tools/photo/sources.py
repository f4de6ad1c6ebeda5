"""The photographs out of the packages: unpacked once, and read by name.

    gcompris:categorization/resource/images/tools/hammer1.webp      in a Qt resource file, below gcompris/src/activities
    stamp:household/tools/hammer.png                                 a cut-out with an alpha channel
    wallpaper:Kite/contents/images/2560x1600.jpg                     for backgrounds

Only what the lists in this folder name is unpacked.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml
from PIL import Image
from rich.progress import track

from lcl_adapter.errors import DataError
from lcl_adapter.files import whole_folder
from lcl_adapter.terminal import console
from tools.photo import deb, drawing, rcc
from tools.photo.packages import GCOMPRIS, PACKAGES, STAMPS, WALLPAPERS, Package, package_file

HERE = Path(__file__).parent
COPYRIGHT = "copyright"
ROOTS = {  # kind of reference -> package, and the folder in it that a reference is relative to
    "gcompris": (GCOMPRIS, "usr/share/gcompris-qt/rcc"),
    "stamp": (STAMPS, "usr/share/tuxpaint/stamps"),
    "wallpaper": (WALLPAPERS, "usr/share/wallpapers"),
}
ACTIVITIES = "gcompris/src/activities/"  # in a resource file
WALLPAPER_SIZE = (640, 400)  # backgrounds are cut out of wallpapers of this size


PLACES = {  # key of real.yaml -> what its names stand for
    "categorization": "gcompris:categorization/resource/images/{}.webp",
    "details": "gcompris:details/resource/image/{}.webp",
    "erase": "gcompris:erase/resource/{}.webp",
    "farm": "gcompris:explore_farm_animals/resource/animals/{}.webp",
    "monuments": "gcompris:explore_monuments/resource/{}.webp",
    "world": "gcompris:explore_world_animals/resource/animals/{}.webp",
    "stamps": "stamp:{}.png",
}


@dataclass(frozen=True)
class RealClass:
    """One evaluated class of ``real.yaml``. ``others``: further words for it, which no training class may have."""

    name: str
    group: str
    photos: tuple[str, ...]
    others: tuple[str, ...] = ()


def real_classes() -> list[RealClass]:
    """The evaluated classes and their photos, from ``real.yaml``."""
    raw = yaml.safe_load((HERE / "real.yaml").read_text(encoding="utf-8"))
    classes = []
    for group, members in raw.items():
        for name, entry in members.items():
            photos = tuple(PLACES[place].format(file) for place in PLACES for file in entry.get(place, ()))
            classes.append(RealClass(name, group, photos, tuple(entry.get("others", ()))))
    return classes


def stamp_classes() -> dict[str, list[str]]:
    """Class -> stamps that are photographs of it, from ``stamps.csv``."""
    table: dict[str, list[str]] = {}
    with (HERE / "stamps.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            table.setdefault(row["class"], []).append(f"stamp:{row['stamp']}.png")
    return table


def wallpapers() -> list[str]:
    """The wallpapers that backgrounds are cut from, from ``wallpapers.txt``."""
    return [f"wallpaper:{line}" for line in (HERE / "wallpapers.txt").read_text(encoding="utf-8").split()]


def all_references() -> list[str]:
    """Everything that the lists name, sorted."""
    listed = [photo for c in real_classes() for photo in c.photos] + [stamp for stamps in stamp_classes().values() for stamp in stamps]
    return sorted({*listed, *wallpapers()})


class Sources:
    """The unpacked photographs in ``folder``, read by reference."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, reference: str) -> Path:
        kind, _, name = reference.partition(":")
        return self.folder / ROOTS[kind][0].name / name

    def picture(self, reference: str) -> Image.Image:
        """One picture as it is. Raises DataError where it cannot be decoded."""
        try:
            with Image.open(self.path(reference)) as image:
                image.load()
                return image
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{reference}: cannot be decoded ({error}). Remove {self.folder} and run the command again.") from error

    def cut_out(self, reference: str) -> Image.Image:
        """A stamp without its margin, RGBA."""
        return drawing.cropped(self.picture(reference))

    def copyright(self, package: Package) -> str:
        return (self.folder / package.name / COPYRIGHT).read_text(encoding="utf-8")

    @cached_property
    def wallpapers(self) -> list[Image.Image]:
        """The wallpapers, RGB, 640 x 400 pixels."""
        return [self.picture(reference).convert("RGB") for reference in wallpapers()]


def unpack(folder: Path, given: Path | None = None) -> Sources:
    """Fetch the packages and unpack what the lists name into ``folder``. A package that is already there is not read again.

    given: a folder with the packages.

    Raises DataError where a package cannot be fetched, is another one, or lacks a file that a list names.
    """
    references: dict[str, list[str]] = {package.name: [] for package in PACKAGES}
    for reference in all_references():
        kind, _, name = reference.partition(":")
        references[ROOTS[kind][0].name].append(name)
    for package in PACKAGES:
        target = folder / package.name
        if target.exists():
            continue
        file = package_file(package, given)
        console.print(f"unpacking {file.name}", highlight=False, markup=False)
        with whole_folder(target) as partial:
            written = _unpack(package, file, partial, set(references[package.name]))
            missing = sorted(set(references[package.name]) - written)
            if missing:
                raise DataError(f"{file}: it lacks {', '.join(missing[:5])}{' and others' if missing[5:] else ''}, which the lists in {HERE} name.")
    return Sources(folder)


def _unpack(package: Package, file: Path, target: Path, names: set[str]) -> set[str]:
    """Write the files ``names`` of a package, and its copyright file. Returns the names that were written."""
    root = next(root for owner, root in ROOTS.values() if owner is package) + "/"
    copyright_file = f"usr/share/doc/{package.name}/copyright"
    resources = {f"{name.partition('/')[0]}.rcc" for name in names} if package is GCOMPRIS else set()
    wanted = {root + name for name in resources or names} | {copyright_file}
    written: set[str] = set()

    def write(name: str, data: bytes) -> None:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        written.add(name)

    stream = deb.files(file, wanted.__contains__)
    for name, data in track(stream, package.name, total=len(wanted), console=console, transient=True, disable=not console.is_terminal):
        if name == copyright_file:
            (target / COPYRIGHT).write_bytes(data)
        elif package is GCOMPRIS:
            for path, picture in rcc.files(data, f"{file}: {name}"):
                if (reference := path.removeprefix(ACTIVITIES)) in names:
                    write(reference, picture)
        else:
            write(name.removeprefix(root), data)
            if package is WALLPAPERS:
                _shrink(target / name.removeprefix(root))
    return written


def _shrink(path: Path) -> None:
    """Replace a wallpaper by a small copy, losslessly stored: it is decoded once instead of at every run."""
    with Image.open(path) as image:
        image.draft("RGB", WALLPAPER_SIZE)
        small = image.convert("RGB").resize(WALLPAPER_SIZE, Image.Resampling.LANCZOS, reducing_gap=2)
    small.save(path, "PNG")
