"""The server: OpenAI's own client, answers equal to the offline predictor's, and the mistakes that a client can make."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx2
import numpy as np
import openai
import pytest
import torch
from click.testing import CliRunner
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lcl_adapter.answering import api_types
from lcl_adapter.answering.client import Endpoint
from lcl_adapter.answering.predict import Predictor, Question
from lcl_adapter.base.adapter import load_adapter
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.cli import main
from lcl_adapter.data.conversations import WORDINGS, Turn, support_turns
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import AdapterError, RequestError, RunError
from lcl_adapter.recipe import load
from lcl_adapter.serve import api, server
from lcl_adapter.serve import engine as serving_engine
from lcl_adapter.serve.decoding import TextDecoder, Token
from lcl_adapter.serve.engine import Engine
from lcl_adapter.serve.http.keys import Caller, Keys, read_keys
from lcl_adapter.serve.jobs import BusyError, FairQueue, Job, Task
from lcl_adapter.serve.service import Service
from lcl_adapter.serve.store import Store
from tests.forked import Forked
from tests.live import running
from tests.test_merge import adapter_on

KEYS = {"plant-a": "key-of-plant-a-0123456789", "plant-b": "key-of-plant-b-0123456789", "ops": "key-of-ops-0123456789-xyz"}


def png(seed: int, size: tuple[int, int] = (40, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def examples(labels: tuple[str, ...] = ("good", "scratched"), shots: int = 2, seed: int = 0) -> list[dict[str, str]]:
    return [{"label": label, "image": url(png(seed + 10 * n + m))} for n, label in enumerate(labels) for m in range(shots)]


@pytest.fixture(scope="module")
def run_folder(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_on(tiny_folder("pocket"), tmp_path_factory.mktemp("runs") / "parts")


@pytest.fixture(scope="module")
def engine(tiny_folder: Callable[[str], Path], run_folder: Path) -> Iterator[Engine]:
    made = Engine(load_base(BaseRef(str(tiny_folder("pocket")), device="cpu")), memory=10**8, queue=64)
    made.load_adapter("parts", run_folder)
    yield made.start()
    made.stop()


@pytest.fixture
def service(engine: Engine, tmp_path: Path, run_folder: Path) -> Iterator[Service]:
    """A service with its own store. The engine is shared; each test begins with the base and one adapter."""
    made = Service(engine, Store(tmp_path / "store"), adapter_folder=run_folder.parent, timeout=60)
    yield made
    made.store.close()
    for name in [name for name in engine.models if name not in {"base", "parts"}]:
        engine.call(lambda e, name=name: e.unload_adapter(name), 30)


def client_of(service: Service, **options: Any) -> TestClient:
    """A client without the app's lifespan, whose end would stop the shared engine."""
    return TestClient(api.make_app(service, **options), base_url="http://localhost", raise_server_exceptions=False)


@pytest.fixture
def client(service: Service) -> TestClient:
    return client_of(service)


@pytest.fixture
def live(service: Service) -> Iterator[str]:
    """A server on a real socket, for what a test client cannot do, such as to disconnect."""
    with running(api.make_app(service), lifespan="off") as url:
        yield url


def put(client: Any, name: str = "parts-set", **body: Any) -> Any:
    return client.put(f"/v1/support-sets/{name}", json={"examples": examples(), **body})


def offline(run: Path, shown: list[dict[str, str]], queries: list[bytes]) -> list[tuple[float, ...]]:
    """Probabilities of the same questions from the predictor that evaluation uses, one question at a time."""
    base, _ = load_adapter(run, BaseRef(precision="fp32", device="cpu"))
    wording, predictor = WORDINGS[load(run / "recipe.yaml").wording], Predictor(base)
    labels = list(dict.fromkeys(example["label"] for example in shown))
    pictures = [(Picture(Path(str(n)), data=base64.b64decode(e["image"].partition(",")[2])), e["label"]) for n, e in enumerate(shown)]
    prefilled = predictor.prefill([support_turns(pictures, wording)])
    answers = tuple(wording.answered(label) for label in labels)
    questions = [Question(0, Turn("user", wording.query, Picture(Path(f"q{n}"), data=data)), answers) for n, data in enumerate(queries)]
    return [predictor.ask(prefilled, [question], generate=False)[0].probabilities for question in questions]


def error_of(response: Any) -> dict[str, Any]:
    """The error of a response. It must have OpenAI's format, and nothing of this machine."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "/tmp" not in response.text
    assert "Traceback" not in response.text
    return body["error"]


def messages(*data: bytes, text: str = "What is this?") -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url(image)}} for image in data]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


# Support sets and classification


def test_a_set_is_stored_read_and_removed(client: TestClient) -> None:
    stored = put(client, question="Which is it?").json()
    assert (stored["version"], stored["labels"], stored["question"]) == (1, {"good": 2, "scratched": 2}, "Which is it?")
    with_images = client.get("/v1/support-sets/parts-set", params={"images": True}).json()
    assert [{"label": e["label"], "image": e["image"]} for e in with_images["examples"]] == examples()
    assert client.get("/v1/support-sets/parts-set").json()["examples"][0]["image"] is None
    assert put(client, examples=examples(shots=3)).json()["version"] == 2
    assert [version["version"] for version in client.get("/v1/support-sets/parts-set/versions").json()["data"]] == [2, 1]
    assert client.get("/v1/support-sets/parts-set", params={"version": 1}).json()["labels"] == {"good": 2, "scratched": 2}
    assert [stored["name"] for stored in client.get("/v1/support-sets").json()["data"]] == ["parts-set"]
    assert client.delete("/v1/support-sets/parts-set").status_code == 204
    assert error_of(client.get("/v1/support-sets/parts-set"))["code"] == "not_found"


def test_classified_images_have_the_offline_predictors_probabilities(client: TestClient, run_folder: Path) -> None:
    """Whatever is asked beside them, and from the cached set too.

    The offline probabilities are scaled by the response's temperature.
    """
    put(client)
    queries = [png(100 + n) for n in range(20)]
    expected = offline(run_folder, examples(), queries)
    for _ in range(2):
        response = client.post("/v1/classify", json={"support_set": "parts-set", "model": "parts", "images": [url(q) for q in queries]}).json()
        assert (response["model"], response["version"], response["calibration"]["left_out"]) == ("parts", 1, 4)
        sharpness = 1 / response["calibration"]["temperature"]
        for probabilities, result in zip(expected, response["results"], strict=True):
            scaled = np.array(probabilities) ** sharpness
            assert np.allclose(list(result["probabilities"].values()), scaled / scaled.sum(), atol=1e-4)
            ranked = sorted(result["probabilities"].items(), key=lambda item: -item[1])
            assert result["nearest"] == ranked[0][0]
            assert result["margin"] == pytest.approx(ranked[0][1] - ranked[1][1])
            below = result["familiarity"] < response["calibration"]["threshold"]
            assert result["none_of_these"] == below == (result["label"] is None)


def test_a_query_that_is_in_the_set_is_most_similar_to_itself(client: TestClient) -> None:
    put(client)
    shown = examples()
    response = client.post("/v1/classify", json={"support_set": "parts-set", "images": [example["image"] for example in shown]}).json()
    for index, result in enumerate(response["results"]):
        assert result["most_alike"]["example"] == index
        assert result["most_alike"]["label"] == shown[index]["label"]
        assert result["most_alike"]["cosine"] == pytest.approx(1.0, abs=1e-5)


def test_a_bad_image_affects_only_its_own_result(client: TestClient) -> None:
    put(client)
    bad = ["http://example.com/x.png", url(b"<html>"), url(png(3)[:60]), "file:///etc/passwd"]
    response = client.post("/v1/classify", json={"support_set": "parts-set", "images": [url(png(1)), *bad, url(png(2))]})
    assert response.status_code == 200
    results = response.json()["results"]
    assert [result["error"] is None for result in results] == [True, False, False, False, False, True]
    assert "images[1]" in results[1]["error"]["message"]
    assert "passwd" not in response.text
    only_bad = client.post("/v1/classify", json={"support_set": "parts-set", "images": bad}).json()
    assert all(result["error"] for result in only_bad["results"])


def test_a_set_is_prefilled_once_and_again_after_its_eviction(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counters count what clients ask for, and the answers do not change."""
    for name, seed in (("one", 0), ("two", 50)):
        put(client, name, examples=examples(seed=seed))

    def classified(name: str) -> dict[str, float]:
        return client.post("/v1/classify", json={"support_set": name, "images": [url(png(7))]}).json()["results"][0]["probabilities"]

    first = classified("one")
    size = list(engine.cache.values())[-1].bytes
    start = replace(engine.counters)
    assert [classified("one") for _ in range(3)] == [first] * 3
    assert (engine.counters.hits - start.hits, engine.counters.prefills - start.prefills) == (3, 0)
    monkeypatch.setattr(engine.cache, "budget", size)
    classified("two")
    assert engine.counters.evictions > start.evictions
    assert classified("one") == pytest.approx(first)
    assert engine.counters.rebuilds - start.rebuilds == 1
    assert engine.cache.bytes == sum(cached.bytes for cached in engine.cache.values()) <= size
    monkeypatch.setattr(engine.cache, "budget", size - 1)
    assert classified("two")
    assert engine.cache.bytes == 0, "a set that is larger than the whole budget is used and not cached"


def test_old_sets_are_evicted_before_a_new_one_is_prefilled(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise memory would be over its limit while the new set is prefilled."""
    for name, seed in (("first", 0), ("second", 50)):
        put(client, name, examples=examples(seed=seed))
    body = {"images": [url(png(7))]}
    client.post("/v1/classify", json={"support_set": "first", **body})
    monkeypatch.setattr(engine.cache, "budget", list(engine.cache.values())[-1].bytes)
    in_memory: list[int] = []  # bytes in the cache at the start of each prefill
    prefill = engine._predictor.prefill
    monkeypatch.setattr(engine._predictor, "prefill", lambda *a, **k: in_memory.append(engine.cache.bytes) or prefill(*a, **k))
    client.post("/v1/classify", json={"support_set": "second", **body})
    assert in_memory.pop(0) == 0
    assert set(in_memory) <= {0}  # the prefills of the calibration, and the set itself


def test_a_new_version_replaces_the_cached_one(client: TestClient) -> None:
    """An old version can still be used by its number."""
    put(client)
    body = {"support_set": "parts-set", "images": [url(png(9))]}
    first = client.post("/v1/classify", json=body).json()["results"][0]["probabilities"]
    put(client, examples=examples(("fine", "broken"), seed=70))
    second = client.post("/v1/classify", json=body).json()
    assert (second["version"], set(second["results"][0]["probabilities"])) == (2, {"fine", "broken"})
    assert client.post("/v1/classify", json={**body, "version": 1}).json()["results"][0]["probabilities"] == pytest.approx(first)
    client.delete("/v1/support-sets/parts-set")
    assert client.post("/v1/classify", json=body).status_code == 404
    put(client)
    assert client.post("/v1/classify", json=body).json()["version"] == 3


def test_requests_of_many_clients_are_batched_and_answered_separately(client: TestClient, engine: Engine, run_folder: Path) -> None:
    """Forty images in twenty requests to two sets, at once: fewer batches than requests, and each answer is right."""
    for name, seed in (("one", 0), ("two", 50)):
        put(client, name, examples=examples(seed=seed))
    for name in ("one", "two"):
        client.post("/v1/classify", json={"support_set": name, "images": [url(png(1))]})
    queries = {name: [png(200 + n) for n in range(20)] for name in ("one", "two")}
    expected = {name: offline(run_folder, examples(seed=seed), queries[name]) for name, seed in (("one", 0), ("two", 50))}
    before = engine.counters.waves
    blocker = Task(lambda: time.sleep(0.5))
    engine.submit(blocker)

    def ask(number: int) -> dict[str, Any]:
        name, first = ("one", "two")[number % 2], number // 2 * 2
        body = {"support_set": name, "images": [url(q) for q in queries[name][first : first + 2]]}
        return {"name": name, "first": first, **client.post("/v1/classify", json=body).json()}

    with ThreadPoolExecutor(20) as pool:
        responses = list(pool.map(ask, range(20)))
    for response in responses:
        sharpness = 1 / response["calibration"]["temperature"]
        first = response["first"]
        assert len(response["results"]) == 2
        for probabilities, result in zip(expected[response["name"]][first : first + 2], response["results"], strict=True):
            scaled = np.array(probabilities) ** sharpness
            assert np.allclose(list(result["probabilities"].values()), scaled / scaled.sum(), atol=1e-4)
    assert engine.counters.waves - before < 20


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"examples": examples(("good",))}, "a judgement needs at least two labels"),
        ({"examples": examples(("Good", "ｇｏｏｄ"))}, "differ only in case or width"),
        ({"examples": examples(("good", "GOOD"))}, "differ only in case or width"),
        ({"examples": examples(("good", "x" * 100_000), shots=1)}, "at most 200 characters"),
        ({"examples": examples(("good", "</s><image>"), shots=1)}, "a special token of the model's prompt"),
        ({"examples": examples(("good", "a\x00b"), shots=1)}, "one line of visible text"),
        ({"examples": [{"label": "a", "image": "http://x/y.png"}, *examples()]}, r"examples[0].image: the image is a URL of http:"),
        ({"examples": [{"label": "a", "image": "data:text/html;base64,PGI+"}, *examples()]}, "image/jpeg, image/png"),
        ({"examples": [{"label": "a", "image": url(b"")}, *examples()]}, "the image is empty"),
        ({"examples": [{"label": "a", "image": "data:image/png;base64,%%%"}, *examples()]}, "base64 is broken"),
        ({"examples": examples(tuple(f"label {n}" for n in range(80)), shots=1)}, "do not fit the context"),
        ({"examples": examples(), "expected_versoin": 1}, "expected_versoin"),
        ({"examples": [], "question": "?"}, "at least 2 items"),
    ],
    ids=[
        "one label",
        "width",
        "case",
        "100 kB label",
        "special token",
        "control",
        "http",
        "html type",
        "empty",
        "base64",
        "too many",
        "unknown field",
        "none",
    ],
)
def test_an_invalid_set_is_refused(client: TestClient, body: dict[str, Any], message: str) -> None:
    response = client.put("/v1/support-sets/bad", json=body)
    assert response.status_code == 400
    assert message in error_of(response)["message"]
    assert len(response.text) < 2000, "the request's content is not sent back"
    assert client.get("/v1/support-sets").json()["data"] == []


@pytest.mark.parametrize("name", ["..", "a/b", "%2e%2e%2fx", "x" * 65, ".hidden", "a b"])
def test_an_invalid_name_is_refused(client: TestClient, name: str) -> None:
    assert client.put(f"/v1/support-sets/{name}", json={"examples": examples()}).status_code in {400, 404, 405}


def test_an_invalid_name_is_explained_in_plain_words(client: TestClient) -> None:
    refused = client.put("/v1/support-sets/my set", json={"examples": examples()})
    assert refused.json()["error"]["message"].endswith("name: not a valid name: " + api_types.SET_NAME_RULE)
    wrong = client.post("/v1/classify", json={"support_set": "my set", "images": "x"}).json()["error"]["message"]
    assert "should" not in wrong
    assert "images: a list is expected" in wrong


def test_the_second_of_two_writers_gets_a_conflict(client: TestClient) -> None:
    assert put(client, expected_version=0).status_code == 200
    late = put(client, expected_version=0)
    assert late.status_code == 409
    assert error_of(late)["code"] == "version_conflict"
    assert put(client, expected_version=1).json()["version"] == 2


def test_a_full_disk_does_not_stop_classification(client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration that cannot be stored stays in memory, and is not computed again."""
    put(client)

    def full(*_: object) -> None:
        raise RunError("the disk is full")

    monkeypatch.setattr(service.store, "write_calibration", full)
    body = {"support_set": "parts-set", "images": [url(png(1))]}
    first, made = client.post("/v1/classify", json=body), len(service.calibrations)
    assert first.status_code == 200
    assert client.post("/v1/classify", json=body).json() == first.json()
    assert made == len(service.calibrations) == 1


def test_a_full_disk_is_reported_and_the_server_goes_on(client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    put(client)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/secret")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        response = put(client, "more", examples=examples(seed=400))
        assert response.status_code == 507
        assert "disk is full" in error_of(response)["message"]
        assert client.post("/v1/classify", json={"support_set": "parts-set", "images": [url(png(1))]}).status_code == 200
    assert put(client, "more", examples=examples(seed=400)).status_code == 200


# Images


def bomb() -> bytes:
    """A file of a few kB whose header claims 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100_000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: url(bomb()), "far more than the 40,000,000 pixels"),
        (lambda: url(b"<html><body>no image</body></html>"), "not an image"),
        (lambda: url(b"A" * (10 * 2**20 + 1)), "10.0 MiB; at most 10 are allowed"),
        (lambda: url(png(1)[:100]), "cannot be read"),
        (lambda: url(png(1, (1, 5))), "at least 2 per side are needed"),
        (lambda: url(png(1, (20_000, 3))), "8,192 per side are allowed"),
        (lambda: "ftp://x/y", "a URL of ftp:"),
        (lambda: "just text", "not a base64 data URL"),
        (lambda: "data:image/svg+xml;base64,PHN2Zz4=", "image/svg+xml"),
    ],
    ids=["bomb", "html", "bytes", "cut", "one pixel", "a long strip", "ftp", "text", "svg"],
)
def test_an_image_that_cannot_be_used_is_refused(client: TestClient, data: Callable[[], str], message: str) -> None:
    body = {"model": "parts", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data()}}]}]}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert message in error_of(response)["message"]


# Chat


def test_openais_own_client_works(live: str) -> None:
    """Models, a whole answer, the same answer streamed, log-probabilities, and the client's own errors."""
    with openai.OpenAI(base_url=f"{live}/v1", api_key="any", max_retries=0) as own:
        assert [model.id for model in own.models.list()] == ["base", "parts"]
        assert own.models.retrieve("parts").id == "parts"
        body: dict[str, Any] = {"model": "parts", "messages": messages(png(1)), "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
        whole = own.chat.completions.create(**body)
        choice = whole.choices[0]
        assert choice.finish_reason in {"stop", "length"}
        assert whole.usage is not None
        assert whole.usage.completion_tokens <= 12
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        for token in choice.logprobs.content:
            assert len(token.top_logprobs) == 3
            assert token.logprob == pytest.approx(max(alternative.logprob for alternative in token.top_logprobs)), "greedy"
        pieces = list(own.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
        streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert streamed == choice.message.content
        assert pieces[-1].usage == whole.usage
        logprobs = [piece.choices[0].logprobs for piece in pieces if piece.choices]
        streamed_tokens = [token.token for part in logprobs if part for token in part.content or []]
        assert streamed_tokens == [token.token for token in choice.logprobs.content]
        assert [piece.choices[0].finish_reason for piece in pieces if piece.choices][-1] == choice.finish_reason
        with pytest.raises(openai.NotFoundError, match="no model 'part'"):
            own.chat.completions.create(**{**body, "model": "part"})
        with pytest.raises(openai.BadRequestError, match="not an image"):
            own.chat.completions.create(model="parts", messages=messages(b"text"))
        with pytest.raises(openai.NotFoundError, match="no support set 'none'"):
            own.chat.completions.create(**body, extra_body={"support_set": "none"})


def test_base_and_adapter_are_separate_models(client: TestClient) -> None:
    """Asked the same question alternately, each answers as it does alone."""
    body = {"messages": messages(png(1)), "max_tokens": 6, "logprobs": True}
    alone = {name: client.post("/v1/chat/completions", json={**body, "model": name}).json()["choices"][0] for name in ("base", "parts")}
    assert alone["base"]["logprobs"] != alone["parts"]["logprobs"]
    for name in ("parts", "base", "parts", "base"):
        assert client.post("/v1/chat/completions", json={**body, "model": name}).json()["choices"][0] == alone[name]


def test_a_stored_set_is_the_conversation_before_the_question(client: TestClient, run_folder: Path) -> None:
    """The answer is the same as with the whole conversation in the request."""
    put(client)
    wording, shown = WORDINGS[load(run_folder / "recipe.yaml").wording], examples()
    pictures = [(Picture(Path(str(n))), example["label"]) for n, example in enumerate(shown)]
    conversation: list[dict[str, Any]] = []
    for turn in support_turns(pictures, wording):
        image = [{"type": "image_url", "image_url": {"url": shown[int(str(turn.picture.path))]["image"]}}] if turn.picture else []
        conversation.append({"role": turn.role, "content": [*image, {"type": "text", "text": turn.text}] if image else turn.text})
    question = messages(png(5), text=wording.query)
    body = {"model": "parts", "max_tokens": 8, "logprobs": True}
    whole = client.post("/v1/chat/completions", json={**body, "messages": [*conversation, *question]}).json()
    short = client.post("/v1/chat/completions", json={**body, "messages": question, "support_set": "parts-set"}).json()
    assert short["choices"][0]["message"] == whole["choices"][0]["message"]
    assert short["usage"] == whole["usage"]
    logprobs = [[t["logprob"] for t in response["choices"][0]["logprobs"]["content"]] for response in (short, whole)]
    assert np.allclose(*logprobs, atol=1e-4)


def test_a_seed_repeats_a_draw_whatever_is_in_the_batch(client: TestClient, engine: Engine) -> None:
    put(client)
    body = {"model": "parts", "messages": messages(png(1)), "max_tokens": 12, "temperature": 1.5, "seed": 11, "support_set": "parts-set"}
    alone = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    engine.submit(Task(lambda: time.sleep(0.3)))
    with ThreadPoolExecutor(6) as pool:
        together = list(
            pool.map(lambda seed: client.post("/v1/chat/completions", json={**body, "seed": seed}).json()["choices"][0], [11, 12, 13, 11])
        )
    assert together[0] == together[3] == alone
    assert together[1] != alone or together[2] != alone


def test_stop_texts_end_an_answer_and_are_no_part_of_it(client: TestClient) -> None:
    body = {"model": "parts", "messages": messages(png(1)), "max_tokens": 12}
    whole = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    stop = whole[3:5]
    cut = client.post("/v1/chat/completions", json={**body, "stop": [stop]}).json()["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"
    with client.stream("POST", "/v1/chat/completions", json={**body, "stop": stop, "stream": True}) as streamed:
        lines = [json.loads(line[6:]) for line in streamed.iter_lines() if line.startswith("data: {")]
    assert "".join(line["choices"][0]["delta"].get("content", "") for line in lines) == whole[: whole.index(stop)]


def test_text_is_held_back_while_it_may_be_a_stop_text_or_half_a_character() -> None:
    class Tokenizer:
        def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
            return b"".join([b"ab", b"cX", b"Y", b"\xe7\x8c", b"\xab", b"XYZ"][i] for i in ids).decode(errors="replace")

    sent: list[str] = []
    decoder = TextDecoder(Tokenizer(), ["XYZ"], lambda text, tokens: sent.append(text))
    goes_on = [decoder.add(Token(i, 0.0)) for i in range(6)]
    assert goes_on == [True, True, True, True, True, False]
    assert sent == ["ab", "c", "XY", "猫"]
    assert decoder.text == "abcXY猫"
    assert [token.id for token in decoder.tokens] == [0, 1, 2, 3, 4], "the stop text's tokens are no part of the answer"


def test_bytes_of_a_character_are_held_back_together() -> None:
    """A tokenizer with byte fallback, such as Vicuna's, decodes each incomplete byte as a replacement character."""

    class Tokenizer:
        def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
            whole = "猫".encode()
            return "猫" if len(ids) == len(whole) else "�" * len(ids)

    sent: list[str] = []
    decoder = TextDecoder(Tokenizer(), [], lambda text, tokens: sent.append(text))
    for i in range(3):
        decoder.add(Token(i, 0.0))
    assert sent == ["猫"]
    assert decoder.remaining() == ("", [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "at least 1 item"),
        ({"messages": [{"role": "user", "content": "x"}] * 1_000}, "at most 512 items"),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, "two user messages in a row"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "the last message must be the user's"),
        ({"messages": [{"role": "user", "content": "a <image> here"}]}, "a special token of the model's prompt"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"n": 2}, "n: "),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 4000}, "the context is"),
        ({"support_set_version": 10**30}, "support_set_version"),
        ({"messages": [{"role": ("user", "assistant")[n % 2], "content": "x" * 30_000} for n in range(5)]}, "characters of text in all"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
    ids=str,
)
def test_an_invalid_chat_is_refused(client: TestClient, change: dict[str, Any], message: str) -> None:
    for stream in (False, True):
        response = client.post("/v1/chat/completions", json={"model": "parts", "messages": messages(png(1)), "stream": stream, **change})
        assert response.status_code == 400
        assert message in error_of(response)["message"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"model": "none", "messages": [{"role": "user", "content": "x"}]}, 404),
        ("/v1/chat/completions", {"model": "parts", "support_set": "none", "messages": [{"role": "user", "content": "x"}]}, 404),
        ("/v1/classify", {"support_set": "none", "images": [url(png(1))]}, 404),
        ("/v1/nothing", {}, 404),
    ],
)
def test_what_does_not_exist_is_answered_with_404(client: TestClient, path: str, body: dict[str, Any], status: int) -> None:
    response = client.post(path, json=body)
    assert response.status_code == status
    error_of(response)


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b"[" * 4_000, b'"x"', b"null"], ids=["cut", "empty", "bytes", "deep", "text", "null"])
def test_invalid_json_is_refused(client: TestClient, body: bytes) -> None:
    response = client.post("/v1/classify", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error_of(response)


def test_a_body_that_is_too_large_is_refused_before_it_is_read(service: Service) -> None:
    small = client_of(service, body_limit=10_000)
    response = small.post("/v1/classify", json={"support_set": "x", "images": ["x" * 20_000]})
    assert response.status_code == 413
    error_of(response)

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    chunked = small.post("/v1/classify", content=endless(), headers={"content-type": "application/json"})
    assert chunked.status_code == 413


# Keys and callers


@pytest.fixture
def keyed(service: Service, tmp_path: Path) -> TestClient:
    file = tmp_path / "keys.txt"
    file.write_text("# ours\n" + "".join(f"{name} {key}{' admin' if name == 'ops' else ''}\n" for name, key in KEYS.items()))
    return client_of(service, keys=read_keys(file))


def as_(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


@pytest.mark.parametrize("header", [None, "Bearer wrong-key-0123456789", "Basic abc", "Bearer", f"bearer  {KEYS['ops']}x"])
def test_without_a_key_nothing_is_answered(keyed: TestClient, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    for method, path in (("GET", "/v1/models"), ("GET", "/v1/support-sets"), ("POST", "/v1/classify"), ("PUT", "/v1/support-sets/x")):
        response = keyed.request(
            method, path, headers=headers, json={"support_set": "x", "images": ["x"], "examples": examples()} if method != "GET" else None
        )
        assert response.status_code == 401, path
        assert error_of(response)["code"] == "invalid_api_key"
    assert keyed.get("/metrics", headers=headers).status_code == 401
    assert keyed.post("/v1/classify", content=b"{", headers=headers).status_code == 401, "before the body is read"
    assert keyed.get("/health").status_code == keyed.get("/ready").status_code == 200
    assert keyed.get("/metrics", headers=as_("plant-a")).status_code == 403
    assert keyed.get("/metrics", headers=as_("ops")).status_code == 200


def test_each_key_has_its_own_sets(keyed: TestClient, engine: Engine) -> None:
    """Nothing cached is shared: a set of the same photos that another caller stored is not answered faster."""
    for name in ("plant-a", "plant-b"):
        assert keyed.put("/v1/support-sets/mine", json={"examples": examples()}, headers=as_(name)).json()["version"] == 1
    body = {"support_set": "mine", "images": [url(png(1))]}
    before = replace(engine.counters)
    for name in ("plant-a", "plant-b"):
        assert keyed.post("/v1/classify", json=body, headers=as_(name)).status_code == 200
    assert engine.counters.prefills - before.prefills == 2
    assert engine.counters.hits == before.hits
    keyed.delete("/v1/support-sets/mine", headers=as_("plant-a"))
    assert keyed.post("/v1/classify", json=body, headers=as_("plant-a")).status_code == 404
    assert keyed.post("/v1/classify", json=body, headers=as_("plant-b")).status_code == 200
    pictures = engine._predictor.vision.cache
    assert {str(picture.path).partition("/")[0] for picture in pictures} >= {"plant-a", "plant-b"}


def test_image_files_do_not_stay_in_memory(client: TestClient, engine: Engine) -> None:
    """The vision cache retains features, within its limit, but not the files' bytes."""
    put(client)
    client.post("/v1/classify", json={"support_set": "parts-set", "images": [url(png(1))]})
    assert engine._predictor.vision.cache
    assert all(picture.data is None for picture in engine._predictor.vision.cache)


def test_a_set_that_another_process_replaces_is_read_again(client: TestClient, service: Service) -> None:
    """Another process removes a set and stores a different one under its name.

    Nothing cached of the old set is used.
    """
    put(client)
    body = {"support_set": "parts-set", "images": [url(png(9))]}
    client.post("/v1/classify", json=body)
    shell = Store(service.store.folder)
    shell.remove("local", "parts-set")
    shell.put("local", "parts-set", [("left", png(60)), ("right", png(61))])
    replaced = client.post("/v1/classify", json=body).json()
    assert set(replaced["results"][0]["probabilities"]) == {"left", "right"}
    put(client, "same", examples=[{"label": "left", "image": url(png(60))}, {"label": "right", "image": url(png(61))}])
    again = client.post("/v1/classify", json={**body, "support_set": "same"}).json()
    assert again["results"][0]["probabilities"] == pytest.approx(replaced["results"][0]["probabilities"], abs=1e-6)


def test_only_an_administrator_loads_adapters(keyed: TestClient) -> None:
    assert keyed.put("/v1/adapters/parts2", headers=as_("plant-a")).status_code == 403
    assert keyed.put("/v1/adapters/parts2", headers=as_("ops")).status_code == 404


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no key"),
        ("a", "keys.txt:1: a line has a name, a key"),
        ("a b c d", "keys.txt:1"),
        ("a short", "the key has 5 characters; at least 16"),
        ("a/b 0123456789abcdef0", "a name has letters"),
        ("a 0123456789abcdef0\nb 0123456789abcdef0", "keys.txt:2: the same key as 'a'; each name"),
    ],
)
def test_a_fault_in_a_key_file_is_reported_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "keys.txt").write_text(text)
    with pytest.raises(RunError, match=message) as caught:
        read_keys(tmp_path / "keys.txt")
    assert "0123456789abcdef0" not in str(caught.value)
    with pytest.raises(RunError, match="cannot be read"):
        read_keys(tmp_path / "none.txt")


def test_other_machines_are_served_only_with_keys(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text(f"a {KEYS['ops']}\n")
    for host in ("0.0.0.0", "::", "192.168.0.2", "example.com", ""):
        with pytest.raises(RunError, match="--api-key-file"):
            server.check_address(host, None)
        assert isinstance(server.check_address(host, tmp_path / "keys.txt"), Keys)
    for host in ("127.0.0.1", "::1", "localhost", "127.0.0.2"):
        assert server.check_address(host, None) is None


def test_without_keys_other_host_names_are_refused(client: TestClient) -> None:
    """A web page cannot reach the server through a host name of its own (DNS rebinding)."""
    for host in ("evil.example:8000", "testserver", "192.168.0.2:8000", "localhost.evil.example", ""):
        assert client.get("/v1/models", headers={"host": host}).status_code == 403, host
    for host in ("localhost:8000", "[::1]:8000", "127.0.0.1", "127.0.0.2:8000"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200, host


def test_each_key_has_its_caller_among_many() -> None:
    import hashlib

    keys = Keys({hashlib.sha256(str(n).encode()).digest(): Caller(f"caller-{n}") for n in range(50)})
    assert keys.find("31") == Caller("caller-31")
    assert keys.find("50") is None


# Adapters


def test_adapters_are_loaded_and_unloaded_while_the_server_runs(client: TestClient, tiny_folder: Callable[[str], Path], run_folder: Path) -> None:
    """Each answers as itself, and the other models' answers do not change."""
    adapter_on(tiny_folder("pocket"), run_folder.parent / "second", seed=5)
    body = {"messages": messages(png(1)), "max_tokens": 4, "logprobs": True}

    def answer(name: str) -> Any:
        choices = client.post("/v1/chat/completions", json={**body, "model": name}).json().get("choices")
        return choices and [(token["token"], round(token["logprob"], 3)) for token in choices[0]["logprobs"]["content"]]

    before = {name: answer(name) for name in ("base", "parts")}
    assert answer("second") is None
    assert client.put("/v1/adapters/second").json()["id"] == "second"
    assert answer("second") not in before.values()
    assert {name: answer(name) for name in before} == before
    assert client.delete("/v1/adapters/second").status_code == 204
    assert answer("second") is None
    assert {name: answer(name) for name in before} == before
    assert client.delete("/v1/adapters/second").status_code == 404
    assert client.delete("/v1/adapters/base").status_code == 400


def test_the_same_adapter_may_be_loaded_again(client: TestClient, engine: Engine, tiny_folder: Callable[[str], Path], run_folder: Path) -> None:
    """It is loaded once and answered as before. Other weights, another wording, or the base's name are refused."""
    folder = adapter_on(tiny_folder("pocket"), run_folder.parent / "again", seed=6)
    first = client.put("/v1/adapters/again")
    loaded = engine.models["again"]
    assert client.put("/v1/adapters/again").json() == first.json()
    assert engine.models["again"] is loaded
    refusal = "a model 'again' with other weights or another wording exists already. Unload it first, or give another name."
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("wording: short", "wording: lcl"))
    response = client.put("/v1/adapters/again")
    assert (response.status_code, error_of(response)["message"]) == (400, refusal)
    (folder / "recipe.yaml").write_text(recipe)
    assert client.put("/v1/adapters/again").json() == first.json()
    adapter_on(tiny_folder("pocket"), folder, seed=7)
    response = client.put("/v1/adapters/again")
    assert (response.status_code, error_of(response)["message"]) == (400, refusal)
    assert engine.models["again"] is loaded
    assert client.delete("/v1/adapters/again").status_code == 204
    assert client.put("/v1/adapters/again").status_code == 200, "the new weights"
    assert engine.models["again"].identity != loaded.identity
    shutil.copytree(folder, run_folder.parent / "base")
    assert "a model 'base'" in error_of(client.put("/v1/adapters/base"))["message"]


def test_a_slow_load_is_retried_and_done_once(
    live: str, service: Service, engine: Engine, tiny_folder: Callable[[str], Path], run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's time limit ends the first requests, not the load. The client asks until it is done."""
    adapter_on(tiny_folder("pocket"), run_folder.parent / "slow", seed=9)
    own, loads = serving_engine.check_effect, []

    def slow(*arguments: Any) -> None:
        loads.append(arguments)
        time.sleep(1.5)
        own(*arguments)

    monkeypatch.setattr(serving_engine, "check_effect", slow)
    monkeypatch.setattr(service, "timeout", 0.4)
    assert httpx2.put(f"{live}/v1/adapters/slow", trust_env=False).status_code == 504
    with Endpoint(live, patience=0.5) as endpoint:
        endpoint.load_adapter("slow")
        endpoint.load_adapter("slow")
        assert "slow" in endpoint.models()
        with pytest.raises(RequestError, match="no name for an adapter"):
            endpoint.load_adapter("../slow")
    assert len(loads) == 1


def test_an_adapter_that_changes_nothing_or_is_for_another_base_is_refused(
    client: TestClient, engine: Engine, tiny_folder: Callable[[str], Path], run_folder: Path, tmp_path: Path
) -> None:
    """Other servers serve such an adapter, and it answers like the base."""
    from tests.test_merge import rewritten

    zero = rewritten(run_folder, run_folder.parent / "zero", lambda state: [value.zero_() for key, value in state.items() if "lora_B" in key])
    response = client.put("/v1/adapters/zero")
    assert response.status_code == 400
    assert "changes nothing" in error_of(response)["message"]
    adapter_on(tiny_folder("llava-1.5"), run_folder.parent / "other")
    response = client.put("/v1/adapters/other")
    assert response.status_code == 400
    assert "another base" in error_of(response)["message"]
    assert list(engine.models) == ["base", "parts"]
    fresh = Engine(load_base(BaseRef(str(tiny_folder("pocket")), device="cpu")), 10**6)
    with pytest.raises(AdapterError, match="changes nothing"):
        fresh.load_adapter("zero", zero)
    assert list(fresh.models) == ["base"]
    fresh.load_adapter("parts", run_folder)
    adapter_on(tiny_folder("pocket"), run_folder.parent / "lcl-1.5", seed=8)
    assert client.put("/v1/adapters/lcl-1.5").json()["id"] == "lcl-1.5", "PEFT itself does not allow this name"
    for name in ("..", "../runs", "none"):
        assert client.put(f"/v1/adapters/{name}").status_code in {400, 404, 405}


# Queue, cancelling, stopping


def test_a_full_queue_is_answered_with_a_time_to_retry(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    put(client)
    body = {"support_set": "parts-set", "images": [url(png(n)) for n in range(5)]}
    assert client.post("/v1/classify", json=body).status_code == 200
    monkeypatch.setattr(engine, "queue_limit", 8)
    engine.submit(Task(lambda: time.sleep(0.5)))
    with ThreadPoolExecutor(3) as pool:
        responses = list(pool.map(lambda _: client.post("/v1/classify", json=body), range(3)))
    assert sorted(response.status_code for response in responses) == [200, 429, 429]
    for refused in (response for response in responses if response.status_code == 429):
        assert int(refused.headers["Retry-After"]) >= 1
        assert error_of(refused)["code"] == "queue_full"
    assert client.post("/v1/classify", json=body).status_code == 200
    too_many = client.post("/v1/classify", json={**body, "images": body["images"] * 2})
    assert too_many.status_code == 400
    assert "send fewer at a time" in error_of(too_many)["message"]


def test_a_request_past_its_time_limit_is_ended(client: TestClient, service: Service, engine: Engine) -> None:
    put(client)
    service.timeout = 0.2
    engine.submit(Task(lambda: time.sleep(1.5)))
    response = client.post("/v1/classify", json={"support_set": "parts-set", "images": [url(png(1))]})
    assert response.status_code == 504
    assert error_of(response)["code"] == "timeout"
    service.timeout = 60
    assert client.post("/v1/classify", json={"support_set": "parts-set", "images": [url(png(1))]}).status_code == 200


def test_the_work_for_a_client_that_disconnects_ends(live: str, engine: Engine) -> None:
    """While it waits in the queue, and in the middle of a stream."""
    before = engine.counters.cancelled
    engine.submit(Task(lambda: time.sleep(2)))
    body = {"model": "parts", "messages": messages(png(1)), "max_tokens": 300}
    for stream in (False, True):
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{live}/v1/chat/completions", json={**body, "stream": stream}, timeout=0.3)
    deadline = time.monotonic() + 10
    while engine.counters.cancelled < before + 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine.counters.cancelled == before + 2


def test_a_job_that_is_cancelled_while_it_generates_leaves_the_cached_set_unchanged(engine: Engine) -> None:
    """The other jobs of its batch go on."""
    turn = Turn("user", "What is this?", Picture(Path("q"), data=png(1)))
    support = support_turns([(Picture(Path(f"s{n}"), data=png(n)), "good" if n < 2 else "bad") for n in range(4)], WORDINGS["lcl"])

    def job(on_token: Callable[[Any], bool]) -> Job:
        return Job("parts", lambda: support, turn, ("test", "cancel"), on_token=on_token)

    received: list[list[int]] = [[], [], []]
    alone = job(lambda token: received[0].append(token.id) is None)
    alone = replace(alone, sampling=replace(alone.sampling, max_tokens=10))
    engine.submit(alone)
    alone.future.result(30)
    engine.call(lambda _: None, 30)
    length = list(engine.cache.values())[-1].prefilled.cache.get_seq_length()
    stopped, beside = job(lambda token: received[1].append(token.id) is None), job(lambda token: received[2].append(token.id) is None)
    beside.sampling = alone.sampling

    def cancel(token: Any) -> bool:
        received[1].append(token.id)
        stopped.cancelled.set()
        return True

    stopped.on_token = cancel
    engine.submit(Task(lambda: time.sleep(0.2)), stopped, beside)
    beside.future.result(30)
    assert received[2] == received[0]
    assert len(received[1]) == 1
    engine.call(lambda _: None, 30)  # wait until the batch has ended
    assert list(engine.cache.values())[-1].prefilled.cache.get_seq_length() == length


def test_a_cached_sets_bytes_are_the_memory_that_it_uses(client: TestClient, engine: Engine) -> None:
    """A question's keys and values are freed, and so is the larger buffer that they were read into."""
    put(client)
    for count in (1, 12):
        client.post("/v1/classify", json={"support_set": "parts-set", "images": [url(png(n)) for n in range(count)]})
        cached = list(engine.cache.values())[-1]
        used = sum(getattr(layer, name).untyped_storage().nbytes() for layer in cached.prefilled.cache.layers for name in ("keys", "values"))
        assert used == cached.bytes


def test_long_questions_are_split_into_several_batches(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a batch grows with the square of its tokens, so they are limited, in any order of the questions."""
    put(client)
    body = {"model": "parts", "max_tokens": 1, "support_set": "parts-set"}
    short, long = messages(png(1)), messages(png(1), text="What is this? " * 30)
    expected = [client.post("/v1/chat/completions", json={**body, "messages": sent}).json()["choices"] for sent in (short, long)]
    monkeypatch.setattr("lcl_adapter.serve.engine.MAX_BATCH_TOKENS", 600)
    engine.submit(Task(lambda: time.sleep(0.3)))
    before = engine.counters.waves
    with ThreadPoolExecutor(6) as pool:
        questions = [short, long, short, long, short, long]
        choices = list(pool.map(lambda sent: client.post("/v1/chat/completions", json={**body, "messages": sent}).json()["choices"], questions))
    assert choices == expected * 3
    assert engine.counters.waves - before >= 3


def test_a_request_that_does_not_fit_affects_no_other_of_its_batch(client: TestClient, engine: Engine) -> None:
    """One request asks for more tokens than fit. A temperature close to zero means greedy decoding."""
    put(client)
    body = {"model": "parts", "messages": messages(png(1)), "max_tokens": 4, "support_set": "parts-set"}
    alone = client.post("/v1/chat/completions", json=body).json()["choices"]
    without_set = client.post("/v1/chat/completions", json={**body, "support_set": None}).json()["usage"]["prompt_tokens"]
    engine.submit(Task(lambda: time.sleep(0.3)))
    changes = [{}, {"max_tokens": engine.base.encoder().context - without_set}, {"temperature": 1e-38}, {}]
    with ThreadPoolExecutor(4) as pool:
        responses = list(pool.map(lambda change: client.post("/v1/chat/completions", json={**body, **change}), changes))
    assert [response.status_code for response in responses] == [200, 400, 200, 200]
    assert [responses[n].json()["choices"] for n in (0, 2, 3)] == [alone] * 3


def test_a_client_that_stops_reading_does_not_delay_others(live: str) -> None:
    """Only its own connection waits."""
    port = int(live.rpartition(":")[2])
    body = json.dumps({"model": "parts", "messages": messages(png(1)), "max_tokens": 200, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", port)) as silent:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        silent.sendall(head.encode() + body)
        for _ in range(3):
            assert (
                httpx2.post(f"{live}/v1/chat/completions", json={"model": "parts", "messages": messages(png(2)), "max_tokens": 3}).status_code == 200
            )


def test_an_error_in_a_batch_ends_only_the_job_that_causes_it(engine: Engine) -> None:
    """A fault inside the model run: the other jobs are answered, and the cached set is prefilled again."""
    support = support_turns([(Picture(Path(f"s{n}"), data=png(n)), "good" if n < 2 else "bad") for n in range(4)], WORDINGS["lcl"])

    def job(data: bytes) -> Job:
        answers = tuple(WORDINGS["lcl"].answered(label) for label in ("good", "bad"))
        return Job("parts", lambda: support, Turn("user", "What is this?", Picture(Path(f"q{len(data)}"), data=data)), ("test", "fault"), answers)

    good, bad, also = job(png(1)), job(b"no image"), job(png(2, (50, 50)))
    engine.submit(Task(lambda: time.sleep(0.2)), good, bad, also)
    assert good.future.result(30).reply.log_likelihoods
    assert also.future.result(30).reply.log_likelihoods
    with pytest.raises(Exception, match="not an image"):
        bad.future.result(30)
    again = job(png(1))
    engine.submit(again)
    assert again.future.result(30).reply.log_likelihoods == pytest.approx(good.future.result().reply.log_likelihoods)
    assert engine.alive


def test_tasks_with_several_steps_finish_one_after_the_other(engine: Engine) -> None:
    """Short tasks run in between.

    An error ends only its own task, and a task that is cancelled before its start never runs.
    """
    log: list[str] = []

    def steps(name: str, wrong: bool = False) -> Callable[[], Any]:
        def run() -> Iterator[None]:
            for n in range(3):
                log.append(f"{name}{n}")
                yield
            if wrong:
                raise RunError(name)
            return name  # the task's result, as a calibration's generator returns it

        return run

    first, second, third, never = Task(steps("a")), Task(steps("b", wrong=True)), Task(steps("c")), Task(steps("d"))
    never.cancelled.set()
    engine.submit(Task(lambda: time.sleep(0.2)), first, second, third, never, Task(lambda: log.append("short")))
    assert first.future.result(30) == "a"
    assert third.future.result(30) == "c"
    assert isinstance(second.future.exception(30), RunError)
    assert never.future.exception(30)
    assert [entry for entry in log if entry != "short"] == [f"{name}{n}" for name in "abc" for n in range(3)]
    assert log.index("short") <= 3
    assert engine.alive


def test_callers_have_their_turns_one_after_the_other(engine: Engine) -> None:
    """However much one of them sends, and whoever came first."""
    log: list[str] = []

    def task(caller: str, n: int = 0) -> Task:
        return Task(lambda: log.append(f"{caller}{n}"), caller)

    last = task("busy", 5)
    engine.submit(Task(lambda: time.sleep(0.2)), *(task("busy", n) for n in range(5)), task("guest"), last, task("other"))
    last.future.result(30)
    assert log == ["busy0", "guest0", "other0", "busy1", "busy2", "busy3", "busy4", "busy5"]


@given(st.lists(st.sampled_from("abc"), max_size=30), st.lists(st.booleans(), max_size=30))
def test_a_fair_queue_gives_each_entry_once_and_each_caller_in_order(callers: list[str], pops: list[bool]) -> None:
    queue, out, last_turn = FairQueue(), list[Task](), dict[str, int]()
    entries = [Task(lambda: None, caller) for caller in callers]
    arriving = list(entries)
    for pop in [*pops, *[False] * len(callers), *[True] * len(callers)]:
        if not pop and arriving:
            queue.extend([arriving.pop(0)])
        elif pop and len(queue):
            longest_ago = min(last_turn.get(task.caller, -1) for task in queue)
            out.append(cast(Task, queue.pop()))
            assert last_turn.get(out[-1].caller, -1) == longest_ago
            last_turn[out[-1].caller] = len(out)
    assert len(queue) == 0
    for caller in "abc":
        assert [task for task in out if task.caller == caller] == [task for task in entries if task.caller == caller]


def test_a_full_queue_is_that_of_one_caller(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "queue_limit", 2)
    blocked, ends = Task(lambda: ends.wait(30)), threading.Event()
    engine.submit(blocked)

    def job(caller: str) -> Job:
        return Job("base", lambda: (), Turn("user", "Is it?"), answers=("yes", "no"), judged=False, caller=caller)

    jobs = [job("busy"), job("busy"), job("guest")]
    engine.submit(*jobs)
    with pytest.raises(BusyError):
        engine.submit(job("guest"), job("busy"))
    engine.submit(job("guest"))
    ends.set()
    assert all(job.future.result(30).reply.log_likelihoods for job in jobs)


def test_a_stopped_engine_refuses_new_and_waiting_work(tiny_folder: Callable[[str], Path]) -> None:
    own = Engine(load_base(BaseRef(str(tiny_folder("pocket")), device="cpu")), 10**6).start()
    slow, waiting = Task(lambda: time.sleep(0.3)), Task(lambda: None)
    own.submit(slow, waiting)
    time.sleep(0.1)
    own.stop()
    assert slow.future.result(1) is None
    with pytest.raises(BusyError):
        waiting.future.result(1)
    with pytest.raises(BusyError):
        own.submit(Task(lambda: None))
    assert not own.alive


def test_health_and_metrics(client: TestClient, engine: Engine) -> None:
    put(client)
    client.post("/v1/classify", json={"support_set": "parts-set", "images": [url(png(1))]})
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    text = client.get("/metrics").text
    for line in ("lcl_hits_total", "lcl_evictions_total", "lcl_rebuilds_total", "lcl_kept_bytes ", "lcl_images_classified_total 1.0"):
        assert f"\n{line}" in text
    assert 'lcl_requests_total{route="/v1/classify",status="200"} 1.0' in text


def test_the_openapi_document_has_every_route(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/classify", "/v1/models", "/v1/support-sets/{name}", "/v1/adapters/{name}"} <= paths.keys()
    body = paths["/v1/classify"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ClassifyIn"}
    assert api_types.ClassifyIn.model_json_schema()["additionalProperties"] is False


# The command


@pytest.mark.parametrize("how", ["idle", "in a stream"])
def test_the_command_serves_and_stops_on_a_signal(run_folder: Path, tmp_path: Path, how: str) -> None:
    """In a process of its own: requests, then SIGTERM.

    Its output contains no keys and no photos, and the stored sets remain.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "keys.txt").write_text(f"a {KEYS['ops']}\n")
    base = json.loads((run_folder / "lcl_adapter.json").read_text())["base"]
    command = ["serve", base, "--adapter", f"parts={run_folder}", "--port", str(port), "--memory", "1GB"]
    command += ["--api-key-file", str(tmp_path / "keys.txt"), "--store", str(tmp_path / "store")]
    process = Forked("from lcl_adapter.cli import main; main()", *command)
    try:
        own = httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=as_("ops"), timeout=30)
        for _ in range(600):
            try:
                if own.get("/ready").status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(0.1)
        assert put(own).status_code == 200
        assert own.post("/v1/classify", json={"support_set": "parts-set", "images": [url(png(1))]}).status_code == 200
        if how == "idle":
            process.send_signal(signal.SIGTERM)
        else:
            body = {"model": "parts", "messages": messages(png(1)), "max_tokens": 40, "stream": True}
            with own.stream("POST", "/v1/chat/completions", json=body) as streamed:
                lines = streamed.iter_lines()
                assert next(lines).startswith("data: ")
                process.send_signal(signal.SIGTERM)
                assert [line for line in lines if line][-1] == "data: [DONE]"
        own.close()
    finally:
        exit_code, *outputs = process.wait(40)
    output = "".join(outputs)
    assert exit_code in {0, -signal.SIGTERM}, output
    assert KEYS["ops"] not in output
    assert "base64" not in output
    assert Store(tmp_path / "store").get("a", "parts-set").version == 1


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_a_port_in_use_is_reported_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(server, "make_service", lambda options: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        result = CliRunner().invoke(main, [command, "pocket", "--port", port, "--store", str(tmp_path / "store")])
    assert result.exit_code == 2, result.output
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in " ".join(result.output.split())
    assert not (tmp_path / "store").exists()


def test_an_invalid_address_is_reported() -> None:
    with pytest.raises(RunError, match=r"cannot listen on not\.a\.host\.invalid, port 80: .*; give another"):
        server.bind_address("not.a.host.invalid", 80)


def test_too_little_memory_is_reported() -> None:
    with pytest.raises(RunError, match="the weights alone need"):
        server._cache_budget(1000, 2000, torch.device("cpu"))
    assert server._cache_budget(3000, 2000, torch.device("cpu")) == 1000
    assert server._cache_budget(None, 2000, torch.device("cpu")) > 10**6
