"""lcl-adapter: teach the LLaVA you already run new visual concepts from a few photos.

Importing this imports neither torch nor transformers; the names below load what they need when first used.

    import lcl_adapter

    lcl_adapter.train("recipes/pocket.yaml", ["train.max_steps=100"])
    base, manifest = lcl_adapter.load_adapter(Path("runs/pocket"))
    lcl_adapter.Predictor(base).prefill(...)

The functions behind the other commands are in ``lcl_adapter.cli.commands``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "LclError": "lcl_adapter.errors",
    "Picture": "lcl_adapter.data.sources",
    "Predictor": "lcl_adapter.answering.predict",
    "Question": "lcl_adapter.answering.predict",
    "Recipe": "lcl_adapter.data",
    "Turn": "lcl_adapter.data.conversations",
    "UserError": "lcl_adapter.errors",
    "load_adapter": "lcl_adapter.base.adapter",
    "load_base": "lcl_adapter.base.model",
    "load_recipe": "lcl_adapter.data",
    "train": "lcl_adapter.cli.commands",
}
_ALIASES = {"load_recipe": "load"}

__all__ = [
    "LclError",
    "Picture",
    "Predictor",
    "Question",
    "Recipe",
    "Turn",
    "UserError",
    "load_adapter",
    "load_base",
    "load_recipe",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lcl_adapter' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), _ALIASES.get(name, name))
