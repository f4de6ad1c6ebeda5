"""Classify new pictures by labelled ones: with a model on this machine, with one behind a server, or with a set stored
on a server.

Each function prints its answers for people, and returns them with the pictures. New pictures are read and answered in
blocks, so that memory does not grow with their number. One that cannot be read has its error in its answer.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lcl_adapter.answering.api_types import JudgeName
from lcl_adapter.answering.chunks import fits, tokens_asked
from lcl_adapter.answering.client import Endpoint, RemotePredictor, ScoreSource
from lcl_adapter.answering.client import judge as judge_by_stored_set
from lcl_adapter.answering.client.messages import LARGEST_SENT
from lcl_adapter.answering.judged import CLOSE_MARGIN, NONE_OF_THESE, Judged, margin_of, summary
from lcl_adapter.answering.judgement import Evidence, TowerEvidence, Weighing, read_weighing
from lcl_adapter.answering.predict import Predictor, Question, Reply
from lcl_adapter.base.adapter import load_adapter
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import NOT_GIVEN, BaseRef
from lcl_adapter.base.supports import asked_otherwise
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.conversations import WORDINGS, Turn, support_turns, wording_of
from lcl_adapter.data.episodes.base import clash
from lcl_adapter.data.sources import Picture, read_class_folders, read_image
from lcl_adapter.data.sources.base import remarks
from lcl_adapter.data.sources.depth import common_white
from lcl_adapter.data.sources.images import READ
from lcl_adapter.data.sources.new_photos import NewPhotos, list_photos
from lcl_adapter.errors import AdapterError, DataError
from lcl_adapter.recipe import load
from lcl_adapter.recipe.wording import Wording
from lcl_adapter.terminal import console, printable, results, show_notes

BLOCK = 16  # pictures that are read and answered at a time
FEATURE_BYTES = 300 * 10**6  # of cached features: those of a block are used more than once
CHECKED_SIDE = 64  # pixels at which a picture is decoded only to see whether it can be
BODY_BYTES = 40 * 2**20  # of the images in a request about a stored set; the server accepts 64 MiB of JSON, in base64
NAMED = 5  # files that a note names; the result names all

Row = dict[str, Any]


def ask_model(
    support: Path,
    queries: Sequence[Path],
    adapter: Path | None = None,
    base: BaseRef = NOT_GIVEN,
    shots: int | None = None,
    question: str | None = None,
    compare: bool = False,
    brief: bool = False,
    judge: JudgeName | None = None,
) -> Judged:
    """Classify pictures with a model on this machine. It reads the support set once for all queries.

    support: a folder with a folder of photos for each class. queries: files, and folders of pictures at any depth.
    adapter: a run's folder; None asks the base alone. compare: also ask the base without the adapter.
    brief: print only what failed. judge: what decides; None means model and tower, where the adapter has weights for them, else the model.

    Raises DataError for a broken labelled picture, a single class, an empty class, a folder without pictures, or if no
    query can be read; AdapterError if the tower is to judge and the adapter has no weights.
    """
    labelled, new = _on_one_scale(_Labelled.read(support, shots), list_photos(queries))
    notes = labelled.notes(new)
    weighed = None
    if adapter is None:
        loaded = load_base(base.defaulting_to(precision="auto"))
        wording = WORDINGS[loaded.family.wording]
    else:
        loaded, manifest = load_adapter(adapter, base)
        wording = wording_of(load(adapter / "recipe.yaml"))
        weighed = read_weighing(adapter, manifest)
        if weighed is not None and weighed[0].several is None:  # weighed on sets with one label alone; here are several
            weighed = None
        changed = asked_otherwise(manifest, loaded)
        show_notes(changed)
        notes += changed
    judge = judge or ("model" if weighed is None else "both")
    if judge != "model" and weighed is None:
        raise AdapterError(
            f"{adapter or 'the base alone'}: has no weights for `judge: {judge}`; use `model`, or train with suites under `evaluate.validation`."
        )
    vision = VisionFeatures(loaded, FEATURE_BYTES, BLOCK)
    weighing, space = weighed or (Weighing(), None)
    tower = TowerEvidence(vision, space, loaded.orientations)
    predictor = Predictor(loaded, vision)
    turns, answers = support_turns(labelled.shown, wording), labelled.answers(wording)
    asked_tokens = tokens_asked(predictor.encoder, Turn("user", question or wording.query, labelled.shown[0][0]), answers)
    behind = asked_tokens + predictor.max_new_tokens
    parts = predictor.parts(turns, behind)
    prefilled = predictor.prefill(parts)
    whole = prefilled if len(parts) > 1 and parts[0] == turns else None  # the text is written behind all of them
    if prefilled.divisions > 1:
        fit = fits(turns, predictor.encoder, behind)
        why = f"are more than the {loaded.shots} of each label that the adapter was trained with" if fit else "do not fit the context at once"
        in_parts = f"{len(labelled.shown)} labelled photos {why}: they are read in {prefilled.divisions} parts, whose scores are averaged"
        show_notes([in_parts])
        notes.append(in_parts)
        whole = predictor.prefill([turns]) if fit and judge != "tower" else None
    if compare:
        with loaded.without_adapter():
            prefilled_by_base = predictor.prefill(parts)
    vectors_SC = tower.vectors([picture for picture, _ in labelled.shown])

    def answer(block: Sequence[Picture]) -> list[Row]:
        asked = [Question(0, Turn("user", question or wording.query, picture), answers) for picture in block]
        replies = predictor.ask_parts(prefilled, asked, generate=judge != "tower")
        if whole is not None and judge != "tower":
            texts = predictor.ask(whole, [replace(question, answers=()) for question in asked])
            replies = [replace(reply, text=written.text) for reply, written in zip(replies, texts, strict=True)]
        if judge == "model":
            rows = [labelled.row(reply) for reply in replies]
        else:
            evidence = tower.of(labelled.shown, block, labelled.labels)
            rows = [labelled.judged_row(reply, own, weighing, judge) for reply, own in zip(replies, evidence, strict=True)]
        cosines_NS = tower.vectors(block) @ vectors_SC.T
        for row, cosines in zip(rows, cosines_NS.tolist(), strict=True):
            row["most_alike"] = labelled.most_alike(cosines)
        if compare:
            with loaded.without_adapter():
                by_base = predictor.ask_parts(prefilled_by_base, asked, generate=False)
            for row, reply in zip(rows, by_base, strict=True):
                scores = labelled.scores(reply)
                row["base"] = {"label": labelled.label(reply), "probability": max(scores.values()), "scores": scores}
        return rows

    rows = _in_blocks(_blocks(new.pictures), vision.tower_features, answer, brief)
    return Judged(labelled.shown, new.pictures, {"judge": judge, **labelled.fields(), **_listing(new), "notes": notes, "answers": rows})


def ask_endpoint(
    support: Path,
    queries: Sequence[Path],
    url: str,
    model: str | None = None,
    shots: int | None = None,
    question: str | None = None,
    wording: str = "lcl",
    pad: bool = False,
    brief: bool = False,
    scores: ScoreSource = "auto",
) -> Judged:
    """Classify pictures with a model behind a server. If the server gives no probabilities, its text decides.

    scores: where label scores come from, as of ``RemotePredictor``.
    support, queries, brief: as of :func:`ask_model`. Raises DataError as there; EndpointError, MissingError, RequestError.
    """
    labelled, new, worded = _Labelled.read(support, shots), list_photos(queries), WORDINGS[wording]
    notes = labelled.notes(new)
    turns, answers = support_turns(labelled.shown, worded), labelled.answers(worded)
    with Endpoint(url) as endpoint:
        remote = RemotePredictor(endpoint, endpoint.model(model), pad=pad, scores=scores)

        def answer(block: Sequence[Picture]) -> list[Row]:
            replies = remote.run([(turns, Turn("user", question or worded.query, picture), answers) for picture in block])
            return [labelled.row(reply) for reply in replies]

        rows = _in_blocks(_blocks(new.pictures), _check, answer, brief)
        notes += endpoint.notes
    return Judged(labelled.shown, new.pictures, {**labelled.fields(), **_listing(new), "notes": notes, "answers": rows})


def ask_stored_set(
    name: str,
    queries: Sequence[Path],
    url: str,
    model: str | None = None,
    question: str | None = None,
    judge: JudgeName | None = None,
    with_photos: bool = False,
    brief: bool = False,
) -> Judged:
    """Classify pictures with a support set that is stored on this project's server.

    queries, judge, brief: as of :func:`ask_model`. with_photos: also fetch the photos of the set.

    Raises DataError if all pictures are broken; EndpointError, MissingError, RequestError.
    """
    new = list_photos(queries)
    notes = _notes(new)
    answered: Row = {}
    with Endpoint(url) as endpoint:

        def answer(block: Sequence[Picture]) -> list[Row]:
            # Later blocks ask the version that the first one was answered by.
            response = judge_by_stored_set(endpoint, name, block, model, question, answered.get("version"), judge)
            answered.update(support_set=name, version=response.version, model=response.model, judge=response.judge)
            if response.parts > 1 and (in_parts := f"the set is read in {response.parts} parts, whose scores are averaged") not in notes:
                show_notes([in_parts])
                notes.append(in_parts)
            rows: list[Row] = []
            for result in response.results:
                if result.error is not None:
                    rows.append({"error": result.error.message})
                    continue
                row = result.model_dump(exclude={"error", "probabilities"})
                unsure = result.none_of_these or result.margin < CLOSE_MARGIN
                rows.append({"answer": result.label or "", **row, "unsure": unsure, "scores": result.probabilities})
            return rows

        rows = _in_blocks(_blocks(new.pictures, BODY_BYTES), _check, answer, brief)
        shown: list[tuple[Picture, str]] = []
        if with_photos:
            stored = endpoint.read_set(name, images=True, version=answered["version"])
            for example in stored.examples:
                data = base64.b64decode((example.image or "").partition(",")[2])
                shown.append((Picture(Path(example.sha256), data=data), example.label))
    return Judged(tuple(shown), new.pictures, {**answered, **_listing(new), "notes": notes, "answers": rows})


@dataclass(frozen=True)
class _Labelled:
    """The labelled photos. shown: each with its label. labels: in the order of the scores. remarks: what was passed over."""

    shown: tuple[tuple[Picture, str], ...]
    labels: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    @classmethod
    def read(cls, support: Path, shots: int | None) -> _Labelled:
        """Read every labelled picture once, before any model is loaded. Raises DataError."""
        pool = read_class_folders(support)
        if len(pool) < 2:
            raise DataError(f"{support}: has only one class ({pool.classes[0].name!r}). Add a folder of photos for each further class.")
        shown = tuple((picture, c.name) for c in pool.classes for picture in c.pictures[:shots])
        _check([picture for picture, _ in shown])
        return cls(shown, tuple(c.name for c in pool.classes), tuple(remarks(pool)))

    def answers(self, wording: Wording) -> tuple[str, ...]:
        return tuple(wording.answered(label) for label in self.labels)

    def fields(self) -> Row:
        counts = {label: sum(own == label for _, own in self.shown) for label in self.labels}
        return {"support": counts, "shown": [{"photo": printable(str(picture)), "label": label} for picture, label in self.shown]}

    def scores(self, reply: Reply) -> dict[str, float]:
        return dict(zip(self.labels, reply.probabilities, strict=True))

    def label(self, reply: Reply) -> str:
        """The likeliest label; "" if the labels have equal scores."""
        return self.labels[reply.best] if reply.decided else ""

    def row(self, reply: Reply) -> Row:
        margin = margin_of(reply.probabilities)
        unsure = margin < CLOSE_MARGIN
        return {"answer": reply.text, "label": self.label(reply), "margin": margin, "unsure": unsure, "scores": self.scores(reply)}

    def judged_row(self, reply: Reply, evidence: Sequence[Evidence], weighing: Weighing, judge: JudgeName) -> Row:
        """The row of a judgement in which the tower counts; ``model`` and ``tower`` have each one's own label and its probability."""
        logs = {name: weighing.scores(reply.log_likelihoods, evidence, name) for name in dict.fromkeys((judge, "model", "tower"))}
        replies = {name: replace(reply, log_likelihoods=own) for name, own in logs.items() if own is not None}
        alone = {name: {"label": self.label(replies[name]), "probability": max(replies[name].probabilities)} for name in ("model", "tower")}
        return {**self.row(replies[judge]), **alone}

    def most_alike(self, cosines: Sequence[float]) -> Row:
        """The labelled photo with the highest cosine. cosines: one for each of them."""
        example = max(range(len(cosines)), key=cosines.__getitem__)
        picture, label = self.shown[example]
        return {"example": example, "photo": printable(str(picture)), "label": label, "cosine": cosines[example]}

    def notes(self, new: NewPhotos) -> list[str]:
        """What is worth knowing before the answers. Prints it too."""
        own = {os.path.realpath(picture.path) for picture, _ in self.shown}
        labelled = [picture.path for picture in new.pictures if os.path.realpath(picture.path) in own]
        lines = list(self.remarks)
        lines += [f"photos to classify that are labelled photos too, so that their answers prove little: {_named(labelled)}"] if labelled else []
        for number, label in enumerate(self.labels):
            for earlier in self.labels[:number]:
                if clash(label, earlier):
                    lines.append(
                        f"the labels {earlier!r} and {label!r} begin alike. Their scores are correct, but a generated answer may end too early."
                    )
        return _notes(new, lines)


def _on_one_scale(labelled: _Labelled, new: NewPhotos) -> tuple[_Labelled, NewPhotos]:
    """The same photos, with one white for all that have more than 8 bits."""
    white = common_white([*(picture for picture, _ in labelled.shown), *new.pictures])
    if white is None:
        return labelled, new
    shown = tuple((replace(picture, white=white), label) for picture, label in labelled.shown)
    return replace(labelled, shown=shown), replace(new, pictures=tuple(replace(picture, white=white) for picture in new.pictures))


def _notes(new: NewPhotos, lines: Sequence[str] = ()) -> list[str]:
    """These lines, and what was not asked about. Prints them too."""
    all_lines = list(lines)
    if new.repeated:
        all_lines.append(f"pictures that were given twice, and are asked about once: {_named(new.repeated)}")
    if new.skipped:
        all_lines.append(f"skipped, for a picture's name ends in {', '.join(sorted(READ))}: {_named(new.skipped)}")
    show_notes(all_lines)
    return all_lines


def _named(paths: Sequence[Path]) -> str:
    """How many, and the names of the first."""
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return f"{len(paths)} ({', '.join(printable(str(path)) for path in paths[:NAMED])}{more})"


def _listing(new: NewPhotos) -> Row:
    return {"skipped": [printable(str(path)) for path in new.skipped]}


def _check(pictures: Sequence[Picture]) -> None:
    """Decode each picture, at a fraction of its size where that is faster. Raises DataError for the first broken one."""
    for picture in pictures:
        read_image(picture, CHECKED_SIDE)


def _blocks(pictures: Sequence[Picture], most_bytes: int | None = None) -> list[list[Picture]]:
    """The pictures in their order, BLOCK together at most, of which a request has about ``most_bytes`` at most."""
    blocks: list[list[Picture]] = []
    room = 0
    for picture in pictures:
        # What is not sent unchanged is sent as PNG, which is larger.
        size = min(4 * picture.path.stat().st_size, LARGEST_SENT) if most_bytes and picture.path.is_file() else 0
        if not blocks or len(blocks[-1]) == BLOCK or (most_bytes and room < size):
            blocks.append([])
            room = most_bytes or 0
        blocks[-1].append(picture)
        room -= size
    return blocks


def _in_blocks(
    blocks: Sequence[Sequence[Picture]], read: Callable[[Sequence[Picture]], object], answer: Callable[[Sequence[Picture]], list[Row]], brief: bool
) -> list[Row]:
    """A row for each picture. Prints each and a summary, or with ``brief`` only those that failed.

    read: raises DataError if one of the pictures is broken. answer: the rows of pictures that can be read.

    Raises DataError if no picture has an answer.
    """
    rows: list[Row] = []
    columns = (TextColumn("classifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(map(len, blocks)))
        for block in blocks:
            errors = _errors(block, read)
            readable = [picture for picture in block if picture not in errors]
            answered = iter(answer(readable) if readable else ())
            for picture in block:
                name = printable(str(picture))
                row = {"query": name, **({"error": errors[picture]} if picture in errors else next(answered))}
                rows.append(row)
                if "error" in row:
                    results().print(f"{name}: {row['error']}", highlight=False, markup=False, style="red")
                elif not brief:
                    _print_scores(name, row)
            bar.advance(task, len(block))
    if all("error" in row for row in rows):
        named = " ".join(f"{row['query']}: {row['error']}" for row in rows[:NAMED])
        raise DataError(f"none of the {len(rows)} pictures has an answer. {named}" if len(rows) > 1 else named)
    if not brief and len(rows) > 1:
        results().print(summary(rows), highlight=False, markup=False)
    return rows


def _errors(pictures: Sequence[Picture], read: Callable[[Sequence[Picture]], object]) -> dict[Picture, str]:
    """What is wrong with each picture that cannot be read. All are read together, and only after an error one by one."""
    errors: dict[Picture, str] = {}
    try:
        read(pictures)
    except DataError:
        for picture in pictures:
            try:
                read([picture])
            except DataError as error:
                errors[picture] = printable(str(error).removeprefix(f"{picture}: "))
    return errors


def _print_scores(name: str, row: Row) -> None:
    title = row["label"] if "tower" in row else row["answer"]
    if row["label"] is None:
        title = f"{NONE_OF_THESE} (nearest: {row['nearest']})"
    results().print(f"{name}: {title}", highlight=False, markup=False, style="bold")
    for label, score in sorted(row["scores"].items(), key=lambda item: -item[1]):
        results().print(f"  {score:6.1%}  {label}", highlight=False, markup=False)
    for judge in ("model", "tower"):
        if judge in row and row[judge]["label"] != row["label"]:
            results().print(f"  the {judge} alone: {row[judge]['label']}, {row[judge]['probability']:.1%}", highlight=False, markup=False)
    if "base" in row:
        base = row["base"]
        results().print(f"  the base alone: {base['label'] or 'undecided'}, {base['probability']:.1%}", highlight=False, markup=False)
