"""Records of a JSON Lines file or of a JSON list, read one at a time by their place in the file.

What is kept in memory is twelve bytes a record: where it begins and how long it is. Reading is by ``pread``:
workers that were forked share no file position.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lcl_adapter.data.sources.base import Dialogue, Fault, QuestionPool
from lcl_adapter.errors import DataError

CHUNK = 1 << 22
KEPT = 8  # files whose index is kept: a run opens the same one for training, checks and suites
INDEXED: dict[tuple[Path, str | None, int, int], tuple[np.ndarray, np.ndarray, list[int]]] = {}
BOM = b"\xef\xbb\xbf"
TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{},]|"', re.DOTALL)  # whole strings, brackets, commas; a lone quote is a string cut by the chunk


class Records:
    """The records of ``file``: its lines, its list, or, where ``key`` is given, the list under that key of its object."""

    def __init__(self, file: Path, key: str | None = None) -> None:
        self.file = file
        self.blank: list[int] = []
        try:
            self._file = os.open(file, os.O_RDONLY)
            if file.is_dir():
                raise DataError(f"{file}: a folder; the file with the records is expected.")
        except FileNotFoundError as error:
            raise DataError(f"{file}: no such file.") from error
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror}).") from error
        head = os.pread(self._file, 4096, 0)
        self._start = len(BOM) if head.startswith(BOM) else 0
        self.is_list = key is not None or head[self._start :].lstrip()[:1] == b"["
        told = os.fstat(self._file)
        known = (file, key, told.st_mtime_ns, told.st_size)
        if known not in INDEXED:
            starts, ends = self._index_list(key) if self.is_list else self._index_lines()
            if len(INDEXED) >= KEPT:
                INDEXED.pop(next(iter(INDEXED)))
            INDEXED[known] = (starts, (ends - starts).astype(np.uint32), self.blank)
        self._starts, self.sizes, self.blank = INDEXED[known]

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def __len__(self) -> int:
        return len(self._starts)

    def raw(self, index: int) -> bytes:
        return os.pread(self._file, int(self.sizes[index]), int(self._starts[index]))

    def scan(self, count: int) -> Iterator[bytes]:
        """The first ``count`` records in their order, read a chunk at a time."""
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
        """Line or record, without reading the file again; behind a blank line it is the record's number."""
        return f", line {index + 1}" if not self.is_list and not self.blank else f": record {index + 1}"

    def origin(self, index: int) -> str:
        """File and line (or record) for messages; counted in the file, so only for what is told."""
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
        """The record as JSON gives it. Raises DataError that names its line."""
        return self.read(index, self.raw(index))

    def read(self, index: int, raw: bytes) -> Any:
        """The record of these bytes. Raises DataError that names its line."""
        try:
            return json.loads(raw)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.origin(index)}: not UTF-8 (byte {error.start}: {error.reason}). Save it as UTF-8.") from error
        except json.JSONDecodeError as error:
            line = self.line(int(self._starts[index])) + error.lineno - 1
            raise DataError(f"{self.file}, line {line}: not JSON ({error.msg}).") from error

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
            breaks.append(np.array([place]))  # a last line without an end
        edges = np.concatenate(breaks)
        starts, ends = edges[:-1] + 1, edges[1:]
        short = np.flatnonzero(ends - starts <= 2)  # few bytes may be a blank line
        blank = self.blank = [int(i) for i in short if not os.pread(self._file, int(ends[i] - starts[i]), int(starts[i])).strip()]
        return np.delete(starts, blank), np.delete(ends, blank)

    def _index_list(self, key: str | None) -> tuple[np.ndarray, np.ndarray]:
        starts: list[int] = []
        ends: list[int] = []
        level = 1 if key is None else 2  # how deep the list's elements are
        wanted = None if key is None else json.dumps(key).encode()
        depth, element, place, rest = 0, 0, self._start, b""
        last = b""  # the string before a bracket: its key
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
            json.loads(self.file.read_bytes().decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            return DataError(f"{self.file}, line {error.lineno}: not JSON ({error.msg}).")
        except UnicodeDecodeError as error:
            return DataError(f"{self.file}: not UTF-8 (byte {error.start}: {error.reason}). Save it as UTF-8.")
        return DataError(f"{self.file}: not a JSON list.")


Parse = Callable[[Any, int], Dialogue]


class Dialogues(Sequence[Dialogue]):
    """Dialogues parsed from their record each time they are asked for. ``kept`` are the records without a fault."""

    def __init__(self, records: Records, parse: Parse, kept: np.ndarray | range) -> None:
        self.records, self.parse, self.kept = records, parse, kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = int(self.kept[index])
        return self.parse(self.records[number], number)

    def longest(self, count: int) -> list[int]:
        """Places of the ``count`` longest records, by bytes."""
        sizes = self.records.sizes[np.asarray(self.kept)].astype(np.int64)
        return [int(i) for i in np.argsort(-sizes, kind="stable")[:count]]

    def __iter__(self) -> Iterator[Dialogue]:
        return (self[i] for i in range(len(self)))


@runtime_checkable
class ByPlace(Protocol):
    """Dialogues that are read one at a time: which are long is known without reading all."""

    def longest(self, count: int) -> list[int]: ...

    def __getitem__(self, index: int) -> Dialogue: ...


def longest_dialogues(pool: QuestionPool, count: int) -> list[Dialogue]:
    """Those that could be too long: the ones with most text (bytes of their records, where they are read by place)."""
    if isinstance(pool.dialogues, ByPlace):
        return [pool.dialogues[i] for i in pool.dialogues.longest(count)]
    if len(pool) <= count:
        return list(pool.dialogues)
    return sorted(pool.dialogues, key=lambda d: -sum(len(e.question) + len(e.answer) for e in d.exchanges))[:count]


def dialogues(
    records: Records, parse: Parse, identify: Callable[[Any], object] | None = None, limit: int | None = None
) -> tuple[Dialogues, list[Fault]]:
    """Go through every record once: what parses is kept by its number, what does not is a fault with its line.

    identify: a record's id; the second record of an id is a fault. Where left out, a record that is there twice, byte for
    byte, is one. ``limit`` takes the first records only.
    """
    faults: list[Fault] = []
    count = min(len(records), limit or len(records))
    lost: list[int] = []
    ids = np.zeros(count, dtype=np.int64)
    for number, raw in enumerate(records.scan(count)):
        try:
            record = records.read(number, raw)
            parse(record, number)
            ids[number] = hash(raw.strip() if identify is None else identify(record))
            continue
        except DataError as error:
            faults.append(broken(records, number, error))
        except ValueError as error:
            faults.append(Fault("bad record", f"{named(records, number)}: {error}"))
        except KeyError as error:
            keys = ", ".join(map(str, record)) if isinstance(record, dict) else ""
            faults.append(Fault("bad record", f"{named(records, number)}: no key {error}; it has {keys}"))
        except (TypeError, AttributeError, IndexError):
            faults.append(Fault("bad record", f"{named(records, number)}: not of the form that is expected"))
        lost.append(number)
        ids[number] = -1 - number
    for number in _again(ids):
        why = "its id was there before; give each record its own" if identify else "the same record was there before; remove it"
        faults.append(Fault("duplicate id" if identify else "duplicate record", f"{named(records, number)}: {why}"))
        lost.append(number)
    kept = np.delete(np.arange(count), lost) if lost else range(count)
    return Dialogues(records, parse, kept), faults


def broken(records: Records, number: int, error: DataError) -> Fault:
    """A record that is no JSON, which says its line itself, or one that names a picture outside its folder."""
    told = str(error)
    if told.startswith(str(records.file)):
        return Fault("broken line", told)
    return Fault("path that climbs out", f"{named(records, number)}: {told}")


def _again(ids: np.ndarray) -> list[int]:
    """Places of ids that were there before. In most files none was, which a sort alone tells."""
    ordered = np.sort(ids)
    if not (ordered[1:] == ordered[:-1]).any():
        return []
    _, first = np.unique(ids, return_index=True)
    return np.setdiff1d(np.arange(len(ids)), first).tolist()


def named(records: Records, number: int) -> str:
    """File, line or record, and the record's own id where it has one."""
    where = records.origin(number)
    try:
        record = records[number]
    except DataError:
        return where
    for key in ("id", "question_id"):
        if isinstance(record, dict) and key in record:
            return f"{where} (id {record[key]!r})" if key == "id" else f"{where} ({key} {record[key]!r})"
    return where
