"""Recipes: every fault at once, each with its place and a remedy."""

from __future__ import annotations

import pickle
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
    messages = faults(path)
    assert len(messages) == 7
    together = "\n".join(messages)
    for place, part in [
        ("line 2", "'precison' (did you mean 'precision'?)"),
        ("line 3", "'adapter.rnk' (did you mean 'rank'?)"),
        ("line 3", "'adapter.dropout'"),
        ("line 7", "'sources.lcl.shtos' (did you mean 'shots'?)"),
        ("line 8", "'sources.lcl.shots"),
        ("line 10", "'train.max_steps'"),
        ("line 11", "'train.learning_rat' (did you mean 'learning_rate'?)"),
    ]:
        assert any(f"{path}, {place}:" in fault and part in fault for fault in messages), together


@pytest.mark.parametrize(
    ("text", "message"),
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
        ("base: pocket\nsources: {a: {type: pocket}}\nevaluate: {retention: {vqa: 1}}", "no suite; there are none"),
    ],
)
def test_each_kind_of_fault(tmp_path: Path, text: str, message: str) -> None:
    assert message in "\n".join(faults(write(tmp_path, text)))


def test_the_error_can_be_sent_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(RecipeError(["line 1: this", "line 2: that"])))
    assert error.faults == ("line 1: this", "line 2: that")
    assert str(error) == str(RecipeError(error.faults))


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


def test_extends_merges_values_and_remembers_places(tmp_path: Path) -> None:
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


MANIFEST = "{type: manifest, file: f.csv, images: i, columns: {image: image, class: class, %s: artist}}"


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("evaluate.keep", "evaluate.retention", "evaluate:\n  suites: {vqa: {preset: vqa}}\n  KEY: {vqa: 1.5}\n"),
        ("sources.a.other_hands", "sources.a.other_artists", "sources:\n  a:\n    type: pocket\n    KEY: false\n"),
        ("sources.a.columns.hand", "sources.a.columns.artist", f"sources:\n  a: {MANIFEST % 'KEY'}\n"),
        ("sources.a.keep", "sources.a.cache_size", "sources:\n  a:\n    type: shards\n    path: s\n    KEY: 5GB\n"),
        (
            "evaluate.suites.s.source.columns.hand",
            "evaluate.suites.s.source.columns.artist",
            f"evaluate:\n  suites:\n    s: {{kind: lcl, source: {MANIFEST % 'KEY'}}}\n",
        ),
        (
            "evaluate.suites.s.source.keep",
            "evaluate.suites.s.source.cache_size",
            "evaluate:\n  suites:\n    s: {kind: vqa, source: {type: shards, path: s, KEY: 5GB}}\n",
        ),
    ],
)
def test_a_renamed_key_is_still_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, text: str) -> None:
    """In a file, in a run's saved recipe, and as an override; with a note that names the new key, once."""
    text = f"base: pocket\n{text}" + ("" if "sources" in text.split(chr(10))[0] else "sources: {b: {type: pocket}}\n")
    old_name, new_name = old.split(".")[-1], new.split(".")[-1]
    now = recipe.load(write(tmp_path, text.replace("KEY", new_name), "now.yaml"))
    assert "called" not in capsys.readouterr().err
    before = write(tmp_path, text.replace("KEY", old_name), "before.yaml")
    assert recipe.load(before) == now
    line = next(n for n, written in enumerate(before.read_text().splitlines(), 1) if f"{old_name}:" in written)
    assert capsys.readouterr().err == f"{before}, line {line}: the key `{old}` is called `{new}` now; the old name is still read\n"
    recipe.load(before, resolved=True)
    assert not capsys.readouterr().err, "the note is printed once"
    recipe.save(now, tmp_path / "saved.yaml")
    (tmp_path / "saved.yaml").write_text((tmp_path / "saved.yaml").read_text().replace(f"{new_name}:", f"{old_name}:"))
    assert recipe.load(tmp_path / "saved.yaml", resolved=True) == now, "a run folder of an earlier version"
    capsys.readouterr()
    assert recipe.load(before, [f"{old}=null"]) == recipe.load(tmp_path / "now.yaml", [f"{new}=null"])
    assert f"override '{old}=null': the key `{old}` is called `{new}` now" in capsys.readouterr().err
    both = write(tmp_path, text.replace("KEY", new_name), "both.yaml")
    assert f"override '{old}=x': `{old}` is the old name of `{new}`, and both are given" in "\n".join(faults(both, f"{new}=x", f"{old}=x"))


def test_an_old_key_beside_its_new_name_is_a_fault_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "evaluate:\n  suites: {vqa: {preset: vqa}}\n  retention: {vqa: 1}\n  keep: {vqa: 2}\n  evry: 3\n")
    messages = faults(path)
    assert messages[0] == f"{path}, line 9: `evaluate.keep` is the old name of `evaluate.retention`, and both are given; leave `evaluate.keep` out"
    assert "line 10: unknown key 'evaluate.evry'" in messages[1], "with the other faults"


def test_a_fault_below_an_old_key_has_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "evaluate:\n  suites: {vqa: {preset: vqa}}\n  keep:\n    vqa: much\n")
    assert faults(path)[0].startswith(f"{path}, line 9: evaluate.retention.vqa: 'much' is neither points")


def test_old_and_new_names_meet_where_recipes_extend_each_other(tmp_path: Path) -> None:
    write(tmp_path, GOOD + "evaluate: {suites: {vqa: {preset: vqa}, rec: {preset: rec}}, keep: {vqa: 1}}\n", "under.yaml")
    over = write(tmp_path, "extends: under.yaml\nevaluate: {retention: {rec: 2}}\n", "over.yaml")
    assert recipe.load(over).evaluate.retention == {"vqa": 1, "rec": 2}
    assert recipe.load(over, ["evaluate.keep.vqa=5", "evaluate.keep.rec=null"]).evaluate.retention == {"vqa": 5}
    assert recipe.load(over, ["evaluate={keep: {rec: 3}, suites: {rec: {preset: rec}}}"]).evaluate.retention == {"rec": 3}
    assert recipe.load(over, ["evaluate.keep=null"]).evaluate.retention == {}
