"""Judgements -> HTML that a reader and a screen reader can follow. Everything from outside is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from lcl_adapter.answering import api_types
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import DataError
from lcl_adapter.page.texts import say
from lcl_adapter.report.thumbs import data_url

CLOSE = 0.2  # a margin below this is told
WEAK = 0.75  # as is a set whose own photos are right less often


def note(text: str, wrong: bool = False) -> str:
    """A line that is read out when it changes."""
    kind, role = ("lcl-wrong", "alert") if wrong else ("lcl-note", "status")
    return f'<p class="{kind}" role="{role}">{escape(text)}</p>' if text else '<p role="status"></p>'


def judged(tongue: str, photos: Sequence[Path], found: api_types.ClassifyOut, examples: Sequence[str], bar: bool = True) -> str:
    """A card a photo. examples: the set's photos as data URLs, in their order; bar: whether a stranger has no label."""
    pairs = enumerate(zip(photos, found.results, strict=True), 1)
    cards = [_card(tongue, number, photo, one, found, examples, bar) for number, (photo, one) in pairs]
    return f'<div class="lcl-cards">{"".join(cards)}</div>'


def compared(tongue: str, photos: Sequence[Path], pair: Mapping[str, api_types.ClassifyOut], examples: Sequence[str], bar: bool = True) -> str:
    """Both models' cards of each photo beside each other."""
    one, other = pair.values()
    pairs = list(zip(one.results, other.results, strict=True))
    same = sum(_answer(a, bar) == _answer(b, bar) for a, b in pairs if a.error is None and b.error is None)
    rows = []
    for number, photo in enumerate(photos, 1):
        cells = "".join(
            f"<div><h2>{escape(name)}</h2>{_card(tongue, number, photo, found.results[number - 1], found, examples, bar, 'h3')}</div>"
            for name, found in pair.items()
        )
        rows.append(f'<div class="lcl-pair">{cells}</div>')
    return note(say(tongue, "same", same=same, count=len(pairs))) + "".join(rows)


def why(tongue: str, one: api_types.Judgement, found: api_types.CalibrationOut) -> list[str]:
    """What speaks against trusting the label, plainly; one line where nothing does."""
    told = []
    if one.none_of_these and one.nearest is not None and found.threshold is not None:
        told.append(say(tongue, "unlike", label=one.nearest, score=one.familiarity, threshold=found.threshold))
    elif one.margin < CLOSE:
        (first, a), (second, b) = sorted(one.probabilities.items(), key=lambda item: -item[1])[:2]
        told.append(say(tongue, "close", one=first, other=second, first=a, second=b))
    if found.left_out and found.right < WEAK * found.left_out:
        told.append(say(tongue, "weak", right=found.right, asked=found.left_out))
    if found.left_out == 0:
        told.append(say(tongue, "few"))
    return told or [say(tongue, "sure")]


def _answer(one: api_types.Judgement, bar: bool) -> str | None:
    return one.label if bar else one.nearest


def _card(
    tongue: str,
    number: int,
    photo: Path,
    one: api_types.Judgement,
    found: api_types.ClassifyOut,
    examples: Sequence[str],
    bar: bool,
    head: str = "h2",
) -> str:
    name = f"{say(tongue, 'photo')} {number}"
    try:
        image = f'<img src="{data_url(Picture(photo))}" alt="{escape(name)}">'
    except DataError:
        image = f'<span class="lcl-no-image" role="img" aria-label="{escape(name)}">?</span>'
    if one.error is not None:
        return f'<section class="lcl-card" aria-label="{escape(name)}">{image}<div>{note(one.error.message, wrong=True)}</div></section>'
    answer = _answer(one, bar)
    told = answer if answer is not None else say(tongue, "none")
    nearest = f" <small>{escape(say(tongue, 'nearest', label=one.nearest))}</small>" if answer is None else ""
    bars = "".join(
        f'<li><span>{escape(label)}</span><span class="lcl-bar" aria-hidden="true"><i style="width:{100 * chance:.1f}%"></i></span>'
        f"<span>{chance:.0%}</span></li>"
        for label, chance in sorted(one.probabilities.items(), key=lambda item: -item[1])
    )
    alike = ""
    if one.most_alike is not None and one.most_alike.example < len(examples):
        caption = escape(say(tongue, "alike", label=one.most_alike.label))
        alike = f'<figure><img src="{escape(examples[one.most_alike.example])}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    reasons = "".join(f"<p>{escape(line)}</p>" for line in why(tongue, one, found.calibration))
    return (
        f'<section class="lcl-card" aria-label="{escape(name)}">{image}<div><{head}>{escape(told)}{nearest}</{head}>'
        f'<ul class="lcl-bars">{bars}</ul><div class="lcl-why">{reasons}</div></div>{alike}</section>'
    )
