"""Suites of what a language model can do without pictures: the perplexity of a page, and questions with accepted answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from lcl_adapter import recipe as recipes
from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.model import load_base
from lcl_adapter.cli import main
from lcl_adapter.data.sources.llava_json import read_llava_json
from lcl_adapter.errors import DataError, EpisodeError, RecipeError
from lcl_adapter.evaluate import metrics, rules
from lcl_adapter.evaluate.cases import Selection
from lcl_adapter.evaluate.metrics import Estimate
from lcl_adapter.evaluate.retention import retention_of
from lcl_adapter.evaluate.suites import check_suites, perplexity
from lcl_adapter.packaged import packaged
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.suites import PerplexitySuite
from lcl_adapter.report import retention_line
from tests.conftest import EVERY

PAGE = 'The old mill. "Is it far?" he said. It was 3.5 miles.\n\nWe went there.\nNobody came, e.g. no child! So it goes'


def test_sentences_join_to_their_paragraphs() -> None:
    pieces = perplexity.sentences(PAGE)
    assert [piece.strip() for _, piece in pieces] == [
        "The old mill.", '"Is it far?" he said.', "It was 3.5 miles.", "We went there.", "Nobody came, e.g. no child!", "So it goes",
    ]  # fmt: skip
    assert "".join(piece for _, piece in pieces[:3]) == pieces[2][0] + pieces[2][1] == " ".join(PAGE.split("\n\n")[0].split())


@given(st.text(st.sampled_from('aB .!?"\n'), max_size=60))
def test_no_character_of_a_text_is_lost(text: str) -> None:
    assert "".join("".join(piece.split()) for _, piece in perplexity.sentences(text)) == "".join(text.split())


def test_the_shipped_page_and_questions() -> None:
    text = packaged(Path("photo:text/page.txt")).read_text(encoding="utf-8")
    assert 300 <= len(text.split()) <= 600
    assert len(perplexity.sentences(text)) >= 25
    pool = read_llava_json(packaged(Path("photo:text/questions.jsonl")), None)
    assert len(pool) == 30
    for dialogue in pool.dialogues:
        (exchange,) = dialogue.exchanges
        assert exchange.answer == exchange.answers[0]
        assert exchange.picture is None
        choice = " or " in exchange.question  # which offers the answer
        assert choice or not rules.contains(exchange.question, exchange.answers)


@pytest.mark.parametrize("family", EVERY)
def test_it_is_the_likelihood_of_the_plain_text(tiny_folder: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """The sentences' log-likelihoods add up to that of the paragraph in a plain forward pass, without its first token if none begins it."""
    base = load_base(str(tiny_folder(family)))
    (tmp_path / "page.txt").write_text("What is this? Now the good image. Learn the names.", encoding="utf-8")
    cell = perplexity.page("page", PerplexitySuite(kind="perplexity", file=tmp_path / "page.txt"), Selection("page", 0))
    replies = Predictor(base).run([(c.support, c.query, c.answers) for c in cell.cases], new_tokens=0)
    assert [reply.text for reply in replies] == ["", "", ""]
    encoder = base.encoder()
    ids = [*encoder.bos, *encoder.tokenizer((tmp_path / "page.txt").read_text(), add_special_tokens=False)["input_ids"]]
    positions = torch.arange(len(ids))[None]
    positions = positions.expand(3, -1, -1) if encoder.grid else positions
    with torch.no_grad():
        logits = base.model(input_ids=torch.tensor([ids]), position_ids=positions).logits[0, :-1].float().log_softmax(-1)
    plain = logits.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
    assert sum(reply.tokens[0] for reply in replies) == len(ids) - 1
    assert sum(reply.log_likelihoods[0] for reply in replies) == pytest.approx(plain, rel=1e-4)
    figures = cell.judge(cell.cases, replies).figures
    assert figures["value"] == pytest.approx(math.exp(-plain / (len(ids) - 1)), rel=1e-3)
    low, high = figures["ci95"]
    assert low <= figures["value"] <= high


def page_recipe(allowed: str = "5%") -> Recipe:
    suites = {"page": {"kind": "perplexity"}}
    return Recipe.model_validate({"base": "b", "sources": {"a": {"type": "pocket"}}, "evaluate": {"suites": suites, "retention": {"page": allowed}}})


@pytest.mark.parametrize(
    ("rise", "spread", "verdict"),
    [(0.02, 0.001, "retained"), (0.2, 0.001, "lost"), (0.05, 0.1, "undecided"), (-0.3, 0.001, "retained")],
)
def test_the_gate_is_decided_by_the_relative_rise(rise: float, spread: float, verdict: str) -> None:
    """30 sentences of 20 tokens; the base's perplexity is 40, the adapter's ``rise`` above it."""
    tokens, groups = [20] * 30, [str(n) for n in range(30)]
    noise = [spread * math.sin(7.0 * n) for n in range(30)]
    base = metrics.log_perplexity([20 * math.log(40)] * 30, tokens, groups)
    adapter = metrics.log_perplexity([20 * (math.log(40) + math.log1p(rise) + e - sum(noise) / 30) for e in noise], tokens, groups)
    assert base.shown == pytest.approx(40)
    fall = Estimate.from_json(json.loads(json.dumps(base.minus(adapter).to_json())))
    [row] = retention_of([("page", 30, fall)], page_recipe())
    assert (row["verdict"], row["unit"], row["allowed"]) == (verdict, "%", 5.0)
    assert row["fell"] == pytest.approx(100 * rise, abs=0.02)
    assert row["interval"][0] <= row["fell"] + 0.01
    line = retention_line(row)
    assert line.startswith(f"page: perplexity {100 * rise:+.1f} % against the base")
    assert "+5.0 % is allowed" in line


def test_an_allowance_has_the_suites_unit() -> None:
    assert page_recipe("2.5 %").evaluate.retention == {"page": "2.5%"}
    with pytest.raises(ValueError, match="write page: 5%"):
        page_recipe("5")
    with pytest.raises(ValueError, match="neither points"):
        page_recipe("a lot")
    with pytest.raises(RecipeError, match="write vqa: 5"):
        recipes.load("pocket", ["evaluate.retention.vqa=5%"])


def test_a_page_that_cannot_be_measured_is_refused_before_training(tmp_path: Path, pocket_tiny: Path) -> None:
    from lcl_adapter.base.model import load_encoder

    def check(text: str | None) -> None:
        if text is not None:
            (tmp_path / "page.txt").write_text(text, encoding="utf-8")
        suites = {"page": {"kind": "perplexity", "file": str(tmp_path / "page.txt")}}
        made = Recipe.model_validate({"base": "b", "sources": {"a": {"type": "pocket"}}, "evaluate": {"suites": suites}})
        check_suites(made, load_encoder(str(pocket_tiny)))

    with pytest.raises(DataError, match="no such file"):
        check(None)
    with pytest.raises(DataError, match="no two sentences"):
        check("Only one.")
    with pytest.raises(EpisodeError, match="divide its paragraphs"):
        check("What is this? " * 900)
    with pytest.raises(DataError, match="special token"):
        check("What </s> is? This is.")
    check(PAGE)


# --- questions with accepted answers


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("The capital of France is Paris.", ["Paris"], True),
        ("paris", ["Paris"], True),
        ("2 + 2 is 14", ["4", "four"], False),
        ("It is Four!", ["4", "four"], True),
        ("H2O.", ["H2O"], True),
        ("", ["4"], False),
        ("catapult", ["cat"], False),
        ("New  York", ["new york"], True),
    ],
)
def test_an_accepted_answer_may_stand_anywhere(text: str, answers: list[str], right: bool) -> None:
    assert rules.contains(text, answers) is right


def test_questions_without_pictures(tmp_path: Path) -> None:
    def read(record: dict[str, Any], images: Path | None = None) -> Any:
        (tmp_path / "q.jsonl").write_text(json.dumps(record) + "\n")
        return read_llava_json(tmp_path / "q.jsonl", images)

    turns = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
    assert read({"id": 1, "conversations": turns, "answers": ["4", "four"]}).dialogues[0].exchanges[0].answers == ("4", "four")
    assert read({"id": 1, "conversations": turns}).dialogues[0].exchanges[0].answers == ()
    with pytest.raises(DataError, match="no `images`"):
        read({"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "<image>?"}, turns[1]]})
    for wrong in ("4", [4], [""]):
        with pytest.raises(DataError, match="`answers` is a list of texts"):
            read({"id": 1, "conversations": turns, "answers": wrong})


def test_both_presets_run_are_reported_and_measured_while_training(tmp_path: Path, pocket_tiny: Path) -> None:
    """On the tiny base, which knows no English: the figures are finite, and base and adapter are compared."""
    run = tmp_path / "run"
    changes = [f"base={pocket_tiny}", f"output={run}", "train.max_steps=2", "train.per_device_train_batch_size=2", "train.logging_steps=1"]
    changes += ["evaluate.suites={page: {preset: page}, questions: {preset: questions}}", "evaluate.retention={page: 5%, questions: 5}"]
    changes += ["evaluate.every=1", "evaluate.during_limit=6", "evaluate.during=[]", "evaluate.validation.words.episodes=4"]
    result = CliRunner().invoke(main, ["train", "recipes/pocket.yaml", *changes, "--json"])
    assert result.exit_code in {0, 3}, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)["suites"]}
    page = rows["page"]
    assert page["chance"] is None
    assert page["n"] > 20, "six are set aside for measuring while training"
    for who in ("base", "adapter"):
        assert 1 < page[who]["ci95"][0] <= page[who]["value"] <= page[who]["ci95"][1] < 1e6
    assert page["difference"]["relative"]
    assert page["difference"]["value"] == pytest.approx(page["adapter"]["value"] / page["base"]["value"] - 1, abs=1e-3)
    assert rows["questions"]["metric"] == "answer contained"
    watched = json.loads((run / "watched.json").read_text())
    assert watched["base"]["page"] > 1
    assert {gate["suite"]: gate["unit"] for gate in watched["steps"][0]["retention"]} == {"page": "%", "questions": "points"}
    assert "perplexity" in (run / "report.html").read_text()
    assert "| page | " in (run / "README.md").read_text()
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert {line["right"] for line in lines if line["cell"] == "page"} == {None}
