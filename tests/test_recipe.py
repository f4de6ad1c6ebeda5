"""Recipes: every fault at once, each with its place and a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lcl_adapter import recipe
from lcl_adapter.errors import RecipeError, RunError
from lcl_adapter.recipe.shipped import copy_recipe, find_recipe, recipes_folder

GOOD = """\
base: pocket
sources:
  lcl: {type: pocket, split: train, shots: [1, 2]}
train:
  max_steps: 5
"""


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def faults(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipe.load(path, overrides)
    return list(caught.value.faults)


def test_all_faults_together_with_file_and_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "base: pocket\nprecison: fp32\nadapter: {rnk: 8, dropout: 2.0}\nsources:\n  lcl:\n    type: pocket\n    shtos: 2\n    shots: many\n"
        "train:\n  max_steps: -1\n  learning_rat: 1e-3\n",
    )
    found = faults(path)
    assert len(found) == 7
    together = "\n".join(found)
    for place, part in [
        ("line 2", "'precison' (did you mean 'precision'?)"),
        ("line 3", "'adapter.rnk' (did you mean 'rank'?)"),
        ("line 3", "'adapter.dropout'"),
        ("line 7", "'sources.lcl.shtos' (did you mean 'shots'?)"),
        ("line 8", "'sources.lcl.shots"),
        ("line 10", "'train.max_steps'"),
        ("line 11", "'train.learning_rat' (did you mean 'learning_rate'?)"),
    ]:
        assert any(f"{path}, {place}:" in fault and part in fault for fault in found), together


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sources: {lcl: {type: pocket}}", "key 'base' is missing"),
        ("base: pocket\nsources: {}", "sources"),
        ("base: pocket\nsources: {a: {type: poket}}", "did you mean 'pocket'?"),
        ("base: pocket\nsources: {a: {split: train}}", "needs a `type`"),
        ("base: pocket\nsources: {a: {type: pocket, policy: 2way-weight, ways: 3}}", "has 2 ways"),
        ("base: pocket\nsources: {a: {type: pocket, policy: n-ways}}", "did you mean 'n-way'?"),
        ("base: pocket\nsources: {a: {type: pocket, ways: 1}}", "below 2"),
        ("base: pocket\nsources: {a: {type: pocket, share: 0}}", "all shares are 0"),
        ("base: pocket\nsources: {a: {type: pocket, share: -1}}", "greater than or equal to 0"),
        ("base: pocket\nbase: other\nsources: {a: {type: pocket}}", "written twice"),
        ("base: pocket\nsources: {a: {type: pocket}}\ntrain: {feature_cache: 0MB}", "no amount of memory"),
        ("- a\n- b\n", "a mapping of keys"),
        ("base: [unclosed", "not YAML"),
        ("base: pocket\nsources: {a: {type: pocket}}\nevaluate: {keep: {vqa: 1}}", "no suite; there are none"),
    ],
)
def test_each_kind_of_fault(tmp_path: Path, text: str, said: str) -> None:
    assert said in "\n".join(faults(write(tmp_path, text)))


def test_a_recipe_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("base: café".encode("latin-1"))
    assert "not UTF-8" in faults(path)[0]


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    read = recipe.load(path, ["train.max_steps=7", "sources.lcl.shots=[4]", "train.learning_rate=1e-3", "adapter.projector=true"])
    assert (read.train.max_steps, read.train.learning_rate, read.adapter.projector) == (7, 1e-3, True)
    assert read.sources["lcl"].shots == [4]  # type: ignore[union-attr]
    assert "override 'train.max_stps=7'" in faults(path, "train.max_stps=7")[0]
    assert "key=value" in faults(path, "nonsense")[0]
    assert "no keys below it" in faults(path, "base.x=1")[0]


def test_extends_merges_and_keeps_places(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "under.yaml")
    over = write(tmp_path, "extends: under.yaml\ntrain: {max_steps: 9}\n", "over.yaml")
    read = recipe.load(over)
    assert read.train.max_steps == 9
    assert "lcl" in read.sources
    bad = write(tmp_path, "extends: under.yaml\ntrain:\n  max_steps: none\n", "bad.yaml")
    assert f"{bad}, line 3" in faults(bad)[0]


def test_extends_in_a_circle(tmp_path: Path) -> None:
    one = write(tmp_path, "extends: two.yaml\n", "one.yaml")
    write(tmp_path, "extends: one.yaml\n", "two.yaml")
    assert "in a circle: one.yaml -> two.yaml -> one.yaml" in faults(one)[0]
    itself = write(tmp_path, "extends: self.yaml\n", "self.yaml")
    assert "in a circle" in faults(itself)[0]


def test_no_such_file_names_what_there_is() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'pocket'\?"):
        recipe.load("recipes/pockte.yaml")


def test_the_resolved_recipe_is_equal_when_loaded_again(tmp_path: Path) -> None:
    read = recipe.load(find_recipe("pocket"), ["train.max_steps=3"])
    recipe.save(read, tmp_path / "resolved.yaml")
    assert recipe.load(tmp_path / "resolved.yaml") == read


def test_copy(tmp_path: Path) -> None:
    made = copy_recipe("pocket", tmp_path)
    assert made.read_text() == (recipes_folder() / "pocket.yaml").read_text()
    with pytest.raises(RunError, match="exists already"):
        copy_recipe("pocket", tmp_path)


def test_saved_yaml_is_plain(tmp_path: Path) -> None:
    recipe.save(recipe.load(write(tmp_path, GOOD)), tmp_path / "r.yaml")
    assert yaml.safe_load((tmp_path / "r.yaml").read_text())["base"] == "pocket"
