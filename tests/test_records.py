"""Conversations as other trainers write them: read with their pictures, or refused by their key."""

from __future__ import annotations

import base64
import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl_adapter.data.sources import read_image, read_llava_json
from lcl_adapter.errors import DataError, LclError
from tests.conftest import paint

ASK, ANSWER = "What is it?", "a nut"
SHAREGPT = [{"from": "human", "value": f"<image>\n{ASK}"}, {"from": "gpt", "value": ANSWER}]
UNMARKED = [{"from": "human", "value": ASK}, {"from": "gpt", "value": ANSWER}]
MESSAGES = [{"role": "user", "content": f"<image>{ASK}"}, {"role": "assistant", "content": ANSWER}]


def parts(*pictures: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [*pictures, {"type": "text", "text": ASK}]},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
    ]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    paint(tmp_path / "images" / "0.png", (90, 90, 90), seed=0)
    return tmp_path / "images"


def read(images: Path, record: dict[str, Any]) -> Any:
    file = images.parent / "records.json"
    file.write_text(json.dumps([record]), encoding="utf-8")
    return read_llava_json(file, images)


FORMS: dict[str, dict[str, Any]] = {
    "LLaVA": {"image": "0.png", "conversations": SHAREGPT},
    "LLaMA-Factory, sharegpt": {"images": ["0.png"], "conversations": SHAREGPT},
    "LLaMA-Factory, messages": {"images": ["0.png"], "messages": MESSAGES},
    "ms-swift without a mark": {"images": ["0.png"], "messages": [{**MESSAGES[0], "content": ASK}, MESSAGES[1]]},
    "ms-swift, paths in objects": {"images": [{"path": "0.png"}], "messages": MESSAGES},
    "ms-swift, query": {"query": f"<image>{ASK}", "response": ANSWER, "images": ["0.png"]},
    "image_path": {"image_path": "0.png", "conversations": UNMARKED},
    "OpenAI": {"messages": parts({"type": "image_url", "image_url": {"url": "0.png"}})},
    "transformers": {"messages": parts({"type": "image"}), "images": ["0.png"]},
    "the same twice": {"image": "0.png", "images": ["0.png"], "image_path": "/elsewhere/0.png", "conversations": SHAREGPT},
    "more keys": {
        "id": "0.png",
        "image": "0.png",
        "conversations": SHAREGPT,
        "coco_url": "http://host/0.png",
        "image_id": 7,
        "source": "coco",
        "video": None,
        "tools": [],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_record_keeps_its_picture(images: Path, form: str) -> None:
    (exchange,) = read(images, FORMS[form]).dialogues[0].exchanges
    assert (exchange.question, exchange.answer) == (ASK, ANSWER)
    assert exchange.picture.path == images / "0.png"


def test_a_picture_inside_a_record_is_read(images: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode((images / "0.png").read_bytes()).decode()
    (exchange,) = read(images, {"messages": parts({"type": "image_url", "image_url": {"url": url}})}).dialogues[0].exchanges
    assert read_image(exchange.picture).size == read_image(read(images, FORMS["LLaVA"]).dialogues[0].pictures[0]).size


def test_absolute_names_inside_system_turns_and_numbers_are_read(images: Path) -> None:
    system = {"from": "system", "value": "Be brief."}
    record = {"image": str(images / "0.png"), "conversations": [system, SHAREGPT[0], {"from": "gpt", "value": 3}]}
    (exchange,) = read(images, record).dialogues[0].exchanges
    assert exchange.question.split() == ["Be", "brief.", *ASK.split()]
    assert exchange.answer == "3"
    assert exchange.picture.path == images / "0.png"
    (exchange,) = read(images, {"image": float("nan"), "conversations": UNMARKED}).dialogues[0].exchanges
    assert exchange.picture is None


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"photo": "0.png", "conversations": UNMARKED}, "the key 'photo' names '0.png' and is not read"),
        ({"picture_file": ["0.JPG"], "messages": UNMARKED}, "the key 'picture_file' names '0.JPG'"),
        ({"video": "0.mp4", "conversations": UNMARKED}, "the key 'video' names '0.mp4'"),
        ({"conversations": [{"from": "human", "value": "<video>What?"}, SHAREGPT[1]]}, "<video> in a turn"),
        ({"image": "0.png", "images": ["1.png"], "conversations": SHAREGPT}, "different images under image and images"),
        ({"image": "0.png", "conversations": UNMARKED}, "1 images, 0 <image>"),
        ({"conversations": SHAREGPT}, "more <image> than its 0 images"),
        ({"images": ["https://host/0.png"], "messages": MESSAGES}, "is an address, and nothing is fetched"),
        ({"images": [3], "messages": MESSAGES}, "its name is expected"),
        ({"messages": [MESSAGES[0], {"role": "tool", "content": "x"}]}, "a turn of 'tool'"),
        ({"messages": parts({"type": "input_audio"})}, "a part of type 'input_audio'"),
        ({"messages": [MESSAGES[1], MESSAGES[0]], "images": ["0.png"]}, "turns must alternate"),
        ({"text": "What?"}, "no key 'conversations'; it has text"),
    ],
)
def test_what_is_not_read_is_refused_by_name(images: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match="record 1") as refused:
        read(images, record)
    assert message in str(refused.value)


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=6)


@given(st.sampled_from(sorted(FORMS)), st.integers(0, 2**32), JSON)
def test_a_record_with_anything_in_it_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, form: str, seed: int, anything: Any) -> None:
    """One value of a good record is replaced by anything."""
    record = json.loads(json.dumps(FORMS[form]))
    rng = random.Random(seed)
    place: Any = record
    while isinstance(place, dict | list) and place:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if rng.random() < 0.4 or not isinstance(place[key], dict | list):
            place[key] = anything
            break
        place = place[key]
    images = tmp_path_factory.getbasetemp() / "images"
    images.mkdir(exist_ok=True)
    with contextlib.suppress(LclError):
        read(images, record)
