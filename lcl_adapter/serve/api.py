"""The routes: OpenAI's chat completions and models, stored support sets, classification, adapters, health and metrics.

Every error has OpenAI's format, ``{"error": {"message", "type", "param", "code"}}``. It contains no paths, no keys and
nothing of other callers.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from lcl_adapter.answering import api_types
from lcl_adapter.answering.decisions import DecisionIn, DecisionOut
from lcl_adapter.answering.faults import message_of
from lcl_adapter.errors import ConflictError, MissingError, RunError, UserError
from lcl_adapter.serve.decisions import decide
from lcl_adapter.serve.decoding import TextDecoder, Token
from lcl_adapter.serve.http.bodies import BodyRoute
from lcl_adapter.serve.http.keys import Caller, Keys
from lcl_adapter.serve.http.middleware import AccessControl, RequestMetrics, error_body
from lcl_adapter.serve.http.origins import OwnPagesOnly
from lcl_adapter.serve.http.threads import run_for
from lcl_adapter.serve.jobs import BusyError, GoneError, Job, TimeoutExceededError
from lcl_adapter.serve.metrics import Metrics
from lcl_adapter.serve.pictures.pool import DECODERS
from lcl_adapter.serve.service import Service, summary
from lcl_adapter.serve.set_json import pieces_of
from lcl_adapter.serve.store import StoredSet

log = logging.getLogger("lcl_adapter.serve")
SWEEP_SECONDS = 600  # between two removals of images that no set names any more
DISCONNECT_SECONDS = 0.5  # between two checks whether the client has disconnected
MAX_FAULTS = 5  # of an invalid request that are reported together
STATUSES: dict[type[Exception], tuple[int, str, str]] = {  # an exception's status, error type and error code
    MissingError: (404, "invalid_request_error", "not_found"),
    ConflictError: (409, "invalid_request_error", "version_conflict"),
    RunError: (507, "server_error", "storage"),
    UserError: (400, "invalid_request_error", "invalid_value"),
    BusyError: (429, "rate_limit_error", "queue_full"),
    TimeoutExceededError: (504, "server_error", "timeout"),
    TimeoutError: (504, "server_error", "timeout"),
    GoneError: (499, "server_error", "cancelled"),
}


def error_response(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers."""
    for exception, (status, kind, code) in STATUSES.items():
        if isinstance(error, exception):
            headers = {"Retry-After": str(error.retry_after)} if isinstance(error, BusyError) else {}
            return status, error_body(str(error) or "the request exceeded the server's time limit.", kind, code), headers
    log.error("unexpected %s", type(error).__name__, exc_info=error)
    return 500, error_body("an internal error of the server; its log has the details.", "server_error", "internal"), {}


async def wait_for(futures: Sequence[Future[Any]], request: Request, cancel: Callable[[], None], timeout: float) -> None:
    """Wait until all futures are done. Calls ``cancel`` if the client disconnects or the time is over.

    Raises GoneError within half a second after the client disconnects; TimeoutError after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    pending = {asyncio.wrap_future(future) for future in futures}
    try:
        while pending:
            _, pending = await asyncio.wait(pending, timeout=DISCONNECT_SECONDS)
            if pending and await request.is_disconnected():
                raise GoneError("the client disconnected")
            if pending and time.monotonic() > deadline:
                raise TimeoutError
    except BaseException:
        cancel()
        raise
    finally:
        for future in pending:  # read the exception, or asyncio logs that nobody did
            future.add_done_callback(lambda done: done.cancelled() or done.exception())


async def current_caller(request: Request) -> Caller:
    """The caller that the middleware has accepted."""
    caller: Caller = request.state.caller
    return caller


VersionQuery = Annotated[int | None, Query(ge=1, le=api_types.MAX_VERSION)]
PhotoNumber = Annotated[int, Path(ge=0, lt=api_types.MAX_IMAGES)]
AnyCaller = Annotated[Caller, Depends(current_caller)]


async def administrator(caller: AnyCaller) -> Caller:
    """Raises HTTPException for a key without `admin`."""
    if not caller.admin:
        raise HTTPException(403, "this route needs a key that is marked `admin`.")
    return caller


Admin = Annotated[Caller, Depends(administrator)]


def make_app(service: Service, keys: Keys | None = None, body_limit: int = 64 * 2**20, page: bool = False) -> FastAPI:
    """The API as an ASGI app.

    keys: without them every caller is the local one, and only requests to localhost are answered.
    body_limit: bytes of a request.
    page: paths outside the API belong to a page that has its own log-in.
    """
    engine = service.engine
    metrics = Metrics(engine)
    began = time.time()

    async def sweep_regularly() -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            with suppress(UserError):
                await run_in_threadpool(service.store.sweep)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(sweep_regularly())
        yield
        sweeper.cancel()
        await run_in_threadpool(engine.stop)
        await run_in_threadpool(DECODERS.close)
        service.store.close()

    app = FastAPI(title="lcl-adapter", lifespan=lifespan, docs_url="/docs", redoc_url=None)
    app.router.route_class = BodyRoute
    app.add_middleware(RequestMetrics, metrics=metrics)
    app.add_middleware(AccessControl, limit=body_limit, keys=keys, page=page)
    app.add_middleware(OwnPagesOnly, with_keys=keys is not None)

    async def on_error(_: Request, error: Exception) -> JSONResponse:
        status, body, headers = error_response(error)
        return JSONResponse(body, status, headers)

    for exception in (*STATUSES, Exception):
        app.add_exception_handler(exception, on_error)

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> JSONResponse:
        kinds = {
            401: ("authentication_error", "invalid_api_key"),
            403: ("permission_error", "forbidden"),
            404: ("invalid_request_error", "not_found"),
            413: ("invalid_request_error", "too_large"),
            429: ("rate_limit_error", "queue_full"),
        }
        kind, code = kinds.get(error.status_code, ("invalid_request_error", "invalid_request"))
        headers = {"WWW-Authenticate": "Bearer"} if error.status_code == 401 else error.headers
        return JSONResponse(error_body(str(error.detail), kind, code), error.status_code, headers)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        faults = error.errors()
        message = "; ".join(_fault_message(fault) for fault in faults[:MAX_FAULTS])
        return JSONResponse(error_body(message, "invalid_request_error", "invalid_value", _field_of(faults[0]) or None), 400)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process runs."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """The model can answer."""
        return JSONResponse({"status": "ready"}) if engine.alive else JSONResponse({"status": "the engine is not running"}, 503)

    @app.get("/metrics")
    async def read_metrics(_: Admin) -> Response:
        """Metrics in Prometheus' text format. They cover all callers, so the key must be an administrator's."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    def model_card(name: str) -> dict[str, Any]:
        model = engine.find(name)
        return {"id": name, "object": "model", "created": int(model.created if model.folder else began), "owned_by": "lcl-adapter"}

    @app.get("/v1/models")
    async def models(_: AnyCaller) -> dict[str, Any]:
        return {"object": "list", "data": [model_card(name) for name in list(engine.models)]}

    @app.get("/v1/models/{name}")
    async def model(name: str, _: AnyCaller) -> dict[str, Any]:
        return model_card(name)

    @app.put("/v1/adapters/{name}")
    def load_adapter(name: api_types.Name, _: Admin) -> dict[str, Any]:
        """Load a run of the server's adapter folder. It is refused if it changes none of the base's answers.

        The request may be repeated: an adapter that is loaded already, with the same weights, is answered again.
        """
        service.load_adapter(name)
        return model_card(name)

    @app.delete("/v1/adapters/{name}", status_code=204)
    def unload_adapter(name: api_types.Name, _: Admin) -> None:
        service.unload_adapter(name)

    @app.put("/v1/support-sets/{name}")
    async def put_set(name: api_types.Name, body: api_types.SupportSetIn, caller: AnyCaller) -> api_types.SupportSetOut:
        """Store a new version. The answer is 409 if ``expected_version`` is not the newest."""
        return summary(await run_for(caller.namespace, service.put, caller.namespace, name, body))

    def stored_sets(namespace: str) -> list[api_types.SupportSetOut]:
        sets: list[StoredSet] = []
        for name in service.store.names(namespace):
            with suppress(MissingError):  # another caller removed it after the names were read
                sets.append(service.store.get(namespace, name))
        return [summary(stored) for stored in sets]

    @app.get("/v1/support-sets")
    async def sets(caller: AnyCaller) -> api_types.SupportSets:
        return api_types.SupportSets(data=await run_for(caller.namespace, stored_sets, caller.namespace))

    @app.get("/v1/support-sets/{name}", response_model=api_types.SupportSetWithExamples)
    async def read_set(name: api_types.Name, caller: AnyCaller, version: VersionQuery = None, images: bool = False) -> Any:
        stored = await run_for(caller.namespace, service.store.get, caller.namespace, name, version)
        if not images:
            return service.with_examples(stored)
        pieces = pieces_of(service.store, stored, summary(stored))
        first = await run_for(caller.namespace, next, pieces)  # an error before it is still answered with its own status
        return StreamingResponse(_rest(caller.namespace, first, pieces), media_type="application/json")

    @app.post("/v1/support-sets/{name}/photos")
    def add_photo(name: api_types.Name, body: api_types.PhotoIn, caller: AnyCaller) -> api_types.SupportSetOut:
        """Store a new version with one more photo. Of two callers at once, both photos are added, unless they give ``expected_version``."""
        return summary(service.add_photo(caller.namespace, name, body))

    @app.delete("/v1/support-sets/{name}/photos/{number}")
    def drop_photo(name: api_types.Name, number: PhotoNumber, caller: AnyCaller, expected_version: VersionQuery = None) -> api_types.SupportSetOut:
        """Store a new version without one photo. ``number``: its place in the set, from 0, as ``GET`` lists them."""
        return summary(service.drop_photo(caller.namespace, name, number, expected_version))

    @app.get("/v1/support-sets/{name}/versions")
    async def versions(name: api_types.Name, caller: AnyCaller) -> api_types.Versions:
        numbers = await run_for(caller.namespace, service.store.versions, caller.namespace, name)
        return api_types.Versions(data=[api_types.Version(version=number, created=created) for number, created in numbers])

    @app.delete("/v1/support-sets/{name}", status_code=204)
    async def remove_set(name: api_types.Name, caller: AnyCaller, expected_version: VersionQuery = None) -> None:
        await run_for(caller.namespace, service.remove, caller.namespace, name, expected_version)

    @app.post("/v1/classify")
    async def classify(body: api_types.ClassifyIn, caller: AnyCaller, request: Request) -> api_types.ClassifyOut:
        """Classify images by a stored set. An image that cannot be used has an error in its own result."""
        classification = await run_for(caller.namespace, service.classify, caller.namespace, body)
        await wait_for(classification.futures, request, classification.cancel, service.timeout)
        response = classification.response()
        metrics.images.inc(sum(result.error is None for result in response.results))
        return response

    @app.post("/v1/systemone", response_model_exclude_none=True)
    async def systemone(body: DecisionIn, caller: AnyCaller, request: Request) -> DecisionOut:
        """Typed decisions: a probability for every allowed answer of each question about a state.

        A state is a text or JSON, a new photo with a support set (stored, or sent as labelled photos), or a conversation. A
        choice among a set's labels is judged and calibrated as by `/v1/classify`; any other question is answered by the
        model's likelihoods of its allowed answers.
        """
        decisions = await run_for(caller.namespace, decide, service, caller.namespace, body)
        await wait_for(decisions.futures, request, decisions.cancel, service.timeout)
        return decisions.response()

    @app.post("/v1/chat/completions")
    async def chat(body: api_types.ChatIn, caller: AnyCaller, request: Request) -> Any:
        job, decoder = await run_for(caller.namespace, service.chat, caller.namespace, body)
        if body.stream:
            stream = _Stream(body, job, decoder)
            engine.submit(job)
            first = await stream.first_piece(request)
            return StreamingResponse(stream.events(first), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        engine.submit(job)
        await wait_for([job.future], request, job.cancelled.set, service.timeout)
        reason = job.future.result()
        logprobs = decoder.logprobs(decoder.tokens) if body.logprobs else None
        return api_types.completion(body, decoder.text, reason, usage_of(job, decoder), logprobs)

    return app


def usage_of(job: Job, decoder: TextDecoder) -> dict[str, int]:
    generated = len(decoder.tokens)
    return {"prompt_tokens": job.prompt_tokens, "completion_tokens": generated, "total_tokens": job.prompt_tokens + generated}


async def _rest(caller: str, piece: bytes | None, pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    """All pieces, from ``piece`` on. Each is made outside the event loop, when the client has read those before it."""
    while piece is not None:
        yield piece
        piece = await run_for(caller, next, pieces, None)


Piece = tuple[str, list[Token]]  # new text of an answer, and its tokens


class _Stream:
    """Text from the engine's thread to one client.

    The engine never waits for the client; unread text stays in ``pieces``, a few kB at most.
    """

    def __init__(self, body: api_types.ChatIn, job: Job, decoder: TextDecoder) -> None:
        self.body, self.job, self.decoder = body, job, decoder
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[Piece | None] = asyncio.Queue()  # None: the answer has ended
        decoder.send = lambda text, tokens: self._put((text, tokens))
        job.future.add_done_callback(lambda _: self._put(None))
        self.head = {"id": api_types.completion_id(), "object": "chat.completion.chunk", "created": int(time.time()), "model": body.model}

    def _put(self, piece: Piece | None) -> None:
        with suppress(RuntimeError):  # the loop is closed, so the server stops and nobody reads the stream
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    async def first_piece(self, request: Request) -> Piece | None:
        """Wait for the first piece. An error before it can still be answered with its own status.

        Raises GoneError, TimeoutError, and what the job raised.
        """
        while True:
            try:
                first = await asyncio.wait_for(self.pieces.get(), DISCONNECT_SECONDS)
            except TimeoutError:
                if await request.is_disconnected():
                    self.job.cancelled.set()
                    raise GoneError("the client disconnected") from None
                if time.monotonic() > self.job.deadline:
                    self.job.cancelled.set()
                    raise
                continue
            except BaseException:
                self.job.cancelled.set()
                raise
            if first is None and (error := self.job.future.exception()) is not None:
                raise error
            return first

    def _chunk(self, delta: dict[str, Any], tokens: Sequence[Token]) -> str:
        logprobs = self.decoder.logprobs(tokens) if self.body.logprobs else None
        return _event(api_types.chunk(self.head, delta, None, logprobs))

    async def events(self, piece: Piece | None) -> AsyncIterator[str]:
        """OpenAI's server-sent events, beginning with the text of ``piece``."""
        try:
            yield _event(api_types.chunk(self.head, {"role": "assistant", "content": ""}))
            while piece is not None:
                text, tokens = piece
                yield self._chunk({"content": text}, tokens)
                piece = await self.pieces.get()
            error = self.job.future.exception()
            if error is not None:
                yield _event(error_response(error)[1] if isinstance(error, Exception) else error_body("stopped", "server_error", None))
                return
            text, tokens = self.decoder.remaining()
            if text or tokens:
                yield self._chunk({"content": text}, tokens)
            yield _event(api_types.chunk(self.head, {}, self.job.future.result()))
            if self.body.stream_options and self.body.stream_options.include_usage:
                yield _event({**self.head, "choices": [], "usage": usage_of(self.job, self.decoder)})
            yield "data: [DONE]\n\n"
        finally:
            self.job.cancelled.set()  # ends the work for a client that disconnected; a finished job ignores it


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _field_of(fault: Any) -> str:
    """The field's place, without the names of types that the validator adds to it."""
    return ".".join(str(part)[:100] for part in fault["loc"][1:] if isinstance(part, int) or re.fullmatch(r"[a-z]\w*", part))


def _fault_message(fault: Any) -> str:
    """The field and its fault."""
    if fault["type"] == "json_invalid":
        return "the body is not JSON"
    message = message_of(fault)
    return f"{_field_of(fault)}: {message}" if _field_of(fault) else message
