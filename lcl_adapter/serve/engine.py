"""One model behind a queue: batches of jobs about the same support set, and a cache of prefilled sets.

One thread owns the model. It takes the next job from the queue, which serves callers in turn, together with every other job
for the same model and the same set. So a set is prefilled once, and its questions go through the model in one batch. The prefilled set
stays in the cache.

Shapes: N pictures, C width of a vector, S pictures of a support set, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from lcl_adapter import devices
from lcl_adapter.answering import api_types
from lcl_adapter.answering.cache import Prefilled
from lcl_adapter.answering.chunks import parts_by_shots, parts_that_fit, tokens_asked
from lcl_adapter.answering.judgement import LeastFamiliar, read_weighing
from lcl_adapter.answering.predict import Question, Reply
from lcl_adapter.base.model import Base, check_adapted
from lcl_adapter.base.ref import NOT_GIVEN, BaseRef
from lcl_adapter.data.conversations import WORDINGS, Turn, wording_of
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import AdapterError, EpisodeError, LclError, MissingError, ModelError, RequestError, did_you_mean
from lcl_adapter.recipe import load
from lcl_adapter.serve import judging
from lcl_adapter.serve.adapters import base_identity, check_effect, identity_of, in_its_form, matching_manifest
from lcl_adapter.serve.cache import CachedSet, Counters, SetCache
from lcl_adapter.serve.decoding import TokenSampler
from lcl_adapter.serve.jobs import BusyError, FairQueue, Job, RunningTasks, Scored, SetKey, Task, same_batch
from lcl_adapter.serve.model import Model
from lcl_adapter.serve.predictors import Predictors

MAX_BATCH_TOKENS = 8192  # tokens of the questions in a batch; the attention mask grows with their square
STOPPING_RETRY = 5  # seconds after which a client may ask again when the server stops


class Engine:
    """The model, its thread and its queue.

    memory: bytes for cached sets. queue: jobs of one caller that may wait. pack: questions in a batch. name: the base's, for clients.
    asked: tokens of a labelled photo, orientations and readings, for all models; what is not given, as each adapter's manifest says.
    """

    def __init__(self, base: Base, memory: int, queue: int = 256, pack: int = 16, name: str = "base", asked: BaseRef = NOT_GIVEN) -> None:
        times = (asked.orientations or base.orientations, asked.readings or base.readings)
        self.base = base.with_supports(asked.support_tokens or base.support_tokens, base.supports, base.shots, *times)
        self._asked = asked
        self.queue_limit = queue
        self.name = name
        wording = WORDINGS[base.family.wording]
        self.models: dict[str, Model] = {name: Model(name, wording, identity=base_identity(self.base), form=self.base.form)}
        self.counters = Counters()
        self.cache = SetCache(memory, self.counters)
        self._pack = pack
        self._waiting = FairQueue()
        self._tasks = RunningTasks()
        self._changed = threading.Condition()
        self._stopping = False
        self._adapters_loaded = 0
        self._seconds_per_job = 0.05  # a running mean
        self._set_predictor()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> Engine:
        self._thread.start()
        return self

    def stop(self, timeout: float = 30.0) -> None:
        """Refuse all waiting jobs, and wait up to ``timeout`` seconds for the running batch."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """Jobs and tasks in the queue."""
        return len(self._waiting)

    def find(self, name: str) -> Model:
        """Raises MissingError."""
        model = self.models.get(name)
        if model is None:
            name = name[: api_types.MAX_MODEL_NAME]
            raise MissingError(f"no model {name!r}{did_you_mean(name, list(self.models))}; this server has {', '.join(self.models)}.")
        return model

    def submit(self, *jobs: Job | Task) -> None:
        """Queue all of them or none.

        Raises BusyError if the queue has no room for the jobs of one of their callers, or the server is stopping.
        """
        with self._changed:
            if self._stopping:
                raise BusyError(STOPPING_RETRY)
            counts = Counter(job.caller for job in jobs if isinstance(job, Job))
            if any(self._waiting.jobs_of(caller) + count > self.queue_limit for caller, count in counts.items()):
                self.counters.refused += len(jobs)
                raise BusyError(max(1, math.ceil(self._seconds_per_job * len(self._waiting))))
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def call(self, run: Callable[[Engine], Any], timeout: float | None = None) -> Any:
        """Run a function on the engine's thread and wait for its result.

        Raises TimeoutError, and what the function raises.
        """
        task = Task(partial(run, self))
        self.submit(task)
        try:
            return task.future.result(timeout)
        except TimeoutError:
            task.cancelled.set()
            raise

    def drop_set(self, key: SetKey) -> None:
        """Remove a set from the cache, for every model, after it was changed or removed in the store.

        Any thread may call this.
        """

        def run() -> None:
            self.cache.drop(lambda cache_key: cache_key[1] == key)

        with suppress(BusyError):  # no request uses this key any more, so the set is evicted as the least recently used
            self.submit(Task(run))

    # From here on: the engine's own thread.

    def _loop(self) -> None:
        while True:
            batch = self._next_batch()
            if not batch:
                return
            began = time.monotonic()
            try:
                if isinstance(batch[0], Task):
                    if self._tasks.step(batch[0]):
                        with self._changed:
                            self._waiting.extend(batch)  # behind the jobs that were submitted in the meantime
                else:
                    self._answer([job for job in batch if isinstance(job, Job)])
            except BaseException as error:  # no request may end the thread
                for job in batch:
                    if not job.future.done():
                        job.future.set_exception(error)
            self._seconds_per_job = 0.8 * self._seconds_per_job + 0.2 * (time.monotonic() - began) / len(batch)

    def _next_batch(self) -> list[Job | Task]:
        """Wait for work; return the next entry, and the jobs that can be answered with it.

        Empty when the server stops.
        """
        with self._changed:
            while not self._waiting and not self._stopping:
                self._changed.wait()
            if self._stopping:
                for job in (*self._waiting, *self._tasks.running):
                    if not job.future.done():
                        job.future.set_exception(BusyError(STOPPING_RETRY))
                self._waiting.clear()
                return []
            first = self._waiting.pop()
            if isinstance(first, Task) or first.key is None:
                return [first]
            image = self._predictor.encoder.tokens_an_image
            batch, tokens = [first], first.token_bound(image)
            for job in self._waiting:
                if len(batch) == self._pack:
                    break
                if isinstance(job, Job) and same_batch(job, first) and tokens + job.token_bound(image) <= MAX_BATCH_TOKENS:
                    batch.append(job)
                    tokens += job.token_bound(image)
            self._waiting.remove(batch)
            return list(batch)

    @property
    def reserved_tokens(self) -> int:
        """Tokens of the context that are reserved for an answer, after a set and a question."""
        return self._predictor.max_new_tokens

    def _answer(self, jobs: list[Job]) -> None:
        """Answer jobs of the same batch.

        If the batch fails, each job is tried alone, so that a fault ends only the job that causes it.
        """
        jobs = self._without_aborted(jobs)
        if not jobs:
            return
        first = jobs[0]
        try:
            with self.using(first.model):
                cached = self._prefilled(first)
                self.counters.waves += 1
                for job in jobs:
                    question_tokens = len(self._predictor.encoder.turns([job.turn], opened=True, first=cached.prefilled.empty)[0])
                    job.prompt_tokens = int(cached.prefilled.mask.sum()) + question_tokens
                if first.answers:
                    for job, scored in zip(jobs, self._scored(cached, jobs), strict=True):
                        job.future.set_result(scored)
                else:
                    self._generate(cached.prefilled, jobs)
            self.counters.answered += len(jobs)
        except Exception as error:
            if devices.is_out_of_memory(error) and len(self.cache) > 1:  # other sets are in the way: once more without them
                error.__traceback__ = None  # it holds the tensors of the failed pass
                self.cache.drop(lambda key: key[:2] != (first.model, first.key))
                devices.release_memory()
                for job in jobs:
                    if job.has_output:
                        job.fail(error)
                self._answer([job for job in jobs if not job.future.done()])
                return
            if not isinstance(error, EpisodeError):
                self._drop_cached(first)  # its state is unknown after a fault
            if len(jobs) == 1:
                first.fail(RequestError(str(error)) if isinstance(error, EpisodeError) else error)
                return
            for job in jobs:
                if job.has_output:  # the client has a part of the text, so the job cannot be repeated
                    job.fail(error)
                elif not job.future.done():
                    self._answer([job])

    def _scored(self, cached: CachedSet, jobs: Sequence[Job]) -> list[Scored]:
        """The scores of the answers of jobs that are all judged, or none is."""
        replies = self._predictor.ask_parts(cached.prefilled, [Question(0, job.turn, job.answers, job.ended) for job in jobs], generate=False)
        if not jobs[0].judged:
            return [Scored(reply) for reply in replies]
        questions = [(job.turn, job.answers) for job in jobs]
        replies = judging.judged(self.find(jobs[0].model), cached.shown, questions, replies, self._predictor.vision, jobs[0].judge)
        vectors_NC = self.vectors(jobs[0].model, [job.turn.picture for job in jobs if job.turn.picture])
        cosines_NS = (vectors_NC @ cached.vectors.T).tolist()
        return [Scored(reply, tuple(cosines), cached.prefilled.divisions) for reply, cosines in zip(replies, cosines_NS, strict=True)]

    def _without_aborted(self, jobs: list[Job]) -> list[Job]:
        """End the jobs that were cancelled or are past their deadline; return the others."""
        active = []
        for job in jobs:
            error = job.abort_error
            if error is None:
                active.append(job)
            else:
                self.counters.cancelled += 1
                job.fail(error)
        return active

    def using(self, name: str) -> AbstractContextManager[None]:
        """Inside the block the model has this name's adapter, or none for the base. Raises MissingError."""
        model = self.find(name)
        if model.folder is None:
            return self.base.without_adapter() if isinstance(self.base.model, PeftModel) else nullcontext()
        self.base.model.set_adapter(model.adapter, inference_mode=True)
        return nullcontext()

    def prefill(self, name: str, turns: Sequence[Turn], question: Turn, answers: Sequence[str]) -> Prefilled:
        """Read a set by the model of this name; for a question whose answers are scored, in parts where they are due.

        Cached sets are evicted first if there is not enough memory for both; what they have of an independent set is not read again.
        """
        predictor = self._predictors.of(self.find(name))
        encoder = predictor.encoder
        if turns:
            self.cache.make_room(encoder.support(turns).visible)
        behind = tokens_asked(encoder, question, answers) + predictor.max_new_tokens
        parts = predictor.parts(turns, behind) if answers else parts_that_fit(turns, encoder, behind)
        if len(parts) > 1 and not answers:
            raise EpisodeError("this set is larger than the context. It is read in parts: its labels can be scored, but no text can be written.")
        return predictor.prefill(parts, known=self.cache.of_model(name))

    def ask(self, prefilled: Prefilled, questions: Sequence[tuple[Turn, tuple[str, ...]]]) -> list[Reply]:
        """Score the worded labels of each question by one prefilled set."""
        return self._predictor.ask_parts(prefilled, [Question(0, turn, answers) for turn, answers in questions], generate=False)

    def judge(self, name: str, turns: Sequence[Turn], questions: Sequence[tuple[Turn, tuple[str, ...]]], judge: api_types.JudgeName) -> list[Reply]:
        """Judge by labelled photos that are not cached. The model of this name must be in use."""
        model, vision = self.find(name), self._predictor.vision
        shown, replies = judging.shown_labels(model, turns, vision), self.ask(self.prefill(name, turns, *questions[0]), questions)
        return judging.judged(model, shown, questions, replies, vision, judge)

    def vectors(self, name: str, pictures: Sequence[Picture]) -> torch.Tensor:
        """What the model of this name compares pictures by, as unit vectors of the vision tower, [N, C], on the CPU."""
        return judging.tower_of(self.find(name), self._predictor.vision).vectors(pictures)

    def least_familiar(self, name: str) -> LeastFamiliar | None:
        """How familiar photos of classes that the model of this name was not trained on are at least; None where it is not known."""
        weighing = self.find(name).weighing
        return weighing.least_familiar if weighing is not None else None

    def _prefilled(self, job: Job) -> CachedSet:
        """The job's support set, from the cache if it is there."""
        if job.key is not None and (cached := self.cache.find(job.model, job.key, bool(job.answers))) is not None:
            return cached
        turns = job.support()
        prefilled = self.prefill(job.model, turns, job.turn, job.answers)
        needs_vectors = bool(job.answers and job.judged) or job.key is not None
        pictures = [picture for turn in turns for picture in turn.pictures] if needs_vectors else []
        shown = judging.shown_labels(self.find(job.model), turns, self._predictor.vision) if needs_vectors else None
        form = self.find(job.model).form
        divided = form.orientations > 1 or parts_by_shots(turns, form.shots) > 1
        cached = CachedSet(prefilled, self.vectors(job.model, pictures), prefilled.bytes, shown, for_texts=divided and not job.answers)
        if job.key is not None:
            self.cache.put((job.model, job.key, len(prefilled.longest) > 1), cached)
        return cached

    def _drop_cached(self, job: Job) -> None:
        if job.key is not None:
            self.cache.drop(lambda key: key[:2] == (job.model, job.key))

    def _generate(self, prefilled: Prefilled, jobs: list[Job]) -> None:
        """Generate text for each job, a token at a time for all of them.

        Sets each future to OpenAI's finish reason, "stop" or "length".
        """
        samplers = [TokenSampler(job.sampling) for job in jobs]
        eos = self._predictor.encoder.eos

        def choose(number: int, logits_V: torch.Tensor) -> int | None:
            """The next token of a job, or None if its answer has ended."""
            job = jobs[number]
            abort_error = job.abort_error
            if abort_error is not None:
                self.counters.cancelled += 1
                job.fail(abort_error)
                return None
            assert job.on_token is not None
            try:
                token = samplers[number](logits_V)
                ended = token.id == eos or not job.on_token(token)
            except Exception as error:  # this job's own fault; the others go on
                job.fail(error)
                return None
            job.has_output = True
            if ended:
                job.future.set_result("stop")
                return None
            if samplers[number].count >= job.sampling.max_tokens:
                job.future.set_result("length")
                return None
            return token.id

        self._predictor.generate(prefilled, [job.turn for job in jobs], choose, max(job.sampling.max_tokens for job in jobs))
        for job in jobs:
            if not job.future.done():
                job.future.set_result("length")

    def _set_predictor(self) -> None:
        """Predictors of the base as it is now."""
        self._predictors = Predictors(self.base, self._pack)
        self._predictor = self._predictors.own

    def load_adapter(self, name: str, folder: Path) -> Model:
        """Load an adapter under a name of its own, on the engine's thread. If it fails, other models stay as they were.

        The same adapter under the same name is loaded once: a client whose request took too long sends it again.
        Raises AdapterError if the name is in use for another model, or the adapter is for another base or prompt, is
        broken, or changes no answer.
        """
        manifest = matching_manifest(folder, self.base)
        own = in_its_form(name, manifest, self.base, self._asked)
        identity = identity_of(manifest, own)
        recipe = folder / "recipe.yaml"
        wording = wording_of(load(recipe)) if recipe.exists() else self.models[self.name].wording
        existing = self.models.get(name)
        if existing is not None:
            if existing.folder is not None and (existing.identity, existing.wording) == (identity, wording):
                return existing
            raise AdapterError(f"a model {name!r} with other weights or another wording exists already. Unload it first, or give another name.")
        self._adapters_loaded += 1
        peft_name = f"adapter{self._adapters_loaded}"
        try:
            if isinstance(self.base.model, PeftModel):
                self.base.model.load_adapter(str(folder), peft_name)
            else:
                self.base = self.base.with_model(PeftModel.from_pretrained(self.base.llava, str(folder), adapter_name=peft_name))
            self.base.model.eval()
            check_adapted(self.base.model)
            check_effect(self.base, peft_name, folder)
        except BaseException as error:
            self._remove_adapter(peft_name)
            if isinstance(error, LclError | KeyboardInterrupt):
                raise
            raise AdapterError(f"{folder}: cannot be loaded on this base ({type(error).__name__}).") from error
        weighing, space = read_weighing(folder, manifest) or (None, None)
        self.models[name] = Model(name, wording, folder, peft_name, identity, weighing=weighing, space=space, form=own.form)
        self._set_predictor()
        return self.models[name]

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter, on the engine's thread. Raises MissingError; ModelError for the base."""
        model = self.find(name)
        if model.folder is None:
            raise ModelError(f"{name!r} is the base, which cannot be unloaded.")
        del self.models[name]
        self.cache.drop(lambda key: key[0] == name)
        self._remove_adapter(model.adapter)

    def _remove_adapter(self, peft_name: str) -> None:
        """Remove an adapter from the model, even if it was loaded only in part."""
        model = self.base.model
        if isinstance(model, PeftModel):
            others = [name for name in model.peft_config if name != peft_name]
            if others:
                model.set_adapter(others[0], inference_mode=True)
                if peft_name in model.peft_config:
                    model.delete_adapter(peft_name)
            else:
                self.base = self.base.with_model(model.unload())
        self._set_predictor()
