"""Atomic writes: a file or folder is written under a partial name beside its target, then renamed.

Every writer has a partial name of its own, so that two writers of one target do not mix their bytes: the last one to
finish wins. A folder that a stopped run goes on with has one name, and one writer at a time.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil
from safetensors import SafetensorError

from lcl_adapter import reading
from lcl_adapter.errors import LclError, RunError

PARTIAL = ".partial"
LOCK = f"{PARTIAL}.lock"  # behind a path's name: the file that its writer locks
STALE = 24 * 3600  # seconds after which a partial of an unknown machine's process is removed
LONGEST = 40  # characters of the target's name in a partial's; a file system allows 255 bytes


def cache_folder() -> Path:
    """The folder of what is drawn, fetched or built on first use: ``LCL_ADAPTER_CACHE``, by default ``~/.cache/lcl-adapter``."""
    root = os.environ.get("LCL_ADAPTER_CACHE")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "lcl-adapter"


def _machine() -> str:
    """Identifies where this process's number means something: the machine, and the container."""
    try:
        container = str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:  # no Linux
        container = ""
    return hashlib.sha256(f"{socket.gethostname()} {container}".encode()).hexdigest()[:8]


def _partial_of(path: Path) -> Path:
    """A partial name for ``path`` that no other writer has: NAME.MACHINE-PROCESS-RANDOM.partial."""
    return path.with_name(f"{path.name[:LONGEST]}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")


def _remove_stale(path: Path) -> None:
    """Remove what killed writers of ``path`` left beside it."""
    try:
        partials = [other for other in path.parent.iterdir() if other.name.startswith(path.name[:LONGEST] + ".") and other.name.endswith(PARTIAL)]
    except OSError:
        return
    for partial in partials:
        writer = partial.name.removeprefix(path.name[:LONGEST] + ".").removesuffix(PARTIAL).split("-")
        if len(writer) != 3 or not writer[1].isdecimal():
            continue  # another target's, or a folder that can be resumed
        with suppress(OSError):  # another process removed it
            dead = writer[0] == _machine() and not psutil.pid_exists(int(writer[1]))
            if dead or time.time() - partial.stat().st_mtime > STALE:
                _remove(partial)


def _remove(path: Path) -> None:
    """Remove a file or a folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a partial path to write. It is renamed to ``path`` when the block succeeds, and removed when it raises.

    Several writers of one path do not disturb each other. Raises RunError where the disk is full or the path cannot be
    written.
    """
    partial = _partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        with suppress(OSError):  # fails where the parent is not a folder; the error above reports that
            partial.unlink(missing_ok=True)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``path``, which is removed when the block ends.

    Raises RunError as :func:`whole_file`.
    """
    partial = _partial_of(path)
    try:
        partial.mkdir(parents=True)
        _remove_stale(path)
        yield partial
    except (OSError, SafetensorError) as error:
        raise _write_error(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a partial folder that is renamed to ``path`` when the block succeeds. ``path`` must not exist.

    Of two writers, the first to finish wins. Raises RunError for the other.
    """
    with scratch_folder(path) as partial:
        yield partial
        os.replace(partial, path)


@contextmanager
def replaced_folder(path: Path, is_earlier: Callable[[Path], bool]) -> Iterator[Path]:
    """Yields a partial folder that becomes ``path`` when the block succeeds, in place of an empty folder or of an earlier
    result.

    is_earlier: whether a folder holds an earlier result and nothing else. The earlier one stays complete until the new
    one is. Raises RunError before the block if ``path`` is something else, and as :func:`whole_file`.
    """
    path = Path(os.path.realpath(path))

    def is_empty() -> bool:
        """Raises RunError if there is something that must not be replaced."""
        try:
            if not path.exists() or (path.is_dir() and not any(path.iterdir())):
                return True
        except OSError as error:
            raise _write_error(path, error) from error
        if not path.is_dir() or not is_earlier(path):
            raise RunError(f"{path}: exists, and is something else than an earlier result of this command. Give another folder, or remove it.")
        return False

    is_empty()
    with only_writer(path), scratch_folder(path) as partial:
        yield partial
        if is_empty():
            os.replace(partial, path)
            return
        earlier = _partial_of(path)
        os.replace(path, earlier)
        try:
            os.replace(partial, path)
        except OSError:
            os.replace(earlier, path)
            raise
        shutil.rmtree(earlier, ignore_errors=True)


PLAN = "plan.json"


def _saved_plan(partial: Path) -> Any:
    """The plan of a partial folder; None where it has none that can be read."""
    try:
        return reading.read_json(partial / PLAN)
    except (OSError, ValueError):
        return None


@contextmanager
def resumable_folder(path: Path, plan: dict[str, Any], needed: int) -> Iterator[Path]:
    """Yields a partial folder that is renamed to ``path`` when the block succeeds. A stopped run's is used again.

    plan: describes the content; a partial folder with another plan is emptied first. needed: bytes that must be free.
    Raises RunError: ``path`` exists, another process writes it, the disk is too small or full, the path cannot be
    written.
    """
    partial = path.with_name(path.name + PARTIAL)
    with only_writer(path):
        if path.exists():
            raise RunError(f"{path}: exists already; nothing is overwritten. Give another path.")
        try:
            if _saved_plan(partial) != plan:
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True, exist_ok=True)
            for left in list(partial.rglob(f"*{PARTIAL}")):  # by a killed process: this is the only writer
                _remove(left)
            written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
            free = shutil.disk_usage(partial).free
            if needed - written > free:
                if not written:
                    partial.rmdir()
                raise RunError(f"{path}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. Free some space or give another path.")
            write_json(partial / PLAN, plan)
            yield partial
            (partial / PLAN).unlink()
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:  # the partial folder stays, so that the command can be resumed
            raise _write_error(path, error) from error
        except RunError:  # a full disk, reported by a writer inside the block: the partial folder stays
            raise
        except LclError:  # the content is wrong
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def only_writer(path: Path, again: bool = False) -> Iterator[None]:
    """Inside the block, no other command that calls this can write ``path``: a lock on a file beside it, with who holds it.

    The system releases the lock of a process that ends, however it ends.
    again: the thread that is inside may enter once more, for a part of the same work.
    Raises RunError where another writer has the lock, or the file cannot be written.
    """
    key = (os.path.realpath(path), threading.get_ident())
    if again and key in _HELD:
        yield
        return
    try:
        opened, lock = _locked(Path(key[0]))
    except BlockingIOError as error:
        raise RunError(f"{path}: another command is writing it{error.strerror}. Wait until it ends, or give another path.") from None
    except OSError as error:
        raise _write_error(path, error) from error
    with opened:
        _HELD.add(key)
        try:
            yield
        finally:
            _HELD.discard(key)
            lock.unlink(missing_ok=True)


def _locked(path: Path) -> tuple[IO[str], Path]:
    """The open file of a lock that this process has now, and its name. Raises BlockingIOError with who has it; OSError."""
    while True:
        opened, lock = _open_lock(path)
        try:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(errno.EAGAIN, _holder(opened)) from None
            except OSError as error:
                if error.errno not in {errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK}:  # a file system without locks
                    raise
            # A writer that ended in between has removed the file that was opened, and another may have locked a new one
            if not _is_at(opened, lock):
                opened.close()
                continue
            opened.truncate(0)
            json.dump({"process": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}, opened)
            opened.flush()
            return opened, lock
        except BaseException:
            opened.close()
            raise


def _is_at(opened: IO[str], path: Path) -> bool:
    """Whether an open file is the one that ``path`` names now. Raises OSError."""
    try:
        return os.path.samestat(os.fstat(opened.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _open_lock(path: Path) -> tuple[IO[str], Path]:
    """The file of a lock: beside the path, or in it where nothing can be written beside it. Raises OSError."""
    name = path.name + LOCK
    if len(os.fsencode(name)) > reading.LONGEST_NAME:
        name = f"{path.name[:LONGEST]}-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}{LOCK}"
    path.parent.mkdir(parents=True, exist_ok=True)
    for lock in (path.with_name(name), path / LOCK):
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            return os.fdopen(descriptor, "r+", encoding="utf-8"), lock
        except OSError as error:
            if error.errno not in {errno.EACCES, errno.EROFS, errno.EPERM} or lock.parent == path or not path.is_dir():
                raise
    raise AssertionError


_HELD: set[tuple[str, int]] = set()  # real paths that this process writes, and the threads that do


def _holder(opened: IO[str]) -> str:
    """Who holds a lock, from its file; "" where that is not written there."""
    try:
        holder = json.loads(opened.read(1000))
        return ": process {process:d} on {machine}, since {since}".format(**{**holder, "process": int(holder["process"])})
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises RunError as :func:`whole_file`."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. Raises RunError as :func:`whole_file`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises FileNotFoundError; ValueError where it is no JSON or no object."""
    try:
        value = reading.read_json(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return value


def read_result(path: Path) -> Any:
    """The value in a JSON file of a run's folder. Raises RunError where it cannot be read."""
    try:
        return reading.read_json(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def read_settings(path: Path) -> str:
    """The text of a file of a run's folder. Raises RunError where it cannot be read."""
    try:
        return reading.read_text(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a JSON Lines file of a run that hold an object, each with its value. Raises RunError."""
    lines = []
    try:
        for line in reading.read_text(path, reading.MAX_TEXT).split("\n"):
            try:
                value = reading.parse_json(line)
            except ValueError:  # the end of a run that was killed
                continue
            if isinstance(value, dict):
                lines.append((line, value))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    return lines


def disk_is_full(error: BaseException) -> bool:
    """Whether an error means that the disk is full. safetensors and torch raise errors of their own for it."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def _write_error(path: Path, error: Exception) -> RunError:
    """The error of a failed write as a RunError that says what to do."""
    if disk_is_full(error):
        return RunError(f"{path}: the disk is full; no incomplete file was left. Free some space and run the command again.")
    return RunError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}).")
