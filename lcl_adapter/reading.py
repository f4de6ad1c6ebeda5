"""Reads files that somebody else may have made: regular files only, bounded, and JSON and YAML that cannot grow.

A pipe, a socket or a device never ends, or waits for ever. A few bytes of an archive or of YAML can stand for gigabytes. All
bounds are here. What is wrong is an OSError or a ValueError with its reason, so that the caller's own error names the file.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import yaml

MAX_UNPACKED = 2**28  # bytes of one file: of a picture, and of anything that comes out of an archive or a compressed list
MAX_TEXT = 2**30  # bytes of a list that lies on the disk as it is
MAX_SETTINGS = 2**26  # bytes of a file of settings: a config, a manifest, a report
MAX_RECIPE = 2**19  # bytes of YAML, which is parsed slowly
MAX_YAML_VALUES = 100_000  # of a YAML file, each alias counted with all that it stands for
PIECE = 2**20  # bytes that are read at a time
COMPRESSED_PIECE = 2**12  # of what an unknown compression packs: zipfile does not bound what comes out of a piece of its bytes
SETTINGS = frozenset({".json", ".jinja", ".txt", ".model", ".yaml", ".tiktoken"})  # of a checkpoint's files, those that are read whole
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes that a file system allows in a name and in a path
KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))


class Stream(Protocol):
    """What bytes are read from: a file, an archive's member, a compressed file."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end."""


def irregular(path: Path) -> str:
    """What a path is instead of a regular file; "" for a regular file, and for one that is not there."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return ""
    return _kind(mode)


def _kind(mode: int) -> str:
    return "" if stat.S_ISREG(mode) else next((kind for matches, kind in KINDS if matches(mode)), "no regular file")


def fault_of_folder(folder: Path) -> str:
    """The first file of a folder that must not be read, with the reason; "" if there is none. Weights may have any size."""
    for path in sorted(folder.iterdir()):
        kind = irregular(path)
        if kind not in {"", "a folder"}:
            return f"{path.name} is {kind}"
        if not kind and path.suffix in SETTINGS and path.stat().st_size > MAX_UNPACKED:
            return f"{path.name} has {path.stat().st_size:,} bytes; at most {MAX_UNPACKED:,} are read"
    return ""


def open_descriptor(path: Path) -> int:
    """A descriptor of a regular file, for reading. Raises OSError; IsADirectoryError for a folder, at once for a pipe or a device."""
    _refuse(path.stat().st_mode, path)  # before it is opened: opening a device can do something
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe that took its place does not wait
    try:
        _refuse(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _refuse(mode: int, path: Path) -> None:
    if kind := _kind(mode):
        kind_of_error = IsADirectoryError if stat.S_ISDIR(mode) else OSError
        raise kind_of_error(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, f"{kind}, a file is expected", str(path))


def open_file(path: Path) -> BinaryIO:
    """A regular file, open for reading. Raises OSError as :func:`open_descriptor`."""
    return os.fdopen(open_descriptor(path), "rb")


def read_bytes(path: Path, limit: int = MAX_UNPACKED) -> bytes:
    """All bytes of a regular file of at most ``limit`` bytes. Raises OSError."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise too_large(size, limit, path)
        return read_stream(file, limit, path)


def read_text(path: Path, limit: int = MAX_SETTINGS) -> str:
    """The text of a regular file in UTF-8, with or without a byte order mark. Raises OSError, UnicodeDecodeError."""
    return read_bytes(path, limit).decode("utf-8-sig")


def read_json(path: Path, limit: int = MAX_SETTINGS) -> Any:
    """The value in a JSON file. Raises OSError, ValueError."""
    return parse_json(read_bytes(path, limit))


def read_stream(stream: Stream, limit: int, name: Path | str = "", piece: int = PIECE) -> bytes:
    """What a stream holds. Raises OSError as soon as it is more than ``limit`` bytes, whatever its header says."""
    pieces: list[bytes] = []
    size = 0
    while part := stream.read(piece):
        size += len(part)
        if size > limit:
            raise too_large(None, limit, name)
        pieces.append(part)
    return b"".join(pieces)


def too_large(size: int | None, limit: int, name: Path | str = "") -> OSError:
    """The error of a file over its bound."""
    amount = f"has {size:,} bytes" if size is not None else "is larger"
    return OSError(errno.EFBIG, f"{amount}; at most {limit:,} bytes are read", str(name) or None)


def parse_json(text: str | bytes) -> Any:
    """A JSON value. Raises ValueError, also for what is nested too deep, and for a number of thousands of digits."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


class YamlError(ValueError):
    """Not YAML, or more than it should be. line: where; None if that is not known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def parse_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML text, and its node, which has lines. Raises YamlError.

    Aliases are counted before they are expanded: a kilobyte of them can stand for more values than any memory holds.
    """
    loader: Any = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        count = _count_values(node, {}, [])
        if count > MAX_YAML_VALUES:
            raise YamlError(f"YAML whose aliases stand for {count:,} values; at most {MAX_YAML_VALUES:,} are read" if count < 1e12 else _too_many())
        return loader.construct_document(node), node
    except YamlError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise YamlError(f"not YAML ({brief(str(getattr(error, 'problem', None) or error))})", mark.line + 1 if mark else None) from error
    except RecursionError:
        raise YamlError("YAML that is nested too deep") from None
    except Exception as error:  # a value that its tag does not allow, as a date with 99 months
        raise YamlError(f"not YAML (a value that cannot be read: {brief(error)})") from error
    finally:
        if loader is not None:
            loader.dispose()


def _too_many() -> str:
    return f"YAML whose aliases stand for far more than the {MAX_YAML_VALUES:,} values that are read"


def _count_values(node: yaml.Node, counts: dict[int, int], above: list[int]) -> int:
    """How many values a node has with every alias written out. above: the nodes that it is part of."""
    if id(node) in above:
        raise YamlError("a YAML alias that contains itself; write the value out", node.start_mark.line + 1)
    if id(node) not in counts:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = list(node.value)
        counts[id(node)] = 1 + sum(_count_values(child, counts, [*above, id(node)]) for child in children)
    return counts[id(node)]


def usable(path: Path | str) -> Path:
    """A path as a person writes it, with ``~`` expanded. Raises ValueError for an unknown user, and for a name that no file can have."""
    text = str(path)
    if "\0" in text:
        raise ValueError("a zero byte in a path")
    try:
        expanded = Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{text.split('/')[0][:80]!r} is no user of this machine; write the folder out, or ./ before it") from None
    longest = max((len(os.fsencode(part)) for part in expanded.parts), default=0)
    if longest > LONGEST_NAME or len(os.fsencode(expanded)) > LONGEST_PATH:
        which = f"a name of {longest:,} bytes, {LONGEST_NAME}" if longest > LONGEST_NAME else f"a path of {len(text):,} bytes, {LONGEST_PATH:,}"
        raise ValueError(f"{text[:40] + '…'!r} has {which} are allowed")
    return expanded


@contextmanager
def one_line(limit: int = 300) -> Iterator[None]:
    """Turns any error of a library into a ValueError of one line with its kind. Not MemoryError, and nothing of this package."""
    from lcl_adapter.errors import LclError

    try:
        yield
    except (LclError, MemoryError):
        raise
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        lines = str(error).strip().splitlines()
        reason = next((line.strip() for line in lines if line.strip()), "")[:limit]
        raise ValueError(f"{type(error).__name__}: {reason}" if reason else type(error).__name__) from error


def brief(value: Any, most: int = 200) -> str:
    """A value or an error of somebody's file in a message: one line, cut."""
    try:
        text = str(value) if isinstance(value, str | Exception) else repr(value)
    except RecursionError:
        return "a value that is nested too deep"
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + "…"


def id_text(value: Any) -> str:
    """A record's id in a message. Called for every record, so a usual id costs little."""
    if isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 80):
        return repr(value)[:80]
    return brief(value, 80)
