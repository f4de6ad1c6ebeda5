"""Replay without data: a base answers prompts before training, and its answers are learned like any other."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.encoder import IGNORED
from lcl_adapter.base.model import load_base, load_encoder
from lcl_adapter.cli import main
from lcl_adapter.data.conversations import Turn, from_dialogues
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import Dialogue, Exchange
from lcl_adapter.data.sources.self_replay import NOT_ANSWERED, OwnAnswer, SelfReplay, read_prompts, with_answers
from lcl_adapter.errors import DataError, EpisodeError, RecipeError
from lcl_adapter.packaged import packaged
from lcl_adapter.recipe import Recipe, load
from lcl_adapter.training import replay, trainer
from lcl_adapter.training.collate import Collator
from lcl_adapter.training.lengths import check_rows
from tests.conftest import EVERY, paint
from tests.test_trainer import losses, small

PROMPTS = "# comment\nWhat is this?\n\nNow, what is this?\nLearn the names.\n<image> What is this?\n"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text(PROMPTS, encoding="utf-8")
    return file


def options_of(prompts: Path, **more: Any) -> SelfReplay:
    return SelfReplay.model_validate({"type": "self", "prompts": prompts, "max_new_tokens": 6, **more})


def made(base: Path, output: Path, prompts: Path, train: dict[str, Any] | None = None, **more: Any) -> Recipe:
    values = small(base, output, **{"max_steps": 2, **(train or {})}).model_dump(mode="json", exclude_none=True)
    own = {"type": "self", "prompts": str(prompts), "max_new_tokens": 6, "packed": 2, "share": 0.5, **more}
    return Recipe.model_validate({**values, "sources": {"lcl": values["sources"]["lcl"], "own": own}})


# --- reading, without a model


def test_prompts_are_read_without_a_model(prompts: Path, photos: Path) -> None:
    pool = read_prompts(options_of(prompts))
    assert [d.exchanges[0].question for d in pool.dialogues] == ["What is this?", "Now, what is this?", "Learn the names."]
    assert {d.exchanges[0].answer for d in pool.dialogues} == {NOT_ANSWERED}
    assert pool.new_tokens == 6
    with_pictures = read_prompts(options_of(prompts, images=photos, pictures=5))
    asked = [d.exchanges[0] for d in with_pictures.dialogues[3:]]
    assert len(asked) == 5
    assert all(e.picture is not None and e.question == "What is this?" for e in asked)
    assert len(read_prompts(options_of(prompts, answers=3, temperature=0.8))) == 9
    fingerprints = {read_prompts(options_of(prompts, **change)).fingerprint for change in ({}, {"temperature": 0.5}, {"max_new_tokens": 7})}
    assert len(fingerprints) == 3


def test_the_shipped_prompts_are_many_different_and_no_question_of_the_suite() -> None:
    pool = read_prompts(options_of(packaged(Path("photo:text/prompts.txt"))))
    questions = [d.exchanges[0].question for d in pool.dialogues]
    assert len(set(questions)) == len(questions) > 200
    lines = packaged(Path("photo:text/questions.jsonl")).read_text(encoding="utf-8").splitlines()
    assert not {json.loads(line)["conversations"][0]["value"] for line in lines} & set(questions)


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("", {}, "no prompt in it"),
        ("<image> What?\n", {}, "set `images`"),
        ("What?\n", {"images": "photos"}, "nothing would be asked about the pictures"),
        ("<image> and <image>?\n", {}, "line 1: <image> twice"),
        ("<image> What?\n", {"images": "empty"}, "no pictures in it"),
        (None, {}, "no such file"),
        (b"\xff\xff", {}, "not UTF-8"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, photos: Path, text: str | bytes | None, more: dict[str, str], message: str) -> None:
    file = tmp_path / "own.txt"
    (tmp_path / "empty").mkdir()
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        read_prompts(options_of(file, **{key: tmp_path / value for key, value in more.items()}))


def test_several_answers_need_a_temperature_and_a_suite_cannot_ask_for_them(tmp_path: Path) -> None:
    sources = {"sources.own.type=self", "sources.own.answers=2"}
    with pytest.raises(RecipeError, match="set a temperature"):
        load("pocket", sorted(sources))
    with pytest.raises(RecipeError, match="'self' is none of"):
        load("pocket", ["evaluate.suites.vqa.source.type=self"])


# --- the answers


def test_the_base_answers_as_it_does_alone(tiny_folder: Callable[[str], Path], prompts: Path, photos: Path, tmp_path: Path) -> None:
    """Greedy answers are those of :class:`Predictor`, pictures included, whichever are answered together."""
    base = load_base(str(tiny_folder("llava-1.5")))
    recipe = made(base.path, tmp_path / "run", prompts, images=str(photos))
    mixture = Mixture(recipe)
    answered = replay.answer_prompts(mixture, base, tmp_path / "run").pools["own"]
    predictor = Predictor(base, max_new_tokens=6)
    compared = 0
    for before, after in zip(mixture.pools["own"].dialogues, answered.dialogues, strict=True):
        exchange = after.exchanges[0]
        (alone,) = predictor.run([((), Turn("user", exchange.question, exchange.picture), ())])
        if after.origin == before.origin and exchange.answer == alone.text:
            compared += 1
    assert compared >= len(answered) - 2, "an answer that cannot be learned is replaced by another"
    assert answered.new_tokens == 0


def test_drawn_answers_differ_and_are_drawn_again(pocket_tiny: Path, prompts: Path, tmp_path: Path) -> None:
    base = load_base(str(pocket_tiny))
    recipe = made(pocket_tiny, tmp_path, prompts, answers=4, temperature=1.5)
    texts = [
        [d.exchanges[0].answer for d in replay.answer_prompts(Mixture(recipe), base, tmp_path / run).pools["own"].dialogues] for run in ("one", "two")
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 3


def test_answers_that_cannot_be_learned_are_replaced_and_counted(prompts: Path) -> None:
    pool = read_prompts(options_of(prompts))
    answered = with_answers(pool, [OwnAnswer("a", True), None, OwnAnswer("b", False)])
    assert [d.exchanges[0].answer for d in answered.dialogues] == ["a", "b", "b"]
    assert answered.skipped == {"no answer that can be learned": 1}
    assert with_answers(pool, [None, OwnAnswer("a", True), None]).dialogues[2].exchanges[0].question == "Now, what is this?"
    with pytest.raises(DataError, match="no answer that could be learned"):
        with_answers(pool, [None, None, None])


@pytest.mark.parametrize("family", EVERY)
def test_the_end_of_a_cut_answer_is_not_learned(tiny_folder: Callable[[str], Path], family: str) -> None:
    encoder = load_encoder(str(tiny_folder(family)))

    def labels(unfinished: bool) -> list[int]:
        exchange = Exchange("What is this?", "the good", unfinished=unfinished)
        return encoder.conversation(from_dialogues((Dialogue((exchange, exchange), ""),))).labels

    whole, cut = labels(False), labels(True)
    assert whole.count(encoder.eos) == 2
    assert cut == [IGNORED if label == encoder.eos else label for label in whole]


# --- in a run


def test_a_run_learns_its_own_answers_and_a_resumed_one_the_same(
    pocket_tiny: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(pocket_tiny, tmp_path / "whole", prompts)
    facts = trainer.train(whole)
    assert facts["tokens"]["own"]["learned"] > 0
    stored = json.loads((tmp_path / "whole" / "replay" / "own.json").read_text())
    assert len(stored["answers"]) == 3
    # Stopped while the base answers: the run can be resumed.
    cut = made(pocket_tiny, tmp_path / "cut", prompts)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(replay, "_generate", stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(cut)
    assert not (tmp_path / "cut" / "replay").exists()
    # Stopped behind that: the stored answers are read, and the base is not asked again.
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "attach", stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(cut, resume=True)
        patched.setattr(replay, "_generate", stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(cut, resume=True)
    trainer.train(cut, resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    prompts.write_text("Another prompt\n")
    (tmp_path / "cut" / "lcl_adapter.json").unlink()
    with pytest.raises(Exception, match="the data of own changed"):
        trainer.train(cut, resume=True)


def test_rows_are_bounded_before_weights_are_loaded(tiny_folder: Callable[[str], Path], prompts: Path, photos: Path, tmp_path: Path) -> None:
    """No answered row is longer than the bound of the unanswered ones, and the bound counts the longest answer."""
    for family in ("pocket", "llava-1.5", "llava-onevision"):
        base = load_base(str(tiny_folder(family)))
        recipe = made(base.path, tmp_path / family, prompts, images=str(photos), max_new_tokens=40, temperature=2.0)
        mixture = Mixture(recipe)
        bound = check_rows(Collator(mixture, load_encoder(str(base.path)))).bounds["own"]
        answered = replay.answer_prompts(mixture, base, tmp_path / family)
        rows = check_rows(Collator(answered, base.encoder()))
        assert 80 < rows.most("own") <= bound, family


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(pocket_tiny: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(EpisodeError, match=r"prompts.txt, line \d: \d+ tokens, with an answer of up to 1020, .*max_new_tokens"):
        trainer.train(made(pocket_tiny, tmp_path / "run", prompts, max_new_tokens=1020))
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_check_preview_and_plan_know_the_source(pocket_tiny: Path, prompts: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.write(paint(tmp_path / "a.png", (10, 200, 30)), "a.png")
        archive.writestr("broken.png", b"no picture")
    from lcl_adapter.recipe import save

    save(made(pocket_tiny, tmp_path / "run", prompts, images=str(tmp_path / "more.zip")), tmp_path / "own.yaml")
    checked = json.loads(CliRunner().invoke(main, ["data", "check", str(tmp_path / "own.yaml"), "--json"]).stdout)
    assert [fault["source"] for fault in checked["faults"]] == ["own"], "the broken picture"
    assert checked["sources"]["own"]["entries"] == 5
    assert checked["rows"]["longest"]["own"] > 12
    shown = CliRunner().invoke(main, ["data", "preview", str(tmp_path / "own.yaml"), "--out", str(tmp_path / "page.html"), "--source", "own"])
    assert shown.exit_code == 0, shown.output
    assert NOT_ANSWERED in (tmp_path / "page.html").read_text()
    planned = CliRunner().invoke(main, ["plan", str(tmp_path / "own.yaml"), "--memory", "16GB", "--json"])
    assert planned.exit_code == 0, planned.output
