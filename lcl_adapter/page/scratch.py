"""The folder for the page's photos: removed however the server ends.

A signal to stop ends the server in order. What a killed process left is removed at the next start.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

PREFIX = "lcl-adapter-page-"
LOCK = "server.lock"  # locked while the server runs; the system releases the lock of a killed process


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that only this user can read."""
    with _interrupted_by_signals():
        sweep()
        with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name, (Path(name) / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield Path(name)


def sweep() -> None:
    """Remove the folders of this user's servers that no longer run."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with (folder / LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # its server runs, or it has just been made or removed
            continue


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, so that what is open is closed.

    While uvicorn runs, it handles SIGTERM itself, and sends it again when all requests have ended.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def stop_server(_number: int, _frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGTERM)

    earlier = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt), signal.SIGHUP: signal.signal(signal.SIGHUP, stop_server)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
