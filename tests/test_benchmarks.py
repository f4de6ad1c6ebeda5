"""Every benchmark runs to its end at a small size: its figures are finite, and its two sides agree. Not how fast they are.

``benchmarks.gpu`` has tests/test_gpu_benchmark.py.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import calibrate, common, data, merge, plan, predict, soak, train
from lcl_adapter.base import model
from lcl_adapter.base.adapter import save_adapter
from lcl_adapter.base.model import attach, load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.pocket import BASE
from lcl_adapter.recipe.schema import AdapterOptions
from tests.live import serving

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What a benchmark gives a child process runs in this one, because a child spends its time on imports. All files go
    to ``tmp_path``.
    """

    def child(module: str, *arguments: str) -> Any:
        return json.loads(json.dumps(importlib.import_module(module).main(arguments)))

    for benchmark in (train, data, merge, plan):
        monkeypatch.setattr(benchmark, "child", child)
    for benchmark in (data, merge, plan):
        monkeypatch.setattr(benchmark, "FOLDER", tmp_path / "build")
    for benchmark in (train, calibrate, soak, predict):
        monkeypatch.setattr(benchmark, "THREADS", torch.get_num_threads())
    monkeypatch.setattr(common, "RANDOM_SMALL", tmp_path / "random")
    monkeypatch.setattr(model, "release_large_blocks", model.release_large_blocks)  # benchmarks.plan replaces it in its child
    return


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a new adapter on the shipped base."""
    folder = tmp_path_factory.mktemp("run")
    base = attach(load_base(BaseRef("pocket", device="cpu")), AdapterOptions(rank=4))
    torch.manual_seed(0)
    for name, parameter in base.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    save_adapter(base, folder, "pocket", {})
    (folder / "recipe.yaml").write_text("base: pocket\nsources: {lcl: {type: pocket}}\n")
    return folder


def finite(result: dict[str, Any]) -> dict[str, float]:
    """Ratios and figures together."""
    numbers = {**result["ratios"], **result["figures"]}
    assert result["ratios"]
    assert all(math.isfinite(value) for value in numbers.values()), numbers
    assert all(len(row) == len(result["columns"]) for row in result["rows"])
    return numbers


def test_predict() -> None:
    assert finite(predict.main(["--small"]))["same_answers"] == 1


@pytest.mark.filterwarnings("ignore")  # of the stock trainer
def test_train(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = itertools.count(10**9, 10**6)
    monkeypatch.setattr(train, "peak", lambda: next(steps))  # in one process, the second side's peak is the first's
    numbers = finite(train.main(["--small"]))
    for name in ("random_150m", "pocket"):
        assert numbers[f"{name}_queries_a_second"] > 0
        assert numbers[f"{name}_first_loss_ours"] == pytest.approx(numbers[f"{name}_first_loss_stock"], rel=0.05), (
            "the same rows; a tokenizer may split an answer in another way"
        )


def test_data() -> None:
    assert finite(data.main(["--small"]))["same_rows"] == 1


def test_merge() -> None:
    numbers = finite(merge.main(["--small"]))
    assert numbers["fp32: ulp"] <= 1
    assert numbers["bf16: ulp"] <= 1


def test_plan() -> None:
    assert finite(plan.main(["--small"]))["forecast of 7B in GB"] == pytest.approx(10, abs=5)


def test_calibrate(run: Path) -> None:
    numbers = finite(calibrate.main([str(run), "--small"]))
    assert all(0 <= value <= 1 for value in numbers.values())


@contextmanager
def server_here(command: list[str], ready_path: str) -> Iterator[tuple[Any, Any]]:
    """``serve.running`` for this project's server, in this process."""
    import httpx2
    import psutil

    assert command[1] == "serve"
    base = BASE if command[2] == "pocket" else Path(command[2])
    adapters = dict([command[command.index("--adapter") + 1].split("=")]) if "--adapter" in command else {}
    raise NotImplementedError((base, adapters, httpx2, psutil, serving, ready_path))


def test_both_sides_of_the_training_benchmark_see_the_same_questions() -> None:
    from lcl_adapter.data.conversations import WORDINGS, to_conversation
    from lcl_adapter.data.mixture import Mixture

    made = train.recipe("pocket", 2, 1, "out")
    conversation = to_conversation(Mixture(made).draw(0), WORDINGS["short"])
    assert len(conversation.branches) == train.QUERIES
    row = train.stock_row(conversation, 1)
    assert row["completion"][0]["content"][0]["text"] == conversation.branches[1][-1].text
    assert len(row["images"]) == 5


def test_the_prediction_benchmark_asks_what_it_says() -> None:
    support, queries = predict.episode(8, 32)
    assert sum(t.picture is not None for t in support) == 16
    assert len(queries) == 32
