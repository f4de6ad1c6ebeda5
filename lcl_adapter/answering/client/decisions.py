"""Exact label probabilities from a server's route for typed decisions, ``POST /v1/systemone``, where it reads photos.

This project's server reads the conversation, and scores the labels in it as the predictor does. Other servers read one
message: the labelled photos with their answers, the new photo, and the labels as options with letters. What they read is
then another prompt than in a chat.

Not every server with the route reads photos: vLLM 0.32 reads texts alone, and ignores what it does not know. So a server
is asked about a picture first, once with it and once without.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Literal

from PIL import Image

from lcl_adapter.answering.client.endpoint import Endpoint
from lcl_adapter.answering.client.messages import image_of, to_messages
from lcl_adapter.answering.predict import SupportTurns
from lcl_adapter.answering.sent_images import data_url
from lcl_adapter.base.families import IMAGE
from lcl_adapter.data.conversations import Turn
from lcl_adapter.errors import EndpointError, MissingError, RequestError, UserError

ROUTE = "/v1/systemone"
LEAST_PROBABILITY = 1e-300  # its logarithm is a number
ScoreSource = Literal["auto", "text"]
Kind = Literal["own", "other"]
Encode = Callable[[SupportTurns], list[dict[str, Any]]]


@dataclass
class DecisionReader:
    """Reads label probabilities for one model of a server. Safe to use from several threads.

    pad: make pictures square before they are sent.
    """

    endpoint: Endpoint
    model: str
    pad: bool = False
    _kind: Kind | None = None
    _checked: bool = False
    _refused: set[tuple[int, int]] = field(default_factory=set)  # numbers of pictures and of labels
    _lock: Lock = field(default_factory=Lock)

    def log_likelihoods(self, support: SupportTurns, query: Turn, answers: Sequence[str], support_messages: Encode) -> tuple[float, ...] | None:
        """The logarithms of the answers' probabilities. None where the server cannot give them; the endpoint notes why.

        Raises DataError for a broken picture, EndpointError.
        """
        size = (sum(len(turn.pictures) for turn in (*support, query)), len(answers))
        kind = self.kind()
        if kind is None or size in self._refused or len(set(answers)) < len(answers):
            return None
        question: dict[str, Any] = {"type": "choice", "criteria": dict.fromkeys(answers)}
        if kind == "own":
            body: dict[str, Any] = {"state": {"messages": [*support_messages(support), *to_messages([query], self.pad)]}}
        else:
            text, instructions, assets = one_message(support, query, self.pad)
            body = {"state": text, **({"assets": assets} if assets else {})}
            question["instructions"] = instructions
        try:
            answer = self._decide(body, question)["answer"]
        except (MissingError, RequestError) as error:
            self._refused.add(size)
            what = f"with {size[0]} photos and {size[1]} labels" if isinstance(error, RequestError) else ""
            self.endpoint.note(
                f"label scores {what + ' ' if what else ''}are read from the generated text: {ROUTE} of the server refuses them ({error})"
            )
            return None
        try:
            return tuple(math.log(max(LEAST_PROBABILITY, float(answer["probabilities"][name]))) for name in answers)
        except (KeyError, TypeError, ValueError) as error:
            raise EndpointError(f"{self.endpoint.url}{ROUTE}: its answer has no probability for each label; is this the right server?") from error

    def kind(self) -> Kind | None:
        """Whether the route is there and reads photos, and whose it is. Asks the server once, and notes the result."""
        with self._lock:
            if not self._checked:
                self._kind = self._check()
                self._checked = True
        return self._kind

    def _check(self) -> Kind | None:
        if self.endpoint.is_own():
            self.endpoint.note(f"label scores are exact probabilities, from {self.endpoint.url}{ROUTE}")
            return "own"
        question = {"type": "choice", "instructions": "What is in the image?", "criteria": {"a part": None, "nothing": None}}
        body: dict[str, Any] = {"state": "<photo-1>"}
        try:
            with_photo = self._decide({**body, "assets": {"<photo-1>": _asset(_small_picture())}}, question)
            without = self._decide(body, question)
            reads_photos = with_photo["tokens"] != without["tokens"]
        except UserError as error:
            self.endpoint.note(f"label scores are read from the generated text: the server has no {ROUTE} for this model ({error})")
            return None
        if not reads_photos:
            self.endpoint.note(f"label scores are read from the generated text: {ROUTE} of the server reads no photos")
            return None
        self.endpoint.note(
            f"label scores are exact probabilities, from {self.endpoint.url}{ROUTE}: of letters, after one message with all photos; "
            "`--scores text` reads them from the chat's text instead"
        )
        return "other"

    def _decide(self, body: dict[str, Any], question: dict[str, Any]) -> dict[str, Any]:
        """The answer to one question, and how many tokens the server read."""
        content = self.endpoint.decide({"model": self.model, **body, "questions": {"label": question}})
        try:
            return {"answer": content["answers"]["label"], "tokens": content["usage"]["input_tokens"]}
        except (KeyError, TypeError) as error:
            raise EndpointError(f"{self.endpoint.url}{ROUTE}: its answer is not that of this route; is this the right server?") from error


def one_message(support: Sequence[Turn], query: Turn, pad: bool = False) -> tuple[str, str, dict[str, dict[str, str]]]:
    """Turns as a state, the question about it, and its images.

    Photos are numbered in the text, because many a prompt puts all photos before it.
    """
    name = "photo"
    while any(f"<{name}-" in turn.text for turn in (*support, query)):
        name += "_"
    assets: dict[str, dict[str, str]] = {}

    def written(turn: Turn) -> str:
        places = []
        for picture in turn.pictures:
            key = f"<{name}-{len(assets) + 1}>"
            assets[key] = _asset(image_of(picture, pad))
            places.append(f"Image {len(assets)}: {key}")
        if not turn.further:
            return "\n".join([*places, turn.text])
        first, *rest = turn.text.split(IMAGE)
        return first + "".join(place + text for place, text in zip(places, rest, strict=True))

    blocks = [written(turn) for turn in support]
    examples = ["\n".join(blocks[start : start + 2]) for start in range(0, len(blocks), 2)]
    return "\n\n".join(examples), written(query), assets


def _asset(url: str) -> dict[str, str]:
    head, _, data = url.partition(",")
    return {"type": "image", "format": head.removeprefix("data:image/").partition(";")[0], "data_base64": data}


def _small_picture() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 60, 40)).save(buffer, "PNG")
    return data_url(buffer.getvalue())
