"""Benchmarks end in one JSON object with ``name`` and ``ratios``, behind a table."""

from __future__ import annotations

import json

import pytest

from benchmarks import predict, train
from benchmarks.common import finish


def test_the_last_line_is_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    finish("made-up", ("measure", "ratio"), [("speed", "2.0")], {"speed": 2.00001})
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == {"name": "made-up", "ratios": {"speed": 2.0}}
    assert "speed" in "\n".join(printed[:-1])


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
