"""Requests and responses of the HTTP API: the supported part of OpenAI's chat types, and this project's types for
support sets.

Server and client share them. Unknown fields are refused: a misspelt one would otherwise be ignored without notice.
"""

from __future__ import annotations

import base64
import time
import unicodedata
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SET_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
MAX_LABEL_LENGTH = 200
MAX_TEXT_LENGTH = 32_000
MAX_TURNS = 512
MAX_IMAGES = 256
MAX_VERSION = 2**53

Name = Annotated[str, Field(pattern=SET_NAME)]
Text = Annotated[str, Field(max_length=MAX_TEXT_LENGTH)]
Question = Annotated[str, Field(min_length=1, max_length=500)]


class ApiModel(BaseModel):
    """A JSON object that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def normalized_label(label: str) -> str:
    """Equal for two labels that look the same to a reader: without case, width (Unicode NFKC) and extra spaces."""
    return " ".join(unicodedata.normalize("NFKC", label).casefold().split())


class LabelledImage(ApiModel):
    label: str = Field(min_length=1, max_length=MAX_LABEL_LENGTH)
    image: str = Field(description="data:image/png;base64,…")

    @field_validator("label")
    @classmethod
    def _one_line(cls, label: str) -> str:
        label = " ".join(label.split())
        if not label or any(unicodedata.category(c).startswith("C") for c in label):
            raise ValueError("a label is one line of visible text")
        return label


class SupportSetIn(ApiModel):
    """A support set to store.

    expected_version: the version that the client read last, 0 for a new set. Storing over another version is refused.
    If it is left out, the last write wins.
    """

    examples: list[LabelledImage] = Field(min_length=2, max_length=MAX_IMAGES)
    question: Question | None = None
    expected_version: int | None = Field(default=None, ge=0, le=MAX_VERSION)

    @model_validator(mode="after")
    def _labels(self) -> SupportSetIn:
        labels = list(dict.fromkeys(example.label for example in self.examples))
        if len(labels) < 2:
            raise ValueError(f"all examples are {labels[0]!r}; a judgement needs at least two labels")
        spellings: dict[str, str] = {}
        for label in labels:
            other = spellings.setdefault(normalized_label(label), label)
            if other != label:
                raise ValueError(f"the labels {other!r} and {label!r} differ only in case or width; use one spelling")
        return self


class SupportSetOut(ApiModel):
    name: str
    version: int
    created: float
    labels: dict[str, int] = Field(description="number of examples of each label")
    question: str | None = None


class StoredExample(ApiModel):
    label: str
    sha256: str
    image: str | None = None


class SupportSetWithExamples(SupportSetOut):
    examples: list[StoredExample]


class SupportSets(ApiModel):
    object: Literal["list"] = "list"
    data: list[SupportSetOut]


class Version(ApiModel):
    version: int
    created: float


class Versions(ApiModel):
    object: Literal["list"] = "list"
    data: list[Version]


class ClassifyIn(ApiModel):
    support_set: Name
    images: list[str] = Field(min_length=1, max_length=MAX_IMAGES)
    model: str | None = None
    version: int | None = Field(default=None, ge=1, le=MAX_VERSION)
    question: Question | None = None


class Fault(ApiModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class SimilarExample(ApiModel):
    """The photo of the set that is most similar to the query, by the vision tower.

    example: its index among the examples.
    """

    example: int
    label: str
    cosine: float


class Judgement(ApiModel):
    """The result for one image.

    label: the likeliest label, None if the image is none of these. nearest: the likeliest label in every case. margin:
    the difference between the two highest probabilities.
    """

    label: str | None = None
    nearest: str | None = None
    probabilities: dict[str, float] = {}
    margin: float = 0.0
    none_of_these: bool = False
    familiarity: float = Field(default=0.0, description="similarity to the set's photos; below the set's threshold the image is none of these")
    most_alike: SimilarExample | None = None
    error: Fault | None = None


class CalibrationOut(ApiModel):
    temperature: float
    threshold: float | None
    left_out: int = Field(description="photos of the set that were classified by the other photos")
    right: int


class ClassifyOut(ApiModel):
    object: Literal["classification"] = "classification"
    model: str
    support_set: str
    version: int
    calibration: CalibrationOut
    judge: Literal["model", "both"] = Field("model", description="what decided: the model's scores, or model and tower with the adapter's weights")
    results: list[Judgement]


class ImageUrl(ApiModel):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(ApiModel):
    type: Literal["text"]
    text: Text


class ImagePart(ApiModel):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(ApiModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=2 * MAX_IMAGES)]
    name: str | None = None
    refusal: None = None

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else list(self.content)


class StreamOptions(ApiModel):
    include_usage: bool = False


class ChatIn(ApiModel):
    """OpenAI's chat request. A setting that is not supported is refused, not ignored."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_TURNS)
    support_set: Name | None = None
    support_set_version: int | None = Field(default=None, ge=1, le=MAX_VERSION)
    max_tokens: int | None = Field(default=None, ge=1, le=4096)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=4096)
    temperature: float = Field(default=0.0, ge=0, le=2, description="0 by default, where OpenAI has 1: a classification must not be random")
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: Literal[1] = 1
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    presence_penalty: float = Field(default=0, ge=0, le=0)
    frequency_penalty: float = Field(default=0, ge=0, le=0)
    response_format: dict[str, Any] | None = None
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _supported(self) -> ChatIn:
        if sum(len(part.text) for message in self.messages for part in message.parts if isinstance(part, TextPart)) > 4 * MAX_TEXT_LENGTH:
            raise ValueError(f"messages: more than {4 * MAX_TEXT_LENGTH:,} characters of text in all")
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        if self.response_format not in (None, {"type": "text"}):
            raise ValueError("response_format: only text is supported")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if any(not text or len(text) > 100 for text in self.stops) or len(self.stops) > 4:
            raise ValueError("stop: at most four texts of 1 to 100 characters")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def token_limit(self) -> int:
        return self.max_completion_tokens or self.max_tokens or 256


def data_url(data: bytes) -> str:
    """An image file's bytes as a URL. The media type is read from the first bytes."""
    types = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tiff", b"MM\0*": "tiff"}
    media_type = next((name for head, name in types.items() if data.startswith(head)), "png")
    return f"data:image/{media_type};base64,{base64.b64encode(data).decode()}"


def completion_id() -> str:
    return f"chatcmpl-{uuid4().hex[:24]}"


def completion(request: ChatIn, text: str, reason: str, usage: dict[str, int], logprobs: list[dict[str, Any]] | None) -> dict[str, Any]:
    """OpenAI's chat completion, as one object."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
        "finish_reason": reason,
    }
    head = {"id": completion_id(), "object": "chat.completion", "created": int(time.time()), "model": request.model}
    return {**head, "choices": [choice], "usage": usage}


def chunk(head: dict[str, Any], delta: dict[str, Any], reason: str | None = None, logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """One event of OpenAI's streamed chat completion."""
    choice_logprobs = None if logprobs is None else {"content": logprobs, "refusal": None}
    return {**head, "choices": [{"index": 0, "delta": delta, "logprobs": choice_logprobs, "finish_reason": reason}]}
