"""What waits in the engine's queue, and how that ends otherwise than with an answer."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, cast

from lcl_adapter.data.conversations import Turn
from lcl_adapter.errors import LclError
from lcl_adapter.serve.decoding import Sampling, Token

Key = tuple[str, str]  # what a prefilled set is kept under: whose it is, and which


class BusyError(LclError):
    """The queue is full. ``wait``: seconds until it is worth trying again."""

    def __init__(self, wait: int) -> None:
        self.wait = wait
        super().__init__(f"the queue is full; try again in {wait} s.")


class TimeoutExceededError(LclError):
    """A job waited, or took, longer than it may."""


class GoneError(LclError):
    """Nobody waits for the answer any more."""


@dataclass
class Job:
    """One question to one model.

    support: turns before it, read once and kept under ``key`` where there is one. answers: worded labels to score; without
    any, text is said, and ``say`` is told each token and answers whether to go on.
    """

    model: str
    support: Callable[[], Sequence[Turn]]
    turn: Turn
    key: Key | None = None
    answers: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    say: Callable[[Token], bool] | None = None
    deadline: float = math.inf
    future: Future[Any] = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)
    read: int = 0  # tokens of the prompt, known once it was read
    heard: bool = False

    @property
    def over(self) -> Exception | None:
        if self.cancelled.is_set():
            return GoneError("cancelled")
        return TimeoutExceededError("it took longer than it may") if time.monotonic() > self.deadline else None

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass
class Task:
    """Other work on the model, such as a calibration. ``run`` may return a generator, which is run a step at a time."""

    run: Callable[[], Any]
    steps: Generator[None, None, Any] | None = None
    future: Future[Any] = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass
class RunningTasks:
    """Tasks of several steps, under way. Each step goes to the oldest one, so that the first is done early and not all of them late."""

    running: deque[Task] = field(default_factory=deque)

    def step(self, task: Task) -> bool:
        """Run a task that has one step, or a step of the oldest that has several. True where ``task`` is to be queued again."""
        if task.steps is None:
            try:
                if task.cancelled.is_set():
                    raise GoneError("cancelled")
                result = task.run()
            except Exception as error:
                task.future.set_exception(error)
                return False
            if not isinstance(result, Generator):
                task.future.set_result(result)
                return False
            task.steps = result
            self.running.append(task)
        oldest = self.running[0]
        try:
            next(cast("Generator[None, None, Any]", oldest.steps))
        except StopIteration as finished:
            self.running.popleft().future.set_result(finished.value)
        except Exception as error:
            self.running.popleft().future.set_exception(error)
        else:
            return True
        return False


def alike(one: Job, other: Job) -> bool:
    return (one.model, one.key, bool(one.answers)) == (other.model, other.key, bool(other.answers))
