"""The README's commands: each one parses, names files that exist, and the cheap ones run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from lcl_adapter import recipe
from lcl_adapter.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.split("#")[0].strip()]
OURS = [c for c in COMMANDS if c.startswith("lcl-adapter ")]


def test_it_leads_with_the_two_commands() -> None:
    assert COMMANDS[:2] == ["make quickstart", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{c.split()[1]}:" in makefile for c in COMMANDS if c.startswith("make "))


@pytest.mark.parametrize("command", OURS)
def test_the_command_line_is_understood(command: str) -> None:
    """Options and arguments are parsed by click itself, without running the command."""
    words = shlex.split(command)[1:]
    here = main
    while words and words[0] in getattr(here, "commands", {}):
        here = here.commands[words.pop(0)]  # type: ignore[attr-defined, assignment]
    context = here.make_context("lcl-adapter", list(words), resilient_parsing=False)
    context.close()


@pytest.mark.parametrize("command", [c for c in OURS if "recipes/" in c])
def test_recipes_named_are_there_and_take_the_overrides(command: str) -> None:
    words = shlex.split(command)
    path = next(w for w in words if w.startswith("recipes/"))
    assert recipe.load(ROOT / path, [w for w in words if re.match(r"[a-z_.]+=", w)]).sources


def test_listing_runs() -> None:
    assert CliRunner().invoke(main, ["recipes"]).exit_code == 0


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_recipe_table_is_complete() -> None:
    for name in recipe.shipped_recipes():
        assert f"| `{name}` |" in README, name
