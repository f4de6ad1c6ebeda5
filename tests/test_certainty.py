"""What a report says of certainty: intervals, the retention gate, checkpoints chosen on other questions, and stored cells."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from lcl_adapter.answering.predict import Reply
from lcl_adapter.errors import DataError
from lcl_adapter.evaluate import build_cells, caching, check_suites, judges, metrics, retention_of
from lcl_adapter.evaluate.cases import Case, Cell, Selection
from lcl_adapter.evaluate.metrics import RESAMPLES, Estimate
from lcl_adapter.recipe import Recipe
from lcl_adapter.report.pages import wrong_answers
from lcl_adapter.report.plots import defect_score
from lcl_adapter.report.table import retention_line
from tests.test_rules import case
from tests.test_suites import SUITES

# Intervals


def part(defective: bool, category: str = "screw") -> Case:
    return case("bad" if defective else "good", category, ("good", "bad"), {"defect": "hole" if defective else None, "good": "good"})


def scored(log_odds: float) -> Reply:
    """A reply with these log-odds of "bad"."""
    return Reply("", (-max(0.0, log_odds), min(0.0, log_odds)) if log_odds > 0 else (0.0, log_odds))


def test_one_category_is_no_certainty() -> None:
    """Its photos vary. Before, one category had an interval of no width: AUROC 0.6925, [0.6925, 0.6925]."""
    rng = np.random.default_rng(0)
    cases = [part(defective) for defective in [False] * 40 + [True] * 60]
    replies = [scored(float(rng.normal(0.7 * (c.gold == "bad")))) for c in cases]
    figures = judges.inspection_figures(cases, replies).figures
    low, high = figures["ci95"]
    assert low + 0.06 < figures["value"] < high - 0.06
    assert 0.15 < high - low < 0.3, "about 4 standard errors of an AUROC of 40 and 60 photos"


@given(st.integers(1, 4), st.lists(st.booleans(), min_size=1, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_no_interval_is_certain(groups: int, right: list[bool], data: st.DataObject) -> None:
    """Whatever the grouping: an interval contains its figure, is within its range, and has a width."""
    names = [str(data.draw(st.integers(0, groups - 1))) for _ in right]
    truth, decided = ["A" if r else "B" for r in right], data.draw(st.lists(st.sampled_from("AB"), min_size=len(right), max_size=len(right)))
    for estimate in (metrics.accuracy(right, names), metrics.balanced_accuracy(truth, decided, names)):
        low, high = estimate.interval()
        assert 0 <= low <= estimate.value <= high <= 1
        assert high - low >= min(1.0, 3 / len(right)) - 1e-9
        assert len(estimate.resampled) == RESAMPLES
        assert estimate == Estimate.from_json(json.loads(json.dumps(estimate.to_json())))
        again = estimate.minus(estimate)
        assert again.value == 0
        assert set(again.resampled) == {0.0}, "the same cases have the same resamples"
        assert again.interval(-1, 1)[0] <= -min(1.0, 3 / len(right)) + 1e-9


def test_classes_that_differ_widen_the_interval() -> None:
    """Ten classes, each all right or all wrong, say less than a hundred independent answers."""
    right = [c % 2 == 0 for c in range(10) for _ in range(10)]
    by_class = metrics.accuracy(right, [f"c{c}" for c in range(10) for _ in range(10)]).interval()
    apart = metrics.accuracy(right, [str(i) for i in range(100)]).interval()
    assert by_class[0] < apart[0] < 0.5 < apart[1] < by_class[1]


@pytest.mark.parametrize(("groups", "each", "spread"), [(1, 100, 0.0), (3, 30, 0.0), (30, 4, 0.0), (30, 10, 1.5)])
def test_intervals_contain_the_truth_as_often_as_they_say(groups: int, each: int, spread: float) -> None:
    """Simulated: classes whose accuracies differ by ``spread`` log-odds, or not at all. Resampling both levels always
    would contain it in 99 % of the samples where classes do not differ, and resampling classes alone in none with one.
    """
    rng, inside, widths, samples = np.random.default_rng(1), 0, 0.0, 120
    expected = float(np.mean(1 / (1 + np.exp(-rng.normal(1.0, spread, 10**6)))))
    errors = []
    names = np.repeat([str(g) for g in range(groups)], each).tolist()
    for _ in range(samples):
        chances = np.repeat(1 / (1 + np.exp(-rng.normal(1.0, spread, groups))), each)
        estimate = metrics.accuracy((rng.random(len(chances)) < chances).tolist(), names)
        low, high = estimate.interval()
        inside += low <= expected <= high
        widths += (high - low) / samples
        errors.append(estimate.value - expected)
    assert 0.88 < inside / samples <= 0.995
    assert widths == pytest.approx(2 * 1.96 * float(np.std(errors)), rel=0.2), "as wide as figures of other samples differ"


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=30))
@settings(deadline=None)
def test_auroc_is_scikit_learns(photos: list[tuple[bool, int]]) -> None:
    truth, scores = [t for t, _ in photos], [s for _, s in photos]
    if len(set(truth)) == 2:
        assert metrics.auroc(truth, scores) == pytest.approx(sk.roc_auc_score(truth, scores))


# Scores beyond 37 nats


def test_defects_are_ranked_however_certain_the_answers_are() -> None:
    """1 - P(good) is 0 from 37 nats on: all these photos would tie, and AUROC would be 0.5."""
    odds = [-90.0, -70.0, -55.0, -41.0, 41.0, 48.0, 60.0, 745.0, 2000.0]
    good = {-90.0, -55.0, 41.0, 60.0}
    cases = [part(value not in good) for value in odds]
    figures = judges.inspection_figures(cases, [scored(value) for value in odds]).figures
    truth = [value not in good for value in odds]
    assert figures["value"] == pytest.approx(sk.roc_auc_score(truth, odds), abs=1e-4) != 0.5
    assert figures["ap"] == pytest.approx(sk.average_precision_score(truth, odds), abs=1e-4)
    assert figures["by_defect"] == {"hole": figures["value"]}
    lines = [prediction(value, value not in good) for value in odds]
    assert [defect_score(line, "adapter") for line in lines] == odds, "the ROC curves have the same scores"


def prediction(log_odds: float, defective: bool) -> dict[str, Any]:
    scores = dict(zip(("good", "bad"), scored(log_odds).log_likelihoods, strict=True))
    gold = "bad" if defective else "good"
    return {
        "suite": "parts", "cell": "parts-1ref", "index": 0, "control": None, "class": "screw", "labels": list(scores), "gold": gold,
        "question": "?", "right": False, "picture": "a.png", "support": [["b.png", "good"]], "defect": "hole" if defective else None,
        "adapter": {"log_likelihoods": scores},
    }  # fmt: skip


def test_the_page_shows_the_most_certain_wrong_answers_first() -> None:
    odds = [38.0, 500.0, 41.0, 39.0, 800.0, 40.0]
    shown = wrong_answers([prediction(value, False) | {"index": i} for i, value in enumerate(odds)], 6)
    assert [odds[item["index"]] for item in shown] == sorted(odds, reverse=True)
    assert {item["confidence"] for item in shown} == {"(100%)"}


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=5), st.data())
def test_log_odds_are_those_of_the_probability(likely: list[float], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(likely) - 1))
    chance = Reply("", tuple(likely)).probabilities[index]
    if 1e-12 < chance < 1 - 1e-12:
        assert metrics.log_odds(likely, index) == pytest.approx(math.log(chance / (1 - chance)), abs=1e-3)


# The retention gate


def recipe(allowed: float = 1.0, **evaluate: Any) -> Recipe:
    made = {"suites": {"vqa": SUITES["vqa"], "pope": SUITES["pope"]}, "retention": {"vqa": allowed}, **evaluate}
    return Recipe.model_validate({"base": "b", "sources": {"a": {"type": "pocket"}}, "evaluate": made})


def fall(count: int, lost: int, gained: int = 0) -> Estimate:
    """Of ``count`` questions the adapter lost some that the base had, and answers some that it had not."""
    groups = [str(i) for i in range(count)]
    base = metrics.accuracy([i >= gained for i in range(count)], groups)
    return base.minus(metrics.accuracy([i < count - lost for i in range(count)], groups))


@pytest.mark.parametrize(
    ("count", "lost", "gained", "verdict"),
    [
        (2000, 0, 0, "retained"),
        (2000, 10, 5, "retained"),  # 0.25 points
        (2000, 100, 20, "lost"),  # 4 points
        (2000, 60, 30, "undecided"),  # 1.5 points, from 0.6 to 2.4
        (100, 5, 2, "undecided"),  # 3 points, but 7 questions say little
        (20, 0, 0, "undecided"),  # nothing lost among 20: up to 15 points may be
        (20, 12, 0, "lost"),
        (2000, 5, 100, "retained"),
    ],
)
def test_the_gate_is_decided_by_the_paired_interval(count: int, lost: int, gained: int, verdict: str) -> None:
    [row] = retention_of([("vqa", count, fall(count, lost, gained)), ("pope", 5, fall(5, 5))], recipe())
    assert (row["suite"], row["n"], row["fell"]) == ("vqa", count, pytest.approx(100 * (lost - gained) / count))
    low, high = row["interval"]
    assert low <= row["fell"] <= high
    assert row["verdict"] == verdict == ("lost" if low > 1 else "retained" if high <= 1 else "undecided")
    assert row["retained"] == (verdict != "lost")
    line = retention_line(row)
    assert line.startswith(f"vqa: {-row['fell']:+.1f} points against the base (95 %: {-high:+.1f} to {-low:+.1f}), 1.0 may be lost: ")
    assert line.endswith(
        {"retained": ": retained.", "lost": ": NOT RETAINED.", "undecided": f": UNDECIDED, {count} questions are too few to say."}[verdict]
    )


def test_pairs_decide_what_two_separate_intervals_cannot() -> None:
    """80 of 2000 questions lost and none gained: each figure varies by 2 points, their difference by 1."""
    groups = [str(i) for i in range(2000)]
    base, adapter = (
        metrics.accuracy([i % 2 == 0 for i in range(2000)], groups),
        metrics.accuracy([i % 2 == 0 and i >= 160 for i in range(2000)], groups),
    )
    assert adapter.interval()[1] > base.interval()[0], "the two intervals overlap"
    [row] = retention_of([("vqa", 2000, base.minus(adapter))], recipe(2.0))
    assert row["verdict"] == "lost"


def test_a_suite_of_several_cells_counts_by_their_mean() -> None:
    [row] = retention_of([("vqa", 400, fall(400, 40)), ("vqa", 400, fall(400, 0, 20))], recipe())
    assert (row["fell"], row["n"]) == (pytest.approx(2.5), 800)


# Checkpoints are chosen on other questions than those of the report


def asked(cells: list[Cell]) -> dict[str, set[Any]]:
    """What each cell asks: an episode's pictures and labels, or a question about a picture."""
    return {
        cell.name: {
            (c.query, c.gold) if c.episode is None or cell.kind == "inspection" else (c.query, c.episode.support, c.episode.labels, c.gold)
            for c in cell.cases
        }
        for cell in cells
    }


@pytest.mark.parametrize("name", list(SUITES))
def test_what_chooses_a_checkpoint_is_not_in_the_report(name: str) -> None:
    made = Recipe.model_validate(
        {"base": "b", "sources": {"a": {"type": "pocket"}}, "evaluate": {"suites": {name: SUITES[name]}, "every": 1, "during_limit": 6}}
    )
    unwatched = Recipe.model_validate({**made.model_dump(), "evaluate": {**made.evaluate.model_dump(), "every": None}})
    reported, during, everything = asked(list(build_cells(made))), asked(list(build_cells(made, 6, during=True))), asked(list(build_cells(unwatched)))
    assert set(reported) == set(during) == set(everything)
    for cell, questions in during.items():
        assert 0 < len(questions) <= 6
        assert not questions & reported[cell]
        if name not in {"product", "locate", "defects", "mine"}:  # a fixed list is divided
            assert questions | reported[cell] == everything[cell]
            assert len(reported[cell]) >= len(everything[cell]) / 2
    assert asked(list(build_cells(made, added=[name]))) == everything, "a suite that was added for one evaluation is asked in full"


def test_a_published_test_of_one_query_a_class_is_divided_by_classes() -> None:
    made = recipe(suites={"imagenet-100": {**SUITES["imagenet-100"], "queries": 1}}, retention={}, every=1, during_limit=4)
    sizes = [len(cell.cases) for during in (False, True) for cell in build_cells(made, during=during)]
    assert sizes == [2, 2, 2, 2, 2, 2]


def test_both_halves_of_an_inspection_have_good_and_defective_photos() -> None:
    made = recipe(suites={"mvtec": SUITES["mvtec"]}, retention={}, every=1, during_limit=4)
    for cells in (build_cells(made), build_cells(made, 4, during=True)):
        for cell in cells:
            assert {c.truth["defect"] is None for c in cell.cases} == {True, False}


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=30), st.integers(1, 20))
def test_at_most_half_of_each_kind_is_set_aside(kinds: list[str], count: int) -> None:
    during, reported = Selection("s", 0, during=True, set_aside=count), Selection("s", 0, set_aside=count)
    if max(map(kinds.count, kinds)) < 2:
        with pytest.raises(DataError, match="too few to choose a checkpoint by some"):
            during.of_list(kinds)
        return
    aside, rest = during.of_list(kinds), reported.of_list(kinds)
    assert sorted([*aside, *rest]) == list(range(len(kinds)))
    assert len(aside) == min(count, sum(kinds.count(kind) // 2 for kind in set(kinds)))
    assert all(sum(kinds[i] == kind for i in aside) <= kinds.count(kind) / 2 for kind in set(kinds))


def test_a_suite_of_one_question_cannot_choose_and_report() -> None:
    source = {**SUITES["pope"]["source"], "limit": 1}
    made = recipe(suites={"pope": {"kind": "pope", "source": source}}, retention={}, every=1)
    with pytest.raises(DataError, match=r"evaluate\.suites\.pope: 1 questions are too few"):
        check_suites(made, None)  # type: ignore[arg-type]


# Stored cells


def key_of(cell: Cell, models: Any = "") -> str:
    return caching.cache_key(cell, {"files": {"a": "1"}, "base_hash": "2"}, recipe(), models)


def test_a_stored_cell_is_not_used_after_the_code_or_a_library_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = next(iter(build_cells(recipe(), 3)))
    first = key_of(cell)
    assert key_of(cell) == first
    assert key_of(cell, ["nf4", "torch.bfloat16", "cuda"]) != first != key_of(cell, ["fp32", "torch.float32", "cpu"])
    assert key_of(replace(cell, cases=cell.cases[:2])) != first
    libraries = caching.versions()
    assert {"lcl-adapter", "torch", "transformers"} <= set(libraries)
    for library in libraries:
        monkeypatch.setattr(caching, "versions", lambda changed=library: {**libraries, changed: "0.0.1"})
        assert key_of(cell) != first, library
    monkeypatch.setattr(caching, "versions", lambda: libraries)
    copy = tmp_path / "lcl_adapter"
    shutil.copytree(caching.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.zip", "*.safetensors"))
    assert caching.code_hash(copy) == caching.code_hash(caching.PACKAGE), "where the package lies does not matter"
    for changed in ("evaluate/judges.py", "answering/predict.py", "data/mixture.py", "recipe/wording/phrases.yaml", "randomness.py"):
        target = copy / changed
        before = target.read_bytes()
        target.write_bytes(before + b"\n")
        caching.code_hash.cache_clear()
        monkeypatch.setattr(caching, "PACKAGE", copy)
        assert key_of(cell) != first, changed
        target.write_bytes(before)
    caching.code_hash.cache_clear()
    assert key_of(cell) == first
    (copy / "serve" / "api.py").write_text("")
    caching.code_hash.cache_clear()
    assert key_of(cell) == first, "the server measures nothing"


def test_best_is_a_step_that_passes_and_rather_one_within_the_allowance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fall of 4 points among 100 questions is no proof, but a step that fell less comes first, then the highest mean."""
    from types import SimpleNamespace

    from lcl_adapter.training import during

    groups = [str(i) for i in range(100)]
    vqa, lcl = (SimpleNamespace(name=name, suite=name, cases=groups) for name in ("vqa", "lcl"))
    steps = iter([(50, 0.6), (46, 0.9), (50, 0.7), (50, 0.65), (20, 1.0)])  # vqa's right answers of 100, and LCL's accuracy

    def estimates(right: int, accuracy: float) -> dict[str, Estimate]:
        return {"vqa": metrics.accuracy([i < right for i in range(100)], groups), "lcl": metrics.accuracy([accuracy] * 100, groups)}

    monkeypatch.setattr(during, "measure_base", lambda *_: estimates(50, 0.5))
    monkeypatch.setattr(during, "measure_adapter", lambda *_: estimates(*next(steps)))
    saved: list[int] = []
    callback = object.__new__(during.MeasureDuring)
    callback.recipe, callback.folder, callback.cells, callback.predictor = recipe(every=1), tmp_path, [vqa, lcl], None  # type: ignore[list-item, assignment]
    callback.base_estimates, callback.results = {}, {"base": {}, "best": None, "steps": []}
    callback.running = SimpleNamespace(save=lambda folder, facts: saved.append(facts["step"]), log=lambda figures: None)  # type: ignore[assignment]
    model = SimpleNamespace(eval=lambda: None, train=lambda: None)
    for step in range(1, 6):
        callback.on_step_end(None, SimpleNamespace(global_step=step, max_steps=5), None, model)
    assert [s["retention"][0]["verdict"] for s in callback.results["steps"]] == ["undecided"] * 4 + ["lost"]
    assert saved == [1, 3]
    assert during.best_of(tmp_path) == {"step": 3, "mean": 0.6, "within": True}
