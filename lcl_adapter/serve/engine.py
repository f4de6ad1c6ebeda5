"""One model behind a queue: jobs of many clients, those of one support set together, and prefilled sets kept under a memory budget.

One thread owns the model. It takes the oldest job and with it every other that asks the same model about the same set, so
that a set is read once and its questions pass the model together. Prefilled sets are kept, least recently used out first.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional

from lcl_adapter.answering.cache import Prefilled
from lcl_adapter.answering.predict import Predictor, Question, Reply
from lcl_adapter.base.adapter import checkpoint_of, read_manifest
from lcl_adapter.base.model import Base, check_adapted
from lcl_adapter.base.prototypes import mean_patches
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.checkpoints.probe import probe, probe_turns
from lcl_adapter.data.conversations import WORDINGS, Turn
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import AdapterError, EpisodeError, LclError, MissingError, ModelError, RequestError, did_you_mean
from lcl_adapter.recipe import load
from lcl_adapter.recipe.wording import Wording
from lcl_adapter.serve.cache import CachedSet, Counters, SetCache, size_of
from lcl_adapter.serve.decoding import Chooser
from lcl_adapter.serve.images import digest_of
from lcl_adapter.serve.jobs import BusyError, Job, Key, RunningTasks, Task, alike

VISION = 64 * 2**20  # bytes of vision features that are kept between requests
DECODED = 4  # pictures in memory at a time, each up to 200 MB when it is padded to a square
WAVE = 8192  # tokens behind a set at a time: the mask grows with their square


@dataclass(frozen=True)
class Scored:
    """similarities: cosines to the set's pictures, in the order of its turns."""

    reply: Reply
    similarities: tuple[float, ...]


@dataclass(frozen=True)
class Model:
    """A name that clients ask: the base alone, or one adapter on it."""

    name: str
    wording: Wording
    folder: Path | None = None
    adapter: str = ""  # PEFT's own name for it, which may have fewer characters than a client's
    identity: str = ""  # of the weights, base's and adapter's: what was measured of another is not this one's
    created: float = field(default_factory=time.time)


class Engine:
    """``memory``: bytes that prefilled sets may take. ``queue``: jobs that may wait. ``pack``: questions behind one set at a time."""

    def __init__(self, base: Base, memory: int, queue: int = 256, pack: int = 16, name: str = "base") -> None:
        self.base = base
        self.limit = queue
        self.name = name
        own = WORDINGS[base.family.wording]
        self.models: dict[str, Model] = {name: Model(name, own, identity=base.checkpoint.hash())}
        self.counters = Counters()
        self.cache = SetCache(memory, self.counters)
        self._pack = pack
        self._waiting: deque[Job | Task] = deque()
        self._tasks = RunningTasks()
        self._changed = threading.Condition()
        self._stopping = False
        self._loaded = 0
        self._pace = 0.05  # seconds a job, a running mean
        self._predictor = self._fresh(base)
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> Engine:
        self._thread.start()
        return self

    def stop(self, patience: float = 30.0) -> None:
        """What waits is refused; what runs is finished, for so many seconds."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(patience)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def find(self, name: str) -> Model:
        """Raises MissingError."""
        found = self.models.get(name)
        if found is None:
            raise MissingError(f"no model {name!r}{did_you_mean(name, list(self.models))}; there are {', '.join(self.models)}.")
        return found

    def submit(self, *jobs: Job | Task) -> None:
        """All of them or none. Raises BusyError where the queue has no room, or the server is stopping."""
        with self._changed:
            if self._stopping:
                raise BusyError(5)
            asked = sum(isinstance(job, Job) for job in jobs)
            if asked and sum(isinstance(job, Job) for job in self._waiting) + asked > self.limit:
                self.counters.refused += len(jobs)
                raise BusyError(max(1, math.ceil(self._pace * len(self._waiting))))
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def call(self, run: Callable[[Engine], Any], timeout: float | None = None) -> Any:
        """Run something on the engine's thread and wait for it."""
        task = Task(partial(run, self))
        self.submit(task)
        try:
            return task.future.result(timeout)
        except TimeoutError:
            task.cancelled.set()
            raise

    # The engine's own thread from here on.

    def _loop(self) -> None:
        while True:
            batch = self._next()
            if not batch:
                return
            began = time.monotonic()
            try:
                if isinstance(batch[0], Task):
                    if self._tasks.step(batch[0]):
                        with self._changed:
                            self._waiting.append(batch[0])  # behind what has come in the meantime
                else:
                    self._answer([job for job in batch if isinstance(job, Job)])
            except BaseException as error:  # the thread must outlive whatever a request causes
                for job in batch:
                    if not job.future.done():
                        job.future.set_exception(error)
            self._pace = 0.8 * self._pace + 0.2 * (time.monotonic() - began) / len(batch)

    def _next(self) -> list[Job | Task]:
        """The oldest, and what goes with it. Empty when the server stops."""
        with self._changed:
            while not self._waiting and not self._stopping:
                self._changed.wait()
            if self._stopping:
                for job in (*self._waiting, *self._tasks.running):
                    if not job.future.done():
                        job.future.set_exception(BusyError(5))
                self._waiting.clear()
                return []
            first = self._waiting.popleft()
            if isinstance(first, Task) or first.key is None:
                return [first]
            wave, length = [first], self._length(first)
            for job in self._waiting:
                if len(wave) < self._pack and isinstance(job, Job) and alike(job, first) and length + self._length(job) <= WAVE:
                    wave.append(job)
                    length += self._length(job)
            taken = set(map(id, wave))
            self._waiting = deque(job for job in self._waiting if id(job) not in taken)
            return list(wave)

    def _length(self, job: Job) -> int:
        """Tokens of a question with its answers, by their characters: mostly fewer."""
        return len(job.turn.pictures) * self._predictor.encoder.tokens_an_image + 64 + len(job.turn.text) + sum(map(len, job.answers))

    @property
    def spare(self) -> int:
        """Tokens that a question must leave in the context."""
        return self._predictor.max_new_tokens

    def _answer(self, jobs: list[Job]) -> None:
        jobs = self._living(jobs)
        if not jobs:
            return
        first = jobs[0]
        try:
            with self.on(first.model):
                kept = self._prefilled(first)
                self.counters.waves += 1
                if first.answers:
                    replies = self.ask(kept.ready, [(job.turn, job.answers) for job in jobs])
                    similar = (self.vectors([job.turn.picture for job in jobs if job.turn.picture]) @ kept.vectors.T).tolist()
                    for job, reply, cosines in zip(jobs, replies, similar, strict=True):
                        job.future.set_result(Scored(reply, tuple(cosines)))
                else:
                    self._say(kept.ready, jobs)
            self.counters.answered += len(jobs)
        except Exception as error:
            if not isinstance(error, EpisodeError):
                self._forget(first)  # whatever state it is in
            if len(jobs) == 1:
                first.fail(RequestError(str(error)) if isinstance(error, EpisodeError) else error)
                return
            for job in jobs:  # one of them may be the cause; the others are to have their answers
                if job.heard:  # what was said cannot be taken back
                    job.fail(error)
                elif not job.future.done():
                    self._answer([job])

    def _living(self, jobs: list[Job]) -> list[Job]:
        found = []
        for job in jobs:
            over = job.over
            if over is None:
                found.append(job)
            else:
                self.counters.cancelled += 1
                job.fail(over)
        return found

    def on(self, model: str) -> AbstractContextManager[None]:
        """The model switched to this name's adapter, or to none."""
        found = self.find(model)
        if found.folder is None:
            return self.base.without_adapter() if isinstance(self.base.model, PeftModel) else nullcontext()
        self.base.model.set_adapter(found.adapter, inference_mode=True)
        return nullcontext()

    def prefill(self, turns: Sequence[Turn]) -> Prefilled:
        if turns:
            self.cache.make_room(len(self._predictor.encoder.turns(turns)[0]))
        return self._predictor.prefill([turns])

    def ask(self, ready: Prefilled, asked: Sequence[tuple[Turn, tuple[str, ...]]]) -> list[Reply]:
        return self._predictor.ask(ready, [Question(0, turn, answers) for turn, answers in asked], generate=False)

    @torch.inference_mode()
    def vectors(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """What the tower sees in each: its mean patch as a unit vector, [N, width], on the CPU."""
        if not pictures:
            return torch.empty(0, 0)
        return functional.normalize(mean_patches(pictures, self._predictor.vision), dim=1).cpu()

    def _prefilled(self, job: Job) -> CachedSet:
        place = None if job.key is None else (job.model, job.key)
        if place is not None and (known := self.cache.get(place)) is not None:
            return known
        turns = job.support()
        ready = self.prefill(turns)
        kept = CachedSet(ready, self.vectors([p for turn in turns for p in turn.pictures] if job.answers or place else []), size_of(ready))
        if place is not None:
            self.cache.put(place, kept)
        return kept

    def _forget(self, job: Job) -> None:
        if job.key is not None:
            self.cache.drop(lambda place: place == (job.model, job.key))

    def forget(self, key: Key) -> None:
        """A set that was changed or removed; on any thread."""

        def run() -> None:
            self.cache.drop(lambda place: place[1] == key)

        with suppress(BusyError):  # nothing asks for it by this key any more, so it goes as the least recently used
            self.submit(Task(run))

    def _say(self, ready: Prefilled, jobs: list[Job]) -> None:
        choosers = [Chooser(job.sampling) for job in jobs]
        encoder = self._predictor.encoder
        for job in jobs:
            job.read = int(ready.mask.sum()) + len(encoder.turns([job.turn], opened=True, first=ready.empty)[0])

        def choose(number: int, logits: torch.Tensor) -> int | None:
            job = jobs[number]
            over = job.over
            if over is not None:
                self.counters.cancelled += 1
                job.fail(over)
                return None
            assert job.say is not None
            try:
                token = choosers[number](logits)
                stops = token.id == encoder.eos or not job.say(token)
            except Exception as fault:  # this job's own, and no reason to end the others
                job.fail(fault)
                return None
            job.heard = True
            if stops:
                job.future.set_result("stop")
                return None
            if choosers[number].count >= job.sampling.max_tokens:
                job.future.set_result("length")
                return None
            return token.id

        self._predictor.generate(ready, [job.turn for job in jobs], choose, max(job.sampling.max_tokens for job in jobs))
        for job in jobs:
            if not job.future.done():
                job.future.set_result("length")

    def _fresh(self, base: Base) -> Predictor:
        return Predictor(base, VisionFeatures(base, limit=VISION, batch=DECODED), batch_size=1, pack=self._pack)

    def load_adapter(self, name: str, folder: Path) -> Model:
        """Put an adapter on the base under a name of its own; on the engine's thread.

        Raises AdapterError: of another base or prompt, in use, or one that changes nothing; what was loaded before is untouched.
        """
        if name in self.models:
            raise AdapterError(f"a model {name!r} is there already.")
        manifest = read_manifest(folder)
        checkpoint_of(folder, manifest, self.base.checkpoint.ref)
        if (self.base.family.name, self.base.family.version) != (manifest["family"], manifest["prompt_version"]):
            raise AdapterError(f"{folder}: trained with prompt {manifest['family']} v{manifest['prompt_version']}, which is not this base's.")
        if manifest["tiles"] != self.base.tiles:
            raise AdapterError(f"{folder}: trained with tiles {'on' if manifest['tiles'] else 'off'}; the server has them the other way.")
        recipe = folder / "recipe.yaml"
        wording = WORDINGS[load(recipe).wording] if recipe.exists() else self.models[self.name].wording
        self._loaded += 1
        own = f"adapter{self._loaded}"
        try:
            if isinstance(self.base.model, PeftModel):
                self.base.model.load_adapter(str(folder), own)
            else:
                self.base = self.base.with_model(PeftModel.from_pretrained(self.base.llava, str(folder), adapter_name=own))
            self.base.model.eval()
            check_adapted(self.base.model)
            self._check_it_answers(own, folder)
        except BaseException as error:
            self._take_off(own)
            if isinstance(error, LclError | KeyboardInterrupt):
                raise
            raise AdapterError(f"{folder}: cannot be put on this base ({type(error).__name__}).") from error
        identity = digest_of(json.dumps([manifest["base_hash"], manifest["files"]], sort_keys=True).encode())
        self.models[name] = Model(name, wording, folder, own, identity)
        self._predictor = self._fresh(self.base)
        return self.models[name]

    def unload_adapter(self, name: str) -> None:
        """On the engine's thread. Raises MissingError; ModelError for the base."""
        found = self.find(name)
        if found.folder is None:
            raise ModelError(f"{name!r} is the base, which stays.")
        del self.models[name]
        self.cache.drop(lambda place: place[0] == name)
        self._take_off(found.adapter)

    def _take_off(self, own: str) -> None:
        """Whatever of it was put on."""
        model = self.base.model
        if isinstance(model, PeftModel):
            others = [name for name in model.peft_config if name != own]
            if others:
                model.set_adapter(others[0], inference_mode=True)
                if own in model.peft_config:
                    model.delete_adapter(own)
            else:
                self.base = self.base.with_model(model.unload())
        self._predictor = self._fresh(self.base)

    def _check_it_answers(self, own: str, folder: Path) -> None:
        """Peers serve an adapter whose weights found no place as if it were the base."""
        turns = probe_turns("lcl")[:1]
        self.base.model.set_adapter(own, inference_mode=True)
        with_it = probe(self.base, turns)
        with self.base.without_adapter():
            change = with_it.distance(probe(self.base, turns))
        if not math.isfinite(change):
            raise AdapterError(f"{folder.name}: its answers are not finite (NaNs or infinities); the adapter is broken.")
        if change == 0.0:
            raise AdapterError(f"{folder.name}: changes nothing in what the base answers, so it is not served under a name of its own.")
