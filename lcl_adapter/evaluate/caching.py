"""Measured cells that are stored in a run's folder, and the key that says whether one may be used again.

A cell is used again only where everything that its figures depend on is the same: the adapter, the base, its precision
and device, the questions, this package's code, and the versions of the libraries that compute the answers.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from lcl_adapter import reading
from lcl_adapter.base.adapter import versions
from lcl_adapter.data.conversations import Turn
from lcl_adapter.evaluate.cases import Cell
from lcl_adapter.recipe import Recipe

PACKAGE = Path(__file__).parent.parent
# What builds, asks and scores a question. A wheel's version stands for its code; an editable checkout has one version
# for many states of the code, so the files themselves are hashed.
MEASURES = ("*.py", "recipe/**/*", "data/**/*", "base/**/*", "answering/**/*", "evaluate/**/*")


def cache_key(cell: Cell, manifest: dict[str, Any], recipe: Recipe, models: Any) -> str:
    """A hash of everything that a cell's figures depend on. models: which models were asked, as JSON."""

    def describe(turn: Turn) -> str:
        sizes = [f"{p} {p.path.stat().st_size if p.path.exists() else 0}" for p in turn.pictures]
        return f"{turn.text} {' '.join(sizes)}"

    cases = [[c.labels, c.answers, c.gold, c.group, str(c.truth), describe(c.query), [describe(t) for t in c.support]] for c in cell.cases]
    described = [cell.kind, cell.control, cell.metric, cell.baseline, cell.new_tokens, cell.published, cases]
    facts = [manifest["files"], manifest["base_hash"], recipe.wording, described, models, versions(), code_hash(PACKAGE)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@lru_cache(maxsize=2)
def code_hash(package: Path) -> str:
    """A hash of the package's files that decide what is asked and how it is scored."""
    files = {path for pattern in MEASURES for path in package.glob(pattern) if path.suffix in {".py", ".yaml"}}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def read_cached(path: Path, key: str) -> dict[str, Any] | None:
    """A cached cell, None if there is none with this key."""
    try:
        measured: dict[str, Any] = reading.read_json(path)
    except (OSError, ValueError):
        return None
    return measured if isinstance(measured, dict) and measured.get("key") == key else None
