"""The API with bodies that are made from its own OpenAPI document: as it describes them, and spoilt.

Every answer has a status that is promised, and an error has OpenAI's form. Nothing is an internal error, and nothing is logged as one.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.serve.api import make_app
from lcl_adapter.serve.engine import Engine
from lcl_adapter.serve.http.middleware import MAX_MESSAGE
from lcl_adapter.serve.service import Service
from lcl_adapter.serve.store import Store
from tests.test_serve import png, put, url

CASES = 150  # of each route
PROMISED = {200, 204, 400, 404, 405, 409, 413, 429}
DEEPEST = 4  # levels of objects that refer to each other
URLS = [url(png(1)), url(png(2)), url(b"RIFF broken"), "data:image/png;base64,", "http://127.0.0.1/a.png", "data:text/html;base64,PGI+", "<a>"]
LABELS = ["good", "bad", "Ｇood", "a" * 300, "\u202egood", "<image>", "</s>", ""]
# What a schema does not say, so that some bodies are answered: what exists here, and little to generate
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "image": st.sampled_from(URLS),
    "images": st.lists(st.sampled_from(URLS), max_size=3),
    "url": st.sampled_from(URLS),
    "data_base64": st.sampled_from(URLS),
    "label": st.sampled_from(LABELS),
    "model": st.sampled_from(["base", "base", "base", None, "none", ""]),
    "support_set": st.sampled_from(["parts-set", "parts-set", "none", "../x"]),
    "role": st.sampled_from(["user", "user", "assistant", "system", "tool"]),
    "max_tokens": st.integers(-1, 3),
    "max_completion_tokens": st.integers(-1, 3),
    "n": st.sampled_from([1, None, 2]),
    "stop": st.sampled_from([None, "x", ["x", "y"], [""], [], ["x"] * 9]),
}
# Good values of what has many parts: about half of the bodies have them
EXAMPLES: dict[str, list[Any]] = {
    "messages": [[{"role": "user", "content": "Hello"}], [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URLS[0]}}]}]],
    "questions": [{"q": {"type": "noul", "instructions": "Is it good?"}}, {"q": {"type": "choice"}}],
    "state": ["a part", {"support_set": "parts-set", "image": URLS[0]}],
    "assets": [{}],
    "examples": [[{"label": label, "image": image} for label, image in zip(("good", "bad"), URLS, strict=False)]],
}
ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([2**70, -1, 1e308, "\0", "\ud800", "x" * 40_000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def client(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    engine = Engine(load_base(BaseRef(str(tiny_folder("pocket")), device="cpu")), memory=10**8, queue=64)
    service = Service(engine.start(), Store(tmp_path_factory.mktemp("fuzz") / "store"), timeout=60)
    with TestClient(make_app(service), base_url="http://localhost", raise_server_exceptions=False) as made:
        assert put(made).status_code == 200
        yield made


@pytest.fixture(scope="module")
def document(client: TestClient) -> dict[str, Any]:
    described: dict[str, Any] = client.get("/openapi.json").json()
    return described


def values_of(schema: Any, document: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that a schema describes."""
    if not isinstance(schema, dict) or not schema:
        return ANY
    if "$ref" in schema:
        named: Any = document
        for step in schema["$ref"].removeprefix("#/").split("/"):
            named = named[step]
        return values_of(named, document, depth + 1)
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return st.one_of([values_of(one, document, depth) for one in schema[choice]])
    kind = schema.get("type")
    if kind == "object":
        return objects_of(schema, document, depth)
    if kind == "array":
        least = schema.get("minItems", 0)
        most = min(schema.get("maxItems", 4), max(least, 4 if depth < DEEPEST else 0))
        return st.lists(values_of(schema.get("items"), document, depth), min_size=least, max_size=most)
    if kind == "string":
        return st.text(min_size=min(schema.get("minLength", 0), 9), max_size=min(schema.get("maxLength", 30), 30))
    if kind == "integer":
        return st.integers(schema.get("minimum", -3), min(schema.get("maximum", 2**60), 2**60))
    if kind == "number":
        return st.floats(schema.get("minimum", -3.0), schema.get("maximum", 3.0))
    return st.booleans() if kind == "boolean" else st.none() if kind == "null" else ANY


def objects_of(schema: dict[str, Any], document: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
    required, optional = {}, {}
    for name, one in schema.get("properties", {}).items():
        values = VALUES[name] if name in VALUES else values_of(one, document, depth)
        if name in EXAMPLES:
            values = st.sampled_from(EXAMPLES[name]) | values
        (required if name in schema.get("required", ()) else optional)[name] = values
    if depth >= DEEPEST:
        optional = {}
    if not required and not optional:
        return st.dictionaries(
            st.sampled_from(["<a>", "q", "good", "bad"]), values_of(schema.get("additionalProperties"), document, depth), max_size=3
        )
    return st.fixed_dictionaries(required) | st.fixed_dictionaries(required, optional=optional)  # few fields are more often accepted


def spoilt(value: Any, rng: random.Random, other: Any) -> Any:
    """The value with one part of it removed, doubled, renamed or exchanged."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(sorted(value))
        match rng.randrange(4):
            case 0:
                return {key: part for key, part in value.items() if key != name}
            case 1:
                return {**value, f"{name}x": other}
            case _:
                return {**value, name: spoilt(value[name], rng, other)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return value * rng.choice([2, 400]) if rng.random() < 0.3 else [*value[:place], spoilt(value[place], rng, other), *value[place + 1 :]]
    return other


def spoilt_bytes(body: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(body) + 1)
    extra = rng.choice([b"", b"\0", b"\xff", b'"', b"{" * 3000, b"[" * 3000, b"9" * 5000, b"1e999", b"NaN", b"\\ud800", b"null", b'{"a":1,"a":'])
    return body[:place] + extra + body[place + rng.choice([0, 0, 1, 50]) :]


def check(response: Any, records: list[logging.LogRecord]) -> None:
    assert response.status_code in PROMISED, response.text
    assert "Traceback" not in response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert 0 < len(error["message"]) <= MAX_MESSAGE + 1
        assert isinstance(error["type"], str)
    assert not [record.getMessage() for record in records if record.levelno >= logging.ERROR]


def routes_with_bodies() -> list[tuple[str, str]]:
    return [
        ("put", "/v1/support-sets/{name}"),
        ("post", "/v1/support-sets/{name}/photos"),
        ("post", "/v1/classify"),
        ("post", "/v1/chat/completions"),
        ("post", "/v1/systemone"),
    ]


def test_every_route_with_a_body_is_fuzzed(document: dict[str, Any]) -> None:
    with_bodies = [(method, path) for path, methods in document["paths"].items() for method, one in methods.items() if "requestBody" in one]
    assert sorted(with_bodies) == sorted(routes_with_bodies())


@pytest.mark.parametrize(("method", "path"), routes_with_bodies())
def test_bodies_as_described_and_spoilt(
    client: TestClient, document: dict[str, Any], method: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    schema = document["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]
    statuses = set()

    @settings(max_examples=CASES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(values_of(schema, document), ANY, st.integers(0, 2**32))
    def send(value: Any, other: Any, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(rng.choice([0, 0, 1, 1, 2])):
            value = spoilt(value, rng, other)
        body = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        if rng.random() < 0.2:
            body = spoilt_bytes(body, rng)
        kind = rng.choice(["application/json"] * 8 + ["text/plain", ""])
        caplog.clear()
        response = client.request(method, path.replace("{name}", "fuzzed"), content=body, headers={"Content-Type": kind, "X-Requested-With": "test"})
        check(response, caplog.records)
        statuses.add(response.status_code)

    send()
    assert 400 in statuses, "bodies that are all accepted test little"
    assert statuses & {200, 409}, "bodies that are all refused test little; a conflict is of a body that was understood"


@pytest.mark.parametrize(
    "path", ["/v1/support-sets/{name}", "/v1/support-sets/{name}/versions", "/v1/models/{name}", "/v1/adapters/{name}", "/{name}"]
)
def test_names_and_queries(client: TestClient, path: str, caplog: pytest.LogCaptureFixture) -> None:
    texts = st.text(max_size=30) | st.sampled_from(["parts-set", "..", "%2e%2e", "a/b", "\0", "n" * 5000, "-1", "1" * 400, "nan", "true"])

    @settings(max_examples=CASES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(texts, texts, texts, st.sampled_from(["GET", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS"]))
    def send(name: str, version: str, images: str, method: str) -> None:
        target = path.replace("{name}", quote(name.encode("utf-8", "surrogatepass"), safe=""))
        query = {"version": version.encode("utf-8", "replace").decode(), "images": images.encode("utf-8", "replace").decode()}
        if (method, name) == ("DELETE", "parts-set"):
            query["expected_version"] = "99"
        caplog.clear()
        response = client.request(method, target, params=query, headers={"X-Requested-With": "test"})
        if method in {"HEAD", "OPTIONS"} and not response.content:
            assert response.status_code in PROMISED
            return
        check(response, caplog.records)

    send()
