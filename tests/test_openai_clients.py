"""What OpenAI's clients send: neutral and null values mean "not given"; a reply can be handed back; errors are plain."""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from openai import OpenAI
from PIL import Image
from pydantic import ValidationError

from lcl_adapter.answering.api_types import ChatIn
from lcl_adapter.serve.pictures.images import Bounds, from_data_url
from tests.live import serving


def photo(kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(data, kind)
    return data.getvalue()


def url(data: bytes = photo(), media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


ASK = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url()}}, {"type": "text", "text": "What is it?"}]}]


@pytest.mark.parametrize(
    "sent",
    [
        {"n": None, "tools": None, "logprobs": None, "frequency_penalty": None, "temperature": None, "max_tokens": None, "top_p": None},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": False, "functions": []},
        {"n": 1, "logit_bias": {}, "presence_penalty": 0.0, "repetition_penalty": 1.0, "top_k": -1, "min_p": 0},
        {"modalities": ["text"], "service_tier": "auto", "reasoning_effort": "none", "chat_template_kwargs": {}, "prompt_cache_key": "a"},
        {"stream_options": {"include_usage": True, "include_obfuscation": False}},
    ],
)
def test_neutral_values_are_not_given(sent: dict[str, Any]) -> None:
    plain = ChatIn(model="m", messages=ASK)
    assert ChatIn.model_validate({"model": "m", "messages": ASK, **sent}).model_dump(exclude={"stream_options"}) == plain.model_dump(
        exclude={"stream_options"}
    )


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"tools": [{"type": "function"}]}, r"tools: only \[\] is supported"),
        ({"n": 2}, "n: only 1 is supported"),
        ({"n": True}, "n: only 1 is supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: only 0 is supported"),
        ({"tool_choice": "required"}, 'tool_choice: only "none" or "auto" is supported'),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_others_are_refused_by_name(sent: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ChatIn.model_validate({"model": "m", "messages": ASK, **sent})


@pytest.mark.parametrize(
    "written",
    [
        url(media_type="image/jpg"),
        url(media_type="application/octet-stream"),
        url(media_type="image/png;charset=utf-8"),
        "data:image/png;base64," + base64.encodebytes(photo()).decode(),
        "data:image/png;base64," + base64.urlsafe_b64encode(photo()).decode(),
        url().rstrip("="),
    ],
)
def test_a_photo_in_every_spelling_of_base64(written: str) -> None:
    assert from_data_url(written, Bounds()) == photo()


@pytest.fixture(scope="module")
def api(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    with serving(tiny_folder("pocket"), tmp_path_factory.mktemp("sets")) as address, httpx2.Client(base_url=address, timeout=60) as client:
        yield client


def test_a_reply_can_be_handed_back_whole(api: httpx2.Client) -> None:
    client = OpenAI(base_url=f"{api.base_url}/v1", api_key="none", max_retries=0)
    reply = client.chat.completions.create(model="base", messages=ASK, max_tokens=2).choices[0].message  # type: ignore[call-overload]
    again = {"role": "user", "content": "Are you sure?"}
    for own in (reply, reply.model_dump(), {"role": "assistant", "content": "a nut", "tool_calls": None, "audio": None, "id": "x"}):
        assert client.chat.completions.create(model="base", messages=[*ASK, own, again], max_tokens=2).choices  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "input_image", "image_url": url()}], "part 0 has the type 'input_image'; text and image_url are supported"),
        ([{"type": "text"}], "part 0 has no text"),
        ([{"type": ["text"], "text": "x"}], "part 0 has the type"),
        (7, "a text, or a list of parts, is expected"),
        ([], "a text, or a list of parts, is expected"),
    ],
)
def test_errors_do_not_show_a_validators_insides(api: httpx2.Client, content: Any, message: str) -> None:
    response = api.post("/v1/chat/completions", json={"model": "base", "messages": [{"role": "user", "content": content}]})
    assert response.status_code == 400
    told = response.json()["error"]["message"]
    assert message in told
    assert not {"union", "constrained", "function-"} & set(told.replace("[", " ").split())
    spelled = [{"role": "user", "content": [{"type": "image_url", "image_url": url()}, {"type": "text", "text": "What?", "cache_control": {}}]}]
    assert api.post("/v1/chat/completions", json={"model": "base", "messages": spelled, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("name", ["ネジ", "Größe-1", "винт", "ガスケット"])
def test_a_sets_name_is_of_any_script(api: httpx2.Client, name: str) -> None:
    examples = [{"label": label, "image": url()} for label in ("良品", "不良")]
    typed = unicodedata.normalize("NFD", name)
    assert api.put(f"/v1/support-sets/{typed}", json={"examples": examples}).status_code == 200
    assert api.get(f"/v1/support-sets/{name}").json()["name"] == name
    judged = api.post("/v1/classify", json={"support_set": typed, "images": [url()]})
    assert (judged.status_code, judged.json()["support_set"]) == (200, name)
    assert api.put("/v1/support-sets/a b", json={"examples": examples}).status_code == 400
