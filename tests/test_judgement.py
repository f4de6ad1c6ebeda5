"""Judgements by model and tower: the evidence, the weights and how they are fitted, in evaluation and in ``ask``."""

from __future__ import annotations

import json
import math
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from lcl_adapter.answering.api_types import ClassifyIn
from lcl_adapter.answering.ask import ask_model
from lcl_adapter.answering.client.messages import image_of
from lcl_adapter.answering.decisions import ChoiceAnswer, DecisionIn
from lcl_adapter.answering.judgement import JUDGES, Evidence, TowerEvidence, Weighing, Weights, familiarity, log_softmax, read_weighing
from lcl_adapter.answering.predict import Reply
from lcl_adapter.base.adapter import MANIFEST, read_manifest
from lcl_adapter.base.model import load_base
from lcl_adapter.base.prototypes import class_means, patch_distances, patch_statistics
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.tower_space import DIRECTIONS, TowerSpace
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.cli import commands, main
from lcl_adapter.data.conversations import Turn, support_turns
from lcl_adapter.data.episodes import Episode, Example, LearnedAnswers
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import Picture, open_reader, read_class_folders
from lcl_adapter.data.sources.held_out import split_of
from lcl_adapter.data.sources.images import read_bytes
from lcl_adapter.data.sources.mvtec import Mvtec
from lcl_adapter.data.sources.parts import categories_of_split
from lcl_adapter.data.sources.visa import Visa
from lcl_adapter.errors import AdapterError, DataError, RecipeError, RequestError
from lcl_adapter.evaluate import check_held_out, with_enough_classes
from lcl_adapter.evaluate.cases import Case
from lcl_adapter.evaluate.metrics import calibration_error
from lcl_adapter.evaluate.suites import validation_cells
from lcl_adapter.evaluate.weighing import Weighed, fit, fit_familiar
from lcl_adapter.files import write_json
from lcl_adapter.recipe import Recipe, save
from lcl_adapter.serve.adapters import identity_of
from lcl_adapter.serve.decisions import decide
from lcl_adapter.serve.engine import Engine
from lcl_adapter.serve.jobs import Job
from lcl_adapter.serve.service import Service
from lcl_adapter.serve.store import Store
from lcl_adapter.training import preflight
from tests.conftest import paint
from tests.test_formats import FIXTURES
from tests.test_merge import adapter_on

SHOWN = Evidence(True, 0.5)
scores = st.floats(-50, 50)


@given(st.lists(scores, min_size=1, max_size=6))
def test_scores_become_probabilities_in_the_same_order(values: list[float]) -> None:
    logs = log_softmax(values)
    assert sum(map(math.exp, logs)) == pytest.approx(1)
    assert np.allclose(np.subtract(logs, logs[0]), np.subtract(values, values[0]))


@given(scores, st.floats(-1, 1), st.floats(0, 30))
def test_a_judge_counts_only_its_own_evidence(likely: float, cosine: float, distance: float) -> None:
    weights = Weights(2.0, 3.0, 0.5, unshown=7.0)
    shown, unshown = Evidence(True, cosine, distance), Evidence(False)
    assert weights.score(likely, shown, "model") == weights.score(likely, unshown, "model") == 2 * likely
    assert weights.score(likely, shown, "tower") == pytest.approx(3 * cosine - distance / 2)
    assert weights.score(likely, unshown, "tower") == 7
    by_shots = replace(weights, unshown_by_shots=1.5)
    assert by_shots.score(likely, Evidence(False, shots=4), "tower") == pytest.approx(7 + 1.5 * math.log(4))
    assert by_shots.score(likely, replace(shown, shots=4), "tower") == pytest.approx(3 * cosine - distance / 2)
    for evidence in (shown, unshown):
        both = weights.score(likely, evidence, "both")
        assert both == pytest.approx(weights.score(likely, evidence, "model") + weights.score(likely, evidence, "tower"))


def test_weights_depend_on_how_many_labels_are_shown() -> None:
    several, single = Weights(1, 1), Weights(1, 2)
    weighing = Weighing(several, single, (5, 6))
    assert weighing.of([SHOWN, SHOWN, Evidence(False)]) is several
    assert weighing.of([SHOWN, Evidence(False)]) is single
    assert weighing.of([Evidence(False)] * 2) is None
    assert weighing.scores((0.0, 0.0), [Evidence(False)] * 2) is None
    assert Weighing(several).scores((0.0, 0.0), [SHOWN, Evidence(False)]) is None, "no weights were fitted where one label is shown"
    assert Weighing.from_json(json.loads(json.dumps(weighing.to_json()))) == weighing


# Fitting


def questions(model: float, tower: float, count: int = 600, labels: int = 2, seed: int = 0) -> list[Weighed]:
    """Questions in which the right label's evidence is higher by so many standard deviations."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(count):
        right = int(rng.integers(labels))
        likely, cosines = rng.normal(size=labels), 0.1 * rng.normal(size=labels)
        likely[right] += model
        cosines[right] += 0.1 * tower
        drawn.append(Weighed(tuple(likely), tuple(Evidence(True, float(c)) for c in cosines), right))
    return drawn


def accuracy(drawn: list[Weighed], weighing: Weighing, judge: Any) -> float:
    decided = [np.argmax(weighing.scores(q.log_likelihoods, q.evidence, judge)) for q in drawn]
    return float(np.mean([d == q.right for d, q in zip(decided, drawn, strict=True)]))


@pytest.mark.parametrize(("model", "tower"), [(0.0, 3.0), (3.0, 0.0), (1.5, 1.5)])
def test_both_are_no_worse_than_the_better_one(model: float, tower: float) -> None:
    weighing, new = fit(questions(model, tower)), questions(model, tower, 3000, seed=1)
    figures = {judge: accuracy(new, weighing, judge) for judge in JUDGES}
    assert figures["both"] >= max(figures["model"], figures["tower"]) - 0.005
    if model and tower:
        assert figures["both"] > max(figures["model"], figures["tower"]) + 0.03, "each knows what the other does not"
    certainty = [max(map(math.exp, weighing.scores(q.log_likelihoods, q.evidence) or ())) for q in new]
    right = [bool(np.argmax(weighing.scores(q.log_likelihoods, q.evidence)) == q.right) for q in new]
    assert calibration_error(certainty, right) < 0.05


def test_a_label_without_photos_is_the_answer_where_none_is_alike() -> None:
    rng = np.random.default_rng(2)

    def drawn(count: int) -> list[Weighed]:
        made = []
        for _ in range(count):
            known = bool(rng.random() < 0.5)
            cosine = rng.normal(0.7 if known else 0.3, 0.08)
            made.append(Weighed((0.0, 0.0), (Evidence(True, cosine), Evidence(False)), 0 if known else 1))
        return made

    weighing = fit(drawn(500))
    assert weighing.several is None
    assert weighing.fitted_on == (0, 500)
    assert weighing.single is not None
    assert weighing.single.unshown / weighing.single.likeness == pytest.approx(0.5, abs=0.03), "between the two means"
    assert accuracy(drawn(1000), weighing, "both") > 0.98


def test_the_threshold_of_neither_grows_with_the_photos() -> None:
    """With more photos, those of their label are more alike to them, and so are strangers."""
    rng = np.random.default_rng(3)

    def drawn(count: int, shots: int) -> list[Weighed]:
        made = []
        for _ in range(count):
            known = bool(rng.random() < 0.5)
            cosine = rng.normal(0.3 + 0.1 * math.log(shots) + (0.2 if known else 0.0), 0.1)
            made.append(Weighed((0.0, 0.0), (Evidence(True, cosine, shots=shots), Evidence(False, shots=shots)), 0 if known else 1))
        return made

    weighing = fit([question for shots in (1, 2, 8) for question in drawn(600, shots)])
    assert weighing.single is not None
    assert weighing.single.unshown_by_shots / weighing.single.likeness == pytest.approx(0.1, abs=0.03)
    assert Weighing.from_json(json.loads(json.dumps(weighing.to_json()))) == weighing
    earlier = {name: value for name, value in weighing.to_json()["single"].items() if name != "unshown_by_shots"}
    assert Weighing.from_json({"single": earlier}).single == replace(weighing.single, unshown_by_shots=0.0), "a manifest before 0.5"
    for shots in (1, 2, 8):
        new = drawn(2000, shots)
        said = np.mean([np.argmax(weighing.scores(q.log_likelihoods, q.evidence) or ()) for q in new])
        assert said == pytest.approx(0.5, abs=0.05), "as often as it is right"


def test_few_questions_that_are_all_right_leave_the_weights_finite() -> None:
    weighing = fit(questions(30.0, 30.0, count=3))
    assert weighing.several is not None
    assert 0.1 < weighing.several.model < 10
    assert 1 < weighing.several.likeness < 100
    assert fit([]) == Weighing()


def test_calibration_error() -> None:
    assert calibration_error([0.95] * 20, [True] * 19 + [False]) == pytest.approx(0)
    assert calibration_error([1.0, 1.0, 0.55, 0.55], [False, True, True, True]) == pytest.approx(0.5 * 0.5 + 0.5 * 0.45)


# Evidence


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of photos of one colour each."""
    for number, (name, colour) in enumerate({"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}.items()):
        for photo in range(4):
            paint(tmp_path / "photos" / name / f"{photo}.png", colour, seed=10 * number + photo)
    return tmp_path / "photos"


def test_evidence_is_the_cosine_with_a_labels_mean(photos: Path, pocket_tiny: Path) -> None:
    vision = VisionFeatures(load_base(str(pocket_tiny)))
    pictures = {name: [Picture(photos / name / f"{n}.png") for n in range(4)] for name in ("red", "green", "blue")}
    features = [vision.mean_patches(own) for own in pictures.values()]
    tower = TowerEvidence(vision, TowerSpace.fit(torch.cat(features), features))
    shown = tuple((p, name) for name in ("red", "green") for p in pictures[name][:2])
    queries = [pictures["green"][2], pictures["red"][3]]
    rows = tower.of(shown, queries, ("neither", "green", "red"))
    vectors = tower.vectors([p for p, _ in shown])
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4))
    expected = tower.vectors(queries) @ class_means(vectors, [0, 0, 1, 1]).T
    for row, (red, green) in zip(rows, expected.tolist(), strict=True):
        assert row == [Evidence(False, shots=2), *(Evidence(True, pytest.approx(cosine), 0.0, 2) for cosine in (green, red))]
    assert rows[0][1].likeness > rows[0][2].likeness
    assert rows[1][2].likeness > rows[1][1].likeness
    assert tower.of(shown[::-1], queries, ("neither", "green", "red"))[0][1].likeness == pytest.approx(rows[0][1].likeness, abs=1e-5)


def test_evidence_of_one_shown_label_has_the_distance_of_patches(photos: Path, pocket_tiny: Path) -> None:
    vision = VisionFeatures(load_base(str(pocket_tiny)))
    references = [Picture(photos / "red" / f"{n}.png") for n in range(2)]
    queries = [Picture(photos / "red" / "3.png"), Picture(photos / "blue" / "0.png")]
    rows = TowerEvidence(vision).of(tuple((p, "good") for p in references), queries, ("good", "defective"))
    assert [row[0].distance for row in rows] == pytest.approx(patch_distances(references, queries, vision))
    space = TowerSpace.fit(vision.mean_patches(references + queries), patches=patch_statistics(references + queries, vision))
    nearest = torch.cdist(space.limited_patches(vision.patches(queries)), space.limited_patches(vision.patches(references)).flatten(0, 1)).amin(2)
    rows = TowerEvidence(vision, space).of(tuple((p, "good") for p in references), queries, ("good", "defective"))
    assert [row[0].distance for row in rows] == pytest.approx(nearest.amax(1).tolist(), rel=1e-4), "on one scale, however few are shown"
    assert rows[1][0].distance > rows[0][0].distance
    assert [row[1] for row in rows] == [Evidence(False, shots=2)] * 2
    assert TowerEvidence(vision).of((), queries, ("good", "defective")) == [[Evidence(False)] * 2] * 2


def case_of(own: list[Picture], other: list[Picture], query: Picture, group: str, gold: str = "own") -> Case:
    support = tuple(
        Example(picture, label, index) for index, (label, pictures) in enumerate((("own", own), ("other", other))) for picture in pictures
    )
    episode = Episode(support, (Example(query, gold, 0),), ("own", "other"), LearnedAnswers.QUERY, "test")
    return Case((), Turn("user", "?", query), ("own", "other"), ("own", "other"), gold, group, episode)


def test_the_least_familiar_photos_of_validation_classes_are_a_bound(photos: Path, pocket_tiny: Path) -> None:
    """What a second photo adds is fitted within each class: classes with many photos are not the ones with few."""
    vision = VisionFeatures(load_base(str(pocket_tiny)))
    pictures = {name: [Picture(photos / name / f"{n}.png") for n in range(4)] for name in ("red", "green", "blue")}
    tower = TowerEvidence(vision, TowerSpace.fit(torch.cat([vision.mean_patches(own) for own in pictures.values()])))
    names = list(pictures)
    cases, familiar = [], []
    for place, name in enumerate(names):
        other = pictures[names[place - 1]][:2]
        for shots in (1, 2) if name != "blue" else (1,):
            own, query = pictures[name][:shots], pictures[name][3]
            cases.append(case_of(own, other, query, name))
            familiar.append(familiarity((tower.vectors(own) @ tower.vectors([query])[0]).tolist()))
    neither = replace(cases[0], gold="neither")
    least = fit_familiar([*cases, neither, replace(cases[0], episode=None)], tower)
    assert least is not None
    assert least.fitted_on == 5
    gains = [familiar[1] - familiar[0], familiar[3] - familiar[2]]
    assert least.by_shots == pytest.approx(max(0, sum(gains) / 2 / math.log(2)), abs=1e-6)
    at_one = [value - least.by_shots * math.log(shots) for value, shots in zip(familiar, (1, 2, 1, 2, 1), strict=True)]
    assert min(at_one) <= least.with_one <= sorted(at_one)[1]
    assert least.of(2) == pytest.approx(least.with_one + least.by_shots * math.log(2))
    assert fit_familiar([neither], tower) is None
    weighing = Weighing(Weights(1, 2), least_familiar=least)
    assert Weighing.from_json(json.loads(json.dumps(weighing.to_json()))) == weighing


# In a run

POCKET = {"type": "pocket", "split": "held_out"}


def made(base: Path, output: Path, photos: Path, **evaluate: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "base": str(base), "output": str(output), "wording": "short",
            "sources": {"lcl": {"type": "pocket", "split": "train"}},
            "evaluate": {
                "suites": {"2way": {"kind": "lcl", "source": POCKET, "shots": [1, 0], "neighbours": "easy", "episodes": 12}},
                "validation": {"new": {"kind": "lcl", "source": {"type": "class-folder", "path": str(photos)}, "shots": [1], "episodes": 16}},
                **evaluate,
            },
        }
    )  # fmt: skip


@pytest.fixture
def run(pocket_tiny: Path, photos: Path, tmp_path: Path) -> Path:
    """An adapter with a recipe that has a validation suite. It is not trained."""
    folder = adapter_on(pocket_tiny, tmp_path / "run")
    manifest = read_manifest(folder)
    write_json(folder / MANIFEST, {**manifest, "imported_from": "a test"})
    save(made(pocket_tiny, folder, photos), folder / "recipe.yaml")
    return folder


def test_an_evaluation_fits_the_weights_once_and_shows_all_judges(run: Path) -> None:
    rows = {row["name"]: row for row in commands.evaluate(run)["suites"]}
    shown, unshown = rows["2way-1shot-easy"], rows["2way-0shot-easy"]
    assert "both" not in unshown, "nothing is shown, so the tower has no evidence"
    assert 0 <= shown["both"]["value"] <= 1
    assert 0 <= shown["both"]["calibration_error"] <= 1
    assert shown["both"]["against"] in {"model", "tower"}
    better = max(shown["adapter"]["value"], shown["tower"]["value"])
    assert shown["both"]["gain"]["value"] == pytest.approx(shown["both"]["value"] - better, abs=1e-3)
    weighing, space = read_weighing(run, read_manifest(run)) or (Weighing(), TowerSpace(torch.empty(0)))
    assert weighing.fitted_on == (16, 0)
    assert len(space.statistics) == 2
    assert 1 <= len(space.directions) <= DIRECTIONS, "what varies within the classes that were trained on"
    line = next(json.loads(text) for text in (run / "predictions.jsonl").read_text().splitlines())
    assert sum(map(math.exp, line["both"].values())) == pytest.approx(1, abs=1e-3)
    before = (run / MANIFEST).read_bytes()
    commands.evaluate(run)
    assert (run / MANIFEST).read_bytes() == before
    for name in ("report.html", "README.md"):
        assert "model and tower" in (run / name).read_text()


def test_statistics_that_are_missing_or_changed_are_refused(run: Path) -> None:
    commands.evaluate(run)
    (run / "tower.safetensors").write_bytes(b"other")
    with pytest.raises(AdapterError, match=r"tower\.safetensors: missing, or not the file that was saved"):
        read_weighing(run, read_manifest(run))


def test_asking_uses_both_where_the_adapter_has_weights(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = paint(tmp_path / "query.png", (60, 180, 60), seed=99)
    assert ask_model(photos, [query], adapter=run).result["judge"] == "model"
    with pytest.raises(AdapterError, match="has no weights for `judge: both`"):
        ask_model(photos, [query], adapter=run, judge="both")
    commands.evaluate(run)
    judged = {judge: ask_model(photos, [query], adapter=run, judge=judge) for judge in JUDGES}
    assert ask_model(photos, [query], adapter=run).answers == judged["both"].answers
    row = judged["both"].answers[0]
    assert sum(row["scores"].values()) == pytest.approx(1)
    assert row["model"]["label"] == judged["model"].answers[0]["label"]
    assert row["tower"]["label"] == judged["tower"].answers[0]["label"] == "green", "the tower sees the colour"
    assert judged["tower"].answers[0]["answer"] == "", "nothing is generated where the tower judges alone"
    shown = capsys.readouterr().out.replace("\n", "")  # a long path is wrapped
    assert "query.png: green" in shown


def test_weights_for_one_shown_label_leave_several_to_the_model(run: Path, photos: Path) -> None:
    commands.evaluate(run)
    manifest = read_manifest(run)
    fields = manifest["judgement"]
    write_json(run / MANIFEST, {**manifest, "judgement": {**fields, "several": None, "single": fields["several"]}})
    assert ask_model(photos, [photos / "red" / "0.png"], adapter=run).result["judge"] == "model"
    with pytest.raises(AdapterError, match="has no weights for `judge: both`"):
        ask_model(photos, [photos / "red" / "0.png"], adapter=run, judge="both")


def test_a_broken_photo_after_training_does_not_stop_the_weighing(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "red" / "0.png").write_bytes(b"none")
    commands.evaluate(run)
    weighing, _ = read_weighing(run, read_manifest(run)) or (Weighing(), None)
    assert 0 < weighing.fitted_on[0] < 16
    assert "left out" in capsys.readouterr().err
    for photo in photos.rglob("*.png"):
        photo.write_bytes(b"none")
    with pytest.raises(DataError, match=r"evaluate\.validation\.new: no case"):
        commands.evaluate(run, fresh=True)


def test_a_tower_cannot_judge_behind_an_endpoint(photos: Path) -> None:
    result = CliRunner().invoke(main, ["ask", str(photos), str(photos / "red" / "0.png"), "--endpoint", "http://h", "--judge", "both"])
    assert result.exit_code == 2
    assert "which has no tower" in result.output


def test_weights_are_not_chosen_on_the_test_or_on_training_classes(pocket_tiny: Path, photos: Path, tmp_path: Path) -> None:
    recipe = made(pocket_tiny, tmp_path / "run", photos)
    check_held_out(recipe, Mixture(recipe))
    for split, message in (("held_out", r"evaluate\.validation\.words: .* are reported too; the weights would be chosen on the test"),
                           ("train", r"evaluate\.validation\.words: .* are trained on too")):  # fmt: skip
        words = {"words": {"kind": "lcl", "source": {"type": "pocket", "split": split}, "shots": [1]}}
        faulty = made(pocket_tiny, tmp_path / "run", photos, validation=words)
        with pytest.raises(RecipeError, match=message):
            check_held_out(faulty, Mixture(faulty))


def test_only_suites_with_labels_can_be_validation(pocket_tiny: Path, photos: Path, tmp_path: Path) -> None:
    for suite in ({"preset": "page"}, {"kind": "control", "control": "no-support", "source": {"type": "pocket", "split": "validation"}}):
        with pytest.raises(ValueError, match="validation"):
            made(pocket_tiny, tmp_path / "run", photos, validation={"page": suite})


def test_a_broken_photo_of_a_validation_suite_is_told_before_training(pocket_tiny: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "red" / "0.png").write_bytes(b"none")
    faults = preflight.check(made(pocket_tiny, tmp_path / "run", photos))["faults"]
    assert [fault["source"] for fault in faults] == ["validation new"]
    assert "0.png" in faults[0]["message"]


@pytest.mark.parametrize(("kind", "needed"), [("lcl", 2), ("product", 3)])
def test_validation_suites_with_too_few_classes_are_left_out_with_a_note(kind: str, needed: int, pocket_tiny: Path, tmp_path: Path) -> None:
    names = [f"part {n}" for n in range(60) if split_of(f"part {n}", 0.2, 0.3) != "train"]
    validated = [name for name in names if split_of(name, 0.2, 0.3) == "validation"]
    for count in (0, needed - 1, needed):
        folder = tmp_path / f"{count}"
        for number, name in enumerate(validated[:count] + [one for one in names if one not in validated]):
            for photo in range(3):
                paint(folder / name / f"{photo}.png", (9 * number, 90, 200 - 9 * number), seed=10 * number + photo)
        source = {"type": "class-folder", "path": str(folder), "split": "validation", "hold_out": 0.2, "validation": 0.3}
        recipe, notes = with_enough_classes(
            made(pocket_tiny, tmp_path / "run", folder, validation={"new": {"kind": kind, "source": source, "shots": [1]}})
        )
        if count == needed:
            assert list(recipe.evaluate.validation) == ["new"]
            assert notes == []
            assert all(cell.cases for cell in validation_cells(recipe, 4))
        else:
            assert recipe.evaluate.validation == {}
            assert notes[0].startswith("evaluate.validation.new: left out, so it gives a judgement no weights: ")
            assert f"{count} of {len(names) - len(validated) + count} classes" in notes[0]
            assert f"an episode needs {needed}" in notes[0]
            checked = preflight.check(made(pocket_tiny, tmp_path / "run", folder, validation={"new": {"kind": kind, "source": source, "shots": [1]}}))
            assert notes[0] in checked["notes"]


@pytest.mark.parametrize("kind", ["mvtec", "visa"])
def test_a_validation_suite_of_parts_without_a_category_is_left_out_with_a_note(kind: str, pocket_tiny: Path, tmp_path: Path) -> None:
    root = FIXTURES / kind
    reader = Mvtec if kind == "mvtec" else Visa
    categories = open_reader("parts", reader(type=kind, path=root)).categories
    source = {"type": kind, "path": str(root), "split": "validation", "hold_out": 0.0}
    for share in (1e-9, 0.999999):
        suite = {"kind": "inspection", "source": {**source, "validation": share}, "references": [1]}
        own = made(pocket_tiny, tmp_path / "run", tmp_path, validation={"parts": suite})
        recipe, notes = with_enough_classes(own)
        if share > 0.5:
            assert (recipe, notes) == (own, [])
        else:
            assert recipe.evaluate.validation == {}
            [note] = notes
            assert note.startswith("evaluate.validation.parts: left out, so it gives a judgement no weights: ")
            assert f"no category of {len(categories)} falls into split 'validation'; raise `validation` in training and evaluation" in note


def test_parts_of_which_validation_leaves_none_to_train_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"falls into split 'train'.*or lower `validation`"):
        categories_of_split(["screw", "nut"], "train", ["nut"], 0.2, tmp_path, 0.999999)


def test_a_validation_suite_that_cannot_be_read_is_reported_and_not_left_out(pocket_tiny: Path, tmp_path: Path) -> None:
    source = {"type": "class-folder", "path": str(tmp_path / "gone"), "split": "validation", "validation": 0.3}
    faulty = made(pocket_tiny, tmp_path / "run", tmp_path, validation={"new": {"kind": "lcl", "source": source, "shots": [1]}})
    assert with_enough_classes(faulty) == (faulty, [])
    assert any("no such folder" in fault["message"] for fault in preflight.check(faulty)["faults"])


def test_tower_evidence_raises_for_a_broken_query(photos: Path, pocket_tiny: Path) -> None:
    (photos / "red" / "1.png").write_bytes(b"none")
    tower = TowerEvidence(VisionFeatures(load_base(str(pocket_tiny))))
    with pytest.raises(DataError, match=r"1\.png"):
        tower.vectors([Picture(photos / "red" / "1.png")])


def test_a_server_judges_by_both_too(run: Path, photos: Path, pocket_tiny: Path, tmp_path: Path) -> None:
    commands.evaluate(run)
    query = Picture(photos / "green" / "3.png")
    pool = read_class_folders(photos)
    shown = [(one.pictures[0], one.name) for one in pool.classes]
    labels = [one.name for one in pool.classes]
    engine = Engine(load_base(BaseRef(str(pocket_tiny), device="cpu")), 10**9).start()
    try:
        model = engine.call(lambda own: own.load_adapter("lcl", run))

        def answer(name: str) -> Reply:
            turns = support_turns(shown, model.wording)
            answers = tuple(model.wording.answered(label) for label in labels)
            job = Job(name, lambda: turns, Turn("user", model.wording.query, query), ("me", "1"), answers)
            engine.submit(job)
            reply: Reply = job.future.result(60).reply
            return reply

        expected = {judge: ask_model(photos, [query.path], adapter=run, shots=1, judge=judge).answers[0]["scores"] for judge in JUDGES}
        for _ in range(2):  # the second time from the cache
            assert dict(zip(labels, answer("lcl").probabilities, strict=True)) == pytest.approx(expected["both"], abs=1e-4)
        assert expected["both"] != pytest.approx(expected["model"], abs=1e-3)
        assert max(answer("base").log_likelihoods) < 0, "the base has no weights: its scores are log-likelihoods"
        labelled = [{"label": label, "image": image_of(picture)} for picture, label in shown]
        questions = {
            "label": {"type": "choice"},
            "other": {"type": "choice", "criteria": {**dict.fromkeys(labels[1:]), "a nut": None}, "instructions": model.wording.query},
        }
        state = {"examples": labelled, "image": image_of(query)}
        decisions = decide(Service(engine, Store(tmp_path / "store")), "local", DecisionIn.model_validate({"state": state, "questions": questions}))
        wait(decisions.futures, 60)
        decided = decisions.response().answers
        assert decided["label"].probabilities == pytest.approx(expected["both"], abs=1e-4)
        assert isinstance(decided["label"], ChoiceAnswer)
        assert decided["label"].judge == "both"
        by_model = Job("lcl", lambda: support_turns(shown, model.wording), decisions.jobs[1].turn, None, decisions.jobs[1].answers, judged=False)
        engine.submit(by_model)
        assert list(decided["other"].probabilities.values()) == pytest.approx(by_model.future.result(60).reply.probabilities, abs=1e-4)
        assert by_model.answers == (*map(model.wording.answered, labels[1:]), model.wording.answered("a nut")), "the tower judges a set's labels only"
        service = Service(engine, Store(tmp_path / "other"))
        service.store.put("local", "colours", [(label, read_bytes(picture)) for picture, label in shown])
        for judge, asked in ((None, "both"), *((judge, judge) for judge in JUDGES)):
            request = ClassifyIn(support_set="colours", images=[image_of(query)], model="lcl", judge=judge)
            classification = service.classify("local", request)
            wait(classification.futures, 60)
            classified = classification.response()
            assert classified.judge == asked
            assert classified.results[0].probabilities == pytest.approx(expected[asked], abs=1e-4)
        with pytest.raises(RequestError, match="judge: 'base' has no weights for 'tower'"):
            service.classify("local", ClassifyIn(support_set="colours", images=[image_of(query)], model="base", judge="tower"))
        manifest = read_manifest(run)
        assert identity_of(manifest) != identity_of({**manifest, "judgement": None}), "a calibration belongs to the weights too"
    finally:
        engine.stop()
