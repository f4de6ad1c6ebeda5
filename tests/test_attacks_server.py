"""Attacks on a running server by their price: pictures, bodies and connections that cost more than they should (docs/security.md)."""

from __future__ import annotations

import asyncio
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
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from lcl_adapter.answering import api_types
from lcl_adapter.answering.sent_images import data_url
from lcl_adapter.base import vision
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.data.sources import Picture, images
from lcl_adapter.errors import DataError
from lcl_adapter.serve import api, set_json
from lcl_adapter.serve import service as service_module
from lcl_adapter.serve.api import make_app
from lcl_adapter.serve.engine import Engine
from lcl_adapter.serve.http import bodies, connections, middleware, threads
from lcl_adapter.serve.http.bodies import MAX_TEXT, MAX_VALUES, beside_images, values_of
from lcl_adapter.serve.http.middleware import AccessControl
from lcl_adapter.serve.pictures import images as pictures
from lcl_adapter.serve.pictures import pool as pool_module
from lcl_adapter.serve.pictures.costs import MAX_CHUNKS, MAX_SCANS, MAX_SEGMENTS
from lcl_adapter.serve.pictures.images import Bounds, Spent, check, digest_of, prepared
from lcl_adapter.serve.pictures.pool import DECODERS, Decoded, Decoders
from lcl_adapter.serve.service import Service
from lcl_adapter.serve.store import Store, StoredSet
from tests.live import held, running
from tests.test_serve import error_of, examples, png, put, url

QUICK = 1.0  # seconds for a refusal, on a busy machine


@pytest.fixture(scope="module")
def engine(tiny_folder: Callable[[str], Path]) -> Iterator[Engine]:
    made = Engine(load_base(BaseRef(str(tiny_folder("pocket")), device="cpu")), memory=10**8, queue=64)
    yield made.start()
    made.stop()


@pytest.fixture
def service(engine: Engine, tmp_path: Path) -> Iterator[Service]:
    made = Service(engine, Store(tmp_path / "store"), timeout=60)
    yield made
    made.store.close()


@pytest.fixture
def client(service: Service) -> Iterator[httpx2.Client]:
    """A client of a server on a real socket, which has one support set, ``parts-set``."""
    with running(make_app(service), lifespan="off") as address, httpx2.Client(base_url=address, timeout=60) as made:
        assert put(made).status_code == 200
        yield made


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def progressive(scans: int, side: int = 4000) -> bytes:
    """A JPEG of a few kB, whose last scan is repeated."""
    whole = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True, quality=10)
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[last:-2] * scans + b"\xff\xd9"


def with_segments(count: int) -> bytes:
    whole = encoded(Image.new("RGB", (8, 8)), "JPEG")
    return whole[:2] + b"\xff\xe1\x00\x03x" * count + whole[2:]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_comments(size: int) -> bytes:
    """A GIF with a comment in blocks of 255 bytes before its frame."""
    whole = encoded(Image.new("P", (8, 8)), "GIF")
    frame = whole.index(b"\x2c", 13 + 3 * 2 ** ((whole[10] & 7) + 1))
    return whole[:frame] + b"\x21\xfe" + (b"\xff" + b"x" * 255) * (size // 256) + b"\0" + whole[frame:]


COSTLY = {
    "scans": (lambda: progressive(400), f"more than {MAX_SCANS} scans"),
    "segments": (
        lambda: b"\xff\xd8" + b"\xff\xe1\x00\x03x" * 200_000 + encoded(Image.new("RGB", (8, 8)), "JPEG")[2:],
        f"more than {MAX_SEGMENTS:,} seg",
    ),
    "comment": (lambda: with_comments(9 * 2**20), "256 kB of comments"),
    "chunks": (lambda: png(1)[:33] + chunk(b"abCd", b"") * 300_000 + png(1)[33:], f"more than {MAX_CHUNKS:,} chunks"),
    "deep": (lambda: encoded(Image.new("I;16", (8000, 5000)), "PNG"), "MiB to read; at most 152"),
}


@pytest.mark.parametrize("kind", COSTLY)
def test_a_picture_that_costs_too_much_is_refused_with_its_reason(client: httpx2.Client, kind: str) -> None:
    """A GIF with such a comment took 21 s, a JPEG of 8 kB with such scans 5 s."""
    make, reason = COSTLY[kind]
    picture = url(make(), "application/octet-stream")
    began = time.monotonic()
    response = client.post("/v1/classify", json={"support_set": "parts-set", "images": [picture, url(png(5))]})
    assert time.monotonic() - began < 2 * QUICK + 1, "a part of it is the transfer of 10 MiB"
    bad, good = response.json()["results"]
    assert reason in bad["error"]["message"]
    assert good["error"] is None
    assert reason in error_of(put(client, "other", examples=[{"label": "bad", "image": picture}, *examples()]))["message"]


def test_a_decoder_that_takes_too_long_is_ended_and_replaced(client: httpx2.Client, service: Service) -> None:
    """Whatever makes it slow: here the limit is shorter than an honest picture needs. Others are answered meanwhile."""
    service.bounds = replace(service.bounds, seconds=0.05)
    slow = url(encoded(Image.effect_noise((4000, 4000), 50), "JPEG", quality=75))
    before = replace(DECODERS.counters)
    with ThreadPoolExecutor(8) as pool:
        hostile = [pool.submit(client.post, "/v1/classify", json={"support_set": "parts-set", "images": [slow] * 2}) for _ in range(4)]
        honest = client.post("/v1/classify", json={"support_set": "parts-set", "images": [url(png(5))]}).json()
    assert honest["results"][0]["error"] is None
    for request in hostile:
        for result in request.result().json()["results"]:
            assert "takes more than 0.05 s to decode" in result["error"]["message"]
    counts = {name: value - getattr(before, name) for name, value in asdict(DECODERS.counters).items()}
    assert (counts["decoders_killed"], counts["decoders_started"] >= 8) == (8, True)
    assert f"lcl_decoders_killed_total {float(DECODERS.counters.decoders_killed)}" in client.get("/metrics").text


def test_a_caller_leaves_a_decoder_to_others() -> None:
    """However many pictures one caller sends, and however long each lasts."""
    pool, ends, decoded = Decoders(3), threading.Event(), list[str]()

    def slow(data: bytes, limits: Any, side: int | None, low: bool) -> Decoded:
        decoded.append(data.decode())
        if data != b"honest":
            assert ends.wait(20)
        return Decoded(None, 0.0)

    pool._decode = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(12) as threads:
        hostile = [threads.submit(pool.decode, b"hostile", {}, "stranger") for _ in range(10)]
        until = time.monotonic() + 10
        while len(decoded) < 2:
            assert time.monotonic() < until
            time.sleep(0.01)
        for _ in range(3):
            assert pool.decode(b"honest", {}, "guest").error is None
        assert decoded == ["hostile"] * 2 + ["honest"] * 3, "two at a time, and the third is free"
        ends.set()
        assert all(request.result().error is None for request in hostile)
    assert pool._used.total() == 0


def test_a_caller_with_one_decoder_may_use_it() -> None:
    pool = Decoders(1)
    pool._decode = lambda data, limits, side, low: Decoded(None, 0.0)  # type: ignore[method-assign]
    assert pool.decode(b"", {}, "guest").error is None


def test_a_caller_of_costly_pictures_has_low_priority_until_time_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture's cost is known only afterwards. Nobody else is slowed down, and a few costly ones are nothing."""
    pool, now, priorities = Decoders(2), [1000.0], list[bool]()
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: now[0])

    def decode(data: bytes, limits: Any, side: int | None, low: bool) -> Decoded:
        priorities.append(low)
        return Decoded(None, float(data))

    def low(caller: str, seconds: str) -> bool:
        assert pool.decode(seconds.encode(), {}, caller).error is None
        return priorities[-1]

    pool._decode = decode  # type: ignore[method-assign]
    assert [low("guest", "0.15") for _ in range(6)] == [False] * 6, "six photos of a phone"
    assert [low("stranger", "4.0") for _ in range(3)] == [False, True, True]
    assert not low("guest", "0.01")
    now[0] += (3 * 4.0 - pool_module.BURST) / pool_module.RATE + 1
    assert not low("stranger", "4.0")
    assert low("stranger", "4.0")


@pytest.mark.skipif(not hasattr(os, "getpriority"), reason="this system has no priorities of processes")
def test_processes_of_low_priority_go_behind_those_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Decoders(2)
    try:
        for low in (False, True, False, True):
            assert pool._decode(png(1), asdict(Bounds()), None, low).error is None
        own = os.getpriority(os.PRIO_PROCESS, 0)
        nice = {worker.low: os.getpriority(os.PRIO_PROCESS, worker.process.pid) - own for worker in pool._idle}
        assert nice == {False: 0, True: min(pool_module.NICE, 19 - own)}
        assert pool.counters.decoders_started == 2, "each is used again"
        monkeypatch.setattr(pool_module, "LONG", 0.02)
        slow = encoded(Image.effect_noise((5000, 5000), 90), "JPEG", quality=60, progressive=True)
        assert pool._decode(slow, asdict(Bounds()), None, False).error is None
        assert [worker.low for worker in pool._idle] == [True, True], "it took longer than most pictures do"
        assert {os.getpriority(os.PRIO_PROCESS, worker.process.pid) - own for worker in pool._idle} == {min(pool_module.NICE, 19 - own)}
        for _ in range(3):
            assert pool._decode(slow, asdict(Bounds()), None, False).error is None
        assert [worker.low for worker in pool._idle] == [True, True], "what costly pictures leave behind does not grow"
    finally:
        pool.close()


def test_threads_of_one_caller_are_not_those_of_another(client: httpx2.Client, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that last hold the threads of their own caller. Here as many last as there are connections to test it with."""
    ends, began = threading.Event(), list[str]()

    def wait(namespace: str) -> str:
        began.append(namespace)
        assert ends.wait(20)
        return namespace

    async def both() -> str:
        async with anyio.create_task_group() as group:
            for _ in range(3 * threads.MAX_CALLER_THREADS):
                group.start_soon(threads.run_for, "stranger", wait, "stranger")
            while len(began) < threads.MAX_CALLER_THREADS:
                await anyio.sleep(0.01)
            answer = await threads.run_for("guest", lambda: "guest")
            assert began == ["stranger"] * threads.MAX_CALLER_THREADS
            ends.set()
        return answer

    assert anyio.run(both) == "guest"
    used = list[str]()
    run_for = threads.run_for

    async def noted(caller: str, function: Any, *arguments: Any) -> Any:
        used.append(caller)
        return await run_for(caller, function, *arguments)

    monkeypatch.setattr(api, "run_for", noted)
    assert client.post("/v1/classify", json={"support_set": "parts-set", "images": [url(png(5))]}).status_code == 200
    assert put(client, "threads").status_code == 200
    assert client.get("/v1/support-sets/threads?images=true").status_code == client.get("/v1/support-sets").status_code == 200
    assert set(used) == {"local"}
    assert len(used) >= 4


COSTLY_COPIES = {
    "JPEG": lambda: encoded(Image.effect_noise((5000, 4001), 90).convert("RGB"), "JPEG", quality=40),
    "sideways JPEG": lambda: encoded(Image.effect_noise((4000, 2001), 90), "JPEG", quality=40, exif=_turned()),
    "transparent PNG": lambda: encoded(Image.effect_noise((1500, 1501), 90).convert("LA"), "PNG"),
    "scans": lambda: progressive(35, 3000),
}


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    return exif


@pytest.mark.parametrize("kind", COSTLY_COPIES)
def test_the_model_is_shown_a_copy_of_a_costly_picture(client: httpx2.Client, service: Service, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread decodes what it is shown, while everybody waits. The pixels are the same as without the copy."""
    monkeypatch.setattr(DECODERS, "_decode", partial(_decode_as_costly, DECODERS._decode))
    data, shown = COSTLY_COPIES[kind](), list[Picture]()
    read = vision.read_image
    monkeypatch.setattr(vision, "read_image", lambda picture, side: (shown.append(picture), read(picture, side))[1])
    results = client.post("/v1/classify", json={"support_set": "parts-set", "images": [url(data, "application/octet-stream")]}).json()["results"]
    assert results[0]["error"] is None
    [picture] = [picture for picture in shown if picture.path.name == digest_of(data)]
    assert picture.data is not None
    side = vision.read_side(service.engine.base)
    assert max(Image.open(io.BytesIO(picture.data)).size) < 2 * images.REDUCING_GAP * side
    assert np.array_equal(read(picture, side), read(Picture(Path("original"), data=data), side))


def _decode_as_costly(decode: Any, data: bytes, limits: Any, side: int | None, low: bool) -> Decoded:
    """A picture of which even a fast machine makes a copy. The machine's own time is what COSTLY_SECONDS bounds."""
    decoded: Decoded = decode(data, limits, side, low)
    return decoded._replace(prepared=decoded.prepared or prepared(data, side or 0)) if len(data) > 100_000 else decoded


def test_a_stored_set_is_shown_with_the_copies_of_its_costly_photos(client: httpx2.Client, service: Service) -> None:
    """Whatever other sets are checked meanwhile: the copies belong to the request."""
    photos = [
        (label, encoded(Image.effect_noise((3000, 3000 + n), 90), "JPEG", quality=60, progressive=True)) for n, label in enumerate(("good", "bad"))
    ]
    stored = service.store.put("local", "costly", photos)
    shown = service.shown(stored)
    service._decodable.clear()
    for picture, (_, data) in zip((picture for picture, _ in shown.read()), photos, strict=True):
        assert picture.path.name == digest_of(data)
        assert picture.data != data
        assert len(picture.data or b"") < len(data) / 10
    body = {"support_set": "costly", "images": [url(png(5))]}
    assert client.post("/v1/classify", json=body).json()["results"][0]["error"] is None
    assert client.get("/v1/support-sets/costly?images=true").json()["examples"][0]["image"] == data_url(photos[0][1])


def test_a_picture_is_checked_once_for_each_caller(client: httpx2.Client, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who grows a set by sending it again waits for the new photo alone."""
    checked: list[str] = []
    check_image = service_module.check
    monkeypatch.setattr(
        service_module, "check", lambda data, bounds, spent, side: (checked.append(spent.caller), check_image(data, bounds, spent, side))[1]
    )
    assert put(client, "known", examples=examples()).status_code == 200
    assert put(client, "known", examples=examples(shots=3)).status_code == 200
    assert checked == ["local"] * 2, "those of parts-set were checked when it was stored"
    request = api_types.SupportSetIn.model_validate({"examples": examples()})
    service.put("another", "known", request)
    assert checked[2:] == ["another"] * 4
    broken = {"support_set": "known", "images": [url(b"no picture")]}
    reasons = [client.post("/v1/classify", json=broken).json()["results"][0]["error"]["message"] for _ in range(2)]
    assert reasons[0] == reasons[1]


def test_copies_that_are_remembered_have_a_limit(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "check", lambda data, bounds, spent, side: data)
    monkeypatch.setattr(service_module, "MAX_PREPARED", 25)
    for number in range(9):
        service._check(bytes(10), f"digest {number % 8}", Spent())
    assert list(service._decodable) == [("", "digest 7"), ("", "digest 0")]
    assert service._prepared_bytes == 20


def test_costly_pictures_of_a_request_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PREPARED", 10)
    with pytest.raises(DataError, match="before this one are costly"):
        check(png(1), Bounds(), Spent(prepared=11), 28)


def test_a_deep_picture_that_costs_much_is_refused() -> None:
    """It has no copy, because it is scaled with its set."""
    deep = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 65535, (2200, 2200), dtype=np.uint16)), "JPEG2000")
    with pytest.raises(DataError, match=r"more than 8 bits takes more than 1 s"):
        check(deep, Bounds(), side=28)


def large_photos(count: int) -> list[str]:
    """Of different bytes, because a picture that is known is not decoded again."""
    photo = encoded(Image.effect_noise((2000, 2000), 50), "JPEG", quality=75)
    return [url(photo + bytes(number)) for number in range(count)]


def test_all_pictures_of_a_request_together_have_a_limit(client: httpx2.Client, service: Service) -> None:
    service.bounds = replace(service.bounds, request_seconds=0.02)
    results = client.post("/v1/classify", json={"support_set": "parts-set", "images": large_photos(3)}).json()["results"]
    assert results[0]["error"] is None
    assert "images before this one took more than 0.02 s" in results[-1]["error"]["message"]


@pytest.mark.parametrize("form", ["photo", "photos", "conversation"])
def test_all_pictures_of_typed_decisions_together_have_a_limit(client: httpx2.Client, service: Service, form: str) -> None:
    """Those of the assets and of the state: one budget for both."""
    service.bounds = replace(service.bounds, request_seconds=0.02)
    good, bad, asked_about, asset = large_photos(4)
    state = {
        "photo": {"support_set": "parts-set", "image": asked_about},
        "photos": {"examples": [{"label": "good", "image": good}, {"label": "bad", "image": bad}], "image": asked_about},
        "conversation": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": asked_about}}]}]},
    }[form]
    asked = {"state": state, "questions": {"q": {"type": "noul", "instructions": "Is it <a>?"}}, "assets": {"<a>": {"data_base64": asset}}}
    error = error_of(client.post("/v1/systemone", json=asked))
    assert "assets" not in error["message"]
    assert "images before this one took more than 0.02 s" in error["message"]


def test_memory_of_a_decoder_is_limited() -> None:
    picture = encoded(Image.new("RGB", (6000, 6000)), "PNG", compress_level=1)
    with pytest.raises(DataError, match="needs more than 32 MiB"):
        check(picture, Bounds(memory=32 * 2**20))
    check(picture, Bounds())


def test_a_stored_set_with_a_costly_photo_does_not_reach_the_engine(client: httpx2.Client, service: Service) -> None:
    """It may have been stored by an earlier version, which took any picture."""
    service.store.put("local", "old", [("good", png(1)), ("bad", progressive(400))])
    for path, body in (
        ("/v1/classify", {"support_set": "old", "images": [url(png(5))]}),
        ("/v1/chat/completions", {"model": "base", "support_set": "old", "messages": [{"role": "user", "content": "Which is it?"}]}),
        ("/v1/systemone", {"state": {"support_set": "old", "image": url(png(5))}, "questions": {"q": {"type": "choice"}}}),
    ):
        began = time.monotonic()
        error = error_of(client.post(path, json=body))
        assert "support set 'old', examples[1]: the image has more than" in error["message"]
        assert time.monotonic() - began < QUICK


def test_a_crash_in_a_decoder_is_the_pictures_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Decoders(1)
    try:
        assert pool.decode(png(1), asdict(Bounds()))[0] is None
        [worker] = pool._idle
        os.kill(worker.process.pid, signal.SIGSEGV)
        worker.process.wait()
        assert "it ended the process" in (pool.decode(png(1), asdict(Bounds()))[0] or "")
        assert pool.decode(png(1), asdict(Bounds()))[0] is None
        assert (pool.counters.decoders_killed, pool.counters.decoders_started) == (1, 3), "one of low priority: a crash is dear"
        worker = pool._idle[-1]
    finally:
        pool.close()
    assert worker.process.returncode == 0


def test_decoders_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """However it ends: their input ends with it."""
    code = (
        "from lcl_adapter.serve.pictures.images import Bounds, check; from lcl_adapter.serve.pictures.pool import DECODERS; import os, sys, time\n"
        f"check({png(1)!r}, Bounds()); print(*[w.process.pid for w in DECODERS._idle], flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-W", "error", "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        decoders = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert decoders
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/exe").exists() and _runs(pid) for pid in decoders):
        assert time.monotonic() < until
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_deep_picture_is_scaled_in_strips_to_the_same_values() -> None:
    """As floats, a whole picture of 16 bits would need ten times its memory."""
    values = np.random.default_rng(0).integers(0, 4096, (300, 50)).astype(np.uint16)
    data = encoded(Image.fromarray(values), "PNG")
    whole = (values.astype(np.float32) * (255.0 / 4095)).clip(0, 255).round().astype(np.uint8)
    assert np.array_equal(np.asarray(images.read(Picture(Path("deep"), data=data, white=4095.0)))[..., 0], whole)


def test_strips_without_a_measured_value_are_scaled_as_the_whole_picture() -> None:
    """The darkest and the brightest value are of all strips, and no strip has a NaN or an infinity as its own."""
    values = np.linspace(-2, 3, 300 * 50).reshape(300, 50).astype(np.float32)
    values[:70], values[100, 0], values[100, 1] = np.nan, np.inf, -np.inf
    low = values[70, 0]
    read = np.asarray(images.read(Picture(Path("deep"), data=encoded(Image.fromarray(values), "TIFF"))))[..., 0]
    known = np.nan_to_num(values, nan=low, posinf=3.0, neginf=low)
    assert np.abs(read - (known - low) * 255.0 / (3.0 - low)).max() <= 0.51
    assert (read[:70] == 0).all()
    assert (read[100, 0], read[100, 1]) == (255, 0)


def test_a_picture_that_does_not_fit_in_memory_is_no_broken_file() -> None:
    """The process of the server's decoders says which it was; everywhere else it is an error of one line."""
    with pytest.raises(MemoryError), images.open_image(png(1)):
        raise MemoryError


# Bodies


CHAT = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}


def chat_of(size: int, **fields: Any) -> bytes:
    """A body of about ``size`` bytes: each field is a function of a number of items."""
    return json.dumps({**CHAT, **{name: make(size // 12) for name, make in fields.items()}}).encode()


BODIES: dict[str, Callable[[int], bytes]] = {
    "stop": lambda size: chat_of(size, stop=lambda count: [0] * (3 * count)),
    "stop in pairs": lambda size: chat_of(size, stop=lambda count: [[0]] * count),
    "unknown fields": lambda size: json.dumps({**CHAT, **{f"k{n:07}": 0 for n in range(size // 15)}}).encode(),
    "metadata": lambda size: chat_of(size, metadata=lambda count: {f"k{n}": {"a": {}} for n in range(count // 2)}),
    "deep metadata": lambda size: json.dumps(CHAT)[:-1].encode() + b', "metadata": ' + b'{"a":' * (size // 6) + b"0" + b"}" * (size // 6) + b"}",
    "messages": lambda size: chat_of(size, messages=lambda count: [{"a": 0}] * count),
    "parts": lambda size: chat_of(size, messages=lambda count: [{"role": "user", "content": [{"type": "text"}] * (count // 2)}]),
    "tools": lambda size: chat_of(size, tools=lambda count: [{}] * count),
    "a model's name": lambda size: json.dumps({**CHAT, "model": "m" * size}).encode(),
    "a field's name": lambda size: json.dumps({**CHAT, "m" * size: 0}).encode(),
    "a number": lambda size: json.dumps(CHAT)[:-1].encode() + b', "seed": ' + b"1" * size + b"}",
    "no JSON": lambda size: b"[" * size,
}


def post(client: httpx2.Client, body: bytes) -> Any:
    return client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_without_pictures_is_small_and_refused_quickly(client: httpx2.Client, kind: str) -> None:
    """4 MiB of stop texts took 28 s, in which nobody was answered."""
    for size in (MAX_TEXT - 2000, 4 * 2**20):
        body = BODIES[kind](size)
        began = time.monotonic()
        response = post(client, body)
        assert time.monotonic() - began < QUICK
        assert response.status_code == (400 if len(body) <= MAX_TEXT and values_of(body) <= MAX_VALUES else 413)
        assert len(error_of(response)["message"]) < 1100
        assert len(response.text) < 2500


def test_text_beside_a_picture_is_as_small(client: httpx2.Client) -> None:
    """A picture makes a body large; it does not make room for anything else."""
    large = {"type": "image_url", "image_url": {"url": url(png(3, (1000, 500)))}}
    body = {**CHAT, "messages": [{"role": "user", "content": [large, {"type": "text", "text": "What?"}]}]}
    assert len(json.dumps(body)) > 4 * MAX_TEXT
    assert post(client, json.dumps(body).encode()).status_code == 200
    response = post(client, json.dumps({**body, "stop": [0] * MAX_TEXT}).encode())
    assert (response.status_code, error_of(response)["message"]) == (413, "the request has more than 256 kB beside its images.")
    response = post(client, json.dumps({**body, "stop": [0] * MAX_VALUES}).encode())
    assert (response.status_code, error_of(response)["message"]) == (413, "the request has more than 4,096 values.")


def test_an_asset_in_base64_alone_is_a_picture_too(client: httpx2.Client) -> None:
    """It needs no data URL, and is as large as one."""
    large = base64.b64encode(png(3, (1000, 500))).decode()
    asked = {"state": "a part <a>", "questions": {"q": {"type": "noul", "instructions": "Is it good?"}}, "assets": {"<a>": {"data_base64": large}}}
    for separators in ((",", ":"), (", ", " : ")):
        body = json.dumps(asked, separators=separators).encode()
        assert len(body) > 4 * MAX_TEXT
        response = client.post("/v1/systemone", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 200, response.text
    assert error_of(client.post("/v1/systemone", json={**asked, "seed": [0] * MAX_TEXT}))["message"].startswith("the request has more than 256 kB")


def test_what_is_beside_images() -> None:
    assert beside_images(b'{"data_base64" : "data:xyz", "b": "x"}') == b'{"data_base64" : "", "b": "x"}'
    assert beside_images(b'{"data_base64": [1, 2], "b": "x"}') == b'{"data_base64": [1, 2], "b": "x"}'
    assert beside_images(b'{"a": "data:xyz", "b": ["data:", 1]}') == b'{"a": "data:", "b": ["data:", 1]}'
    assert beside_images(b'{"a": "data:x' + b"y" * 100) == b'{"a": "data:'
    assert beside_images(rb'["\"data:xyz", 1, 2]') == rb'["\"data:", 1, 2]'
    assert beside_images(rb'["data:xyz\\", "data:\"", 1]') == rb'["data:\\", "data:\"", 1]'
    assert len(beside_images(b'"data:x"' * 3000)) > 2000 * len(b'"data:x"')


JSON_KEYS = st.text(alphabet='",[{\\a', max_size=3) | st.sampled_from(["data:", "data_base64"])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='data:",[]{}\\x') | st.just("data:xyz"),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(JSON_KEYS, inner, max_size=5),
)


@given(JSON_VALUES)
def test_no_value_is_hidden_from_the_count(value: Any) -> None:
    """Neither behind a quote in a string, nor in what looks like an image."""

    def count(one: Any) -> int:
        inner = list(one.values()) if isinstance(one, dict) else one if isinstance(one, list) else []
        return isinstance(one, dict | list) + max(0, len(inner) - 1) + sum(count(item) for item in inner)

    assert values_of(beside_images(json.dumps(value).encode())) == count(value)


@pytest.mark.parametrize("unit", [b'"', b'\\"', b"\\", b'"data:', b'"data:\\"', b'"\\\\'])
def test_values_are_counted_in_time_that_grows_with_the_length(unit: bytes) -> None:
    """Text that a careless pattern would read again from each quote: hours for 256 kB."""
    began = time.monotonic()
    values_of(beside_images(unit * (MAX_TEXT // len(unit))))
    assert time.monotonic() - began < QUICK


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/chat/completions", "/v1/systemone", "/v1/support-sets/held"])
def test_a_large_body_is_read_beside_the_event_loop(client: httpx2.Client, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proved by order: while a body is read, others are answered; when they are, it goes on."""
    body, method = json.dumps({"support_set": "parts-set", "images": ["x" * 2 * bodies.SMALL]}), "PUT" if "sets" in path else "POST"
    with ThreadPoolExecutor(1) as pool:
        with held(monkeypatch, bodies, "beside_images") as waits:
            sent = pool.submit(client.request, method, path, content=body, headers={"Content-Type": "application/json"})
            assert waits.wait(10)
            for other in ("/health", "/ready", "/v1/models"):
                assert httpx2.get(f"{client.base_url}{other}", timeout=5).status_code == 200
            assert not sent.done()
        assert sent.result().status_code in {200, 400}


def test_a_large_body_does_not_stop_the_event_loop(client: httpx2.Client) -> None:
    """Eight bodies of 36 MiB are read and validated while /health is asked."""
    body = json.dumps({"support_set": "parts-set", "images": [url(b"\x89PNG" + bytes(9 * 2**20))] * 3}).encode()
    with ThreadPoolExecutor(4) as pool:
        large = [pool.submit(client.post, "/v1/classify", content=body, headers={"Content-Type": "application/json"}) for _ in range(8)]
        slowest = 0.0
        while not all(request.done() for request in large):
            began = time.monotonic()
            assert client.get("/health").status_code == 200
            slowest = max(slowest, time.monotonic() - began)
    assert {request.result().status_code for request in large} <= {200, 429}
    assert slowest < QUICK


# Connections


def connect(client: httpx2.Client, sent: bytes) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", client.base_url.port), timeout=20)
    made.sendall(sent)
    return made


HALF_SENT = {
    "nothing": b"",
    "headers": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-",
    "body": b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{",
    "idle": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "body of an answered request": b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{",
}


@pytest.mark.parametrize("kind", HALF_SENT)
def test_half_sent_requests_turn_nobody_away(client: httpx2.Client, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a thousand of them, everybody got status 503, /health too."""
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 50)
    before = connections.COUNTERS.connections_displaced
    opened: list[socket.socket] = []
    try:
        for _ in range(150):
            opened.append(connect(client, HALF_SENT[kind]))
        for path in ("/health", "/ready", "/v1/models"):
            assert httpx2.get(f"{client.base_url}{path}", timeout=5).status_code == 200
        assert connections.COUNTERS.connections_displaced - before >= 100
    finally:
        for one in opened:
            one.close()


@pytest.mark.parametrize("kind", ["nothing", "headers", "body", "body of an answered request"])
def test_a_request_must_arrive_in_time(client: httpx2.Client, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then gains no time."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.4)
    monkeypatch.setattr(connections, "BODY_SECONDS", 0.4)
    before = connections.COUNTERS.connections_late
    with connect(client, HALF_SENT[kind]) as opened:
        began = time.monotonic()
        opened.settimeout(0.05)
        received = b""
        while True:
            assert time.monotonic() - began < 5
            try:
                if kind != "nothing":
                    opened.send(b"x")
                part = opened.recv(1000)
            except TimeoutError:
                continue
            except OSError:
                break
            if not part:
                break
            received += part
    assert connections.COUNTERS.connections_late == before + 1
    assert kind in {"body of an answered request"} or received.startswith(b"HTTP/1.1 408")


def test_a_body_that_goes_on_has_time(client: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow line is no attack: the time that a body has grows with what has arrived."""
    monkeypatch.setattr(connections, "BODY_SECONDS", 0.3)
    body = json.dumps({"support_set": "parts-set", "images": [url(png(3, (150, 100)))]}).encode()
    head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connect(client, head + f"Content-Length: {len(body)}\r\n\r\n".encode()) as opened:
        step = len(body) // 8
        for begin in range(0, len(body), step):
            opened.sendall(body[begin : begin + step])
            time.sleep(0.1)
        assert opened.recv(100).startswith(b"HTTP/1.1 200")


# Answers that are not read


LARGE_ANSWER = 64 * 2**20  # bytes: more than the system holds for a client


async def answer_at_once(_: Request) -> Response:
    return Response(bytes(LARGE_ANSWER))


async def answer_in_pieces(_: Request) -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(LARGE_ANSWER >> 20):
            yield bytes(2**20)

    return StreamingResponse(pieces())


async def answer_shortly(_: Request) -> Response:
    return Response(bytes(1000))


ANSWERS = Starlette(routes=[Route("/once", answer_at_once), Route("/pieces", answer_in_pieces), Route("/short", answer_shortly)])
UNREAD = {
    "at once": b"GET /once HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "in pieces": b"GET /pieces HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a connection that ends": b"GET /once HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "several at once": b"GET /once HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3,
    "many short ones": b"GET /short HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20_000,
}


def connect_narrowly(address: str) -> socket.socket:
    """A connection whose system holds little of an answer for its client."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.settimeout(10)
    made.connect(("127.0.0.1", httpx2.URL(address).port))
    return made


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("kind", UNREAD)
def test_an_answer_must_be_read_in_time(loop: str, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without a deadline, a client that never reads holds its connection, and its answer in memory, for ever."""
    monkeypatch.setattr(connections, "READ_SECONDS", 0.3)
    before = connections.COUNTERS.connections_unread
    with running(ANSWERS, loop=loop) as address, connect_narrowly(address) as opened:
        with suppress(OSError):  # the server ends the connection while requests are still sent
            opened.sendall(UNREAD[kind])
        until = time.monotonic() + 10
        while connections.COUNTERS.connections_unread == before:
            assert time.monotonic() < until, "the connection is still open"
            time.sleep(0.02)
        received = 0
        with suppress(ConnectionError):
            while part := opened.recv(2**20):
                received += len(part)
    assert received < LARGE_ANSWER / 2
    assert not caplog.records, "nothing is written to a connection that was ended"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("kind", ["at once", "in pieces"])
def test_an_answer_that_is_read_slowly_arrives(loop: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow line is no attack: the time to read grows with what has been read."""
    monkeypatch.setattr(connections, "READ_SECONDS", 1.0)
    received = 0
    with running(ANSWERS, loop=loop) as address, connect_narrowly(address) as opened:
        opened.sendall(UNREAD[kind])
        began = time.monotonic()
        while received < LARGE_ANSWER:
            part = opened.recv(2**20)
            assert part, "the connection was ended"
            received += len(part)
            if time.monotonic() - began < 2:
                time.sleep(0.01)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_requests_sent_at_once_end_with_their_connection(loop: str) -> None:
    """The first of them too: its answer went on to its end, as fast as it could be made, for a client that was gone."""
    made, ended = 0, threading.Event()

    async def answer(_: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            nonlocal made
            try:
                for _ in range(LARGE_ANSWER >> 16):
                    made += 1
                    yield bytes(2**16)
                    await asyncio.sleep(0)
            finally:
                ended.set()

        return StreamingResponse(pieces())

    with running(Starlette(routes=[Route("/", answer)]), loop=loop) as address, connect_narrowly(address) as opened:
        opened.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3)
        assert opened.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        opened.close()
        assert ended.wait(10)
    assert made < (LARGE_ANSWER >> 16) / 2


def stored_photos(service: Service) -> StoredSet:
    """A set of 2 MB, more than the system holds for a client who does not read."""
    return service.store.put("local", "large", [(label, png(seed, (700, 500))) for seed, label in enumerate(("good", "bad") * 2)])


def test_a_set_is_written_in_pieces_as_it_is_read(client: httpx2.Client, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that nobody reads costs one piece. A set may have 90 MB, and be asked for on hundreds of connections."""
    stored, made = stored_photos(service), []
    b64encode = base64.b64encode
    monkeypatch.setattr(set_json.base64, "b64encode", lambda data: (made.append(len(data)), b64encode(data))[1])
    monkeypatch.setattr(set_json, "PIECE", 3 * 2**12)
    path = "/v1/support-sets/large?images=true"
    whole = sum(len(service.store.bytes_of("local", example.image)) for example in stored.examples)
    with connect_narrowly(str(client.base_url)) as opened:
        opened.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert opened.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
        read = -1
        while read != sum(made) or not made:  # until nothing more is made
            read = sum(made)
            time.sleep(0.2)
        assert 0 < read < whole / 2
    made.clear()
    answered = client.get(path).json()
    assert sum(made) >= whole
    assert set(made) <= {3 * 2**12, *(len(service.store.bytes_of("local", e.image)) % (3 * 2**12) for e in stored.examples)}
    assert [example["image"] for example in answered["examples"]] == [data_url(service.store.bytes_of("local", e.image)) for e in stored.examples]
    without = client.get("/v1/support-sets/large").json()
    assert {**answered, "examples": [{**example, "image": None} for example in answered["examples"]]} == without


def test_a_set_whose_image_is_missing_is_an_error_before_its_answer_begins(client: httpx2.Client, service: Service) -> None:
    stored = stored_photos(service)
    service.store._image_path("local", stored.examples[-1].image).unlink()
    assert client.get("/v1/support-sets/large").status_code == 200
    response = client.get("/v1/support-sets/large?images=true")
    assert (response.status_code, error_of(response)["code"]) == (507, "storage")


def test_unread_answers_of_a_caller_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are in memory as a whole, until their clients have read them."""
    monkeypatch.setattr(middleware, "MAX_CALLER_BODIES", 2)
    app = AccessControl(ANSWERS, LARGE_ANSWER, None)
    with running(app) as address, httpx2.Client(base_url=address, timeout=60) as client:
        opened = [connect_narrowly(address) for _ in range(2)]
        try:
            for one in opened:
                one.sendall(UNREAD["at once"])
                assert one.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
            response = client.get("/once")
            error = error_of(response)
            assert (response.status_code, error["code"], response.headers["retry-after"]) == (429, "queue_full", "5")
            assert "not read yet" in error["message"]
            assert client.get("/short").status_code == 200
        finally:
            for one in opened:
                one.close()
        until = time.monotonic() + 10
        while client.get("/once").status_code == 429:
            assert time.monotonic() < until


@pytest.mark.parametrize("end", ["whole", "cut off", "too large"])
def test_a_route_begins_when_its_body_has_arrived(end: str) -> None:
    """A half-sent body holds no route; of a client that went away none begins; a body's fault reaches the route that reads it."""
    steps: list[str] = []
    sent: list[Any] = []
    parts = {
        "whole": [{"type": "http.request", "body": b"1", "more_body": True}, {"type": "http.request", "body": b"2"}],
        "cut off": [{"type": "http.request", "body": b"1", "more_body": True}, {"type": "http.disconnect"}],
        "too large": [{"type": "http.request", "body": b"123", "more_body": True}],
    }[end]

    async def receive() -> Any:
        steps.append("received")
        return parts.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    async def read(request: Request) -> Response:
        steps.append("begun")
        return Response(await request.body())

    headers = [(b"host", b"localhost"), (b"transfer-encoding", b"chunked")]
    scope = {"type": "http", "method": "POST", "path": "/v1/read", "headers": headers, "query_string": b"", "root_path": ""}
    app = AccessControl(Starlette(routes=[Route("/v1/read", read, methods=["POST"])]), 2, None)
    anyio.run(app, scope, receive, send)
    match end:
        case "whole":
            assert steps == ["received", "received", "begun"]
            assert (sent[0]["status"], b"".join(message.get("body", b"") for message in sent)) == (200, b"12")
        case "cut off":
            assert (steps, sent) == (["received", "received"], [])
        case _:
            assert (steps, sent[0]["status"]) == (["received", "begun"], 413)
    assert (app._requests, app._bytes) == ({}, {})


def test_one_caller_does_not_use_all_requests(client: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process's health is not one of them."""
    monkeypatch.setattr(middleware, "MAX_CALLER_REQUESTS", 3)
    opened = [connect(client, HALF_SENT["body"]) for _ in range(3)]
    try:
        until = time.monotonic() + 5
        while (response := client.get("/v1/models")).status_code == 200 and time.monotonic() < until:
            time.sleep(0.02)
        assert (response.status_code, error_of(response)["code"], response.headers["retry-after"]) == (429, "queue_full", "5")
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
    finally:
        for one in opened:
            one.close()
    while client.get("/v1/models").status_code == 429:
        assert time.monotonic() < until + 5
