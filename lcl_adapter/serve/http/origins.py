"""One rule for the whole server, API and page: no other web page reaches it.

A browser says where a request comes from (``Origin``, ``Sec-Fetch-Site``), and a page cannot change what it says. A
request from another page is refused. No CORS header leaves the server, so no other page can read an answer.

Source: https://www.w3.org/TR/fetch-metadata/ and https://fetch.spec.whatwg.org/#origin-header.
"""

from __future__ import annotations

import json
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lcl_adapter.serve.http.middleware import API_PATHS, error_body

SAFE_METHODS = frozenset({"GET", "HEAD"})  # they change nothing
DOCUMENTS = frozenset({"/", "/docs"})  # a link of another page may lead to them
# what an HTML form can send; a request with another type is sent by a script, which needs a permission that is never given
FORM_TYPES = frozenset({"", "application/x-www-form-urlencoded", "multipart/form-data", "text/plain"})
SCRIPT_HEADERS = ("authorization", "x-requested-with")  # no form can send them
PORTS = {"http": "80", "https": "443"}

SWAGGER = "https://cdn.jsdelivr.net"  # the scripts of /docs
DATA_POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; sandbox"
DOCS_POLICY = (
    f"default-src 'none'; script-src 'unsafe-inline' {SWAGGER}; style-src 'unsafe-inline' {SWAGGER}; "
    "img-src 'self' data: https://fastapi.tiangolo.com; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


def is_encrypted(scope: Scope) -> bool:
    """Whether the browser's connection has TLS, which may end at a proxy."""
    headers = Headers(scope=scope)
    forwarded = headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
    return scope["scheme"] == "https" or forwarded == "https" or headers.get("origin", "").startswith("https://")


def refusal(scope: Scope, with_keys: bool = False) -> str | None:
    """Why a request is refused; None: it is no other web page's.

    with_keys: the API's routes need a key, which no form can send; so they say that it is missing.
    """
    headers, method = Headers(scope=scope), scope["method"]
    site = headers.get("sec-fetch-site", "").lower()
    origins = headers.getlist("origin")
    own = [_is_own(origin, headers) for origin in origins]
    if not all(own):
        return "this server answers no request of another web page."
    if site not in {"", "same-origin", "none"}:
        is_link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
        if not (is_link and method in SAFE_METHODS and scope["path"] in DOCUMENTS):
            return "this server answers no request of another web page."
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    proven = own or site == "same-origin" or content_type not in FORM_TYPES or any(name in headers for name in SCRIPT_HEADERS)
    needs_key = with_keys and scope["path"].startswith(API_PATHS)
    if method == "POST" and not proven and not needs_key:
        return "send `Content-Type: application/json`, `X-Requested-With` or `Authorization`, which a form of another web page cannot send."
    return None


def _is_own(origin: str, headers: Headers) -> bool:
    """Whether an Origin is the address that the request was sent to. A proxy gives that address as X-Forwarded-Host."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    if parts.scheme not in PORTS or parts.path or parts.query or parts.fragment:
        return False
    addresses = (headers.get("host"), headers.get("x-forwarded-host", "").partition(",")[0])
    return any(_with_port(address, parts.scheme) == _with_port(parts.netloc, parts.scheme) for address in addresses if address)


def _with_port(address: str, scheme: str) -> tuple[str, str]:
    """Name and port of ``name``, ``name:port`` or ``[::1]:port``."""
    address = address.strip().lower()
    name, colon, port = address.rpartition(":")
    if not colon or address.endswith("]"):
        name, port = address, ""
    return name.removesuffix("."), port or PORTS[scheme]


class OwnPagesOnly:
    """Refuses what other web pages send, and writes the headers of every answer. Plain ASGI, around the whole app."""

    def __init__(self, app: ASGIApp, with_keys: bool) -> None:
        self.app, self.with_keys = app, with_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # nothing here has one, and a browser opens one to any address
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        policy = DOCS_POLICY if scope["path"] == "/docs" else DATA_POLICY

        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                headers = MutableHeaders(scope=message)
                for name in [name for name in headers if name.startswith("access-control-")]:
                    del headers[name]
                headers.setdefault("content-security-policy", policy)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        reason = refusal(scope, self.with_keys)
        if reason is None:
            await self.app(scope, receive, guarded_send)
            return
        body = json.dumps(error_body(reason, "permission_error", "origin")).encode()
        fields = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
        await guarded_send({"type": "http.response.start", "status": 403, "headers": fields})
        await guarded_send({"type": "http.response.body", "body": body})
