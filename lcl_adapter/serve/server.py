"""Load the model, open the store, listen: what ``lcl-adapter serve`` does."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
import uvicorn
from fastapi import FastAPI

from lcl_adapter.base.adapter import read_manifest
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.errors import RunError
from lcl_adapter.serve.api import make_app
from lcl_adapter.serve.engine import Engine
from lcl_adapter.serve.keys import Keys, read_keys
from lcl_adapter.serve.middleware import is_local
from lcl_adapter.serve.service import Service
from lcl_adapter.serve.store import Store
from lcl_adapter.terminal import console

CONNECTIONS = 1000  # at a time; more are answered 503 by uvicorn itself
PATIENCE = 20  # seconds that open requests have when the server is told to stop


@dataclass(frozen=True)
class Options:
    """As the command line has them. memory: bytes for weights and kept sets together."""

    base: BaseRef
    adapters: dict[str, Path]
    adapter_folder: Path | None
    host: str
    port: int
    key_file: Path | None
    memory: int | None
    queue: int
    timeout: float
    store: Path


def run(options: Options) -> None:
    """Until it is told to stop. Raises UserError before it listens, never after."""
    listen(options, make_app, ", ".join)


def listen(options: Options, make: Callable[[Service, Keys | None], FastAPI], what: str | Callable[[Iterable[str]], str]) -> None:
    """``make``: of a running service and its keys, what answers. ``what``: is served, as it is announced."""
    keys = check_address(options.host, options.key_file)
    with take_address(options.host, options.port) as taken:
        began = time.monotonic()
        service = make_service(options)
        config = uvicorn.Config(
            make(service, keys),
            log_level="warning",
            timeout_graceful_shutdown=PATIENCE,
            timeout_keep_alive=30,
            limit_concurrency=CONNECTIONS,
            server_header=False,
        )
        told = what if isinstance(what, str) else what(service.engine.models)
        with _listening(options.host, options.port):
            taken.listen(config.backlog)  # who reads the next line may ask at once
        console.print(
            f"ready after {time.monotonic() - began:.1f} s: http://{options.host}:{taken.getsockname()[1]} serves {told}; "
            f"kept support sets may take {service.engine.cache.budget / 1e9:.2f} GB",
            highlight=False,
            markup=False,
        )
        server = uvicorn.Server(config)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[taken])
        if not server.started:
            raise RunError("the server could not start; what went wrong stands above.")


def take_address(host: str, port: int) -> socket.socket:
    """Bound, and not yet listening: a port in use is told before the model is loaded. Raises RunError."""
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    with contextlib.ExitStack() as undo:
        undo.callback(taken.close)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _listening(host, port):
            taken.bind((host, port))
        undo.pop_all()
    return taken


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot listen on {host}, port {port}: {error.strerror}; give another --port or --host.") from error


def check_address(host: str, key_file: Path | None) -> Keys | None:
    """Raises RunError where others could reach the server without a key."""
    if key_file is not None:
        return read_keys(key_file)
    if not is_local(host):
        raise RunError(f"--host {host} lets others reach this server; give --api-key-file with a key for each of them.")
    return None


def make_service(options: Options) -> Service:
    """Everything but the socket; the engine runs."""
    tiles = options.base.tiles or any(read_manifest(folder)["tiles"] for folder in options.adapters.values())
    store = Store(options.store)
    store.sweep()
    base = load_base(replace(options.base, tiles=tiles))
    weights = sum(p.numel() * p.element_size() for p in base.llava.parameters())
    engine = Engine(base, _room(options.memory, weights, base.device), options.queue)
    for name, folder in options.adapters.items():
        engine.load_adapter(name, folder)
    loadable = None if options.adapter_folder is None else options.adapter_folder.absolute()
    return Service(engine.start(), store, adapters=loadable, timeout=options.timeout)


def _room(memory: int | None, weights: int, device: torch.device) -> int:
    """What kept sets may take. Raises RunError where the weights alone are more than was given."""
    if memory is None:
        free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
        return free // 2
    if memory <= weights:
        raise RunError(f"--memory {memory / 1e6:,.0f}MB: the weights alone take {weights / 1e6:,.0f} MB.")
    return memory - weights
