"""Processes of their own that start at once: they are forked from a server that has imported everything.

A fresh ``python`` spends seconds on imports. A forked process has none of the test's objects, files or memory either.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

PRELOADED = ["lcl_adapter.cli.commands", "lcl_adapter.serve.server", "trl", "transformers.cli.serve", "tests.forked"]


def server() -> Any:
    """The context of :mod:`multiprocessing` whose processes have the modules above. The first process starts its server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Forked:
    """``python -c CODE ARGUMENTS``: started, with its output in files."""

    def __init__(self, code: str, *arguments: object) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name) / name for name in ("out", "err")]
        given = (code, [str(argument) for argument in arguments], *self.files, dict(os.environ), Path.cwd())
        self.process = server().Process(target=_execute, args=given, daemon=True)
        self.process.start()
        self.pid = int(self.process.pid)

    def is_running(self) -> bool:
        return bool(self.process.is_alive())

    def printed(self) -> str:
        """Its standard output so far."""
        return self.files[0].read_text(encoding="utf-8") if self.files[0].exists() else ""

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> tuple[int, str, str]:
        """Its exit code, standard output and standard error. One that does not end is killed, which is the exit code -9."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        out, err = (file.read_text(encoding="utf-8") if file.exists() else "" for file in self.files)
        self.folder.cleanup()
        return self.process.exitcode, out, err


def run(code: str, *arguments: object) -> str:
    """What ``python -c CODE ARGUMENTS`` prints. It must end with 0."""
    exit_code, out, err = Forked(code, *arguments).wait()
    assert exit_code == 0, err
    return out


def begin(out: Path, err: Path, environment: dict[str, str]) -> None:
    """In a new process: output goes to the end of files, and the environment is the caller's, not the server's."""
    gc.freeze()
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)


def _execute(code: str, arguments: list[str], out: Path, err: Path, environment: dict[str, str], folder: Path) -> None:
    begin(out, err, environment)
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})
