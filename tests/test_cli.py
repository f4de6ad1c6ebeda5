"""The command line: fast help, exit codes, one JSON object on standard output."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from click.testing import CliRunner, Result

from lcl_adapter.cli import main
from lcl_adapter.cli.common import PRECISION
from lcl_adapter.pocket import DATA
from lcl_adapter.recipe.schema import Precision
from tests.conftest import paint


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"], ["train", "--help"], ["--version"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom lcl_adapter.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as e:\n    assert not e.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_faulty_key_file_is_reported_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom lcl_adapter.cli import main\n"
        f"try:\n    main(['serve', 'pocket', '--api-key-file', {str(tmp_path / 'keys')!r}])\nexcept SystemExit as e:\n    assert e.code == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "the keys cannot be read (No such file or directory)" in done.stderr


def test_importing_the_package_is_light() -> None:
    code = "import lcl_adapter, sys; assert 'torch' not in sys.modules; assert sorted(lcl_adapter.__all__) == list(lcl_adapter.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "no such file"),
        (["train", "recipes/pocket.yaml", "train.max_stps=1", "base=1"], "did you mean 'max_steps'?"),
        (["train", "recipes/pocket.yaml", "resume=maybe"], "true or false"),
        (["train", "recipes/pocket.yaml", "base=no/such-base", "output={tmp}/r"], "no such folder"),
        (["eval", "{tmp}/none"], "no such run"),
        (["merge", "{tmp}/none", "--out", "{tmp}/out"], "no such run"),
        (["ask", "{tmp}/nowhere", "q.png"], "no such folder"),
        (["recipes", "copy", "pokcet"], "did you mean 'pocket'?"),
        (["data", "preview", "recipes/pocket.yaml", "sources.lcl.ways=[1]"], "below 2"),
    ],
)
def test_user_mistakes_exit_with_2_and_a_remedy(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = call(*(a.format(tmp=tmp_path) for a in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_ask_needs_support_and_a_query() -> None:
    assert call("ask").exit_code == 2
    assert call("ask", "photos").exit_code == 2


def test_ask(photos: Path, tmp_path: Path, pocket_tiny: Path) -> None:
    query = paint(tmp_path / "query.png", (40, 160, 60), seed=77)
    result = call("ask", photos, query, query, "--base", pocket_tiny, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["support"] == {"dented": 4, "good": 4, "scratched": 4}
    assert len(report["answers"]) == 2
    scores = report["answers"][0]["scores"]
    assert set(scores) == {"good", "scratched", "dented"}
    assert sum(scores.values()) == pytest.approx(1)
    assert report["answers"][0]["label"] == max(scores, key=scores.__getitem__)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: [d.rename(p.parent / d.name) for d in p.iterdir() if d.name != "good"], "only one class ('good')"),
        (lambda p: (p / "empty").mkdir(), "'empty' has no images"),
        (lambda p: (p / "good" / "0.png").write_bytes(b"x"), "not an image"),
    ],
)
def test_ask_with_bad_photos(photos: Path, tmp_path: Path, pocket_tiny: Path, spoil: Callable[[Path], object], message: str) -> None:
    query = paint(tmp_path / "query.png", (1, 2, 3))
    spoil(photos)
    result = call("ask", photos, query, "--base", pocket_tiny)
    assert (result.exit_code, message in result.output) == (2, True), result.output


def test_ask_with_labels_of_any_spelling(tmp_path: Path, pocket_tiny: Path) -> None:
    names = ["a b", "日本", "🙂", 'q"uote', "cat", "cattle"]
    for number, name in enumerate(names):
        paint(tmp_path / "photos" / name / "same name.png", (number * 40, 9, 9))
    result = call("ask", tmp_path / "photos", paint(tmp_path / "q.png", (9, 9, 9)), "--base", pocket_tiny, "--json")
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["answers"][0]["scores"]) == set(names)
    assert "begin alike" in result.stderr


def test_the_main_job_on_a_tiny_base(tmp_path: Path, pocket_tiny: Path) -> None:
    """Train, eval and merge, each with --json: the steps of the quickstart, on random weights."""
    run = tmp_path / "run"
    small = [f"base={pocket_tiny}", f"output={run}", "train.max_steps=2", "train.per_device_train_batch_size=2", "train.logging_steps=1"]
    suites = ("2way", "2way-more", "5way", "shuffled-names", "no-support")
    few = [f"evaluate.suites.{s}.{value}" for s in suites for value in ("episodes=6", "new_tokens=4")] + ["evaluate.validation.words.episodes=6"]
    limits = [f"evaluate.suites.{s}.source.limit=10" for s in ("captions", "vqa")]
    trained = call("train", "recipes/pocket.yaml", *small, *few, *limits, "--json")
    assert trained.exit_code == 0, trained.output
    report = json.loads(trained.stdout)
    names = [row["name"] for row in report["suites"]]
    assert names[:2] == ["2way-1shot-easy", "2way-1shot-hard"]
    assert {"5way-2shot-easy", "shuffled-names-hard", "no-support-easy", "captions", "vqa"} <= set(names)
    for row in report["suites"]:
        keys = {"name", "kind", "policy", "ways", "shots", "neighbours", "n", "chance", "baseline", "metric", "base", "adapter"}
        assert keys <= set(row)
        assert 0 <= row["adapter"]["ci95"][0] <= row["adapter"]["value"] <= row["adapter"]["ci95"][1] <= 1
    written = {p.name for p in run.iterdir()}
    pages = {"README.md", "report.json", "report.html", "predictions.jsonl", "metrics.jsonl", "recipe.yaml", "loss.png", "accuracy.png"}
    assert pages <= written
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == sum(row["n"] for row in report["suites"])

    whole = (run / "report.json").read_bytes()
    again = call("eval", run, "--suite", "2way", "--limit", 4, "--json")
    assert again.exit_code == 0, again.output
    assert (run / "report.json").read_bytes() == whole, "a partial report never replaces the complete one"
    assert (run / "partial" / "report.html").exists()
    assert {row["n"] for row in json.loads(again.stdout)["suites"]} == {4}
    assert call("eval", run, "--suite", "3way").exit_code == 2

    merged = call("merge", run, "--out", tmp_path / "merged", "--dtype", "fp32", "--json")
    assert merged.exit_code == 0, merged.output
    comparison = json.loads(merged.stdout)
    assert comparison["greedy_equal"] == comparison["probes"] > 0


def test_evaluating_a_trained_class_is_refused(tmp_path: Path, pocket_tiny: Path) -> None:
    result = call("train", "recipes/pocket.yaml", f"base={pocket_tiny}", f"output={tmp_path / 'r'}", "evaluate.suites.2way.source.split=train")
    assert result.exit_code == 2
    assert "are trained on too" in result.output


def test_preview(tmp_path: Path, pocket_tiny: Path) -> None:
    page = tmp_path / "page.html"
    result = call("data", "preview", "recipes/pocket.yaml", f"base={pocket_tiny}", "--episodes", 2, "--out", page, "--png")
    assert result.exit_code == 0, result.output
    html = page.read_text()
    assert html.count('class="strip"') == 4
    assert html.count("data:image/webp") > 20
    assert 'class="learned"' in html
    assert page.with_suffix(".png").stat().st_size > 10_000


def test_recipes_lists_and_copies(tmp_path: Path) -> None:
    listed = call("recipes")
    assert listed.exit_code == 0
    assert "pocket " in listed.output
    assert json.loads(call("recipes", "--json").stdout)["pocket"]
    assert call("recipes", "copy", "pocket", "--to", tmp_path / "mine.yaml").exit_code == 0
    assert call("recipes", "copy", "pocket", "--to", f"{tmp_path}/new/").exit_code == 0
    assert (tmp_path / "new" / "pocket.yaml").is_file()
    assert (tmp_path / "mine.yaml").exists()


def test_shipped_questions_name_shipped_pictures() -> None:
    import zipfile

    members = set(zipfile.ZipFile(DATA / "drawings.zip").namelist())
    for name in ("vqa_train", "vqa_eval", "captions_eval"):
        assert {r["image"] for r in json.loads((DATA / f"{name}.json").read_text())} <= members


def test_the_option_offers_every_precision_of_a_recipe() -> None:
    assert tuple(PRECISION.choices) == get_args(Precision)
