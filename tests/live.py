"""Servers on real sockets of 127.0.0.1."""

from __future__ import annotations

import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from starlette.types import ASGIApp

from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.serve.api import make_app
from lcl_adapter.serve.engine import Engine
from lcl_adapter.serve.http.connections import BoundedConnection
from lcl_adapter.serve.service import Service
from lcl_adapter.serve.store import Store
from tests.forked import Forked


@contextmanager
def running(app: ASGIApp, port: int = 0, **options: Any) -> Iterator[str]:
    """The address of a server of ``app``, which stops at the end. port: 0 is a free one. options: uvicorn's."""
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", http=BoundedConnection, **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


@contextmanager
def serving(base: Path, store: Path, **adapters: Path) -> Iterator[str]:
    """The address of what ``lcl-adapter serve BASE --adapter NAME=RUN`` starts, with its support sets in ``store``."""
    engine = Engine(load_base(BaseRef(str(base), device="cpu")), memory=10**8, queue=64)
    for name, run in adapters.items():
        engine.load_adapter(name, run)
    engine.start()
    with running(make_app(Service(engine, Store(store), timeout=60))) as url:
        yield url


def with_template(base: Path, out: Path) -> Path:
    """A copy of a tiny base that other servers prompt as its family does. <s> is written into the template, because the tiny
    tokenizer does not add it as a real one does.
    """
    shutil.copytree(base, out)
    (out / "chat_template.jinja").write_text("<s>" + load_base(str(out)).family.chat_template(), encoding="utf-8")
    return out


@contextmanager
def transformers_serving(base: Path) -> Iterator[str]:
    """The address of what `transformers serve BASE` starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"device": "cpu", "dtype": "float32", "host": "127.0.0.1", "port": port}
    process = Forked(f"from transformers.cli.serve import Serve; Serve({str(base)!r}, **{options!r})")
    try:
        for _ in range(600):
            try:
                if httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx2.TransportError:
                assert process.is_running(), process.wait()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Iterator[threading.Event]:
    """While it lasts, calls of ``owner.name`` wait until it ends. Yields an event that says that one waits."""
    waits, ends, function = threading.Event(), threading.Event(), getattr(owner, name)

    def wait(*arguments: Any, **options: Any) -> Any:
        waits.set()
        assert ends.wait(20), "nobody else was answered meanwhile"
        return function(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, wait)
        try:
            yield waits
        finally:
            ends.set()
