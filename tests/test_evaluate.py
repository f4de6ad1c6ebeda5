"""Evaluation: rules on hand-made cases, intervals, controls, prototypes, and an evaluation that continues after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lcl_adapter.base.model import load_base
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.evaluate import build_cells, evaluate, rules, runner
from lcl_adapter.evaluate.baselines import nearest_prototype
from lcl_adapter.evaluate.cases import Cell
from lcl_adapter.evaluate.pair import ModelPair
from lcl_adapter.recipe import Recipe
from lcl_adapter.training import trainer
from tests.test_trainer import small

SUITES = {
    "2way": {"kind": "lcl", "source": {"type": "pocket", "split": "held_out"}, "shots": [0, 2], "episodes": 12},
    "shuffled": {"kind": "control", "control": "shuffled-names", "source": {"type": "pocket", "split": "held_out"}, "episodes": 40},
    "alone": {"kind": "control", "control": "no-support", "source": {"type": "pocket", "split": "held_out"}, "episodes": 12},
    "vqa": {"kind": "vqa", "source": {"type": "llava-json", "file": "pocket:vqa_eval.json", "images": "pocket:drawings.zip", "limit": 12}},
}


def with_suites(base: Path, output: Path) -> Recipe:
    made = small(base, output, max_steps=1)
    return Recipe.model_validate({**made.model_dump(mode="json", exclude_none=True), "evaluate": {"suites": SUITES, "retention": {"vqa": 1.0}}})


@pytest.mark.parametrize(
    ("text", "gold", "other", "right"),
    [
        ('there is "qxv" in the image.', "qxv", "cat", True),
        ("qxv", "qxv", "cat", True),
        ("there is cat in the image", "qxv", "cat", False),
        ("qxv or cat", "qxv", "cat", False),
        ("cattle", "cat", "dog", True),  # the rule's known flaw: a substring counts
        ("cattle", "cattle", "cat", True),
        ("", "qxv", "cat", False),
    ],
)
def test_the_lcl_rule(text: str, gold: str, other: str, right: bool) -> None:
    assert rules.lcl_rule(text, gold, [other]) is right


def test_exact_match_ignores_case_and_spaces_but_not_letters() -> None:
    assert rules.exact(" A  Cat. ", "a cat")
    assert not rules.exact("a cattle", "a cat")


def test_cells_are_the_same_episodes_every_time(pocket_tiny: Path, tmp_path: Path) -> None:
    made = with_suites(pocket_tiny, tmp_path)
    one, two = list(build_cells(made)), list(build_cells(made))
    assert one == two
    lcl = ["2way-0shot-easy", "2way-0shot-hard", "2way-2shot-easy", "2way-2shot-hard"]
    assert [c.name for c in one] == [*lcl, "shuffled-easy", "shuffled-hard", "alone-easy", "alone-hard", "vqa"]
    other = list(build_cells(made, seed=9))
    assert other[2].cases != one[2].cases
    assert [len(c.cases) for c in build_cells(made, limit=3)] == [3] * 9


def test_controls_have_an_uninformative_support_set(pocket_tiny: Path, tmp_path: Path) -> None:
    cells = {c.name: c for c in build_cells(with_suites(pocket_tiny, tmp_path))}
    assert all(not case.support for case in cells["alone-easy"].cases)
    mixed = 0
    for case in cells["shuffled-easy"].cases:
        assert case.episode is not None
        true = {e.class_index for e in case.episode.support if e.label == case.gold}
        mixed += len(true) > 1
        assert sorted(e.label for e in case.episode.support).count(case.gold) == 2
    assert 15 < mixed < 38, "two thirds of the shuffles of two and two names mix the classes"


def test_the_nearest_prototype_of_a_shown_picture_is_its_own_label(pocket_tiny: Path, tmp_path: Path) -> None:
    """A query that is one of the support pictures is nearest to itself: right with its label, wrong with any other gold label."""
    from dataclasses import replace

    base = load_base(str(pocket_tiny))
    cell = next(c for c in build_cells(with_suites(pocket_tiny, tmp_path)) if c.name == "2way-2shot-easy")
    known = []
    for case in cell.cases:
        assert case.episode is not None
        own = next(e for e in case.episode.support if e.label == case.gold)
        one_each = tuple({e.label: e for e in (*case.episode.support, own)}.values())
        known.append(replace(case, query=replace(case.query, picture=own.picture), episode=replace(case.episode, support=one_each)))
    assert nearest_prototype(known, VisionFeatures(base)) == [True] * len(cell.cases)
    mislabelled = [replace(case, gold=next(label for label in case.labels if label != case.gold)) for case in known]
    assert nearest_prototype(mislabelled, VisionFeatures(base)) == [False] * len(cell.cases)


def test_the_report_can_be_computed_from_the_predictions(pocket_tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer.train(with_suites(pocket_tiny, run))
    report = evaluate(run)
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    by_cell: dict[str, list[dict]] = {}  # type: ignore[type-arg]
    for line in lines:
        by_cell.setdefault(line["cell"], []).append(line)
    for row in report["suites"]:
        own = by_cell[row["name"]]
        assert [line["index"] for line in own] == list(range(row["n"])), "input order"
        for side in ("base", "adapter"):
            if row["kind"] == "vqa":
                right = [rules.exact(line[side]["text"], line["gold"]) for line in own]
            else:
                right = [max(line[side]["log_likelihoods"], key=line[side]["log_likelihoods"].get) == line["gold"] for line in own]
            assert row[side]["value"] == pytest.approx(sum(right) / len(right), abs=1e-4)
    vqa = next(row for row in report["suites"] if row["name"] == "vqa")
    fell = 100 * (vqa["base"]["value"] - vqa["adapter"]["value"])
    [row] = report["retention"]
    assert (row["suite"], row["n"], row["fell"], row["allowed"]) == ("vqa", 12, pytest.approx(fell, abs=0.01), 1.0)
    assert [row["interval"][1], row["interval"][0]] == pytest.approx([-100 * v for v in vqa["difference"]["ci95"]], abs=0.02)


def test_an_interrupted_evaluation_continues(pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    trainer.train(with_suites(pocket_tiny, run))
    measure_cell = runner.measure_cell
    measured: list[str] = []

    def until_the_third(cell: Cell, pair: ModelPair) -> Any:
        if len(measured) == 3:
            raise KeyboardInterrupt
        return counted(cell, pair)

    def counted(cell: Cell, pair: ModelPair) -> Any:
        measured.append(cell.name)
        return measure_cell(cell, pair)

    monkeypatch.setattr(runner, "measure_cell", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run)
    assert not (run / "report.json").exists()
    monkeypatch.setattr(runner, "measure_cell", counted)
    resumed = evaluate(run)
    assert len(measured) == len(set(measured)) == 9, "no cell is measured twice"
    monkeypatch.setattr(runner, "measure_cell", measure_cell)
    assert evaluate(run, fresh=True) == resumed
