"""Every kind of suite, on the fixtures, with a tiny random base: its cells, its figures, and published protocols to the letter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lcl_adapter import recipe as recipes
from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.model import load_base
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.cli import main
from lcl_adapter.errors import DataError, RecipeError
from lcl_adapter.evaluate import ModelPair, build_cells, runner
from lcl_adapter.evaluate.baselines import patch_distances
from lcl_adapter.evaluate.cases import Cell
from lcl_adapter.recipe import Recipe, presets
from lcl_adapter.report.plots import defect_score
from lcl_adapter.training import trainer
from tests.conftest import paint
from tests.test_formats import FIXTURES, SOURCES, P

PAIRS = {"pairs": FIXTURES / "imagenet-lcl" / "test100_pairs.jsonl", "images": FIXTURES / "imagenet-lcl" / "images"}
SUITES: dict[str, dict[str, Any]] = {
    "imagenet-100": {"kind": "imagenet-100", **PAIRS, "shots": [0, 1, 2]},
    "isekai-10": {"kind": "isekai", "source": SOURCES["isekai"], "shots": [1, 2], "published": "isekai-10"},
    "mvtec": {"kind": "inspection", "source": SOURCES["mvtec"], "references": [0, 1, 2], "published": "mvtec"},
    "visa": {"kind": "inspection", "source": SOURCES["visa"], "references": [2], "languages": "ja"},
    "product": {"kind": "product", "source": SOURCES["manifest-csv"], "shots": [1], "episodes": 60},
    "vqa": {"kind": "vqa", "source": SOURCES["vqav2"], "rule": "vqav2", "published": "vqav2"},
    "pope": {"kind": "pope", "source": SOURCES["pope"]},
    "rec": {"kind": "rec", "source": SOURCES["shikra-rec"]},
    "locate": {"kind": "locate", "source": SOURCES["class-folder-boxes"], "shots": [1], "episodes": 8},
    "defects": {"kind": "locate", "source": SOURCES["mvtec"], "shots": [1], "episodes": 8},
    "instruct": {"kind": "instruct", "source": SOURCES["llava-json"]},
    "mine": {"kind": "lcl", "source": {"type": "class-folder", "path": P / "images", "split": "all"}, "shots": [1], "episodes": 8},
}


def with_suites(*names: str, base: str = "pocket", **more: Any) -> Recipe:
    return Recipe.model_validate(
        {"base": base, "sources": {"a": {"type": "pocket"}}, "evaluate": {"suites": {n: SUITES[n] for n in names or SUITES}}, **more}
    )


def cells(*names: str, **more: Any) -> dict[str, Cell]:
    return {c.name: c for c in build_cells(with_suites(*names), **more)}


@pytest.mark.parametrize("family", ["pocket", "llava-1.5"])
def test_every_suite_is_measured(family: str, tiny_folder: Callable[[str], Path]) -> None:
    predictor = Predictor(load_base(str(tiny_folder(family))), max_new_tokens=4)
    metrics = {}
    for cell in build_cells(with_suites(), limit=8):
        found = runner.measure(cell, ModelPair.of(predictor))
        row = found["row"]
        for side in ("base", "adapter"):
            assert 0 <= row[side]["ci95"][0] <= row[side]["value"] <= row[side]["ci95"][1] <= 1, row
        assert len(found["predictions"]) == row["n"] == len(cell.cases) <= 8
        json.dumps(found)
        metrics[cell.suite] = row["metric"]
    assert metrics == {
        "imagenet-100": "LCL's rule",
        "isekai-10": "LCL's rule",
        "mvtec": "AUROC",
        "visa": "AUROC",
        "product": "balanced accuracy",
        "vqa": "VQA accuracy",
        "pope": "accuracy",
        "rec": "IoU > 0.5",
        "locate": "IoU > 0.5",
        "defects": "IoU > 0.5",
        "instruct": "ROUGE-L",
        "mine": "accuracy",
    }


def test_lcls_test_is_followed_to_the_letter() -> None:
    """Own names in lower case, the first shots of each list, both classes asked, everything of one pair in one support set."""
    found = cells("imagenet-100")
    assert list(found) == ["imagenet-100-0shot", "imagenet-100-1shot", "imagenet-100-2shot"]
    assert len(found["imagenet-100-1shot"].cases) == 4 * 4
    for case in found["imagenet-100-2shot"].cases:
        assert case.episode is not None
        assert set(case.labels) in ({"ring", "bar"}, {"frame", "dots"})
        for example in case.episode.support:
            assert example.picture.path.stem in {f"{example.label}_{k}" for k in (0, 1)}, "the first two of the list"
        assert case.episode.queries[0].picture.path.stem.startswith(case.gold)
    shown = {tuple(e.label for e in c.episode.support) for c in found["imagenet-100-2shot"].cases if c.episode}
    assert len(shown) > 6, "shuffled"
    assert dict(found["imagenet-100-2shot"].published)["LCL 2way-weight"] == 0.71, "two shots a class are four support images in the paper"
    assert len(cells("imagenet-100", limit=6)["imagenet-100-1shot"].cases) == 6


def test_isekai_asks_each_line() -> None:
    found = cells("isekai-10")["isekai-10-2shot"]
    assert [c.gold for c in found.cases] == ["hollow ring", "circle", "hollow ring", "hollow cross", "square", "hollow cross"]
    assert dict(found.published) == {"OpenFlamingo": 0.44, "LCL mix": 0.70}


def test_inspection_shows_training_photos_and_asks_test_photos() -> None:
    found = cells("mvtec")
    for cell in found.values():
        assert len(cell.cases) == 3 * 9
        for case in cell.cases:
            assert case.episode is not None
            assert len(case.episode.support) == cell.shots
            assert all("train/good" in str(e.picture) for e in case.episode.support)
            assert "/test/" in str(case.query.picture)
            assert (case.gold == "good") == (case.truth["defect"] is None)
    assert len({c.support for c in found["mvtec-2ref"].cases}) == 3, "one support set a category, read once"
    assert dict(found["mvtec-1ref"].published)["WinCLIP+"] == 0.931
    assert cells("visa")["visa-2ref"].cases[0].labels == ("良品", "不良品")


def test_more_references_than_there_are(tmp_path: Path) -> None:
    made = with_suites("mvtec").model_copy()
    made = Recipe.model_validate({**made.model_dump(), "evaluate": {"suites": {"m": {**SUITES["mvtec"], "references": [5]}}}})
    with pytest.raises(DataError, match="has 4 good photos to show, 5 are asked"):
        list(build_cells(made))


def test_products_are_asked_in_all_three_roles() -> None:
    cell = cells("product")["product-1shot"]
    roles = [c.truth["roles"][c.gold] for c in cell.cases]
    assert {r: roles.count(r) > 5 for r in ("A", "B", "neither")} == {"A": True, "B": True, "neither": True}
    for case in cell.cases:
        assert case.episode is not None
        assert case.truth["roles"][case.episode.support[0].label] == "A"


def test_patch_distance_finds_what_is_in_no_reference(pocket_tiny: Path) -> None:
    """A query that is one of its references is at distance 0; any other is farther."""
    from dataclasses import replace

    cell = cells("mvtec")["mvtec-2ref"]
    assert cell.cases[0].episode is not None
    same = replace(cell.cases[0], query=replace(cell.cases[0].query, picture=cell.cases[0].episode.support[0].picture))
    near, far = patch_distances([same, cell.cases[5]], VisionFeatures(load_base(str(pocket_tiny))))
    assert near < 0.05 < far


def test_a_users_own_folder_is_a_suite_in_three_lines(tmp_path: Path) -> None:
    for name in ("good", "dented"):
        for k in range(5):
            paint(tmp_path / "photos" / name / f"{k}.png", (9 * k, 20, 90))
    (tmp_path / "mine.yaml").write_text(
        "base: pocket\nsources: {a: {type: pocket}}\nevaluate:\n  suites:\n"
        f"    mine:\n      kind: lcl\n      source: {{type: class-folder, path: {tmp_path / 'photos'}}}\n"
    )
    made = list(build_cells(recipes.load(tmp_path / "mine.yaml"), limit=2))
    assert [c.name for c in made] == ["mine-0shot-easy", "mine-1shot-easy", "mine-2shot-easy", "mine-4shot-easy"]


def test_suites_by_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: pocket\nsources: {a: {type: pocket}}\nevaluate: {suites: [mvtec, isekai-10, vqa]}\n")
    made = recipes.load(tmp_path / "mine.yaml", ["data.root=/data"])
    assert list(made.evaluate.suites) == ["mvtec", "isekai-10", "vqa"]
    assert made.evaluate.suites["mvtec"].source.path == Path("/data/mvtec")  # type: ignore[union-attr]
    (tmp_path / "mine.yaml").write_text(
        "base: pocket\nsources: {a: {type: pocket}}\nevaluate:\n  suites:\n    own: {preset: mvtec, references: [1], source: {path: parts}}\n"
    )
    made = recipes.load(tmp_path / "mine.yaml", ["data.root=/data"])
    assert made.evaluate.suites["own"].source.path == Path("/data/parts")  # type: ignore[union-attr]
    assert made.evaluate.suites["own"].references == [1]  # type: ignore[union-attr]
    (tmp_path / "mine.yaml").write_text("base: pocket\nsources: {a: {type: pocket}}\nevaluate: {suites: [mvtek]}\n")
    with pytest.raises(RecipeError, match=r"no suite named 'mvtek' \(did you mean 'mvtec'\?\)"):
        recipes.load(tmp_path / "mine.yaml")


def test_every_preset_is_a_suite() -> None:
    made = Recipe.model_validate({"base": "pocket", "sources": {"a": {"type": "pocket"}}, "evaluate": {"suites": list(presets())}})
    assert list(made.evaluate.suites) == list(presets())


def small(base: Path, output: Path, suites: dict[str, Any], **evaluate: Any) -> Recipe:
    return Recipe.model_validate({
        "base": str(base),
        "output": str(output),
        "adapter": {"rank": 4, "projector": True, "dropout": 0.1},
        "sources": {
            "lcl": {"type": "pocket", "shots": 1, "queries": 2},
            "parts": {**SOURCES["mvtec"], "split": "train", "held_out": ["screw"], "shots": 1, "queries": 2},
        },
        "train": {"max_steps": 4, "per_device_train_batch_size": 3, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "bucket": 1},
        "evaluate": {"suites": suites, **evaluate},
    })  # fmt: skip


def test_a_suite_by_name_is_measured_over_data_root(tmp_path: Path, pocket_tiny: Path) -> None:
    run = tmp_path / "run"
    trainer.train(small(pocket_tiny, run, {"pope": SUITES["pope"]}))
    result = CliRunner().invoke(main, ["eval", str(run), f"data.root={FIXTURES}", "--suite", "isekai-10", "--limit", "4", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["suites"]
    assert [r["name"] for r in rows][:2] == ["isekai-10-1shot", "isekai-10-2shot"]
    assert rows[0]["published"] == [{"who": "OpenFlamingo", "value": 0.46}, {"who": "LCL mix", "value": 0.68}]
    assert not (run / "report.json").exists(), "a part never takes the whole's place"
    wrong = CliRunner().invoke(main, ["eval", str(run), "--suite", "isekia-10"])
    assert wrong.exit_code == 2
    assert "did you mean 'isekai-10'?" in wrong.stderr


def test_the_gate_fails_loudly_and_keeps_the_best_that_passes(tmp_path: Path, pocket_tiny: Path) -> None:
    """A random base reads POPE at chance; an allowance of minus 101 points cannot be met, one of 101 always is."""
    parts = {**SUITES["mvtec"], "source": {**SOURCES["mvtec"], "split": "held_out", "held_out": ["screw"]}, "references": [1]}
    for allowed, code in ((-101.0, 3), (101.0, 0)):
        run = tmp_path / f"run{code}"
        made = small(pocket_tiny, run, {"pope": SUITES["pope"], "parts": parts}, keep={"pope": allowed}, every=2, during=["parts"], during_limit=6)
        recipes.save(made, tmp_path / "mine.yaml")
        result = CliRunner().invoke(main, ["train", str(tmp_path / "mine.yaml"), "--json"])
        assert result.exit_code == code, result.output
        told = json.loads((run / "watched.json").read_text())
        assert [s["step"] for s in told["steps"]] == [2, 4]
        assert set(told["steps"][0]["figures"]) == {"pope", "parts-1ref"}
        assert [s["kept"] for s in told["steps"]] == [code == 0] * 2
        assert (run / "best" / "lcl_adapter.json").exists() == (code == 0)
        assert ("THE RETENTION GATE DOES NOT PASS" in result.stderr) == (code == 3)
        assert json.loads(result.stdout)["kept"] == (code == 0)
    best = CliRunner().invoke(main, ["eval", str(tmp_path / "run0" / "best"), "--suite", "pope", "--json"])
    assert best.exit_code == 0, best.output


def test_watching_changes_nothing_of_the_training(tmp_path: Path, pocket_tiny: Path) -> None:
    from lcl_adapter.training.during import Watch

    plain, watched = (small(pocket_tiny, tmp_path / n, {"pope": SUITES["pope"]}, keep={"pope": 5}, every=1) for n in ("plain", "watched"))
    trainer.train(plain)
    trainer.train(watched, watching=lambda base, save: Watch(watched, base, save))
    one, two = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("plain", "watched"))
    assert one == two


def test_the_page_shows_curves_confusion_and_mistakes(tmp_path: Path, pocket_tiny: Path) -> None:
    from lcl_adapter.cli import commands

    run = tmp_path / "run"
    suites = {"product": SUITES["product"], "parts": {**SUITES["mvtec"], "source": {**SOURCES["mvtec"], "split": "held_out", "held_out": ["screw"]}}}
    trainer.train(small(pocket_tiny, run, suites))
    found = commands.evaluate(run)
    page = (run / "report.html").read_text()
    for words in ("Which answer for which", "Inspection by category", "balanced accuracy", "published", "WinCLIP", "Wrong answers"):
        assert words in page
    assert (run / "roc.png").stat().st_size > 5000
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    scored = [line for line in lines if line["kind"] == "inspection"]
    assert all(0 <= defect_score(line, "adapter") <= 1 for line in scored)
    card = (run / "README.md").read_text()
    assert "| source | share asked | realised | of the tokens |" in card
    assert "Published by others" in card
    tokens = json.loads((run / "lcl_adapter.json").read_text())["tokens"]
    assert tokens["lcl"]["rows"] + tokens["parts"]["rows"] == 12
    assert 0 < tokens["parts"]["learned"] < tokens["parts"]["tokens"]
    assert {r["metric"] for r in found["suites"]} == {"balanced accuracy", "AUROC"}
