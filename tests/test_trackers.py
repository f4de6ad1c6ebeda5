"""Trackers: what TensorBoard and trackio have on disk after a training; early stop; the push to a hub."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trackio
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lcl_adapter import recipe as recipes
from lcl_adapter.base.adapter import read_manifest
from lcl_adapter.cli import commands, main
from lcl_adapter.errors import RecipeError, RunError
from lcl_adapter.evaluate.metrics import RESAMPLES, Estimate
from lcl_adapter.recipe import Recipe
from lcl_adapter.training import hub, trainer
from lcl_adapter.training.callbacks import BarCallback
from lcl_adapter.training.during import MeasureDuring, since_best
from lcl_adapter.training.trackers import TENSORBOARD, Trackers
from tests.test_suites import SUITES
from tests.test_suites import small as with_suites
from tests.test_trainer import small


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """trackio writes below the test's folder, without a thread that measures the machine."""
    folder = tmp_path / "trackio"
    for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "trackio" and hasattr(m, "TRACKIO_DIR")]:
        monkeypatch.setattr(module, "TRACKIO_DIR", folder)
    real = trackio.init
    monkeypatch.setattr(trackio, "init", lambda *a, **k: real(*a, **k, auto_log_cpu=False, auto_log_gpu=False))
    yield
    trackio.context_vars.current_run.set(None)
    trackio.context_vars.current_project.set(None)


def tracked(base: Path, output: Path, tracker: str, **evaluate: Any) -> Recipe:
    made = with_suites(base, output, {"pope": SUITES["pope"]}, every=2, during_limit=4, **evaluate).model_dump(mode="json", exclude_none=True)
    made["train"] |= {"report_to": tracker, "save_steps": 100, "logging_steps": 2}
    return Recipe.model_validate(made)


def run_command(recipe: Recipe, tmp_path: Path, *overrides: str, code: int = 0) -> dict[str, Any]:
    recipes.save(recipe, tmp_path / "mine.yaml")
    result = CliRunner().invoke(main, ["train", str(tmp_path / "mine.yaml"), *overrides, "--json"])
    assert result.exit_code == code, result.output
    return dict(json.loads(result.stdout)) if code in (0, 3) else {}


def tensorboard_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, by TensorBoard's own reader."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def trackio_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """The same, from trackio's database."""
    [file] = folder.glob("*.db")
    with sqlite3.connect(file) as database:
        rows = [json.loads(metrics) for (metrics,) in database.execute("select metrics from metrics order by id")]
    scalars: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            scalars.setdefault(name, {})[row["train/global_step"]] = value
    return scalars


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_a_tracker_has_every_figure(pocket_tiny: Path, tmp_path: Path, tracker: str) -> None:
    run = tmp_path / "run"
    report = run_command(tracked(pocket_tiny, run, tracker), tmp_path)
    scalars = tensorboard_scalars(run / TENSORBOARD) if tracker == "tensorboard" else trackio_scalars(tmp_path / "trackio")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "learning_rate", "grad_norm"):
        assert scalars[f"train/{name}"] == pytest.approx({line["step"]: line[name] for line in lines}, rel=1e-4)
    assert list(scalars["train/loss"]) == [2, 4], "measuring at a step does not swallow the step's own log"
    assert all(set(line) == {"step", "loss", "grad_norm", "learning_rate"} for line in lines), "metrics.jsonl is as it was"
    realised = read_manifest(run)["tokens"]
    for source, counts in realised.items():
        assert scalars[f"train/shares/{source}"][4] == pytest.approx(counts["rows"] / 12)
    assert all(speed > 0 for speed in scalars["train/tokens_per_second"].values())
    watched = json.loads((run / "watched.json").read_text())
    assert scalars["eval/pope/adapter"] == pytest.approx({step["step"]: step["figures"]["pope"] for step in watched["steps"]})
    assert scalars["eval/pope/base"] == pytest.approx(dict.fromkeys([2, 4], watched["base"]["pope"]))
    [row] = report["suites"]
    assert scalars["test/pope/adapter"] == pytest.approx({4: row["adapter"]["value"]})
    assert scalars["test/pope/base"] == pytest.approx({4: row["base"]["value"]})


def test_both_trackers_at_once_and_the_names_of_a_run(pocket_tiny: Path, tmp_path: Path) -> None:
    made = small(pocket_tiny, tmp_path / "run", max_steps=2, report_to=["tensorboard", "trackio"], project="parts", run_name="mine")
    trainer.train(made)
    assert "train/loss" in tensorboard_scalars(tmp_path / "run" / TENSORBOARD)
    [file] = (tmp_path / "trackio").glob("*.db")
    assert file.stem.startswith("parts")
    with sqlite3.connect(file) as database:
        assert {name for (name,) in database.execute("select distinct run_name from metrics")} == {"mine"}


def test_a_resumed_run_shows_each_step_once(pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: object, args: object, state: Any, control: object, **_: object) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt

    made = small(pocket_tiny, tmp_path / "run", max_steps=5, save_steps=2, report_to=["tensorboard"])
    with monkeypatch.context() as patched:
        patched.setattr(BarCallback, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(made)
    trainer.train(made, resume=True)
    events = EventAccumulator(str(tmp_path / "run" / TENSORBOARD))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_a_missing_tracker_is_named_before_anything_is_opened(pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    made = small(pocket_tiny, tmp_path / "run", report_to=["tensorboard", "wandb", "mlflow"])
    with pytest.raises(RecipeError) as caught:
        Trackers(made)
    assert caught.value.faults[0] == 'train.report_to: tensorboard is not installed: pip install "lcl-adapter[track]"'
    assert "wandb" in caught.value.faults[1]
    assert "mlflow" in caught.value.faults[2]
    recipes.save(made, tmp_path / "mine.yaml")
    result = CliRunner().invoke(main, ["train", str(tmp_path / "mine.yaml")])
    assert result.exit_code == 2
    assert "lcl-adapter[track]" in result.output
    assert not (tmp_path / "run").exists()


# Early stop


def scripted(figures: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements that give these figures in turn."""

    def estimate(value: float) -> Estimate:
        return Estimate(value, (value,) * RESAMPLES, 100)

    values = iter(figures)
    monkeypatch.setattr("lcl_adapter.training.during.measure_adapter", lambda cells, _: {cell.name: estimate(next(values)) for cell in cells})
    monkeypatch.setattr("lcl_adapter.training.during.measure_base", lambda cells, _: {cell.name: estimate(0.5) for cell in cells})


def patient(base: Path, output: Path, patience: int | None, steps: int = 8) -> Recipe:
    made = with_suites(base, output, {"pope": SUITES["pope"]}, every=1, during_limit=4).model_dump(mode="json", exclude_none=True)
    made["train"] |= {"max_steps": steps, "save_steps": 2}
    made["evaluate"] |= {"patience": patience}
    return Recipe.model_validate(made)


def trained(recipe: Recipe, resume: bool = False) -> dict[str, Any]:
    return trainer.train(recipe, resume, lambda base, running: MeasureDuring(recipe, base, running))


def test_training_stops_early_with_the_best_adapter(pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted([0.6, 0.7, 0.7, 0.6, 0.9], monkeypatch)
    made = patient(pocket_tiny, tmp_path / "run", 2)
    facts = trained(made)
    assert facts["early_stop"] == {"step": 4, "of": 8, "reason": "no better mean in 2 measurements"}
    assert facts["best_step"] == 2
    manifest = read_manifest(tmp_path / "run")
    assert (manifest["early_stop"], manifest["best_step"]) == (facts["early_stop"], 2)
    assert sum(source["rows"] for source in manifest["tokens"].values()) == 12
    assert manifest["passes"] == {}
    run, best = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("run", "run/best"))
    assert run == best
    scripted([], monkeypatch)
    assert trained(made, resume=True)["early_stop"] == facts["early_stop"], "a run that stopped early is complete"
    commands.report.plot_loss(tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "loss.png")
    card = commands.report.write_card(tmp_path / "run").read_text()
    assert "Stopped at step 4 of 8: no better mean in 2 measurements. The adapter is that of step 2, the best that was measured." in card


def test_patience_ends_with_the_best_adapter_without_an_early_stop_too(pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted([0.6, 0.5, 0.4], monkeypatch)
    facts = trained(patient(pocket_tiny, tmp_path / "patient", 3, steps=3))
    assert "early_stop" not in facts
    assert facts["best_step"] == 1
    scripted([0.6, 0.5, 0.4], monkeypatch)
    trained(patient(pocket_tiny, tmp_path / "plain", None, steps=3))
    weights = {n: (tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("patient", "patient/best", "plain", "plain/best")}
    assert weights["patient"] == weights["patient/best"] == weights["plain/best"] != weights["plain"]


def test_a_run_that_is_killed_before_its_early_stop_stops_at_the_same_step(
    pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at step 4, whose measurement ends it; resumed at step 2 with all four measurements on disk."""
    made = patient(pocket_tiny, tmp_path / "run", 2)
    scripted([0.6, 0.7, 0.7, 0.6], monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr("lcl_adapter.training.during.since_best", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt) if _[1] == 4 else 0)
        with pytest.raises(KeyboardInterrupt):
            trained(made)
    assert len(json.loads((tmp_path / "run" / "watched.json").read_text())["steps"]) == 4
    facts = trained(made, resume=True)
    assert (facts["early_stop"]["step"], facts["best_step"]) == (4, 2)


def test_measurements_since_the_best() -> None:
    results = {"best": {"step": 20}, "steps": [{"step": step} for step in (10, 20, 30, 40)]}
    assert [since_best(results, step) for step in (10, 20, 30, 40)] == [0, 0, 1, 2]
    assert since_best({**results, "best": None}, 30) == 3


# The hub


class Hub:
    """A stand-in for huggingface_hub's client. No hub was reached by any test."""

    def __init__(self) -> None:
        self.created: list[tuple[str, dict[str, Any]]] = []
        self.uploaded: list[dict[str, Any]] = []
        self.broken = False

    def __call__(self) -> Hub:
        return self

    def create_repo(self, name: str, **options: Any) -> Any:
        self.created.append((name, options))
        return type("Repository", (), {"repo_id": f"me/{name}"})

    def upload_folder(self, **options: Any) -> str:
        if self.broken:
            raise OSError("connection lost")
        self.uploaded.append(options)
        return "https://hub/commit/1"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(hub, "HfApi", made)
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    return made


def pushing(base: Path, output: Path, **evaluate: Any) -> Recipe:
    made = with_suites(base, output, {"pope": SUITES["pope"]}, **evaluate).model_dump(mode="json", exclude_none=True)
    made["train"] |= {"max_steps": 1, "save_steps": 100, "push_to_hub": True, "hub_private_repo": True}
    return Recipe.model_validate(made)


def test_a_complete_run_is_pushed_without_the_data(pocket_tiny: Path, tmp_path: Path, client: Hub) -> None:
    from fnmatch import fnmatch

    run = tmp_path / "run"
    report = run_command(pushing(pocket_tiny, run), tmp_path)
    assert report["pushed"] == "https://hub/commit/1"
    assert client.created == [("run", {"private": True, "exist_ok": True})]
    [upload] = client.uploaded
    assert (upload["repo_id"], Path(upload["folder_path"])) == ("me/run", run)
    files = [str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()]
    pushed = {file for file in files if any(fnmatch(file, pattern) for pattern in upload["allow_patterns"])}
    assert {"adapter_config.json", "adapter_model.safetensors", "lcl_adapter.json", "recipe.yaml", "README.md", "report.json"} <= pushed
    assert not pushed & {"predictions.jsonl", "report.html"}
    assert not any("/" in file for file in pushed)


def test_a_run_that_fails_its_gate_is_not_pushed(pocket_tiny: Path, tmp_path: Path, client: Hub) -> None:
    report = run_command(pushing(pocket_tiny, tmp_path / "run", retention={"pope": -101.0}), tmp_path, code=3)
    assert "pushed" not in report
    assert not client.uploaded


def test_a_push_that_fails_leaves_a_complete_run(pocket_tiny: Path, tmp_path: Path, client: Hub) -> None:
    made = pushing(pocket_tiny, tmp_path / "run")
    trainer.train(made)
    client.broken = True
    with pytest.raises(RunError, match=r"the run is complete, but could not be pushed \(connection lost\)\. Push it with `hf upload me/x "):
        hub.push(made, "me/x")
    assert read_manifest(tmp_path / "run")


@pytest.mark.parametrize(("offline", "token", "message"), [(True, "t", "HF_HUB_OFFLINE is set"), (False, None, "hf auth login")])
def test_a_push_is_possible_before_training_starts(
    pocket_tiny: Path, tmp_path: Path, client: Hub, monkeypatch: pytest.MonkeyPatch, offline: bool, token: str | None, message: str
) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub, "get_token", lambda: token)
    recipes.save(pushing(pocket_tiny, tmp_path / "run"), tmp_path / "mine.yaml")
    result = CliRunner().invoke(main, ["train", str(tmp_path / "mine.yaml")])
    assert (result.exit_code, message in result.output) == (2, True), result.output
    assert not (tmp_path / "run").exists()
    assert not client.created
