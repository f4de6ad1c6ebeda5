"""Access, body size, requests a caller, and timing, around the routes.

Plain ASGI, because Starlette's own wrapper hides that a client disconnected.
"""

from __future__ import annotations

import ipaddress
import json
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lcl_adapter.answering import api_types
from lcl_adapter.serve.http.bodies import IMAGE, LONGEST_HEAD, MAX_TEXT, TOO_LARGE
from lcl_adapter.serve.http.keys import LOCAL, Keys

if TYPE_CHECKING:
    from lcl_adapter.serve.metrics import Metrics

OPEN_PATHS = {"/health", "/ready"}  # need no key; they reveal nothing about other callers
# beginnings of the API's paths; with a page, all other paths belong to it and need no key
API_PATHS = ("/v1/", "/metrics", "/docs", "/openapi.json")
MAX_MESSAGE = 1000  # characters of an error
MAX_REQUESTS = 800  # that are answered at a time, beside those to OPEN_PATHS
MAX_CALLER_REQUESTS = 400  # of one caller
MAX_CALLER_BODIES = 8  # times the limit of a body: bytes of all bodies, and of unread answers, that one caller has in memory
PIECE = 2**16  # bytes of an answer that are given to the connection at a time, so that the request lasts until the client has read it
RETRY_SECONDS = "5"


def is_local(host: str) -> bool:
    """Whether a name or address can only mean this machine, in any spelling."""
    if host.lower().removesuffix(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def error_body(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's format. What a message quotes may be long: its end is cut off."""
    message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}…"
    return {"error": api_types.Fault(message=message, type=kind, code=code, param=param).model_dump()}


class AccessControl:
    """Checks access and size before the body is read.

    With keys, a request needs a known one. Without keys, its host must be this machine, so that no web page can reach
    the server through DNS rebinding.
    limit: bytes of a body. page: paths outside the API belong to a page that has its own log-in.
    """

    def __init__(self, app: ASGIApp, limit: int, keys: Keys | None, page: bool = False) -> None:
        self.app, self.limit, self.keys, self.page = app, limit, keys, page
        self._requests: Counter[str] = Counter()  # that are being answered, by namespace
        self._bytes: Counter[str] = Counter()  # of their bodies

    def _needs_no_key(self, path: str) -> bool:
        return path in OPEN_PATHS or (self.page and not path.startswith(API_PATHS))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        scope.setdefault("state", {})["caller"] = LOCAL
        if self.keys is None:
            host = headers.get(b"host", b"").decode("latin-1")
            without_port = host if host.endswith("]") else host.rpartition(":")[0] or host
            if not is_local(without_port.strip("[]")):
                message = "this server answers requests to localhost only; start it with --api-key-file to serve others."
                await self._refuse(send, 403, error_body(message, "permission_error", "host"))
                return
        elif not self._needs_no_key(scope["path"]):
            scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
            caller = self.keys.find(key.strip()) if scheme.lower() == "bearer" else None
            if caller is None:
                message = "no key, or an unknown one: send `Authorization: Bearer KEY`."
                await self._refuse(send, 401, error_body(message, "authentication_error", "invalid_api_key"), (b"www-authenticate", b"Bearer"))
                return
            scope["state"]["caller"] = caller
        length = headers.get(b"content-length", b"0")
        too_large = error_body(f"the request is larger than {self.limit / 2**20:g} MiB.", "invalid_request_error", "too_large")
        if not length.isdigit() or int(length) > self.limit:
            await self._refuse(send, 413, too_large)
            return
        if scope["path"] in OPEN_PATHS:  # a busy server says that it lives
            await self.app(scope, receive, send)
            return
        await self._bounded(scope, receive, send, too_large)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send, too_large: dict[str, Any]) -> None:
        """Run the route, if the server and the caller have room for another request."""
        caller = scope["state"]["caller"].namespace
        if self._requests[caller] >= MAX_CALLER_REQUESTS or self._requests.total() >= MAX_REQUESTS:
            message = f"too many requests at a time; try again in {RETRY_SECONDS} s."
            await self._refuse(send, 429, error_body(message, "rate_limit_error", "queue_full"), (b"retry-after", RETRY_SECONDS.encode()))
            return
        read, has_images, end = 0, not scope["path"].startswith("/v1/"), b""

        async def bounded_receive() -> Message:
            """A body can be longer than its content-length says, or have none."""
            nonlocal read, has_images, end
            message = await receive()
            body = message.get("body", b"")
            read += len(body)
            self._bytes[caller] += len(body)
            has_images = has_images or IMAGE.search(end + body) is not None
            end = (end + body)[-LONGEST_HEAD:]
            if read > self.limit:
                raise HTTPException(413, too_large["error"]["message"])
            if read > MAX_TEXT and not has_images:
                raise HTTPException(413, TOO_LARGE)
            if self._bytes[caller] > MAX_CALLER_BODIES * self.limit:
                raise HTTPException(429, "the bodies of your requests are too large together; send fewer at a time.", {"Retry-After": RETRY_SECONDS})
            return message

        unread, refused = 0, False

        async def bounded_send(message: Message) -> None:
            """An answer waits in memory until its client has read it."""
            nonlocal unread, refused
            if refused:
                return
            if message["type"] == "http.response.start":
                length = dict(message.get("headers", ())).get(b"content-length", b"0")
                unread = int(length) if length.isdigit() else 0
                self._bytes[caller] += unread
                if refused := unread > PIECE and self._bytes[caller] > MAX_CALLER_BODIES * self.limit:
                    reason = "the answers that you have not read yet are too large together; read them first."
                    await self._refuse(send, 429, error_body(reason, "rate_limit_error", "queue_full"), (b"retry-after", RETRY_SECONDS.encode()))
                    return
            body = message.get("body", b"")
            for begin in range(0, len(body) - PIECE, PIECE):
                await send({**message, "body": body[begin : begin + PIECE], "more_body": True})
            await send({**message, "body": body[-(len(body) % PIECE or PIECE) :]} if body else message)

        self._requests[caller] += 1
        try:
            received = await arrived(bounded_receive) if scope["path"].startswith("/v1/") else bounded_receive
            if received is not None:
                await self.app(scope, received, bounded_send)
        finally:
            self._bytes[caller] -= read + unread
            self._requests[caller] -= 1
            if not self._requests[caller]:
                del self._requests[caller], self._bytes[caller]

    @staticmethod
    async def _refuse(send: Send, status: int, body: dict[str, Any], *more_headers: tuple[bytes, bytes]) -> None:
        data = json.dumps(body).encode()
        length = str(len(data)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length), (b"connection", b"close"), *more_headers]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": data})


async def arrived(receive: Receive) -> Receive | None:
    """Wait for a whole body, and return what gives it to the route, with the error of receiving it; None if the client went away.

    A route that waits holds a hundred objects and more: hundreds of half-sent bodies would slow down the collection of garbage.
    """
    messages: deque[Message] = deque()
    fault: HTTPException | None = None
    try:
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
            if messages[-1]["type"] == "http.disconnect":
                return None
    except HTTPException as error:
        fault = error

    async def receive_again() -> Message:
        if messages:
            return messages.popleft()
        if fault is not None:
            raise fault
        return await receive()

    return receive_again


class RequestMetrics:
    """Counts and times requests by route."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def recording_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, recording_send)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - started)
