"""``benchmarks.gpu`` on a CPU, in a tiny shape: every part gives figures, and a part that fails does not stop the rest."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_page import page


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part in this process, because a child spends its time on imports."""
    monkeypatch.setattr(gpu, "run_part", lambda name, shape, folder, limit: {**gpu.PARTS[name](shape, folder), "wall_seconds": 1.0})
    monkeypatch.setattr(gpu, "commit", lambda: "abc1234")


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.usefixtures("in_process")
@pytest.mark.filterwarnings("ignore")  # of the stock trainer
def test_every_part_gives_figures(tmp_path: Path) -> None:
    result = gpu.main(["--shape", "tiny", "--out", str(tmp_path), "--folder", str(tmp_path / "work")])
    parts = result["parts"]
    assert set(parts) == set(gpu.PARTS)
    assert "failed" not in json.dumps(parts), json.dumps(parts)
    assert all(math.isfinite(n) for n in numbers(parts))
    for name in ("nf4", "bf16"):
        for row in parts[name]["trainings"]:
            assert min(row[side][key] for side in ("ours", "stock") for key in ("seconds_a_step", "peak")) > 0
            ours, stock = row["ours"]["losses"][0], row["stock"]["losses"][0]
            assert ours == pytest.approx(stock, rel=0.05), "the same rows; a tokenizer may split an answer in another way"
    two, sixteen = parts["pooled"]["trainings"]
    assert (two["shots"], sixteen["shots"], sixteen["support_tokens"]) == (2, 16, 1)
    assert sixteen["ours"]["longest_row"] <= sixteen["tokens"], "what is trained is as long as what was forecast"
    assert result["figures"]["pooled, 16 shots: peak / 2 whole shots'"] == sixteen["ours"]["peak"] / two["ours"]["peak"]
    assert parts["bf16"]["asking"]["same_answers"] == 1
    [written] = tmp_path.glob("gpu-*.json")
    assert json.loads(written.read_text()) == result
    text = (tmp_path / "gpu-results.md").read_text()
    assert "at commit abc1234 on one CPU" in " ".join(text.split())
    for heading in ("Training in 4 bits", "Sixteen photos of each class beside two", "Training and asking in 16 bits", "Merge and conversion"):
        assert f"## {heading}" in text


def test_a_part_that_fails_is_reported_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends with an error, one that runs out of time, and one that has no time left."""
    program = tmp_path / "python"
    program.write_text(
        '#!/bin/sh\ncase "$*" in\n*"--part model"*) echo \'{"seconds": 1, "bytes": 5}\';;\n'
        '*"--part nf4"*) echo \'{"trainings": []}\'; exit 3;;\n'
        '*"--part pooled"*) echo \'{"trainings": []}\';;\n'
        "*) echo '{\"rows\": []}'; exec sleep 60;;\nesac\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(program))
    monkeypatch.setattr(gpu, "LIMITS", {**gpu.LIMITS, "bf16": 1})
    monkeypatch.setattr(gpu, "commit", lambda: "abc1234")
    times = iter([0.0] * 13)
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(times, 1000.0))
    result = gpu.main(["--shape", "tiny", "--out", str(tmp_path), "--folder", str(tmp_path / "work"), "--minutes", "1"])
    parts = result["parts"]
    assert parts["model"]["bytes"] == 5
    assert parts["nf4"]["failed"] == "ended with code 3"
    assert parts["nf4"]["trainings"] == [], "what it had found stays"
    assert parts["bf16"]["failed"] == "stopped after 1 s"
    assert parts["files"]["failed"].startswith("not started: the 1 minutes were over")
    text = (tmp_path / "gpu-results.md").read_text()
    assert "This part did not finish: ended with code 3." in text
    assert page(result) == text


STORED = sorted(Path("benchmarks/results").glob("gpu-*.json"))
WITH_FORECASTS = [path for path in STORED if "forecasts_of" in json.loads(path.read_text())]  # the others are of `--only files`


def test_a_stored_result_has_forecasts() -> None:
    assert WITH_FORECASTS


@pytest.mark.parametrize("path", WITH_FORECASTS, ids=lambda path: path.stem)
def test_todays_forecasts_are_near_the_peaks_that_a_gpu_showed(path: Path) -> None:
    """Every stored training, and asking. A change of a formula is held against real peaks without a GPU."""
    stored = json.loads(path.read_text())
    again = gpu.with_forecasts(copy.deepcopy(stored))
    rows = [row["ours"] for name in ("nf4", "bf16") for row in again["parts"][name]["trainings"]] + again["parts"]["forecasts"]["rows"]
    assert len(rows) == 13
    for row in (*rows, again["parts"]["bf16"]["asking"]):
        assert abs(row["forecast"] / row["peak"] - 1) < 0.1, row
    again["forecasts_of"] = stored["forecasts_of"]
    assert again == stored, f"run `python -m benchmarks.gpu --forecasts {path}`"


def test_the_committed_page_is_the_stored_result() -> None:
    """There is one page, of one card."""
    pages = [page(json.loads(path.read_text())) for path in STORED]
    assert Path("docs/gpu-results.md").read_text(encoding="utf-8") in pages


def test_a_figure_that_fails_does_not_cost_the_others() -> None:
    def broken() -> gpu.Result:
        raise ValueError("no such thing\nmore")

    assert gpu._reported(broken) == {"failed": "ValueError: no such thing"}
