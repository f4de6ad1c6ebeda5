"""Support sets on disk: one SQLite file, and images by their content.

    FOLDER/support.sqlite      namespaces, sets, versions, examples, calibrations
    FOLDER/images/ns/abcd…     the bytes a client gave, named by their SHA-256; a folder a namespace, so that no caller can
                               tell by the time of a write what another has stored

An image is on the disk before the set that names it is; a set is one transaction, and acknowledged when SQLite has synced it.
So what was acknowledged survives a kill and a full disk, and what was not leaves at most images that nothing names, which
are removed when a store is opened.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from lcl_adapter.errors import ConflictError, MissingError, RunError
from lcl_adapter.files import disk_is_full
from lcl_adapter.serve.images import digest_of

SCHEMA = """
CREATE TABLE IF NOT EXISTS sets (
    id INTEGER PRIMARY KEY AUTOINCREMENT, namespace TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, question TEXT, created REAL NOT NULL,
    UNIQUE (namespace, name, version)
);
CREATE TABLE IF NOT EXISTS heads (
    namespace TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, gone INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (namespace, name)
);
CREATE TABLE IF NOT EXISTS examples (
    set_id INTEGER NOT NULL REFERENCES sets (id) ON DELETE CASCADE, place INTEGER NOT NULL, label TEXT NOT NULL, image TEXT NOT NULL,
    PRIMARY KEY (set_id, place)
);
CREATE INDEX IF NOT EXISTS by_image ON examples (image);
CREATE TABLE IF NOT EXISTS calibrations (
    set_id INTEGER NOT NULL REFERENCES sets (id) ON DELETE CASCADE, model TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (set_id, model)
);
"""
VERSIONS_KEPT = 20

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One labelled photo; ``image`` is the SHA-256 of its bytes."""

    label: str
    image: str


@dataclass(frozen=True)
class StoredSet:
    """One version of a set, in the order its examples are shown."""

    id: int
    namespace: str
    name: str
    version: int
    created: float
    examples: tuple[Example, ...]
    question: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Each once, in the order of their first showing."""
        return tuple(dict.fromkeys(example.label for example in self.examples))


def _explained(method: Callable[Concatenate[Store, P], T]) -> Callable[Concatenate[Store, P], T]:
    """What SQLite and the disk say, as this package's errors."""

    @wraps(method)
    def call(self: Store, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except (sqlite3.Error, OSError, OverflowError) as error:
            if disk_is_full(error) or "disk is full" in str(error):
                raise RunError("the disk is full: nothing of this was stored, and what was stored before is whole. Free some room.") from error
            raise RunError(f"the store of support sets cannot be used ({type(error).__name__}).") from error

    return call  # type: ignore[return-value]


class Store:
    """Safe for threads and for several processes; a write is seen whole or not at all."""

    def __init__(self, folder: Path) -> None:
        """Raises RunError where the folder cannot be used, or holds something else."""
        self.folder = folder
        self.images = folder / "images"
        self._lock = threading.RLock()
        try:
            self.images.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(folder / "support.sqlite", check_same_thread=False, isolation_level=None, timeout=30)
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
                self._connection.execute(f"PRAGMA {pragma}")
            self._connection.executescript(SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise RunError(f"{folder}: no store of support sets can be kept here ({error}).") from error

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @_explained
    def put(
        self, namespace: str, name: str, examples: Sequence[tuple[str, bytes]], question: str | None = None, expected: int | None = None
    ) -> StoredSet:
        """A new version of a set. expected: the version that the writer saw last, 0 for none.

        Raises ConflictError where another was written since; RunError where the disk is full.
        """
        kept = tuple(Example(label, self._keep(namespace, data)) for label, data in examples)
        with self._transaction() as at:
            head = at.execute("SELECT version, gone FROM heads WHERE namespace = ? AND name = ?", (namespace, name)).fetchone()
            last, gone = head or (0, 1)
            if expected is not None and expected != (0 if gone else last):
                raise ConflictError(
                    f"support set {name!r} is at version {0 if gone else last}, not {expected}: another wrote it. Read it and try again."
                )
            version, now = last + 1, time.time()
            number = at.execute(
                "INSERT INTO sets (namespace, name, version, question, created) VALUES (?, ?, ?, ?, ?)", (namespace, name, version, question, now)
            ).lastrowid
            assert number is not None
            rows = [(number, place, example.label, example.image) for place, example in enumerate(kept)]
            at.executemany("INSERT INTO examples VALUES (?, ?, ?, ?)", rows)
            at.execute("INSERT OR REPLACE INTO heads VALUES (?, ?, ?, 0)", (namespace, name, version))
            at.execute("DELETE FROM sets WHERE namespace = ? AND name = ? AND version <= ?", (namespace, name, version - VERSIONS_KEPT))
        return StoredSet(number, namespace, name, version, now, kept, question)

    @_explained
    def get(self, namespace: str, name: str, version: int | None = None) -> StoredSet:
        """The newest version, or the one named. Raises MissingError."""
        with self._lock:
            head = self._connection.execute("SELECT version, gone FROM heads WHERE namespace = ? AND name = ?", (namespace, name)).fetchone()
            if head is None or head[1]:
                raise MissingError(f"no support set {name!r}; `lcl-adapter support add {name} PHOTOS` or PUT /v1/support-sets/{name} makes one.")
            wanted = head[0] if version is None else version
            row = self._connection.execute(
                "SELECT id, created, question FROM sets WHERE namespace = ? AND name = ? AND version = ?", (namespace, name, wanted)
            ).fetchone()
            if row is None:
                raise MissingError(f"support set {name!r} has no version {wanted}; the newest is {head[0]}, and {VERSIONS_KEPT} are kept.")
            shown = self._connection.execute("SELECT label, image FROM examples WHERE set_id = ? ORDER BY place", (row[0],)).fetchall()
        return StoredSet(row[0], namespace, name, wanted, row[1], tuple(Example(*one) for one in shown), row[2])

    @_explained
    def names(self, namespace: str) -> list[str]:
        with self._lock:
            return [row[0] for row in self._connection.execute("SELECT name FROM heads WHERE namespace = ? AND gone = 0 ORDER BY name", (namespace,))]

    @_explained
    def versions(self, namespace: str, name: str) -> list[tuple[int, float]]:
        """Number and time of each that is kept, newest first. Raises MissingError."""
        self.get(namespace, name)
        with self._lock:
            rows = self._connection.execute(
                "SELECT version, created FROM sets WHERE namespace = ? AND name = ? ORDER BY version DESC", (namespace, name)
            )
            return [(row[0], row[1]) for row in rows]

    @_explained
    def remove(self, namespace: str, name: str, expected: int | None = None) -> None:
        """With all its versions; their numbers are not used again. Raises MissingError, ConflictError."""
        with self._transaction() as at:
            head = at.execute("SELECT version FROM heads WHERE namespace = ? AND name = ? AND gone = 0", (namespace, name)).fetchone()
            if head is None:
                raise MissingError(f"no support set {name!r}.")
            if expected is not None and expected != head[0]:
                raise ConflictError(f"support set {name!r} is at version {head[0]}, not {expected}: another wrote it. Read it and try again.")
            at.execute("DELETE FROM sets WHERE namespace = ? AND name = ?", (namespace, name))
            at.execute("UPDATE heads SET gone = 1 WHERE namespace = ? AND name = ?", (namespace, name))

    @_explained
    def read_calibration(self, set_id: int, model: str) -> dict[str, Any] | None:
        with self._lock:
            row = self._connection.execute("SELECT value FROM calibrations WHERE set_id = ? AND model = ?", (set_id, model)).fetchone()
        return None if row is None else json.loads(row[0])

    @_explained
    def write_calibration(self, set_id: int, model: str, value: dict[str, Any]) -> None:
        """Of a set that may have gone in the meantime; then nothing is written."""
        with self._transaction() as at:
            if at.execute("SELECT 1 FROM sets WHERE id = ?", (set_id,)).fetchone():
                at.execute("INSERT OR REPLACE INTO calibrations VALUES (?, ?, ?)", (set_id, model, json.dumps(value)))

    @_explained
    def bytes_of(self, namespace: str, image: str) -> bytes:
        return self._place(namespace, image).read_bytes()

    @_explained
    def sweep(self, older: float = 3600.0) -> int:
        """Remove images that no set names, unless they are so new (seconds) that their set may be on its way; how many there were."""
        count, now = 0, time.time()
        old = [f for f in (*self.images.glob("tmp*"), *self.images.glob("*/*")) if f.is_file() and now - f.stat().st_mtime > older]
        for file in old:
            with self._transaction() as at:  # no writer, of this process or another, touches or names an image meanwhile
                rows = at.execute("SELECT DISTINCT namespace FROM examples JOIN sets ON sets.id = set_id WHERE image = ?", (file.name,))
                named = any(self._place(row[0], file.name) == file for row in rows)
                if not named and file.exists() and now - file.stat().st_mtime > older:
                    file.unlink()
                    count += 1
        return count

    def _place(self, namespace: str, image: str) -> Path:
        return self.images / digest_of(namespace.encode())[:16] / image

    def _keep(self, namespace: str, data: bytes) -> str:
        """On the disk for good when this returns."""
        name = digest_of(data)
        place = self._place(namespace, name)
        if place.exists():
            os.utime(place)  # so that no sweep takes it before its set is there
            return name
        place.parent.mkdir(exist_ok=True)
        number, partial = tempfile.mkstemp(dir=self.images)
        try:
            with os.fdopen(number, "wb") as opened:
                opened.write(data)
                opened.flush()
                os.fsync(opened.fileno())
            os.replace(partial, place)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
        folder = os.open(place.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return name
