"""A support set that is read several times before a question: from the second time on, each photo sees the whole set."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl_adapter.answering.api_types import ClassifyIn
from lcl_adapter.answering.ask import ask_model
from lcl_adapter.answering.predict import Predictor, Question
from lcl_adapter.base.adapter import read_manifest
from lcl_adapter.base.encoder import IGNORED, check_alignment
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.supports import spent_elsewhere, trained_otherwise
from lcl_adapter.data.conversations import WORDINGS, Conversation, Turn, is_support_set, read_again, support_turns
from lcl_adapter.errors import AdapterError, ModelError, RecipeError
from lcl_adapter.recipe import load
from lcl_adapter.serve.adapters import in_its_form
from lcl_adapter.serve.engine import Engine
from lcl_adapter.serve.service import Service
from lcl_adapter.serve.store import Store
from lcl_adapter.training.lengths import Ruler
from tests.test_chunks import photos, url
from tests.test_orientations import ANSWERS, measured_run, question_about, shown_turns, two_sided
from tests.test_pooled import call, recipe_of


@pytest.fixture(scope="module")
def read_twice_run(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured_run(tmp_path_factory.mktemp("twice"), tiny_folder("pocket"), "readings=2")


@pytest.fixture
def twice(tiny_folder: Callable[[str], Path]) -> Predictor:
    return Predictor(load_base(BaseRef(str(tiny_folder("pocket")), device="cpu", readings=2)))


def once(predictor: Predictor) -> Predictor:
    return Predictor(replace(predictor.base, readings=1), predictor.vision)


@given(shots=st.integers(1, 3), readings=st.integers(1, 4), wording=st.sampled_from(sorted(WORDINGS)))
def test_a_set_is_repeated_without_its_instruction_and_is_learned_once(shots: int, readings: int, wording: str) -> None:
    turns = tuple(replace(turn, learn=turn.role == "assistant") for turn in support_turns(photos({"a": shots, "b": shots}), WORDINGS[wording]))
    read = read_again(turns, readings)
    assert read[: len(turns)] == turns
    assert [turn.picture for turn in read] == [turn.picture for turn in turns] * readings
    assert not any(turn.learn for turn in read[len(turns) :])
    instruction = WORDINGS[wording].instruction
    assert not instruction or sum(instruction in turn.text for turn in read) == 1
    assert is_support_set(read)


def test_a_chat_is_read_once() -> None:
    (picture, _), (other, _) = photos({"a": 1, "b": 1})
    chat = (Turn("user", "What is it?", picture), Turn("assistant", "A nut."), Turn("user", "And now?", other))
    assert read_again(chat, 3) == chat


def test_it_is_asked_as_if_the_set_had_been_given_twice(twice: Predictor) -> None:
    turns = shown_turns(twice, photos({"good": 2, "bad": 2}))
    request = (question_about(photos({"query": 1})[0][0], twice), ANSWERS)
    read = twice.run([(turns, *request)])[0]
    given_twice, given_once = (once(twice).run([(shown, *request)])[0] for shown in (read_again(turns, 2), turns))
    assert read.log_likelihoods == pytest.approx(given_twice.log_likelihoods, abs=1e-5)
    assert read.log_likelihoods != pytest.approx(given_once.log_likelihoods, abs=1e-4)
    assert read.text == given_twice.text
    prefilled = twice.prefill(twice.parts(turns, 40))
    assert twice.ask(prefilled, [Question(0, *request)])[0].log_likelihoods == pytest.approx(read.log_likelihoods, abs=1e-5)


def test_each_part_and_orientation_is_read_twice(tiny_folder: Callable[[str], Path]) -> None:
    predictor = Predictor(load_base(BaseRef(str(tiny_folder("pocket")), device="cpu", shots=1, orientations=2, readings=2)))
    turns = shown_turns(predictor, photos({"good": 2, "bad": 2}))
    query = question_about(photos({"query": 1})[0][0], predictor)
    prefilled = predictor.prefill(parts := predictor.parts(turns, 40), behind=40)
    assert len(parts) == 4
    single = Predictor(replace(predictor.base, shots=None, orientations=1, readings=1), predictor.vision)
    same = single.prefill([read_again(part, 2) for part in parts], behind=40)
    replies = [one.ask_parts(read, [Question(0, query, ANSWERS)], generate=False)[0] for one, read in ((predictor, prefilled), (single, same))]
    assert replies[0].log_likelihoods == pytest.approx(replies[1].log_likelihoods, abs=1e-5)


def test_a_training_row_is_what_is_asked(twice: Predictor) -> None:
    encoder = twice.encoder
    shown = shown_turns(twice, photos({"good": 2, "bad": 1}))
    learned = (*shown[:-1], replace(shown[-1], learn=True))
    branches = tuple((question_about(picture, twice), Turn("assistant", label, learn=True)) for picture, label in photos({"good": 1, "bad": 1}))
    conversation = Conversation(learned, branches, "here")
    row = encoder.conversation(conversation)
    assert len(row.pictures) == 2 * 3 + 2
    assert row.ids.count(encoder.image_token_id) == len(row.pictures) * encoder.tokens_an_image
    single = once(twice).encoder.conversation(conversation)
    length, whole = single.branch.count(0), row.branch.count(0)
    assert row.ids[:length] == single.ids[:length]
    assert row.labels[:length] == single.labels[:length] != [IGNORED] * length, "the first reading is learned as it is without another"
    assert row.labels[length:whole] == [IGNORED] * (whole - length), "a label that was shown with this photo is not"
    assert row.labels[whole:] == single.labels[length:]
    check_alignment(encoder, conversation)
    assert Ruler.of(encoder).lengths(conversation)[1] == len(row)


def test_what_does_not_fit_names_the_key_and_counts_each_reading(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    values = recipe_of(tiny_folder("pocket"), tmp_path / "run", None).model_dump(mode="json", exclude_none=True)
    values["sources"]["lcl"] |= {"shots": [2], "ways": [8], "queries": 1}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**values, "wording": "lcl"}))
    result = call("train", tmp_path / "recipe.yaml", "readings=4")
    assert result.exit_code != 0
    message = " ".join(result.output.split())
    assert f"{4 * 2 * 8 + 1} images of" in message
    assert "Lower `readings`, `shots` or `ways`" in message or "or lower `readings`, `shots` or `ways`" in message


def test_independent_photos_are_not_read_again(tiny_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """It would change nothing. A server, which has other adapters too, reads them once and says so."""
    base = BaseRef(str(tiny_folder("pocket")), device="cpu", supports="independent", readings=2)
    with pytest.raises(ModelError, match="readings 2: the labelled pictures do not see each other"):
        load_base(base)
    with pytest.raises(RecipeError, match="changes nothing where labelled pictures do not see each other"):
        load("pocket", ["readings=2", "supports=independent"])
    served = load_base(replace(base, supports="ordered"))
    form = in_its_form("parts", {"supports": "independent"}, served, base)
    assert form.readings == 1
    assert "parts: its labelled photos do not see each other, so a set is read once" in " ".join("".join(capsys.readouterr()).split())


def test_ask_and_a_server_read_the_same(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    base = BaseRef(str(tiny_folder("pocket")), device="cpu")
    for label, colour in {"good": "blue", "bad": "green"}.items():
        for number in range(2):
            two_sided(tmp_path / "photos" / label / f"{number}.png", "red", colour)
    query = two_sided(tmp_path / "query.png", "blue", "white")
    single, double = (ask_model(tmp_path / "photos", [query], base=replace(base, readings=count)) for count in (1, 2))
    assert double.answers[0]["scores"] != single.answers[0]["scores"]
    engine = Engine(load_base(base), 10**9, asked=BaseRef(readings=2)).start()
    try:
        service = Service(engine, Store(tmp_path / "store"))
        stored = [(label, (tmp_path / "photos" / label / f"{number}.png").read_bytes()) for label in ("bad", "good") for number in range(2)]
        service.store.put("local", "halves", stored)
        classification = service.classify("local", ClassifyIn(support_set="halves", images=[url(query.read_bytes())]))
        wait(classification.futures, 120)
        result = classification.response()
        probabilities = np.array([double.answers[0]["scores"][label] for label in result.results[0].probabilities])
        scaled = probabilities ** (1 / result.calibration.temperature)
        assert list(result.results[0].probabilities.values()) == pytest.approx(scaled / scaled.sum(), abs=1e-3)
    finally:
        engine.stop()


def test_a_run_keeps_it_and_other_programs_are_named(read_twice_run: Path, tmp_path: Path) -> None:
    manifest = read_manifest(read_twice_run)
    assert manifest["readings"] == 2
    assert "read 2 times before a question" in (read_twice_run / "README.md").read_text()
    assert json.loads(call("inspect", read_twice_run, "--json").stdout)["readings"] == 2
    assert "a set is read twice here" in spent_elsewhere(manifest)[0]
    [note] = trained_otherwise(manifest, {**manifest, "readings": 1}, "other")
    assert note == "other was trained with sets that are read once, the first adapter with sets that are read twice"
    assert json.loads((read_twice_run / "report.json").read_text())["readings"] == 2
    single = call("eval", read_twice_run, "readings=1", "--json")
    assert single.exit_code == 0
    assert "readings" not in json.loads(single.stdout)
    assert "reads a set twice before a question, and here it is read once" in " ".join(single.stderr.split())
    for file in ("adapter_config.json", "adapter_model.safetensors", "recipe.yaml"):
        (tmp_path / file).write_bytes((read_twice_run / file).read_bytes())
    (tmp_path / "lcl_adapter.json").write_text(json.dumps({**manifest, "readings": 7}))
    with pytest.raises(AdapterError, match="readings is 7"):
        read_manifest(tmp_path)


def test_a_resumed_run_cannot_change_it(read_twice_run: Path) -> None:
    result = call("train", read_twice_run.parent / "recipe.yaml", "readings=3", "resume=true")
    assert result.exit_code != 0
    assert "other values of readings" in " ".join(result.output.split())


@pytest.mark.parametrize("value", ["yes", "true", "5"])
def test_a_recipe_with_another_value_is_refused(value: str) -> None:
    with pytest.raises(RecipeError, match=r"readings.*should be 1, 2, 3 or 4"):
        load("pocket", [f"readings={value}"])
