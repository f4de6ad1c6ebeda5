"""Clients that send what costs a server more than it costs them: for `python -m benchmarks.soak --strangers`, in a process of its own.

    python -m benchmarks.strangers ADDRESS KEY SECONDS     # prints a JSON object: answers by kind, and what was not as promised

It has one key of its own, and also sends requests without one. It stores a large set under its key, so that an answer is
large too. When everything is prepared it prints "ready", and begins when a line arrives on its standard input.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import socket
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx2
import numpy as np
from PIL import Image

PAUSE = 0.2  # seconds between two requests of a thread; its bodies are prepared, so that this process needs little of the machine
HELD = {"half a header": 80, "half a body": 80, "idle": 40, "a byte a second": 40, "unread": 8, "unread and repeated": 8}  # open connections
RENEWED = 1.0  # seconds between two looks at the open connections
SET = "of-a-stranger"
REFUSED = {400, 401, 403, 404, 405, 408, 413, 415, 422, 429}  # 408 has no body


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def progressive(scans: int, side: int) -> bytes:
    """A JPEG of a few kB that is decoded ``scans`` times over the whole picture."""
    whole = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True, quality=10)
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[last:-2] * (scans - whole.count(b"\xff\xda")) + b"\xff\xd9"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    """A PNG of a few kB whose header promises ``side`` times ``side`` pixels."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(2**20)))


def noise(side: int) -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)), "PNG", compress_level=0)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 3)


def pictures(small: bool) -> dict[str, str]:
    """Data URLs by kind. All but ``costly`` are refused; that one is just allowed, and as slow as a picture can be.

    Its base64 has no padding, so that bytes can follow.
    """
    good = encoded(Image.new("RGB", (32, 32)), "PNG")
    files = {
        "costly": padded(progressive(45, 500 if small else 6000)),
        "scans": progressive(400, 4000),
        "bomb": bomb(60_000),
        "long side": bomb(9_000),
        "deep": encoded(Image.new("I;16", (8000, 5000)), "PNG"),
        "chunks": good[:33] + chunk(b"abCd", b"") * 100_000 + good[33:],
        "segments": b"\xff\xd8" + b"\xff\xe1\x00\x03x" * 100_000,
        "cut off": noise(64)[:2000],
        "no picture": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" + b"{} loop\n" * 100,
        "empty": b"",
    }
    urls = {name: "data:image/png;base64," + base64.b64encode(data).decode() for name, data in files.items()}
    return {**urls, "type": "data:image/svg+xml;base64,PHN2Zy8+", "address": "http://127.0.0.1:9/a.png", "base64": "data:image/png;base64,????"}


def bodies() -> dict[str, bytes]:
    """Bodies of a chat request by kind; every one is refused. Those called allowed have as many values as a body may have, and are parsed."""
    chat = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    open_end = json.dumps(chat)[:-1].encode()
    return {
        "list": json.dumps({**chat, "stop": [0] * 80_000}).encode(),
        "larger list": json.dumps({**chat, "stop": [0] * 2**20}).encode(),
        "messages": json.dumps({**chat, "messages": [{"a": 0}] * 20_000}).encode(),
        "fields": json.dumps({**chat, **{f"k{n}": 0 for n in range(20_000)}}).encode(),
        "allowed messages": json.dumps({**chat, "messages": [{"a": 0}] * 2000}).encode(),
        "allowed fields": json.dumps({**chat, **{f"k{n}": 0 for n in range(4000)}}).encode(),
        "nested": open_end + b', "metadata": ' + b'{"a":' * 40_000 + b"0" + b"}" * 40_000 + b"}",
        "brackets": b"[" * 2**18,
        "model": json.dumps({**chat, "model": "m" * 250_000}).encode(),
        "larger model": json.dumps({**chat, "model": "m" * 2**22}).encode(),
        "number": open_end + b', "seed": ' + b"1" * 250_000 + b"}",
        "broken": open_end,
        "no text": b"\xff\xfe" * 1000,
        "nothing": b"",
    }


class Strangers:
    """What is sent, and what came back. seconds: how long; wrong: answers that are not promised."""

    def __init__(self, address: str, key: str, seconds: float, small: bool) -> None:
        self.url, self.seconds, self.small = httpx2.URL(address), seconds, small
        self.headers = {"Authorization": f"Bearer {key}"}
        self.pictures, self.bodies = pictures(small), bodies()
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.lock = threading.Lock()

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=120)

    def store(self) -> None:
        """A set whose answer with its images is large."""
        photo = "data:image/png;base64," + base64.b64encode(noise(300 if self.small else 1600)).decode()
        images = [{"label": label, "image": photo} for label in ("one", "two")]
        with self.client() as http:
            http.put(f"/v1/support-sets/{SET}", json={"examples": images}, headers=self.headers).raise_for_status()

    def count(self, kind: str, status: int | str, fault: str = "") -> None:
        with self.lock:
            self.answers[f"{kind} {status}"] += 1
            if fault:
                self.wrong.append(f"{kind}: {status}, {fault}")

    def run(self) -> dict[str, Any]:
        until = time.monotonic() + self.seconds
        jobs: list[Callable[[float, int], None]] = [self.send_pictures] * 4 + [self.send_bodies] * 3 + [self.hold_connections]
        threads = [threading.Thread(target=job, args=(until, number)) for number, job in enumerate(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"answers": dict(sorted(self.answers.items())), "wrong": self.wrong[:20], "wrong answers": len(self.wrong)}

    def send_pictures(self, until: float, number: int) -> None:
        rng, names = random.Random(number), list(self.pictures)
        with self.client() as http:
            while time.monotonic() < until:
                kind = "costly" if number < 2 else rng.choice(names)  # half of the threads send the worst alone
                # Of other bytes each time, because the server decodes no picture again that it knows
                images = [self.pictures[kind] + base64.b64encode(rng.randbytes(3)).decode() for _ in range(2)]
                body = {"support_set": SET, "images": images if kind == "costly" else [self.pictures[kind]]}
                with suppress(httpx2.TransportError):
                    self.check_picture(kind, http.post("/v1/classify", json=body, headers=self.headers))
                time.sleep(rng.uniform(0, 2 * PAUSE))

    def check_picture(self, kind: str, response: httpx2.Response) -> None:
        """The costly picture is judged, or refused for its price. Every other one is refused."""
        fault = ""
        if response.status_code == 200:
            errors = [result["error"] for result in response.json()["results"]]
            if kind != "costly" and None in errors:
                fault = "it was judged"
        else:
            fault = fault_of(response)
        self.count(f"picture, {kind}:", response.status_code, fault)

    def send_bodies(self, until: float, number: int) -> None:
        rng, names = random.Random(100 + number), list(self.bodies)
        with self.client() as http:
            while time.monotonic() < until:
                kind = rng.choice(names)
                headers = {"Content-Type": "application/json", **(self.headers if rng.random() < 0.8 else {})}
                path = rng.choice(["/v1/chat/completions", "/v1/classify", "/v1/systemone"])
                with suppress(httpx2.TransportError):  # the server stops reading a body that is too large
                    response = http.post(path, content=self.bodies[kind], headers=headers)
                    self.count(f"body, {kind}:", response.status_code, fault_of(response))
                time.sleep(rng.uniform(0, 2 * PAUSE))

    def hold_connections(self, until: float, _: int) -> None:
        """Hold half-sent requests, and answers that are not read. What the server ends is opened again."""
        opened: list[tuple[str, socket.socket]] = []
        key = self.headers["Authorization"]
        get = f"GET /v1/support-sets/{SET}?images=true HTTP/1.1\r\nHost: localhost\r\nAuthorization: {key}\r\n\r\n".encode()
        post = f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nAuthorization: {key}\r\nContent-Type: application/json\r\n".encode()
        sent = {
            "half a header": post[:-9], "half a body": post + b"Content-Length: 1000\r\n\r\n{", "idle": b"", "unread": get,
            "a byte a second": post + b"Content-Length: 100000\r\n\r\n", "unread and repeated": get * 50,
        }  # fmt: skip
        while time.monotonic() < until:
            still: list[tuple[str, socket.socket]] = []
            for kind, one in opened:
                if self._still_open(kind, one):
                    still.append((kind, one))
                else:
                    one.close()
                    self.count(f"connection, {kind}:", "ended")
            opened = still
            counts = Counter(kind for kind, _ in opened)
            for name, wanted in HELD.items():
                for _ in range(wanted - counts[name]):
                    with suppress(OSError):
                        opened.append((name, self._open(sent[name])))
                        self.count(f"connection, {name}:", "opened")
            time.sleep(RENEWED)
        for _kind, one in opened:
            one.close()

    def _open(self, sent: bytes) -> socket.socket:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.settimeout(5)
        made.connect((self.url.host, self.url.port))
        made.sendall(sent)
        made.setblocking(False)
        return made

    @staticmethod
    def _still_open(kind: str, one: socket.socket) -> bool:
        """Whether the server has not ended it. One that is not read is looked at without reading."""
        try:
            if kind.startswith("unread"):
                return one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            if kind == "a byte a second":
                one.send(b" ")
            one.recv(1, socket.MSG_PEEK)
            return False  # an answer, or the end
        except BlockingIOError:
            return True
        except OSError:
            return False


def fault_of(response: httpx2.Response) -> str:
    """What is not as promised in the answer to a request that must be refused; "" if it is refused in OpenAI's form."""
    if response.status_code not in REFUSED:
        return "it was not refused"
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return "no error in OpenAI's form"
    if set(error) != {"message", "type", "param", "code"} or not error["message"] or len(error["message"]) > 1100:
        return f"an error of another form: {str(error)[:200]}"
    return ""


def main() -> None:
    """What the module's docstring says."""
    address, key, seconds, *small = sys.argv[1:]
    if hasattr(os, "nice"):
        os.nice(19)  # other people's machines do the work of their requests
    strangers = Strangers(address, key, float(seconds), bool(small))
    strangers.store()
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(strangers.run()), flush=True)


if __name__ == "__main__":
    main()
