"""What the ``support`` commands do: add, add and drop a photo, list, show, remove, export and import sets of the store that the server uses.

No model is loaded, so a set that is too long for a model's context can be stored. The server reports it when the set is
used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lcl_adapter.answering import api_types
from lcl_adapter.answering.faults import message_of
from lcl_adapter.errors import DataError
from lcl_adapter.serve import folders
from lcl_adapter.serve.edits import with_photo, without_photo
from lcl_adapter.serve.service import summary
from lcl_adapter.serve.store import Example, Store, StoredSet
from lcl_adapter.terminal import results


@contextmanager
def _open(folder: Path) -> Iterator[Store]:
    store = Store(folder)
    try:
        yield store
    finally:
        store.close()


def add(
    folder: Path, namespace: str, name: str, photos: Path, shots: int | None = None, question: str | None = None, expected: int | None = None
) -> dict[str, Any]:
    """Store ``photos``, a folder of photos by class.

    Raises DataError with the names of unusable photos; ConflictError.
    """
    return _put(folder, namespace, name, list(folders.read_photos(photos, shots)), question, expected)


def _put(folder: Path, namespace: str, name: str, examples: list[tuple[str, bytes]], question: str | None, expected: int | None) -> dict[str, Any]:
    """Store examples by the rules of the HTTP API."""
    name = api_types.normalized_name(name)
    if not re.fullmatch(api_types.SET_NAME, name):
        raise DataError(f"{name!r} is not a valid name for a support set: {api_types.SET_NAME_RULE}.")
    try:
        request = api_types.SupportSetIn(
            examples=[api_types.LabelledImage(label=label, image="data:") for label, _ in examples], question=question, expected_version=expected
        )
    except ValidationError as error:
        raise DataError("; ".join(message_of(fault) for fault in error.errors())) from error
    labels = [example.label for example in request.examples]
    with _open(folder) as store:
        stored = store.put(namespace, name, list(zip(labels, [data for _, data in examples], strict=True)), question, expected)
    results().print(f"{name}: version {stored.version}, {_label_counts(stored)}", highlight=False, markup=False)
    return summary(stored).model_dump()


def add_photo(folder: Path, namespace: str, name: str, label: str, photo: Path, expected: int | None = None) -> dict[str, Any]:
    """A new version of a set, with one more photo. Raises DataError, MissingError, RequestError, ConflictError."""
    name = api_types.normalized_name(name)
    try:
        label = api_types.LabelledImage(label=label, image="data:").label
    except ValidationError as error:
        raise DataError("; ".join(message_of(fault) for fault in error.errors())) from error
    data = folders.read_photo(photo)
    with _open(folder) as store:
        store.get(namespace, name)  # before the image is written
        added = Example(label, store.add_image(namespace, data))
        stored = store.change(namespace, name, lambda examples: with_photo(examples, added), expected)
    results().print(f"{name}: version {stored.version}, {_label_counts(stored)}", highlight=False, markup=False)
    return summary(stored).model_dump()


def drop_photo(folder: Path, namespace: str, name: str, number: int, expected: int | None = None) -> dict[str, Any]:
    """A new version of a set, without one photo. number: its place in the set, from 0, as :func:`show` lists them.

    Raises MissingError, RequestError, ConflictError.
    """
    name = api_types.normalized_name(name)
    with _open(folder) as store:
        stored = store.change(namespace, name, lambda examples: without_photo(examples, number), expected)
    results().print(f"{name}: version {stored.version}, {_label_counts(stored)}", highlight=False, markup=False)
    return summary(stored).model_dump()


def list_sets(folder: Path, namespace: str) -> dict[str, Any]:
    with _open(folder) as store:
        sets = [store.get(namespace, name) for name in store.names(namespace)]
    for stored in sets:
        results().print(f"{stored.name}: version {stored.version}, {_label_counts(stored)}", highlight=False, markup=False)
    if not sets:
        results().print("no support sets; `lcl-adapter support add NAME PHOTOS` stores one", highlight=False)
    return {"sets": [summary(stored).model_dump() for stored in sets]}


def show(folder: Path, namespace: str, name: str, version: int | None = None) -> dict[str, Any]:
    """Raises MissingError."""
    name = api_types.normalized_name(name)
    with _open(folder) as store:
        stored = store.get(namespace, name, version)
        versions = [number for number, _ in store.versions(namespace, name)]
    numbers = ", ".join(map(str, versions))
    results().print(f"{name}: version {stored.version}, {_label_counts(stored)}; stored versions: {numbers}", highlight=False, markup=False)
    if stored.question:
        results().print(f"question: {stored.question}", highlight=False, markup=False)
    for number, example in enumerate(stored.examples):
        results().print(f"  {number:>3}  {example.image[:12]}  {example.label}", highlight=False, markup=False)
    examples = [{"label": example.label, "sha256": example.image} for example in stored.examples]
    return {**summary(stored).model_dump(), "examples": examples, "versions": versions}


def remove(folder: Path, namespace: str, name: str) -> dict[str, Any]:
    """Raises MissingError."""
    name = api_types.normalized_name(name)
    with _open(folder) as store:
        store.remove(namespace, name)
    results().print(f"{name}: removed", highlight=False, markup=False)
    return {"removed": name}


def export(folder: Path, namespace: str, name: str, out: Path, version: int | None = None) -> dict[str, Any]:
    """Write a set as a folder of photos by class, with a file of their order.

    Raises MissingError; RunError if ``out`` exists.
    """
    name = api_types.normalized_name(name)
    with _open(folder) as store:
        stored = store.get(namespace, name, version)
        examples = [(example.label, store.bytes_of(namespace, example.image)) for example in stored.examples]
    folders.write(out, name, stored.version, stored.question, examples)
    results().print(f"{out}: {_label_counts(stored)}", highlight=False, markup=False)
    return {"out": str(out), **summary(stored).model_dump()}


def import_set(folder: Path, namespace: str, source: Path, name: str | None = None) -> dict[str, Any]:
    """Store a folder that :func:`export` wrote, or a folder of photos by class. Raises DataError."""
    content = folders.read(source)
    return _put(folder, namespace, name or content.name or source.name, list(content.examples), content.question, None)


def _label_counts(stored: StoredSet) -> str:
    return ", ".join(f"{count} {label}" for label, count in summary(stored).labels.items())
