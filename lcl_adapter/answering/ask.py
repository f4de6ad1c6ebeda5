"""A new picture judged by labelled ones: by a model here, by one behind a server, or by a set that a server keeps."""

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


def here(
    support: Path,
    queries: Sequence[Path],
    adapter: Path | None = None,
    base: BaseRef = NOT_GIVEN,
    shots: int | None = None,
    question: str | None = None,
) -> dict[str, Any]:
    """Judge pictures by class folders; the support set is read once for all queries.

    Raises DataError: a broken picture, one class only, an empty class.
    """
    if adapter is None:
        loaded = load_base(base.defaulting_to(precision="auto"))
        wording = WORDINGS[loaded.family.wording]
    else:
        loaded, _ = load_adapter(adapter, base)
        wording = WORDINGS[load(adapter / "recipe.yaml").wording]
    taught = _SupportSet.by(support, queries, shots, wording, question)
    predictor = Predictor(loaded)
    ready = predictor.prefill([taught.turns])
    return taught.told(predictor.ask(ready, [Question(0, query, taught.answers) for query in taught.queries]))


def behind(
    support: Path,
    queries: Sequence[Path],
    url: str,
    model: str | None = None,
    shots: int | None = None,
    question: str | None = None,
    wording: str = "lcl",
    pad: bool = False,
) -> dict[str, Any]:
    """The same of a model behind a server; what it cannot score is judged by its text.

    Raises DataError; EndpointError, MissingError, RequestError.
    """
    taught = _SupportSet.by(support, queries, shots, WORDINGS[wording], question)
    with Endpoint(url) as endpoint:
        remote = RemotePredictor(endpoint, endpoint.model(model), pad=pad)
        return taught.told(remote.run([(taught.turns, query, taught.answers) for query in taught.queries]))


def stored(name: str, queries: Sequence[Path], url: str, model: str | None = None, question: str | None = None) -> dict[str, Any]:
    """Judge pictures by a set that this project's own server keeps. A broken picture has its error in its own result.

    Raises DataError where all are broken; EndpointError, MissingError, RequestError.
    """
    with Endpoint(url) as endpoint:
        found = judge(endpoint, name, [Picture(path) for path in queries], model, question)
    results: list[dict[str, Any]] = []
    for path, one in zip(queries, found.results, strict=True):
        if one.error is not None:
            results.append({"query": str(path), "error": one.error.message})
            console.print(f"{path}: {one.error.message}", highlight=False, markup=False, style="red")
            continue
        results.append(
            {"query": str(path), "answer": one.label or "", **one.model_dump(exclude={"error", "probabilities"}), "scores": one.probabilities}
        )
        _say_scores(path, one.label or f"none of these (nearest: {one.nearest})", one.probabilities)
    return {"support_set": name, "version": found.version, "model": found.model, "answers": results}


@dataclass(frozen=True)
class _SupportSet:
    """Class folders and pictures as turns, for whoever answers."""

    paths: tuple[Path, ...]
    counts: dict[str, int]
    turns: tuple[Turn, ...]
    queries: tuple[Turn, ...]
    answers: tuple[str, ...]

    @classmethod
    def by(cls, support: Path, queries: Sequence[Path], shots: int | None, wording: Wording, question: str | None) -> _SupportSet:
        """Every picture is read once, before any model is asked. Raises DataError."""
        pool = read_class_folders(support)
        if len(pool) < 2:
            raise DataError(f"{support}: one class only ({pool.classes[0].name!r}); a judgement needs at least two folders of photos.")
        labels = tuple(c.name for c in pool.classes)
        for n, one in enumerate(labels):
            for other in labels[:n]:
                if clash(one, other):
                    console.print(
                        f"note: the label {other!r} and {one!r} begin alike; scores are sound, a generated answer may stop early",
                        style="yellow",
                        markup=False,
                    )
        shown = [(p, c.name) for c in pool.classes for p in c.pictures[:shots]]
        asked = [Picture(path) for path in queries]
        for picture in (*(p for p, _ in shown), *asked):
            read_image(picture)
        return cls(
            tuple(queries),
            {c.name: len(c.pictures[:shots]) for c in pool.classes},
            support_turns(shown, wording),
            tuple(Turn("user", question or wording.query, p) for p in asked),
            tuple(wording.answered(label) for label in labels),
        )

    def told(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """Printed and returned: the text, the label ("" where nothing tells the labels apart), and their scores."""
        labels, results = tuple(self.counts), []
        for path, reply in zip(self.paths, replies, strict=True):
            scores = dict(zip(labels, reply.probabilities, strict=True))
            label = labels[reply.best] if reply.decided else ""
            results.append({"query": str(path), "answer": reply.text, "label": label, "scores": scores})
            _say_scores(path, reply.text, scores)
        return {"support": self.counts, "answers": results}


def _say_scores(path: Path, answer: str, scores: dict[str, float]) -> None:
    console.print(f"{path}: {answer}", highlight=False, markup=False, style="bold")
    for label, score in sorted(scores.items(), key=lambda item: -item[1]):
        console.print(f"  {score:6.1%}  {label}", highlight=False, markup=False)
