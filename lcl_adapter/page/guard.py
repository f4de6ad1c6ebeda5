"""In front of Gradio: which of its routes exist, and for whom.

Gradio answers several dozen routes, some before log-in, some with files of any visitor or of the disk, some by fetching an
address. Here a list names the routes that the page's own script uses. All others do not exist. Before log-in there is the
log-in page, and nothing of Gradio. Files are received and served here, and not by Gradio.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lcl_adapter import reading
from lcl_adapter.page.pictures import ARCHIVES, UPLOADS, new_folder, resolved, store_picture, type_of
from lcl_adapter.page.visitors import Visitors, cookie_of, folder_of, login_page
from lcl_adapter.serve.http.middleware import error_body
from lcl_adapter.serve.http.threads import run_for
from lcl_adapter.serve.jobs import GoneError

API = "/gradio_api"
FILES = f"{API}/file="
READ = re.compile(
    r"/|/(assets|static|svelte)/.+|/(theme\.css|favicon\.ico|manifest\.json|config)|"
    rf"{API}/(info|startup-events|theme\.css|app_id|queue/data|heartbeat/[^/]+)"
)
WRITTEN = frozenset({f"{API}/queue/join", f"{API}/cancel", f"{API}/reset"})  # their bodies are JSON
WITHOUT_QUERY = frozenset({"/", "/config"})  # Gradio would open the file of a stored link that the query names
OWNED = ("session_hash", "event_id")  # names in a request that belong to one visitor
MAX_BODY = 2**20  # bytes of JSON: fields and paths of photos
MAX_LOGIN = 4096
MAX_VALUES = 20_000  # in a body of JSON, which Gradio validates on the event loop; a photo has ten
MAX_FILES = 512
PIECE = 2**16  # bytes of an upload that are parsed at a time
ZIP_HEAD = b"PK\x03\x04"
# Gradio's page writes scripts and styles into its document; nothing is loaded from elsewhere, and nothing is sent elsewhere
PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; media-src 'self' blob:; worker-src 'self' blob:; connect-src 'self'; object-src 'none'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'self'"
)


class Guard:
    """Plain ASGI, around Gradio's app. scratch: the folder of all visitors' files."""

    def __init__(self, app: ASGIApp, visitors: Visitors, scratch: Path) -> None:
        self.app, self.visitors, self.scratch = app, visitors, scratch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            answer = await self._answer(scope, receive, send)
        except HTTPException as error:
            answer = _error(error.status_code, str(error.detail))
        if answer is not None:
            await answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """The answer; None: Gradio has given it."""
        method, path = scope["method"], scope["path"]
        reads = method in {"GET", "HEAD"}
        visitor = self.visitors.find(scope)
        if visitor is None:
            if method == "POST" and path == "/login":
                return await self._log_in(scope, receive)
            if reads and path == "/":
                return HTMLResponse(login_page(scope), headers={"content-security-policy": PAGE_POLICY, "cache-control": "no-store"})
            return _error(401, "log in first.")
        scope.setdefault("state", {})["visitor"] = visitor
        if method == "POST" and path == "/logout":
            self.visitors.log_out(scope)
            return RedirectResponse("/", 303, {"set-cookie": cookie_of(scope, "", 0)})
        folder = folder_of(self.scratch, visitor)
        if reads and path.startswith(FILES):
            return await run_for(visitor, _file, folder, path.removeprefix(FILES))
        if method == "POST" and path == f"{API}/upload":
            return await self._store_uploads(Request(scope, receive), visitor, folder)
        if reads and path == f"{API}/upload_progress":  # an upload is answered when it is complete
            return Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")
        if method == "POST" and path in WRITTEN:
            await self._forward_json(scope, receive, send, visitor, folder)
            return None
        if not (reads and READ.fullmatch(path)):
            return _error(404, "no such page.")
        window = Request(scope).query_params.get("session_hash") if path == f"{API}/queue/data" else None
        window = path.rpartition("/")[2] if "/heartbeat/" in path else window
        if window is not None and not self.visitors.owns(visitor, window):
            return _error(403, "this browser window is another visitor's.")
        if path in WITHOUT_QUERY:
            scope = {**scope, "query_string": b""}
        await self.app(scope, receive, _page_headers(send))
        return None

    async def _log_in(self, scope: Scope, receive: Receive) -> Response:
        fields = _json(await _body(scope, receive, MAX_LOGIN))
        name, key = (str(fields.get(field) or "").strip() for field in ("username", "password"))
        token = self.visitors.log_in(name, key)
        if token is None:
            return _error(401, "the server does not know this name with this key.")
        return JSONResponse({"success": True}, headers={"set-cookie": cookie_of(scope, token), "cache-control": "no-store"})

    async def _store_uploads(self, request: Request, visitor: str, folder: Path) -> Response:
        """The paths of the stored files, in order, as Gradio's script expects them. The event loop only receives the bytes."""
        with SpooledTemporaryFile(MAX_BODY, dir=str(self.scratch)) as spooled:
            async for part in _stream(request):
                await run_for(visitor, spooled.write, part)
            return JSONResponse(await run_for(visitor, _store_all, request.headers, spooled, visitor, folder))

    async def _forward_json(self, scope: Scope, receive: Receive, send: Send, visitor: str, folder: Path) -> None:
        """Give Gradio a body whose files and windows are the visitor's own, and without addresses."""
        fields = await run_for(visitor, _json, await _body(scope, receive, MAX_BODY))
        for name in OWNED:
            if fields.get(name) is not None and not self.visitors.owns(visitor, fields[name]):
                raise HTTPException(403, "this browser window is another visitor's.")
        await run_for(visitor, _check_files, fields, folder)
        body = (await run_for(visitor, json.dumps, fields)).encode()
        headers = MutableHeaders(raw=list(scope["headers"]))
        headers["content-length"], headers["content-type"] = str(len(body)), "application/json"
        sent = False

        async def receive_body() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send_and_note(message: Message) -> None:
            """The event of the answer belongs to the visitor."""
            if message["type"] == "http.response.body":
                event = re.search(rb'"event_id": ?"(\w+)"', message.get("body", b""))
                if event is not None:
                    self.visitors.owns(visitor, event[1].decode())
            await send(message)

        # not compressed, so that the event can be read
        del headers["accept-encoding"]
        await self.app({**scope, "headers": headers.raw}, receive_body, _page_headers(send_and_note))


def _page_headers(send: Send) -> Send:
    async def send_with_policy(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if headers.get("content-type", "").startswith("text/html"):
                headers["content-security-policy"] = PAGE_POLICY
            if not headers.get("content-type", "").startswith(("text/javascript", "application/javascript", "text/css", "font/")):
                headers["cache-control"] = "no-store"
        await send(message)

    return send_with_policy


def _file(folder: Path, path: str) -> Response:
    media_type = type_of(folder, path)
    if media_type is None:
        return _error(404, "no such file.")
    file = Path(path)
    name = file.name if media_type == "application/zip" else f"photo{file.suffix}"
    return FileResponse(file, media_type=media_type, filename=name, content_disposition_type="attachment", headers={"cache-control": "private"})


def _store_all(headers: Headers, spooled: IO[bytes], visitor: str, folder: Path) -> list[str]:
    """Parse an upload and store its files. Returns their paths. Not on the event loop. Raises HTTPException."""

    async def pieces() -> AsyncGenerator[bytes, None]:
        spooled.seek(0)
        while piece := spooled.read(PIECE):
            yield piece

    async def store() -> list[str]:
        paths: list[str] = []
        form = await MultiPartParser(headers, pieces(), max_files=MAX_FILES, max_fields=MAX_FILES).parse()
        try:
            for upload in form.getlist("files"):
                if isinstance(upload, str):
                    raise HTTPException(400, "a part of the upload is not a file.")
                paths.append(str(_store(visitor, folder, upload.filename or "", await upload.read())))
        finally:
            await form.close()
        return paths

    if not headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(400, "the upload is not multipart/form-data.")
    try:
        return asyncio.run(store())  # Starlette's parser is written for a loop; this one is this thread's own
    except MultiPartException as error:
        raise HTTPException(400, f"the upload cannot be read: {error.message}") from error


def _store(visitor: str, folder: Path, name: str, data: bytes) -> Path:
    if not data.startswith(ZIP_HEAD):
        return store_picture(new_folder(folder, UPLOADS), name, data, visitor)
    path = new_folder(folder, ARCHIVES) / "set.zip"  # read by the page alone, and never served
    path.write_bytes(data)
    return path


def _check_files(fields: Any, folder: Path) -> None:
    """Every file of a request is the visitor's own; its address is removed. Raises HTTPException, also for too many values."""
    waiting, count = [fields], 0
    while waiting:
        value = waiting.pop()
        count += 1 + (len(value) if isinstance(value, list | dict) else 0)
        if count > MAX_VALUES:
            raise HTTPException(413, f"the request has more than {MAX_VALUES:,} values.")
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
            if value.get("path") is not None and resolved(folder, value["path"]) is None:
                raise HTTPException(403, "a file of the request is not yours, or was deleted. Add the photo again.")
            if "url" in value:
                value["url"] = None


async def _body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """A body of JSON. Raises HTTPException."""
    if Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send `Content-Type: application/json`.")
    body = b""
    async for part in _stream(Request(scope, receive)):
        body += part
        if len(body) > limit:
            raise HTTPException(413, f"the request is larger than {limit >> 10} KiB.")
    return body


async def _stream(request: Request) -> AsyncIterator[bytes]:
    try:
        async for part in request.stream():
            if part:
                yield part
    except ClientDisconnect as error:
        raise GoneError("the client disconnected") from error


def _json(body: bytes) -> dict[str, Any]:
    try:
        fields = reading.parse_json(body)
    except ValueError as error:
        raise HTTPException(400, "the body is not JSON.") from error
    if not isinstance(fields, dict):
        raise HTTPException(400, "the body is not an object.")
    return fields


def _error(status: int, text: str) -> JSONResponse:
    kind = {401: "authentication_error", 403: "permission_error"}.get(status, "invalid_request_error")
    return JSONResponse(error_body(text, kind, None), status)
