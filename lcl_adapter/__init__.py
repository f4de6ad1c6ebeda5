"""lcl-adapter: teach the LLaVA you already run new visual concepts from a few photos.

Importing the package imports neither torch nor transformers. Each name below loads its module when it is first used.

    import lcl_adapter as lcl

    lcl.train("recipes/pocket.yaml", ["train.max_steps=100"])
    base, manifest = lcl.load_adapter("runs/pocket")
    predictor = lcl.Predictor(base)
    shown = [(lcl.Picture("whole.png"), "good"), (lcl.Picture("chip.png"), "chipped")]
    support = predictor.prefill([lcl.support_turns(shown)])
    query = lcl.Turn("user", "Now, what is this?", lcl.Picture("query.png"))
    [reply] = predictor.ask(support, [lcl.Question(0, query, ("good", "chipped"))])

The functions of the other commands are in ``lcl_adapter.cli.commands``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {  # public name -> its module
    "BaseRef": "lcl_adapter.base.ref",
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
    "support_turns": "lcl_adapter.data.conversations",
    "train": "lcl_adapter.cli.commands",
}
_ALIASES = {"load_recipe": "load"}  # public name -> its name in the module

__all__ = [
    "BaseRef",
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
    "support_turns",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lcl_adapter' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), _ALIASES.get(name, name))
