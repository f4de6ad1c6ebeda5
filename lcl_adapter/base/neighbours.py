"""``data index``: ranks classes by their similarity in the base's vision tower -> ``neighbours.json``.

Similar classes make hard episodes, and a "neither" that is worth learning.

Shapes: N pictures, C width of a patch, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.progress import track

from lcl_adapter.base.model import load_base
from lcl_adapter.base.prototypes import class_means, standardised
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.sources import Picture, read_class_folders, read_image
from lcl_adapter.data.sources.base import remarks
from lcl_adapter.data.sources.class_folder import NEIGHBOURS
from lcl_adapter.errors import DataError
from lcl_adapter.files import write_json
from lcl_adapter.terminal import console, show_notes

NEAREST = 16


def index(folder: Path, base: BaseRef | str, out: Path | None = None) -> dict[str, Any]:
    """Rank every class's nearest classes and write them into the folder. Broken pictures are left out and counted.

    Similarity is the cosine of class means of the mean patch, standardised over all pictures (``prototypes``).
    Raises DataError: no folder, fewer than two classes, a class without a picture that can be read.
    """
    if not folder.is_dir() and out is None:
        raise DataError(f"{folder}: not a folder; for an archive, name the file to write with --out.")
    pool = read_class_folders(folder, on_fault="skip")
    show_notes(remarks(pool))
    if len(pool) < 2:
        raise DataError(f"{folder}: {len(pool)} class; neighbours need at least two.")
    vision = VisionFeatures(load_base(base))
    readable: list[Picture] = []
    class_N: list[int] = []
    broken = 0
    for number, picture_class in enumerate(track(pool.classes, "reading classes", console=console, transient=True, disable=not console.is_terminal)):
        for picture in picture_class.pictures:
            try:
                read_image(picture)
                readable.append(picture)
                class_N.append(number)
            except DataError as error:
                broken += 1
                console.print(f"left out: {error}", style="yellow", markup=False)
        if number not in class_N[-1:]:
            raise DataError(f"{folder}: class {picture_class.name!r} has no picture that can be read.")
    means_KC = class_means(standardised(vision.mean_patches(readable)), class_N)
    similarity_KK = means_KC @ means_KC.T
    similarity_KK.fill_diagonal_(-2)
    nearest = similarity_KK.argsort(1, descending=True)[:, : min(NEAREST, len(pool) - 1)].tolist()
    names = [picture_class.name for picture_class in pool.classes]
    ranked = {name: [names[i] for i in indices] for name, indices in zip(names, nearest, strict=True)}
    path = out or folder / NEIGHBOURS
    write_json(path, {"ranked": ranked})
    return {"written": str(path), "classes": len(pool), "pictures": len(class_N), "left_out": broken}
