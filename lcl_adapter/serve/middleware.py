"""Before and around the routes, as plain ASGI: who asks, how much, and how long it took. Starlette's own wrapper hides that a client went away."""

from __future__ import annotations

import ipaddress
import json
import time
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lcl_adapter.answering import api_types
from lcl_adapter.serve.keys import LOCAL, Keys

if TYPE_CHECKING:
    from lcl_adapter.serve.metrics import Metrics

OPEN = {"/health", "/ready"}  # without a key; they say nothing of what others do
GUARDED = ("/v1/", "/metrics", "/docs", "/openapi.json")  # by a key, where a page with a log-in of its own has the rest


def is_local(host: str) -> bool:
    """Whether a name or address is this machine's alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def fault(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    return {"error": api_types.Fault(message=message, type=kind, code=code, param=param).model_dump()}


class Gate:
    """Before a body is read: who asks, that the host is this machine where there are no keys (DNS rebinding), and that the body is not too large."""

    def __init__(self, app: ASGIApp, limit: int, keys: Keys | None, page: bool = False) -> None:
        self.app, self.limit, self.keys, self.page = app, limit, keys, page

    def _open(self, path: str) -> bool:
        return path in OPEN or (self.page and not path.startswith(GUARDED))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        scope.setdefault("state", {})["caller"] = LOCAL
        if self.keys is None:
            host = headers.get(b"host", b"").decode("latin-1")
            bare = host if host.endswith("]") else host.rpartition(":")[0] or host
            if not is_local(bare.strip("[]")):
                told = "this server answers to localhost alone; start it with --api-key-file for others."
                await self._refuse(send, 403, fault(told, "permission_error", "host"))
                return
        elif not self._open(scope["path"]):
            scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
            found = self.keys.find(key.strip()) if scheme.lower() == "bearer" else None
            if found is None:
                told = "no key, or one that is not known: send `Authorization: Bearer KEY`."
                await self._refuse(send, 401, fault(told, "authentication_error", "invalid_api_key"), (b"www-authenticate", b"Bearer"))
                return
            scope["state"]["caller"] = found
        told = headers.get(b"content-length", b"0")
        too_large = fault(f"the request is larger than {self.limit / 2**20:g} MiB.", "invalid_request_error", "too_large")
        if not told.isdigit() or int(told) > self.limit:
            await self._refuse(send, 413, too_large)
            return
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limit:
                raise HTTPException(413, too_large["error"]["message"])
            return message

        await self.app(scope, bounded, send)

    @staticmethod
    async def _refuse(send: Send, status: int, body: dict[str, Any], *more: tuple[bytes, bytes]) -> None:
        data = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode()), (b"connection", b"close"), *more]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": data})


class Measured:
    """Counts and times requests by route."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - started)
