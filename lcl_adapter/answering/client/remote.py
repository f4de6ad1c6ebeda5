"""A model behind an endpoint, used like ``predict.Predictor``: the same requests, the same replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from lcl_adapter.answering import api_types
from lcl_adapter.answering.api_types import JudgeName
from lcl_adapter.answering.client.decisions import DecisionReader, ScoreSource
from lcl_adapter.answering.client.endpoint import Endpoint
from lcl_adapter.answering.client.messages import image_of, to_messages
from lcl_adapter.answering.client.scores import log_likelihoods
from lcl_adapter.answering.faults import message_of
from lcl_adapter.answering.predict import Reply, Request, SupportTurns
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import DataError, RequestError

Messages = list[dict[str, Any]]


@dataclass
class RemotePredictor:
    """workers: requests sent at the same time. pad: make pictures square before they are sent.

    scores: where label scores come from. "auto": from the server's route for typed decisions, where it has one that reads
    photos (:mod:`lcl_adapter.answering.client.decisions`), else as "text": from the generated text and its tokens
    (:mod:`lcl_adapter.answering.client.scores`). The endpoint notes which.
    """

    endpoint: Endpoint
    model: str
    workers: int = 8
    max_new_tokens: int = 24
    pad: bool = False
    scores: ScoreSource = "auto"

    def __post_init__(self) -> None:
        self._reader = DecisionReader(self.endpoint, self.model, self.pad) if self.scores == "auto" else None

    def run(self, requests: Sequence[Request], done: Callable[[int], None] | None = None, new_tokens: int | None = None) -> list[Reply]:
        """Replies in the order of the requests.

        Requests with equal support sets are sent one after the other, so that a server's prefix cache can help.
        Raises DataError for a broken picture; EndpointError, RequestError, MissingError.
        """
        first: dict[SupportTurns, int] = {}
        order = sorted(range(len(requests)), key=lambda i: first.setdefault(requests[i][0], i))
        support_messages = lru_cache(maxsize=4 * self.workers)(lambda turns: to_messages(turns, self.pad))
        replies: dict[int, Reply] = {}
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(self._send, requests[i], support_messages, new_tokens or self.max_new_tokens) for i in order]
            try:
                for index, future in zip(order, futures, strict=True):
                    replies[index] = future.result()
                    if done:
                        done(1)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return [replies[i] for i in range(len(requests))]

    def _send(self, request: Request, support_messages: Callable[[SupportTurns], Messages], new_tokens: int) -> Reply:
        support, query, answers = request
        exact = self._reader.log_likelihoods(support, query, answers, support_messages) if answers and self._reader else None
        messages = [*support_messages(support), *to_messages([query], self.pad)]
        if exact is not None:
            return Reply(self.endpoint.chat(self.model, messages, new_tokens).text, exact)
        chat_answer = self.endpoint.chat(self.model, messages, new_tokens, scored=bool(answers))
        return Reply(chat_answer.text, log_likelihoods(answers, chat_answer.text, chat_answer.tokens) if answers else ())


def judge(
    endpoint: Endpoint,
    name: str,
    pictures: Sequence[Picture],
    model: str | None = None,
    question: str | None = None,
    version: int | None = None,
    judge: JudgeName | None = None,
) -> api_types.ClassifyOut:
    """Classify pictures by a support set that is stored on this project's server. version: the newest by default.

    judge: what decides; the server's default by default.

    The result of a picture that cannot be read here holds its error, as for one that the server cannot read. Raises
    DataError if none can be read; RequestError, MissingError, EndpointError.
    """
    images: list[str | DataError] = []
    for picture in pictures:
        try:
            images.append(image_of(picture))
        except DataError as error:
            images.append(error)
    sent = [image for image in images if isinstance(image, str)]
    if not sent:
        raise DataError(" ".join(str(error) for error in images))
    try:
        request = api_types.ClassifyIn(support_set=name, images=sent, model=model, question=question, version=version, judge=judge)
    except ValidationError as error:
        raise RequestError("; ".join(f"{detail['loc'][0]}: {message_of(detail)}" for detail in error.errors()[:3])) from error
    response = endpoint.classify(request)
    answered = iter(response.results)
    results = [next(answered) if isinstance(image, str) else _unreadable(image) for image in images]
    return response.model_copy(update={"results": results})


def _unreadable(error: DataError) -> api_types.Judgement:
    return api_types.Judgement(error=api_types.Fault(message=str(error), type="invalid_request_error"))
