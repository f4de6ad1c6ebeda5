"""End to end on the shipped base: the whole mixture, every task on what training never saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lcl_adapter.cli import main
from tests.test_pocket import rows


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mixture, a quarter of the recipe's steps; every suite on fewer questions. The gate may close: it is not asked about."""
    folder = tmp_path_factory.mktemp("mix") / "run"
    few = ["evaluate.suites.2way.episodes=256", "evaluate.suites.2way.shots=2", "evaluate.suites.shuffled-names.episodes=128"]
    few += ["evaluate.suites.product.episodes=300", "evaluate.suites.product.shots=2", "evaluate.suites.inspection.references=[0, 2]"]
    few += ["evaluate.suites.inspection.limit=3", "evaluate.suites.captions.source.limit=300"]
    result = CliRunner().invoke(main, ["train", "recipes/mix-pocket.yaml", f"output={folder}", "train.max_steps=200", *few])
    assert result.exit_code in {0, 3}, result.output
    return folder


def test_the_mixture_learns_every_task_on_what_it_has_not_seen(mixed: Path) -> None:
    found = rows(mixed)
    assert found["2way-2shot-easy"]["adapter"]["value"] > 0.85
    inspected, plain = found["inspection-2ref"], found["inspection-0ref"]
    assert inspected["adapter"]["value"] > max(0.65, inspected["base"]["value"] + 0.1), "categories that were never trained on"
    assert inspected["adapter"]["value"] > plain["adapter"]["value"], "references are read"
    assert len(inspected["adapter"]["by_category"]) == 60
    product = found["product-2shot"]["adapter"]
    assert product["value"] > 0.55
    assert all(recall > 0.4 for recall in product["recall"].values())
    assert product["near_neither_recall"] > 0.3, "near products too"
    for kept in ("captions", "vqa"):
        assert found[kept]["adapter"]["value"] > found[kept]["base"]["value"] - 0.08


def test_the_mixture_says_what_was_trained_on(mixed: Path) -> None:
    manifest = json.loads((mixed / "lcl_adapter.json").read_text())
    assert manifest["shares"]["realised"] == pytest.approx({"lcl": 0.33, "vqa": 0.15, "inspect": 0.27, "products": 0.25}, abs=0.01)
    assert sum(t["rows"] for t in manifest["tokens"].values()) == 200 * 24
    assert len(manifest["held_in"]["inspect"]) == 240
