"""Label scores from a chat API: from its text, and from the log-probabilities of its tokens and of their likeliest
alternatives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

END_TOKEN = re.compile(r"<.*>")  # how servers write end tokens
LEAST_PROBABILITY = 1e-9  # what all tokens that a server does not list have together, at least
NOT_NAMED = -20.0  # log-likelihood of the answers that a text without tokens does not give
Branch = tuple[int, str]  # the index of a token in the reply, and an alternative to it


@dataclass(frozen=True)
class TokenScore:
    """A token of a reply: its text, its log-probability, and (text, log-probability) of the likeliest tokens at its
    place.

    Some servers list the token itself in ``top``, others do not.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


def log_likelihoods(answers: Sequence[str], text: str, tokens: Sequence[TokenScore] | None) -> tuple[float, ...]:
    """One score for each answer; all are equal if nothing distinguishes the answers.

    The answer that the reply gives has the sum of its tokens' log-probabilities. Any other answer leaves the reply at
    some token. Its score is the probability up to there, times that of the likeliest alternative that continues the
    answer. Answers with the same alternative share its probability. If no alternative continues the answer, the
    probability of all unlisted tokens takes its place. These scores are upper bounds. They are close where labels
    differ early.

    Without tokens, the answer that the text names has the whole probability.
    """
    # A character of several tokens has tokens that are no text ("\ufffd"); such a reply cannot be compared token by
    # token.
    complete = tokens and not any("\ufffd" in token.text for token in tokens)
    scores = _scores_by_tokens(answers, text, tokens) if complete and tokens else ()
    if scores and max(scores) - min(scores) > 1e-6:
        return scores
    named = find_answer(answers, text)
    return tuple(0.0 if index == named else NOT_NAMED for index in range(len(answers))) if named is not None else (0.0,) * len(answers)


def find_answer(answers: Sequence[str], text: str) -> int | None:
    """Index of the answer that is equal to the text, or else of the only one that the text has as whole words.

    An answer inside a longer one that the text also has does not count.
    """
    plain_text = _plain(text)
    plain = [_plain(answer) for answer in answers]
    if plain_text in plain:
        return plain.index(plain_text)
    matches = [index for index, answer in enumerate(plain) if answer and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", plain_text)]
    longest = [i for i in matches if not any(plain[i] != plain[j] and plain[i] in plain[j] for j in matches)]
    return longest[0] if len(longest) == 1 else None


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().strip(".!").casefold()


def _scores_by_tokens(answers: Sequence[str], text: str, tokens: Sequence[TokenScore]) -> tuple[float, ...]:
    """Spaces are ignored, because servers differ in whether a token's text begins with its space."""
    plain_answers, plain_text = [_without_spaces(answer) for answer in answers], _without_spaces(text)
    scores: dict[int, float] = {}
    branches: dict[int, Branch | None] = {}
    prefix, logprob = "", 0.0  # the reply before the current token
    for place, token in enumerate(tokens):
        longer = prefix + _without_spaces(token.text)
        at_end = not plain_text.startswith(longer)  # an end token, which is no part of the text
        for index, answer in enumerate(plain_answers):
            follows = answer == prefix if at_end else answer.startswith(longer)
            if index not in scores and not follows:
                scores[index], branches[index] = _leave(answer, prefix, logprob, token, place)
        logprob += token.logprob
        if at_end:
            break
        prefix = longer
    for index, answer in enumerate(plain_answers):
        if index not in scores:  # the answer is the whole reply, or begins with it
            scores[index], branches[index] = logprob if answer == prefix else logprob + math.log(LEAST_PROBABILITY), None
    shared = [branch for branch in branches.values() if branch is not None]
    sharing = [shared.count(branch) if (branch := branches[index]) is not None else 1 for index in range(len(answers))]
    return tuple(scores[index] - math.log(count) for index, count in enumerate(sharing))


def _without_spaces(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _leave(answer: str, prefix: str, logprob: float, token: TokenScore, place: int) -> tuple[float, Branch | None]:
    """The score of an answer that differs from the reply at ``token``, and the alternative that continues the answer.

    prefix, logprob: the reply before ``token``.
    """
    alternatives = [(value, text) for text, value in token.top if _continues(answer, prefix, text)]
    if alternatives:
        value, text = max(alternatives)
        return logprob + value, (place, text)
    listed = dict(token.top) | {token.text: token.logprob}
    unlisted = math.log(max(LEAST_PROBABILITY, 1 - sum(math.exp(value) for value in listed.values())))
    return logprob + min(unlisted, *listed.values()), None


def _continues(answer: str, prefix: str, text: str) -> bool:
    """Whether a token's text continues the answer after ``prefix``, or ends it where the prefix is all of it."""
    plain = _without_spaces(text)
    if answer == prefix:
        return not plain or END_TOKEN.fullmatch(plain) is not None
    return bool(plain) and answer.startswith(prefix + plain)
