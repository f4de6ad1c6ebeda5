"""Requests and responses of the HTTP API: the supported part of OpenAI's chat types, and this project's types for
support sets.

Server and client share them. Unknown fields are refused: a misspelt one would otherwise be ignored without notice.
"""

from __future__ import annotations

import json
import re
import time
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol
from uuid import uuid4

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

SET_NAME = r"^\w[\w.-]{0,63}$"  # letters of any script
SET_NAME_RULE = "letters of any script, digits, dots, dashes and underscores, at most 64, a letter or digit first"
MAX_LABEL_LENGTH = 200
MAX_TEXT_LENGTH = 32_000
MAX_TURNS = 512
MAX_IMAGES = 256
MAX_VERSION = 2**53
MAX_MODEL_NAME = 200
MAX_STOPS = 4
MAX_ITEMS = 1024  # of any list or object in a request
MAX_UNKNOWN = 5  # unknown fields that an error names


def normalized_name(name: Any) -> Any:
    """A set's name in one form of Unicode: a Mac types it in another."""
    return unicodedata.normalize("NFC", name) if isinstance(name, str) else name


def checked_name(name: str) -> str:
    """Raises ValueError for a name that no route of the server could reach."""
    if not re.fullmatch(SET_NAME, name):
        raise ValueError(f"not a valid name: {SET_NAME_RULE}")
    return name


Name = Annotated[str, BeforeValidator(normalized_name), AfterValidator(checked_name), Field(json_schema_extra={"pattern": SET_NAME})]
Text = Annotated[str, Field(max_length=MAX_TEXT_LENGTH)]
Question = Annotated[str, Field(min_length=1, max_length=500)]
ModelName = Annotated[str, Field(max_length=MAX_MODEL_NAME)]
JudgeName = Literal["model", "tower", "both"]


class ApiModel(BaseModel):
    """A JSON object that refuses unknown fields. Null means "not given", and so does the neutral value of a field that is not
    supported: clients send both.

    neutral: field -> the values that change nothing. Others are refused.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_values(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = cls.model_fields.keys() | cls.neutral.keys()  # once: pydantic makes the fields anew at each look
        unknown = [key for key in values if key not in known]
        if len(unknown) > MAX_UNKNOWN:  # each would be an error of its own
            named = ", ".join(str(key)[:40] for key in unknown[:MAX_UNKNOWN])
            raise ValueError(f"{len(unknown):,} unknown fields: {named}, …")
        for key, value in values.items():
            if isinstance(value, list | dict) and len(value) > MAX_ITEMS:
                raise ValueError(f"{str(key)[:40]}: {len(value):,} items; at most {MAX_ITEMS:,} are allowed")
        for key, allowed in cls.neutral.items():
            if key in values and values[key] is not None and allowed and not any(_same(values[key], one) for one in allowed):
                raise ValueError(f"{key}: only {' or '.join(json.dumps(one) for one in allowed)} is supported")
        required = {key for key, field in cls.model_fields.items() if field.is_required()}
        return {key: value for key, value in values.items() if key not in cls.neutral and (value is not None or key in required)}


def _same(value: Any, allowed: Any) -> bool:
    """Equal, and not a number where true or false is meant."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


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


class Labelled(Protocol):
    @property
    def label(self) -> str: ...


def check_labels(examples: Sequence[Labelled]) -> None:
    """Raises ValueError unless there are two labels or more, and each has one spelling."""
    labels = list(dict.fromkeys(example.label for example in examples))
    if len(labels) < 2:
        raise ValueError(f"all examples are {labels[0]!r}; a judgement needs at least two labels")
    spellings: dict[str, str] = {}
    for label in labels:
        other = spellings.setdefault(normalized_label(label), label)
        if other != label:
            raise ValueError(f"the labels {other!r} and {label!r} differ only in case or width; use one spelling")


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
        check_labels(self.examples)
        return self


class PhotoIn(LabelledImage):
    """A photo for a stored set. expected_version: the version that the client read last; another one is refused."""

    expected_version: int | None = Field(default=None, ge=1, le=MAX_VERSION)


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
    model: ModelName | None = None
    version: int | None = Field(default=None, ge=1, le=MAX_VERSION)
    question: Question | None = None
    judge: JudgeName | None = Field(None, description="by default model and tower, where the adapter has weights for them")


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
    judge: JudgeName = Field("model", description="what decided: the model's scores, the tower's likeness, or both with the adapter's weights")
    parts: int = Field(1, description="in how many parts the set was read; a score is the mean of theirs")
    results: list[Judgement]


PART_HINTS: Mapping[str, tuple[Any, ...]] = {"cache_control": (), "uuid": ()}  # hints for other servers' caches: any value


class ImageUrl(ApiModel):
    neutral = {"detail": ()}

    url: str


class TextPart(ApiModel):
    neutral = PART_HINTS

    type: Literal["text"]
    text: Text


class ImagePart(ApiModel):
    neutral = PART_HINTS

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(ApiModel):
    """A message as clients write it, or as they hand a reply back whole."""

    neutral = {"refusal": ("",), "tool_calls": ([],), "annotations": ([],), "audio": ({},), "reasoning": (), "reasoning_content": (), "id": ()}

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=2 * MAX_IMAGES)]
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _readable(cls, content: Any) -> Any:
        """Says what is wrong with a content before the alternatives of its type are tried one by one."""
        if isinstance(content, str):
            if len(content) > MAX_TEXT_LENGTH:
                raise ValueError(f"a text of {len(content):,} characters; at most {MAX_TEXT_LENGTH:,} are allowed")
            return content
        if not isinstance(content, list) or not content:
            raise ValueError("a text, or a list of parts, is expected")
        return [_readable_part(part, number) for number, part in enumerate(content)]

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else list(self.content)


def _readable_part(part: Any, number: int) -> Any:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    if not isinstance(kind, str) or kind not in {"text", "image_url"}:
        responses = '; "input_text" and "input_image" are of the Responses API' if str(kind).startswith("input_") else ""
        raise ValueError(f"part {number} has the type {str(kind)[:40]!r}; text and image_url are supported{responses}")
    if isinstance(part, dict) and isinstance(part.get("image_url"), str):
        return {**part, "image_url": {"url": part["image_url"]}}
    if isinstance(part, dict) and kind == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f"part {number} has no text")
    return part


class StreamOptions(ApiModel):
    neutral = {"include_obfuscation": (), "continuous_usage_stats": (False,)}

    include_usage: bool = False


NOT_SUPPORTED: Mapping[str, tuple[Any, ...]] = {  # of OpenAI's and vLLM's fields: field -> the values that change nothing
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "top_k": (-1, 0),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "reasoning_effort": ("none", "minimal"),
    "verbosity": ("low", "medium"),
    "service_tier": ("auto", "default"),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "skip_special_tokens": (True,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "echo": (False,),
    "prompt_cache_key": (),  # names for the provider's own books: any value
    "prompt_cache_retention": (),
    "safety_identifier": (),
}


class ChatIn(ApiModel):
    """OpenAI's chat request. A setting that is not supported is refused, not ignored."""

    neutral = NOT_SUPPORTED

    model: ModelName
    messages: list[Message] = Field(min_length=1, max_length=MAX_TURNS)
    support_set: Name | None = None
    support_set_version: int | None = Field(default=None, ge=1, le=MAX_VERSION)
    max_tokens: int | None = Field(default=None, ge=1, le=4096)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=4096)
    temperature: float = Field(default=0.0, ge=0, le=2, description="0 by default, where OpenAI has 1: a classification must not be random")
    top_p: float = Field(default=1.0, gt=0, le=1)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    response_format: dict[str, Any] | None = None
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, str | int | float | bool | None] | None = Field(default=None, max_length=16)

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
        if any(not text or len(text) > 100 for text in self.stops) or len(self.stops) > MAX_STOPS:
            raise ValueError("stop: at most four texts of 1 to 100 characters")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def token_limit(self) -> int:
        return self.max_completion_tokens or self.max_tokens or 256


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
