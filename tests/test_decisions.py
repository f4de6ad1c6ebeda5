"""Typed decisions, `POST /v1/systemone`: against the route of `transformers serve`, about support sets, and bodies that are wrong."""

from __future__ import annotations

import base64
import copy
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.decision import DecisionConfig
from transformers.decision.template_utils import DECISION_PROMPT, parse_questions
from transformers.utils.chat_template_utils import _compile_jinja_template

from lcl_adapter.answering.decisions import DecisionIn, answer_of, prompt_of
from lcl_adapter.answering.predict import Predictor, Question
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.data.conversations import WORDINGS, Turn, support_turns
from lcl_adapter.data.sources import Picture
from lcl_adapter.serve.api import make_app
from lcl_adapter.serve.engine import Engine
from lcl_adapter.serve.http.keys import read_keys
from lcl_adapter.serve.pictures.images import digest_of
from lcl_adapter.serve.service import Service
from lcl_adapter.serve.store import Store
from tests import tiny
from tests.live import running, serving, transformers_serving, with_template
from tests.test_merge import adapter_on


def png(seed: int, size: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def picture(data: bytes) -> Picture:
    return Picture(Path(digest_of(data)), data=data)


def plain(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url(data: bytes) -> str:
    return f"data:image/png;base64,{plain(data)}"


def asset(seed: int) -> dict[str, str]:
    return {"type": "image", "format": "png", "data_base64": plain(png(seed))}


TEAM = {
    "type": "choice",
    "instructions": "Which team?",
    "criteria": {"billing": "payments", "shipping": None, "安全": {"for": ["access"]}, "other": ""},
}
URGENT = {"type": "score", "instructions": {"ask": "How urgent is it?"}, "criteria": ["Can wait", "This week", ["Today", 1]]}
REFUND = {"type": "noul", "instructions": "Is a refund asked for?"}
SPAM = {"type": "noul", "criteria": {"true": "Ads", "false": None}}


# The wording and the answers, beside those of transformers

TEXT = st.text("ab Ä猫\n", max_size=6)
CONTENT = st.one_of(TEXT, st.dictionaries(TEXT, st.one_of(TEXT, st.integers(), st.none()), max_size=2), st.lists(TEXT, max_size=2))
NAME = st.text("abÄ猫", min_size=1, max_size=5)
QUESTIONS = st.one_of(
    st.fixed_dictionaries(
        {"type": st.just("choice"), "criteria": st.dictionaries(NAME, st.one_of(st.none(), CONTENT), min_size=1, max_size=4)},
        optional={"instructions": CONTENT},
    ),
    st.fixed_dictionaries({"type": st.just("score"), "criteria": st.lists(CONTENT, min_size=1, max_size=4)}, optional={"instructions": CONTENT}),
    st.fixed_dictionaries(
        {"type": st.just("noul")},
        optional={"instructions": CONTENT, "criteria": st.fixed_dictionaries({}, optional={"true": CONTENT, "false": CONTENT})},
    ),
)


@given(QUESTIONS, st.randoms())
@settings(deadline=None, max_examples=150)
def test_a_question_reads_and_is_answered_as_in_transformers(question: dict[str, Any], random: Any) -> None:
    theirs = parse_questions({"q": question}, DecisionConfig())[0]
    own = DecisionIn.model_validate({"state": "", "questions": {"q": question}}).questions["q"]
    text, answers = prompt_of(own)
    assert f"\n\n{text}" == _compile_jinja_template(DECISION_PROMPT).render(state="", question=theirs)
    assert list(answers) == theirs.labels
    weights = [random.randint(1, 9) for _ in answers]
    probabilities = [weight / sum(weights) for weight in weights]
    expected, answer = theirs.answer(probabilities), answer_of(own, probabilities).model_dump()
    for key, value in expected.items():
        assert answer[key] == (pytest.approx(value) if key in {"noul", "score", "confidence", "probabilities"} else value)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA-1.5 whose tokenizer has a token for each of Yes and No, as real ones do."""
    folder = tmp_path_factory.mktemp("decisions")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tiny, "CORPUS", [*tiny.CORPUS, *["ASSISTANT: Yes", "ASSISTANT: No"] * 10])
        tiny.save_tiny(folder / "plain", "llava-1.5")
    return with_template(folder / "plain", folder / "base")


@pytest.fixture(scope="module")
def both(base: Path) -> Iterator[tuple[httpx2.Client, httpx2.Client]]:
    """This project's server and `transformers serve`, on the same base."""
    with (
        serving(base, base.parent / "store") as ours,
        transformers_serving(base) as theirs,
        httpx2.Client(base_url=ours, timeout=60) as own,
        httpx2.Client(base_url=theirs, timeout=120) as other,
    ):
        yield own, other


@pytest.mark.parametrize(
    "request_body",
    [
        {"state": "I was charged twice.", "questions": {"team": TEAM, "緊急": URGENT, "refund": REFUND, "spam": SPAM}},
        {"state": {"message": "猫が二匹", "n": [1, None, True]}, "questions": {"team": TEAM, "refund": REFUND}},
        {"state": ["a", {"b": 2}], "questions": {"spam": SPAM, "urgent": URGENT}},
        {"state": "", "questions": {"spam": SPAM}},
        {"state": {"photo": "<img-1>"}, "questions": {"team": TEAM, "refund": REFUND}, "assets": {"<img-1>": asset(1)}},
        {"state": "a part", "questions": {"q": {"type": "noul", "instructions": "Is it like img-1 ?"}}, "assets": {"img-1": asset(2)}},
    ],
    ids=["text", "object", "list", "nothing", "an image in the state", "an image in a question"],
)
def test_the_same_answers_as_transformers_serve(both: tuple[httpx2.Client, httpx2.Client], base: Path, request_body: dict[str, Any]) -> None:
    own, other = both
    ours = own.post("/v1/systemone", json={"model": "base", **request_body})
    theirs = other.post("/v1/systemone", json={"model": str(base), **request_body})
    assert theirs.status_code == 200, theirs.text
    assert ours.status_code == 200, ours.text
    assert ours.json()["usage"] == theirs.json()["usage"], "the prompts are equally long"
    answers, expected = ours.json()["answers"], theirs.json()["answers"]
    assert list(answers) == list(expected)
    for name, answer in expected.items():
        for key, value in answer.items():
            close = pytest.approx(value, abs=1e-4) if key in {"noul", "score", "confidence", "probabilities"} else value
            assert answers[name][key] == close, (name, key)
    distinct = {round(p, 6) for answer in answers.values() for p in answer["probabilities"].values()}
    assert len(distinct) > 1, "probabilities that are all equal would compare nothing"


# About support sets and conversations


@pytest.fixture(scope="module")
def api(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """The tiny pocket base with an adapter, whose sets are `screws` and `ネジ`."""
    run = adapter_on(tiny_folder("pocket"), tmp_path_factory.mktemp("runs") / "parts")
    with serving(tiny_folder("pocket"), tmp_path_factory.mktemp("sets"), parts=run) as address, httpx2.Client(base_url=address, timeout=60) as client:
        for name, labels in (("screws", ("good", "scratched")), ("ネジ", ("良品", "傷あり", "曲がり"))):
            client.put(f"/v1/support-sets/{name}", json={"examples": examples(*labels), "question": "What is it?"}).raise_for_status()
        yield client


def examples(*labels: str) -> list[dict[str, str]]:
    return [{"label": label, "image": url(png(10 * n + shot))} for n, label in enumerate(labels) for shot in range(3)]


def decide(client: httpx2.Client, state: Any, questions: dict[str, Any], **more: Any) -> dict[str, Any]:
    response = client.post("/v1/systemone", json={"state": state, "questions": questions, **more})
    assert response.status_code == 200, response.text
    answers: dict[str, Any] = response.json()["answers"]
    return answers


@pytest.mark.parametrize(("name", "labels"), [("screws", ("scratched", "good")), ("ネジ", ("曲がり", "良品", "傷あり"))])
def test_a_choice_of_a_stored_sets_labels_is_the_judgement(api: httpx2.Client, name: str, labels: tuple[str, ...]) -> None:
    """With the options in any order, or left out; the photo by its asset or as a data URL."""
    judged = api.post("/v1/classify", json={"support_set": name, "images": [url(png(77))]}).json()
    result = judged["results"][0]
    state = {"support_set": name, "image": url(png(77))}
    for criteria in ({"criteria": dict.fromkeys(labels)}, {}, {"criteria": None}):
        answer = decide(api, state, {"判定": {"type": "choice", **criteria}})["判定"]
        assert answer["probabilities"] == pytest.approx(result["probabilities"], abs=1e-6)
        assert answer["choice"] == result["nearest"]
        assert (answer["judge"], answer["calibrated"]) == (judged["judge"], True)
        assert answer["none_of_these"] == result["none_of_these"]
        assert answer["most_alike"] == pytest.approx(result["most_alike"])
        assert list(answer["probabilities"]) == list(criteria.get("criteria") or result["probabilities"])
    named = decide(api, {**state, "image": "photo"}, {"q": {"type": "choice"}}, assets={"photo": asset(77)})["q"]
    assert named["probabilities"] == pytest.approx(result["probabilities"], abs=1e-6)
    asked = {"support_set": name, "images": [url(png(77))], "question": "Now, what is this?", "model": "base"}
    other = api.post("/v1/classify", json=asked).json()["results"][0]
    answer = decide(api, state, {"q": {"type": "choice", "instructions": "Now, what is this?"}}, model="base")["q"]
    assert answer["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)


def test_labelled_photos_in_the_state_are_judged_as_a_stored_set(api: httpx2.Client) -> None:
    shown = examples("good", "scratched")
    api.put("/v1/support-sets/without-question", json={"examples": shown}).raise_for_status()
    stored = api.post("/v1/classify", json={"support_set": "without-question", "images": [url(png(78))]}).json()
    before = len(api.get("/v1/support-sets").json()["data"])
    answer = decide(api, {"examples": shown, "image": url(png(78))}, {"q": {"type": "choice", "criteria": {"good": None, "scratched": None}}})["q"]
    assert answer["probabilities"] == pytest.approx(stored["results"][0]["probabilities"], abs=1e-6)
    assert answer["calibrated"]
    assert answer["familiarity"] == pytest.approx(stored["results"][0]["familiarity"], abs=1e-5)
    assert len(api.get("/v1/support-sets").json()["data"]) == before, "nothing is stored"

    def hits() -> float:
        return next(float(line.split()[1]) for line in api.get("/metrics").text.splitlines() if line.startswith("lcl_hits_total"))

    earlier = hits()
    decide(api, {"examples": shown, "image": url(png(79))}, {"q": {"type": "choice"}})
    assert hits() > earlier, "the same photos are read once"


def test_other_questions_about_a_set_are_the_models_likelihoods(api: httpx2.Client, tiny_folder: Callable[[str], Path]) -> None:
    """Equal to the offline predictor's, behind the same support set: names with their end, letters and yes or no without."""
    state = {"examples": examples("good", "scratched"), "image": url(png(80))}
    questions = {
        "names": {"type": "choice", "instructions": "What is this?", "criteria": {"a nut": None, "猫": None, "good": None}},
        "described": {"type": "choice", "criteria": {"good": "without a scratch", "scratched": None}},
        "level": {"type": "score", "instructions": "How bad is it?", "criteria": ["not", "a bit", "very"]},
        "new": {"type": "noul", "instructions": "Is this new?"},
    }
    answers = decide(api, state, questions, model="base")
    turns = support_turns([(picture(base64.b64decode(e["image"].partition(",")[2])), e["label"]) for e in state["examples"]], WORDINGS["short"])
    predictor = Predictor(load_base(BaseRef(str(tiny_folder("pocket")), device="cpu")))
    prefilled = predictor.prefill([turns])

    def offline(text: str, *own: str, ended: bool) -> tuple[float, ...]:
        question = Turn("user", text, picture(png(80)))
        return predictor.ask(prefilled, [Question(0, question, own, ended)], generate=False)[0].probabilities

    expected = {
        "names": offline("What is this?", "a nut", "猫", "good", ended=True),
        "described": offline(
            "A. good: without a scratch\nB. scratched\nAnswer with the letter of the option that fits best (A to B) only.", "A", "B", ended=False
        ),
        "level": offline(
            "How bad is it?\nA. not\nB. a bit\nC. very\nAnswer with the letter of the level that fits best (A to C) only.", "A", "B", "C", ended=False
        ),
        "new": offline("Is this new?\nAnswer Yes or No only.", "Yes", "No", ended=False),
    }
    for name, probabilities in expected.items():
        assert list(answers[name]["probabilities"].values()) == pytest.approx(probabilities, abs=1e-5), name
        assert not answers[name].get("calibrated")
    assert answers["level"]["score"] == pytest.approx(sum(n * p for n, p in enumerate(expected["level"])), abs=1e-5)
    assert answers["level"]["legend"] == {"0": "not", "1": "a bit", "2": "very"}


def test_a_conversation_is_read_as_the_chats(api: httpx2.Client) -> None:
    """The options of a choice are the model's own next words: the likeliest one is the text that the chat gives."""
    shown = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url(png(1))}}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "good"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url(png(2))}}, {"type": "text", "text": "What is this?"}]},
    ]
    text = api.post("/v1/chat/completions", json={"model": "base", "messages": shown, "max_tokens": 4, "logprobs": True}).json()["choices"][0]
    others = {"good": None, "scratched": None, "a nut": None}
    criteria = {text["message"]["content"].strip(): None, **others} if text["finish_reason"] == "stop" else others
    answer = decide(api, {"messages": shown}, {"q": {"type": "choice", "criteria": criteria}}, model="base")["q"]
    later = decide(api, {"messages": shown[:2]}, {"q": {"type": "noul", "instructions": "Is it good?"}}, model="base")["q"]
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert answer["judge"] == "model"
    assert not answer["calibrated"]
    assert 0 < later["noul"] < 1
    asked = decide(api, {"messages": shown}, {"q": {"type": "choice", "instructions": "Which?", "criteria": criteria}}, model="base")["q"]
    assert asked["probabilities"] != answer["probabilities"]


def test_a_namespace_sees_its_own_sets_only(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("a key-of-a-0123456789\nb key-of-b-0123456789\n")
    engine = Engine(load_base(BaseRef(str(tiny_folder("pocket")), device="cpu")), memory=10**8).start()
    app = make_app(Service(engine, Store(tmp_path / "store"), timeout=60), read_keys(keys))
    body = {"state": {"support_set": "screws", "image": url(png(1))}, "questions": {"q": {"type": "choice"}}}
    with running(app) as address, httpx2.Client(base_url=address, timeout=60) as client:
        a, b = ({"Authorization": f"Bearer key-of-{name}-0123456789"} for name in "ab")
        client.put("/v1/support-sets/screws", json={"examples": examples("good", "bad")}, headers=a).raise_for_status()
        assert client.post("/v1/systemone", json=body, headers=a).status_code == 200
        assert client.post("/v1/systemone", json=body, headers=b).status_code == 404
        assert client.post("/v1/systemone", json=body).status_code == 401


def test_the_queue_and_the_time_limit_hold(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    engine = Engine(load_base(BaseRef(str(tiny_folder("pocket")), device="cpu")), memory=10**8, queue=2).start()
    service = Service(engine, Store(tmp_path / "store"), timeout=60)
    with running(make_app(service)) as address, httpx2.Client(base_url=address, timeout=60) as client:
        several = {str(n): REFUND for n in range(3)}
        refused = client.post("/v1/systemone", json={"state": "x", "questions": several})
        assert (refused.status_code, "more than the 2 that may wait" in refused.text) == (400, True)
        service.timeout = 0.0
        late = client.post("/v1/systemone", json=GOOD)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        service.timeout = 60
        assert client.post("/v1/systemone", json=GOOD).status_code == 200


# Bodies that are wrong

GOOD = {"state": "x", "questions": {"q": {"type": "noul"}}}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"questions": GOOD["questions"]}, 400, "state: Field required"),
        ({"state": "x"}, 400, "questions: Field required"),
        ({**GOOD, "state": 7}, 400, "state: a text, an object or a list is expected"),
        ({**GOOD, "state": None}, 400, "state: a text, an object or a list is expected"),
        ({**GOOD, "state": "a</s>b"}, 400, "special token"),
        ({**GOOD, "state": "a" * 40_000}, 400, "state: has 40,000 characters"),
        ({**GOOD, "state": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["x"]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}, 400, "state: is nested more than 32 deep"),
        ({**GOOD, "questions": {}}, 400, "questions: must have at least 1 item"),
        ({**GOOD, "questions": [1]}, 400, "questions: an object is expected"),
        ({**GOOD, "questions": {"": {"type": "noul"}}}, 400, "a question's name is a text of 1 to 200 characters"),
        ({**GOOD, "questions": {"緊急": {"type": "bool"}}}, 400, "question '緊急': `type` is one of choice, score, noul"),
        ({**GOOD, "questions": {"緊急": "noul"}}, 400, "question '緊急': `type` is one of"),
        ({**GOOD, "questions": {"q": {"type": "noul", "criteria": {"yes": "x"}}}}, 400, "question 'q': criteria.yes: Extra inputs"),
        ({**GOOD, "questions": {"q": {"type": "noul", "instructions": 7}}}, 400, "question 'q': instructions: a text, an object or a list"),
        ({**GOOD, "questions": {"q": {"type": "noul", "options": ["a"]}}}, 400, "question 'q': options: Extra inputs"),
        ({**GOOD, "questions": {"q": {"type": "choice"}}}, 400, "questions['q'].criteria: the options are missing"),
        ({**GOOD, "questions": {"q": {"type": "choice", "criteria": {}}}}, 400, "question 'q': criteria: must have at least 1"),
        ({**GOOD, "questions": {"q": {"type": "choice", "criteria": ["a"]}}}, 400, "question 'q': criteria: an object is expected"),
        ({**GOOD, "questions": {"q": {"type": "choice", "criteria": {" ": None}}}}, 400, "an option's name is one line of visible text"),
        ({**GOOD, "questions": {"q": {"type": "choice", "criteria": dict.fromkeys(map(str, range(27)))}}}, 400, "at most 26 options"),
        ({**GOOD, "questions": {"q": {"type": "score"}}}, 400, "question 'q': criteria: Field required"),
        ({**GOOD, "questions": {"q": {"type": "score", "criteria": []}}}, 400, "question 'q': criteria: must have at least 1 item"),
        ({**GOOD, "questions": {"q": {"type": "score", "criteria": [None]}}}, 400, "question 'q': criteria.0: a text, an object or a list"),
        ({**GOOD, "questions": {"q": {"type": "score", "criteria": ["a"] * 27}}}, 400, "question 'q': criteria: must have at most 26"),
        ({**GOOD, "questions": {str(n): {"type": "noul"} for n in range(65)}}, 400, "questions: must have at most 64 items"),
        ({**GOOD, "questions": {"q": {"type": "noul", "instructions": "a<image>b"}}}, 400, "questions['q']: contains '<image>'"),
        ({**GOOD, "model": "unknown"}, 404, "no model 'unknown'"),
        ({**GOOD, "stream": True}, 400, "stream: Extra inputs are not permitted"),
        ({**GOOD, "instructions": "Be brief."}, 400, 'instructions: only "" is supported'),
        ({**GOOD, "assets": {"img": asset(1)}}, 400, "assets: no text names 'img'"),
        ({**GOOD, "assets": {"": asset(1)}}, 400, "an asset's key is a text"),
        ({**GOOD, "assets": {"x": {"type": "image", "data_base64": "AAAA"}}}, 400, "assets['x']: the image cannot be read"),
        ({**GOOD, "assets": {"x": {"type": "image", "data_base64": "https://h/a.png"}}}, 400, "assets['x']: the image's base64 is broken"),
        ({**GOOD, "assets": {"x": {"type": "video", "data_base64": ""}}}, 400, "assets.x.type"),
        ({**GOOD, "state": {"support_set": "screws"}}, 400, "state: image: Field required (to send other JSON with this key, send it as a text)"),
        ({**GOOD, "state": {"support_set": "a b", "image": "x"}}, 400, "state: support_set: not a valid name: letters of any script"),
        ({**GOOD, "state": {"support_set": "nails", "image": url(png(1))}}, 404, "nails"),
        ({**GOOD, "state": {"support_set": "screws", "image": "x"}}, 400, "state.image: the image is not a base64 data URL"),
        ({**GOOD, "state": {"support_set": "screws", "image": "http://h/a.png"}}, 400, "The server fetches nothing"),
        ({**GOOD, "state": {"examples": "good", "image": "x"}}, 400, "state: examples: a list is expected"),
        ({**GOOD, "state": {"examples": examples("good"), "image": "x"}}, 400, "state: all examples are 'good'"),
        ({**GOOD, "state": {"examples": examples("good", "Good"), "image": "x"}}, 400, "differ only in case or width"),
        ({**GOOD, "state": {"messages": []}}, 400, "state: messages: must have at least 1 item"),
        ({**GOOD, "state": {"messages": [{"role": "user", "content": 7}]}}, 400, "state: messages.0.content: a text, or a list of parts"),
        ({**GOOD, "state": {"messages": [{"role": "assistant", "content": "x"}]}}, 400, "the first message must be the user's"),
        ({**GOOD, "state": {"messages": [{"role": "system", "content": "x"}]}}, 400, "there is no user's message"),
    ],
)  # fmt: skip
def test_a_wrong_body_is_a_plain_error(api: httpx2.Client, body: dict[str, Any], status: int, message: str) -> None:
    response = api.post("/v1/systemone", json=body)
    assert response.status_code == status, response.text
    shown = response.json()["error"]["message"]
    assert message in shown
    assert "\n" not in shown
    assert not {"union", "constrained", "function-", "Traceback", "tagged"} & set(shown.replace("[", " ").split())


KEYS = st.one_of(st.text(max_size=4), st.sampled_from(["type", "criteria", "role"]))
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["noul", "choice", "score", "p", "\ud800", "<image>"]),
)
ANY = st.recursive(LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)), max_leaves=8)
STATES = ["p", {"a": ["p"]}, {"support_set": "screws", "image": "p"}, {"messages": [{"role": "user", "content": "p"}]}]


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_no_body_makes_an_internal_error(api: httpx2.Client, data: st.DataObject) -> None:
    """A right body, of which one part is replaced by anything."""
    questions = {"a": TEAM, "b": URGENT, "c": {**REFUND, "criteria": {"true": "p"}}}
    body: Any = {"model": "base", "state": data.draw(st.sampled_from(STATES)), "questions": questions, "assets": {"p": asset(3)}}
    body = copy.deepcopy(body)
    place = data.draw(st.sampled_from(list(places(body))))
    outer = body
    for step in place[:-1]:
        outer = outer[step]
    outer[place[-1]] = data.draw(ANY)
    response = api.post("/v1/systemone", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code in {200, 400, 404}, (body, response.text)
    if response.status_code != 200:
        shown = response.json()["error"]["message"]
        assert shown
        assert len(shown) < 1000


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*before, key)
        yield from places(inner, (*before, key))


def test_it_is_in_the_openapi_document(api: httpx2.Client) -> None:
    document = api.get("/openapi.json").json()
    route = document["paths"]["/v1/systemone"]["post"]
    assert "probability for every allowed answer" in route["description"]
    assert {"StoredSetState", "PhotosState", "ChoiceQuestion", "ScoreAnswer"} <= set(document["components"]["schemas"])
