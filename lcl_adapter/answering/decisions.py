"""Typed decisions, the route ``POST /v1/systemone``: a state, questions about it, and a probability for every allowed answer.

Requests and answers have the shapes of other servers with this route (``transformers serve``, vLLM), and so has what the
model reads. Here a state may also name a stored support set, hold labelled photos, or be a conversation.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from lcl_adapter.answering.api_types import (
    MAX_IMAGES,
    MAX_LABEL_LENGTH,
    MAX_TEXT_LENGTH,
    MAX_TURNS,
    MAX_VERSION,
    ApiModel,
    LabelledImage,
    Message,
    ModelName,
    Name,
    SimilarExample,
    check_labels,
)
from lcl_adapter.answering.faults import message_of

MAX_QUESTIONS = 64
MAX_OPTIONS = 256
MAX_NAME_LENGTH = 200  # of a question, and of a placeholder for an image
MAX_DEPTH = 32  # of nested JSON
LETTERS = tuple(ascii_uppercase)
YES_NO = ("Yes", "No")
MAX_FAULTS = 3  # of one question or state that are reported together
Model = TypeVar("Model", bound=ApiModel)
Neutral = Mapping[str, tuple[Any, ...]]


def text_of(content: Any) -> str:
    """A text as it is, and other JSON as its text. None is no text."""
    return "" if content is None else content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def is_unicode(text: str) -> bool:
    """False for half a character: JSON can write one of two surrogates alone, and no tokenizer reads it."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _content(value: Any) -> Any:
    """Raises ValueError unless the value is a text, an object or a list, of bounded length and depth."""
    if not isinstance(value, str | dict | list):
        raise ValueError("a text, an object or a list is expected")
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"is nested more than {MAX_DEPTH} deep")
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in (outer.values() if isinstance(outer, dict) else outer)]
    text = text_of(value)
    if len(text) > MAX_TEXT_LENGTH:
        raise ValueError(f"has {len(text):,} characters; at most {MAX_TEXT_LENGTH:,} are allowed")
    if not is_unicode(text):
        raise ValueError("has half a character (a surrogate alone)")
    try:
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise ValueError("has a number that is not JSON: NaN or an infinity") from error
    return value


Content = Annotated[Any, AfterValidator(_content)]


class Asset(ApiModel):
    """An image. The state and the questions name it by its key among the assets."""

    neutral: ClassVar[Neutral] = {"format": ()}  # the bytes decide

    type: Literal["image"] = "image"
    data_base64: str = Field(description="an image file's bytes in base64, or a data URL")


class ChoiceQuestion(ApiModel):
    """One of several options. criteria: each option with its description or null. About a support set they may be left out:
    then the options are its labels.
    """

    type: Literal["choice"]
    instructions: Content | None = None
    criteria: dict[str, Content | None] | None = Field(default=None, min_length=1, max_length=MAX_OPTIONS)

    @field_validator("criteria")
    @classmethod
    def _names(cls, criteria: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in criteria or ():
            if not name.strip() or len(name) > MAX_LABEL_LENGTH or any(unicodedata.category(c).startswith("C") for c in name):
                raise ValueError(f"an option's name is one line of visible text, of {MAX_LABEL_LENGTH} characters at most")
        return criteria


class YesNoCriteria(ApiModel):
    """What yes and no mean."""

    true: Content | None = None
    false: Content | None = None


class YesNoQuestion(ApiModel):
    """Whether something is so. Other servers call this type ``noul`` too."""

    type: Literal["noul"]
    instructions: Content | None = None
    criteria: YesNoCriteria | None = None


class ScoreQuestion(ApiModel):
    """A level of a scale. criteria: the levels, lowest first."""

    type: Literal["score"]
    instructions: Content | None = None
    criteria: list[Content] = Field(min_length=1, max_length=len(LETTERS))


QUESTIONS: dict[str, type[ChoiceQuestion | YesNoQuestion | ScoreQuestion]] = {
    "choice": ChoiceQuestion,
    "score": ScoreQuestion,
    "noul": YesNoQuestion,
}
Question = ChoiceQuestion | YesNoQuestion | ScoreQuestion
Photo = Annotated[str, Field(description="data:image/png;base64,…, or the key of an asset")]


class StoredSetState(ApiModel):
    """A new photo, and the stored support set that it is judged by."""

    support_set: Name
    support_set_version: int | None = Field(default=None, ge=1, le=MAX_VERSION)
    image: Photo


class PhotosState(ApiModel):
    """A new photo, and the labelled photos that it is judged by. The set is not stored."""

    examples: list[LabelledImage] = Field(min_length=2, max_length=MAX_IMAGES)
    image: Photo

    @model_validator(mode="after")
    def _labels(self) -> PhotosState:
        check_labels(self.examples)
        return self


class ConversationState(ApiModel):
    """A conversation, as of a chat request. The question is put at its end."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_TURNS)


State = StoredSetState | PhotosState | ConversationState | str | dict[str, Any] | list[Any]
STATES: dict[str, type[StoredSetState | PhotosState | ConversationState]] = {
    "support_set": StoredSetState,
    "examples": PhotosState,
    "messages": ConversationState,
}


def _state(value: Any) -> Any:
    """A state by its form: a support set or a conversation by its key, any other JSON as it is. Raises ValueError."""
    kind = next((kind for key, kind in STATES.items() if key in value), None) if isinstance(value, dict) else None
    if kind is not None:
        try:
            return _read(kind, value)
        except ValueError as error:
            raise ValueError(f"{error} (to send other JSON with this key, send it as a text)") from error
    return _content(value)


def _read(kind: type[Model], value: Any, where: str = "") -> Model:
    """Raises ValueError with the faults in plain words: the field and what is wrong with it, never its value."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        faults = []
        for fault in error.errors()[:MAX_FAULTS]:
            place = ".".join(str(part) for part in fault["loc"] if isinstance(part, int) or re.fullmatch(r"[a-z]\w*", part))
            message = message_of(fault)
            faults.append(f"{place}: {message}" if place else message)
        raise ValueError(where + "; ".join(faults)) from error


class DecisionIn(ApiModel):
    """Questions about a state. assets: images by a placeholder: wherever it is in a text, the model reads the image.

    model: the first adapter, or the base, by default.
    """

    neutral: ClassVar[Neutral] = {
        "chat_template_kwargs": ({}, {"enable_thinking": False}),
        "instructions": ("",),
        "priority": (0,),
        "seed": (),  # of the labels' order on another server: nothing is drawn here
        "cache_salt": (),
        "request_id": (),
    }

    model: ModelName | None = None
    state: State = Field(
        description="a text or JSON; or a new `image` with a `support_set` or `examples` that it is judged by; or `messages`, as of a chat request"
    )
    questions: dict[str, Question] = Field(min_length=1, max_length=MAX_QUESTIONS)
    assets: dict[str, Asset] = Field(default={}, max_length=MAX_IMAGES)

    @field_validator("state", mode="before")
    @classmethod
    def _by_form(cls, value: Any) -> Any:
        return _state(value)

    @field_validator("questions", mode="before")
    @classmethod
    def _by_type(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("an object is expected: a name for each question")
        questions = {}
        for name, question in value.items():
            if not isinstance(name, str) or not name or len(name) > MAX_NAME_LENGTH or not is_unicode(name):
                raise ValueError(f"a question's name is a text of 1 to {MAX_NAME_LENGTH} characters")
            kind = question.get("type") if isinstance(question, dict) else getattr(question, "type", None)
            if not isinstance(kind, str) or kind not in QUESTIONS:
                raise ValueError(f"question {name!r}: `type` is one of {', '.join(QUESTIONS)}")
            questions[name] = _read(QUESTIONS[kind], question, f"question {name!r}: ")
        return questions

    @field_validator("assets")
    @classmethod
    def _named(cls, assets: dict[str, Asset]) -> dict[str, Asset]:
        if any(not name.strip() or len(name) > MAX_NAME_LENGTH for name in assets):
            raise ValueError(f"an asset's key is a text of 1 to {MAX_NAME_LENGTH} characters")
        return assets

    @model_validator(mode="after")
    def _bounded(self) -> DecisionIn:
        length = sum(len(text_of(q.model_dump())) for q in self.questions.values())
        if length > 4 * MAX_TEXT_LENGTH:
            raise ValueError(f"questions: more than {4 * MAX_TEXT_LENGTH:,} characters in all")
        if isinstance(self.state, ConversationState):
            texts = [part.text for message in self.state.messages for part in message.parts if part.type == "text"]
            if sum(map(len, texts)) > 4 * MAX_TEXT_LENGTH:
                raise ValueError(f"state: more than {4 * MAX_TEXT_LENGTH:,} characters of text in all")
        return self


class ChoiceAnswer(ApiModel):
    """choice: the likeliest option. confidence: its probability, on a scale on which equal probabilities are 0.

    judge: what decided, as of a classification. calibrated: whether the probabilities are those of a calibrated set. Where
    the options are a set's labels, the further fields are those of a classification.
    """

    type: Literal["choice"] = "choice"
    choice: str
    confidence: float
    probabilities: dict[str, float]
    judge: Literal["model", "both"] = "model"
    calibrated: bool = False
    none_of_these: bool | None = None
    familiarity: float | None = None
    most_alike: SimilarExample | None = None


class YesNoAnswer(ApiModel):
    """noul: the probability of yes."""

    type: Literal["noul"] = "noul"
    noul: float
    confidence: float
    probabilities: dict[str, float] = Field(description="of true and false")


class ScoreAnswer(ApiModel):
    """score: the mean of the levels' numbers, which begin with 0, weighed by their probabilities. legend: the levels."""

    type: Literal["score"] = "score"
    score: float
    legend: dict[str, Any]
    confidence: float = Field(description="1 where one level has the whole probability, 0 where the levels are as far apart as equally likely ones")
    probabilities: dict[str, float]


class DecisionUsage(ApiModel):
    input_tokens: int = Field(description="of every question, with what it is about")
    output_tokens: int = 0


class DecisionOut(ApiModel):
    model: str
    answers: dict[str, ChoiceAnswer | YesNoAnswer | ScoreAnswer]
    usage: DecisionUsage


# What the model reads, and its answers


def described(question: Question) -> bool:
    """Whether options of a choice have descriptions."""
    return isinstance(question, ChoiceQuestion) and any(text_of(value) for value in (question.criteria or {}).values())


def prompt_of(question: Question) -> tuple[str, tuple[str, ...]]:
    """The question as the model reads it, and the answers that it may give: letters of options or levels, or yes and no.

    The text is that of ``transformers serve``: the same question has the same answer there and here.
    """
    lines = [text_of(question.instructions)]
    answers: tuple[str, ...] = YES_NO
    if isinstance(question, YesNoQuestion):
        meanings = question.criteria or YesNoCriteria()
        lines += [f"{answer}: {text}" for answer, text in zip(YES_NO, map(text_of, (meanings.true, meanings.false)), strict=True) if text]
        last = "Answer Yes or No only."
    else:
        if isinstance(question, ScoreQuestion):
            options, noun = [text_of(level) for level in question.criteria], "level"
        else:
            named = [(name, text_of(value)) for name, value in (question.criteria or {}).items()]
            options, noun = [f"{name}: {text}" if text else name for name, text in named], "option"
        answers = LETTERS[: len(options)]
        lines += [f"{letter}. {option}" for letter, option in zip(answers, options, strict=True)]
        last = f"Answer with the letter of the {noun} that fits best ({answers[0]} to {answers[-1]}) only."
    return "\n".join(line for line in lines if line) + f"\n{last}", answers


def answer_of(question: Question, probabilities: Sequence[float]) -> ChoiceAnswer | YesNoAnswer | ScoreAnswer:
    """The answer, from a probability for each allowed one, in their order: of the criteria, or yes and no."""
    if isinstance(question, YesNoQuestion):
        yes, no = probabilities
        return YesNoAnswer(noul=yes, confidence=_confidence(probabilities), probabilities={"true": yes, "false": no})
    if isinstance(question, ScoreQuestion):
        return _score(question.criteria, probabilities)
    return choice_answer(dict(zip(question.criteria or (), probabilities, strict=True)))


def choice_answer(probabilities: Mapping[str, float]) -> ChoiceAnswer:
    best = max(probabilities, key=probabilities.__getitem__)
    return ChoiceAnswer(choice=best, confidence=_confidence(list(probabilities.values())), probabilities=dict(probabilities))


def _confidence(probabilities: Sequence[float]) -> float:
    count = len(probabilities)
    return 1.0 if count == 1 else max(0.0, (max(probabilities) - 1 / count) / (1 - 1 / count))


def _score(levels: Sequence[Any], probabilities: Sequence[float]) -> ScoreAnswer:
    count = len(levels)
    best = max(range(count), key=probabilities.__getitem__)
    distance = sum(p * abs(level - best) for level, p in enumerate(probabilities))
    of_equal = sum(abs(level - (count - 1) / 2) for level in range(count)) / count
    return ScoreAnswer(
        score=sum(level * p for level, p in enumerate(probabilities)),
        legend={str(number): level for number, level in enumerate(levels)},
        confidence=1.0 if count == 1 else max(0.0, 1 - distance / of_equal),
        probabilities={str(number): p for number, p in enumerate(probabilities)},
    )
