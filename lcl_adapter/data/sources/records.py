"""Records of a JSON Lines file or of a JSON list, read one at a time from their place in the file.

Memory holds 24 bytes for each record: its start, its size, and the sizes of its text. Reading uses ``pread``, because forked workers would
share a file position. Workers that are not forked receive the places and open the file by themselves.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lcl_adapter import reading
from lcl_adapter.data.sources.base import Dialogue, Fault, QuestionPool
from lcl_adapter.errors import DataError
from lcl_adapter.reading import brief, id_text

CHUNK = 1 << 22
MAX_INDEXES = 8  # a run opens the same file for training, checks and suites; the indexes of this many files are cached
INDEXES: dict[tuple[Path, str | None, int, int], tuple[np.ndarray, np.ndarray, list[int]]] = {}
BOM = b"\xef\xbb\xbf"
TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{},]|"', re.DOTALL)  # strings, brackets, commas; a quote alone begins a string that the chunk cuts


class Records:
    """The records of ``file``: its lines, or the elements of its list.

    With ``key``, the file is an object and the list is under that key.
    """

    def __init__(self, file: Path, key: str | None = None) -> None:
        self.file = file
        self.blank: list[int] = []
        self._version: tuple[int, int] | None = None  # time and size of the file, once it is indexed
        head = os.pread(self._file, 4096, 0)
        self._start = len(BOM) if head.startswith(BOM) else 0
        self.is_list = key is not None or head[self._start :].lstrip()[:1] == b"["
        self._version = _version(self._file)
        version = (file, key, *self._version)
        if version not in INDEXES:
            starts, ends = self._index_list(key) if self.is_list else self._index_lines()
            if len(INDEXES) >= MAX_INDEXES:
                INDEXES.pop(next(iter(INDEXES)))
            INDEXES[version] = (starts, (ends - starts).astype(np.uint32), self.blank)
        self._starts, self.sizes, self.blank = INDEXES[version]

    @cached_property
    def _file(self) -> int:
        """The open file. Raises DataError if it cannot be opened, or has changed since its records were indexed."""
        try:
            opened = reading.open_descriptor(self.file)
        except IsADirectoryError as error:
            raise DataError(f"{self.file}: a folder; the file with the records is expected.") from error
        except FileNotFoundError as error:
            raise DataError(f"{self.file}: no such file.") from error
        except OSError as error:
            raise DataError(f"{self.file}: cannot be read ({error.strerror}).") from error
        fault = ""
        if self._version not in {None, _version(opened)}:
            fault = "has changed since it was opened; start again"
        if fault:
            os.close(opened)
            raise DataError(f"{self.file}: {fault}.")
        return opened

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file: the process that receives it opens its own."""
        return {name: value for name, value in vars(self).items() if name != "_file"}

    def __del__(self) -> None:
        if "_file" in vars(self):
            os.close(self._file)

    def __len__(self) -> int:
        return len(self._starts)

    def raw(self, index: int) -> bytes:
        return os.pread(self._file, int(self.sizes[index]), int(self._starts[index]))

    def scan(self, count: int) -> Iterator[bytes]:
        """The first ``count`` records in order, read in chunks."""
        first = 0
        while first < count:
            start = int(self._starts[first])
            last = max(first + 1, int(np.searchsorted(self._starts, start + CHUNK)))
            last = min(last, count)
            end = int(self._starts[last - 1]) + int(self.sizes[last - 1])
            chunk = os.pread(self._file, end - start, start)
            places = (self._starts[first:last] - start).tolist()
            for place, size in zip(places, self.sizes[first:last].tolist(), strict=True):
                yield chunk[place : place + size]
            first = last

    def place(self, index: int) -> str:
        """Line or record, without reading the file again. If the file has blank lines, the record's number."""
        return f", line {index + 1}" if not self.is_list and not self.blank else f": record {index + 1}"

    def origin(self, index: int) -> str:
        """File and line (or record), for messages. Slow: the lines are counted in the file."""
        if self.is_list:
            return f"{self.file}: record {index + 1}"
        return f"{self.file}, line {self.line(int(self._starts[index]))}"

    def line(self, offset: int) -> int:
        count, place = 1, 0
        while place < offset:
            chunk = os.pread(self._file, min(CHUNK, offset - place), place)
            count, place = count + chunk.count(b"\n"), place + len(chunk)
        return count

    def __getitem__(self, index: int) -> Any:
        """The record, parsed. Raises DataError with the line."""
        return self.read(index, self.raw(index))

    def read(self, index: int, raw: bytes) -> Any:
        """The record of these bytes, parsed. Raises DataError with the line."""
        try:
            return reading.parse_json(raw)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.origin(index)}: not UTF-8 (byte {error.start}: {error.reason}). Save it as UTF-8.") from error
        except json.JSONDecodeError as error:
            line = self.line(int(self._starts[index])) + error.lineno - 1
            raise DataError(f"{self.file}, line {line}: not JSON ({error.msg}).") from error
        except ValueError as error:
            raise DataError(f"{self.origin(index)}: cannot be read ({str(error)[:80]}).") from error

    @property
    def sha256(self) -> str:
        digest, place = hashlib.sha256(), 0
        while chunk := os.pread(self._file, CHUNK, place):
            digest.update(chunk)
            place += len(chunk)
        return digest.hexdigest()

    def _index_lines(self) -> tuple[np.ndarray, np.ndarray]:
        breaks, place = [np.array([self._start - 1])], 0
        while chunk := os.pread(self._file, CHUNK, place):
            breaks.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 10) + place)
            place += len(chunk)
        if breaks[-1].size == 0 or breaks[-1][-1] != place - 1:
            breaks.append(np.array([place]))  # the last line has no line break
        edges = np.concatenate(breaks)
        starts, ends = edges[:-1] + 1, edges[1:]
        short = np.flatnonzero(ends - starts <= 2)  # may be blank
        blank = self.blank = [int(i) for i in short if not os.pread(self._file, int(ends[i] - starts[i]), int(starts[i])).strip()]
        return np.delete(starts, blank), np.delete(ends, blank)

    def _index_list(self, key: str | None) -> tuple[np.ndarray, np.ndarray]:
        """Starts and ends of the list's elements. Brackets are counted; the elements are not parsed."""
        starts: list[int] = []
        ends: list[int] = []
        level = 1 if key is None else 2  # the bracket depth of the list's elements
        wanted = None if key is None else json.dumps(key).encode()
        depth, element, place, rest = 0, 0, self._start, b""
        last = b""  # the last string before a bracket, which is its key
        inside = closed = False
        while (chunk := os.pread(self._file, CHUNK, place + len(rest))) or rest:
            text, more = rest + chunk, bool(chunk)
            rest = b""
            for match in TOKENS.finditer(text):
                token = match[0]
                if token == b'"':
                    if not more:
                        raise self._not_json()
                    rest = text[match.start() :]
                    break
                at = place + match.start()
                if token[:1] == b'"':
                    last = token if depth == level - 1 else last
                elif token in b"[{":
                    depth += 1
                    if depth == level and token == b"[" and not closed and (wanted is None or last == wanted):
                        inside, element = True, at + 1
                elif token in b"]}" or (token == b"," and depth == level):
                    if inside and depth == level:
                        if token == b"}":
                            raise self._not_json()
                        starts.append(element)
                        ends.append(at)
                        element = at + 1
                        if token == b"]":
                            inside, closed = False, True
                    if token != b",":
                        depth -= 1
                        if depth < 0:
                            raise self._not_json()
            place += len(text) - len(rest)
            if not more:
                break
        if depth or (not closed and key is None):
            raise self._not_json()
        if not closed:
            raise DataError(f"{self.file}: no list under {key!r} in it.")
        if len(starts) == 1 and not os.pread(self._file, ends[0] - starts[0], starts[0]).strip():
            starts, ends = [], []  # []
        return np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64)

    def _not_json(self) -> DataError:
        try:
            reading.parse_json(reading.read_bytes(self.file, reading.MAX_TEXT).decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            return DataError(f"{self.file}, line {error.lineno}: not JSON ({error.msg}).")
        except UnicodeDecodeError as error:
            return DataError(f"{self.file}: not UTF-8 (byte {error.start}: {error.reason}). Save it as UTF-8.")
        except (ValueError, OSError) as error:
            return DataError(f"{self.file}: not a JSON list ({getattr(error, 'strerror', None) or str(error)[:80]}).")
        return DataError(f"{self.file}: not a JSON list.")


def _version(file: int) -> tuple[int, int]:
    """Time of the last change and size of an open file."""
    stat = os.fstat(file)
    return stat.st_mtime_ns, stat.st_size


Parse = Callable[[Any, int], Dialogue]  # picklable: a function of a module, or a partial of one


class Dialogues(Sequence[Dialogue]):
    """Dialogues that are parsed from their records each time they are used.

    ``numbers``: the records without a fault. ``sizes``: :func:`size_of` each of them, int32 [N, 3].
    """

    def __init__(self, records: Records, parse: Parse, numbers: np.ndarray | range, sizes: np.ndarray) -> None:
        self.records, self.parse, self.numbers, self.sizes = records, parse, numbers, sizes

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = int(self.numbers[index])
        return self.parse(self.records[number], number)

    def __iter__(self) -> Iterator[Dialogue]:
        return (self[i] for i in range(len(self)))


BOX_BYTES = len("[0.123,0.456,0.789,0.987]")


def size_of(dialogue: Dialogue) -> tuple[int, int, int]:
    """Bytes of a dialogue's questions and answers, its exchanges, and its pictures."""
    text = sum(len(e.question.encode()) + (BOX_BYTES if e.region else len(e.answer.encode())) for e in dialogue.exchanges)
    return text, len(dialogue.exchanges), len(dialogue.pictures)


def sizes_of(pool: QuestionPool) -> np.ndarray | None:
    """:func:`size_of` every dialogue, int32 [N, 3]. None for shards, whose samples are not read before they are used."""
    if pool.shard_sizes:
        return None
    if isinstance(pool.dialogues, Dialogues):
        return pool.dialogues.sizes
    return np.array([size_of(dialogue) for dialogue in pool.dialogues], dtype=np.int32).reshape(-1, 3)


def longest_dialogues(pool: QuestionPool, count: int) -> list[int]:
    """Indices of the ``count`` dialogues with the most text; of shards, the first samples, which may be unreadable."""
    sizes = sizes_of(pool)
    if sizes is None:  # for the longest, all shards would have to be fetched
        return list(range(min(count, pool.shard_sizes[0])))
    return [int(i) for i in np.argsort(-sizes[:, 0], kind="stable")[:count]]


def read_dialogues(
    records: Records, parse: Parse, identify: Callable[[Any], object] | None = None, limit: int | None = None
) -> tuple[Dialogues, list[Fault]]:
    """Parse every record once.

    Records that parse are remembered by number; each of the others is a fault with its line.

    identify: gives a record's id; a second record with the same id is a fault. By default, a second record with the
    same bytes is a fault. limit: read only this many records, from the start.
    """
    faults: list[Fault] = []
    count = min(len(records), limit or len(records))
    faulty: list[int] = []
    ids = np.zeros(count, dtype=np.int64)
    sizes = np.zeros((count, 3), dtype=np.int32)
    for number, raw in enumerate(records.scan(count)):
        try:
            record = records.read(number, raw)
            sizes[number] = size_of(parse(record, number))
            ids[number] = hash(raw.strip() if identify is None else identify(record))
            continue
        except DataError as error:
            faults.append(unreadable(records, number, error))
        except ValueError as error:
            faults.append(Fault("bad record", f"{describe_record(records, number)}: {brief(error)}"))
        except KeyError as error:
            keys = brief(", ".join(map(str, record))) if isinstance(record, dict) else ""
            faults.append(Fault("bad record", f"{describe_record(records, number)}: no key {brief(error)}; it has {keys}"))
        except (TypeError, AttributeError, IndexError, ArithmeticError, RecursionError):
            faults.append(Fault("bad record", f"{describe_record(records, number)}: not of the form that is expected"))
        faulty.append(number)
        ids[number] = -1 - number
    kind = "duplicate id" if identify else "duplicate record"
    reason = "an earlier record has the same id; give each record its own" if identify else "an earlier record is the same; remove it"
    for number in _repeated(ids):
        faults.append(Fault(kind, f"{describe_record(records, number)}: {reason}"))
        faulty.append(number)
    numbers = np.delete(np.arange(count), faulty) if faulty else range(count)
    return Dialogues(records, parse, numbers, np.delete(sizes, faulty, 0)), faults


def unreadable(records: Records, number: int, error: DataError) -> Fault:
    """The fault of a record that is not JSON (the error has its line), or whose picture is outside its folder."""
    message = str(error)
    if message.startswith(str(records.file)):
        return Fault("broken line", message)
    return Fault("path that climbs out", f"{describe_record(records, number)}: {message}")


def _repeated(ids: np.ndarray) -> list[int]:
    """Indices of ids that occur earlier too. Most files have none, which a sort alone shows."""
    ordered = np.sort(ids)
    if not (ordered[1:] == ordered[:-1]).any():
        return []
    _, first = np.unique(ids, return_index=True)
    return np.setdiff1d(np.arange(len(ids)), first).tolist()


def describe_record(records: Records, number: int) -> str:
    """File, line or record, and the record's own id if it has one."""
    where = records.origin(number)
    try:
        record = records[number]
    except DataError:
        return where
    for key in ("id", "question_id"):
        if isinstance(record, dict) and key in record:
            return f"{where} ({key} {id_text(record[key])})"
    return where
