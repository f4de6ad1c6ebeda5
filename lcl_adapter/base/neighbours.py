"""``data index``: which of a user's classes are near each other, by the base's own vision tower -> ``neighbours.json``.

Near classes make hard episodes and a "neither" that is worth learning; for a folder of photos nobody else knows them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch.nn import functional

from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.sources import read_class_folders, read_image
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
    rows, owners, broken = [], [], 0
    for number, one in enumerate(track(pool.classes, "reading classes", console=console, transient=True, disable=not console.is_terminal)):
        readable = []
        for picture in one.pictures:
            try:
                read_image(picture)
                readable.append(picture)
            except DataError as error:
                broken += 1
                console.print(f"left out: {error}", style="yellow", markup=False)
        if not readable:
            raise DataError(f"{folder}: class {one.name!r} has no picture that can be read.")
        rows.append(vision.patches(readable).mean(1).float())
        owners += [number] * len(readable)
    found = torch.cat(rows)
    vectors = functional.normalize((found - found.mean(0)) / (found.std(0) + 1e-6), dim=1)
    means = torch.zeros(len(pool), vectors.shape[1]).index_add_(0, torch.tensor(owners), vectors.cpu())
    means = functional.normalize(means, dim=1)
    similar = means @ means.T
    similar.fill_diagonal_(-2)
    order = similar.argsort(1, descending=True)[:, : min(NEAREST, len(pool) - 1)].tolist()
    ranked = {one.name: [pool.classes[i].name for i in near] for one, near in zip(pool.classes, order, strict=True)}
    path = out or folder / NEIGHBOURS
    write_json(path, {"ranked": ranked})
    return {"written": str(path), "classes": len(pool), "pictures": len(owners), "left_out": broken}
