"""A question about labelled photos that is asked in several orientations: each time, all of them are mirrored or turned alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from lcl_adapter.answering.api_types import ChatIn, ClassifyIn
from lcl_adapter.answering.ask import ask_model
from lcl_adapter.answering.chunks import orientation_of
from lcl_adapter.answering.predict import Predictor, Question
from lcl_adapter.base.adapter import read_manifest
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.supports import spent_elsewhere
from lcl_adapter.data.conversations import WORDINGS, Turn, oriented, support_turns
from lcl_adapter.data.sources import Picture, read_image
from lcl_adapter.errors import AdapterError, RecipeError
from lcl_adapter.recipe import load
from lcl_adapter.serve.engine import Engine
from lcl_adapter.serve.service import Service
from lcl_adapter.serve.store import Store
from tests.test_chunks import photos, url
from tests.test_pooled import SUITE, call, recipe_of

ANSWERS = ("good", "bad")


def two_sided(path: Path, left: str, right: str) -> Path:
    """A picture whose halves have two colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (40, 30), left)
    image.paste(right, (20, 0, 40, 30))
    image.save(path)
    return path


def question_about(query: Picture, predictor: Predictor) -> Turn:
    return Turn("user", WORDINGS[predictor.base.family.wording].query, query)


def shown_turns(predictor: Predictor, shown: Sequence[tuple[Picture, str]]) -> tuple[Turn, ...]:
    return support_turns(shown, WORDINGS[predictor.base.family.wording])


def measured_run(folder: Path, base: Path, override: str) -> Path:
    """A run that the command trained and measured, with an override of its recipe."""
    values = recipe_of(base, folder / "run", None).model_dump(mode="json", exclude_none=True)
    (folder / "recipe.yaml").write_text(json.dumps({**values, "evaluate": {"suites": SUITE}}))
    result = call("train", folder / "recipe.yaml", override)
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.fixture(scope="module")
def oriented_run(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured_run(tmp_path_factory.mktemp("oriented"), tiny_folder("pocket"), "orientations=2")


@pytest.fixture
def twice(tiny_folder: Callable[[str], Path]) -> Predictor:
    return Predictor(load_base(BaseRef(str(tiny_folder("pocket")), device="cpu", orientations=2)))


def test_orientations_are_the_eight_of_exif(tmp_path: Path) -> None:
    picture = Picture(two_sided(tmp_path / "half.png", "red", "blue"))
    plain = np.asarray(read_image(picture))
    expected = {1: plain, 2: plain[:, ::-1], 3: plain[::-1, ::-1], 4: plain[::-1]}
    turned = {5: plain, 6: plain[::-1], 7: plain[::-1, ::-1], 8: plain[:, ::-1]}  # then rows become columns
    expected |= {orientation: pixels.transpose(1, 0, 2) for orientation, pixels in turned.items()}
    for orientation, pixels in expected.items():
        oriented_picture = picture.oriented(orientation)
        assert np.array_equal(np.asarray(read_image(oriented_picture)), pixels), orientation
        assert Picture.parse(str(oriented_picture)) == oriented_picture
        assert oriented_picture.oriented(1) == picture
    saved = tmp_path / "tagged.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(plain).save(saved, exif=exif)
    assert np.array_equal(np.asarray(read_image(Picture(saved))), expected[6])
    blended = replace(picture, blend=(Picture(two_sided(tmp_path / "other.png", "green", "white")), 0.3))
    assert np.array_equal(np.asarray(read_image(blended.oriented(2))), np.asarray(ImageOps.mirror(read_image(blended))))


@pytest.mark.parametrize("count", [4, 8])
def test_as_many_orientations_as_asked_for(twice: Predictor, count: int) -> None:
    predictor, once = (Predictor(replace(twice.base, orientations=number), twice.vision) for number in (count, 1))
    turns, turn = shown_turns(twice, photos({"good": 1, "bad": 1})), question_about(photos({"query": 1})[0][0], twice)
    alone = once.run([(oriented(turns, k), oriented([turn], k)[0], ANSWERS) for k in range(1, count + 1)], generate=False)
    assert len({reply.log_likelihoods for reply in alone}) == count
    [reply] = predictor.run([(turns, turn, ANSWERS)], generate=False)
    assert reply.log_likelihoods == pytest.approx(np.mean([one.log_likelihoods for one in alone], axis=0), abs=1e-5)


def test_a_score_is_the_mean_of_a_question_and_its_mirror_image(twice: Predictor) -> None:
    """Photos of a set are mirrored together with the query. The text is written once, about the photos as they are."""
    once = Predictor(replace(twice.base, orientations=1), twice.vision)
    turns, turn = shown_turns(twice, photos({"good": 2, "bad": 2})), question_about(photos({"query": 1})[0][0], twice)
    plain, turned = once.run([(turns, turn, ANSWERS), (oriented(turns, 2), oriented([turn], 2)[0], ANSWERS)])
    assert plain.log_likelihoods != turned.log_likelihoods
    [reply] = twice.run([(turns, turn, ANSWERS)])
    assert reply.log_likelihoods == pytest.approx(np.mean([plain.log_likelihoods, turned.log_likelihoods], axis=0), abs=1e-5)
    assert reply.text == plain.text != ""
    assert twice.run([(turns, turn, ANSWERS)], generate=False)[0].log_likelihoods == pytest.approx(reply.log_likelihoods, abs=1e-5)


@pytest.mark.parametrize("supports", ["ordered", "independent", "compressed"])
def test_prefilled_sets_answer_as_a_run_does(twice: Predictor, supports: str) -> None:
    predictor = Predictor(twice.base.with_supports(None, supports, orientations=2), twice.vision)  # type: ignore[arg-type]
    turns, query = shown_turns(predictor, photos({"good": 2, "bad": 2})), question_about(photos({"query": 1})[0][0], predictor)
    prefilled = predictor.prefill(predictor.parts(turns, behind=40))
    assert (prefilled.orientations, prefilled.divisions) == ((1, 2), 1)
    [asked] = predictor.ask_parts(prefilled, [Question(0, query, ANSWERS)])
    [expected] = predictor.run([(turns, query, ANSWERS)], generate=False)
    assert asked.log_likelihoods == pytest.approx(expected.log_likelihoods, abs=1e-4)


def test_what_is_no_set_of_labelled_photos_is_asked_once(twice: Predictor) -> None:
    """Questions without photos to judge by, and chats: retention has the same questions as before."""
    once = Predictor(replace(twice.base, orientations=1), twice.vision)
    picture = photos({"query": 1})[0][0]
    chat = (Turn("user", "Look.", picture), Turn("assistant", "Yes."))
    requests = [((), Turn("user", "What is this?", picture), ANSWERS), (chat, Turn("user", "And now?"), ANSWERS)]
    assert [r.log_likelihoods for r in twice.run(requests)] == [r.log_likelihoods for r in once.run(requests)]
    assert len(twice.parts(chat, behind=40)) == 1


def test_more_photos_than_in_training_are_mirrored_in_their_parts(tiny_folder: Callable[[str], Path]) -> None:
    predictor = Predictor(load_base(BaseRef(str(tiny_folder("pocket")), device="cpu", shots=1, orientations=2)))
    alone = Predictor(replace(predictor.base, shots=None, orientations=1), predictor.vision)
    turns, query = shown_turns(predictor, photos({"good": 2, "bad": 2})), question_about(photos({"query": 1})[0][0], predictor)
    parts = predictor.parts(turns, behind=40)
    assert [orientation_of(part) for part in parts] == [1, 1, 2, 2]
    assert predictor.prefill(parts).divisions == 2
    expected = [alone.run([(part, oriented([query], 2)[0] if place > 1 else query, ANSWERS)])[0].log_likelihoods for place, part in enumerate(parts)]
    [reply] = predictor.run([(turns, query, ANSWERS)])
    assert reply.log_likelihoods == pytest.approx(np.mean(expected, axis=0), abs=1e-5)
    assert reply.text == alone.run([(turns, query, ())])[0].text


def test_ask_and_a_server_ask_the_same(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The photos are two-sided, so the second question is another one; texts are written about the photos as they are."""
    base = BaseRef(str(tiny_folder("pocket")), device="cpu")
    colours = {"good": ("red", "blue"), "bad": ("red", "green")}
    for label, halves in colours.items():
        for number in range(2):
            two_sided(tmp_path / "photos" / label / f"{number}.png", *halves[:: 1 if number else -1])
    query = two_sided(tmp_path / "query.png", "blue", "white")
    once, both = (ask_model(tmp_path / "photos", [query], base=replace(base, orientations=count)) for count in (1, 4))
    assert both.answers[0]["scores"] != once.answers[0]["scores"]
    assert both.answers[0]["answer"] == once.answers[0]["answer"] != ""
    assert both.result["notes"] == once.result["notes"], "it is one part"
    engine = Engine(load_base(base), 10**9, asked=BaseRef(orientations=4)).start()
    try:
        service = Service(engine, Store(tmp_path / "store"))
        stored = [(label, (tmp_path / "photos" / label / f"{number}.png").read_bytes()) for label in sorted(colours) for number in range(2)]
        service.store.put("local", "halves", stored)
        for _ in range(2):
            classification = service.classify("local", ClassifyIn(support_set="halves", images=[url(query.read_bytes())]))
            wait(classification.futures, 120)
            result = classification.response()
            job, _ = service.chat("local", ChatIn(model="base", support_set="halves", messages=[{"role": "user", "content": "Well?"}], max_tokens=2))
            engine.submit(job)
            job.future.result(60)
        assert (result.parts, engine.counters.prefills) == (1, 2), "once for scores, once for texts"
        probabilities = np.array([both.answers[0]["scores"][label] for label in result.results[0].probabilities])
        scaled = probabilities ** (1 / result.calibration.temperature)
        assert list(result.results[0].probabilities.values()) == pytest.approx(scaled / scaled.sum(), abs=1e-3)
    finally:
        engine.stop()


def test_an_edited_set_is_read_again_where_it_must_be(tiny_folder: Callable[[str], Path]) -> None:
    """An independent set grows by a photo and its mirror image; the others are not read again."""
    predictor = Predictor(load_base(BaseRef(str(tiny_folder("pocket")), device="cpu", supports="independent", orientations=2)))
    shown = photos({"good": 2, "bad": 2})
    query = question_about(photos({"query": 1})[0][0], predictor)
    before = predictor.prefill(predictor.parts(shown_turns(predictor, shown[:-1]), 40))
    turns = shown_turns(predictor, shown)
    grown, fresh = (predictor.prefill(predictor.parts(turns, 40), known=known) for known in ([before], []))
    replies = [predictor.ask_parts(one, [Question(0, query, ANSWERS)])[0].log_likelihoods for one in (grown, fresh)]
    assert replies[0] == pytest.approx(replies[1], abs=1e-4)


def test_a_run_keeps_it_and_other_programs_are_named(oriented_run: Path) -> None:
    manifest = read_manifest(oriented_run)
    assert manifest["orientations"] == 2
    assert "asked 2 times" in (oriented_run / "README.md").read_text()
    assert json.loads(call("inspect", oriented_run, "--json").stdout)["orientations"] == 2
    assert "asked in 2 orientations here" in spent_elsewhere(manifest)[0]
    assert spent_elsewhere({**manifest, "orientations": 1}) == []
    report = json.loads((oriented_run / "report.json").read_text())
    assert report["orientations"] == 2
    once = call("eval", oriented_run, "orientations=1", "--json")
    assert once.exit_code == 0
    assert "orientations" not in json.loads(once.stdout)
    assert "asks a question in 2 orientations, and here it is asked in one orientation" in " ".join(once.stderr.split())
    assert json.loads(once.stdout)["folder"].endswith("partial")


def test_a_manifest_with_another_word_is_refused(oriented_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors", "recipe.yaml"):
        (folder / file).write_bytes((oriented_run / file).read_bytes())
    (folder / "lcl_adapter.json").write_text(json.dumps({**read_manifest(oriented_run), "orientations": 3}))
    with pytest.raises(AdapterError, match="orientations is 3"):
        read_manifest(folder)


@pytest.mark.parametrize("value", ["yes", "true", "3"])
def test_a_recipe_with_another_value_is_refused(value: str) -> None:
    """`yes` equals 1 in YAML, and would be one orientation silently."""
    with pytest.raises(RecipeError, match=r"orientations.*should be 1, 2, 4 or 8"):
        load("pocket", [f"orientations={value}"])
