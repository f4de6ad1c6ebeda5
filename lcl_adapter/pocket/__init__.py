"""The small base that ships with the package, its data, and the scripts that made them (``build.py``)."""

from pathlib import Path

BASE = Path(__file__).parent / "base"
DATA = Path(__file__).parent / "data"
