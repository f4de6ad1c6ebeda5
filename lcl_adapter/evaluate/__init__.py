"""Base against adapter, on the same episodes, in one run. ``suites`` makes the cells, ``runner`` measures them."""

from lcl_adapter.evaluate.runner import evaluate
from lcl_adapter.evaluate.suites import check_held_out, check_suites

__all__ = ["check_held_out", "check_suites", "evaluate"]
