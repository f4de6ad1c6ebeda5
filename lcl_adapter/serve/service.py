"""What the routes do, without HTTP: stored sets and messages become jobs, replies become judgements and text."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lcl_adapter.answering import api_types
from lcl_adapter.base.encoder import Encoder
from lcl_adapter.base.families import IMAGE
from lcl_adapter.data.conversations import Turn, shown_order, support_turns
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import AdapterError, DataError, MissingError, RequestError, RunError, UserError
from lcl_adapter.serve.calibrate import Calibration, calibrate, familiarity
from lcl_adapter.serve.decoding import Sampling, Speaker
from lcl_adapter.serve.engine import Engine, Model, Scored
from lcl_adapter.serve.images import Bounds, digest_of, from_data_url
from lcl_adapter.serve.jobs import Job, Task
from lcl_adapter.serve.store import Store, StoredSet


@dataclass
class Service:
    """adapters: a folder of runs that may be loaded by their name, None where none may. timeout: seconds a request may take."""

    engine: Engine
    store: Store
    bounds: Bounds = field(default_factory=Bounds)
    adapters: Path | None = None
    timeout: float = 120.0
    _calibrating: dict[tuple[int, str], Future[Calibration]] = field(default_factory=dict)
    _calibrations: dict[tuple[int, str], Calibration] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _decoding: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(4))

    # Support sets

    def put(self, namespace: str, name: str, given: api_types.SupportSetIn) -> StoredSet:
        """Check everything, then store. Raises RequestError with the example's number; ConflictError; RunError where the disk is full."""
        for number, example in enumerate(given.examples):
            self._check_text(example.label, f"examples[{number}].label")
        self._check_text(given.question or "", "question")
        self._check_length([(Picture(Path("image")), example.label) for example in given.examples], given.question)
        examples = [(e.label, self._image(e.image, f"examples[{number}].image")) for number, e in enumerate(given.examples)]
        return self.store.put(namespace, name, examples, given.question, given.expected_version)

    def _image(self, url: str, where: str) -> bytes:
        """Decoded once, few at a time: what waits is text, what is being decoded can be 100 MB. Raises RequestError."""
        try:
            with self._decoding:
                return from_data_url(url, self.bounds)
        except DataError as error:
            raise RequestError(f"{where}: {error}") from error

    def _check_length(self, shown: Sequence[tuple[Picture, str]], question: str | None) -> None:
        """Every model's wording of it has to leave room for a question and its longest answer."""
        encoder = self._encoder
        for model in list(self.engine.models.values()):
            answer = max((model.wording.answered(label) for _, label in shown), key=len)
            asked = [Turn("user", question or model.wording.query, shown[0][0]), Turn("assistant", answer)]
            length = len(encoder.turns([*support_turns(shown, model.wording), *asked])[0]) + self.engine.spare
            if length > encoder.context:
                raise RequestError(
                    f"{len(shown)} photos and a question are {length} tokens ({encoder.tokens_an_image} a photo); they do not fit the context of "
                    f"{encoder.context}: show fewer."
                )

    @cached_property
    def _encoder(self) -> Encoder:
        return self.engine.base.encoder()

    def _check_text(self, text: str, where: str) -> None:
        token = self._encoder.special_token_in(text)
        if token is not None:
            raise RequestError(f"{where}: holds {token!r}, a special token of the model's prompt. Leave it out.")

    def whole(self, stored: StoredSet, images: bool) -> api_types.SupportSetWithExamples:
        shown = []
        for one in stored.examples:
            image = api_types.data_url(self.store.bytes_of(stored.namespace, one.image)) if images else None
            shown.append(api_types.StoredExample(label=one.label, sha256=one.image, image=image))
        return api_types.SupportSetWithExamples(**summary(stored).model_dump(), examples=shown)

    def remove(self, namespace: str, name: str, expected: int | None) -> None:
        kept = [self.store.get(namespace, name, number) for number, _ in self.store.versions(namespace, name)]
        self.store.remove(namespace, name, expected)
        for one in kept:
            self.engine.forget(key_of(one))

    def _picture(self, namespace: str, data: bytes) -> Picture:
        """Named by whose it is, so that no cache is shared between callers."""
        return Picture(Path(namespace) / digest_of(data), data=data)

    def _turns(self, stored: StoredSet, model: Model) -> tuple[Turn, ...]:
        shown = [(self._picture(stored.namespace, self.store.bytes_of(stored.namespace, e.image)), e.label) for e in stored.examples]
        return support_turns(shown, model.wording)

    # Classification

    def classify(self, namespace: str, request: api_types.ClassifyIn) -> Classification:
        """Jobs in the engine's queue, and what becomes of their replies. Raises MissingError, RequestError, BusyError."""
        model = self.engine.find(request.model or self.default)
        stored = self.store.get(namespace, request.support_set, request.version)
        self._check_text(request.question or "", "question")
        if len(request.images) > self.engine.limit:
            raise RequestError(
                f"{len(request.images)} images are more than the {self.engine.limit} questions that may wait here; send fewer at a time."
            )
        deadline = time.monotonic() + self.timeout
        answers = tuple(model.wording.answered(label) for label in stored.labels)
        question = request.question or stored.question or model.wording.query
        jobs: list[Job | UserError] = []
        for number, url in enumerate(request.images):
            try:
                picture = self._picture(namespace, self._image(url, f"images[{number}]"))
            except RequestError as error:
                jobs.append(error)
                continue
            turn = Turn("user", question, picture)
            jobs.append(Job(model.name, partial(self._turns, stored, model), turn, key_of(stored), answers, deadline=deadline))
        asked = [job for job in jobs if isinstance(job, Job)]
        calibration = self._calibration(stored, model) if asked else None
        self.engine.submit(*asked)
        return Classification(request, stored, model, calibration, jobs)

    def _calibration(self, stored: StoredSet, model: Model) -> Future[Calibration]:
        """Stored with the set's version; made once, by the engine, where it is not there yet."""
        place = (stored.id, model.identity)
        found = self._calibrations.get(place)
        if found is None and (kept := self.store.read_calibration(*place)) is not None:
            found = Calibration.read(kept)
        if found is not None:
            done: Future[Calibration] = Future()
            done.set_result(found)
            return done
        with self._lock:
            under_way = self._calibrating.get(place)
            if under_way is not None:
                return under_way
            task = Task(lambda: self._calibrated(self.engine, stored, model))
            self.engine.submit(task)
            self._calibrating[place] = task.future
        task.future.add_done_callback(lambda _: self._calibrating.pop(place, None))
        return task.future

    def _calibrated(self, engine: Engine, stored: StoredSet, model: Model) -> Generator[None, None, Calibration]:
        shown = [(self._picture(stored.namespace, self.store.bytes_of(stored.namespace, e.image)), e.label) for e in stored.examples]
        steps = calibrate(engine, shown, model.wording, stored.question)
        while True:
            with engine.on(model.name):  # another request may have switched the model in between
                try:
                    next(steps)
                except StopIteration as finished:
                    self._remember((stored.id, model.identity), finished.value)
                    return finished.value
            yield

    def _remember(self, place: tuple[int, str], made: Calibration) -> None:
        """In memory too: a full disk is no reason not to answer."""
        if len(self._calibrations) >= 1000:
            self._calibrations.pop(next(iter(self._calibrations)))
        self._calibrations[place] = made
        with suppress(RunError):
            self.store.write_calibration(*place, made.written())

    @property
    def default(self) -> str:
        """The first adapter, where there is one: that is what one serves for."""
        return next((name for name, model in list(self.engine.models.items()) if model.folder is not None), self.engine.name)

    # Chat

    def chat(self, namespace: str, request: api_types.ChatIn) -> tuple[Job, Speaker]:
        """A job that is not submitted yet, and who turns its tokens into text. Raises MissingError, RequestError."""
        model = self.engine.find(request.model)
        turns = self._messages(namespace, request.messages)
        sampling = Sampling(request.temperature, request.top_p, request.seed, request.top_logprobs, request.token_limit)
        before, key = turns[:-1], None
        support: Callable[[], Sequence[Turn]] = lambda: before  # noqa: E731
        if request.support_set is not None:
            stored = self.store.get(namespace, request.support_set, request.support_set_version)
            key = None if before else key_of(stored)
            support = lambda: (*self._turns(stored, model), *before)  # noqa: E731
        encoder = self.engine.base.encoder()
        length = len(encoder.turns(turns, opened=True)[0]) + request.token_limit  # of a stored set the engine knows the rest
        if length > encoder.context:
            raise RequestError(f"the messages and up to {request.token_limit} new tokens are {length} tokens, the context is {encoder.context}.")
        speaker = Speaker(self.engine.base.tokenizer, request.stops)
        job = Job(model.name, support, turns[-1], key, sampling=sampling, say=speaker.hear, deadline=time.monotonic() + self.timeout)
        return job, speaker

    def _messages(self, namespace: str, messages: Sequence[api_types.Message]) -> tuple[Turn, ...]:
        """Instructions go before the next user text, as LLaVA's prompts have one fixed system text. Raises RequestError."""
        turns: list[Turn] = []
        instructions: list[str] = []
        images = 0
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
                        raise RequestError(f"{where}: only a user shows images.")
                    if images > self.bounds.images:
                        raise RequestError(f"{where}: more than {self.bounds.images} images.")
                    pictures.append(self._picture(namespace, self._image(part.image_url.url, where)))
                    texts.append(IMAGE)
            if message.role in {"system", "developer"}:
                instructions += texts
                continue
            if turns and turns[-1].role == message.role:
                raise RequestError(f"messages[{number}]: two messages of the {message.role}'s in a row; join them.")
            if not turns and message.role != "user":
                raise RequestError(f"messages[{number}]: the first message must be the user's.")
            if message.role == "user":
                texts, instructions = [*instructions, *texts], []
            turns.append(_turn(message.role, texts, pictures))
        return tuple(turns)

    # Adapters

    def load(self, name: str) -> Model:
        """One of the folders that may be loaded, by its name. Raises MissingError, AdapterError without a path in it."""
        if self.adapters is None:
            raise MissingError("this server loads no adapters; start it with --adapter-folder.")
        folder = self.adapters / name
        if folder.parent != self.adapters or not folder.is_dir():
            raise MissingError(f"no adapter {name!r} to load.")
        try:
            return self.engine.call(lambda engine: engine.load_adapter(name, folder), self.timeout)
        except UserError as error:
            told = str(error).replace(str(folder), name).replace(str(self.engine.base.path), "the base")
            raise AdapterError(re.sub(r"(?<!\w)/[\w./-]+", "…", told)) from error

    def unload(self, name: str) -> None:
        self.engine.call(lambda engine: engine.unload_adapter(name), self.timeout)


@dataclass
class Classification:
    """A request under way. ``jobs``: one an image, or what was wrong with it."""

    request: api_types.ClassifyIn
    stored: StoredSet
    model: Model
    calibration: Future[Calibration] | None
    jobs: list[Job | UserError]

    @property
    def futures(self) -> list[Future[Any]]:
        own = [self.calibration] if self.calibration else []
        return own + [job.future for job in self.jobs if isinstance(job, Job)]

    def cancel(self) -> None:
        """The questions; a calibration is for all who ask about the set."""
        for one in self.jobs:
            if isinstance(one, Job):
                one.cancelled.set()

    def judged(self) -> api_types.ClassifyOut:
        """Once every future is done. Raises what the calibration raised; a fault of one image is told in its place."""
        found = self.calibration.result() if self.calibration else Calibration()
        results = [self._one(found, job) for job in self.jobs]
        told = api_types.CalibrationOut(temperature=found.temperature, threshold=found.threshold, left_out=found.left_out, right=found.right)
        stored = self.stored
        return api_types.ClassifyOut(model=self.model.name, support_set=stored.name, version=stored.version, calibration=told, results=results)

    def _one(self, calibration: Calibration, job: Job | UserError) -> api_types.Judgement:
        error = job if isinstance(job, UserError) else job.future.exception()
        if isinstance(error, UserError):
            code = "invalid_image" if error is job else "invalid_value"  # the image's own, or what came of asking
            return api_types.Judgement(error=api_types.Fault(message=str(error), type="invalid_request_error", code=code))
        if error is not None:
            raise error
        assert isinstance(job, Job)
        scored: Scored = job.future.result()
        reply, labels = scored.reply, self.stored.labels
        chances = calibration.probabilities(reply.log_likelihoods)
        ranked = sorted(chances, reverse=True)
        nearest = labels[reply.best]
        alike = dict(zip(shown_order(len(self.stored.examples)), scored.similarities, strict=True))  # by the place of each example
        score = familiarity([cosine for place, cosine in alike.items() if self.stored.examples[place].label == nearest])
        strange = calibration.threshold is not None and score < calibration.threshold
        place = max(alike, key=alike.__getitem__)
        return api_types.Judgement(
            label=None if strange else nearest,
            nearest=nearest,
            probabilities=dict(zip(labels, chances, strict=True)),
            margin=ranked[0] - ranked[1],
            none_of_these=strange,
            familiarity=score,
            most_alike=api_types.SimilarExample(example=place, label=self.stored.examples[place].label, cosine=alike[place]),
        )


def _turn(role: str, texts: Sequence[str], pictures: Sequence[Picture]) -> Turn:
    if not pictures:
        return Turn(role, "\n".join(texts))
    if len(pictures) == 1:  # stands before the text, as LLaVA was trained
        return Turn(role, "\n".join(text for text in texts if text != IMAGE), pictures[0])
    return Turn(role, "\n".join(texts), pictures[0], further=tuple(pictures[1:]))


def key_of(stored: StoredSet) -> tuple[str, str]:
    return stored.namespace, f"{stored.id}-{stored.created}"


def summary(stored: StoredSet) -> api_types.SupportSetOut:
    labels = {label: sum(e.label == label for e in stored.examples) for label in stored.labels}
    return api_types.SupportSetOut(name=stored.name, version=stored.version, created=stored.created, labels=labels, question=stored.question)
