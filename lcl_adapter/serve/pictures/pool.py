"""Processes in which strangers' pictures are decoded, so that none can hold the server or fill its memory.

A process that exceeds a limit is ended and replaced. They are programs of their own (:mod:`lcl_adapter.serve.pictures.process`), not
forks of the server: they import Pillow and neither torch nor the model, start in half a second, and inherit no lock.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import lcl_adapter
from lcl_adapter import reading
from lcl_adapter.errors import RunError

PROCESSES = min(4, os.cpu_count() or 1)
SLOWEST = 10  # times the limit of processor time that a picture may last by the clock: other work may slow the decoder down
WAIT_SECONDS = 60  # for a free process
CODE = "from lcl_adapter.serve.pictures.process import main; main()"


class _EndedError(Exception):
    """The process ended without a reply."""


class _Worker:
    """One process. Not for several threads at a time."""

    def __init__(self) -> None:
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

    def ask(self, limits: Mapping[str, Any], data: bytes) -> dict[str, Any]:
        """Raises _EndedError; RunError if the process cannot start."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if not self.ready:
            try:
                self._reply(self.process.stdout)
            except _EndedError as error:
                raise RunError("a process that decodes pictures cannot start on this machine.") from error
            self.ready = True
        fields = json.dumps(limits).encode()
        clock = threading.Timer(SLOWEST * limits["seconds"], self._end_late)
        clock.daemon = True
        clock.start()
        try:
            with suppress(BrokenPipeError):  # it has ended; so there is no reply either
                self.process.stdin.write(len(fields).to_bytes(4, "big") + len(data).to_bytes(4, "big") + fields)
                self.process.stdin.write(data)
                self.process.stdin.flush()
            return self._reply(self.process.stdout)
        finally:
            clock.cancel()

    def _reply(self, stream: IO[bytes]) -> dict[str, Any]:
        length = stream.read(4)
        reply = stream.read(int.from_bytes(length, "big"))
        if len(length) < 4 or len(reply) < int.from_bytes(length, "big"):
            raise _EndedError
        return dict(reading.parse_json(reply))

    def _end_late(self) -> None:
        self.late = True
        self.process.kill()

    def end(self, wait: float = 0.0) -> int:
        """End the process, after ``wait`` seconds at most, and return its exit code."""
        with suppress(BrokenPipeError):
            assert self.process.stdin is not None
            self.process.stdin.close()  # an idle process ends by this
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
    """

    pictures_decoded: int = 0
    pictures_refused: int = 0
    decoders_started: int = 0
    decoders_killed: int = 0


class Decoders:
    """A pool of processes. They start when they are needed, or by :meth:`start`, and end with :meth:`close`."""

    def __init__(self, processes: int = PROCESSES) -> None:
        self.processes = processes
        self.counters = DecodingCounters()
        self._free = threading.BoundedSemaphore(processes)
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start all processes, without waiting for them."""
        with self._lock:
            while len(self._idle) < self.processes:
                self._idle.append(self._new())

    def _new(self) -> _Worker:
        self.counters.decoders_started += 1
        return _Worker()

    def decode(self, data: bytes, limits: Mapping[str, Any]) -> tuple[str | None, float]:
        """Decode a picture within the limits, the fields of :class:`lcl_adapter.serve.pictures.images.Bounds`.

        Returns what is wrong with the picture, or None; and the seconds of a processor that it needed.
        Raises TimeoutError if no process becomes free; RunError if none can start.
        """
        if not self._free.acquire(timeout=WAIT_SECONDS):
            raise TimeoutError("too many pictures wait to be decoded; try again later.")
        try:
            return self._decode(data, limits)
        finally:
            self._free.release()

    def _decode(self, data: bytes, limits: Mapping[str, Any]) -> tuple[str | None, float]:
        with self._lock:
            worker = self._idle.pop() if self._idle else self._new()
        try:
            reply = worker.ask(limits, data)
        except _EndedError:
            code = worker.end(1.0)
            with self._lock:
                self.counters.decoders_killed += 1
                self.counters.pictures_refused += 1
                self._idle.append(self._new())
            return _reason(worker, code, limits), float(limits["seconds"])
        except BaseException:
            worker.end()
            raise
        with self._lock:
            self._idle.append(worker)
            self.counters.pictures_decoded += reply["error"] is None
            self.counters.pictures_refused += reply["error"] is not None
        return reply["error"], float(reply["seconds"])

    def close(self) -> None:
        """End the processes that are idle. A later picture starts one again."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.end(1.0)


def _reason(worker: _Worker, code: int, limits: Mapping[str, Any]) -> str:
    if worker.late or (hasattr(signal, "SIGPROF") and code == -signal.SIGPROF):
        return f"the image takes more than {limits['seconds']:g} s to decode. Make it smaller, or save it again as a plain JPEG or PNG."
    if code == 0:
        return f"the image needs more than {limits['memory'] >> 20} MiB to decode. Make it smaller first."
    return "the image cannot be read: it ended the process that decoded it. Save it again as JPEG or PNG."


DECODERS = Decoders()  # of this process, for all its servers
atexit.register(DECODERS.close)
