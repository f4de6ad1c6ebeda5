"""The store from a shell: folders of photos in and out. No model is loaded; what is too long for one is told when it is asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lcl_adapter import wire
from lcl_adapter.errors import DataError, RunError
from lcl_adapter.files import read_object, whole_folder, write_json
from lcl_adapter.serve.images import Bounds, check
from lcl_adapter.serve.service import summary
from lcl_adapter.serve.store import Store, StoredSet
from lcl_adapter.sources import read_class_folders
from lcl_adapter.sources.images import read_bytes
from lcl_adapter.terminal import console

SHEET = "support-set.json"


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
    pool = read_class_folders(photos)
    shown = [(one.name, picture) for one in pool.classes for picture in one.pictures[:shots]]
    examples = []
    for label, picture in shown:
        data = read_bytes(picture)
        try:
            check(data, Bounds())
        except DataError as error:
            raise DataError(f"{picture}: {error}") from error
        examples.append((label, data))
    return _put(folder, namespace, name, examples, question, expected)


def _put(folder: Path, namespace: str, name: str, examples: list[tuple[str, bytes]], question: str | None, expected: int | None) -> dict[str, Any]:
    """By the same rules as over HTTP."""
    if not re.fullmatch(wire.SET_NAME, name):
        raise DataError(f"{name!r} is no name for a support set: letters, digits, dots, dashes and underscores, 64 at most.")
    try:
        given = wire.SupportSetIn(
            examples=[wire.LabelledImage(label=label, image="data:") for label, _ in examples], question=question, expected_version=expected
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
    if out.exists():
        raise RunError(f"{out}: exists already; nothing is overwritten. Give another place.")
    with _opened(folder) as store, whole_folder(out) as partial:
        stored = store.get(namespace, name, version)
        sheet, places = [], {label: _folder_name(label, n) for n, label in enumerate(stored.labels)}
        for number, example in enumerate(stored.examples):
            data = store.bytes_of(namespace, example.image)
            suffix = wire.data_url(data[:16]).partition("/")[2].partition(";")[0].replace("jpeg", "jpg")
            file = Path(places[example.label]) / f"{number:03d}.{suffix}"
            (partial / file).parent.mkdir(exist_ok=True)
            (partial / file).write_bytes(data)
            sheet.append({"label": example.label, "file": str(file)})
        write_json(partial / SHEET, {"name": name, "version": stored.version, "question": stored.question, "examples": sheet})
    console.print(f"{out}: {_counted(stored)}", highlight=False, markup=False)
    return {"out": str(out), **summary(stored).model_dump()}


def take(folder: Path, namespace: str, source: Path, name: str | None = None) -> dict[str, Any]:
    """A folder that :func:`export` wrote, or one of photos a class. Raises DataError."""
    sheet_file = source / SHEET
    if not sheet_file.exists():
        return add(folder, namespace, name or source.name, source)
    try:
        sheet = read_object(sheet_file)
        listed = [(str(one["label"]), str(one["file"])) for one in sheet["examples"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{sheet_file}: not a sheet that `support export` wrote ({error}).") from error
    examples = []
    for label, file in listed:
        place = (source / file).resolve()
        if not place.is_relative_to(source.resolve()) or not place.is_file():
            raise DataError(f"{sheet_file}: {file!r} is no photo in this folder.")
        data = place.read_bytes()
        try:
            check(data, Bounds())
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        examples.append((label, data))
    question = sheet.get("question")
    return _put(folder, namespace, name or str(sheet.get("name") or source.name), examples, None if question is None else str(question), None)


def _folder_name(label: str, number: int) -> str:
    """The label, where that can be a folder's name everywhere."""
    plain = re.fullmatch(r"[^\x00-\x1f/\\:*?\"<>|.][^\x00-\x1f/\\:*?\"<>|]{0,99}", label) and not label.endswith((" ", "."))
    return label if plain else f"label-{number}"


def _counted(stored: StoredSet) -> str:
    return ", ".join(f"{count} {label}" for label, count in summary(stored).labels.items())
