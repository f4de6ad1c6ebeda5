"""Processes in which strangers' pictures are decoded, so that none can hold the server or fill its memory.

A process that exceeds a limit is ended and replaced. One caller never uses all of them, so that others need not wait for
it. A process gets a low priority, behind the model and everybody else's pictures, as soon as a picture takes longer than
most do; whoever has used much of the processor lately is served by such processes at once. They are programs of their own
(:mod:`lcl_adapter.serve.pictures.process`), not forks of the server: they import Pillow and neither torch nor the model,
start in half a second, and inherit no lock.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import lcl_adapter
from lcl_adapter import reading
from lcl_adapter.errors import RunError

PROCESSES = min(4, os.cpu_count() or 1)
NICE = 15  # added to the priority of a process that decodes long: the model and other callers' pictures go first
ENDING = 10.0  # seconds that a process may take to end: it has the lowest priority, and says by its exit code why
SLOWEST = 10  # times the limit of processor time that a picture may last by the clock: other work may slow the decoder down
WAIT_SECONDS = 60  # for a free process
BURST, RATE = 1.0, 0.05  # seconds of a processor, and their number each second, that a caller has at the model's own priority
LONG = 0.5  # seconds by the clock after which a picture's process gets a low priority
CODE = "from lcl_adapter.serve.pictures.process import main; main()"


class Decoded(NamedTuple):
    """What a process answers about a picture.

    error: what is wrong with it, or None. seconds: of a processor that it needed. prepared: a small file that shows a model the
    same as the picture, which costs too much to be decoded again; None where the picture costs little.
    """

    error: str | None
    seconds: float
    prepared: bytes | None = None


class _EndedError(Exception):
    """The process ended without a reply."""


class _Worker:
    """One process, of low priority or of the server's own. Not for several threads at a time."""

    def __init__(self, low: bool = False) -> None:
        self.low = False
        root = str(Path(lcl_adapter.__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # further threads would count as memory
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self.ready = False
        self.late = False
        if low:
            self.lower()

    def ask(self, limits: Mapping[str, Any], data: bytes, side: int | None) -> Decoded:
        """Raises _EndedError; RunError if the process cannot start."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if not self.ready:
            try:
                self._reply(self.process.stdout)
            except _EndedError as error:
                raise RunError("a process that decodes pictures cannot start on this machine.") from error
            self.ready = True
        fields = json.dumps({"bounds": dict(limits), "side": side}).encode()
        clock = threading.Timer(SLOWEST * limits["seconds"], self._end_late)
        demotion = threading.Timer(LONG, self.lower)
        for timer in (clock, demotion):
            timer.daemon = True
            timer.start()
        try:
            with suppress(BrokenPipeError):  # it has ended; so there is no reply either
                self.process.stdin.write(len(fields).to_bytes(4, "big") + len(data).to_bytes(4, "big") + fields)
                self.process.stdin.write(data)
                self.process.stdin.flush()
            return self._reply(self.process.stdout)
        finally:
            clock.cancel()
            demotion.cancel()

    def _reply(self, stream: IO[bytes]) -> Decoded:
        lengths = stream.read(8)
        fields, prepared = (int.from_bytes(part, "big") for part in (lengths[:4], lengths[4:]))
        reply = stream.read(fields + prepared)
        if len(lengths) < 8 or len(reply) < fields + prepared:
            raise _EndedError
        return Decoded(**reading.parse_json(reply[:fields]), prepared=reply[fields:] or None)

    def lower(self) -> None:
        """Give the process a low priority. It cannot get the server's back."""
        if self.low:
            return
        self.low = True
        if hasattr(os, "setpriority"):
            with suppress(OSError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, self.process.pid, os.getpriority(os.PRIO_PROCESS, 0) + NICE)

    def _end_late(self) -> None:
        self.late = True
        self.process.kill()

    def close(self) -> None:
        """Close the process' input. An idle process ends by this."""
        with suppress(BrokenPipeError):
            assert self.process.stdin is not None
            self.process.stdin.close()

    def end(self, wait: float = 0.0) -> int:
        """End the process, after ``wait`` seconds at most, and return its exit code."""
        self.close()
        try:
            self.process.wait(wait)
        except subprocess.TimeoutExpired:
            self.process.kill()
        code = self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@dataclass
class DecodingCounters:
    """Counts since the start.

    decoders_killed: processes that exceeded a limit or crashed. pictures_refused: by a limit or as broken.
    pictures_prepared: so costly that a model is shown a small copy.
    """

    pictures_decoded: int = 0
    pictures_prepared: int = 0
    pictures_refused: int = 0
    decoders_started: int = 0
    decoders_killed: int = 0


class Allowances:
    """Seconds of a processor that each caller may still use at the model's own priority; negative where more was used.

    A picture's costs are known only afterwards, so one may be dear. Not for several threads at a time.
    """

    def __init__(self) -> None:
        self._of: dict[str, tuple[float, float]] = {}  # seconds, and the time at which they were right

    def of(self, caller: str) -> float:
        seconds, at = self._of.get(caller, (BURST, 0.0))
        return min(BURST, seconds + RATE * (time.monotonic() - at))

    def use(self, caller: str, seconds: float) -> None:
        self._of[caller] = (self.of(caller) - seconds, time.monotonic())


class Decoders:
    """A pool of processes. They start when they are needed, or by :meth:`start`, and end with :meth:`close`."""

    def __init__(self, processes: int = PROCESSES) -> None:
        self.processes = processes
        self.counters = DecodingCounters()
        self._used: Counter[str] = Counter()  # processes, by caller
        self._waiting: list[tuple[str, object]] = []  # callers in the order of their pictures
        self._idle: list[_Worker] = []
        self._allowances = Allowances()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    def start(self) -> None:
        """Start all processes, without waiting for them."""
        with self._lock:
            while len(self._idle) < self.processes:
                self._idle.append(self._new())

    def _new(self, low: bool = False) -> _Worker:
        self.counters.decoders_started += 1
        return _Worker(low)

    def _idle_or_new(self, low: bool) -> _Worker:
        """An idle process of this priority, or a new one."""
        worker = next((worker for worker in reversed(self._idle) if worker.low == low), None)
        if worker is None:
            return self._new(low)
        self._idle.remove(worker)
        return worker

    def decode(self, data: bytes, limits: Mapping[str, Any], caller: str = "", side: int | None = None) -> Decoded:
        """Decode a picture within the limits, the fields of :class:`lcl_adapter.serve.pictures.images.Bounds`.

        caller: who sent it. side: what the model reads, to which a costly picture is reduced; None if no model reads it.
        Raises TimeoutError if no process becomes free; RunError if none can start.
        """
        with self._place(caller):
            with self._lock:
                low = self._allowances.of(caller) <= 0
            decoded = self._decode(data, limits, side, low)
            with self._lock:
                self._allowances.use(caller, decoded.seconds)
            return decoded

    @contextmanager
    def _place(self, caller: str) -> Iterator[None]:
        """A place for one picture. A caller leaves one process to others, and of those who wait, the one with fewest goes first."""
        ticket = (caller, object())
        with self._changed:
            self._waiting.append(ticket)
            try:
                if not self._changed.wait_for(lambda: self._next() is ticket, WAIT_SECONDS):
                    raise TimeoutError("too many pictures wait to be decoded; try again later.")
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
            self._used[caller] += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._used[caller] -= 1
                self._changed.notify_all()

    def _next(self) -> tuple[str, object] | None:
        """Whose picture is decoded next; None while no process is free for any of them."""
        if self._used.total() >= self.processes:
            return None
        allowed = [ticket for ticket in self._waiting if self._used[ticket[0]] < max(1, self.processes - 1)]
        return min(allowed, key=lambda ticket: self._used[ticket[0]], default=None)

    def _decode(self, data: bytes, limits: Mapping[str, Any], side: int | None, low: bool) -> Decoded:
        with self._lock:
            worker = self._idle_or_new(low)
        try:
            reply = worker.ask(limits, data, side)
        except _EndedError:
            code = worker.end(ENDING)
            with self._lock:
                self.counters.decoders_killed += 1
                self.counters.pictures_refused += 1
                self._idle.append(self._new(low))
            return Decoded(_reason(worker, code, limits), float(limits["seconds"]))
        except BaseException:
            worker.end()
            raise
        with self._lock:
            # Those of low priority are for one caller or a few, and each costly picture may leave one more
            surplus = worker.low and sum(idle.low for idle in self._idle) >= self.processes
            if not surplus:
                self._idle.append(worker)
            self.counters.pictures_decoded += reply.error is None
            self.counters.pictures_prepared += reply.prepared is not None
            self.counters.pictures_refused += reply.error is not None
        if surplus:
            worker.end()
        return reply

    def close(self) -> None:
        """End the processes that are idle. A later picture starts one again."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()
        for worker in idle:
            worker.end(ENDING)


def _reason(worker: _Worker, code: int, limits: Mapping[str, Any]) -> str:
    if worker.late or (hasattr(signal, "SIGPROF") and code == -signal.SIGPROF):
        return f"the image takes more than {limits['seconds']:g} s to decode. Make it smaller, or save it again as a plain JPEG or PNG."
    if code == 0:
        return f"the image needs more than {limits['memory'] >> 20} MiB to decode. Make it smaller first."
    return "the image cannot be read: it ended the process that decoded it. Save it again as JPEG or PNG."


DECODERS = Decoders()  # of this process, for all its servers
atexit.register(DECODERS.close)
