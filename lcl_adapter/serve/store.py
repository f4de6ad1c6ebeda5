"""Support sets on disk: one SQLite file, and images by their content.

    FOLDER/support.sqlite            namespaces, sets, versions, examples, calibrations
    FOLDER/images/<namespace>/abcd…  the bytes that a client sent, named by their SHA-256

Each namespace has its own folder of images, named by a hash. If namespaces shared images, the time of a write would
reveal what another caller has stored.

An image is written to the disk before the set that names it. A set is written in one transaction, and acknowledged
after SQLite has synced it. So an acknowledged set survives a kill or a full disk. A set that was not acknowledged
leaves at most images that no set names. The server removes these at its start and every ten minutes.
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
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar

from lcl_adapter.errors import ConflictError, MissingError, RunError
from lcl_adapter.files import disk_is_full
from lcl_adapter.serve.pictures.images import digest_of

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
MAX_VERSIONS = 20  # the newest versions of a set that stay stored

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One labelled photo; ``image`` is the SHA-256 of its bytes."""

    label: str
    image: str


@dataclass(frozen=True)
class StoredSet:
    """One version of a set, with its examples in the order in which they were given."""

    id: int
    namespace: str
    name: str
    version: int
    created: float
    examples: tuple[Example, ...]
    question: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Each label once, in the order of its first example."""
        return tuple(dict.fromkeys(example.label for example in self.examples))


def _store_errors(method: Callable[Concatenate[Store, P], T]) -> Callable[Concatenate[Store, P], T]:
    """Raise errors of SQLite and the disk as RunError, without a path."""

    @wraps(method)
    def call(self: Store, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except (sqlite3.Error, OSError, OverflowError) as error:
            if disk_is_full(error) or "disk is full" in str(error):
                raise RunError("the disk is full: nothing was stored, and all earlier sets are intact. Free some space.") from error
            raise RunError(f"the store of support sets cannot be used ({type(error).__name__}).") from error

    return call  # type: ignore[return-value]


def _conflict(name: str, version: int, expected: int) -> ConflictError:
    return ConflictError(f"support set {name!r} is at version {version}, not {expected}: another writer changed it. Read it and try again.")


class Store:
    """Threads and several processes can use one store together. A reader gets all of a write or nothing of it."""

    def __init__(self, folder: Path) -> None:
        """Raises RunError if the folder cannot be used, or has another kind of file under the store's names."""
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
            raise RunError(f"{folder}: cannot be used as a store of support sets ({error}). Give another folder.") from error

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

    @_store_errors
    def put(
        self, namespace: str, name: str, examples: Sequence[tuple[str, bytes]], question: str | None = None, expected: int | None = None
    ) -> StoredSet:
        """Store a new version of a set.

        expected: the version that the writer read last, 0 for none; None overwrites any.
        Raises ConflictError if another version was written since; RunError if the disk is full.
        """
        stored = tuple(Example(label, self._write_image(namespace, data)) for label, data in examples)
        with self._transaction() as connection:
            head = connection.execute("SELECT version, gone FROM heads WHERE namespace = ? AND name = ?", (namespace, name)).fetchone()
            last, gone = head or (0, 1)
            if expected is not None and expected != (0 if gone else last):
                raise _conflict(name, 0 if gone else last, expected)
            return self._insert(connection, namespace, name, last + 1, stored, question)

    @_store_errors
    def change(
        self, namespace: str, name: str, changed: Callable[[tuple[Example, ...]], Sequence[Example]], expected: int | None = None
    ) -> StoredSet:
        """Store a new version whose examples are those of the newest, changed. Nobody can write in between.

        changed: may raise. The images of its examples are stored already (:meth:`add_image`).
        Raises MissingError; ConflictError if ``expected`` is not the newest version; what ``changed`` raises.
        """
        with self._transaction() as connection:
            newest = self.get(namespace, name)
            if expected is not None and expected != newest.version:
                raise _conflict(name, newest.version, expected)
            return self._insert(connection, namespace, name, newest.version + 1, tuple(changed(newest.examples)), newest.question)

    @_store_errors
    def add_image(self, namespace: str, data: bytes) -> str:
        """Store an image for a set that follows, and return its SHA-256."""
        return self._write_image(namespace, data)

    def _insert(
        self, connection: sqlite3.Connection, namespace: str, name: str, version: int, examples: tuple[Example, ...], question: str | None
    ) -> StoredSet:
        """Write a version inside a transaction, and remove what is too old."""
        now = time.time()
        set_id = connection.execute(
            "INSERT INTO sets (namespace, name, version, question, created) VALUES (?, ?, ?, ?, ?)", (namespace, name, version, question, now)
        ).lastrowid
        assert set_id is not None
        rows = [(set_id, place, example.label, example.image) for place, example in enumerate(examples)]
        connection.executemany("INSERT INTO examples VALUES (?, ?, ?, ?)", rows)
        connection.execute("INSERT OR REPLACE INTO heads VALUES (?, ?, ?, 0)", (namespace, name, version))
        connection.execute("DELETE FROM sets WHERE namespace = ? AND name = ? AND version <= ?", (namespace, name, version - MAX_VERSIONS))
        return StoredSet(set_id, namespace, name, version, now, examples, question)

    @_store_errors
    def get(self, namespace: str, name: str, version: int | None = None) -> StoredSet:
        """The newest version, or the given one. Raises MissingError."""
        with self._lock:
            head = self._connection.execute("SELECT version, gone FROM heads WHERE namespace = ? AND name = ?", (namespace, name)).fetchone()
            if head is None or head[1]:
                raise MissingError(f"no support set {name!r}; `lcl-adapter support add {name} PHOTOS` or PUT /v1/support-sets/{name} stores one.")
            wanted = head[0] if version is None else version
            row = self._connection.execute(
                "SELECT id, created, question FROM sets WHERE namespace = ? AND name = ? AND version = ?", (namespace, name, wanted)
            ).fetchone()
            if row is None:
                raise MissingError(f"support set {name!r} has no version {wanted}; the newest is {head[0]}, and the last {MAX_VERSIONS} are stored.")
            examples = self._connection.execute("SELECT label, image FROM examples WHERE set_id = ? ORDER BY place", (row[0],)).fetchall()
        return StoredSet(row[0], namespace, name, wanted, row[1], tuple(Example(*example) for example in examples), row[2])

    @_store_errors
    def names(self, namespace: str) -> list[str]:
        with self._lock:
            return [row[0] for row in self._connection.execute("SELECT name FROM heads WHERE namespace = ? AND gone = 0 ORDER BY name", (namespace,))]

    @_store_errors
    def versions(self, namespace: str, name: str) -> list[tuple[int, float]]:
        """Number and time (seconds since 1970) of each stored version, newest first. Raises MissingError."""
        self.get(namespace, name)
        with self._lock:
            rows = self._connection.execute(
                "SELECT version, created FROM sets WHERE namespace = ? AND name = ? ORDER BY version DESC", (namespace, name)
            )
            return [(row[0], row[1]) for row in rows]

    @_store_errors
    def remove(self, namespace: str, name: str, expected: int | None = None) -> None:
        """Remove a set with all its versions. Their numbers are not used again. Raises MissingError, ConflictError."""
        with self._transaction() as connection:
            head = connection.execute("SELECT version FROM heads WHERE namespace = ? AND name = ? AND gone = 0", (namespace, name)).fetchone()
            if head is None:
                raise MissingError(f"no support set {name!r}.")
            if expected is not None and expected != head[0]:
                raise _conflict(name, head[0], expected)
            connection.execute("DELETE FROM sets WHERE namespace = ? AND name = ?", (namespace, name))
            connection.execute("UPDATE heads SET gone = 1 WHERE namespace = ? AND name = ?", (namespace, name))

    @_store_errors
    def read_calibration(self, set_id: int, model: str) -> dict[str, Any] | None:
        with self._lock:
            row = self._connection.execute("SELECT value FROM calibrations WHERE set_id = ? AND model = ?", (set_id, model)).fetchone()
        return None if row is None else json.loads(row[0])

    @_store_errors
    def write_calibration(self, set_id: int, model: str, value: dict[str, Any]) -> None:
        """Write nothing if the set was removed in the meantime."""
        with self._transaction() as connection:
            if connection.execute("SELECT 1 FROM sets WHERE id = ?", (set_id,)).fetchone():
                connection.execute("INSERT OR REPLACE INTO calibrations VALUES (?, ?, ?)", (set_id, model, json.dumps(value)))

    @_store_errors
    def bytes_of(self, namespace: str, image: str) -> bytes:
        return self._image_path(namespace, image).read_bytes()

    @_store_errors
    def open_image(self, namespace: str, image: str) -> BinaryIO:
        return self._image_path(namespace, image).open("rb")

    @_store_errors
    def sweep(self, min_age: float = 3600.0) -> int:
        """Remove images that no set names, and return how many.

        Images younger than ``min_age`` seconds stay: their set may follow.
        """
        count, now = 0, time.time()
        files = (*self.images.glob("tmp*"), *self.images.glob("*/*"))
        for file in [file for file in files if file.is_file() and now - file.stat().st_mtime > min_age]:
            with self._transaction() as connection:  # meanwhile no writer, in this process or another, can use an image
                rows = connection.execute("SELECT DISTINCT namespace FROM examples JOIN sets ON sets.id = set_id WHERE image = ?", (file.name,))
                named = any(self._image_path(row[0], file.name) == file for row in rows)
                if not named and file.exists() and now - file.stat().st_mtime > min_age:
                    file.unlink()
                    count += 1
        return count

    def _image_path(self, namespace: str, image: str) -> Path:
        return self.images / digest_of(namespace.encode())[:16] / image

    def _write_image(self, namespace: str, data: bytes) -> str:
        """Write an image, synced to the disk, and return its name.

        An image that is stored already is not written again.
        """
        name = digest_of(data)
        path = self._image_path(namespace, name)
        if path.exists():
            os.utime(path)  # its age starts again, so that no sweep removes it before its set is written
            return name
        path.parent.mkdir(exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=self.images)
        try:
            with os.fdopen(descriptor, "wb") as opened:
                opened.write(data)
                opened.flush()
                os.fsync(opened.fileno())
            os.replace(partial, path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return name
