"""Writers of one target do not disturb each other, and what a killed one left is removed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lcl_adapter.errors import RunError
from lcl_adapter.files import STALE, only_writer, resumable_folder, whole_file, whole_folder

CHUNKS = 20


def write_slowly(path: Path, letter: str, together: Any) -> None:
    """Write one letter many times, in step with another writer."""
    with whole_file(path) as partial, partial.open("w") as opened:
        for _ in range(CHUNKS):
            together.wait(30)
            opened.write(1000 * letter)
            opened.flush()


def is_whole(path: Path) -> bool:
    text = path.read_text()
    return len(text) == 1000 * CHUNKS and set(text) in ({"a"}, {"b"})


def in_threads(write: Callable[[str], None]) -> None:
    """Run two writers, "a" and "b", and wait for both."""
    errors: list[BaseException] = []

    def run(letter: str) -> None:
        try:
            write(letter)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]


def test_two_threads_write_one_file(tmp_path: Path) -> None:
    """The file is one of the two, as a whole."""
    together = threading.Barrier(2)
    in_threads(lambda letter: write_slowly(tmp_path / "report.json", letter, together))
    assert is_whole(tmp_path / "report.json")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(2)
    writers = [context.Process(target=write_slowly, args=(tmp_path / "report.json", letter, together)) for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert is_whole(tmp_path / "report.json")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    """The first to finish wins. The other one gets an error, because a folder cannot be replaced."""
    together = threading.Barrier(2)

    def write(letter: str) -> None:
        with whole_folder(tmp_path / "set") as partial:
            for number in range(5):
                together.wait(30)
                (partial / str(number)).write_text(letter)

    with pytest.raises(RunError, match="set: cannot be written"):
        in_threads(write)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert {file.read_text() for file in (tmp_path / "set").iterdir()} in ({"a"}, {"b"})
    assert len(list((tmp_path / "set").iterdir())) == 5


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "report.json") as partial:
        partial.write_text(str(1 / 0))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.json", "old")]


def killed(code: str) -> None:
    """Run code that prints a line and then waits, and kill it there."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    process.stdout.close()


WRITER = """
import time
from pathlib import Path
from lcl_adapter.files import {function}
with {function}(Path({path!r}){more}) as partial:
    {write}
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("function", "write"),
    [("whole_file", 'partial.write_text("half")'), ("scratch_folder", '(partial / "file").write_text("half")')],
)
def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path, function: str, write: str) -> None:
    """And nothing of a writer that is alive, or that may be alive on another machine."""
    target = tmp_path / "model.bin"
    killed(WRITER.format(function=function, path=str(target), more="", write=write))
    [left] = tmp_path.iterdir()
    elsewhere, old = tmp_path / "model.bin.01234567-1-89abcdef.partial", tmp_path / "model.bin.01234567-2-89abcdef.partial"
    other = tmp_path / "model.partial"
    for path in (elsewhere, old, other):
        path.write_text("half")
    os.utime(old, (time.time() - STALE - 60,) * 2)
    with whole_file(target) as slow:
        slow.write_text("slow")
        with whole_file(target) as fast:
            fast.write_text("fast")
        assert target.read_text() == "fast"
        assert not left.exists()
    assert target.read_text() == "slow"
    assert sorted(tmp_path.iterdir()) == sorted([target, elsewhere, other])


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    """A file system allows 255 bytes, the partial's name included."""
    for name in ("n" * 250, "ü" * 120):
        with whole_file(tmp_path / name) as partial:
            partial.write_text("text")
        assert (tmp_path / name).read_text() == "text"


def test_a_folder_that_can_be_resumed_has_one_writer(tmp_path: Path) -> None:
    """A second writer is refused and disturbs nothing. A killed one is followed by the next."""
    out, plan = tmp_path / "merged", {"what": 1}
    write = '(partial / "done").write_text("done"); (partial / "shard.1.partial").write_text("half")'
    killed(WRITER.format(function="resumable_folder", path=str(out), more=f", {plan}, 0", write=write))
    assert not out.exists()
    with resumable_folder(out, plan, 0) as partial:
        assert sorted(path.name for path in partial.iterdir()) == ["done", "plan.json"]
        for other in (plan, {"what": 2}):
            with pytest.raises(RunError, match="merged: another command is writing it"), resumable_folder(out, other, 0):
                raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert [path.name for path in out.iterdir()] == ["done"]
    with pytest.raises(RunError, match="exists already"), resumable_folder(out, plan, 0):
        raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


HOLDER = """
import sys, time
from pathlib import Path
from lcl_adapter.files import only_writer
with only_writer(Path({path!r})):
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_held_folder_is_refused_with_who_holds_it_until_that_process_ends(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLDER.format(path=str(run))], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    since = time.strftime("%Y-%m-%d")
    with (
        pytest.raises(RunError, match=rf"another command is writing it: process {process.pid} on {socket.gethostname()}, since {since}"),
        only_writer(run),
    ):
        raise AssertionError
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    with only_writer(run), only_writer(run, again=True):
        with pytest.raises(RunError, match=f"process {os.getpid()} on"), only_writer(run):
            raise AssertionError
        (tmp_path / "link").symlink_to(tmp_path)
        with pytest.raises(RunError, match="another command"), only_writer(tmp_path / "link" / "run"):
            raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_many_writers_have_a_folder_one_at_a_time(tmp_path: Path) -> None:
    """Also where each begins while another ends, and removes the file of its lock."""
    inside, most, entered = 0, 0, 0
    counting = threading.Lock()
    refusals: set[bool] = set()  # whether the message says why

    def work(_: str) -> None:
        nonlocal inside, most, entered
        own = 0
        while own < 50:
            try:
                with only_writer(tmp_path / ("n" * 250)):
                    with counting:
                        inside, entered = inside + 1, entered + 1
                        most = max(most, inside)
                    time.sleep(0)
                    with counting:
                        inside -= 1
                own += 1
            except RunError as error:
                refusals.add("another command is writing it" in str(error))

    in_threads(work)
    assert most == 1
    assert entered == 100
    assert refusals <= {True}
    assert not list(tmp_path.iterdir())


def test_a_folder_whose_parent_cannot_be_written_has_its_lock_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a volume that is mounted into a container."""
    run = tmp_path / "run"
    run.mkdir()
    real = os.open

    def refusing(path: Any, *arguments: Any, **more: Any) -> int:
        if Path(path).parent == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refusing)
    with only_writer(run):
        assert [path.name for path in run.iterdir()] == [".partial.lock"]
        with pytest.raises(RunError, match=f"process {os.getpid()}"), only_writer(run):
            raise AssertionError
    assert not list(run.iterdir())
