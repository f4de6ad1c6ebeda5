"""Drawing the data that is not shipped: whole or not at all, the same on every machine."""

from __future__ import annotations

from pathlib import Path

from lcl_adapter.files import whole_file
from lcl_adapter.pocket import DATA, parts, products
from lcl_adapter.terminal import console


def make(folder: Path, what: str) -> None:
    """Draw ``inspection`` or ``products`` into ``folder``. Raises RunError where it cannot be written."""
    console.print(f"drawing pocket-{what} into {folder}, once", highlight=False, markup=False)
    if what == "inspection":
        train, held_out = folder / "inspection-train.zip", folder / "inspection-held-out.zip"
        with whole_file(train) as one, whole_file(held_out) as other:
            parts.write(DATA, {"train": one, "held_out": other})
    else:
        with whole_file(folder / "products.zip") as pictures, whole_file(folder / "products.csv") as listed:
            products.write(DATA, pictures, listed)
