"""What ``ask --out`` writes: ``judged.csv``, ``judged.json``, and ``index.html`` with thumbnails by label."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lcl_adapter.answering.judged import NONE_OF_THESE, UNDECIDED, UNSURE, Judged, group_of, summary
from lcl_adapter.data.sources import Picture
from lcl_adapter.files import read_object, write_json
from lcl_adapter.report.thumbs import url_or_grey
from lcl_adapter.terminal import console

WRITTEN_BY = "lcl-adapter ask"
TABLE, JSON, PAGE = "judged.csv", "judged.json", "index.html"
SIDE, SMALL_SIDE = 176, 112  # pixels of the thumbnail of a new photo, and of a labelled one
BARS = 3  # labels with a bar on a photo's card
# How spreadsheets recognise a formula (OWASP, "CSV Injection"), in wide characters too.
FORMULA = tuple("=+-@\t\r\n＝＋－＠")


def is_judged(folder: Path) -> bool:
    """Whether a folder holds what :func:`write_judged` wrote, and nothing else."""
    try:
        return {path.name for path in folder.iterdir()} <= {TABLE, JSON, PAGE} and read_object(folder / JSON).get("written_by") == WRITTEN_BY
    except (OSError, ValueError):
        return False


def write_judged(judged: Judged, folder: Path) -> None:
    """Write the three files into an existing folder. Raises OSError if they cannot be written."""
    write_json(folder / JSON, {"written_by": WRITTEN_BY, "summary": summary(judged.answers), **judged.result})
    with (folder / TABLE).open("w", encoding="utf-8-sig", newline="") as file:  # with a byte order mark, for Excel
        csv.writer(file).writerows(table_rows(judged))
    environment = Environment(loader=PackageLoader("lcl_adapter.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    fields = _page_fields(judged)
    columns = (TextColumn("thumbnails"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(len(group.cards) for group in fields["groups"]))

        def url(card: _Card) -> str:
            bar.advance(task)
            return url_or_grey(card.picture, SIDE, padded=False)

        page = environment.get_template("judged.html").stream(**fields, url=url, small_url=partial(url_or_grey, side=SMALL_SIDE, padded=False))
        page.enable_buffering(50)  # a thumbnail is made when its place is written, so that they are not in memory together
        page.dump(str(folder / PAGE), encoding="utf-8")


def table_rows(judged: Judged) -> Iterator[list[str]]:
    """The header, then a row for each photo. A cell that has no value is empty."""
    labels = judged.labels
    compared = any("base" in row for row in judged.answers)
    head = ["file", "label", "unsure", "probability", "margin", *(f"probability of {label}" for label in labels)]
    head += ["most alike", "label of most alike", "likeness", *(["base alone", "probability by base alone"] if compared else []), "error"]
    yield [_cell(name) for name in head]
    for row in judged.answers:
        scores, alike, base = row.get("scores", {}), row.get("most_alike") or {}, row.get("base", {})
        cells: list[Any] = [row["query"]]
        if "error" in row:
            cells += [""] * (4 + len(labels) + 3 + 2 * compared)
        else:
            cells += [group_of(row), "unsure" if row["unsure"] else "", max(scores.values()), row["margin"], *(scores[label] for label in labels)]
            cells += [_alike_name(alike), alike.get("label", ""), alike.get("cosine", "")]
            cells += [base.get("label") or UNDECIDED, base["probability"]] if compared else []
        yield [_cell(value) for value in [*cells, row.get("error", "")]]


def _cell(value: Any) -> str:
    """A number with four decimals; a text that no spreadsheet runs as a formula."""
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"'{value}" if str(value).startswith(FORMULA) else str(value)


def _alike_name(alike: Mapping[str, Any]) -> str:
    """The labelled photo's file, or its number in a stored set."""
    return str(alike.get("photo") or (f"photo {alike['example'] + 1}" if alike else ""))


@dataclass(frozen=True)
class _Card:
    """A new photo on the page.

    name: its path below the folder that all photos are in. title: its label, or why it has none. bars: (label, probability).
    alike: the most alike labelled photo.
    """

    picture: Picture
    name: str
    title: str
    row: Mapping[str, Any]
    bars: tuple[tuple[str, float], ...]
    alike: Picture | None


@dataclass(frozen=True)
class _Group:
    title: str
    anchor: str
    cards: Sequence[_Card]
    note: str = ""


def _page_fields(judged: Judged) -> dict[str, Any]:
    pairs = [(picture, row) for picture, row in zip(judged.queries, judged.answers, strict=True) if "error" not in row]
    names = _short_names([row["query"] for row in judged.answers])
    cards = [_card(judged, picture, names[row["query"]], row) for picture, row in pairs]
    groups = [_Group("Unsure", "unsure", _least_sure_first(card for card in cards if card.row["unsure"]), _unsure_rule(judged))]
    titles = [*judged.labels, NONE_OF_THESE, UNDECIDED]
    for number, title in enumerate(dict.fromkeys(titles)):
        groups.append(_Group(title, f"label-{number}", _least_sure_first(card for card in cards if group_of(card.row) == title)))
    shown: dict[str, list[Picture]] = {}
    for picture, label in judged.shown:
        shown.setdefault(label, []).append(picture)
    failed = [(names[row["query"]], row["query"], row["error"]) for row in judged.answers if "error" in row]
    return {
        "title": "Judged photos",
        "summary": summary(judged.answers),
        "notes": judged.result.get("notes", ()),
        "groups": [group for group in groups if group.cards],
        "shown": shown,
        "failed": failed,
        "skipped": judged.result.get("skipped", ()),
    }


def _card(judged: Judged, picture: Picture, name: str, row: Mapping[str, Any]) -> _Card:
    ranked = sorted(row["scores"].items(), key=lambda item: -item[1])
    alike = row.get("most_alike")
    example = judged.shown[alike["example"]][0] if alike and alike["example"] < len(judged.shown) else None
    nearest = f" (nearest: {row['nearest']})" if row["label"] is None else ""
    return _Card(picture, name, group_of(row) + nearest, row, tuple(ranked[:BARS]), example)


def _least_sure_first(cards: Iterator[_Card]) -> list[_Card]:
    return sorted(cards, key=lambda card: (not card.row["unsure"], card.row["margin"]))


def _unsure_rule(judged: Judged) -> str:
    stranger = any(row.get("none_of_these") for row in judged.answers)
    return f"Look at these first: {UNSURE}{', or the photo is like no labelled one' if stranger else ''}. Each is in its label's group too."


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """Each file's path below the folder that all of them are in."""
    absolute = {name: Path(name).absolute() for name in names}
    common = os.path.commonpath([path.parent for path in absolute.values()])
    return {name: str(path.relative_to(common)) for name, path in absolute.items()}
