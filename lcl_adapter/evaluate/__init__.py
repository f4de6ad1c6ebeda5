"""Base against adapter, on the same questions, in one run. ``suites`` makes the cells, ``judges`` score them, ``runner`` measures."""

from lcl_adapter.evaluate.pair import ModelPair, ServedModels
from lcl_adapter.evaluate.runner import evaluate, measure_adapter, measure_base, readable, retention_of
from lcl_adapter.evaluate.suites import build_cells, check_held_out, check_measured, check_suites

__all__ = [
    "ModelPair",
    "ServedModels",
    "build_cells",
    "check_held_out",
    "check_measured",
    "check_suites",
    "evaluate",
    "measure_adapter",
    "measure_base",
    "readable",
    "retention_of",
]
