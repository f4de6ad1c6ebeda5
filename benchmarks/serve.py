"""Classified images per second over HTTP: a stored 8-shot set against the whole conversation in every request.

    python -m benchmarks.serve [--small] [--store]    # a random LLaVA of about 150 M parameters, 16 photos of 144 tokens
    python -m benchmarks.serve pocket [--store]       # the shipped base, 16 photos of 9 tokens, for information

There are 32 clients. Whole conversations are sent to the same server and to `transformers serve`; the servers run one
after the other. Every client sends one whole conversation, or EACH queries on the stored set, which are much faster.
`transformers serve` is asked at `/v1/chat/completions`, which accepts as many photos as fit. Its route for typed
decisions, `/v1/systemone`, accepts 4 images and has no prefix cache, so it cannot be asked about these sets of 16 photos.

Memory is the resident set of the server after the warm-up and at the end. Bytes uploaded are those of the requests' bodies.
Pictures encoded are those that went through the vision tower of the server's process, counted at the tower in both servers.
"""

from __future__ import annotations

import base64
import io
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import numpy as np
import psutil
from PIL import Image

from benchmarks.common import THREADS, finish, options_of, parser, random_model
from lcl_adapter.data.conversations import WORDINGS, support_turns
from lcl_adapter.data.sources import Picture
from lcl_adapter.pocket import BASE

CLIENTS = 32
EACH = 8
SHOTS = 8
COMPARED = 4  # photos whose texts are compared
LABELS = ("good", "scratched")
NEW_PHOTOS = itertools.count(1000)  # their seeds: no photo is asked about twice
NEW_TOKENS = 8
BIN = Path(sys.executable).parent
WORDING = WORDINGS["short"]  # the random model has the shipped base's tokenizer


def photo(seed: int) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (168, 168, 3), dtype=np.uint8)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# Loaded by Python when the server's process starts: a line for each pass through the tower, with its number of pictures
COUNTER = """
import os
from transformers.models.clip import modeling_clip

forward = modeling_clip.CLIPVisionModel.forward

def counted(self, pixel_values, *arguments, **options):
    with open(os.environ["ENCODED"], "a") as file:
        file.write(f"{len(pixel_values)}\\n")
    return forward(self, pixel_values, *arguments, **options)

modeling_clip.CLIPVisionModel.forward = counted
"""


@dataclass
class Server:
    """A running server: a client, its process, and what it was sent and had to encode."""

    client: httpx2.Client
    process: psutil.Process
    encoded: Path
    uploaded: int = 0

    def __post_init__(self) -> None:
        self.client.event_hooks["request"].append(self._count)

    def _count(self, request: httpx2.Request) -> None:
        self.uploaded += len(request.content)

    @property
    def pictures(self) -> int:
        """Pictures that went through the tower so far."""
        return sum(map(int, self.encoded.read_text().split())) if self.encoded.exists() else 0


SHOWN = [(photo(n), LABELS[n % 2]) for n in range(2 * SHOTS)]


def conversation(query: str) -> list[dict[str, Any]]:
    """The support set and the query as messages of a chat request."""
    messages: list[dict[str, Any]] = []
    for turn in support_turns([(Picture(Path(str(n))), label) for n, (_, label) in enumerate(SHOWN)], WORDING):
        image = [{"type": "image_url", "image_url": {"url": SHOWN[int(str(turn.picture.path))][0]}}] if turn.picture else []
        messages.append({"role": turn.role, "content": [*image, {"type": "text", "text": turn.text}]})
    return [*messages, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": query}}, {"type": "text", "text": WORDING.query}]}]


@contextmanager
def running(command: list[str], ready_path: str, **variables: str) -> Iterator[tuple[httpx2.Client, psutil.Process]]:
    """Start a server on a free port. Yields a client and the process as soon as ``ready_path`` answers 200.

    variables: of its environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", **variables}
    with TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=(Path(folder) / "log").open("w")
        )
        try:
            client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=1200, limits=httpx2.Limits(max_connections=CLIENTS))
            for _ in range(1200):
                try:
                    if client.get(ready_path).status_code == 200:
                        break
                except httpx2.TransportError:
                    pass
                if process.poll() is not None:
                    raise SystemExit((Path(folder) / "log").read_text()[-2000:])
                time.sleep(0.1)
            yield client, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def counted(command: list[str], ready_path: str) -> Iterator[Server]:
    """As :func:`running`, with what the server is sent and what goes through its tower."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(COUNTER)
        encoded = Path(folder) / "encoded"
        with running(command, ready_path, PYTHONPATH=folder, ENCODED=str(encoded)) as (client, process):
            yield Server(client, process, encoded)


def measure(server: Server, ask: Callable[[str], object], each: int, clients: int) -> dict[str, float]:
    """Each of ``clients`` sends ``each`` queries about new photos, one after the other.

    Returns queries per second, seconds per query (median, 99th percentile), and kB uploaded and pictures encoded a query.
    """

    def client(_: int) -> list[float]:
        seconds = []
        for _ in range(each):
            new = photo(next(NEW_PHOTOS))
            began = time.perf_counter()
            ask(new)
            seconds.append(time.perf_counter() - began)
        return seconds

    uploaded, pictures, began = server.uploaded, server.pictures, time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        times = [seconds for of_client in pool.map(client, range(clients)) for seconds in of_client]
    total = time.perf_counter() - began
    percentiles = quantiles(times, n=100)
    return {
        "rate": len(times) / total,
        "p50": percentiles[49],
        "p99": percentiles[98],
        "kilobytes": (server.uploaded - uploaded) / len(times) / 1000,
        "pictures": (server.pictures - pictures) / len(times),
    }


def text_of(reply: httpx2.Response) -> str:
    return str(reply.json()["choices"][0]["message"]["content"])


def ours(base: str, clients: int, each: int) -> tuple[dict[str, float], dict[str, float], float, float]:
    """This project's server.

    Returns the figures with a stored set and with whole conversations, memory at the end / after the warm-up, and the
    share of photos about which both ways give the same text.
    """
    command = [str(BIN / "lcl-adapter"), "serve", base, "--precision", "fp32", "--timeout", "1200", "--store", "store"]
    with counted(command, "/ready") as server:
        client, process = server.client, server.process
        client.put("/v1/support-sets/set", json={"examples": [{"label": label, "image": image} for image, label in SHOWN]}).raise_for_status()

        def stored(query: str) -> None:
            reply = client.post("/v1/classify", json={"support_set": "set", "images": [query]}).raise_for_status().json()
            assert reply["results"][0]["error"] is None

        stored(photo(999))  # calibrates and prefills the set
        measure(server, stored, 1, clients)
        before = process.memory_info().rss
        stored_figures = measure(server, stored, each, clients)
        grown = process.memory_info().rss / before

        def whole(query: str) -> str:
            body = {"model": "base", "messages": conversation(query), "max_tokens": NEW_TOKENS}
            return text_of(client.post("/v1/chat/completions", json=body).raise_for_status())

        def of_the_set(query: str) -> str:
            body = {"model": "base", "messages": conversation(query)[-1:], "max_tokens": NEW_TOKENS, "support_set": "set"}
            return text_of(client.post("/v1/chat/completions", json=body).raise_for_status())

        same = sum(whole(photo(n)) == of_the_set(photo(n)) for n in range(COMPARED)) / COMPARED
        return stored_figures, measure(server, whole, 1, clients), grown, same


def theirs(base: str, clients: int) -> dict[str, float]:
    """`transformers serve`: figures with whole conversations."""
    command = [str(BIN / "transformers"), "serve", base, "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1"]
    with counted(command, "/health") as server:
        client = server.client

        def whole(query: str) -> None:
            body = {"model": base, "messages": conversation(query), "max_tokens": NEW_TOKENS, "temperature": 0.0}
            reply = client.post("/v1/chat/completions", json=body).raise_for_status().json()
            assert reply["choices"][0]["message"]["role"] == "assistant"

        whole(photo(999))
        return measure(server, whole, 1, clients)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    made = parser(__doc__)
    made.add_argument("base", nargs="?", choices=("pocket",), help="the shipped base [default: the random LLaVA]")
    options = options_of(made, "benchmarks.serve", arguments)
    clients, each = (2, 2) if options.small else (CLIENTS, EACH)
    base = str(BASE if options.base else random_model(options.small).absolute())
    stored, whole, grown, same = ours(base, clients, each)
    peer = theirs(base, clients)
    columns = (f"{clients} clients", "images a second", "p50", "p99", "kB uploaded", "pictures encoded")
    rows = []
    for title, figures in (
        ("stored set", stored),
        ("the same server, whole conversation", whole),
        ("transformers serve, whole conversation", peer),
    ):
        times = f"{figures['rate']:.2f}", f"{figures['p50']:.2f} s", f"{figures['p99']:.2f} s"
        rows.append((title, *times, f"{figures['kilobytes']:.0f}", f"{figures['pictures']:.1f}"))
    ratios = {
        "stored set / transformers serve": stored["rate"] / peer["rate"],
        "stored set / the same server without": stored["rate"] / whole["rate"],
        "resident memory at the end / after the warm-up": grown,
        "kB uploaded a question, transformers serve / stored set": peer["kilobytes"] / stored["kilobytes"],
        "pictures encoded a question, stored set": stored["pictures"],
        "pictures encoded a question, transformers serve": peer["pictures"],
        "same texts": same,
    }
    name = f"serve-{options.base}" if options.base else "serve"
    title = f"{name}; `transformers serve` at /v1/chat/completions, for its /v1/systemone accepts 4 images"
    return finish(options, name, columns, rows, ratios, title=title)


if __name__ == "__main__":
    main()
