"""A server, by its URL: models and chat, and the support sets and classification of this project's own server."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2
from pydantic import BaseModel, ValidationError

from lcl_adapter import reading
from lcl_adapter.answering import api_types
from lcl_adapter.answering.client.scores import TokenScore
from lcl_adapter.errors import ConflictError, EndpointError, MissingError, RequestError, UserError, did_you_mean
from lcl_adapter.terminal import show_notes

KEY = "LCL_API_KEY"  # an environment variable, because everyone on the machine can read a command line
TRIES = 6
BUSY = {429, 502, 503}
TOP_LOGPROBS = 20  # alternatives to a token: the most that OpenAI's API gives
Answer = TypeVar("Answer", bound=BaseModel)


@dataclass(frozen=True)
class ChatAnswer:
    """tokens: None if the server gives no log-probabilities. reason: why the answer ended, as OpenAI's API names it."""

    text: str
    tokens: tuple[TokenScore, ...] | None
    reason: str | None


class Endpoint:
    """Safe to use from several threads.

    url: with or without ``/v1``. key: read from ``LCL_API_KEY`` if None. timeout: seconds for one response. patience: a
    factor on the waiting times between retries.

    A request to a server that is busy or not reachable yet is sent again a few times, after longer and longer waits.
    Methods raise EndpointError if the server cannot be reached or does not have this API, and RequestError, MissingError
    or ConflictError if it refuses the request.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 600, patience: float = 1.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise EndpointError(f"{url!r} is no server's address; write it like http://127.0.0.1:8000.")
        key = key or os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            # trust_env=False: photos and keys go to the named server, and not through a proxy from the environment.
            self.http = httpx2.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=False)
        except httpx2.InvalidURL as error:
            raise EndpointError(f"{url!r} is no server's address ({error}).") from error
        except UnicodeEncodeError as error:
            raise EndpointError(f"{KEY} has characters that a key cannot have; use ASCII letters and digits.") from error
        self.patience = patience
        self.supports_logprobs = True
        self.notes: list[str] = []  # what a user should know about the answers; each is printed once

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.http.close()

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)
            show_notes([line])

    def models(self) -> list[str]:
        """Names of the models on the server."""
        return [name for name, _ in self._models()]

    def is_own(self) -> bool:
        """Whether the server is one of this project."""
        try:
            return any(owner == "lcl-adapter" for _, owner in self._models())
        except UserError:  # the list of models is no part of what is asked about
            return False

    def _models(self) -> list[tuple[str, str]]:
        """The name and the owner of each model on the server."""
        listed = self._send("GET", "/v1/models")
        try:
            return [(str(model["id"]), str(model.get("owned_by"))) for model in listed["data"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise EndpointError(f"{self.url}: its list of models does not have OpenAI's form; is this the right server?") from error

    def model(self, name: str | None, option: str = "--model") -> str:
        """``name`` if the server has it, or its only model. Raises MissingError with the names on the server.

        A name with a slash is a path or a hub's id. `transformers serve` accepts those without listing them, so they are
        not checked here.
        """
        if name is not None and "/" in name:
            return name
        known = self.models()
        if name in known:
            return str(name)
        if name is None and len(known) == 1:
            return known[0]
        listed = ", ".join(known[:20]) or "none"
        if name is None:
            raise MissingError(f"{self.url} serves {listed}; choose one with {option}.")
        raise MissingError(f"{self.url} serves no model {name!r}{did_you_mean(name, known)}; it has {listed}.")

    def chat(self, model: str, messages: Sequence[dict[str, Any]], max_tokens: int, scored: bool = False, **more: Any) -> ChatAnswer:
        """The greedy answer. scored: also its tokens' log-probabilities, if the server supports them."""
        body = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0, **more}
        if scored and self.supports_logprobs:
            try:
                return _chat_answer(self._send("POST", "/v1/chat/completions", {**body, "logprobs": True, "top_logprobs": TOP_LOGPROBS}), self.url)
            except RequestError as error:
                if "logprobs" not in str(error):
                    raise
                self.supports_logprobs = False
        return _chat_answer(self._send("POST", "/v1/chat/completions", body), self.url)

    def stream(self, model: str, messages: Sequence[dict[str, Any]], max_tokens: int, **more: Any) -> Iterator[str]:
        """The greedy answer, piece by piece.

        Closing the iterator stops the server's work. Raises as :meth:`chat` does.
        """
        body = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0, "stream": True, **more}
        try:
            with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
                if not response.is_success:
                    response.read()
                    self._content(response)
                for line in response.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = reading.parse_json(line[len("data: ") :])
                    if error := event.get("error"):
                        raise EndpointError(f"{self.url}: {error.get('message') if isinstance(error, dict) else error}")
                    yield "".join((choice.get("delta") or {}).get("content") or "" for choice in event.get("choices") or [])
        except httpx2.TransportError as error:
            raise EndpointError(f"{self.url} cannot be reached, or closed the connection during its answer ({error}).") from error
        except (ValueError, AttributeError, TypeError) as error:
            raise EndpointError(f"{self.url}: its answer is not a stream of events; is this the right server?") from error

    def decide(self, body: dict[str, Any]) -> Any:
        """The response to a request for typed decisions (``answering/decisions.py``)."""
        return self._send("POST", "/v1/systemone", body)

    # Only on this project's own server

    def classify(self, request: api_types.ClassifyIn) -> api_types.ClassifyOut:
        return self._read(api_types.ClassifyOut, self._send("POST", "/v1/classify", request.model_dump(exclude_none=True)))

    def sets(self) -> list[api_types.SupportSetOut]:
        return self._read(api_types.SupportSets, self._send("GET", "/v1/support-sets")).data

    def read_set(self, name: str, images: bool = False, version: int | None = None) -> api_types.SupportSetWithExamples:
        query = {**({"images": "true"} if images else {}), **({"version": str(version)} if version else {})}
        return self._read(api_types.SupportSetWithExamples, self._send("GET", _set_path(name), query=query or None))

    def put_set(self, name: str, support_set: api_types.SupportSetIn) -> api_types.SupportSetOut:
        return self._read(api_types.SupportSetOut, self._send("PUT", _set_path(name), support_set.model_dump(exclude_none=True)))

    def add_photo(self, name: str, photo: api_types.PhotoIn) -> api_types.SupportSetOut:
        """The set with one more photo, as its new version."""
        body = photo.model_dump(exclude_none=True)
        return self._read(api_types.SupportSetOut, self._send("POST", f"{_set_path(name)}/photos", body, once=True))

    def drop_photo(self, name: str, number: int, expected_version: int | None = None) -> api_types.SupportSetOut:
        """The set without one photo, as its new version. number: the photo's place in the set, from 0."""
        query = {"expected_version": str(expected_version)} if expected_version is not None else None
        return self._read(api_types.SupportSetOut, self._send("DELETE", f"{_set_path(name)}/photos/{number}", query=query))

    def remove_set(self, name: str) -> None:
        self._send("DELETE", _set_path(name))

    def load_adapter(self, name: str) -> None:
        """Load a run of the server's adapter folder. A server that needs longer than its time limit is asked again."""
        self._send("PUT", _path_of("adapters", name, "an adapter"), repeatable=True)

    def _read(self, kind: type[Answer], content: Any) -> Answer:
        try:
            return kind.model_validate(content)
        except ValidationError as error:
            raise EndpointError(f"{self.url}: its answer is not that of lcl-adapter's server in this version.") from error

    def _send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        query: dict[str, str] | None = None,
        repeatable: bool = False,
        once: bool = False,
    ) -> Any:
        """The JSON of the response; retries while the server is busy.

        repeatable: a PUT with the same effect and answer when it is sent again, also after the server's time limit. once: a POST
        that changes something.
        """
        busy = BUSY | {504} if repeatable else BUSY
        for attempt in range(TRIES):
            last = attempt == TRIES - 1
            try:
                response = self.http.request(method, path, json=body, params=query)
            except httpx2.TimeoutException as error:
                raise EndpointError(f"{self.url}: no answer within {self.http.timeout.read:.0f} s.") from error
            except httpx2.TransportError as error:
                # A PUT or DELETE may have been done before the connection broke. Sent again, it would end in a
                # conflict.
                may_be_done = not isinstance(error, httpx2.ConnectError) and (once or method not in {"GET", "POST"}) and not repeatable
                if last or may_be_done:
                    raise EndpointError(f"{self.url} cannot be reached ({error}). Is the server running?") from error
                time.sleep(self.patience * 2**attempt / 8)
                continue
            if response.status_code in busy and not last:
                retry_after = response.headers.get("Retry-After", "")
                time.sleep(self.patience * (min(60, int(retry_after)) if retry_after.isdigit() else 2**attempt / 2))
                continue
            return self._content(response)
        raise AssertionError

    def _content(self, response: httpx2.Response) -> Any:
        """The JSON of a successful response. Raises the error that fits the status of any other."""
        status = response.status_code
        if response.is_success:
            try:
                return response.json() if response.content else None
            except ValueError as error:
                raise EndpointError(f"{self.url}: its answer is not JSON; is this the right server?") from error
        message = _error_message(response)
        if status in {401, 403}:
            raise EndpointError(f"{self.url} refuses the key ({message}). Set {KEY} to a valid key.")
        if status == 404:
            raise MissingError(f"{self.url}{response.request.url.path}: {message}")
        if status == 409:
            raise ConflictError(message)
        if 400 <= status < 500 and status != 429:
            raise RequestError(f"{self.url}: {message}")
        raise EndpointError(f"{self.url} answers {status}: {message}")


def _set_path(name: str) -> str:
    return _path_of("support-sets", name, "a support set")


def _path_of(kind: str, name: str, noun: str) -> str:
    """Raises RequestError for an invalid name: a slash or a question mark in it would lead to another route."""
    name = api_types.normalized_name(name)
    if not re.fullmatch(api_types.SET_NAME, name):
        raise RequestError(f"{name!r} is no name for {noun}: {api_types.SET_NAME_RULE}.")
    return f"/v1/{kind}/{quote(name)}"


def _error_message(response: httpx2.Response) -> str:
    """The server's error message, in any of the usual forms, shortened to a few lines."""
    try:
        content = response.json()
    except ValueError:
        return response.text[:300] or response.reason_phrase
    error = content.get("error", content.get("detail", content)) if isinstance(content, dict) else content
    return str(error.get("message", error) if isinstance(error, dict) else error)[:600]


def _chat_answer(completion: Any, url: str) -> ChatAnswer:
    """Raises EndpointError if the JSON is no chat completion."""
    try:
        choice = completion["choices"][0]
        text = choice["message"]["content"] or ""
        logprobs = (choice.get("logprobs") or {}).get("content") or ()
        tokens = tuple(TokenScore(t["token"], t["logprob"], tuple((o["token"], o["logprob"]) for o in t.get("top_logprobs") or ())) for t in logprobs)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise EndpointError(f"{url}: its answer is not a chat completion; is this the right server?") from error
    return ChatAnswer(text.strip(), tokens or None, choice.get("finish_reason"))
