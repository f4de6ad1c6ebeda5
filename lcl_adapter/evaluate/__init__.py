"""Compare base and adapter on the same questions, in one run.

``suites`` builds the cells, ``judges`` scores them, ``runner`` measures.
"""

from lcl_adapter.evaluate.pair import ModelPair, ServedModels
from lcl_adapter.evaluate.retention import allowance_met, retention_of
from lcl_adapter.evaluate.runner import drop_unreadable, evaluate, measure_adapter, measure_base, weigh_run
from lcl_adapter.evaluate.suites import CLASS_SUITES, build_cells, check_held_out, check_measured, check_suites
from lcl_adapter.evaluate.validation import with_enough_classes

__all__ = [
    "CLASS_SUITES",
    "ModelPair",
    "ServedModels",
    "allowance_met",
    "build_cells",
    "check_held_out",
    "check_measured",
    "check_suites",
    "drop_unreadable",
    "evaluate",
    "measure_adapter",
    "measure_base",
    "retention_of",
    "weigh_run",
    "with_enough_classes",
]
