"""The page and the API as other web pages, strangers and other visitors meet them: raw requests to a running server.

docs/security.md, "The page", makes the promises; each has its test here.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from PIL import Image
from python_multipart import multipart

from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.page import guard
from lcl_adapter.page.pictures import encode, store_picture
from lcl_adapter.page.scratch import LOCK, PREFIX, scratch_folder, sweep
from lcl_adapter.page.server import with_page
from lcl_adapter.serve.engine import Engine
from lcl_adapter.serve.http.keys import read_keys
from lcl_adapter.serve.http.middleware import is_local
from lcl_adapter.serve.service import Service
from lcl_adapter.serve.store import Store
from tests import live

KEYS = {"plant-a": "key-of-plant-a-0123456789", "plant-b": "key-of-plant-b-0123456789"}
EVIL = "https://evil.example"
FORM = "application/x-www-form-urlencoded"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Visitor:
    """Sends raw requests. headers: sent with each."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=20)
        sent = {name.replace("_", "-"): value for name, value in {**self.headers, **headers}.items()}
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            stream = "event-stream" in (answer.getheader("content-type") or "")
            content = answer.read1(200) if stream else answer.read()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, content)
        finally:
            connection.close()

    def send_json(self, path: str, fields: Any, **headers: str) -> Answer:
        return self.send("POST", path, json.dumps(fields).encode(), **{"content-type": "application/json", **headers})

    def upload(self, name: str, data: bytes, **headers: str) -> Answer:
        body = (
            f'--limit\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: text/html\r\n\r\n'.encode()
            + data
            + b"\r\n--limit--\r\n"
        )
        return self.send(
            "POST", "/gradio_api/upload", body, **{"x-requested-with": "test", "content-type": "multipart/form-data; boundary=limit", **headers}
        )

    def file(self, path: str) -> Answer:
        return self.send("GET", f"/gradio_api/file={quote(path)}")

    def join(self, window: str, function: int, data: list[Any]) -> Answer:
        return self.send_json("/gradio_api/queue/join", {"data": data, "fn_index": function, "session_hash": window})


@dataclass
class Server:
    url: str
    scratch: Path
    store: Store
    functions: dict[str, int]  # Gradio's numbers of the handlers

    def visitor(self, name: str | None = None, **headers: str) -> Visitor:
        """name: of a key, logged in by it; None: without a log-in."""
        made = Visitor(self.url, dict(headers))
        if name is not None:
            answer = made.send_json("/login", {"username": name, "password": KEYS[name]})
            assert answer.status == 200, answer
            made.headers["cookie"] = answer.headers["set-cookie"].partition(";")[0]
        return made

    def files(self) -> list[Path]:
        return [path for path in self.scratch.rglob("*") if path.is_file()]


@contextmanager
def serving_page(base: Path, folder: Path, keys: Path | None = None) -> Iterator[Server]:
    engine = Engine(load_base(BaseRef(str(base), device="cpu")), memory=10**8, queue=64)
    engine.start()
    store, scratch = Store(folder / "store"), folder / "scratch"
    scratch.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"

    async def make() -> Any:
        return with_page(Service(engine, store, timeout=60), read_keys(keys) if keys else None, url, scratch)

    app = asyncio.run(make())  # without a running loop Gradio makes several, and closes none
    page = app.routes[-1].app.app.get_blocks()
    functions = {str(function.name): number for number, function in page.fns.items()}
    with live.running(app, port, timeout_graceful_shutdown=1):
        yield Server(url, scratch, store, functions)


@pytest.fixture(scope="module")
def opened(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Without keys: the visitor is this machine's."""
    with serving_page(tiny_folder("pocket"), tmp_path_factory.mktemp("opened")) as server:
        yield server


@pytest.fixture(scope="module")
def keyed(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "keys.txt").write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()), encoding="utf-8")
    with serving_page(tiny_folder("pocket"), folder, folder / "keys.txt") as server:
        yield server


def picture(colour: str = "red", kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(buffer, kind, **options)
    return buffer.getvalue()


# Other web pages

ROUTES = [
    ("GET", "/"), ("GET", "/config"), ("GET", "/health"), ("GET", "/v1/models"),
    ("GET", "/v1/support-sets"), ("DELETE", "/v1/support-sets/x"), ("PUT", "/v1/support-sets/x"), ("POST", "/v1/classify"),
    ("POST", "/v1/chat/completions"), ("POST", "/v1/systemone"), ("POST", "/gradio_api/upload"), ("POST", "/gradio_api/queue/join"),
    ("GET", "/gradio_api/queue/data?session_hash=x"), ("POST", "/gradio_api/cancel"), ("POST", "/login"), ("POST", "/logout"),
    ("OPTIONS", "/config"), ("OPTIONS", "/v1/support-sets"),
]  # fmt: skip


def assert_refused(answer: Answer) -> None:
    assert answer.status == 403, answer
    assert answer.json()["error"]["code"] == "origin"
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert EVIL.encode() not in answer.body


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("origin", [EVIL, "null", "http://localhost:1", "http://127.0.0.1", "https://[::1]:1", "http://[broken"])
def test_a_foreign_origin_is_refused_on_every_route(keyed: Server, opened: Server, method: str, path: str, origin: str) -> None:
    for visitor in (opened.visitor(), keyed.visitor(), keyed.visitor(authorization=f"Bearer {KEYS['plant-a']}")):
        assert_refused(visitor.send(method, path, origin=origin, access_control_request_method="GET"))


@pytest.mark.parametrize("site", ["cross-site", "same-site", "Cross-Site", "unknown"])
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_what_another_page_loads_is_refused(opened: Server, method: str, path: str, site: str) -> None:
    assert_refused(opened.visitor().send(method, path, sec_fetch_site=site, sec_fetch_mode="no-cors", sec_fetch_dest="image"))


def test_a_link_leads_to_the_page_and_to_nothing_else(opened: Server) -> None:
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    assert opened.visitor().send("GET", "/", **link).status == 200
    assert_refused(opened.visitor().send("GET", "/v1/support-sets", **link))
    assert_refused(opened.visitor().send("POST", "/", **link))
    assert_refused(opened.visitor().send("GET", "/", **{**link, "sec_fetch_dest": "iframe"}))


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "localhost.", "127.0.0.1", "127.8.9.1", "[::1]", "[::ffff:127.0.0.1]"])
def test_every_spelling_of_this_machine_is_the_same(opened: Server, host: str) -> None:
    port = urlsplit(opened.url).port
    assert is_local(host.strip("[]"))
    visitor = opened.visitor(host=f"{host}:{port}")
    own = visitor.send("GET", "/config", origin=f"http://{host.lower()}:{port}")
    assert own.status == 200
    assert not [name for name in own.headers if name.startswith("access-control-")]
    for origin in (EVIL, f"http://{host.lower()}:1", "http://localhost"):
        assert_refused(visitor.send("GET", "/config", origin=origin))
        assert_refused(visitor.upload("a.png", picture(), origin=origin))


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "0.0.0.0", "[::]", "10.0.0.1", "127.0.0.1.evil.example"])
def test_another_host_is_refused_without_keys(opened: Server, host: str) -> None:
    for path in ("/", "/config", "/v1/models"):
        assert opened.visitor(host=host).send("GET", path).status == 403


@pytest.mark.parametrize("content_type", [FORM, "text/plain", "multipart/form-data; boundary=limit", "Text/Plain;charset=utf-8", ""])
def test_a_form_changes_nothing(opened: Server, content_type: str) -> None:
    """A browser that sends neither Origin nor Sec-Fetch-Site."""
    fields = {"data": [], "fn_index": 0, "session_hash": "w"}
    for path in ("/gradio_api/queue/join", "/gradio_api/cancel", "/login", "/v1/classify", "/v1/chat/completions", "/gradio_api/upload"):
        headers = {"content-type": content_type} if content_type else {}
        assert_refused(opened.visitor().send("POST", path, json.dumps(fields).encode(), **headers))


def test_the_page_itself_may_upload_behind_a_proxy_with_tls(opened: Server, keyed: Server) -> None:
    assert opened.visitor().upload("a.png", picture(), origin=opened.url, sec_fetch_site="same-origin").status == 200
    visitor = keyed.visitor("plant-a", host="lcl.example", x_forwarded_proto="https")
    assert visitor.upload("a.png", picture(), origin="https://lcl.example", sec_fetch_site="same-origin").status == 200
    assert visitor.upload("a.png", picture(), origin="https://lcl.example:443").status == 200
    assert_refused(visitor.upload("a.png", picture(), origin="https://lcl.example:8443"))
    forwarded = keyed.visitor("plant-a", x_forwarded_host="lcl.example")
    assert forwarded.upload("a.png", picture(), origin="https://lcl.example").status == 200


def test_the_cookie_is_for_this_site_alone(keyed: Server) -> None:
    fields = {"username": "plant-a", "password": KEYS["plant-a"]}
    for headers, secure in (({}, False), ({"x_forwarded_proto": "https"}, True), ({"origin": "https://lcl.example", "host": "lcl.example"}, True)):
        answer = keyed.visitor().send_json("/login", fields, **headers)
        attributes = {part.strip() for part in answer.headers["set-cookie"].split(";")[1:]}
        assert attributes == {"HttpOnly", "SameSite=Strict", "Path=/"} | ({"Secure"} if secure else set())


def test_a_websocket_is_closed(opened: Server) -> None:
    upgrade = {"connection": "Upgrade", "upgrade": "websocket", "sec_websocket_version": "13", "sec_websocket_key": "AAAAAAAAAAAAAAAAAAAAAA=="}
    assert opened.visitor(**upgrade).send("GET", "/gradio_api/queue/join").status in {400, 403, 404}


def test_every_answer_has_its_policy(keyed: Server) -> None:
    visitor = keyed.visitor("plant-a")
    for path in ("/", "/config", "/health", "/v1/models", "/nothing", "/gradio_api/nothing"):
        for answer in (visitor.send("GET", path), keyed.visitor().send("GET", path)):
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["x-frame-options"] == "DENY"
            assert answer.headers["cross-origin-resource-policy"] == "same-origin"
            policy = answer.headers["content-security-policy"]
            assert "frame-ancestors 'none'" in policy
            assert ("connect-src 'self'" if path == "/" else "default-src 'none'") in policy


# Files

SCRIPTS = {
    "attack.html": b"<!doctype html><script>alert(1)</script>",
    "attack.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "attack.js": b"alert(1)",
    "attack.png": b"<script>alert(1)</script>",
    "polyglot.html": picture() + b"<script>alert(1)</script>",
    "polyglot.jpg": picture("blue", "JPEG", comment=b"<script>alert(1)</script>"),
    "polyglot.gif": picture("blue", "GIF", comment=b"<script>alert(1)</script>"),
    "photo.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n<script>alert(1)</script>\n",
    "../../../escape.html": picture() + b"<script>",
    "set.zip": b"PK\x03\x04<script>alert(1)</script>",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_only_pictures_encoded_anew_are_stored_and_served(keyed: Server, name: str) -> None:
    visitor = keyed.visitor("plant-a")
    answer = visitor.upload(name, SCRIPTS[name])
    assert answer.status == 200
    (path,) = answer.json()
    assert Path(path).resolve().is_relative_to(keyed.scratch.resolve())
    stored = Path(path).read_bytes()
    served = visitor.file(path)
    if name == "set.zip":  # for the import of a set, and never served
        assert served.status == 404
        return
    assert b"script" not in stored
    assert Path(path).suffix in {".png", ".jpg"}
    if not stored:
        assert served.status == 404
        return
    assert served.status == 200
    assert served.headers["content-type"] == ("image/jpeg" if path.endswith(".jpg") else "image/png")
    assert served.headers["content-disposition"] == f'attachment; filename="photo{Path(path).suffix}"'
    assert served.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in served.headers["content-security-policy"]
    assert Image.open(io.BytesIO(served.body)).size == (24, 16)


def test_a_visitor_cannot_read_anothers_files(keyed: Server) -> None:
    first, second = keyed.visitor("plant-a"), keyed.visitor("plant-b")
    (path,) = first.upload("secret.png", picture()).json()
    (own,) = second.upload("own.png", picture()).json()
    assert first.file(path).status == 200
    name = Path(path).relative_to(Path(path).parents[3]).as_posix()
    climbing = str(Path(own).parents[3] / Path(own).relative_to(Path(own).parents[3]).parts[0] / ".." / name)
    for spelling in (path, climbing, "//" + path, path + "/", path.upper(), f"{own}/../../../../{name}"):
        assert second.file(spelling).status == 404, spelling
        assert keyed.visitor().file(spelling).status == 401
    for route in ("file", "static", "assets", "custom_component", "deep_link"):
        assert second.send("GET", f"/gradio_api/{route}/{quote(path)}").status == 404
    ask = keyed.functions["ask"]
    photo = {"image": {"path": path, "meta": {"_type": "gradio.FileData"}}, "caption": None}
    assert second.join("window-of-b", ask, ["x", "base", [photo], "", False]).status == 403


@pytest.mark.parametrize("path", ["/etc/passwd", "pyproject.toml", __file__, "~/.ssh/id_rsa", "\0", "x" * 5000, "", ".", "file:///etc/passwd"])
def test_no_file_of_the_server_is_read(opened: Server, path: str) -> None:
    visitor = opened.visitor()
    assert visitor.file(path).status in {400, 404}
    files = [{"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}]
    assert visitor.join("disk", opened.functions["chat"], [{"text": "", "files": files}, None, "base", ""]).status == 403
    assert visitor.join("disk", opened.functions["import_set"], [files[0]]).status == 403


# Large requests


@pytest.mark.parametrize("held", [(multipart.MultipartParser, "write"), (guard, "store_picture"), (guard, "_json")], ids=["parse", "store", "JSON"])
def test_the_event_loop_parses_no_upload(opened: Server, monkeypatch: pytest.MonkeyPatch, held: tuple[Any, str]) -> None:
    """Proved by order: while the parser waits, others are answered; when they are, it goes on."""
    visitor = opened.visitor()
    with ThreadPoolExecutor(1) as pool:
        with live.held(monkeypatch, *held) as waits:
            sent = pool.submit(visitor.join, "held", 0, []) if held[1] == "_json" else pool.submit(visitor.upload, "photo.png", picture())
            assert waits.wait(10)
            assert visitor.send("GET", "/health").status == visitor.send("GET", "/ready").status == 200
            assert not sent.done()
        assert held[1] == "_json" or sent.result().status == 200


def test_a_request_of_the_page_has_few_values(opened: Server) -> None:
    """Gradio validates them on the event loop."""
    visitor = opened.visitor()
    for values in ([0] * 30_000, [[]] * 15_000, [{"a": {"b": 0}}] * 8_000):
        answer = visitor.join("many", 0, values)
        assert (answer.status, "20,000 values" in answer.json()["error"]["message"]) == (413, True)


@pytest.mark.parametrize("body", [b"", b"--limit", b"--limit\r\n\r\nx", b"\r\n" * 50_000, b"--limit\r\n" + b"a" * 50_000 + b": b\r\n\r\n"])
def test_a_broken_upload_is_refused(opened: Server, body: bytes) -> None:
    for content_type in ("multipart/form-data; boundary=limit", "multipart/form-data", "multipart/form-data; boundary=", "text/plain"):
        headers = {"x-requested-with": "test", "content-type": content_type}
        answer = opened.visitor().send("POST", "/gradio_api/upload", body, **headers)
        assert answer.status == 400 or (answer.status, answer.body) == (200, b"[]")


def test_an_upload_has_few_parts(opened: Server) -> None:
    body = b'--limit\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nx\r\n' * 600 + b"--limit--\r\n"
    headers = {"x-requested-with": "test", "content-type": "multipart/form-data; boundary=limit"}
    answer = opened.visitor().send("POST", "/gradio_api/upload", body, **headers)
    assert (answer.status, "Too many files" in answer.json()["error"]["message"]) == (400, True)


# Addresses


@pytest.fixture
def fetched() -> Iterator[SimpleNamespace]:
    """A web server elsewhere, which notes who connects."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        noted = SimpleNamespace(url=f"http://127.0.0.1:{listening.getsockname()[1]}/photo.png", count=0)

        def accept() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                noted.count += 1
                connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: image/png\r\n\r\n" + picture())
                connection.close()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield noted
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def test_nothing_is_fetched_by_any_route(opened: Server, fetched: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[object] = []
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **options: looked_up.append(host) or real(host, *rest, **options))
    visitor, own = opened.visitor(), opened.visitor().upload("own.png", picture()).json()[0]
    for address in (fetched.url, fetched.url.replace("127.0.0.1", "elsewhere.example"), "http:" + fetched.url[5:].replace("/", "//", 1)):
        for path in ("file=", "file/", "proxy="):
            assert visitor.send("GET", f"/gradio_api/{path}{address}").status == 404
        for fields in ({"path": address}, {"path": own, "url": address}, {"path": None, "url": address}, {"url": address}):
            file = {**fields, "meta": {"_type": "gradio.FileData"}}
            data = [None, None, [{"image": file, "caption": None}], "", False]
            assert visitor.join("net", opened.functions["ask"], data).status in ({403} if fields.get("path") == address else {200, 400})
            chat = [{"text": "hi", "files": [file]}, None, "base", ""]
            assert visitor.join("net", opened.functions["chat"], chat).status in ({403} if fields.get("path") == address else {200, 400})
    visitor.send("GET", "/gradio_api/queue/data?session_hash=net")
    for image in (fetched.url, f"data:{fetched.url}"):
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "?"}]
        answer = visitor.send_json("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": content}]})
        assert answer.status == 400
    time.sleep(0.5)
    assert fetched.count == 0
    assert {str(host) for host in looked_up} <= {"127.0.0.1", "localhost"}


# Before log-in

GRADIO_READS = [
    "/config", "/gradio_api/info", "/gradio_api/openapi.json", "/gradio_api/app_id", "/gradio_api/token", "/gradio_api/user",
    "/gradio_api/login_check",
    "/gradio_api/startup-events", "/gradio_api/heartbeat/abc", "/gradio_api/queue/data?session_hash=abc", "/gradio_api/queue/status", "/theme.css",
    "/gradio_api/upload_progress?upload_id=x", "/gradio_api/file=/etc/passwd", "/gradio_api/runs", "/assets/index.js", "/static/img/logo.svg",
    "/manifest.json", "/monitoring", "/logout", "/gradio_api/vibe-code", "/gradio_api/stream/a/1/1/playlist.m3u8", "/gradio_api/deep_link",
    "/gradio_api/dev/reload", "/robots.txt", "/pwa_icon", "//config", "/config/", "/gradio_api/heartbeat/a/",
]  # fmt: skip
GRADIO_WRITES = [
    "/gradio_api/reset", "/gradio_api/reset/", "/gradio_api/cancel", "/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/run/predict",
    "/gradio_api/call/predict", "/gradio_api/stream/x", "/gradio_api/stream/x/close", "/gradio_api/component_server", "/gradio_api/vibe-edit",
    "/gradio_api/undo-vibe-edit", "/gradio_api/process_recording", "/gradio_api/profiling/clear", "/gradio_api/run-history/connect",
]  # fmt: skip


def test_nothing_answers_before_log_in(keyed: Server) -> None:
    for headers in ({}, {"cookie": "lcl-session=wrong"}, {"cookie": "access-token-x=y; lcl-session="}, {"authorization": "Bearer wrong"}):
        visitor = keyed.visitor(**headers)
        for path in GRADIO_READS:
            assert visitor.send("GET", path).status == 401, path
            assert visitor.send("HEAD", path).status == 401, path
        for path in GRADIO_WRITES:
            assert visitor.send_json(path, {"session_hash": "abc", "event_id": "x", "fn_index": 0, "data": []}).status == 401, path
        page = visitor.send("GET", "/")
        assert b"gradio" not in page.body
        assert b'type="password"' in page.body


@pytest.mark.parametrize(
    ("name", "key"),
    [("plant-a", "plant-b"), ("", "plant-a"), ("plant-a", ""), ("plant-a\0", "plant-a"), ("nobody", "nobody"), ("PLANT-A", "plant-a")],
)
def test_a_name_needs_its_own_key(keyed: Server, name: str, key: str) -> None:
    answer = keyed.visitor().send_json("/login", {"username": name, "password": KEYS.get(key, "")})
    assert answer.status == 401
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"[" * 4000, b"{", b'{"username": {}, "password": []}', b"\xff", b"x" * 5000])
def test_a_broken_log_in_is_refused(keyed: Server, body: bytes) -> None:
    answer = keyed.visitor().send("POST", "/login", body, **{"content-type": "application/json"})
    assert answer.status in {400, 401, 413}


def test_after_a_log_out_the_session_is_over(keyed: Server) -> None:
    visitor = keyed.visitor("plant-a")
    assert visitor.send("GET", "/config").status == 200
    answer = visitor.send("POST", "/logout", x_requested_with="page")
    assert answer.status == 303
    assert "Max-Age=0" in answer.headers["set-cookie"]
    assert visitor.send("GET", "/config").status == 401


def test_only_the_routes_of_the_pages_own_script_exist(opened: Server) -> None:
    used = {"/config", "/gradio_api/info", "/gradio_api/app_id", "/gradio_api/startup-events", "/theme.css", "/static/img/logo.svg", "/manifest.json"}
    streams = {"/gradio_api/heartbeat/abc", "/gradio_api/queue/data?session_hash=abc", "/gradio_api/upload_progress?upload_id=x"}
    for path in GRADIO_READS:
        if path not in used | streams:
            assert opened.visitor().send("GET", path).status == 404, path
    for path in GRADIO_WRITES:
        if path not in {"/gradio_api/reset", "/gradio_api/cancel", "/gradio_api/queue/join", "/gradio_api/upload"}:
            assert opened.visitor().send_json(path, {}).status == 404, path


def test_a_browser_window_belongs_to_one_visitor(keyed: Server) -> None:
    first, second = keyed.visitor("plant-a"), keyed.visitor("plant-b")
    joined = first.join("window-1", keyed.functions["load"], [None])
    assert joined.status == 200, joined
    event = joined.json()["event_id"]
    assert second.send("GET", "/gradio_api/queue/data?session_hash=window-1").status == 403
    assert second.send("GET", "/gradio_api/heartbeat/window-1").status == 403
    assert second.join("window-1", keyed.functions["load"], [None]).status == 403
    assert second.send_json("/gradio_api/cancel", {"session_hash": "window-1", "event_id": "e", "fn_index": 0}).status == 403
    assert second.send_json("/gradio_api/cancel", {"session_hash": "window-2", "event_id": event, "fn_index": 0}).status == 403
    assert first.send("GET", "/gradio_api/queue/data?session_hash=window-1").status == 200


# Pictures


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/b/../c.png", "con.txt", "x" * 400 + ".png", "\u202egnp.exe", "<script>.svg", "写真 1.jpg"])
def test_a_files_name_stays_inside_its_folder(tmp_path: Path, name: str) -> None:
    first, second = (store_picture(tmp_path, name, picture()) for _ in range(2))
    assert first != second
    assert {first.parent, second.parent} == {tmp_path}
    assert "<" not in first.name
    assert "\u202e" not in first.name
    assert store_picture(tmp_path, name, b"no picture").read_bytes() == b""


def test_a_jpeg_stays_about_its_size_and_loses_its_metadata() -> None:
    from lcl_adapter.data.sources import Picture, read_image

    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    exif[0x0112] = 6  # turned by a quarter
    noise = Image.frombytes("RGB", (64, 32), bytes((7 * n * n) % 251 for n in range(64 * 32 * 3))).resize((640, 320))
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG", quality=70, exif=exif)
    data = buffer.getvalue()
    again, suffix = encode(Picture(Path("a.jpg"), data=data))
    assert suffix == ".jpg"
    assert b"secret" not in again
    assert 0.8 < len(again) / len(data) < 1.2
    shown, before = Image.open(io.BytesIO(again)), read_image(Picture(Path("a.jpg"), data=data))
    assert shown.size == before.size == (320, 640)
    difference = sum(abs(a - b) for a, b in zip(shown.tobytes(), before.tobytes(), strict=True)) / len(before.tobytes())
    assert difference < 2


# The folder for photos


def test_the_scratch_folder_is_removed_after_a_signal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SIGTERM while the page is served, and before it is; SIGHUP; and SIGKILL, after which the next start removes it."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    code = (
        "import socket, sys, time, uvicorn; from fastapi import FastAPI; from lcl_adapter.page.scratch import scratch_folder\n"
        "own = socket.socket(); own.bind(('127.0.0.1', 0))\n"  # not listening yet
        "with scratch_folder() as folder:\n"
        "    (folder / 'photo.png').write_bytes(b'x'); print(own.getsockname()[1], flush=True)\n"
        "    server = uvicorn.Server(uvicorn.Config(FastAPI(), log_level='error'))\n"
        "    server.run(sockets=[own]) if sys.argv[1] == 'serve' else time.sleep(60)\n"
    )

    def run(what: str, number: signal.Signals) -> None:
        process = subprocess.Popen([sys.executable, "-c", code, what], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        port = int(process.stdout.readline())
        if what == "serve":
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
        assert len(list(tmp_path.glob(f"{PREFIX}*"))) == 1
        process.send_signal(number)
        process.communicate(timeout=30)

    for what, number in (("serve", signal.SIGTERM), ("load", signal.SIGTERM), ("serve", signal.SIGHUP), ("load", signal.SIGHUP)):
        run(what, number)
        assert not list(tmp_path.glob(f"{PREFIX}*")), (what, number)
    run("load", signal.SIGKILL)
    assert len(list(tmp_path.glob(f"{PREFIX}*"))) == 1
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder() as folder:
        assert list(tmp_path.glob(f"{PREFIX}*")) == [folder]
        assert folder.stat().st_mode & 0o077 == 0
        sweep()  # a second server starts
        assert (folder / LOCK).exists()
    assert not list(tmp_path.glob(f"{PREFIX}*"))
