"""The server: OpenAI's own client against it, answers equal to the offline engine's, and everything a client may get wrong."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import torch
import uvicorn
from click.testing import CliRunner
from fastapi.testclient import TestClient
from PIL import Image

from lcl_adapter.answering import api_types
from lcl_adapter.answering.predict import Predictor, Question
from lcl_adapter.base.adapter import load_adapter
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.cli import main
from lcl_adapter.data.conversations import WORDINGS, Turn, support_turns
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import AdapterError, RunError
from lcl_adapter.recipe import load
from lcl_adapter.serve import api, server
from lcl_adapter.serve.decoding import Speaker, Token
from lcl_adapter.serve.engine import Engine
from lcl_adapter.serve.jobs import BusyError, Job, Task
from lcl_adapter.serve.keys import Caller, Keys, read_keys
from lcl_adapter.serve.service import Service
from lcl_adapter.serve.store import Store
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
    """Its own store; the engine is shared, and has the base and the adapter alone."""
    made = Service(engine, Store(tmp_path / "store"), adapters=run_folder.parent, timeout=60)
    yield made
    made.store.close()
    for name in [name for name in engine.models if name not in {"base", "parts"}]:
        engine.call(lambda e, name=name: e.unload_adapter(name), 30)


def client_of(service: Service, **options: Any) -> TestClient:
    """Without its shutdown, which would stop the shared engine."""
    return TestClient(api.make_app(service, **options), base_url="http://localhost", raise_server_exceptions=False)


@pytest.fixture
def client(service: Service) -> TestClient:
    return client_of(service)


@pytest.fixture
def live(service: Service) -> Iterator[str]:
    """A real socket: for what a test client cannot do, such as going away."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = api.make_app(service)
    running = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(20)


def put(client: Any, name: str = "parts-set", **body: Any) -> Any:
    return client.put(f"/v1/support-sets/{name}", json={"examples": examples(), **body})


def offline(run: Path, shown: list[dict[str, str]], queries: list[bytes]) -> list[tuple[float, ...]]:
    """The same questions asked of the engine that evaluation uses, one at a time."""
    base, _ = load_adapter(run, BaseRef(precision="fp32", device="cpu"))
    wording, predictor = WORDINGS[load(run / "recipe.yaml").wording], Predictor(base)
    labels = list(dict.fromkeys(one["label"] for one in shown))
    pictures = [(Picture(Path(str(n)), data=base64.b64decode(one["image"].partition(",")[2])), one["label"]) for n, one in enumerate(shown)]
    ready = predictor.prefill([support_turns(pictures, wording)])
    answers = tuple(wording.answered(label) for label in labels)
    asked = [Question(0, Turn("user", wording.query, Picture(Path(f"q{n}"), data=data)), answers) for n, data in enumerate(queries)]
    return [predictor.ask(ready, [question], generate=False)[0].probabilities for question in asked]


def error_of(response: Any) -> dict[str, Any]:
    """OpenAI's shape, and nothing of this machine in it."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "/tmp" not in response.text
    assert "Traceback" not in response.text
    return body["error"]


def messages(*data: bytes, text: str = "What is this?") -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url(one)}} for one in data]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


# Support sets and classification


def test_a_set_is_stored_read_and_removed(client: TestClient) -> None:
    told = put(client, question="Which is it?").json()
    assert (told["version"], told["labels"], told["question"]) == (1, {"good": 2, "scratched": 2}, "Which is it?")
    whole = client.get("/v1/support-sets/parts-set", params={"images": True}).json()
    assert [{"label": e["label"], "image": e["image"]} for e in whole["examples"]] == examples()
    assert client.get("/v1/support-sets/parts-set").json()["examples"][0]["image"] is None
    assert put(client, examples=examples(shots=3)).json()["version"] == 2
    assert [one["version"] for one in client.get("/v1/support-sets/parts-set/versions").json()["data"]] == [2, 1]
    assert client.get("/v1/support-sets/parts-set", params={"version": 1}).json()["labels"] == {"good": 2, "scratched": 2}
    assert [one["name"] for one in client.get("/v1/support-sets").json()["data"]] == ["parts-set"]
    assert client.delete("/v1/support-sets/parts-set").status_code == 204
    assert error_of(client.get("/v1/support-sets/parts-set"))["code"] == "not_found"


def test_classified_images_have_the_offline_engines_probabilities(client: TestClient, run_folder: Path) -> None:
    """Whatever is asked beside them, twice, from the kept set; the temperature aside, which the answer tells."""
    put(client)
    queries = [png(100 + n) for n in range(20)]
    expected = offline(run_folder, examples(), queries)
    for _ in range(2):
        found = client.post("/v1/classify", json={"support_set": "parts-set", "model": "parts", "images": [url(q) for q in queries]}).json()
        assert (found["model"], found["version"], found["calibration"]["left_out"]) == ("parts", 1, 4)
        sharp = 1 / found["calibration"]["temperature"]
        for wanted, one in zip(expected, found["results"], strict=True):
            powered = np.array(wanted) ** sharp
            assert np.allclose(list(one["probabilities"].values()), powered / powered.sum(), atol=1e-4)
            ranked = sorted(one["probabilities"].items(), key=lambda item: -item[1])
            assert one["nearest"] == ranked[0][0]
            assert one["margin"] == pytest.approx(ranked[0][1] - ranked[1][1])
            assert one["none_of_these"] == (one["familiarity"] < found["calibration"]["threshold"]) == (one["label"] is None)


def test_a_query_that_is_in_the_set_is_most_like_itself(client: TestClient) -> None:
    put(client)
    shown = examples()
    found = client.post("/v1/classify", json={"support_set": "parts-set", "images": [one["image"] for one in shown]}).json()
    for place, one in enumerate(found["results"]):
        assert one["most_alike"]["example"] == place
        assert one["most_alike"]["label"] == shown[place]["label"]
        assert one["most_alike"]["cosine"] == pytest.approx(1.0, abs=1e-5)


def test_one_bad_image_spoils_only_its_own_result(client: TestClient) -> None:
    put(client)
    bad = ["http://example.com/x.png", url(b"<html>"), url(png(3)[:60]), "file:///etc/passwd"]
    found = client.post("/v1/classify", json={"support_set": "parts-set", "images": [url(png(1)), *bad, url(png(2))]})
    assert found.status_code == 200
    results = found.json()["results"]
    assert [one["error"] is None for one in results] == [True, False, False, False, False, True]
    assert "images[1]" in results[1]["error"]["message"]
    assert "passwd" not in found.text
    only = client.post("/v1/classify", json={"support_set": "parts-set", "images": bad}).json()
    assert all(one["error"] for one in only["results"])


def test_a_set_is_read_once_and_again_after_it_was_evicted(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted as a client sees it; and the answers are the same."""
    for name, seed in (("one", 0), ("two", 50)):
        put(client, name, examples=examples(seed=seed))

    def asked(name: str) -> dict[str, float]:
        return client.post("/v1/classify", json={"support_set": name, "images": [url(png(7))]}).json()["results"][0]["probabilities"]

    first = asked("one")
    size = list(engine.cache.values())[-1].bytes
    start = replace(engine.counters)
    assert [asked("one") for _ in range(3)] == [first] * 3
    assert (engine.counters.hits - start.hits, engine.counters.prefills - start.prefills) == (3, 0)
    monkeypatch.setattr(engine.cache, "budget", size)
    asked("two")
    assert engine.counters.evictions > start.evictions
    assert asked("one") == pytest.approx(first)
    assert engine.counters.rebuilds - start.rebuilds == 1
    assert engine.cache.bytes == sum(kept.bytes for kept in engine.cache.values()) <= size
    monkeypatch.setattr(engine.cache, "budget", size - 1)
    assert asked("two")
    assert engine.cache.bytes == 0, "a set that is larger than all there is, is used and not kept"


def test_old_sets_make_room_before_a_new_one_is_read(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not beside them: memory would be over its bound for that long."""
    for name, seed in (("here", 0), ("next", 50)):
        put(client, name, examples=examples(seed=seed))
    body = {"images": [url(png(7))]}
    client.post("/v1/classify", json={"support_set": "here", **body})
    monkeypatch.setattr(engine.cache, "budget", list(engine.cache.values())[-1].bytes)
    beside: list[int] = []
    read = engine._predictor.prefill
    monkeypatch.setattr(engine._predictor, "prefill", lambda supports: beside.append(engine.cache.bytes) or read(supports))
    client.post("/v1/classify", json={"support_set": "next", **body})
    assert beside.pop(0) == 0
    assert set(beside) <= {0}  # those of the calibration, and the set itself


def test_a_new_version_is_what_is_asked(client: TestClient) -> None:
    """Never the one that was kept before; and the old one can still be asked by its number."""
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


def test_requests_of_many_clients_go_together_and_stay_apart(client: TestClient, engine: Engine, run_folder: Path) -> None:
    """Forty images in twenty requests to two sets, at once: fewer waves than requests, each answer its own."""
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
        found = list(pool.map(ask, range(20)))
    for one in found:
        sharp = 1 / one["calibration"]["temperature"]
        for wanted, result in zip(expected[one["name"]][one["first"] :], one["results"], strict=False):
            powered = np.array(wanted) ** sharp
            assert np.allclose(list(result["probabilities"].values()), powered / powered.sum(), atol=1e-4)
    assert engine.counters.waves - before < 20


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"examples": examples(("good",))}, "a judgement needs at least two labels"),
        ({"examples": examples(("Good", "ｇｏｏｄ"))}, "differ only in case or width"),
        ({"examples": examples(("good", "GOOD"))}, "differ only in case or width"),
        ({"examples": examples(("good", "x" * 100_000), shots=1)}, "at most 200 characters"),
        ({"examples": examples(("good", "</s><image>"), shots=1)}, "a special token of the model's prompt"),
        ({"examples": examples(("good", "a\x00b"), shots=1)}, "one line of visible text"),
        ({"examples": [{"label": "a", "image": "http://x/y.png"}, *examples()]}, r"examples[0].image: the image is a URL of http:"),
        ({"examples": [{"label": "a", "image": "data:text/html;base64,PGI+"}, *examples()]}, "image/png, image/jpeg"),
        ({"examples": [{"label": "a", "image": url(b"")}, *examples()]}, "the image is empty"),
        ({"examples": [{"label": "a", "image": "data:image/png;base64,%%%"}, *examples()]}, "base64 is broken"),
        ({"examples": examples(shots=40)}, "do not fit the context"),
        ({"examples": examples(), "expected_versoin": 1}, "expected_versoin"),
        ({"examples": [], "question": "?"}, "at least 2 items"),
    ],
    ids=[
        "one label",
        "width",
        "case",
        "100 kB label",
        "marks",
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
def test_a_set_that_cannot_be_is_refused(client: TestClient, body: dict[str, Any], said: str) -> None:
    found = client.put("/v1/support-sets/bad", json=body)
    assert found.status_code == 400
    assert said in error_of(found)["message"]
    assert len(found.text) < 2000, "what was sent is not sent back"
    assert client.get("/v1/support-sets").json()["data"] == []


@pytest.mark.parametrize("name", ["..", "a/b", "%2e%2e%2fx", "x" * 65, ".hidden", "a b"])
def test_a_name_that_is_none_is_refused(client: TestClient, name: str) -> None:
    assert client.put(f"/v1/support-sets/{name}", json={"examples": examples()}).status_code in {400, 404, 405}


def test_two_writers_of_one_set(client: TestClient) -> None:
    assert put(client, expected_version=0).status_code == 200
    late = put(client, expected_version=0)
    assert late.status_code == 409
    assert error_of(late)["code"] == "version_conflict"
    assert put(client, expected_version=1).json()["version"] == 2


def test_a_full_disk_is_no_reason_not_to_answer(client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration that cannot be stored is kept in memory, and not made again."""
    put(client)

    def full(*_: object) -> None:
        raise RunError("the disk is full")

    monkeypatch.setattr(service.store, "write_calibration", full)
    body = {"support_set": "parts-set", "images": [url(png(1))]}
    first, made = client.post("/v1/classify", json=body), len(service._calibrations)
    assert first.status_code == 200
    assert client.post("/v1/classify", json=body).json() == first.json()
    assert made == len(service._calibrations) == 1


def test_a_full_disk_is_told_and_the_server_goes_on(client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    put(client)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/secret")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        found = put(client, "more", examples=examples(seed=400))
        assert found.status_code == 507
        assert "disk is full" in error_of(found)["message"]
        assert client.post("/v1/classify", json={"support_set": "parts-set", "images": [url(png(1))]}).status_code == 200
    assert put(client, "more", examples=examples(seed=400)).status_code == 200


# Images


def bomb() -> bytes:
    """A few kB that say they are 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100_000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda: url(bomb()), "far more than the 40,000,000 pixels"),
        (lambda: url(b"<html><body>no image</body></html>"), "no image at all"),
        (lambda: url(b"A" * (10 * 2**20 + 1)), "10.0 MiB, 10 are allowed"),
        (lambda: url(png(1)[:100]), "cannot be read"),
        (lambda: url(png(1, (1, 5))), "shows nothing"),
        (lambda: url(png(1, (20_000, 3))), "8,192 a side are allowed"),
        (lambda: "ftp://x/y", "a URL of ftp:"),
        (lambda: "just text", "not a base64 data URL"),
        (lambda: "data:image/svg+xml;base64,PHN2Zz4=", "image/svg+xml"),
    ],
    ids=["bomb", "html", "bytes", "cut", "one pixel", "a long strip", "ftp", "text", "svg"],
)
def test_an_image_that_cannot_be_used_is_refused(client: TestClient, data: Callable[[], str], said: str) -> None:
    body = {"model": "parts", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data()}}]}]}
    found = client.post("/v1/chat/completions", json=body)
    assert found.status_code == 400
    assert said in error_of(found)["message"]


# Chat


def test_openais_own_client_is_content(live: str) -> None:
    """Models, a whole answer, a streamed one that is the same, log-probabilities, and its own errors."""
    with openai.OpenAI(base_url=f"{live}/v1", api_key="any", max_retries=0) as own:
        assert [model.id for model in own.models.list()] == ["base", "parts"]
        assert own.models.retrieve("parts").id == "parts"
        asked: dict[str, Any] = {"model": "parts", "messages": messages(png(1)), "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
        whole = own.chat.completions.create(**asked)
        choice = whole.choices[0]
        assert choice.finish_reason in {"stop", "length"}
        assert whole.usage is not None
        assert whole.usage.completion_tokens <= 12
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        for token in choice.logprobs.content:
            assert len(token.top_logprobs) == 3
            assert token.logprob == pytest.approx(max(one.logprob for one in token.top_logprobs)), "the likeliest was said"
        pieces = list(own.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert said == choice.message.content
        assert pieces[-1].usage == whole.usage
        told = [token for piece in pieces if piece.choices and (kept := piece.choices[0].logprobs) for token in kept.content or []]
        assert [t.token for t in told] == [t.token for t in choice.logprobs.content]
        assert [piece.choices[0].finish_reason for piece in pieces if piece.choices][-1] == choice.finish_reason
        with pytest.raises(openai.NotFoundError, match="no model 'part'"):
            own.chat.completions.create(**{**asked, "model": "part"})
        with pytest.raises(openai.BadRequestError, match="no image at all"):
            own.chat.completions.create(model="parts", messages=messages(b"text"))
        with pytest.raises(openai.NotFoundError, match="no support set 'none'"):
            own.chat.completions.create(**asked, extra_body={"support_set": "none"})


def test_base_and_adapter_are_models_of_their_own(client: TestClient) -> None:
    """The same question, in turn; each answers as it does alone."""
    body = {"messages": messages(png(1)), "max_tokens": 6, "logprobs": True}
    alone = {name: client.post("/v1/chat/completions", json={**body, "model": name}).json()["choices"][0] for name in ("base", "parts")}
    assert alone["base"]["logprobs"] != alone["parts"]["logprobs"]
    for name in ("parts", "base", "parts", "base"):
        assert client.post("/v1/chat/completions", json={**body, "model": name}).json()["choices"][0] == alone[name]


def test_a_stored_set_is_the_conversation_before_the_question(client: TestClient, run_folder: Path) -> None:
    """What is said behind it is what the whole conversation's last answer would be."""
    put(client)
    wording, shown = WORDINGS[load(run_folder / "recipe.yaml").wording], examples()
    pictures = [(Picture(Path(str(n))), one["label"]) for n, one in enumerate(shown)]
    by_hand: list[dict[str, Any]] = []
    for turn in support_turns(pictures, wording):
        image = [{"type": "image_url", "image_url": {"url": shown[int(str(turn.picture.path))]["image"]}}] if turn.picture else []
        by_hand.append({"role": turn.role, "content": [*image, {"type": "text", "text": turn.text}] if image else turn.text})
    question = messages(png(5), text=wording.query)
    same = {"model": "parts", "max_tokens": 8, "logprobs": True}
    whole = client.post("/v1/chat/completions", json={**same, "messages": [*by_hand, *question]}).json()
    short = client.post("/v1/chat/completions", json={**same, "messages": question, "support_set": "parts-set"}).json()
    assert short["choices"][0]["message"] == whole["choices"][0]["message"]
    assert short["usage"] == whole["usage"]
    logprobs = [[t["logprob"] for t in one["choices"][0]["logprobs"]["content"]] for one in (short, whole)]
    assert np.allclose(*logprobs, atol=1e-4)


def test_a_seed_makes_a_draw_again_whatever_is_asked_beside_it(client: TestClient, engine: Engine) -> None:
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


def test_stop_texts_end_an_answer_before_they_are_said(client: TestClient) -> None:
    body = {"model": "parts", "messages": messages(png(1)), "max_tokens": 12}
    whole = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    stop = whole[3:5]
    cut = client.post("/v1/chat/completions", json={**body, "stop": [stop]}).json()["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"
    with client.stream("POST", "/v1/chat/completions", json={**body, "stop": stop, "stream": True}) as streamed:
        lines = [json.loads(line[6:]) for line in streamed.iter_lines() if line.startswith("data: {")]
    assert "".join(line["choices"][0]["delta"].get("content", "") for line in lines) == whole[: whole.index(stop)]


def test_text_is_held_back_until_it_is_sure() -> None:
    """Half a stop text, and half a character."""

    class Tokenizer:
        def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
            return b"".join([b"ab", b"cX", b"Y", b"\xe7\x8c", b"\xab", b"XYZ"][i] for i in ids).decode(errors="replace")

    sent: list[str] = []
    speaker = Speaker(Tokenizer(), ["XYZ"], lambda text, tokens: sent.append(text))
    going = [speaker.hear(Token(i, 0.0)) for i in range(6)]
    assert going == [True, True, True, True, True, False]
    assert sent == ["ab", "c", "XY", "猫"]
    assert speaker.text == "abcXY猫"
    assert [token.id for token in speaker.tokens] == [0, 1, 2, 3, 4], "what was said of the stop text is no part of the answer"


def test_bytes_of_a_character_are_held_back_together() -> None:
    """As a tokenizer with byte fall-back, Vicuna's, gives them: one replacement mark a byte."""

    class Tokenizer:
        def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
            whole = "猫".encode()
            return "猫" if len(ids) == len(whole) else "�" * len(ids)

    sent: list[str] = []
    speaker = Speaker(Tokenizer(), [], lambda text, tokens: sent.append(text))
    for i in range(3):
        speaker.hear(Token(i, 0.0))
    assert sent == ["猫"]
    assert speaker.rest() == ("", [])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"messages": []}, "at least 1 item"),
        ({"messages": [{"role": "user", "content": "x"}] * 10_000}, "at most 512 items"),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, "two messages of the user's in a row"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "the last message must be the user's"),
        ({"messages": [{"role": "user", "content": "a <image> here"}]}, "a special token of the model's prompt"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"n": 2}, "n: "),
        ({"tools": []}, "tools"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 4000}, "the context is"),
        ({"support_set_version": 10**30}, "support_set_version"),
        ({"messages": [{"role": ("user", "assistant")[n % 2], "content": "x" * 30_000} for n in range(9)]}, "characters of text in all"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
    ids=str,
)
def test_a_chat_that_cannot_be_is_refused(client: TestClient, change: dict[str, Any], said: str) -> None:
    for stream in (False, True):
        found = client.post("/v1/chat/completions", json={"model": "parts", "messages": messages(png(1)), "stream": stream, **change})
        assert found.status_code == 400
        assert said in error_of(found)["message"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"model": "none", "messages": [{"role": "user", "content": "x"}]}, 404),
        ("/v1/chat/completions", {"model": "parts", "support_set": "none", "messages": [{"role": "user", "content": "x"}]}, 404),
        ("/v1/classify", {"support_set": "none", "images": [url(png(1))]}, 404),
        ("/v1/nothing", {}, 404),
    ],
)
def test_what_is_not_there_is_told(client: TestClient, path: str, body: dict[str, Any], status: int) -> None:
    found = client.post(path, json=body)
    assert found.status_code == status
    error_of(found)


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b"[" * 100_000, b'"x"', b"null"], ids=["cut", "empty", "bytes", "deep", "text", "null"])
def test_json_that_is_none_is_refused(client: TestClient, body: bytes) -> None:
    found = client.post("/v1/classify", content=body, headers={"content-type": "application/json"})
    assert found.status_code == 400
    error_of(found)


def test_a_body_that_is_too_large_is_refused_before_it_is_read(service: Service) -> None:
    small = client_of(service, body_limit=10_000)
    found = small.post("/v1/classify", json={"support_set": "x", "images": ["x" * 20_000]})
    assert found.status_code == 413
    error_of(found)

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    chunked = small.post("/v1/classify", content=endless(), headers={"content-type": "application/json"})
    assert chunked.status_code == 413


# Who asks


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
        found = keyed.request(
            method, path, headers=headers, json={"support_set": "x", "images": ["x"], "examples": examples()} if method != "GET" else None
        )
        assert found.status_code == 401, path
        assert error_of(found)["code"] == "invalid_api_key"
    assert keyed.get("/metrics", headers=headers).status_code == 401
    assert keyed.post("/v1/classify", content=b"{", headers=headers).status_code == 401, "before the body is read"
    assert keyed.get("/health").status_code == keyed.get("/ready").status_code == 200
    assert keyed.get("/metrics", headers=as_("plant-a")).status_code == 403
    assert keyed.get("/metrics", headers=as_("ops")).status_code == 200


def test_keys_see_their_own_sets(keyed: TestClient, engine: Engine) -> None:
    """Nor is a set that another stored read faster for the same photos: nothing kept is shared."""
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
    seen = engine._predictor.vision.cache
    assert {str(picture.path).partition("/")[0] for picture in seen} >= {"plant-a", "plant-b"}


def test_photos_of_a_removed_set_are_not_kept_in_memory(client: TestClient, engine: Engine) -> None:
    """Features are, within their bound; the files' bytes are with nobody."""
    put(client)
    client.post("/v1/classify", json={"support_set": "parts-set", "images": [url(png(1))]})
    assert engine._predictor.vision.cache
    assert all(picture.data is None for picture in engine._predictor.vision.cache)


def test_a_shell_that_replaces_a_set_is_heard(client: TestClient, service: Service) -> None:
    """Another process removes a set and stores another under its name; nothing kept of the old one answers."""
    put(client)
    body = {"support_set": "parts-set", "images": [url(png(9))]}
    client.post("/v1/classify", json=body)
    shell = Store(service.store.folder)
    shell.remove("local", "parts-set")
    shell.put("local", "parts-set", [("left", png(60)), ("right", png(61))])
    found = client.post("/v1/classify", json=body).json()
    assert set(found["results"][0]["probabilities"]) == {"left", "right"}
    put(client, "same", examples=[{"label": "left", "image": url(png(60))}, {"label": "right", "image": url(png(61))}])
    again = client.post("/v1/classify", json={**body, "support_set": "same"}).json()
    assert again["results"][0]["probabilities"] == pytest.approx(found["results"][0]["probabilities"], abs=1e-6)


def test_only_an_administrator_loads_adapters(keyed: TestClient) -> None:
    assert keyed.put("/v1/adapters/parts2", headers=as_("plant-a")).status_code == 403
    assert keyed.put("/v1/adapters/parts2", headers=as_("ops")).status_code == 404


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no key in it"),
        ("a", "keys.txt:1: a line is a name, a key"),
        ("a b c d", "keys.txt:1"),
        ("a short", "the key has 5 characters, 16 at least"),
        ("a/b 0123456789abcdef0", "a name has letters"),
        ("a 0123456789abcdef0\nb 0123456789abcdef0", "keys.txt:2: the same key as 'a' has"),
    ],
)
def test_a_key_file_that_is_wrong_is_told_by_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "keys.txt").write_text(text)
    with pytest.raises(RunError, match=said) as caught:
        read_keys(tmp_path / "keys.txt")
    assert "0123456789abcdef0" not in str(caught.value)
    with pytest.raises(RunError, match="cannot be read"):
        read_keys(tmp_path / "none.txt")


def test_others_are_served_only_with_keys(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text(f"a {KEYS['ops']}\n")
    for host in ("0.0.0.0", "::", "192.168.0.2", "example.com", ""):
        with pytest.raises(RunError, match="--api-key-file"):
            server.check_address(host, None)
        assert isinstance(server.check_address(host, tmp_path / "keys.txt"), Keys)
    for host in ("127.0.0.1", "::1", "localhost", "127.0.0.2"):
        assert server.check_address(host, None) is None


def test_without_keys_other_host_names_are_refused(client: TestClient) -> None:
    """A page in a browser cannot reach it under a name of its own."""
    for host in ("evil.example:8000", "testserver", "192.168.0.2:8000", "localhost.evil.example", ""):
        assert client.get("/v1/models", headers={"host": host}).status_code == 403, host
    for host in ("localhost:8000", "[::1]:8000", "127.0.0.1", "127.0.0.2:8000"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200, host


def test_a_key_is_found_among_many() -> None:
    import hashlib

    keys = Keys({hashlib.sha256(str(n).encode()).digest(): Caller(f"caller-{n}") for n in range(50)})
    assert keys.find("31") == Caller("caller-31")
    assert keys.find("50") is None


# Adapters


def test_adapters_come_and_go_while_it_runs(client: TestClient, tiny_folder: Callable[[str], Path], run_folder: Path) -> None:
    """Each answers as itself; the ones beside it do not change."""
    adapter_on(tiny_folder("pocket"), run_folder.parent / "second", seed=5)
    body = {"messages": messages(png(1)), "max_tokens": 4, "logprobs": True}

    def said(name: str) -> Any:
        choices = client.post("/v1/chat/completions", json={**body, "model": name}).json().get("choices")
        return choices and [(token["token"], round(token["logprob"], 3)) for token in choices[0]["logprobs"]["content"]]

    before = {name: said(name) for name in ("base", "parts")}
    assert said("second") is None
    assert client.put("/v1/adapters/second").json()["id"] == "second"
    assert error_of(client.put("/v1/adapters/second"))["message"] == "a model 'second' is there already."
    assert said("second") not in before.values()
    assert {name: said(name) for name in before} == before
    assert client.delete("/v1/adapters/second").status_code == 204
    assert said("second") is None
    assert {name: said(name) for name in before} == before
    assert client.delete("/v1/adapters/second").status_code == 404
    assert client.delete("/v1/adapters/base").status_code == 400


def test_an_adapter_that_changes_nothing_or_is_anothers_is_refused(
    client: TestClient, engine: Engine, tiny_folder: Callable[[str], Path], run_folder: Path, tmp_path: Path
) -> None:
    """Peers serve such a one as if it were the base."""
    from tests.test_merge import rewritten

    zero = rewritten(run_folder, run_folder.parent / "zero", lambda state: [value.zero_() for key, value in state.items() if "lora_B" in key])
    found = client.put("/v1/adapters/zero")
    assert found.status_code == 400
    assert "changes nothing" in error_of(found)["message"]
    adapter_on(tiny_folder("llava-1.5"), run_folder.parent / "other")
    found = client.put("/v1/adapters/other")
    assert found.status_code == 400
    assert "another base" in error_of(found)["message"]
    assert list(engine.models) == ["base", "parts"]
    fresh = Engine(load_base(BaseRef(str(tiny_folder("pocket")), device="cpu")), 10**6)
    with pytest.raises(AdapterError, match="changes nothing"):
        fresh.load_adapter("zero", zero)
    assert list(fresh.models) == ["base"]
    fresh.load_adapter("parts", run_folder)
    adapter_on(tiny_folder("pocket"), run_folder.parent / "lcl-1.5", seed=8)
    assert client.put("/v1/adapters/lcl-1.5").json()["id"] == "lcl-1.5", "a name that PEFT itself could not give"
    for name in ("..", "../runs", "none"):
        assert client.put(f"/v1/adapters/{name}").status_code in {400, 404, 405}


# Queue, cancelling, stopping


def test_a_full_queue_is_told_with_a_time(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    put(client)
    body = {"support_set": "parts-set", "images": [url(png(n)) for n in range(5)]}
    assert client.post("/v1/classify", json=body).status_code == 200
    monkeypatch.setattr(engine, "limit", 8)
    engine.submit(Task(lambda: time.sleep(0.5)))
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: client.post("/v1/classify", json=body), range(3)))
    assert sorted(one.status_code for one in answers) == [200, 429, 429]
    for refused in (one for one in answers if one.status_code == 429):
        assert int(refused.headers["Retry-After"]) >= 1
        assert error_of(refused)["code"] == "queue_full"
    assert client.post("/v1/classify", json=body).status_code == 200
    never = client.post("/v1/classify", json={**body, "images": body["images"] * 2})
    assert never.status_code == 400
    assert "send fewer at a time" in error_of(never)["message"]


def test_a_request_that_takes_too_long_is_ended(client: TestClient, service: Service, engine: Engine) -> None:
    put(client)
    service.timeout = 0.2
    engine.submit(Task(lambda: time.sleep(1.5)))
    found = client.post("/v1/classify", json={"support_set": "parts-set", "images": [url(png(1))]})
    assert found.status_code == 504
    assert error_of(found)["code"] == "timeout"
    service.timeout = 60
    assert client.post("/v1/classify", json={"support_set": "parts-set", "images": [url(png(1))]}).status_code == 200


def test_a_client_that_goes_away_stops_using_the_model(live: str, engine: Engine) -> None:
    """In the queue, and in the middle of a stream."""
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


def test_a_job_that_is_cancelled_while_it_speaks_leaves_the_set_as_it_was(engine: Engine) -> None:
    """And those beside it go on."""
    turn = Turn("user", "What is this?", Picture(Path("q"), data=png(1)))
    support = support_turns([(Picture(Path(f"s{n}"), data=png(n)), "good" if n < 2 else "bad") for n in range(4)], WORDINGS["lcl"])

    def job(say: Callable[[Any], bool]) -> Job:
        return Job("parts", lambda: support, turn, ("test", "cancel"), say=say)

    heard: list[list[int]] = [[], [], []]
    alone = job(lambda token: heard[0].append(token.id) is None)
    alone = replace(alone, sampling=replace(alone.sampling, max_tokens=10))
    engine.submit(alone)
    alone.future.result(30)
    engine.call(lambda _: None, 30)
    length = list(engine.cache.values())[-1].ready.cache.get_seq_length()
    stopped, beside = job(lambda token: heard[1].append(token.id) is None), job(lambda token: heard[2].append(token.id) is None)
    beside.sampling = alone.sampling

    def leave(token: Any) -> bool:
        heard[1].append(token.id)
        stopped.cancelled.set()
        return True

    stopped.say = leave
    engine.submit(Task(lambda: time.sleep(0.2)), stopped, beside)
    beside.future.result(30)
    assert heard[2] == heard[0]
    assert len(heard[1]) == 1
    engine.call(lambda _: None, 30)  # until it has tidied up
    assert list(engine.cache.values())[-1].ready.cache.get_seq_length() == length


def test_what_a_kept_set_takes_is_what_is_counted(client: TestClient, engine: Engine) -> None:
    """A question leaves nothing behind, not even the memory of what it was read into."""
    put(client)
    for count in (1, 12):
        client.post("/v1/classify", json={"support_set": "parts-set", "images": [url(png(n)) for n in range(count)]})
        kept = list(engine.cache.values())[-1]
        held = sum(getattr(layer, name).untyped_storage().nbytes() for layer in kept.ready.cache.layers for name in ("keys", "values"))
        assert held == kept.bytes


def test_long_questions_go_in_waves_of_their_own(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a wave grows with the square of its length, whoever's question comes first."""
    put(client)
    body = {"model": "parts", "max_tokens": 1, "support_set": "parts-set"}
    short, long = messages(png(1)), messages(png(1), text="What is this? " * 30)
    expected = [client.post("/v1/chat/completions", json={**body, "messages": one}).json()["choices"] for one in (short, long)]
    monkeypatch.setattr("lcl_adapter.serve.engine.WAVE", 600)
    engine.submit(Task(lambda: time.sleep(0.3)))
    before = engine.counters.waves
    with ThreadPoolExecutor(6) as pool:
        asked = [short, long, short, long, short, long]
        found = list(pool.map(lambda one: client.post("/v1/chat/completions", json={**body, "messages": one}).json()["choices"], asked))
    assert found == expected * 3
    assert engine.counters.waves - before >= 3


def test_a_long_wish_spoils_no_other_answer(client: TestClient, engine: Engine) -> None:
    """One of a batch asks for more tokens than fit; a temperature next to nothing is none."""
    put(client)
    body = {"model": "parts", "messages": messages(png(1)), "max_tokens": 4, "support_set": "parts-set"}
    alone = client.post("/v1/chat/completions", json=body).json()["choices"]
    without_set = client.post("/v1/chat/completions", json={**body, "support_set": None}).json()["usage"]["prompt_tokens"]
    engine.submit(Task(lambda: time.sleep(0.3)))
    wishes = [{}, {"max_tokens": engine.base.encoder().context - without_set}, {"temperature": 1e-38}, {}]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda wish: client.post("/v1/chat/completions", json={**body, **wish}), wishes))
    assert [one.status_code for one in found] == [200, 400, 200, 200]
    assert [one.json()["choices"] for one in (found[0], found[2], found[3])] == [alone] * 3


def test_a_client_that_stops_reading_holds_up_nobody(live: str) -> None:
    """It has a connection and nothing else."""
    port = int(live.rpartition(":")[2])
    body = json.dumps({"model": "parts", "messages": messages(png(1)), "max_tokens": 200, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", port)) as deaf:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        deaf.sendall(head.encode() + body)
        for _ in range(3):
            assert (
                httpx2.post(f"{live}/v1/chat/completions", json={"model": "parts", "messages": messages(png(2)), "max_tokens": 3}).status_code == 200
            )


def test_an_error_in_one_of_a_batch_is_its_own(engine: Engine) -> None:
    """A fault inside the model run: the others are answered, and what was kept is read again."""
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


def test_what_has_several_steps_is_finished_one_after_the_other(engine: Engine) -> None:
    """And what is short goes in between; an error in one is its own, and one that is stopped before it began never runs."""
    told: list[str] = []

    def steps(name: str, wrong: bool = False) -> Callable[[], Any]:
        def run() -> Iterator[None]:
            for n in range(3):
                told.append(f"{name}{n}")
                yield
            if wrong:
                raise RunError(name)
            return name  # a generator's value, as a calibration has it

        return run

    first, second, third, never = Task(steps("a")), Task(steps("b", wrong=True)), Task(steps("c")), Task(steps("d"))
    never.cancelled.set()
    engine.submit(Task(lambda: time.sleep(0.2)), first, second, third, never, Task(lambda: told.append("short")))
    assert first.future.result(30) == "a"
    assert third.future.result(30) == "c"
    assert isinstance(second.future.exception(30), RunError)
    assert never.future.exception(30)
    assert [one for one in told if one != "short"] == [f"{name}{n}" for name in "abc" for n in range(3)]
    assert told.index("short") <= 3
    assert engine.alive


def test_a_stopped_engine_refuses_and_ends(tiny_folder: Callable[[str], Path]) -> None:
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


def test_the_page_of_the_api_names_every_route(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/classify", "/v1/models", "/v1/support-sets/{name}", "/v1/adapters/{name}"} <= paths.keys()
    body = paths["/v1/classify"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ClassifyIn"}
    assert api_types.ClassifyIn.model_json_schema()["additionalProperties"] is False


# The command


@pytest.mark.parametrize("how", ["idle", "in a stream"])
def test_the_command_serves_and_stops_when_it_is_told(run_folder: Path, tmp_path: Path, how: str) -> None:
    """A process of its own: ready, asked, SIGTERM; nothing of keys or photos in what it said; the sets are there afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "keys.txt").write_text(f"a {KEYS['ops']}\n")
    base = json.loads((run_folder / "lcl_adapter.json").read_text())["base"]
    command = [sys.executable, "-m", "lcl_adapter", "serve", base, "--adapter", f"parts={run_folder}", "--port", str(port), "--memory", "1GB"]
    command += ["--api-key-file", str(tmp_path / "keys.txt"), "--store", str(tmp_path / "store")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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
        output, _ = process.communicate(timeout=40)
        assert process.returncode in {0, -signal.SIGTERM}
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
    assert KEYS["ops"] not in output
    assert "base64" not in output
    assert Store(tmp_path / "store").get("a", "parts-set").version == 1


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_a_port_in_use_is_told_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(server, "make_service", lambda options: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        told = CliRunner().invoke(main, [command, "pocket", "--port", port, "--store", str(tmp_path / "store")])
    assert told.exit_code == 2, told.output
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in " ".join(told.output.split())
    assert not (tmp_path / "store").exists()


def test_an_address_that_is_none_is_told() -> None:
    with pytest.raises(RunError, match=r"cannot listen on not\.a\.host\.invalid, port 80: .*; give another"):
        server.take_address("not.a.host.invalid", 80)


def test_too_little_memory_is_told_before_it_listens() -> None:
    with pytest.raises(RunError, match="the weights alone take"):
        server._room(1000, 2000, torch.device("cpu"))
    assert server._room(3000, 2000, torch.device("cpu")) == 1000
    assert server._room(None, 2000, torch.device("cpu")) > 10**6
