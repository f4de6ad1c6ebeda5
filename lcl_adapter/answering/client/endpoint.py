"""One server by its URL: models, chat, and what this project's own server has beside them."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from lcl_adapter.answering import api_types
from lcl_adapter.answering.client.scores import TokenScore
from lcl_adapter.errors import ConflictError, EndpointError, MissingError, RequestError, did_you_mean

KEY = "LCL_API_KEY"  # an environment variable: a key on a command line can be read by everyone on the machine
TRIES = 6
BUSY = {429, 502, 503}
TOP = 20  # alternatives of a token: the most that OpenAI's API tells
Answer = TypeVar("Answer", bound=BaseModel)


@dataclass(frozen=True)
class ChatAnswer:
    """tokens: None where the server tells no log-probabilities."""

    text: str
    tokens: tuple[TokenScore, ...] | None
    reason: str | None


class Endpoint:
    """Safe to use from several threads. ``url`` with or without ``/v1``; the key is read from ``LCL_API_KEY`` where none is given.

    A server that is busy, or not there yet, is asked again, a few times and ever later. Raises EndpointError where it cannot be
    reached or does not speak this API; RequestError, MissingError, ConflictError for what it refuses.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 600, patience: float = 1.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise EndpointError(f"{url!r} is no server's address; http://127.0.0.1:8000 is one.")
        key = key or os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            # Not through a proxy that the environment names: photos and keys go to the server that was named.
            self.http = httpx2.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=False)
        except httpx2.InvalidURL as error:
            raise EndpointError(f"{url!r} is no server's address ({error}).") from error
        except UnicodeEncodeError as error:
            raise EndpointError(f"{KEY} holds characters that no key has.") from error
        self.patience = patience
        self.tells_logprobs = True

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.http.close()

    def models(self) -> list[str]:
        found = self._send("GET", "/v1/models")
        try:
            return [str(one["id"]) for one in found["data"]]
        except (KeyError, TypeError) as error:
            raise EndpointError(f"{self.url}: its list of models is not OpenAI's; is this the right server?") from error

    def model(self, name: str | None, option: str = "--model") -> str:
        """``name`` where the server has it, or its only one. Raises MissingError with the names there are.

        A name with a slash is a path or a hub's id, which `transformers serve` takes without listing it: the chat will tell.
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
        """The greedy answer; with ``scored``, its tokens' log-probabilities where the server tells them."""
        body = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0, **more}
        if scored and self.tells_logprobs:
            try:
                return _spoken(self._send("POST", "/v1/chat/completions", {**body, "logprobs": True, "top_logprobs": TOP}), self.url)
            except RequestError as error:
                if "logprobs" not in str(error):
                    raise
                self.tells_logprobs = False
        return _spoken(self._send("POST", "/v1/chat/completions", body), self.url)

    def stream(self, model: str, messages: Sequence[dict[str, Any]], max_tokens: int, **more: Any) -> Iterator[str]:
        """The greedy answer, a piece at a time; leaving off stops the server's work. Raises as :meth:`chat` does."""
        body = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0, "stream": True, **more}
        try:
            with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
                if not response.is_success:
                    response.read()
                    self._told(response)
                for line in response.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    told = json.loads(line[len("data: ") :])
                    if error := told.get("error"):
                        raise EndpointError(f"{self.url}: {error.get('message') if isinstance(error, dict) else error}")
                    yield "".join((choice.get("delta") or {}).get("content") or "" for choice in told.get("choices") or [])
        except httpx2.TransportError as error:
            raise EndpointError(f"{self.url} cannot be reached, or left in the middle of its answer ({error}).") from error
        except (ValueError, AttributeError, TypeError) as error:
            raise EndpointError(f"{self.url}: its answer is no stream of events; is this the right server?") from error

    # This project's own server

    def classify(self, request: api_types.ClassifyIn) -> api_types.ClassifyOut:
        return self._read(api_types.ClassifyOut, self._send("POST", "/v1/classify", request.model_dump(exclude_none=True)))

    def sets(self) -> list[api_types.SupportSetOut]:
        return self._read(api_types.SupportSets, self._send("GET", "/v1/support-sets")).data

    def read_set(self, name: str, images: bool = False) -> api_types.SupportSetWithExamples:
        told = self._send("GET", _set_path(name), query={"images": "true"} if images else None)
        return self._read(api_types.SupportSetWithExamples, told)

    def put_set(self, name: str, given: api_types.SupportSetIn) -> api_types.SupportSetOut:
        return self._read(api_types.SupportSetOut, self._send("PUT", _set_path(name), given.model_dump(exclude_none=True)))

    def remove_set(self, name: str) -> None:
        self._send("DELETE", _set_path(name))

    def _read(self, kind: type[Answer], told: Any) -> Answer:
        try:
            return kind.model_validate(told)
        except ValidationError as error:
            raise EndpointError(f"{self.url}: its answer is not this project's server's of this version.") from error

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None, query: dict[str, str] | None = None) -> Any:
        for turn in range(TRIES):
            last = turn == TRIES - 1
            try:
                response = self.http.request(method, path, json=body, params=query)
            except httpx2.TimeoutException as error:
                raise EndpointError(f"{self.url}: no answer within {self.http.timeout.read:.0f} s.") from error
            except httpx2.TransportError as error:
                cut_off = not isinstance(error, httpx2.ConnectError)  # it may have been done: a second writing would be told as another's
                if last or (cut_off and method not in {"GET", "POST"}):
                    raise EndpointError(f"{self.url} cannot be reached ({error}). Is the server running there?") from error
                time.sleep(self.patience * 2**turn / 8)
                continue
            if response.status_code in BUSY and not last:
                asked = response.headers.get("Retry-After", "")
                time.sleep(self.patience * (min(60, int(asked)) if asked.isdigit() else 2**turn / 2))
                continue
            return self._told(response)
        raise AssertionError

    def _told(self, response: httpx2.Response) -> Any:
        status = response.status_code
        if response.is_success:
            try:
                return response.json() if response.content else None
            except ValueError as error:
                raise EndpointError(f"{self.url}: its answer is not JSON; is this the right server?") from error
        message = _message(response)
        if status in {401, 403}:
            raise EndpointError(f"{self.url} refuses the key ({message}). Put the right one into {KEY}.")
        if status == 404:
            raise MissingError(f"{self.url}{response.request.url.path}: {message}")
        if status == 409:
            raise ConflictError(message)
        if 400 <= status < 500 and status != 429:
            raise RequestError(f"{self.url}: {message}")
        raise EndpointError(f"{self.url} answers {status}: {message}")


def _set_path(name: str) -> str:
    """Raises RequestError: a slash or a question mark in a name would make another route of it, or another set."""
    if not re.fullmatch(api_types.SET_NAME, name):
        raise RequestError(f"{name!r} is no name for a support set: letters, digits, dots, dashes and underscores, 64 at most.")
    return f"/v1/support-sets/{name}"


def _message(response: httpx2.Response) -> str:
    """What the server says is wrong, in whichever of the usual shapes, at most a few lines of it."""
    try:
        told = response.json()
    except ValueError:
        return response.text[:300] or response.reason_phrase
    error = told.get("error", told.get("detail", told)) if isinstance(told, dict) else told
    return str(error.get("message", error) if isinstance(error, dict) else error)[:600]


def _spoken(told: Any, url: str) -> ChatAnswer:
    try:
        choice = told["choices"][0]
        text = choice["message"]["content"] or ""
        listed = (choice.get("logprobs") or {}).get("content")
        tokens = tuple(
            TokenScore(t["token"], t["logprob"], tuple((o["token"], o["logprob"]) for o in t.get("top_logprobs") or ())) for t in listed or ()
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise EndpointError(f"{url}: its answer is not a chat completion; is this the right server?") from error
    return ChatAnswer(text.strip(), tokens or None, choice.get("finish_reason"))
