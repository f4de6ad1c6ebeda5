"""The routes: OpenAI's chat completions and models, stored support sets, classification, adapters, health and metrics.

Every error is OpenAI's shape, ``{"error": {"message", "type", "param", "code"}}``, and says nothing of paths, keys or other callers.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from lcl_adapter.answering import api_types
from lcl_adapter.errors import ConflictError, MissingError, RunError, UserError
from lcl_adapter.serve.decoding import Speaker, Token
from lcl_adapter.serve.jobs import BusyError, GoneError, Job, TimeoutExceededError
from lcl_adapter.serve.keys import Caller, Keys
from lcl_adapter.serve.metrics import Metrics
from lcl_adapter.serve.middleware import Gate, Measured, fault
from lcl_adapter.serve.service import Classification, Service, summary
from lcl_adapter.serve.store import StoredSet

log = logging.getLogger("lcl_adapter.serve")
SWEEP = 600  # seconds between removals of images that no set names any more
CODES: dict[type[Exception], tuple[int, str, str]] = {
    MissingError: (404, "invalid_request_error", "not_found"),
    ConflictError: (409, "invalid_request_error", "version_conflict"),
    RunError: (507, "server_error", "storage"),
    UserError: (400, "invalid_request_error", "invalid_value"),
    BusyError: (429, "rate_limit_error", "queue_full"),
    TimeoutExceededError: (504, "server_error", "timeout"),
    TimeoutError: (504, "server_error", "timeout"),
    GoneError: (499, "server_error", "cancelled"),
}


def answer_to(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers."""
    for kind, (status, name, code) in CODES.items():
        if isinstance(error, kind):
            headers = {"Retry-After": str(error.wait)} if isinstance(error, BusyError) else {}
            return status, fault(str(error) or "it took longer than it may.", name, code), headers
    log.error("unexpected %s", type(error).__name__, exc_info=error)
    return 500, fault("an error of the server's own; its log has it.", "server_error", "internal"), {}


async def wait_for(futures: Sequence[Future[Any]], request: Request, cancel: Callable[[], None], timeout: float) -> None:
    """Until all are done; a client that went away is noticed within half a second, and its work is cancelled. Raises GoneError, TimeoutError."""
    ends = time.monotonic() + timeout
    left = {asyncio.wrap_future(future) for future in futures}
    try:
        while left:
            _, left = await asyncio.wait(left, timeout=0.5)
            if left and await request.is_disconnected():
                raise GoneError("the client went away")
            if left and time.monotonic() > ends:
                raise TimeoutError
    except BaseException:
        cancel()
        raise
    finally:
        for one in left:
            one.add_done_callback(lambda done: done.cancelled() or done.exception())  # told to nobody


async def caller(request: Request) -> Caller:
    """Whom the gate has let in."""
    found: Caller = request.state.caller
    return found


VersionAsked = Annotated[int | None, Query(ge=1, le=api_types.MAX_VERSION)]
Who = Annotated[Caller, Depends(caller)]


async def administrator(who: Who) -> Caller:
    """Raises HTTPException for a key that is none's."""
    if not who.admin:
        raise HTTPException(403, "this needs a key that is marked `admin`.")
    return who


Admin = Annotated[Caller, Depends(administrator)]


def make_app(service: Service, keys: Keys | None = None, body_limit: int = 64 * 2**20, page: bool = False) -> FastAPI:
    """Without ``keys`` every caller is the local one, and only requests to localhost are answered.

    page: what is not the API's is a page's, which has a log-in of its own.
    """
    engine = service.engine
    metrics = Metrics(engine)
    began = time.time()

    async def sweeping() -> None:
        while True:
            await asyncio.sleep(SWEEP)
            with suppress(UserError):
                await run_in_threadpool(service.store.sweep)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(sweeping())
        yield
        sweeper.cancel()
        await run_in_threadpool(engine.stop)
        service.store.close()

    app = FastAPI(title="lcl-adapter", lifespan=lifespan, docs_url="/docs", redoc_url=None)
    app.add_middleware(Measured, metrics=metrics)
    app.add_middleware(Gate, limit=body_limit, keys=keys, page=page)

    async def on_user_error(_: Request, error: Exception) -> JSONResponse:
        status, body, headers = answer_to(error)
        return JSONResponse(body, status, headers)

    for kind in (*CODES, Exception):
        app.add_exception_handler(kind, on_user_error)

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> JSONResponse:
        kinds = {
            401: ("authentication_error", "invalid_api_key"),
            403: ("permission_error", "forbidden"),
            404: ("invalid_request_error", "not_found"),
        }
        kind, code = kinds.get(error.status_code, ("invalid_request_error", "invalid_request"))
        headers = {"WWW-Authenticate": "Bearer"} if error.status_code == 401 else None
        return JSONResponse(fault(str(error.detail), kind, code), error.status_code, headers)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        told = [_told(one) for one in error.errors()[:5]]
        first = error.errors()[0]
        return JSONResponse(fault("; ".join(told), "invalid_request_error", "invalid_value", _where(first) or None), 400)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process is there."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """The model answers."""
        return JSONResponse({"status": "ready"}) if engine.alive else JSONResponse({"status": "the engine is not running"}, 503)

    @app.get("/metrics")
    async def read_metrics(_: Admin) -> Response:
        """Prometheus' text; of all callers, so that it needs an administrator's key."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    def named(name: str) -> dict[str, Any]:
        model = engine.find(name)
        return {"id": name, "object": "model", "created": int(model.created if model.folder else began), "owned_by": "lcl-adapter"}

    @app.get("/v1/models")
    async def models(_: Who) -> dict[str, Any]:
        return {"object": "list", "data": [named(name) for name in list(engine.models)]}

    @app.get("/v1/models/{name}")
    async def model(name: str, _: Who) -> dict[str, Any]:
        return named(name)

    @app.put("/v1/adapters/{name}")
    def load_adapter(name: api_types.Name, _: Admin) -> dict[str, Any]:
        """Load one of the runs in the server's own adapter folder; refused where it changes nothing."""
        service.load(name)
        return named(name)

    @app.delete("/v1/adapters/{name}", status_code=204)
    def unload_adapter(name: api_types.Name, _: Admin) -> None:
        service.unload(name)

    @app.put("/v1/support-sets/{name}")
    def put_set(name: api_types.Name, given: api_types.SupportSetIn, who: Who) -> api_types.SupportSetOut:
        """Store a new version; 409 where ``expected_version`` is not the newest."""
        return summary(service.put(who.namespace, name, given))

    @app.get("/v1/support-sets")
    def sets(who: Who) -> api_types.SupportSets:
        found: list[StoredSet] = []
        for name in service.store.names(who.namespace):
            with suppress(MissingError):  # removed in between
                found.append(service.store.get(who.namespace, name))
        return api_types.SupportSets(data=[summary(one) for one in found])

    @app.get("/v1/support-sets/{name}")
    def read_set(name: api_types.Name, who: Who, version: VersionAsked = None, images: bool = False) -> api_types.SupportSetWithExamples:
        return service.whole(service.store.get(who.namespace, name, version), images)

    @app.get("/v1/support-sets/{name}/versions")
    def versions(name: api_types.Name, who: Who) -> api_types.Versions:
        found = service.store.versions(who.namespace, name)
        return api_types.Versions(data=[api_types.Version(version=number, created=created) for number, created in found])

    @app.delete("/v1/support-sets/{name}", status_code=204)
    def remove_set(name: api_types.Name, who: Who, expected_version: VersionAsked = None) -> None:
        service.remove(who.namespace, name, expected_version)

    @app.post("/v1/classify")
    async def classify(given: api_types.ClassifyIn, who: Who, request: Request) -> api_types.ClassifyOut:
        """Judge images by a stored set. A broken image has its fault in its own result."""
        started: Classification = await run_in_threadpool(service.classify, who.namespace, given)
        await wait_for(started.futures, request, started.cancel, service.timeout)
        judged = started.judged()
        metrics.images.inc(sum(one.error is None for one in judged.results))
        return judged

    @app.post("/v1/chat/completions")
    async def chat(given: api_types.ChatIn, who: Who, request: Request) -> Any:
        job, speaker = await run_in_threadpool(service.chat, who.namespace, given)
        if given.stream:
            spoken = _Stream(given, job, speaker)
            engine.submit(job)
            first = await spoken.begun(request)
            return StreamingResponse(spoken.events(first), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        engine.submit(job)
        await wait_for([job.future], request, job.cancelled.set, service.timeout)
        reason = job.future.result()
        told = speaker.told(speaker.tokens) if given.logprobs else None
        return api_types.completion(given, speaker.text, reason, usage_of(job, speaker), told)

    return app


def usage_of(job: Job, speaker: Speaker) -> dict[str, int]:
    said = len(speaker.tokens)
    return {"prompt_tokens": job.read, "completion_tokens": said, "total_tokens": job.read + said}


class _Stream:
    """Text from the engine's thread to one client. The engine never waits for it: what a slow client has not read is a few kB at most."""

    def __init__(self, given: api_types.ChatIn, job: Job, speaker: Speaker) -> None:
        self.given, self.job, self.speaker = given, job, speaker
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[tuple[str, list[Token]] | None] = asyncio.Queue()
        speaker.send = lambda text, tokens: self._put((text, tokens))
        job.future.add_done_callback(lambda _: self._put(None))
        self.head = {"id": api_types.completion_id(), "object": "chat.completion.chunk", "created": int(time.time()), "model": given.model}

    def _put(self, piece: tuple[str, list[Token]] | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    async def begun(self, request: Request) -> tuple[str, list[Token]] | None:
        """The first piece; what goes wrong before it is an error with a status of its own."""
        while True:
            try:
                first = await asyncio.wait_for(self.pieces.get(), 0.5)
            except TimeoutError:
                if await request.is_disconnected():
                    self.job.cancelled.set()
                    raise GoneError("the client went away") from None
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

    async def events(self, piece: tuple[str, list[Token]] | None) -> AsyncIterator[str]:
        try:
            yield _event(api_types.chunk(self.head, {"role": "assistant", "content": ""}))
            while piece is not None:
                text, tokens = piece
                yield _event(api_types.chunk(self.head, {"content": text}, None, self.speaker.told(tokens) if self.given.logprobs else None))
                piece = await self.pieces.get()
            error = self.job.future.exception()
            if error is not None:
                yield _event(answer_to(error)[1] if isinstance(error, Exception) else fault("stopped", "server_error", None))
                return
            text, tokens = self.speaker.rest()
            if text or tokens:
                yield _event(api_types.chunk(self.head, {"content": text}, None, self.speaker.told(tokens) if self.given.logprobs else None))
            yield _event(api_types.chunk(self.head, {}, self.job.future.result()))
            if self.given.stream_options and self.given.stream_options.include_usage:
                yield _event({**self.head, "choices": [], "usage": usage_of(self.job, self.speaker)})
            yield "data: [DONE]\n\n"
        finally:
            self.job.cancelled.set()  # a client that left; a job that is done does not mind


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _where(error: Any) -> str:
    return ".".join(str(part) for part in error["loc"][1:])


def _told(error: Any) -> str:
    """Where and what, without the value: it may be a photo, or a key."""
    if error["type"] == "json_invalid":
        return "the body is not JSON"
    message = error["msg"].removeprefix("Value error, ")
    return f"{_where(error)}: {message}" if _where(error) else message
