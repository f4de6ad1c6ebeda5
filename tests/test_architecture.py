"""The shape that the README draws: imports run one way, and no folder shadows a library."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lcl_adapter"
# From left to right; a module imports its own layer and those before it.
ORDER = [
    "errors", "terminal", "memory", "ranks", "files", "weights", "pocket", "layouts", "recipe", "templates", "sources", "episodes", "mixture",
    "conversations", "families", "batches", "lengths", "model", "vision", "index", "budget", "adapter", "sharding", "trainer", "plan", "predict",
    "wire", "client", "ask", "evaluate", "watch", "check",
    "deltas", "probe",
    "convert", "merge", "exchange", "describe", "serve", "report", "page", "run", "cli",
]  # fmt: skip


def layer(module: str) -> int:
    return ORDER.index(module.split(".")[1])


def imported(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lcl_adapter"):
            found += [node.module] if node.module != "lcl_adapter" else [f"lcl_adapter.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("lcl_adapter")]
    return found


MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "pocket" and path.name != "__init__.py":
        return  # the scripts that build the base stand outside the flow: nothing imports them
    for module in imported(path):
        assert layer(module) <= ORDER.index(own), f"{path.relative_to(ROOT)} imports {module}"


def test_only_tests_and_benchmarks_import_the_building_scripts() -> None:
    scripts = {p.stem for p in (PACKAGE / "pocket").glob("*.py")} - {"__init__", "made"}  # `made` draws the data that is not shipped
    for path in MODULES:
        if path.parent.name != "pocket":
            assert not {m.split(".")[2] for m in imported(path) if m.startswith("lcl_adapter.pocket.")} & scripts, path


def test_no_folder_shadows_a_library() -> None:
    assert not (ROOT / "datasets" / "__init__.py").exists()
    assert not (ROOT / "recipes" / "__init__.py").exists()


def test_the_readme_draws_every_module() -> None:
    drawn = (ROOT / "README.md").read_text(encoding="utf-8").split("## Architecture")[1].split("## ")[0]
    for name in ORDER:
        if name not in {"errors", "terminal", "files"}:
            assert f"{name}.py" in drawn or f"{name}/" in drawn or f", {name}.py" in drawn, name
