"""Support sets in parts, because of the context or of an adapter's shots: their parts, their scores, `ask` and a server."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lcl_adapter.answering.api_types import ChatIn, ClassifyIn
from lcl_adapter.answering.ask import ask_model
from lcl_adapter.answering.chunks import divided, fits, parts_that_fit, tokens_asked
from lcl_adapter.answering.predict import Predictor, Question
from lcl_adapter.base.adapter import FILES, MANIFEST, read_manifest
from lcl_adapter.base.encoder import Encoder
from lcl_adapter.base.model import load_base, load_encoder
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.data.conversations import WORDINGS, Turn, support_turns
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import AdapterError, EpisodeError, RequestError
from lcl_adapter.serve.engine import Engine
from lcl_adapter.serve.service import Service
from lcl_adapter.serve.store import Store
from tests.conftest import paint

CONTEXT = 220  # tokens: about ten photos of the tiny base
WORDING = WORDINGS["short"]


@pytest.fixture(scope="module")
def loaded(tiny_folder: Callable[[str], Path]) -> Encoder:
    return load_encoder(str(tiny_folder("pocket")))


def with_context(encoder: Encoder, context: int) -> Encoder:
    encoder.context = context
    return encoder


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def photos(counts: dict[str, int]) -> list[tuple[Picture, str]]:
    numbered = [(label, n) for label, count in counts.items() for n in range(count)]
    return [(Picture(Path(f"{label}{n}"), data=png(100 * place + n)), label) for place, (label, n) in enumerate(numbered)]


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["good", "bad", "scratched"]), st.integers(1, 25), min_size=2),
    st.integers(150, 1000),
    st.sampled_from([None, 1, 2, 4]),
)
def test_parts_fit_have_every_label_and_lose_no_photo(loaded: Encoder, counts: dict[str, int], context: int, shots: int | None) -> None:
    own = with_context(loaded, context)
    turns = support_turns([(Picture(Path(f"{label}{n}")), label) for label, count in counts.items() for n in range(count)], WORDING)
    behind = tokens_asked(own, Turn("user", WORDING.query, Picture(Path("q"))), tuple(counts))
    parts = parts_that_fit(turns, own, behind, shots)
    if fits(turns, own, behind) and max(counts.values()) <= (shots or 25):
        assert parts == [turns]
        return
    if fits(turns, own, behind):
        assert len(parts) == -(-max(counts.values()) // (shots or 25)), "the fewest"
    if len(parts) == 1:
        one_of_each = parts_that_fit(support_turns([(Picture(Path(label)), label) for label in counts], WORDING), own, behind)
        assert max(own.support(part).longest for part in one_of_each) > context - behind - 256, "not even one photo of each label"
        return
    shown = Counter(str(turn.picture) for part in parts for turn in part[::2])
    assert shown.keys() == {str(turn.picture) for turn in turns[::2]}
    for part in parts:
        assert own.support(part).longest + behind <= context
        assert {turn.text for turn in part[1::2]} == {WORDING.answered(label) for label in counts}
        assert max(Counter(turn.text for turn in part[1::2]).values()) <= (shots or 25)
        assert part[0].text == turns[0].text
        assert all(turn.text == turns[2].text for turn in part[2::2])
    for label, count in counts.items():
        assert sum(n for name, n in shown.items() if name.rstrip("0123456789") == label) == max(count, len(parts)), (
            "shown again only where it must be"
        )


def test_a_chat_and_photos_that_do_not_see_each_other_stay_whole(loaded: Encoder, tiny_folder: Callable[[str], Path]) -> None:
    turns = support_turns(photos({"good": 20, "bad": 20}), WORDING)
    assert len(parts_that_fit(turns, with_context(loaded, CONTEXT), 40)) > 1
    chat = tuple(Turn(turn.role, f"{turn.text} {n}", turn.picture, shown=turn.shown) for n, turn in enumerate(turns))
    assert parts_that_fit(chat, with_context(loaded, CONTEXT), 40) == [chat]
    independent = load_encoder(BaseRef(str(tiny_folder("pocket")), supports="independent"))
    independent.context = CONTEXT
    assert parts_that_fit(turns, independent, 40) == [turns]


def test_the_scores_are_the_mean_of_the_parts(tiny_folder: Callable[[str], Path]) -> None:
    predictor = Predictor(load_base(BaseRef(str(tiny_folder("pocket")), device="cpu")))
    predictor.encoder.context = CONTEXT
    turns, queries = support_turns(photos({"good": 11, "bad": 3}), WORDING), [Picture(Path(f"q{n}"), data=png(900 + n)) for n in range(3)]
    parts = parts_that_fit(turns, predictor.encoder, 60)
    assert len(parts) > 1
    asked = [Question(0, Turn("user", WORDING.query, query), ("good", "bad")) for query in queries]
    together = predictor.ask_parts(predictor.prefill(parts), asked)
    alone = [[reply.log_likelihoods for reply in predictor.ask(predictor.prefill([part]), asked)] for part in parts]
    for number, reply in enumerate(together):
        assert reply.text == ""
        assert reply.log_likelihoods == pytest.approx(np.mean([own[number] for own in alone], axis=0), abs=1e-4)
    assert predictor.ask_parts(predictor.prefill([parts[0]]), asked) == predictor.ask(predictor.prefill([parts[0]]), asked)
    with pytest.raises(EpisodeError, match="show fewer photos"):
        predictor.ask(predictor.prefill([turns]), asked)


def test_more_shots_than_in_training_are_scored_in_parts_and_written_about_as_a_whole(tiny_folder: Callable[[str], Path]) -> None:
    """An adapter that was trained with four shots lost seven points at sixteen (docs/lab.md)."""
    trained = load_base(BaseRef(str(tiny_folder("pocket")), device="cpu", shots=2))
    predictor, whole = Predictor(trained), Predictor(replace(trained, shots=None))
    many, few = support_turns(photos({"good": 5, "bad": 3}), WORDING), support_turns(photos({"good": 2, "bad": 1}), WORDING)
    query = Turn("user", WORDING.query, Picture(Path("q"), data=png(900)))
    requests = [(many, query, ("good", "bad")), (few, query, ("good", "bad")), (many, query, ()), ((), query, ("good", "bad"))]
    counted: list[int] = []
    replies, as_a_whole = predictor.run(requests, done=counted.append), whole.run(requests)
    assert sum(counted) == len(requests)
    assert [reply.text for reply in replies] == [reply.text for reply in as_a_whole]
    assert replies[1:] == as_a_whole[1:]
    asked = [Question(0, query, ("good", "bad"))]
    [by_parts] = whole.ask_parts(whole.prefill(divided(many, 3)), asked)
    assert replies[0].log_likelihoods == pytest.approx(by_parts.log_likelihoods, abs=1e-4)
    assert replies[0].log_likelihoods != pytest.approx(as_a_whole[0].log_likelihoods, abs=1e-4)
    counted.clear()
    scored = predictor.run(requests, generate=False, done=counted.append)
    assert sum(counted) == len(requests)
    assert scored[0].log_likelihoods == pytest.approx(replies[0].log_likelihoods, abs=1e-4)
    independent = load_base(BaseRef(str(tiny_folder("pocket")), device="cpu", shots=2, supports="independent"))
    assert independent.shots is None, "photos that do not see each other have no such bound"


def test_ask_divides_what_has_more_shots_than_in_training(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    for place, (label, colour) in enumerate((("green", (60, 180, 60)), ("red", (200, 60, 60)))):
        for n in range(4):
            paint(tmp_path / "photos" / label / f"{n}.png", colour, seed=100 * place + n)
    query = paint(tmp_path / "query.png", (60, 180, 60), seed=99)
    folder = str(tiny_folder("pocket"))
    whole = ask_model(tmp_path / "photos", [query], base=BaseRef(folder, device="cpu"))
    in_parts = ask_model(tmp_path / "photos", [query], base=BaseRef(folder, device="cpu", shots=2))
    [note] = [note for note in in_parts.result["notes"] if "parts" in note]
    assert note == "8 labelled photos are more than the 2 of each label that the adapter was trained with: they are read in 2 parts, " + (
        "whose scores are averaged"
    )
    [before], [after] = whole.answers, in_parts.answers
    assert after["answer"] == before["answer"] != ""
    assert after["scores"] != before["scores"]
    assert not any("parts" in note for note in whole.result["notes"])


def test_a_server_scores_in_parts_and_writes_about_the_whole_set(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Whichever comes first."""
    folder = str(tiny_folder("pocket"))
    shown, query = photos({"good": 4, "bad": 4}), png(999)
    stored = [(label, picture.data or b"") for picture, label in shown]
    predictor = Predictor(load_base(BaseRef(folder, device="cpu", shots=2)))
    wording = WORDINGS[predictor.base.family.wording]
    turns, answers = support_turns(shown, wording), tuple(map(wording.answered, ("good", "bad")))
    [expected] = predictor.run([(turns, Turn("user", wording.query, Picture(Path("q"), data=query)), answers)], generate=False)
    for order in (("classify", "chat"), ("chat", "classify")):
        engine = Engine(load_base(BaseRef(folder, device="cpu", shots=2)), 10**9).start()
        try:
            service = Service(engine, Store(tmp_path / order[0]))
            service.store.put("local", "many", stored)
            for what in (*order, *order):
                if what == "chat":
                    body = {"model": "base", "support_set": "many", "messages": [{"role": "user", "content": "Well?"}], "max_tokens": 2}
                    job, _ = service.chat("local", ChatIn.model_validate(body))
                    engine.submit(job)
                    job.future.result(60)
                    continue
                classification = service.classify("local", ClassifyIn(support_set="many", images=[url(query)]))
                wait(classification.futures, 120)
                result = classification.response()
                scaled = np.exp(np.array(expected.log_likelihoods) / result.calibration.temperature)
                assert list(result.results[0].probabilities.values()) == pytest.approx(scaled / scaled.sum(), abs=1e-3)
            assert engine.counters.prefills == 2, "once for scores, once for texts"
        finally:
            engine.stop()


def test_ask_reads_many_photos_in_parts_and_says_so(tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before, they were refused: `show fewer photos`."""
    for place, (label, colour) in enumerate((("green", (60, 180, 60)), ("red", (200, 60, 60)))):
        for n in range(40):
            paint(tmp_path / "photos" / label / f"{n}.png", colour, seed=100 * place + n)
    query = paint(tmp_path / "query.png", (60, 180, 60), seed=99)
    base = BaseRef(str(tiny_folder("pocket")), device="cpu")
    judged = ask_model(tmp_path / "photos", [query], base=base)
    [note] = [note for note in judged.result["notes"] if "parts" in note]
    assert note.startswith("80 labelled photos do not fit the context at once: they are read in ")
    assert note in " ".join(capsys.readouterr().err.split())
    [row] = judged.answers
    assert row["answer"] == ""
    assert sum(row["scores"].values()) == pytest.approx(1)
    few = ask_model(tmp_path / "photos", [query], base=base, shots=2)
    assert not any("parts" in note for note in few.result["notes"])


@pytest.fixture
def service(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Iterator[Service]:
    engine = Engine(load_base(BaseRef(str(tiny_folder("pocket")), device="cpu")), 10**9).start()
    yield Service(engine, Store(tmp_path / "store"))
    engine.stop()


def test_a_stored_set_larger_than_the_context_is_asked_in_parts(service: Service) -> None:
    """It is read once, calibrated by its own photos, and grows; no text can be written about it."""
    shown, query = photos({"good": 40, "bad": 40}), png(999)
    stored = [(label, picture.data or b"") for picture, label in shown]
    service.check_length(shown, None)
    service.store.put("local", "many", stored)
    before = service.engine.counters.rebuilds
    request = ClassifyIn(support_set="many", images=[url(query)])
    for _ in range(2):
        classification = service.classify("local", request)
        wait(classification.futures, 120)
        result = classification.response()
    assert service.engine.counters.rebuilds == before
    assert result.calibration.left_out > 0
    assert result.parts > 1
    predictor = Predictor(load_base(BaseRef(str(service.engine.base.path), device="cpu")))
    wording = service.engine.models["base"].wording
    turns, answers = support_turns(shown, wording), tuple(map(wording.answered, ("good", "bad")))
    question = Turn("user", wording.query, Picture(Path("q"), data=query))
    parts = parts_that_fit(turns, predictor.encoder, tokens_asked(predictor.encoder, question, answers) + predictor.max_new_tokens)
    assert len(parts) > 1
    [reply] = predictor.ask_parts(predictor.prefill(parts), [Question(0, question, answers)])
    scaled = np.exp(np.array(reply.log_likelihoods) / result.calibration.temperature)
    assert list(result.results[0].probabilities.values()) == pytest.approx(scaled / scaled.sum(), abs=1e-3)
    job, _ = service.chat(
        "local", ChatIn.model_validate({"model": "base", "support_set": "many", "messages": [{"role": "user", "content": "Well?"}]})
    )
    service.engine.submit(job)
    with pytest.raises(RequestError, match="read in parts: its labels can be scored, but no text can be written"):
        job.future.result(60)


def test_a_set_of_too_many_labels_is_refused(service: Service) -> None:
    with pytest.raises(RequestError, match="do not fit the context"):
        service.check_length(photos({f"label {n}": 2 for n in range(80)}), None)


@pytest.mark.parametrize("shots", [0, -1, "4", True, None, 2.0])
def test_a_manifest_with_odd_shots_is_refused(shots: object, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"base_hash": "a", "files": dict.fromkeys(FILES, "b"), "shots": shots}))
    with pytest.raises(AdapterError, match="not a manifest of this tool \\(shots is "):
        read_manifest(tmp_path)
