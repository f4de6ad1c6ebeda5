"""Support sets as questions are asked about them: stored ones, and ones that were sent with a request; their calibrations."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from lcl_adapter.answering import api_types
from lcl_adapter.answering.api_types import JudgeName
from lcl_adapter.answering.judgement import familiarity
from lcl_adapter.data.conversations import Turn, shown_order, support_turns
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import RunError
from lcl_adapter.recipe.wording import Wording
from lcl_adapter.serve.calibrate import Calibration, calibrate
from lcl_adapter.serve.engine import Engine
from lcl_adapter.serve.jobs import Scored, SetKey, Task
from lcl_adapter.serve.model import Model
from lcl_adapter.serve.store import Store

MAX_CALIBRATIONS = 1000  # in memory; those of stored sets are on disk too
CalibrationKey = tuple[SetKey, str]  # a set's key, and a model's identity with who judges


@dataclass(frozen=True)
class ShownSet:
    """A support set that questions are asked about.

    key: in the engine's cache; no other set or version has it. example_labels: of each photo, in the order of the photos.
    read: returns the photos with their labels. stored: the set's id in the store; None for one that was sent with a request.
    """

    key: SetKey
    example_labels: tuple[str, ...]
    question: str | None
    read: Callable[[], Sequence[tuple[Picture, str]]]
    stored: int | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Each label once, in the order of its first photo."""
        return tuple(dict.fromkeys(self.example_labels))

    def turns(self, wording: Wording) -> tuple[Turn, ...]:
        return support_turns(self.read(), wording)


def judgement_of(shown: ShownSet, scored: Scored, calibration: Calibration) -> api_types.Judgement:
    """The result for one photo, from the scores of the set's labels."""
    labels, photo_labels = shown.labels, shown.example_labels
    probabilities = calibration.probabilities(scored.reply.log_likelihoods)
    first, second = sorted(probabilities, reverse=True)[:2]
    nearest = labels[scored.reply.best]
    cosines = dict(zip(shown_order(len(photo_labels)), scored.similarities, strict=True))  # by the photo's index in the set
    score = familiarity([cosine for index, cosine in cosines.items() if photo_labels[index] == nearest])
    none_of_these = calibration.threshold is not None and score < calibration.threshold
    most_alike = max(cosines, key=cosines.__getitem__)
    return api_types.Judgement(
        label=None if none_of_these else nearest,
        nearest=nearest,
        probabilities=dict(zip(labels, probabilities, strict=True)),
        margin=first - second,
        none_of_these=none_of_these,
        familiarity=score,
        most_alike=api_types.SimilarExample(example=most_alike, label=photo_labels[most_alike], cosine=cosines[most_alike]),
    )


@dataclass
class Calibrations:
    """The calibrations of sets, each computed once for a model and who judges."""

    engine: Engine
    store: Store
    _running: dict[CalibrationKey, Future[Calibration]] = field(default_factory=dict)
    _done: dict[CalibrationKey, Calibration] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        """How many are in memory."""
        return len(self._done)

    def of(self, shown: ShownSet, model: Model, judge: JudgeName | None = None) -> Future[Calibration]:
        """A set's calibration for a model: from memory, from the store, or computed by a task of the engine.

        judge: of the model's own, by default. Raises BusyError.
        """
        judge = judge or model.judge()
        judging = model.identity if judge == model.judge() else f"{model.identity} {judge}"
        key = (shown.key, judging)
        calibration = self._done.get(key)
        if calibration is None and shown.stored is not None and (fields := self.store.read_calibration(shown.stored, judging)) is not None:
            calibration = Calibration.from_json(fields)
        if calibration is not None:
            done: Future[Calibration] = Future()
            done.set_result(calibration)
            return done
        with self._lock:
            running = self._running.get(key)
            if running is not None:
                return running
            task = Task(lambda: self._steps(shown, model, judge, key), shown.key[0])
            self.engine.submit(task)
            self._running[key] = task.future
        task.future.add_done_callback(lambda _: self._running.pop(key, None))
        return task.future

    def _steps(self, shown: ShownSet, model: Model, judge: JudgeName, key: CalibrationKey) -> Generator[None, None, Calibration]:
        """The steps of a task. Its last one stores the calibration and returns it."""
        steps = calibrate(self.engine, model.name, shown.read(), model.wording, shown.question, judge)
        while True:
            with self.engine.using(model.name):  # between two steps a job may have switched to another adapter
                try:
                    next(steps)
                except StopIteration as finished:
                    self._store(shown, key, finished.value)
                    return finished.value
            yield

    def _store(self, shown: ShownSet, key: CalibrationKey, calibration: Calibration) -> None:
        """In memory, and on disk for a stored set. If the disk is full, the copy in memory is enough to answer."""
        if len(self._done) >= MAX_CALIBRATIONS:
            self._done.pop(next(iter(self._done)))
        self._done[key] = calibration
        if shown.stored is not None:
            with suppress(RunError):
                self.store.write_calibration(shown.stored, key[1], calibration.to_json())
