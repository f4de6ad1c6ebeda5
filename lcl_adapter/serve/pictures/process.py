"""A process that decodes strangers' pictures, one after the other, for :mod:`lcl_adapter.serve.pictures.pool`.

It reads requests from standard input and writes replies to standard output:

    request   length of the fields and of the file (two 32-bit numbers), JSON: {"bounds": its limits, "side": what the model reads, or
              null}, the file
    reply     length of the fields and of a copy (two 32-bit numbers), JSON: {"error": null or what is wrong with the picture,
              "seconds": of the processor}, the copy: of a picture that costs too much to be decoded by the model's thread too

The first reply, before any request, has no error: the process is ready. It ends when its input ends.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from lcl_adapter import reading
from lcl_adapter.errors import DataError
from lcl_adapter.serve.pictures.images import COSTLY_SECONDS, DEEP_REASON, MAX_DEEP_SECONDS, Bounds, decode, prepared

LENGTHS = struct.Struct(">II")


def main() -> None:
    """Answer requests until the input ends, or a picture needs more memory or time than its limits allow."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a decoder prints may be read as a reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's; it ends this process
    _send(replies, None, 0.0)
    used = _used_memory()
    while len(lengths := sys.stdin.buffer.read(LENGTHS.size)) == LENGTHS.size:
        fields, size = LENGTHS.unpack(lengths)
        asked = reading.parse_json(sys.stdin.buffer.read(fields))
        bounds = Bounds(**asked["bounds"])
        data = sys.stdin.buffer.read(size)
        _limit_memory(used + bounds.memory)
        began, error, copy = time.process_time(), None, b""
        _limit_time(bounds.seconds)
        try:
            deep = decode(data, bounds)
            if asked["side"] is not None and (seconds := time.process_time() - began) > COSTLY_SECONDS:
                if not deep:
                    copy = prepared(data, asked["side"])
                elif seconds > MAX_DEEP_SECONDS:
                    error = DEEP_REASON
        except DataError as refusal:
            error = str(refusal)
        except MemoryError:
            break  # the memory of this process is in pieces: another one goes on
        finally:
            _limit_time(0)
        _send(replies, error, time.process_time() - began, copy)


def _send(replies: BinaryIO, error: str | None, seconds: float, copy: bytes = b"") -> None:
    fields = json.dumps({"error": error, "seconds": seconds}).encode()
    replies.write(LENGTHS.pack(len(fields), len(copy)) + fields)
    replies.write(copy)
    replies.flush()


def _limit_time(seconds: float) -> None:
    """The system ends this process after so many seconds of its processor: a decoder in C listens to nothing else."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _used_memory() -> int:
    """Bytes of this process's addresses; 0 where the system does not say it."""
    with suppress(OSError):
        return int(reading.read_text(Path("/proc/self/statm")).split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _limit_memory(addresses: int) -> None:
    """Bytes that this process may have, where the system can limit that."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (addresses, resource.getrlimit(resource.RLIMIT_AS)[1]))
