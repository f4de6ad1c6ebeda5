"""The entries of the engine's queue: jobs (questions to a model), tasks (other work), and errors that end them."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, cast

from lcl_adapter.answering.api_types import JudgeName
from lcl_adapter.answering.predict import Reply
from lcl_adapter.data.conversations import Turn
from lcl_adapter.errors import LclError
from lcl_adapter.serve.decoding import Sampling, Token

SetKey = tuple[str, str]  # a stored set: its namespace, and an id that no other version or set has


class BusyError(LclError):
    """The queue is full, or the server stops. ``retry_after``: seconds to wait before another try."""

    def __init__(self, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(f"the queue is full; try again in {retry_after} s.")


class TimeoutExceededError(LclError):
    """A job waited or ran longer than the server's time limit."""


class GoneError(LclError):
    """The client disconnected, so nobody waits for the answer."""


@dataclass
class Job:
    """One question to one model.

    support: returns the turns before the question; the engine prefills them once and caches them under ``key``, if
    there is one.
    answers: worded labels to score. Without answers the job generates text, and ``on_token`` gets each token and
    returns whether to go on.
    judged: whether ``judge`` decides and similarities are computed; only with one picture in the question. The tower counts where
    the model has weights for it. ended: as of ``predict.Question``.
    deadline: by ``time.monotonic``. caller: whose job it is.
    """

    model: str
    support: Callable[[], Sequence[Turn]]
    turn: Turn
    key: SetKey | None = None
    answers: tuple[str, ...] = ()
    judged: bool = True
    judge: JudgeName = "both"
    ended: bool = True
    sampling: Sampling = field(default_factory=Sampling)
    on_token: Callable[[Token], bool] | None = None
    deadline: float = math.inf
    caller: str = ""
    future: Future[Any] = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)
    prompt_tokens: int = 0  # known once the prompt is read
    has_output: bool = False  # a token was passed to on_token, so the job cannot start again

    @property
    def abort_error(self) -> Exception | None:
        """Why the job must end without an answer, or None."""
        if self.cancelled.is_set():
            return GoneError("cancelled")
        return TimeoutExceededError("the request exceeded the server's time limit.") if time.monotonic() > self.deadline else None

    def token_bound(self, image: int) -> int:
        """About how many tokens the question has with its answers, if a picture has ``image``.

        Text counts a token per character, which is mostly too many.
        """
        return len(self.turn.pictures) * image + 64 + len(self.turn.text) + sum(map(len, self.answers))

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(frozen=True)
class Scored:
    """The result of a job with answers.

    similarities: cosines of the query with the set's pictures, in the order of its turns; none where it is not judged.
    parts: in which the set was read.
    """

    reply: Reply
    similarities: tuple[float, ...] = ()
    parts: int = 1


@dataclass
class Task:
    """Other work on the model, such as a calibration.

    ``run`` may return a generator; then each step of it is queued on its own. caller: whose task it is; "" for the server's own.
    """

    run: Callable[[], Any]
    caller: str = ""
    steps: Generator[None, None, Any] | None = None
    future: Future[Any] = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)


class FairQueue:
    """What waits for the model. The caller whose last turn was longest ago is next, with the oldest of their entries.

    So whoever sends much waits for their own requests. Not for several threads at a time.
    """

    def __init__(self) -> None:
        self._entries: deque[Job | Task] = deque()
        self._last_turn: dict[str, int] = {}
        self._turns = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Job | Task]:
        return iter(self._entries)

    def jobs_of(self, caller: str) -> int:
        return sum(isinstance(entry, Job) and entry.caller == caller for entry in self._entries)

    def extend(self, entries: Sequence[Job | Task]) -> None:
        self._entries.extend(entries)

    def pop(self) -> Job | Task:
        """Remove the next entry. Its caller has had a turn."""
        entry = min(self._entries, key=lambda waiting: self._last_turn.get(waiting.caller, 0))
        self._turns += 1
        self._last_turn[entry.caller] = self._turns
        self.remove([entry])
        return entry

    def remove(self, entries: Sequence[Job | Task]) -> None:
        removed = set(map(id, entries))
        self._entries = deque(entry for entry in self._entries if id(entry) not in removed)

    def clear(self) -> None:
        self._entries.clear()


@dataclass
class RunningTasks:
    """Tasks with several steps that have started.

    Every step goes to the oldest task, so that tasks finish one after the other.
    """

    running: deque[Task] = field(default_factory=deque)

    def step(self, task: Task) -> bool:
        """Run ``task`` if it has one step; otherwise start it and run a step of the oldest task.

        Returns whether to queue ``task`` again.
        """
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


def same_batch(first: Job, second: Job) -> bool:
    """Whether two jobs can be in one batch: same model and support set, both scored or both generated, both judged alike or not at all."""
    kinds = [(job.model, job.key, bool(job.answers), job.judged, job.judge) for job in (first, second)]
    return kinds[0] == kinds[1]
