"""lcl-adapter in lmms-eval: a model (``model``), and few-shot image suites as tasks (``draw``, ``tasks/``)."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The model's entry, for lmms-eval's entry point ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("lcl-adapter", chat_class_path="lcl_lmms_eval.model.LclAdapter", aliases=("lcl_adapter",))
