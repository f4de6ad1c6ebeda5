"""Draw the data sets that are not shipped. A file is complete or absent, and the same on every machine."""

from __future__ import annotations

from pathlib import Path

from lcl_adapter.files import whole_file
from lcl_adapter.pocket import DATA, parts, products
from lcl_adapter.terminal import console


def draw(folder: Path, dataset: str) -> None:
    """Draw the data set "inspection" or "products" into ``folder``. Raises RunError if it cannot be written."""
    console.print(f"drawing pocket-{dataset} into {folder}, once", highlight=False, markup=False)
    if dataset == "inspection":
        train, held_out = folder / "inspection-train.zip", folder / "inspection-held-out.zip"
        with whole_file(train) as train_part, whole_file(held_out) as held_out_part:
            parts.write(DATA, {"train": train_part, "held_out": held_out_part})
    else:
        with whole_file(folder / "products.zip") as archive, whole_file(folder / "products.csv") as table:
            products.write(DATA, archive, table)
