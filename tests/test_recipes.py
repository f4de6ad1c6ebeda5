"""Every shipped recipe loads, opens as a manual, and names sources that exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lcl_adapter import recipe
from lcl_adapter.adapter import read_manifest
from lcl_adapter.cli import main
from lcl_adapter.recipe.shipped import recipes_folder
from tests.conftest import paint

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


def test_own_photos_trains_on_a_users_folders(tmp_path: Path, pocket_tiny: Path) -> None:
    """The recipe as it stands, on made-up photos and a tiny base: train, measure on the classes held out."""
    for number in range(14):
        for index in range(4):
            paint(tmp_path / "photos" / f"part {number}" / f"{index}.png", (17 * number, 90, 250 - 17 * number), seed=100 * number + index)
    record = {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a part"}]}
    paint(tmp_path / "images" / "a.png", (1, 2, 3))
    (tmp_path / "vqa.json").write_text(json.dumps([record] * 5))
    run = tmp_path / "run"
    changes = [f"data.root={tmp_path}", f"base={pocket_tiny}", "precision=fp32", f"output={run}", "sources.photos.hold_out=0.4"]
    changes += ["train.max_steps=2", "train.gradient_accumulation_steps=2", "train.logging_steps=1"]
    for suite in ("2way", "shuffled-names"):
        changes += [f"evaluate.suites.{suite}.episodes=4", f"evaluate.suites.{suite}.source.hold_out=0.4"]
    result = CliRunner().invoke(main, ["train", "recipes/own-photos.yaml", *changes, "--json"])
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in json.loads(result.stdout)["suites"]] == [
        "2way-0shot-easy",
        "2way-1shot-easy",
        "2way-2shot-easy",
        "shuffled-names-easy",
    ]
    assert read_manifest(run)["shares"]["realised"]["photos"] > 0


def test_every_recipe_file_is_listed() -> None:
    assert list(recipe.shipped_recipes()) == [p.stem for p in SHIPPED]
    assert all(recipe.shipped_recipes().values())
