"""Every shipped recipe loads, opens as a manual, and names sources that exist."""

from __future__ import annotations

import pytest

from lcl_adapter import recipe
from lcl_adapter.recipe.shipped import recipes_folder

SHIPPED = sorted(recipes_folder().glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_it_loads(path) -> None:  # type: ignore[no-untyped-def]
    assert recipe.load(path).sources


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_it_opens_as_a_manual(path) -> None:  # type: ignore[no-untyped-def]
    head = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line)
    text = "\n".join(head)
    assert f"lcl-adapter train recipes/{path.name}" in text, "the command that runs it"
    assert "emory" in text, "the memory it takes"


def test_every_recipe_file_is_listed() -> None:
    assert list(recipe.shipped_recipes()) == [p.stem for p in SHIPPED]
    assert all(recipe.shipped_recipes().values())
