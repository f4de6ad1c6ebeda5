"""The small base that ships with the package, and its data. The scripts that built both are in ``tools/pocket``.

Two data sets are not shipped. They are drawn from the shipped drawings on first use and cached: see :func:`shipped`.
"""

from __future__ import annotations

from pathlib import Path

from lcl_adapter.files import cache_folder

NAME = "pocket"  # of the base, in the place of a folder
BASE = Path(__file__).parent / "base"
DATA = Path(__file__).parent / "data"
DRAWN = ("inspection-train.zip", "inspection-held-out.zip", "products.zip", "products.csv")
VERSION = "v1"  # of the drawn data sets: raise it when the code that draws them changes


def cache() -> Path:
    """The folder of the drawn data sets."""
    return cache_folder() / f"pocket-{VERSION}"


def shipped(name: str) -> Path:
    """The file that ``pocket:NAME`` names.

    A file in ``DRAWN`` is drawn if it is not cached, which needs about 20 s.

    Raises RunError if it cannot be written.
    """
    if name not in DRAWN:
        return DATA / name
    path = cache() / name
    if not path.exists():
        from lcl_adapter.pocket.draw import draw

        draw(cache(), "products" if name.startswith("products") else "inspection")
    return path
