"""The small base that ships with the package, its data, and the scripts that made them (``build.py``).

Two data sets are not shipped but drawn from the shipped ones when first asked for, and kept: see :func:`shipped`.
"""

from __future__ import annotations

import os
from pathlib import Path

BASE = Path(__file__).parent / "base"
DATA = Path(__file__).parent / "data"
MADE = ("inspection-train.zip", "inspection-held-out.zip", "products.zip", "products.csv")
VERSION = "v1"  # of what is drawn: raise it when the drawing changes


def cache() -> Path:
    """Where drawn data is kept: ``LCL_ADAPTER_CACHE``, else ``~/.cache/lcl-adapter``."""
    root = os.environ.get("LCL_ADAPTER_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "lcl-adapter") / f"pocket-{VERSION}"


def shipped(name: str) -> Path:
    """The file that ``pocket:NAME`` stands for, drawn first (about half a minute) where it is one of ``MADE``.

    Raises RunError where it cannot be written.
    """
    if name not in MADE:
        return DATA / name
    path = cache() / name
    if not path.exists():
        from lcl_adapter.pocket.draw import make

        make(cache(), "products" if name.startswith("products") else "inspection")
    return path
