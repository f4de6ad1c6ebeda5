"""What the routes do, without HTTP: requests and stored sets become jobs, and the engine's replies become responses."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lcl_adapter.answering import api_types
from lcl_adapter.base.encoder import Encoder
from lcl_adapter.base.families import IMAGE
from lcl_adapter.data.conversations import Turn, shown_order, support_turns
from lcl_adapter.data.sources import Picture
from lcl_adapter.data.sources.depth import common_white
from lcl_adapter.errors import AdapterError, DataError, MissingError, RequestError, RunError, UserError
from lcl_adapter.serve.calibrate import Calibration, calibrate, familiarity
from lcl_adapter.serve.decoding import Sampling, TextDecoder
from lcl_adapter.serve.engine import Engine, Scored
from lcl_adapter.serve.images import Bounds, Spent, check, digest_of, from_data_url
from lcl_adapter.serve.jobs import Job, SetKey, Task
from lcl_adapter.serve.model import Model
from lcl_adapter.serve.store import Store, StoredSet

MAX_CALIBRATIONS = 1000  # in memory; all are stored on disk
MAX_DECODABLE = 100_000  # images whose check is remembered, by the digest of their bytes
CalibrationKey = tuple[int, str]  # a stored set's id and a model's identity


@dataclass
class Service:
    """The API's functions, on one engine and one store.

    adapter_folder: its subfolders are runs that may be loaded by name; None if none may.
    timeout: seconds that a request may last.
    """

    engine: Engine
    store: Store
    bounds: Bounds = field(default_factory=Bounds)
    adapter_folder: Path | None = None
    timeout: float = 120.0
    _calibrating: dict[CalibrationKey, Future[Calibration]] = field(default_factory=dict)
    _calibrations: dict[CalibrationKey, Calibration] = field(default_factory=dict)
    _whites: dict[int, float | None] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _decodable: dict[str, None] = field(default_factory=dict)

    # Support sets

    def put(self, namespace: str, name: str, request: api_types.SupportSetIn) -> StoredSet:
        """Check everything, then store.

        Raises RequestError with the example's number; ConflictError; RunError if the disk is full.
        """
        for number, example in enumerate(request.examples):
            self._check_text(example.label, f"examples[{number}].label")
        self._check_text(request.question or "", "question")
        self._check_length([(Picture(Path("image")), example.label) for example in request.examples], request.question)
        spent = Spent()
        examples = [(e.label, self._decode(e.image, f"examples[{number}].image", spent)) for number, e in enumerate(request.examples)]
        return self.store.put(namespace, name, examples, request.question, request.expected_version)

    def _decode(self, url: str, where: str, spent: Spent) -> bytes:
        """The image file's bytes, checked. Raises RequestError; TimeoutError if too many images wait to be decoded."""
        try:
            data = from_data_url(url, self.bounds, spent)
        except DataError as error:
            raise RequestError(f"{where}: {error}") from error
        self._remember(digest_of(data))
        return data

    def _remember(self, digest: str) -> None:
        """That an image can be decoded within the bounds."""
        with self._lock:
            if len(self._decodable) >= MAX_DECODABLE:
                self._decodable.pop(next(iter(self._decodable)))
            self._decodable[digest] = None

    def _check_stored(self, stored: StoredSet) -> None:
        """A set may come from a server with other bounds, and the engine's only thread decodes its photos: each is checked once.

        Raises RequestError with the example's number.
        """
        spent = Spent()
        for number, example in enumerate(stored.examples):
            if example.image in self._decodable:
                continue
            try:
                check(self.store.bytes_of(stored.namespace, example.image), self.bounds, spent)
            except DataError as error:
                raise RequestError(f"support set {stored.name!r}, examples[{number}]: {error}") from error
            self._remember(example.image)

    def _check_length(self, examples: Sequence[tuple[Picture, str]], question: str | None) -> None:
        """Every loaded model must have room for the set, a question and its longest answer. Raises RequestError."""
        encoder = self._encoder
        for model in list(self.engine.models.values()):
            answer = max((model.wording.answered(label) for _, label in examples), key=len)
            dialogue = [Turn("user", question or model.wording.query, examples[0][0]), Turn("assistant", answer)]
            length = len(encoder.turns([*support_turns(examples, model.wording), *dialogue])[0]) + self.engine.reserved_tokens
            if length > encoder.context:
                raise RequestError(
                    f"{len(examples)} photos and a question are {length} tokens ({encoder.tokens_an_image} per photo); they do not fit the "
                    f"context of {encoder.context}: show fewer."
                )

    @cached_property
    def _encoder(self) -> Encoder:
        return self.engine.base.encoder()

    def _check_text(self, text: str, where: str) -> None:
        token = self._encoder.special_token_in(text)
        if token is not None:
            raise RequestError(f"{where}: contains {token!r}, a special token of the model's prompt. Leave it out.")

    def with_examples(self, stored: StoredSet, images: bool) -> api_types.SupportSetWithExamples:
        """A set with its examples; with ``images``, their bytes as data URLs."""
        examples = []
        for example in stored.examples:
            image = api_types.data_url(self.store.bytes_of(stored.namespace, example.image)) if images else None
            examples.append(api_types.StoredExample(label=example.label, sha256=example.image, image=image))
        return api_types.SupportSetWithExamples(**summary(stored).model_dump(), examples=examples)

    def remove(self, namespace: str, name: str, expected: int | None) -> None:
        """Remove a set with all its versions, from the store and from the engine's cache.

        Raises MissingError, ConflictError.
        """
        versions = [self.store.get(namespace, name, number) for number, _ in self.store.versions(namespace, name)]
        self.store.remove(namespace, name, expected)
        for stored in versions:
            self.engine.drop_set(key_of(stored))

    def _picture(self, namespace: str, data: bytes) -> Picture:
        """A picture whose path begins with the namespace, so that no cache is shared between callers."""
        return Picture(Path(namespace) / digest_of(data), data=data)

    def _examples(self, stored: StoredSet) -> list[tuple[Picture, str]]:
        pictures = [self._picture(stored.namespace, self.store.bytes_of(stored.namespace, e.image)) for e in stored.examples]
        white = common_white(pictures)
        return [(replace(picture, white=white), e.label) for picture, e in zip(pictures, stored.examples, strict=True)]

    def _white(self, stored: StoredSet) -> float | None:
        """The value that is white in the set's photos, if they have more than 8 bits: new photos are read alike."""
        if stored.id not in self._whites:
            if len(self._whites) >= MAX_CALIBRATIONS:
                self._whites.pop(next(iter(self._whites)))
            self._whites[stored.id] = self._examples(stored)[0][0].white
        return self._whites[stored.id]

    def _turns(self, stored: StoredSet, model: Model) -> tuple[Turn, ...]:
        return support_turns(self._examples(stored), model.wording)

    # Classification

    def classify(self, namespace: str, request: api_types.ClassifyIn) -> Classification:
        """Queue a job for each image that can be used. Raises MissingError, RequestError, BusyError."""
        model = self.engine.find(request.model or self.default_model)
        stored = self.store.get(namespace, request.support_set, request.version)
        self._check_text(request.question or "", "question")
        if len(request.images) > self.engine.queue_limit:
            raise RequestError(
                f"{len(request.images)} images are more than the {self.engine.queue_limit} questions that may wait; send fewer at a time."
            )
        self._check_stored(stored)
        deadline, spent = time.monotonic() + self.timeout, Spent()
        answers = tuple(model.wording.answered(label) for label in stored.labels)
        question = request.question or stored.question or model.wording.query
        white = self._white(stored)
        jobs: list[Job | UserError] = []
        for number, url in enumerate(request.images):
            try:
                picture = replace(self._picture(namespace, self._decode(url, f"images[{number}]", spent)), white=white)
            except RequestError as error:
                jobs.append(error)
                continue
            turn = Turn("user", question, picture)
            jobs.append(Job(model.name, partial(self._turns, stored, model), turn, key_of(stored), answers, deadline=deadline))
        usable = [job for job in jobs if isinstance(job, Job)]
        calibration = self._calibration(stored, model) if usable else None
        self.engine.submit(*usable)
        return Classification(request, stored, model, calibration, jobs)

    def _calibration(self, stored: StoredSet, model: Model) -> Future[Calibration]:
        """The set's calibration for a model: from memory, from the store, or computed by a task of the engine."""
        key = (stored.id, model.identity)
        calibration = self._calibrations.get(key)
        if calibration is None and (fields := self.store.read_calibration(*key)) is not None:
            calibration = Calibration.from_json(fields)
        if calibration is not None:
            done: Future[Calibration] = Future()
            done.set_result(calibration)
            return done
        with self._lock:
            running = self._calibrating.get(key)
            if running is not None:
                return running
            task = Task(lambda: self._calibration_steps(self.engine, stored, model))
            self.engine.submit(task)
            self._calibrating[key] = task.future
        task.future.add_done_callback(lambda _: self._calibrating.pop(key, None))
        return task.future

    def _calibration_steps(self, engine: Engine, stored: StoredSet, model: Model) -> Generator[None, None, Calibration]:
        """The steps of a task. Its last one stores the calibration and returns it."""
        steps = calibrate(engine, model.name, self._examples(stored), model.wording, stored.question)
        while True:
            with engine.using(model.name):  # between two steps a job may have switched to another adapter
                try:
                    next(steps)
                except StopIteration as finished:
                    self._store_calibration((stored.id, model.identity), finished.value)
                    return finished.value
            yield

    def _store_calibration(self, key: CalibrationKey, calibration: Calibration) -> None:
        """In memory and on disk. If the disk is full, the copy in memory is enough to answer."""
        if len(self._calibrations) >= MAX_CALIBRATIONS:
            self._calibrations.pop(next(iter(self._calibrations)))
        self._calibrations[key] = calibration
        with suppress(RunError):
            self.store.write_calibration(*key, calibration.to_json())

    @property
    def default_model(self) -> str:
        """The first adapter's name, or the base's if there is no adapter."""
        return next((name for name, model in list(self.engine.models.items()) if model.folder is not None), self.engine.name)

    # Chat

    def chat(self, namespace: str, request: api_types.ChatIn) -> tuple[Job, TextDecoder]:
        """A job that is not queued yet, and the decoder of its tokens. Raises MissingError, RequestError."""
        model = self.engine.find(request.model)
        turns = self._messages(namespace, request.messages)
        sampling = Sampling(request.temperature, request.top_p, request.seed, request.top_logprobs, request.token_limit)
        before, key = turns[:-1], None
        support: Callable[[], Sequence[Turn]] = lambda: before  # noqa: E731
        if request.support_set is not None:
            stored = self.store.get(namespace, request.support_set, request.support_set_version)
            self._check_stored(stored)
            key = None if before else key_of(stored)  # only the set alone is cached, not a set with more turns
            support = lambda: (*self._turns(stored, model), *before)  # noqa: E731
        encoder = self.engine.base.encoder()
        # without the set; the engine checks the whole length
        length = len(encoder.turns(turns, opened=True)[0]) + request.token_limit
        if length > encoder.context:
            raise RequestError(f"the messages and up to {request.token_limit} new tokens are {length} tokens, the context is {encoder.context}.")
        decoder = TextDecoder(self.engine.base.tokenizer, request.stops)
        job = Job(model.name, support, turns[-1], key, sampling=sampling, on_token=decoder.add, deadline=time.monotonic() + self.timeout)
        return job, decoder

    def _messages(self, namespace: str, messages: Sequence[api_types.Message]) -> tuple[Turn, ...]:
        """Messages as turns.

        System texts go before the next user text, for LLaVA's prompts have one fixed system text. Raises RequestError.
        """
        turns: list[Turn] = []
        instructions: list[str] = []
        images, spent = 0, Spent()
        for number, message in enumerate(messages):
            texts: list[str] = []
            pictures: list[Picture] = []
            for place, part in enumerate(message.parts):
                where = f"messages[{number}].content[{place}]"
                if isinstance(part, api_types.TextPart):
                    self._check_text(part.text, where)
                    texts.append(part.text)
                else:
                    images += 1
                    if message.role != "user":
                        raise RequestError(f"{where}: only a user message can have images.")
                    if images > self.bounds.images:
                        raise RequestError(f"{where}: a conversation has at most {self.bounds.images} images.")
                    pictures.append(self._picture(namespace, self._decode(part.image_url.url, where, spent)))
                    texts.append(IMAGE)
            if message.role in {"system", "developer"}:
                instructions += texts
                continue
            if turns and turns[-1].role == message.role:
                raise RequestError(f"messages[{number}]: two {message.role} messages in a row; join them.")
            if not turns and message.role != "user":
                raise RequestError(f"messages[{number}]: the first message must be the user's.")
            if message.role == "user":
                texts, instructions = [*instructions, *texts], []
            turns.append(_turn(message.role, texts, pictures))
        return tuple(turns)

    # Adapters

    def load_adapter(self, name: str) -> Model:
        """Load a run of the adapter folder by its name. If it is loaded already, nothing changes.

        Raises MissingError; AdapterError, without a path in its message.
        """
        if self.adapter_folder is None:
            raise MissingError("this server loads no adapters; start it with --adapter-folder.")
        folder = self.adapter_folder / name
        if folder.parent != self.adapter_folder or not folder.is_dir():
            raise MissingError(f"no adapter {name!r} to load.")
        try:
            return self.engine.call(lambda engine: engine.load_adapter(name, folder), self.timeout)
        except UserError as error:
            message = str(error).replace(str(folder), name).replace(str(self.engine.base.path), "the base")
            raise AdapterError(re.sub(r"(?<!\w)/[\w./-]+", "…", message)) from error

    def unload_adapter(self, name: str) -> None:
        """Raises MissingError; ModelError for the base."""
        self.engine.call(lambda engine: engine.unload_adapter(name), self.timeout)


@dataclass
class Classification:
    """A classification request that is being answered.

    jobs: one for each image, or the error of an image that cannot be used.
    """

    request: api_types.ClassifyIn
    stored: StoredSet
    model: Model
    calibration: Future[Calibration] | None
    jobs: list[Job | UserError]

    @property
    def futures(self) -> list[Future[Any]]:
        calibration = [self.calibration] if self.calibration else []
        return calibration + [job.future for job in self.jobs if isinstance(job, Job)]

    def cancel(self) -> None:
        """Cancel the jobs. The calibration goes on, for other requests about the set need it too."""
        for job in self.jobs:
            if isinstance(job, Job):
                job.cancelled.set()

    def response(self) -> api_types.ClassifyOut:
        """Call it when every future is done.

        Raises what the calibration raised; an image's own fault is in its result.
        """
        calibration = self.calibration.result() if self.calibration else Calibration()
        return api_types.ClassifyOut(
            model=self.model.name,
            support_set=self.stored.name,
            version=self.stored.version,
            calibration=api_types.CalibrationOut(
                temperature=calibration.temperature, threshold=calibration.threshold, left_out=calibration.left_out, right=calibration.right
            ),
            judge="model" if self.model.weighing is None else "both",
            results=[self._judgement(calibration, job) for job in self.jobs],
        )

    def _judgement(self, calibration: Calibration, job: Job | UserError) -> api_types.Judgement:
        error = job if isinstance(job, UserError) else job.future.exception()
        if isinstance(error, UserError):
            # the image cannot be used, or the question failed
            code = "invalid_image" if error is job else "invalid_value"
            return api_types.Judgement(error=api_types.Fault(message=str(error), type="invalid_request_error", code=code))
        if error is not None:
            raise error
        assert isinstance(job, Job)
        scored: Scored = job.future.result()
        reply, labels, examples = scored.reply, self.stored.labels, self.stored.examples
        probabilities = calibration.probabilities(reply.log_likelihoods)
        first, second = sorted(probabilities, reverse=True)[:2]
        nearest = labels[reply.best]
        # by the example's index in the stored set
        cosines = dict(zip(shown_order(len(examples)), scored.similarities, strict=True))
        score = familiarity([cosine for index, cosine in cosines.items() if examples[index].label == nearest])
        none_of_these = calibration.threshold is not None and score < calibration.threshold
        most_alike = max(cosines, key=cosines.__getitem__)
        return api_types.Judgement(
            label=None if none_of_these else nearest,
            nearest=nearest,
            probabilities=dict(zip(labels, probabilities, strict=True)),
            margin=first - second,
            none_of_these=none_of_these,
            familiarity=score,
            most_alike=api_types.SimilarExample(example=most_alike, label=examples[most_alike].label, cosine=cosines[most_alike]),
        )


def _turn(role: str, texts: Sequence[str], pictures: Sequence[Picture]) -> Turn:
    if not pictures:
        return Turn(role, "\n".join(texts))
    if len(pictures) == 1:  # LLaVA was trained with a single image before the text
        return Turn(role, "\n".join(text for text in texts if text != IMAGE), pictures[0])
    return Turn(role, "\n".join(texts), pictures[0], further=tuple(pictures[1:]))


def key_of(stored: StoredSet) -> SetKey:
    """The key of a stored set in the engine's cache.

    The time is part of it, for a store that was deleted and made anew reuses ids.
    """
    return stored.namespace, f"{stored.id}-{stored.created}"


def summary(stored: StoredSet) -> api_types.SupportSetOut:
    labels = {label: sum(e.label == label for e in stored.examples) for label in stored.labels}
    return api_types.SupportSetOut(name=stored.name, version=stored.version, created=stored.created, labels=labels, question=stored.question)
