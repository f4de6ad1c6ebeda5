"""Load the model, open the store and serve requests: what ``lcl-adapter serve`` does."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI

from lcl_adapter.base.adapter import read_manifest
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.devices import free_memory, loaded_objects_set_aside
from lcl_adapter.errors import RunError
from lcl_adapter.serve.api import make_app
from lcl_adapter.serve.engine import Engine
from lcl_adapter.serve.http.connections import BoundedConnection
from lcl_adapter.serve.http.keys import Keys, read_keys
from lcl_adapter.serve.http.middleware import is_local
from lcl_adapter.serve.pictures.pool import DECODERS
from lcl_adapter.serve.service import Service
from lcl_adapter.serve.store import Store
from lcl_adapter.terminal import LOGGING, console

SHUTDOWN_SECONDS = 20  # for open requests, after the server gets a signal to stop
IDLE_SECONDS = 30  # that an idle connection stays open
SWITCH_SECONDS = 0.001  # that a thread of Python may run while others wait; by default 0.005, of which a request waits for several


@dataclass(frozen=True)
class Options:
    """The command line's options.

    adapters: runs by the names that clients use. memory: bytes for weights and cached sets together.
    """

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
    """Serve the API until a signal stops the process. Raises UserError before the port is opened, never after."""
    serve_app(options, make_app)


def serve_app(options: Options, make: Callable[[Service, Keys | None], FastAPI], content: str | None = None) -> None:
    """Load everything, open the port, and serve until a signal stops the process.

    make: returns the app, given a running service and its keys.
    content: what is served, for the line that reports the start. Without it, the models' names.
    """
    keys = check_address(options.host, options.key_file)
    with bind_address(options.host, options.port) as bound:
        began = time.monotonic()
        DECODERS.start()
        service = make_service(options)
        config = uvicorn.Config(
            make(service, keys),
            log_config=LOGGING,
            log_level="warning",
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            timeout_keep_alive=IDLE_SECONDS,
            http=BoundedConnection,
            server_header=False,
        )
        with _address_errors(options.host, options.port):
            bound.listen(config.backlog)  # before the line is printed: whoever reads it can connect at once
        console.print(
            f"ready after {time.monotonic() - began:.1f} s: http://{options.host}:{bound.getsockname()[1]} serves "
            f"{content or ', '.join(service.engine.models)}; cached support sets may use {service.engine.cache.budget / 1e9:.2f} GB",
            highlight=False,
            markup=False,
        )
        server = uvicorn.Server(config)
        sys.setswitchinterval(SWITCH_SECONDS)
        with loaded_objects_set_aside(), contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[bound])
        if not server.started:
            raise RunError("the server could not start; the reason is in the messages above.")


def bind_address(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet.

    A port in use is reported before the model is loaded. Raises RunError.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    with contextlib.ExitStack() as undo:
        undo.callback(bound.close)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _address_errors(host, port):
            bound.bind((host, port))
        undo.pop_all()
    return bound


@contextlib.contextmanager
def _address_errors(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot listen on {host}, port {port}: {error.strerror}; give another --port or --host.") from error


def check_address(host: str, key_file: Path | None) -> Keys | None:
    """The keys of the file. Raises RunError if other machines could reach the server without a key."""
    if key_file is not None:
        return read_keys(key_file)
    if not is_local(host):
        raise RunError(f"--host {host} lets other machines reach this server; give --api-key-file with a key for each caller.")
    return None


def make_service(options: Options) -> Service:
    """Load the model and open the store. The engine runs when this returns."""
    tiles = options.base.tiles or any(read_manifest(folder)["tiles"] for folder in options.adapters.values())
    store = Store(options.store)
    store.sweep()
    base = load_base(replace(options.base, tiles=tiles))
    weights = sum(p.numel() * p.element_size() for p in base.llava.parameters())
    budget = _cache_budget(options.memory, weights, base.device)
    engine = Engine(base, budget, options.queue, asked=options.base)
    for name, folder in options.adapters.items():
        engine.load_adapter(name, folder)
    loadable = None if options.adapter_folder is None else options.adapter_folder.absolute()
    return Service(engine.start(), store, adapter_folder=loadable, timeout=options.timeout)


def _cache_budget(memory: int | None, weights: int, device: torch.device) -> int:
    """Bytes for cached sets: ``memory`` less the weights; without ``memory``, half of what is free.

    Raises RunError if the weights alone need more than ``memory``.
    """
    if memory is None:
        return free_memory(device.type) // 2
    if memory <= weights:
        raise RunError(f"--memory {memory / 1e6:,.0f}MB: the weights alone need {weights / 1e6:,.0f} MB. Give more.")
    return memory - weights
