"""Atomic writes: a file or folder is written under a partial name beside its target, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lcl_adapter.errors import LclError, RunError

PARTIAL = ".partial"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a partial path to write. It is renamed to ``path`` when the block succeeds, and removed when it raises.

    Raises RunError where the disk is full or the path cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
    partial = path.with_name(path.name + PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
    except (OSError, SafetensorError) as error:
        raise _write_error(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a partial folder that is renamed to ``path`` when the block succeeds. ``path`` must not exist."""
    with scratch_folder(path) as partial:
        yield partial
        os.replace(partial, path)


PLAN = "plan.json"


def _saved_plan(partial: Path) -> Any:
    """The plan of a partial folder; None where it has none that can be read."""
    try:
        return json.loads((partial / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def resumable_folder(path: Path, plan: dict[str, Any], needed: int) -> Iterator[Path]:
    """Yields a partial folder that is renamed to ``path`` when the block succeeds. A stopped run's is used again.

    plan: describes the content; a partial folder with another plan is emptied first. needed: bytes that must be free.
    Raises RunError: ``path`` exists, the disk is too small or full, the path cannot be written.
    """
    if path.exists():
        raise RunError(f"{path}: exists already; nothing is overwritten. Give another path.")
    partial = path.with_name(path.name + PARTIAL)
    try:
        if _saved_plan(partial) != plan:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
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


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises RunError as :func:`whole_file`."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. Raises RunError as :func:`whole_file`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises FileNotFoundError; ValueError where it is no JSON or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return value


def disk_is_full(error: BaseException) -> bool:
    """Whether an error means that the disk is full. safetensors and torch raise errors of their own for it."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def _write_error(path: Path, error: Exception) -> RunError:
    """The error of a failed write as a RunError that says what to do."""
    if disk_is_full(error):
        return RunError(f"{path}: the disk is full; no incomplete file was left. Free some space and run the command again.")
    return RunError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}).")
