"""Results as HTML for readers and screen readers. All text from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from lcl_adapter.answering import api_types
from lcl_adapter.answering.judged import CLOSE_MARGIN
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import DataError
from lcl_adapter.page.texts import message
from lcl_adapter.report.thumbs import data_url

WEAK_ACCURACY = 0.75  # on a set's own left-out photos; below it the card says that the set is difficult


def note(text: str, error: bool = False) -> str:
    """A line that a screen reader reads out when it changes."""
    css_class, role = ("lcl-wrong", "alert") if error else ("lcl-note", "status")
    return f'<p class="{css_class}" role="{role}">{escape(text)}</p>' if text else '<p role="status"></p>'


def results(
    language: str,
    photos: Sequence[Path],
    response: api_types.ClassifyOut,
    examples: Sequence[str],
    reject: bool = True,
    by_base: api_types.ClassifyOut | None = None,
) -> str:
    """A card for each photo.

    examples: the set's photos as data URLs, in their order. reject: a photo that is none of these has no label. by_base: what
    the base answers without the adapter.
    """
    of_base: Sequence[api_types.Judgement | None] = by_base.results if by_base else [None] * len(photos)
    triples = enumerate(zip(photos, response.results, of_base, strict=True), 1)
    cards = [_card(language, number, photo, result, response, examples, reject, by_base=base) for number, (photo, result, base) in triples]
    in_parts = note(message(language, "parts", parts=response.parts)) if response.parts > 1 else ""
    return f'{in_parts}<div class="lcl-cards">{"".join(cards)}</div>'


def comparison(
    language: str,
    photos: Sequence[Path],
    responses: Sequence[tuple[str, api_types.ClassifyOut]],
    examples: Sequence[str],
    reject: bool = True,
) -> str:
    """The cards of two models side by side for each photo. responses: (model's name, its response), two of them."""
    (_, first), (_, second) = responses
    pairs = list(zip(first.results, second.results, strict=True))
    same = sum(_answer(a, reject) == _answer(b, reject) for a, b in pairs if a.error is None and b.error is None)
    rows = []
    for number, photo in enumerate(photos, 1):
        cells = []
        for model, response in responses:
            card = _card(language, number, photo, response.results[number - 1], response, examples, reject, "h3")
            cells.append(f"<div><h2>{escape(model)}</h2>{card}</div>")
        rows.append(f'<div class="lcl-pair">{"".join(cells)}</div>')
    return note(message(language, "same", same=same, count=len(pairs))) + "".join(rows)


def reasons(language: str, result: api_types.Judgement, calibration: api_types.CalibrationOut) -> list[str]:
    """Reasons not to trust the label; "Sure." if there is none."""
    lines = []
    if result.none_of_these and result.nearest is not None and calibration.threshold is not None:
        lines.append(message(language, "unlike", label=result.nearest, score=result.familiarity, threshold=calibration.threshold))
    elif result.margin < CLOSE_MARGIN:
        (first_label, first), (second_label, second) = _ranked(result)[:2]
        lines.append(message(language, "close", first_label=first_label, second_label=second_label, first=first, second=second))
    if calibration.left_out and calibration.right < WEAK_ACCURACY * calibration.left_out:
        lines.append(message(language, "weak", right=calibration.right, left_out=calibration.left_out))
    if calibration.left_out == 0:
        lines.append(message(language, "few"))
    return lines or [message(language, "sure")]


def _ranked(result: api_types.Judgement) -> list[tuple[str, float]]:
    """(label, probability), the most likely first."""
    return sorted(result.probabilities.items(), key=lambda item: -item[1])


def _answer(result: api_types.Judgement, reject: bool) -> str | None:
    return result.label if reject else result.nearest


def _card(
    language: str,
    number: int,
    photo: Path,
    result: api_types.Judgement,
    response: api_types.ClassifyOut,
    examples: Sequence[str],
    reject: bool,
    heading: str = "h2",
    by_base: api_types.Judgement | None = None,
) -> str:
    name = f"{message(language, 'photo')} {number}"
    try:
        image = f'<img src="{data_url(Picture(photo))}" alt="{escape(name)}">'
    except DataError:
        image = f'<span class="lcl-no-image" role="img" aria-label="{escape(name)}">?</span>'
    if result.error is not None:
        return f'<section class="lcl-card" aria-label="{escape(name)}">{image}<div>{note(result.error.message, error=True)}</div></section>'
    answer = _answer(result, reject)
    title = answer if answer is not None else message(language, "none")
    nearest = f" <small>{escape(message(language, 'nearest', label=result.nearest))}</small>" if answer is None else ""
    bars = "".join(
        f'<li><span>{escape(label)}</span><span class="lcl-bar" aria-hidden="true"><i style="width:{100 * chance:.1f}%"></i></span>'
        f"<span>{chance:.0%}</span></li>"
        for label, chance in _ranked(result)
    )
    figure = ""
    if result.most_alike is not None and result.most_alike.example < len(examples):
        caption = escape(message(language, "most_alike", label=result.most_alike.label))
        figure = f'<figure><img src="{escape(examples[result.most_alike.example])}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    why = reasons(language, result, response.calibration)
    if by_base is not None and by_base.nearest is not None:
        why.append(message(language, "base_alone", label=by_base.nearest, chance=by_base.probabilities[by_base.nearest]))
    lines = "".join(f"<p>{escape(line)}</p>" for line in why)
    return (
        f'<section class="lcl-card" aria-label="{escape(name)}">{image}<div><{heading}>{escape(title)}{nearest}</{heading}>'
        f'<ul class="lcl-bars">{bars}</ul><div class="lcl-why">{lines}</div></div>{figure}</section>'
    )
