"""``data index``: which of a user's classes are near each other, by the base's own vision tower -> ``neighbours.json``.

Near classes make hard episodes and a "neither" that is worth learning; for a folder of photos nobody else knows them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.progress import track

from lcl_adapter.base.model import load_base
from lcl_adapter.base.prototypes import class_means, mean_patches, standardised
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.sources import Picture, read_class_folders, read_image
from lcl_adapter.data.sources.class_folder import NEIGHBOURS
from lcl_adapter.errors import DataError
from lcl_adapter.files import write_json
from lcl_adapter.terminal import console

NEAREST = 16


def index(folder: Path, base: BaseRef | str, out: Path | None = None) -> dict[str, Any]:
    """Rank every class's nearest classes and write them beside the folders. Broken pictures are left out and counted.

    Similarity is the cosine of class means of the mean patch, standardised over all pictures, as the prototype baseline has it.
    Raises DataError: no folder, fewer than two classes, a class without a picture that can be read.
    """
    if not folder.is_dir() and out is None:
        raise DataError(f"{folder}: not a folder; for an archive say with --out where neighbours.json goes.")
    pool = read_class_folders(folder, on_fault="skip")
    if len(pool) < 2:
        raise DataError(f"{folder}: {len(pool)} class; neighbours need at least two.")
    vision = VisionFeatures(load_base(base))
    readable: list[Picture] = []
    owners: list[int] = []
    broken = 0
    for number, one in enumerate(track(pool.classes, "reading classes", console=console, transient=True, disable=not console.is_terminal)):
        for picture in one.pictures:
            try:
                read_image(picture)
                readable.append(picture)
                owners.append(number)
            except DataError as error:
                broken += 1
                console.print(f"left out: {error}", style="yellow", markup=False)
        if number not in owners[-1:]:
            raise DataError(f"{folder}: class {one.name!r} has no picture that can be read.")
    means_KC = class_means(standardised(mean_patches(readable, vision)), owners)
    similar = means_KC @ means_KC.T
    similar.fill_diagonal_(-2)
    order = similar.argsort(1, descending=True)[:, : min(NEAREST, len(pool) - 1)].tolist()
    ranked = {one.name: [pool.classes[i].name for i in near] for one, near in zip(pool.classes, order, strict=True)}
    path = out or folder / NEIGHBOURS
    write_json(path, {"ranked": ranked})
    return {"written": str(path), "classes": len(pool), "pictures": len(owners), "left_out": broken}
