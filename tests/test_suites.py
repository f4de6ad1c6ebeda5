"""Every kind of suite, on the fixtures, with a tiny random base: its cells, its figures, and the published protocols."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from lcl_adapter import recipe as recipes
from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base import prototypes
from lcl_adapter.base.model import load_base
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.cli import main
from lcl_adapter.data.sources import read_open_mi
from lcl_adapter.errors import DataError, RecipeError
from lcl_adapter.evaluate import ModelPair, build_cells, rules, runner
from lcl_adapter.evaluate.baselines import patch_distances
from lcl_adapter.evaluate.cases import Cell
from lcl_adapter.evaluate.metrics import ranking
from lcl_adapter.recipe import Recipe, presets
from lcl_adapter.report.pages import wrong_answers
from lcl_adapter.report.plots import defect_score
from lcl_adapter.training import trainer
from tests.conftest import paint
from tests.test_formats import FIXTURES, SOURCES, P

PAIRS = {"pairs": FIXTURES / "imagenet-lcl" / "test100_pairs.jsonl", "images": FIXTURES / "imagenet-lcl" / "images"}
SUITES: dict[str, dict[str, Any]] = {
    "imagenet-100": {"kind": "imagenet-100", **PAIRS, "shots": [0, 1, 2]},
    "isekai-10": {"kind": "isekai", "source": SOURCES["isekai"], "shots": [1, 2], "published": "isekai-10"},
    "open-mi": {"kind": "open-mi", "file": FIXTURES / "vl-icl" / "open_mi" / "query.json", "images": FIXTURES / "vl-icl", "shots": [0, 1, 2]},
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
        measured = runner.measure_cell(cell, ModelPair.local(predictor))
        row = measured["row"]
        assert 0 <= row["adapter"]["ci95"][0] <= row["adapter"]["value"] <= row["adapter"]["ci95"][1] <= 1, row
        assert row["base"] == row["adapter"], "there is no adapter, so both sides ask the same model"
        assert [line["index"] for line in measured["predictions"]] == list(range(row["n"]))
        assert (row["n"], row["left_out"]) == (len(cell.cases), 0)
        assert 0 < row["n"] <= 8
        assert json.loads(json.dumps(measured)) == measured
        metrics[cell.suite] = row["metric"]
    assert metrics == {
        "imagenet-100": "LCL's rule",
        "isekai-10": "LCL's rule",
        "open-mi": "VL-ICL's rule",
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


def test_imagenet_100_follows_the_published_protocol() -> None:
    """Names in lower case, the first shots of each list, queries of both classes, one support set for each pair of classes."""
    built = cells("imagenet-100")
    assert list(built) == ["imagenet-100-0shot", "imagenet-100-1shot", "imagenet-100-2shot"]
    assert len(built["imagenet-100-1shot"].cases) == 4 * 4
    for case in built["imagenet-100-2shot"].cases:
        assert case.episode is not None
        assert set(case.labels) in ({"ring", "bar"}, {"frame", "dots"})
        for example in case.episode.support:
            assert example.picture.path.stem in {f"{example.label}_{k}" for k in (0, 1)}, "the first two of the list"
        assert case.episode.queries[0].picture.path.stem.startswith(case.gold)
    shown = {tuple(e.label for e in c.episode.support) for c in built["imagenet-100-2shot"].cases if c.episode}
    assert len(shown) > 6, "shuffled"
    assert dict(built["imagenet-100-2shot"].published)["LCL 2way-weight"] == 0.71, "two shots a class are four support images in the paper"
    assert len(cells("imagenet-100", limit=6)["imagenet-100-1shot"].cases) == 6


def test_open_mi_shows_two_classes_in_turn() -> None:
    built = cells("open-mi")
    assert list(built) == ["open-mi-0shot", "open-mi-1shot", "open-mi-2shot"]
    records = json.loads(SUITES["open-mi"]["file"].read_text())
    for record, one, two in zip(records, built["open-mi-1shot"].cases, built["open-mi-2shot"].cases, strict=True):
        assert (one.gold, one.labels) == (record["answer"], two.labels), "every number of shots asks about the same two classes"
        assert one.episode is not None
        assert two.episode is not None
        assert [e.label for e in two.episode.support] == [*one.labels, *one.labels]
        for place, example in enumerate(two.episode.support):
            assert str(example.picture.path).endswith(record["support"][example.label]["images"][place // 2])
        assert str(two.query.picture).endswith(record["image"][0])
    assert {case.episode.support[0].label == case.gold for case in built["open-mi-1shot"].cases if case.episode} == {True, False}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("dax", True),
        ("Dax.", True),
        ("dax\nThis is a", True),
        (" dax. It is red", True),
        ("a dax", False),
        ("", False),
        ("dax.\nIt", False),
        (".dax", False),
    ],
)
def test_vl_icls_rule_reads_up_to_the_end_of_a_line_or_to_a_full_stop(text: str, right: bool) -> None:
    assert rules.vl_icl_rule(text, "dax") is right


def test_open_mis_faults_are_named(tmp_path: Path) -> None:
    record = json.loads(SUITES["open-mi"]["file"].read_text())[0]
    broken = [
        {**record, "answer": "wug"},
        {**record, "image": "open_mi/none.png"},
        {**record, "support": {"dax": record["support"]["dax"]}},
        {**record, "image": [*record["image"], *record["image"]]},
        {key: value for key, value in record.items() if key != "support"},
        {**record, "support": ["dax"]},
        "dax",
    ]
    (tmp_path / "query.json").write_text(json.dumps(broken))
    with pytest.raises(DataError) as refused:
        read_open_mi(tmp_path / "query.json", FIXTURES / "vl-icl", "open-mi")
    lines = str(refused.value).splitlines()
    assert lines[0].startswith("open-mi: 7 faults")
    for line, part in zip(
        lines[1:], ("'wug' is no class", "no image", "'dax' alone", "2 pictures as the query", "support", "support", "support"), strict=True
    ):
        assert part in line
    few = Recipe.model_validate(
        {"base": "pocket", "sources": {"a": {"type": "pocket"}}, "evaluate": {"suites": {"open-mi": {**SUITES["open-mi"], "shots": 3}}}}
    )
    with pytest.raises(DataError, match="`shots` asks for 3 of each"):
        list(build_cells(few))


def test_isekai_has_one_query_for_each_line() -> None:
    built = cells("isekai-10")["isekai-10-2shot"]
    assert [c.gold for c in built.cases] == ["hollow ring", "circle", "hollow ring", "hollow cross", "square", "hollow cross"]
    assert dict(built.published) == {"OpenFlamingo": 0.44, "LCL mix": 0.70}


def test_inspection_shows_training_photos_and_queries_test_photos() -> None:
    built = cells("mvtec")
    for cell in built.values():
        assert len(cell.cases) == 3 * 9
        for case in cell.cases:
            assert case.episode is not None
            assert len(case.episode.support) == cell.shots
            assert all("train/good" in str(e.picture) for e in case.episode.support)
            assert "/test/" in str(case.query.picture)
            assert (case.gold == "good") == (case.truth["defect"] is None)
    assert len({c.support for c in built["mvtec-2ref"].cases}) == 3, "one support set for each category"
    assert dict(built["mvtec-1ref"].published)["WinCLIP+"] == 0.931
    assert cells("visa")["visa-2ref"].cases[0].labels == ("良品", "不良品")


def test_more_references_than_photos_are_refused(tmp_path: Path) -> None:
    made = with_suites("mvtec").model_copy()
    made = Recipe.model_validate({**made.model_dump(), "evaluate": {"suites": {"m": {**SUITES["mvtec"], "references": [5]}}}})
    with pytest.raises(DataError, match="has 4 good photos to show, but `references` is 5"):
        list(build_cells(made))


def test_products_have_queries_in_all_three_roles() -> None:
    cell = cells("product")["product-1shot"]
    roles = [c.truth["roles"][c.gold] for c in cell.cases]
    assert set(roles) == {"A", "B", "neither"}
    assert min(roles.count(role) for role in ("A", "B", "neither")) > 5
    for case in cell.cases:
        assert case.episode is not None
        assert case.truth["roles"][case.episode.support[0].label] == "A"


def test_patch_distance_is_larger_for_what_no_reference_shows(pocket_tiny: Path) -> None:
    """A query that is one of its references has distance 0; a photo with a defect has a larger one."""
    cell = cells("mvtec")["mvtec-2ref"]
    assert cell.cases[0].episode is not None
    same = replace(cell.cases[0], query=replace(cell.cases[0].query, picture=cell.cases[0].episode.support[0].picture))
    near, far = patch_distances([same, cell.cases[5]], VisionFeatures(load_base(str(pocket_tiny))))
    assert near < 0.05 < far


def test_patch_distances_stay_within_their_memory(pocket_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of any size the distances are the same, and ``plan`` counts what they may take."""
    cell, vision = cells("mvtec")["mvtec-2ref"], VisionFeatures(load_base(str(pocket_tiny)))
    cases = [replace(case, support=cell.cases[0].support) for case in cell.cases[:12]]
    whole = patch_distances(cases, vision)
    largest: list[int] = []
    cdist = torch.cdist

    def recorded(queries: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        distances = cdist(queries, known)
        largest.append(4 * (3 * queries.numel() + distances.numel()))
        return distances

    monkeypatch.setattr(torch, "cdist", recorded)
    monkeypatch.setattr(prototypes, "PATCH_BYTES", 10_000)
    assert patch_distances(cases, vision) == pytest.approx(whole, abs=1e-5)
    assert len(largest) > 1
    assert max(largest) <= 10_000


def test_a_suite_of_own_photos_needs_three_lines(tmp_path: Path) -> None:
    for name, green in (("good", 20), ("dented", 80)):
        for k in range(5):
            paint(tmp_path / "photos" / name / f"{k}.png", (9 * k, green, 90))
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
    assert not (run / "report.json").exists(), "a partial report never replaces the complete one"
    wrong = CliRunner().invoke(main, ["eval", str(run), "--suite", "isekia-10"])
    assert wrong.exit_code == 2
    assert "did you mean 'isekai-10'?" in wrong.stderr


def test_the_retention_gate_fails_with_exit_code_3_and_saves_the_best_that_passes(tmp_path: Path, pocket_tiny: Path) -> None:
    """An allowance of -101 points can never be met, one of 101 always is."""
    parts = {**SUITES["mvtec"], "source": {**SOURCES["mvtec"], "split": "held_out", "held_out": ["screw"]}, "references": [1]}
    for allowed, code in ((-101.0, 3), (101.0, 0)):
        run = tmp_path / f"run{code}"
        made = small(
            pocket_tiny, run, {"pope": SUITES["pope"], "parts": parts}, retention={"pope": allowed}, every=2, during=["parts"], during_limit=6
        )
        recipes.save(made, tmp_path / "mine.yaml")
        result = CliRunner().invoke(main, ["train", str(tmp_path / "mine.yaml"), "--json"])
        assert result.exit_code == code, result.output
        watched = json.loads((run / "watched.json").read_text())
        assert [s["step"] for s in watched["steps"]] == [2, 4]
        assert set(watched["steps"][0]["figures"]) == {"pope", "parts-1ref"}
        assert [s["kept"] for s in watched["steps"]] == [code == 0] * 2
        assert (run / "best" / "lcl_adapter.json").exists() == (code == 0)
        assert ("THE RETENTION GATE DOES NOT PASS" in result.stderr) == (code == 3)
        report = json.loads(result.stdout)
        assert report["retained"] == (code == 0)
        assert [(row["suite"], row["allowed"], row["retained"]) for row in report["retention"]] == [("pope", allowed, code == 0)]
        assert ("NOT RETAINED" in (run / "report.html").read_text()) == (code == 3)
    best = CliRunner().invoke(main, ["eval", str(tmp_path / "run0" / "best"), "--suite", "pope", "--json"])
    assert best.exit_code == 0, best.output


def test_measuring_during_training_does_not_change_the_training(tmp_path: Path, pocket_tiny: Path) -> None:
    from lcl_adapter.training.during import MeasureDuring

    plain, watched = (small(pocket_tiny, tmp_path / n, {"pope": SUITES["pope"]}, retention={"pope": 5}, every=1) for n in ("plain", "watched"))
    trainer.train(plain)
    trainer.train(watched, make_callback=lambda base, save: MeasureDuring(watched, base, save))
    assert [s["step"] for s in json.loads((tmp_path / "watched" / "watched.json").read_text())["steps"]] == [1, 2, 3, 4]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "watched")]
    assert weights[0] == weights[1]


def test_the_report_page_shows_curves_confusion_and_wrong_answers(tmp_path: Path, pocket_tiny: Path) -> None:
    from lcl_adapter.cli import commands

    run = tmp_path / "run"
    suites = {"product": SUITES["product"], "parts": {**SUITES["mvtec"], "source": {**SOURCES["mvtec"], "split": "held_out", "held_out": ["screw"]}}}
    trainer.train(small(pocket_tiny, run, suites))
    report = commands.evaluate(run)
    page = (run / "report.html").read_text()
    for words in ("Given and right answers", "Inspection by category", "WinCLIP+ 0.93", *(row["name"] for row in report["suites"])):
        assert words in page
    assert (run / "roc.png").stat().st_size > 5000
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert page.count('<div class="wrong">') == len(wrong_answers(lines)) > 0
    for row in report["suites"]:
        if row["kind"] == "inspection":  # the scores of the ROC curves give the reported AUROC
            own = [line for line in lines if line["cell"] == row["name"]]
            for name, figures in row["adapter"]["by_category"].items():
                category = [line for line in own if line["class"] == name]
                truth, scores = [line["defect"] is not None for line in category], [defect_score(line, "adapter") for line in category]
                assert ranking(truth, scores)["auroc"] == pytest.approx(figures["auroc"], abs=0.001)
    card = (run / "README.md").read_text()
    assert "| source | share asked | realised | of the tokens |" in card
    assert "Published by others" in card
    tokens = json.loads((run / "lcl_adapter.json").read_text())["tokens"]
    assert tokens["lcl"]["rows"] + tokens["parts"]["rows"] == 12
    assert 0 < tokens["parts"]["learned"] < tokens["parts"]["tokens"]
    assert {r["metric"] for r in report["suites"]} == {"balanced accuracy", "AUROC"}


def test_a_report_of_an_earlier_version_still_makes_a_page(tmp_path: Path) -> None:
    """Version 0.4 called the key of a retention row ``kept``."""
    from lcl_adapter.report import write_report_page

    rows = [{"suite": name, "fell": fell, "allowed": 1.0, "kept": fell <= 1} for name, fell in (("vqa", 0.5), ("pope", 3.0))]
    (tmp_path / "report.json").write_text(json.dumps({"suites": [], "retention": rows}))
    (tmp_path / "predictions.jsonl").write_text("")
    page = " ".join(write_report_page(tmp_path).read_text().split())
    assert "vqa: -0.5 points against the base, 1.0 may be lost: retained." in page
    assert "pope: -3.0 points against the base, 1.0 may be lost: NOT RETAINED." in page
