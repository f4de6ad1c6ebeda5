"""Support sets that are larger than the context, in parts that fit. Each part has every label.

The parts are read each by itself, and a question stands behind each of them, as in Parallel-ICL (arXiv 2603.16092). A label's
score is the mean of its log-likelihoods, so the parts count alike, and together they are no surer than one of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lcl_adapter.base.encoder import Encoder
from lcl_adapter.data.conversations import Turn

QUESTION = 256  # tokens that parts leave at least to a question, without its pictures; a quarter of a small context


def tokens_asked(encoder: Encoder, question: Turn, answers: Sequence[str]) -> int:
    """Tokens of a question behind a support set, and of its longest answer."""
    return len(encoder.turns([question, Turn("assistant", max(answers, key=len, default=""))], first=False)[0])


def parts_that_fit(turns: Sequence[Turn], encoder: Encoder, behind: int) -> list[tuple[Turn, ...]]:
    """The fewest parts of a support set that leave ``behind`` tokens of the context, and room for other questions.

    The whole set where it fits, where its pictures are read without each other, where it is no list of labelled pictures, or where even
    one picture of each label is too much.
    """
    whole = [tuple(turns)]
    read = encoder.support(turns)
    room = encoder.context - max(behind, min(QUESTION, encoder.context // 4) + encoder.tokens_an_image)
    examples = list(zip(turns[::2], turns[1::2], strict=False))
    labelled = len(turns) == 2 * len(examples) and all(user.shown and user.picture and answer.role == "assistant" for user, answer in examples)
    labelled = labelled and len({user.text for user, _ in examples[1:]}) == 1  # a chat asks something else each time
    if read.longest + behind <= encoder.context or read.examples or not labelled or room <= 0:
        return whole
    most = max(Counter(answer.text for _, answer in examples).values())
    for count in range(max(2, -(-read.longest // room)), most + 1):
        parts = divided(turns, count)
        if all(encoder.support(part).longest <= room for part in parts):
            return parts
    return whole


def divided(turns: Sequence[Turn], count: int) -> list[tuple[Turn, ...]]:
    """A support set in ``count`` parts, each with every ``count``-th example of each label.

    One of a label with fewer examples than parts is shown in several of them.
    """
    by_label: dict[str, list[int]] = {}
    for number, answer in enumerate(turns[1::2]):
        by_label.setdefault(answer.text, []).append(number)
    parts = []
    for number in range(count):
        chosen = sorted(place for own in by_label.values() for place in own[number::count] or [own[number % len(own)]])
        part = [turn for place in chosen for turn in turns[2 * place : 2 * place + 2]]
        parts.append((replace(part[0], text=turns[0].text), *part[1:]))  # the first one's text begins a set
    return parts
