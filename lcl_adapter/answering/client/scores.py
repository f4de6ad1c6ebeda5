"""Label scores from what a chat API tells: the text that was said, and beside each of its tokens the likeliest others."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

MARK = re.compile(r"<.*>")  # how end tokens are written
UNSEEN = 1e-9  # the least that is left over beside the tokens that are told


@dataclass(frozen=True)
class TokenScore:
    """One token: its text, its log-probability, and (text, log-probability) of the likeliest at its place, itself among them or not."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


def log_likelihoods(answers: Sequence[str], text: str, tokens: Sequence[TokenScore] | None) -> tuple[float, ...]:
    """One an answer; all equal where nothing tells the answers apart.

    The answer that was said has the log-probability of its tokens. Any other is taken as likely as the likeliest token that turns
    to it where it parts from what was said (answers that turn off by the same token share it), or as what no told token accounts for:
    bounds from above, and close ones where labels part early. Without tokens, the answer that the text gives has all.
    """
    # A character in several tokens is told in pieces that are no text ("\ufffd"): what was said by then cannot be followed.
    whole = tokens and not any("\ufffd" in token.text for token in tokens)
    scored = _by_tokens(answers, text, tokens) if whole and tokens else ()
    if scored and max(scored) - min(scored) > 1e-6:
        return scored
    said = which(answers, text)
    return tuple(0.0 if index == said else -20.0 for index in range(len(answers))) if said is not None else (0.0,) * len(answers)


def which(answers: Sequence[str], text: str) -> int | None:
    """The answer that the text is, or else the only one that it holds as whole words; the longest where one holds another."""
    told = _plain(text)
    plain = [_plain(answer) for answer in answers]
    if told in plain:
        return plain.index(told)
    held = [index for index, answer in enumerate(plain) if answer and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", told)]
    widest = [i for i in held if not any(plain[i] != plain[j] and plain[i] in plain[j] for j in held)]
    return widest[0] if len(widest) == 1 else None


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().strip(".!").casefold()


def _by_tokens(answers: Sequence[str], text: str, tokens: Sequence[TokenScore]) -> tuple[float, ...]:
    """Without white space on either side: servers differ in whether a token's text begins with its space."""
    bare, whole = [_bare(answer) for answer in answers], _bare(text)
    found: dict[int, tuple[float, tuple[int, str] | None]] = {}  # log-probability, and which turning it shares with others
    said, total = "", 0.0
    for place, token in enumerate(tokens):
        longer = said + _bare(token.text)
        ends = not whole.startswith(longer)  # an end token, which is no part of the text
        for index, answer in enumerate(bare):
            if index not in found and not (answer == said if ends else answer.startswith(longer)):
                found[index] = _turning(answer, said, total, token, place)
        total += token.logprob
        if ends:
            break
        said = longer
    for index, answer in enumerate(bare):
        if index not in found:  # all that was said begins it: it was said, or is longer than what was
            found[index] = (total if answer == said else total + math.log(UNSEEN), None)
    shared = [turning for _, turning in found.values() if turning is not None]
    values = (found[index] for index in range(len(answers)))
    return tuple(value - (math.log(shared.count(turning)) if turning is not None else 0.0) for value, turning in values)


def _bare(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _turning(answer: str, said: str, total: float, token: TokenScore, place: int) -> tuple[float, tuple[int, str] | None]:
    """Where ``answer`` parts from what was said, at ``token``: by the likeliest token that goes on with it, or ends where it ends."""
    ways = [(value, text) for text, value in token.top if _goes_on(answer, said, text)]
    if ways:
        value, text = max(ways)
        return total + value, (place, text)
    told = dict(token.top) | {token.text: token.logprob}
    left = math.log(max(UNSEEN, 1 - sum(math.exp(value) for value in told.values())))
    return total + min(left, *told.values()), None


def _goes_on(answer: str, said: str, text: str) -> bool:
    bare = _bare(text)
    if answer == said:
        return not bare or MARK.fullmatch(bare) is not None
    return bool(bare) and answer.startswith(said + bare)
