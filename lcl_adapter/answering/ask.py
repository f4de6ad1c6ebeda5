"""Classify new pictures by labelled ones: with a model on this machine, with one behind a server, or with a set stored
on a server.

Each function returns the result as JSON-ready values, and prints it for people.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcl_adapter.answering.client import Endpoint, RemotePredictor, judge
from lcl_adapter.answering.predict import Predictor, Question, Reply
from lcl_adapter.base.adapter import load_adapter
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import NOT_GIVEN, BaseRef
from lcl_adapter.data.conversations import WORDINGS, Turn, support_turns
from lcl_adapter.data.episodes.base import clash
from lcl_adapter.data.sources import Picture, read_class_folders, read_image
from lcl_adapter.errors import DataError
from lcl_adapter.recipe import load
from lcl_adapter.recipe.wording import Wording
from lcl_adapter.terminal import console


def ask_model(
    support: Path,
    queries: Sequence[Path],
    adapter: Path | None = None,
    base: BaseRef = NOT_GIVEN,
    shots: int | None = None,
    question: str | None = None,
) -> dict[str, Any]:
    """Classify pictures with a model on this machine. It reads the support set once for all queries.

    support: a folder with a folder of photos for each class. adapter: a run's folder; None asks the base alone.
    Raises DataError for a broken picture, a single class, or an empty class.
    """
    if adapter is None:
        loaded = load_base(base.defaulting_to(precision="auto"))
        wording = WORDINGS[loaded.family.wording]
    else:
        loaded, _ = load_adapter(adapter, base)
        wording = WORDINGS[load(adapter / "recipe.yaml").wording]
    photos = _Photos.read(support, queries, shots, wording, question)
    predictor = Predictor(loaded)
    prefilled = predictor.prefill([photos.support])
    return photos.report(predictor.ask(prefilled, [Question(0, query, photos.answers) for query in photos.queries]))


def ask_endpoint(
    support: Path,
    queries: Sequence[Path],
    url: str,
    model: str | None = None,
    shots: int | None = None,
    question: str | None = None,
    wording: str = "lcl",
    pad: bool = False,
) -> dict[str, Any]:
    """Classify pictures with a model behind a server. If the server gives no log-probabilities, its text decides.

    Raises DataError; EndpointError, MissingError, RequestError.
    """
    photos = _Photos.read(support, queries, shots, WORDINGS[wording], question)
    with Endpoint(url) as endpoint:
        remote = RemotePredictor(endpoint, endpoint.model(model), pad=pad)
        return photos.report(remote.run([(photos.support, query, photos.answers) for query in photos.queries]))


def ask_stored_set(name: str, queries: Sequence[Path], url: str, model: str | None = None, question: str | None = None) -> dict[str, Any]:
    """Classify pictures with a support set that is stored on this project's server.

    The result of a broken picture holds its error. Raises DataError if all pictures are broken; EndpointError,
    MissingError, RequestError.
    """
    with Endpoint(url) as endpoint:
        response = judge(endpoint, name, [Picture(path) for path in queries], model, question)
    results: list[dict[str, Any]] = []
    for path, result in zip(queries, response.results, strict=True):
        if result.error is not None:
            results.append({"query": str(path), "error": result.error.message})
            console.print(f"{path}: {result.error.message}", highlight=False, markup=False, style="red")
            continue
        fields = result.model_dump(exclude={"error", "probabilities"})
        results.append({"query": str(path), "answer": result.label or "", **fields, "scores": result.probabilities})
        _print_scores(path, result.label or f"none of these (nearest: {result.nearest})", result.probabilities)
    return {"support_set": name, "version": response.version, "model": response.model, "answers": results}


@dataclass(frozen=True)
class _Photos:
    """Labelled photos and queries, as turns. counts: photos shown of each label. answers: the worded labels."""

    paths: tuple[Path, ...]
    counts: dict[str, int]
    support: tuple[Turn, ...]
    queries: tuple[Turn, ...]
    answers: tuple[str, ...]

    @classmethod
    def read(cls, support: Path, queries: Sequence[Path], shots: int | None, wording: Wording, question: str | None) -> _Photos:
        """Read every picture once, before any model is asked. Raises DataError."""
        pool = read_class_folders(support)
        if len(pool) < 2:
            raise DataError(f"{support}: has only one class ({pool.classes[0].name!r}). Add a folder of photos for each further class.")
        labels = tuple(c.name for c in pool.classes)
        _warn_of_clashes(labels)
        shown = [(picture, c.name) for c in pool.classes for picture in c.pictures[:shots]]
        query_pictures = [Picture(path) for path in queries]
        for picture in (*(picture for picture, _ in shown), *query_pictures):
            read_image(picture)
        return cls(
            tuple(queries),
            {c.name: len(c.pictures[:shots]) for c in pool.classes},
            support_turns(shown, wording),
            tuple(Turn("user", question or wording.query, picture) for picture in query_pictures),
            tuple(wording.answered(label) for label in labels),
        )

    def report(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """Print and return each query's text, scores, and label ("" if the labels have equal scores)."""
        labels, results = tuple(self.counts), []
        for path, reply in zip(self.paths, replies, strict=True):
            scores = dict(zip(labels, reply.probabilities, strict=True))
            label = labels[reply.best] if reply.decided else ""
            results.append({"query": str(path), "answer": reply.text, "label": label, "scores": scores})
            _print_scores(path, reply.text, scores)
        return {"support": self.counts, "answers": results}


def _warn_of_clashes(labels: Sequence[str]) -> None:
    for number, label in enumerate(labels):
        for earlier in labels[:number]:
            if clash(label, earlier):
                note = f"note: the labels {earlier!r} and {label!r} begin alike. Their scores are correct, but a generated answer may end too early."
                console.print(note, style="yellow", markup=False)


def _print_scores(path: Path, answer: str, scores: dict[str, float]) -> None:
    console.print(f"{path}: {answer}", highlight=False, markup=False, style="bold")
    for label, score in sorted(scores.items(), key=lambda item: -item[1]):
        console.print(f"  {score:6.1%}  {label}", highlight=False, markup=False)
