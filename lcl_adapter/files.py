"""Writing so that nothing is ever half there: to a partial name beside the target, then one rename."""

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
    """Yields a partial path to write; it becomes ``path`` when the block ends well, and is removed when it does not.

    Raises RunError where the disk is full or the place cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise _explained(path, error) from error
    finally:
        with suppress(OSError):  # where its folder is none, there is nothing to remove, and the error above says so
            partial.unlink(missing_ok=True)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``path``, gone when the block ends. Raises RunError as :func:`whole_file` does."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
    except (OSError, SafetensorError) as error:
        raise _explained(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a partial folder that becomes ``path``, which must not exist yet, when the block ends well."""
    with scratch_folder(path) as partial:
        yield partial
        os.replace(partial, path)


PLAN = "plan.json"


def _planned(partial: Path) -> Any:
    """What a partial folder was to become, None where that cannot be told."""
    try:
        return json.loads((partial / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def resumable_folder(path: Path, plan: dict[str, Any], needed: int) -> Iterator[Path]:
    """Yields a partial folder that becomes ``path`` when the block ends well; one that a stop left behind is gone on with.

    plan: what is being made; a partial folder of another plan is begun anew. needed: bytes, checked against the disk first.
    Raises RunError: ``path`` exists, the disk is too small or full, the place cannot be written.
    """
    if path.exists():
        raise RunError(f"{path}: exists already; nothing is overwritten. Give another place.")
    partial = path.with_name(path.name + PARTIAL)
    try:
        if _planned(partial) != plan:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        free = shutil.disk_usage(partial).free
        if needed - there > free:
            if not there:
                partial.rmdir()
            gigabytes = f"{needed / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free there"
            raise RunError(f"{path}: {gigabytes}. Free some room or give another place.")
        write_json(partial / PLAN, plan)
        yield partial
        (partial / PLAN).unlink()
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:  # what was written stays, so that the command goes on where it stopped
        raise _explained(path, error) from error
    except RunError:  # the disk, told by a writer inside: what was written stays
        raise
    except LclError:  # what was made is wrong
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises FileNotFoundError; ValueError that says what it is instead."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return value


def disk_is_full(error: BaseException) -> bool:
    """Whether that is what an error of any library means: safetensors and torch have errors of their own for it."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def _explained(path: Path, error: Exception) -> RunError:
    if disk_is_full(error):
        return RunError(f"{path}: the disk is full; nothing was left half-written. Free some room and run the command again.")
    return RunError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}).")
