"""The store from a shell: folders of photos in and out. No model is loaded; what is too long for one is told when it is asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lcl_adapter.answering import api_types
from lcl_adapter.errors import DataError
from lcl_adapter.serve import folders
from lcl_adapter.serve.service import summary
from lcl_adapter.serve.store import Store, StoredSet
from lcl_adapter.terminal import console


@contextmanager
def _opened(folder: Path) -> Iterator[Store]:
    store = Store(folder)
    try:
        yield store
    finally:
        store.close()


def add(
    folder: Path, namespace: str, name: str, photos: Path, shots: int | None = None, question: str | None = None, expected: int | None = None
) -> dict[str, Any]:
    """Raises DataError for photos that cannot be shown, with their names; ConflictError."""
    return _put(folder, namespace, name, list(folders.read_photos(photos, shots)), question, expected)


def _put(folder: Path, namespace: str, name: str, examples: list[tuple[str, bytes]], question: str | None, expected: int | None) -> dict[str, Any]:
    """By the same rules as over HTTP."""
    if not re.fullmatch(api_types.SET_NAME, name):
        raise DataError(f"{name!r} is no name for a support set: letters, digits, dots, dashes and underscores, 64 at most.")
    try:
        given = api_types.SupportSetIn(
            examples=[api_types.LabelledImage(label=label, image="data:") for label, _ in examples], question=question, expected_version=expected
        )
    except ValidationError as error:
        raise DataError("; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())) from error
    labels = [example.label for example in given.examples]
    with _opened(folder) as store:
        stored = store.put(namespace, name, list(zip(labels, [data for _, data in examples], strict=True)), question, expected)
    console.print(f"{name}: version {stored.version}, {_counted(stored)}", highlight=False, markup=False)
    return summary(stored).model_dump()


def names(folder: Path, namespace: str) -> dict[str, Any]:
    with _opened(folder) as store:
        found = [store.get(namespace, name) for name in store.names(namespace)]
    for one in found:
        console.print(f"{one.name}: version {one.version}, {_counted(one)}", highlight=False, markup=False)
    if not found:
        console.print("no support sets; `lcl-adapter support add NAME PHOTOS` stores one", highlight=False)
    return {"sets": [summary(one).model_dump() for one in found]}


def show(folder: Path, namespace: str, name: str, version: int | None = None) -> dict[str, Any]:
    """Raises MissingError."""
    with _opened(folder) as store:
        stored, kept = store.get(namespace, name, version), store.versions(namespace, name)
    console.print(f"{name}: version {stored.version}, {_counted(stored)}; kept: {', '.join(str(n) for n, _ in kept)}", highlight=False, markup=False)
    if stored.question:
        console.print(f"question: {stored.question}", highlight=False, markup=False)
    for example in stored.examples:
        console.print(f"  {example.image[:12]}  {example.label}", highlight=False, markup=False)
    told = [{"label": e.label, "sha256": e.image} for e in stored.examples]
    return {**summary(stored).model_dump(), "examples": told, "versions": [number for number, _ in kept]}


def remove(folder: Path, namespace: str, name: str) -> dict[str, Any]:
    """Raises MissingError."""
    with _opened(folder) as store:
        store.remove(namespace, name)
    console.print(f"{name}: removed", highlight=False, markup=False)
    return {"removed": name}


def export(folder: Path, namespace: str, name: str, out: Path, version: int | None = None) -> dict[str, Any]:
    """Photos by class, and a sheet with their order. Raises MissingError; RunError where ``out`` exists."""
    with _opened(folder) as store:
        stored = store.get(namespace, name, version)
        examples = [(one.label, store.bytes_of(namespace, one.image)) for one in stored.examples]
    folders.write(out, name, stored.version, stored.question, examples)
    console.print(f"{out}: {_counted(stored)}", highlight=False, markup=False)
    return {"out": str(out), **summary(stored).model_dump()}


def take(folder: Path, namespace: str, source: Path, name: str | None = None) -> dict[str, Any]:
    """A folder that :func:`export` wrote, or one of photos a class. Raises DataError."""
    written = folders.read(source)
    return _put(folder, namespace, name or written.name or source.name, list(written.examples), written.question, None)


def _counted(stored: StoredSet) -> str:
    return ", ".join(f"{count} {label}" for label, count in summary(stored).labels.items())
