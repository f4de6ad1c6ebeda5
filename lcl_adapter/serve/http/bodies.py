"""JSON bodies: bounded without their pictures, and read and validated outside the event loop."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lcl_adapter import reading
from lcl_adapter.serve.http.threads import run_for
from lcl_adapter.serve.jobs import GoneError

MAX_TEXT = 256 * 2**10  # bytes of a body without the images in it
MAX_STRINGS = 1024  # that are taken for images
MAX_VALUES = 4096  # of a body; 20,000 small objects took 54 ms to parse, in which no other thread ran
IMAGE = re.compile(rb'"data:|"data_base64"\s*:\s*"')  # where an image begins: a data URL, or an asset's base64
LONGEST_HEAD = 32  # bytes of such a beginning, as clients write it
SMALL = 16 * 2**10  # bytes of a body that is read on the event loop, in less than a millisecond
TOO_LARGE = f"the request has more than {MAX_TEXT >> 10} kB beside its images."
TOO_MANY = f"the request has more than {MAX_VALUES:,} values."


class BodyRoute(APIRoute):
    """A route whose JSON body is read and validated in a thread, once it is known to be small beside its images."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        field = self.body_field
        if field is None:
            return handler

        def read(body: bytes) -> Any:
            """The validated body. Raises HTTPException, RequestValidationError."""
            text = beside_images(body)
            if len(text) > MAX_TEXT:
                raise HTTPException(413, TOO_LARGE)
            if values_of(text) > MAX_VALUES:
                raise HTTPException(413, TOO_MANY)
            try:
                parsed = reading.parse_json(body)
            except ValueError as error:
                raise RequestValidationError([{"type": "json_invalid", "loc": ("body",), "msg": str(error)}]) from error
            value, faults = field.validate(parsed, {}, loc=("body",))
            if faults:
                raise RequestValidationError(faults)
            return value

        async def handle(request: Request) -> Response:
            try:
                body = await request.body()
            except ClientDisconnect as error:
                raise GoneError("the client disconnected") from error
            if body and "json" in request.headers.get("content-type", "").lower():
                value = read(body) if len(body) <= SMALL else await run_for(request.state.caller.namespace, read, body)
                request._json = value  # what Request.json returns; FastAPI validates an object of the right class at once
            return await handler(request)

        return handle


def beside_images(body: bytes) -> bytes:
    """A body without what its strings of images hold, and still the same JSON otherwise. A string with a quote in it is left out up to that quote."""
    pieces, place = [], 0
    for _ in range(MAX_STRINGS):
        head = IMAGE.search(body, place)
        if head is None:
            break
        pieces.append(body[place : head.end()])
        end = body.find(b'"', head.end())
        place = len(body) if end < 0 else end
        while place > head.end() and body[place - 1 : place] == b"\\":  # the quote may be a part of the string
            place -= 1
    return b"".join((*pieces, body[place:]))


def values_of(text: bytes) -> int:
    """How many values JSON has, lists and objects among them; of a list or an object, the last item is not counted.

    Of more than twice MAX_VALUES strings, which are keys and values, only these are counted: the rest would take its time.
    """
    plain = text.replace(rb"\\", b"").replace(rb"\"", b"")  # then quotes begin and end strings
    strings = plain.count(b'"') // 2
    if strings > 2 * MAX_VALUES:
        return strings // 2
    outside = b"".join(plain.split(b'"')[::2])
    return outside.count(b",") + outside.count(b"[") + outside.count(b"{")
