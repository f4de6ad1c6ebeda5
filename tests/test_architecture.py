"""The shape that the README draws: imports run one way, from room to room; nothing goes in a circle; no folder shadows a library."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lcl_adapter"

# As the data flows: a room imports itself and the rooms before it.
ORDER = (
    "errors", "terminal", "amounts", "reading", "files", "devices", "processes", "randomness", "pocket", "packaged", "photo", "recipe", "data",
    "base", "answering", "evaluate",
    "training", "memory", "checkpoints", "report", "serve", "page", "cli",
)  # fmt: skip


def imports(package: Path) -> dict[str, set[str]]:
    """Module -> the package's own modules that it imports anywhere in its code; a name out of a module counts as the module."""
    files = {".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in package.rglob("*.py")}

    def named(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (inner if (inner := f"{node.module}.{alias.name}") in files else node.module for alias in node.names)

    trees = {module: ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for module, path in files.items()}
    return {module: {name for node in nodes for name in named(node) if name in files} - {module} for module, nodes in trees.items()}


def against_the_order(graph: dict[str, set[str]], order: tuple[str, ...] = ORDER) -> list[str]:
    """Every import from a room that comes later, in words. ``__init__`` and ``__main__`` are the door: they may open any room."""
    room = {module: module.split(".")[1] for module in graph if "." in module and not module.endswith(".__main__")}
    unknown = [f"{module} is in no room of the order" for module in room if room[module] not in order]
    inner = {module: [other for other in imported if other in room] for module, imported in graph.items() if module in room}
    return unknown or [f"{m} imports {o}" for m, others in inner.items() for o in others if order.index(room[o]) > order.index(room[m])]


GRAPH = imports(PACKAGE)


def test_imports_run_one_way() -> None:
    assert not against_the_order(GRAPH)


def test_no_imports_in_a_circle() -> None:
    # A folder's __init__ offers what its files define; the circle that matters is one of files.
    files = {module: {other for other in imported if f"{module}.".startswith(f"{other}.") is False} for module, imported in GRAPH.items()}
    TopologicalSorter(files).prepare()


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / "thing" / (name.replace("_in_", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "thing"


def test_an_import_against_the_order_is_found(tmp_path: Path) -> None:
    package = write(tmp_path, data_in_pools="from thing.serve import api\n", serve_in_api="")
    assert against_the_order(imports(package), ("data", "serve")) == ["thing.data.pools imports thing.serve.api"]
    assert not against_the_order(imports(package), ("serve", "data"))
    assert against_the_order(imports(package), ("serve",)) == ["thing.data.pools is in no room of the order"]


def test_a_circle_is_found(tmp_path: Path) -> None:
    package = write(tmp_path, data_in_a="import thing.data.b\n", data_in_b="def f():\n    from thing.data import a\n")
    with pytest.raises(CycleError):
        TopologicalSorter(imports(package)).prepare()


def test_the_building_scripts_stand_outside() -> None:
    for path in PACKAGE.rglob("*.py"):
        modules = [node.module or "" for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
        assert not [m for m in modules if m.split(".")[0] in {"tools", "tests", "benchmarks", "interop"}], path


def test_no_folder_shadows_a_library() -> None:
    assert not (ROOT / "datasets" / "__init__.py").exists()
    assert not (ROOT / "recipes" / "__init__.py").exists()


def test_the_readme_draws_every_room_and_no_other() -> None:
    drawn = (ROOT / "README.md").read_text(encoding="utf-8").split("## Architecture")[1].split("## ")[0]
    inside = drawn.split("lcl_adapter/\n")[1].split("\n    recipes/")[0]
    rooms = [line.strip().split("  ")[0] for line in inside.splitlines() if re.match(r" {6}\S", line)]
    entries = [name for room in rooms for name in room.split(", ")]
    assert {entry.rstrip("/").removesuffix(".py") for entry in entries} == set(ORDER)


def test_files_stay_readable() -> None:
    """A file that grows past 400 lines becomes a folder."""
    long = {str(p.relative_to(ROOT)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text(encoding="utf-8").splitlines())) > 430}
    assert not long
