"""Typed decisions: the questions of a request become jobs about its state, and scores of allowed answers become probabilities.

A choice among the labels of a support set is judged and calibrated as a classification is. For any other question, the
model's likelihoods of the allowed answers are the answer, each answer scored whole.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lcl_adapter.answering import api_types
from lcl_adapter.answering.decisions import (
    LETTERS,
    ChoiceAnswer,
    ChoiceQuestion,
    ConversationState,
    DecisionIn,
    DecisionOut,
    DecisionUsage,
    PhotosState,
    Question,
    ScoreAnswer,
    StoredSetState,
    YesNoAnswer,
    answer_of,
    choice_answer,
    described,
    prompt_of,
    text_of,
)
from lcl_adapter.base.families import IMAGE
from lcl_adapter.data.conversations import Turn
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import RequestError
from lcl_adapter.serve.calibrate import Calibration
from lcl_adapter.serve.engine import MAX_BATCH_TOKENS
from lcl_adapter.serve.jobs import Job, Scored, SetKey
from lcl_adapter.serve.model import Model
from lcl_adapter.serve.pictures.images import Spent, digest_of
from lcl_adapter.serve.service import Service, on_one_scale
from lcl_adapter.serve.sets import ShownSet, judgement_of

URL_HEAD = "data:"


@dataclass(frozen=True)
class Marked:
    """A text with ``<image>`` at the place of each picture but the ``first``, which comes before the text."""

    text: str
    pictures: tuple[Picture, ...] = ()
    first: Picture | None = None

    def turn(self) -> Turn:
        """A turn with one picture has it before the text, as LLaVA was trained."""
        pictures = (*((self.first,) if self.first else ()), *self.pictures)
        if len(pictures) < 2:
            return Turn("user", self.text.replace(IMAGE, ""), pictures[0] if pictures else None)
        return Turn("user", f"{IMAGE}\n{self.text}" if self.first else self.text, pictures[0], further=pictures[1:])

    def joined(self, other: Marked) -> Marked:
        text = "\n\n".join(part for part in (self.text, other.text) if part)
        return Marked(text, self.pictures + other.pictures, self.first)


@dataclass(frozen=True)
class Basis:
    """What the questions of a request are about.

    support: returns the turns before the question, cached under ``key``. opening: what the question's own turn begins with;
    None where a question begins a new turn. shown: the support set, if the state is one. conversation: whether a choice is
    answered in the options' own words, as in a conversation that the state is.
    """

    opening: Marked
    support: Callable[[], Sequence[Turn]] = tuple
    key: SetKey | None = None
    shown: ShownSet | None = None
    conversation: bool = False


class Assets:
    """The images of a request by their placeholders, and which of them its texts name. spent: on all images of the request."""

    def __init__(self, service: Service, namespace: str, assets: Mapping[str, Any]) -> None:
        self.service, self.namespace, self.spent = service, namespace, Spent(namespace)
        self.pictures = {name: self.read(asset.data_base64, f"assets[{name!r}]") for name, asset in assets.items()}
        self.unused = set(self.pictures)
        names = sorted(self.pictures, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names))) if names else None

    def read(self, data: str, where: str) -> Picture:
        url = data if data[: len(URL_HEAD)].lower() == URL_HEAD else f"data:image/png;base64,{data}"
        return self.service.sent_picture(self.namespace, url, where, self.spent)

    def photo(self, image: str, where: str) -> Picture:
        """A photo by its asset's key, or as a data URL. Raises RequestError."""
        if image in self.pictures:
            self.unused.discard(image)
            return self.pictures[image]
        return self.service.sent_picture(self.namespace, image, where, self.spent)

    def marked(self, text: str, where: str) -> Marked:
        """A text with its placeholders replaced. Raises RequestError for a special token in it."""
        names = self._names.findall(text) if self._names else []
        parts = self._names.split(text) if self._names else [text]
        for part in parts:
            self.service.check_text(part, where)
        self.unused.difference_update(names)
        return Marked(IMAGE.join(parts), tuple(self.pictures[name] for name in names))


@dataclass
class Decisions:
    """A request that is being answered. asked: its questions by their names. jobs: one for each question."""

    model: Model
    basis: Basis
    asked: dict[str, Question] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    calibration: Future[Calibration] | None = None

    @property
    def futures(self) -> list[Future[Any]]:
        calibration = [self.calibration] if self.calibration else []
        return calibration + [job.future for job in self.jobs]

    def cancel(self) -> None:
        """Cancel the jobs. The calibration goes on, for other requests about the set need it too."""
        for job in self.jobs:
            job.cancelled.set()

    def response(self) -> DecisionOut:
        """Call it when every future is done. Raises what a job or the calibration raised."""
        answers = {name: self._answer(question, job) for (name, question), job in zip(self.asked.items(), self.jobs, strict=True)}
        return DecisionOut(model=self.model.name, answers=answers, usage=DecisionUsage(input_tokens=sum(job.prompt_tokens for job in self.jobs)))

    def _answer(self, question: Question, job: Job) -> ChoiceAnswer | YesNoAnswer | ScoreAnswer:
        scored: Scored = job.future.result()
        if not job.judged:
            return answer_of(question, scored.reply.probabilities)
        assert isinstance(question, ChoiceQuestion)
        assert self.basis.shown is not None
        assert self.calibration is not None
        judgement = judgement_of(self.basis.shown, scored, self.calibration.result())
        option_of = {api_types.normalized_label(option): option for option in question.criteria or ()}
        probabilities = {api_types.normalized_label(label): p for label, p in judgement.probabilities.items()}
        return choice_answer({option: probabilities[label] for label, option in option_of.items()}).model_copy(
            update={
                "judge": self.model.judge(),
                "calibrated": True,
                "none_of_these": judgement.none_of_these,
                "familiarity": judgement.familiarity,
                "most_alike": judgement.most_alike,
            }
        )


def decide(service: Service, namespace: str, request: DecisionIn) -> Decisions:
    """Queue a job for each question. Raises MissingError, RequestError, BusyError."""
    if len(request.questions) > service.engine.queue_limit:
        raise RequestError(f"{len(request.questions)} questions are more than the {service.engine.queue_limit} that may wait; send fewer at a time.")
    model = service.engine.find(request.model or service.default_model)
    assets = Assets(service, namespace, request.assets)
    basis = _basis(service, namespace, request, model, assets)
    made = Decisions(model, basis)
    deadline = time.monotonic() + service.timeout
    for name, asked in request.questions.items():
        question = made.asked[name] = _with_options(asked, basis, f"questions[{name!r}]")
        job = _job(basis, model, assets, question, f"questions[{name!r}]")
        job.deadline, job.caller = deadline, namespace
        _check(service, job, f"questions[{name!r}]")
        made.jobs.append(job)
    if assets.unused:
        raise RequestError(f"assets: no text names {', '.join(map(repr, sorted(assets.unused)))}, so nothing would be read from it.")
    if basis.shown is not None and any(job.judged for job in made.jobs):
        made.calibration = service.calibrations.of(basis.shown, model)
    service.engine.submit(*made.jobs)
    return made


def _basis(service: Service, namespace: str, request: DecisionIn, model: Model, assets: Assets) -> Basis:
    state = request.state
    if isinstance(state, StoredSetState):
        stored = service.store.get(namespace, state.support_set, state.support_set_version)
        shown = service.shown(stored)
        picture = replace(assets.photo(state.image, "state.image"), white=service.white(shown))
        return _about(shown, picture, model)
    if isinstance(state, PhotosState):
        examples = _labelled(service, state, assets)
        picture = replace(assets.photo(state.image, "state.image"), white=examples[0][0].white)
        return _about(_sent(namespace, examples), picture, model)
    if isinstance(state, ConversationState):
        turns = service.turns_of(namespace, state.messages, assets.spent)
        if not turns:
            raise RequestError("state.messages: there is no user's message.")
        own = turns[-1] if turns[-1].role == "user" else None
        before = turns if own is None else turns[:-1]
        key = None if not before else (namespace, "messages-" + digest_of(repr([_identity(turn) for turn in before]).encode()))
        return Basis(_opening(own), lambda: before, key, conversation=True)
    return Basis(assets.marked(text_of(state), "state"))


def _about(shown: ShownSet, picture: Picture, model: Model) -> Basis:
    return Basis(Marked("", (), picture), partial(shown.turns, model.wording), shown.key, shown)


def _labelled(service: Service, state: PhotosState, assets: Assets) -> list[tuple[Picture, str]]:
    """The labelled photos of a request. Raises RequestError with the photo's number."""
    labels = [example.label for example in state.examples]
    for number, label in enumerate(labels):
        service.check_text(label, f"state.examples[{number}].label")
    pictures = [assets.photo(example.image, f"state.examples[{number}].image") for number, example in enumerate(state.examples)]
    examples = on_one_scale(pictures, labels)
    service.check_length(examples, None)
    return examples


def _sent(namespace: str, examples: Sequence[tuple[Picture, str]]) -> ShownSet:
    """The same photos and labels are the same set, for this caller."""
    digest = digest_of(repr([(picture.path.name, label) for picture, label in examples]).encode())
    return ShownSet((namespace, f"sent-{digest}"), tuple(label for _, label in examples), None, lambda: examples)


def _with_options(question: Question, basis: Basis, where: str) -> Question:
    """The question, with the set's labels where a choice has no options. Raises RequestError where there is no set."""
    if not isinstance(question, ChoiceQuestion) or question.criteria:
        return question
    if basis.shown is None:
        raise RequestError(f"{where}.criteria: the options are missing; only about a support set may they be left out.")
    return question.model_copy(update={"criteria": dict.fromkeys(basis.shown.labels)})


def _identity(turn: Turn) -> tuple[Any, ...]:
    return turn.role, turn.text, turn.shown, [picture.path.name for picture in turn.pictures]


def _opening(turn: Turn | None) -> Marked:
    """The last turn of a conversation, for a question to be put behind it."""
    if turn is None:
        return Marked("")
    return Marked(turn.text, turn.pictures) if turn.further else Marked(turn.text, (), turn.picture)


def _job(basis: Basis, model: Model, assets: Assets, question: Question, where: str) -> Job:
    """The question's job, without deadline and caller. Raises RequestError."""
    if isinstance(question, ChoiceQuestion) and not described(question) and (basis.shown or basis.conversation):
        return _choice(basis, model, assets, question, where)
    if isinstance(question, ChoiceQuestion) and len(question.criteria or ()) > len(LETTERS):
        raise RequestError(f"{where}.criteria: a choice about a text, or with descriptions, has at most {len(LETTERS)} options, a letter for each.")
    text, answers = prompt_of(question)
    if basis.shown is None and not basis.conversation:
        own = assets.marked(text, where)
        marked = Marked(f"{basis.opening.text}\n\n{own.text}", basis.opening.pictures + own.pictures)
    else:
        marked = basis.opening.joined(assets.marked(text.strip("\n"), where))
    return Job(model.name, basis.support, marked.turn(), basis.key, answers, judged=False, ended=False)


def _choice(basis: Basis, model: Model, assets: Assets, question: ChoiceQuestion, where: str) -> Job:
    """The job of a choice in the options' own words, each scored with its end: a judgement where they are the set's labels."""
    options = tuple(question.criteria or ())
    instructions = assets.marked(text_of(question.instructions), f"{where}.instructions")
    for option in options:
        assets.service.check_text(option, f"{where}.criteria")
    if basis.shown is None:
        return Job(model.name, basis.support, basis.opening.joined(instructions).turn(), basis.key, options, judged=False)
    if not instructions.text:
        instructions = Marked(basis.shown.question or model.wording.query)
    turn = basis.opening.joined(instructions).turn()
    judged = _same(options, basis.shown.labels) and not turn.further
    answers = tuple(model.wording.answered(name) for name in (basis.shown.labels if judged else options))
    return Job(model.name, basis.support, turn, basis.key, answers, judged=judged)


def _same(options: Sequence[str], labels: Sequence[str]) -> bool:
    """Whether the options are the labels, in any order."""
    return sorted(map(api_types.normalized_label, options)) == sorted(map(api_types.normalized_label, labels))


def _check(service: Service, job: Job, where: str) -> None:
    """Raises RequestError where the question or an answer does not fit the model, before anything waits in the queue."""
    if not job.turn.text and job.turn.picture is None:
        raise RequestError(f"{where}: nothing is asked; give `instructions`.")
    encoder = service.encoder
    prompt, answers = encoder.question(job.turn, job.answers)
    longest = len(prompt) + max(map(len, answers)) + service.engine.reserved_tokens
    if longest > encoder.context:
        raise RequestError(f"{where}: the question and its answer are {longest} tokens, the context is {encoder.context}.")
    if sum(map(len, answers)) > MAX_BATCH_TOKENS:
        raise RequestError(f"{where}.criteria: the options are {sum(map(len, answers))} tokens in all; at most {MAX_BATCH_TOKENS} are allowed.")
    alike = [answer for number, answer in enumerate(job.answers) if answers[number] in answers[:number]]
    if alike:
        raise RequestError(f"{where}: this model reads the answer {alike[0]!r} and another one as the same tokens.")
