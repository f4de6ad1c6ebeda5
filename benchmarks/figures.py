"""Figures in the documents, written from the stored results.

    python -m benchmarks.figures          # rewrite every marked figure; says which changed

A figure's marker is a comment directly behind it, which a reader of the page does not see:

    8.1<!-- predict:prefilled_speedup -->                    a ratio or figure of benchmarks/results/predict.json
    0.951<!-- quickstart:2way-2shot-easy.adapter -->         a row of a report: base, adapter, prototype, low, high (95 %), greedy, n, chance; of
                                                             judgements: tower, both, calibration_error, gain, gain_low, gain_high
    70eeca4<!-- quickstart:commit -->                        what it was measured with: commit, date, training_seconds
    70<!-- percent calibrate:2 shots: strangers rejected --> a hundred times as much
    2.4<!-- points A.prototype minus A.adapter -->           a hundred times a difference

The number of decimals, the comma of thousands, the exponent, the sign and the bold marks are those of the document.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import RESULTS

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(?P<text>[^\s*<|(/–]+)(?P<bold>\**)<!-- (?P<path>.*?) -->")
COMMENT = re.compile(r"<!--(.*?)-->", re.S)
COLUMNS = {  # of a report's row
    "base": ("base", "value"), "adapter": ("adapter", "value"), "prototype": ("baseline", "value"), "greedy": ("adapter", "greedy"),
    "low": ("adapter", "ci95", 0), "high": ("adapter", "ci95", 1), "n": ("n",), "chance": ("chance",),
    "tower": ("tower", "value"), "both": ("both", "value"), "calibration_error": ("both", "calibration_error"),
    "gain": ("both", "gain", "value"), "gain_low": ("both", "gain", "ci95", 0), "gain_high": ("both", "gain", "ci95", 1),
}  # fmt: skip


class FigureError(ValueError):
    """A marker that names no stored figure, or one that cannot be printed."""


class Figure(NamedTuple):
    """A marked figure: as it stands, its path, as the stored result has it, and its line."""

    text: str
    path: str
    stored: str
    line: int


def documents() -> list[Path]:
    """Every document in which figures are marked."""
    named = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", ROOT / "lcl_adapter" / "pocket" / "MODEL_CARD.md"]
    return [*named, *sorted((ROOT / "docs").rglob("*.md"))]


def result_names() -> list[str]:
    """Of all stored results but those of GPUs, whose page is written whole."""
    return sorted(file.stem for file in RESULTS.glob("*.json") if not file.stem.startswith("gpu-"))


@functools.cache
def result(name: str) -> dict[str, Any]:
    file = RESULTS / f"{name}.json"
    if not file.exists():
        raise FigureError(f"there is no {file.name} in benchmarks/results; there are {', '.join(result_names())}")
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return loaded


def names_in(path: str) -> list[str]:
    """The results that a marker's path names."""
    return [part.partition(":")[0] for part in _terms(path)[1]]


def _terms(path: str) -> tuple[float, list[str]]:
    factor = 1.0
    for word in ("percent ", "points "):
        if path.startswith(word):
            factor, path = 100.0, path.removeprefix(word)
    return factor, path.split(" minus ")


def value_of(path: str) -> float | str | None:
    """The stored value. None where the stored row has none, such as a baseline that does not exist.

    Raises FigureError: the path names nothing that is stored.
    """
    factor, terms = _terms(path)
    values = [_value(term) for term in terms]
    if factor == 1 and len(values) == 1:
        return values[0]
    if len(values) > 2 or not all(isinstance(value, int | float) for value in values):
        raise FigureError(f"{path!r} is not a number, or a difference of two")
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return round(factor * (numbers[0] - sum(numbers[1:])), 6)


def _value(term: str) -> float | str | None:
    name, colon, key = term.partition(":")
    if not colon or not re.fullmatch(r"[\w-]+", name):
        raise FigureError(f"{term!r} is not RESULT:PATH")
    stored = result(name)
    for numbers in (stored.get("ratios", {}), stored.get("figures", {})):
        if key in numbers:
            return float(numbers[key]) if not isinstance(numbers[key], int) else int(numbers[key])
    if key in ("commit", "date", "training_seconds"):
        fact: float | str | None = stored["stored"].get(key)
        if fact is None:
            raise FigureError(f"{name}.json has no {key}")
        return fact
    row_name, _, column = key.rpartition(".")
    rows = [row for row in stored.get("suites", ()) if row["name"] == row_name]
    if not rows or column not in COLUMNS:
        known = [*stored.get("ratios", {}), *stored.get("figures", {}), *(f"{row['name']}.adapter" for row in stored.get("suites", ()))]
        raise FigureError(f"{name}.json has no {key!r}; it has {', '.join(known)}")
    value: Any = rows[0]
    for step in COLUMNS[column]:
        value = None if value is None else value.get(step) if isinstance(value, dict) else value[step]
    return None if value is None else (value if isinstance(value, int | str) else float(value))


def printed(value: float | str | None, like: str) -> str:
    """``value`` in the form of ``like``: its decimals, comma of thousands, exponent and sign.

    Raises FigureError: ``like`` is not a number, and ``value`` is.
    """
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    shape = re.fullmatch(r"(?P<sign>[+-]?)(?P<whole>\d[\d,]*)?(?P<decimals>\.\d+)?(?P<exponent>e-?\d+)?", like)
    if like == "-":
        return f"{value:.3f}"
    if shape is None or not (shape["whole"] or shape["decimals"]):
        raise FigureError(f"{like!r} is not a number")
    decimals = len(shape["decimals"] or ".") - 1
    if shape["exponent"]:
        mantissa, _, power = f"{value:.{decimals}e}".partition("e")
        return f"{mantissa}e{int(power)}"
    comma = "," if "," in like or abs(value) >= 10_000 else ""
    text = f"{value:{'+' if shape['sign'] == '+' else ''}{comma}.{decimals}f}"
    return text.replace("0.", ".", 1) if not shape["whole"] and abs(value) < 1 else text


def is_example(text: str, position: int) -> bool:
    """Whether a marker is an example in a block of code or between backticks."""
    before = text[:position]
    paragraph = before.rpartition("\n\n")[2].replace("```", "")
    return before.count("\n```") % 2 == 1 or paragraph.count("`") % 2 == 1


def figures_of(text: str) -> list[Figure]:
    """The marked figures of a document.

    Raises FigureError with the line: a comment that is no marker, or a marker that cannot be resolved.
    """
    return _walk(text)[1]


def rewritten(text: str) -> str:
    """The document with every marked figure as it is stored. Raises FigureError as :func:`figures_of`."""
    return _walk(text)[0]


def _walk(text: str) -> tuple[str, list[Figure]]:
    figures: list[Figure] = []

    def replace(match: re.Match[str]) -> str:
        if is_example(text, match.start("path")):
            return match[0]
        line = text[: match.start()].count("\n") + 1
        try:
            stored = printed(value_of(match["path"]), match["text"])
        except FigureError as error:
            raise FigureError(f"line {line}: {match[0]}: {error}") from None
        figures.append(Figure(match["text"], match["path"], stored, line))
        return f"{stored}{match['bold']}<!-- {match['path']} -->"

    behind = {match.end() for match in MARKED.finditer(text)}
    for comment in COMMENT.finditer(text):
        if comment.end() not in behind and not is_example(text, comment.start()):
            raise FigureError(f"line {text[: comment.start()].count(chr(10)) + 1}: {comment[0]} stands behind no figure")
    return MARKED.sub(replace, text), figures


def main() -> int:
    """Rewrite the documents. Returns the number of faults, which are printed."""
    faults = 0
    for document in documents():
        name, text = document.relative_to(ROOT), document.read_text(encoding="utf-8")
        try:
            made, figures = _walk(text)
        except FigureError as error:
            print(f"{name}, {error}", file=sys.stderr)
            faults += 1
            continue
        for figure in figures:
            if figure.text != figure.stored:
                print(f"{name}, line {figure.line}: {figure.text} -> {figure.stored} ({figure.path})")
        if made != text:
            document.write_text(made, encoding="utf-8")
    return faults


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
