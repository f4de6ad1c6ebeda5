"""A model behind an endpoint, asked as ``predict.Predictor`` is: the same requests, the same replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from lcl_adapter.answering import api_types
from lcl_adapter.answering.client.endpoint import Endpoint
from lcl_adapter.answering.client.messages import image_of, to_messages
from lcl_adapter.answering.client.scores import log_likelihoods
from lcl_adapter.answering.predict import Reply, Request
from lcl_adapter.data.conversations import Turn
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import DataError, RequestError


@dataclass
class RemotePredictor:
    """workers: requests under way at a time. pad: pictures are made square before they are sent.

    Label scores are what :mod:`lcl_adapter.answering.client.scores` makes of the tokens told.
    """

    endpoint: Endpoint
    model: str
    workers: int = 8
    max_new_tokens: int = 24
    pad: bool = False

    def run(self, requests: Sequence[Request], done: Callable[[int], None] | None = None, new_tokens: int | None = None) -> list[Reply]:
        """Replies in the order of the requests. Equal support sets are asked after each other, so that a server's prefix cache has them.

        Raises DataError for a broken picture; EndpointError, RequestError, MissingError.
        """
        first: dict[tuple[Turn, ...], int] = {}
        order = sorted(range(len(requests)), key=lambda i: first.setdefault(requests[i][0], i))
        told = lru_cache(maxsize=4 * self.workers)(lambda turns: to_messages(turns, self.pad))
        replies: dict[int, Reply] = {}
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(self._one, requests[i], told, new_tokens or self.max_new_tokens) for i in order]
            try:
                for index, future in zip(order, futures, strict=True):
                    replies[index] = future.result()
                    if done:
                        done(1)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return [replies[i] for i in range(len(requests))]

    def _one(self, request: Request, told: Callable[[tuple[Turn, ...]], list[dict[str, Any]]], new_tokens: int) -> Reply:
        support, query, answers = request
        spoken = self.endpoint.chat(self.model, [*told(support), *to_messages([query], self.pad)], new_tokens, scored=bool(answers))
        return Reply(spoken.text, log_likelihoods(answers, spoken.text, spoken.tokens) if answers else ())


def judge(endpoint: Endpoint, name: str, pictures: Sequence[Picture], model: str | None = None, question: str | None = None) -> api_types.ClassifyOut:
    """Pictures by a set that this project's own server keeps; one that cannot be read here has its fault in its own result, as there.

    Raises DataError where none can be read; RequestError, MissingError, EndpointError.
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
        request = api_types.ClassifyIn(support_set=name, images=sent, model=model, question=question)
    except ValidationError as error:
        raise RequestError("; ".join(f"{one['loc'][0]}: {one['msg']}" for one in error.errors()[:3])) from error
    found = endpoint.classify(request)
    judged, kind = iter(found.results), "invalid_request_error"
    results = [
        next(judged) if isinstance(image, str) else api_types.Judgement(error=api_types.Fault(message=str(image), type=kind)) for image in images
    ]
    return found.model_copy(update={"results": results})
