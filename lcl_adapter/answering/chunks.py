"""Support sets in parts: those that are larger than the context, or have more photos of a label than an adapter was trained with.

Each part has every label. The parts are read each by itself, and a question stands behind each of them, as in Parallel-ICL (arXiv
2603.16092). A label's score is the mean of its log-likelihoods, so the parts count alike, and together they are no surer than one of
them. What this gives is in docs/lab.md.

Where a question is asked in several orientations, every part is read again with all of its pictures mirrored or turned, and behind it
the question with its own picture mirrored or turned alike. So what distinguishes the labels is kept, also where it is a side or a
direction. A model's scores are a little off in another way each time, and their mean is less so (docs/lab.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lcl_adapter.base.encoder import Encoder
from lcl_adapter.data.conversations import Turn, is_support_set, oriented

Share = tuple[tuple[Turn, ...], Turn]  # a part of a support set, and the question as it is asked about it
QUESTION = 256  # tokens that parts leave at least to a question, without its pictures; a quarter of a small context


def tokens_asked(encoder: Encoder, question: Turn, answers: Sequence[str]) -> int:
    """Tokens of a question behind a support set, and of its longest answer."""
    return len(encoder.turns([question, Turn("assistant", max(answers, key=len, default=""))], first=False)[0])


def fits(turns: Sequence[Turn], encoder: Encoder, behind: int) -> bool:
    """Whether a support set can be read as a whole, with ``behind`` tokens after it."""
    return encoder.support(turns).longest + behind <= encoder.context


def parts_by_shots(turns: Sequence[Turn], shots: int | None) -> int:
    """In how many parts a support set has at most ``shots`` photos of each label; 1 where there is no such bound, or it is no list of
    labelled photos.
    """
    return -(-max(Counter(answer.text for answer in turns[1::2]).values()) // shots) if shots and is_support_set(turns) else 1


def parts_that_fit(turns: Sequence[Turn], encoder: Encoder, behind: int, shots: int | None = None) -> list[tuple[Turn, ...]]:
    """The fewest parts of a support set that leave ``behind`` tokens of the context, and room for other questions.

    shots: photos of each label that an adapter was trained with at most; a part has no more.
    The whole set where it fits, where its pictures are read without each other, where it is no list of labelled pictures, or where even
    one picture of each label is too much.
    """
    whole = [tuple(turns)]
    read = encoder.support(turns)
    if read.examples or not is_support_set(turns):
        return whole
    fewest = parts_by_shots(turns, shots)
    if fits(turns, encoder, behind):
        return divided(turns, fewest)
    room = encoder.context - max(behind, min(QUESTION, encoder.context // 4) + encoder.tokens_an_image)
    if room <= 0:
        return whole
    for count in range(max(fewest, 2, -(-read.longest // room)), parts_by_shots(turns, 1) + 1):
        parts = divided(turns, count)
        if all(encoder.support(part).longest <= room for part in parts):
            return parts
    return whole


def in_orientations(parts: Sequence[tuple[Turn, ...]], count: int) -> list[tuple[Turn, ...]]:
    """The parts of a set of labelled photos, each in the first ``count`` orientations. Other turns stay as they are."""
    if not all(map(is_support_set, parts)):
        return list(parts)
    return [*parts, *(oriented(part, orientation) for orientation in range(2, count + 1) for part in parts)]


def orientation_of(turns: Sequence[Turn]) -> int:
    """The orientation that a part is read in."""
    return next((picture.orientation for turn in turns for picture in turn.pictures), 1)


def shares_of(turns: Sequence[Turn], question: Turn, shots: int | None, orientations: int) -> list[Share]:
    """The parts of a support set that have at most ``shots`` photos of a label, in each orientation."""
    parts = in_orientations(divided(turns, parts_by_shots(turns, shots)), orientations)
    return [(part, oriented([question], orientation_of(part))[0]) for part in parts]


def divided(turns: Sequence[Turn], count: int) -> list[tuple[Turn, ...]]:
    """A support set in ``count`` parts, each with every ``count``-th example of each label.

    One of a label with fewer examples than parts is shown in several of them.
    """
    if count == 1:
        return [tuple(turns)]
    by_label: dict[str, list[int]] = {}
    for number, answer in enumerate(turns[1::2]):
        by_label.setdefault(answer.text, []).append(number)
    parts = []
    for number in range(count):
        chosen = sorted(place for own in by_label.values() for place in own[number::count] or [own[number % len(own)]])
        part = [turn for place in chosen for turn in turns[2 * place : 2 * place + 2]]
        parts.append((replace(part[0], text=turns[0].text), *part[1:]))  # the first one's text begins a set
    return parts
