"""Base against adapter, on the same questions, in one run. ``suites`` makes the cells, ``judges`` score them, ``runner`` measures."""

from lcl_adapter.evaluate.runner import evaluate, fallen, measure_adapter, measure_base, readable
from lcl_adapter.evaluate.sides import Served, Sides
from lcl_adapter.evaluate.suites import build_cells, check_held_out, check_measured, check_suites

__all__ = [
    "Served",
    "Sides",
    "build_cells",
    "check_held_out",
    "check_measured",
    "check_suites",
    "evaluate",
    "fallen",
    "measure_adapter",
    "measure_base",
    "readable",
]
