"""The shipped recipes: look them up by name, list them with their first line, copy one for editing."""

from __future__ import annotations

from pathlib import Path

from lcl_adapter import reading
from lcl_adapter.errors import RecipeError, RunError, did_you_mean
from lcl_adapter.files import write_text


def recipes_folder() -> Path:
    """``recipes/``: beside the package in a clone, inside the package in a wheel."""
    inside = Path(__file__).parent.parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent.parent / "recipes"


def shipped_recipes() -> dict[str, str]:
    """Name -> purpose (the recipe's first comment line)."""
    return {p.stem: p.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").strip() for p in sorted(recipes_folder().glob("*.yaml"))}


def find_recipe(path: str | Path) -> Path:
    """The file, or else the shipped recipe of that name, with or without ``recipes/`` and ``.yaml``.

    Raises RecipeError where there is neither.
    """
    try:
        file = reading.usable(path)
    except ValueError as error:
        raise RecipeError([str(error)]) from error
    if file.is_file():
        return file
    if kind := reading.irregular(file):
        raise RecipeError([f"{path}: {kind}; the file of a recipe is expected"])
    shipped = recipes_folder() / f"{file.stem}.yaml"
    if shipped.is_file() and str(file.parent) in {".", "recipes"}:
        return shipped
    names = list(shipped_recipes())
    raise RecipeError([f"{path}: no such file, and no shipped recipe of that name{did_you_mean(file.stem, names)}; shipped: {', '.join(names)}"])


def copy_recipe(name: str, target: Path) -> Path:
    """Copy a shipped recipe to edit. Raises RunError rather than overwrite a file."""
    source = find_recipe(name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise RunError(f"{target}: exists already; give another name with --to.")
    try:
        write_text(target, reading.read_text(source))
    except (OSError, ValueError) as error:
        raise RecipeError([f"{source}: cannot be read ({getattr(error, 'strerror', None) or error})"]) from error
    return target
