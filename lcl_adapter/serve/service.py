"""What the routes do, without HTTP: requests and stored sets become jobs, and the engine's replies become responses."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lcl_adapter.answering import api_types
from lcl_adapter.answering.chunks import parts_that_fit, tokens_asked
from lcl_adapter.base.encoder import Encoder
from lcl_adapter.base.families import IMAGE
from lcl_adapter.base.vision import read_side
from lcl_adapter.data.conversations import Turn, shown_before, support_turns
from lcl_adapter.data.sources import Picture
from lcl_adapter.data.sources.depth import common_white
from lcl_adapter.devices import release_memory
from lcl_adapter.errors import AdapterError, DataError, MissingError, RequestError, UserError
from lcl_adapter.serve.classification import Classification
from lcl_adapter.serve.decoding import Sampling, TextDecoder
from lcl_adapter.serve.edits import with_photo, without_photo
from lcl_adapter.serve.engine import Engine
from lcl_adapter.serve.jobs import Job, SetKey
from lcl_adapter.serve.model import Model
from lcl_adapter.serve.pictures.images import Bounds, Spent, check, digest_of, from_data_url
from lcl_adapter.serve.sets import Calibrations, ShownSet
from lcl_adapter.serve.store import Example, Store, StoredSet

MAX_WHITES = 1000  # of sets, that are remembered
MAX_DECODABLE = 100_000  # images whose check is remembered
MAX_PREPARED = 128 * 2**20  # bytes of the small copies of costly images


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
    _whites: dict[int, float | None] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _decodable: dict[tuple[str, str], bytes | None] = field(default_factory=dict)  # by caller and digest: the copy of an image that costs much
    _prepared_bytes: int = 0

    def __post_init__(self) -> None:
        self.calibrations = Calibrations(self.engine, self.store)

    # Support sets

    def put(self, namespace: str, name: str, request: api_types.SupportSetIn) -> StoredSet:
        """Check everything, then store.

        Raises RequestError with the example's number; ConflictError; RunError if the disk is full.
        """
        for number, example in enumerate(request.examples):
            self.check_text(example.label, f"examples[{number}].label")
        self.check_text(request.question or "", "question")
        self.check_length([(Picture(Path("image")), example.label) for example in request.examples], request.question)
        spent = Spent(namespace)
        examples = [(e.label, self.decode(e.image, f"examples[{number}].image", spent)) for number, e in enumerate(request.examples)]
        return self.store.put(namespace, name, examples, request.question, request.expected_version)

    def add_photo(self, namespace: str, name: str, request: api_types.PhotoIn) -> StoredSet:
        """A new version of a set, with one more photo. Raises MissingError, RequestError, ConflictError; RunError if the disk is full."""
        self.check_text(request.label, "label")
        data = self.decode(request.image, "image", Spent(namespace))
        question = self.store.get(namespace, name).question  # before the image is written
        added = Example(request.label, self.store.add_image(namespace, data))

        def changed(examples: tuple[Example, ...]) -> tuple[Example, ...]:
            grown = with_photo(examples, added)
            self.check_length([(Picture(Path("image")), example.label) for example in grown], question)
            return grown

        return self.store.change(namespace, name, changed, request.expected_version)

    def drop_photo(self, namespace: str, name: str, number: int, expected: int | None) -> StoredSet:
        """A new version of a set, without one photo. Raises MissingError, RequestError, ConflictError; RunError if the disk is full."""
        return self.store.change(namespace, name, lambda examples: without_photo(examples, number), expected)

    def decode(self, url: str, where: str, spent: Spent) -> bytes:
        """The image file's bytes, checked. spent: on the request's images so far.

        Raises RequestError; TimeoutError if too many images wait to be decoded.
        """
        try:
            data = from_data_url(url, self.bounds)
            self._check(data, digest_of(data), spent)
        except DataError as error:
            raise RequestError(f"{where}: {error}") from error
        return data

    def sent_picture(self, namespace: str, url: str, where: str, spent: Spent) -> Picture:
        """A picture of a request. Of an image that costs much, it is the small copy. spent, errors: as :meth:`decode`."""
        try:
            data = from_data_url(url, self.bounds)
            digest = digest_of(data)
            return _picture(namespace, digest, self._check(data, digest, spent) or data)
        except DataError as error:
            raise RequestError(f"{where}: {error}") from error

    def _check(self, data: bytes, digest: str, spent: Spent) -> bytes | None:
        """Check an image, unless the same caller's was checked before: those that were sent longest ago are forgotten first.

        Callers share no check, so that nobody learns from its time what others have sent.
        Returns the copy that the engine decodes in its place, None for an image that costs little. Raises DataError, TimeoutError.
        """
        key = (spent.caller, digest)
        with self._lock:
            known = key in self._decodable
            copy = self._decodable.get(key)
        if not known:
            copy = check(data, self.bounds, spent, read_side(self.engine.base))
        with self._lock:
            self._forget(key)
            self._decodable[key] = copy
            self._prepared_bytes += len(copy or b"")
            while len(self._decodable) > MAX_DECODABLE or self._prepared_bytes > MAX_PREPARED:
                self._forget(next(iter(self._decodable)))
        return copy

    def _forget(self, key: tuple[str, str]) -> None:
        self._prepared_bytes -= len(self._decodable.pop(key, None) or b"")

    def _copies(self, stored: StoredSet) -> dict[str, bytes]:
        """The copies of a set's costly images by their digests.

        A set may come from a server with other bounds, and the engine's only thread decodes its photos: each is checked once.
        Raises RequestError with the example's number.
        """
        spent, copies = Spent(stored.namespace), {}
        for number, example in enumerate(stored.examples):
            try:
                copy = self._decodable[stored.namespace, example.image]
            except KeyError:
                try:
                    copy = self._check(self.store.bytes_of(stored.namespace, example.image), example.image, spent)
                except DataError as error:
                    raise RequestError(f"support set {stored.name!r}, examples[{number}]: {error}") from error
            if copy is not None:
                copies[example.image] = copy
        return copies

    def check_length(self, examples: Sequence[tuple[Picture, str]], question: str | None) -> None:
        """Every loaded model must have room for the set or its parts, a question and its longest answer. Raises RequestError."""
        for model in list(self.engine.models.values()):
            encoder = self.encoder_of(model)
            answer = max((model.wording.answered(label) for _, label in examples), key=len)
            asked = tokens_asked(encoder, Turn("user", question or model.wording.query, examples[0][0]), [answer]) + self.engine.reserved_tokens
            turns = support_turns(examples, model.wording)
            length = encoder.support(turns).longest + asked
            if length > encoder.context and len(parts_that_fit(turns, encoder, asked)) == 1:
                each = encoder.support_tokens or encoder.tokens_an_image
                raise RequestError(
                    f"{len(examples)} photos and a question are {length} tokens ({each} per photo); they do not fit the "
                    f"context of {encoder.context}: show fewer."
                )

    @cached_property
    def encoder(self) -> Encoder:
        return self.engine.base.encoder()

    def encoder_of(self, model: Model) -> Encoder:
        """With this model's form of a support set."""
        return self.engine.base.with_supports(*model.form).encoder()

    def check_text(self, text: str, where: str) -> None:
        """Raises RequestError for a text that the model would read as a part of its prompt."""
        token = self.encoder.special_token_in(text)
        if token is not None:
            raise RequestError(f"{where}: contains {token!r}, a special token of the model's prompt. Leave it out.")

    def with_examples(self, stored: StoredSet) -> api_types.SupportSetWithExamples:
        """A set with its examples, without the images' bytes."""
        examples = [api_types.StoredExample(label=example.label, sha256=example.image) for example in stored.examples]
        return api_types.SupportSetWithExamples(**summary(stored).model_dump(), examples=examples)

    def remove(self, namespace: str, name: str, expected: int | None) -> None:
        """Remove a set with all its versions, from the store and from the engine's cache.

        Raises MissingError, ConflictError.
        """
        versions = [self.store.get(namespace, name, number) for number, _ in self.store.versions(namespace, name)]
        self.store.remove(namespace, name, expected)
        for stored in versions:
            self.engine.drop_set(key_of(stored))

    def shown(self, stored: StoredSet) -> ShownSet:
        """A stored set, to be asked about. Raises RequestError for an image that must not be decoded, with the example's number."""
        labels, copies = tuple(example.label for example in stored.examples), self._copies(stored)
        return ShownSet(key_of(stored), labels, stored.question, lambda: self._examples(stored, copies), stored.id)

    def _examples(self, stored: StoredSet, copies: Mapping[str, bytes]) -> list[tuple[Picture, str]]:
        space = stored.namespace
        pictures = [_picture(space, e.image, copies.get(e.image) or self.store.bytes_of(space, e.image)) for e in stored.examples]
        return on_one_scale(pictures, [e.label for e in stored.examples])

    def white(self, shown: ShownSet) -> float | None:
        """The value that is white in a stored set's photos, if they have more than 8 bits: new photos are read alike."""
        assert shown.stored is not None
        if shown.stored not in self._whites:
            if len(self._whites) >= MAX_WHITES:
                self._whites.pop(next(iter(self._whites)))
            self._whites[shown.stored] = shown.read()[0][0].white
        return self._whites[shown.stored]

    # Classification

    def classify(self, namespace: str, request: api_types.ClassifyIn) -> Classification:
        """Queue a job for each image that can be used. Raises MissingError, RequestError, BusyError."""
        model = self.engine.find(request.model or self.default_model)
        stored = self.store.get(namespace, request.support_set, request.version)
        self.check_text(request.question or "", "question")
        if len(request.images) > self.engine.queue_limit:
            raise RequestError(
                f"{len(request.images)} images are more than the {self.engine.queue_limit} questions that may wait; send fewer at a time."
            )
        shown = self.shown(stored)
        judge = model.judge(request.judge)
        spent = Spent(namespace)
        asked: dict[str, Any] = {"judge": judge, "deadline": time.monotonic() + self.timeout, "caller": namespace}
        answers = tuple(model.wording.answered(label) for label in stored.labels)
        question = request.question or stored.question or model.wording.query
        white = self.white(shown)
        jobs: list[Job | UserError] = []
        for number, url in enumerate(request.images):
            try:
                picture = replace(self.sent_picture(namespace, url, f"images[{number}]", spent), white=white)
            except RequestError as error:
                jobs.append(error)
                continue
            turn = Turn("user", question, picture)
            jobs.append(Job(model.name, partial(shown.turns, model.wording), turn, shown.key, answers, **asked))
        usable = [job for job in jobs if isinstance(job, Job)]
        copies = model.form.supports != "ordered"  # then a calibration has no photo to read after the whole set
        if copies:
            self.engine.submit(*usable)
        calibration = self.calibrations.of(shown, model, judge) if usable else None
        if not copies:
            self.engine.submit(*usable)
        return Classification(stored, shown, model, judge, calibration, jobs)

    @property
    def default_model(self) -> str:
        """The first adapter's name, or the base's if there is no adapter."""
        return next((name for name, model in list(self.engine.models.items()) if model.folder is not None), self.engine.name)

    # Chat

    def chat(self, namespace: str, request: api_types.ChatIn) -> tuple[Job, TextDecoder]:
        """A job that is not queued yet, and the decoder of its tokens. Raises MissingError, RequestError."""
        model = self.engine.find(request.model)
        turns = self.turns_of(namespace, request.messages, Spent(namespace))
        sampling = Sampling(request.temperature, request.top_p, request.seed, request.top_logprobs, request.token_limit)
        before, key = turns[:-1], None
        support: Callable[[], Sequence[Turn]] = lambda: before  # noqa: E731
        if request.support_set is not None:
            stored = self.store.get(namespace, request.support_set, request.support_set_version)
            shown = self.shown(stored)
            key = None if before else key_of(stored)  # only the set alone is cached, not a set with more turns
            support = lambda: (*shown.turns(model.wording), *before)  # noqa: E731
        encoder = self.encoder_of(model)
        # without the set; the engine checks the whole length
        asked = len(encoder.turns(turns[-1:], opened=True, first=not before)[0])
        length = encoder.support(before).longest + asked + request.token_limit
        if length > encoder.context:
            raise RequestError(f"the messages and up to {request.token_limit} new tokens are {length} tokens, the context is {encoder.context}.")
        decoder = TextDecoder(self.engine.base.tokenizer, request.stops)
        deadline = time.monotonic() + self.timeout
        job = Job(model.name, support, turns[-1], key, sampling=sampling, on_token=decoder.add, deadline=deadline, caller=namespace)
        return job, decoder

    def turns_of(self, namespace: str, messages: Sequence[api_types.Message], spent: Spent) -> tuple[Turn, ...]:
        """Messages as turns.

        System texts go before the next user text, for LLaVA's prompts have one fixed system text. spent: as in :meth:`decode`.
        Raises RequestError.
        """
        turns: list[Turn] = []
        instructions: list[str] = []
        images = 0
        for number, message in enumerate(messages):
            texts: list[str] = []
            pictures: list[Picture] = []
            for place, part in enumerate(message.parts):
                where = f"messages[{number}].content[{place}]"
                if isinstance(part, api_types.TextPart):
                    self.check_text(part.text, where)
                    texts.append(part.text)
                else:
                    images += 1
                    if message.role != "user":
                        raise RequestError(f"{where}: only a user message can have images.")
                    if images > self.bounds.images:
                        raise RequestError(f"{where}: a conversation has at most {self.bounds.images} images.")
                    pictures.append(self.sent_picture(namespace, part.image_url.url, where, spent))
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
        return shown_before(turns)

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

        def unload(engine: Engine) -> None:
            engine.unload_adapter(name)
            release_memory(loaded=True)

        self.engine.call(unload, self.timeout)


def _picture(namespace: str, digest: str, data: bytes) -> Picture:
    """A picture whose path begins with the namespace, so that no cache is shared between callers."""
    return Picture(Path(namespace) / digest, data=data)


def _turn(role: str, texts: Sequence[str], pictures: Sequence[Picture]) -> Turn:
    if not pictures:
        return Turn(role, "\n".join(texts))
    if len(pictures) == 1:  # LLaVA was trained with a single image before the text
        return Turn(role, "\n".join(text for text in texts if text != IMAGE), pictures[0])
    return Turn(role, "\n".join(texts), pictures[0], further=tuple(pictures[1:]))


def on_one_scale(pictures: Sequence[Picture], labels: Sequence[str]) -> list[tuple[Picture, str]]:
    """A set's photos with their labels, and with one white for all that have more than 8 bits."""
    white = common_white(pictures)
    return [(replace(picture, white=white), label) for picture, label in zip(pictures, labels, strict=True)]


def key_of(stored: StoredSet) -> SetKey:
    """The key of a stored set in the engine's cache.

    The time is part of it, for a store that was deleted and made anew reuses ids.
    """
    return stored.namespace, f"{stored.id}-{stored.created}"


def summary(stored: StoredSet) -> api_types.SupportSetOut:
    labels = {label: sum(e.label == label for e in stored.examples) for label in stored.labels}
    return api_types.SupportSetOut(name=stored.name, version=stored.version, created=stored.created, labels=labels, question=stored.question)
