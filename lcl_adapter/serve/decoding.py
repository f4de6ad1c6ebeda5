"""How the next token of an answer is chosen, and how tokens become text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

GREEDY_BELOW = 1e-3  # a lower temperature means greedy decoding


@dataclass(frozen=True)
class Token:
    """A generated token. top: ids and log-probabilities of the most likely tokens at its position."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    temperature: 0 means the most likely token. top_p: draw from the smallest set of tokens with this much probability.
    seed: of the draws; None means a random one. top_logprobs: alternatives reported with each token.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int = 0
    max_tokens: int = 256


class TokenSampler:
    """Chooses the tokens of one request.

    It has its own random generator, so that batching with other requests changes nothing.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.count = 0
        seed = sampling.seed if sampling.seed is not None else int(torch.randint(2**31, (1,)))
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits_V: torch.Tensor) -> Token:
        """The next token, given the logits of all V tokens of the vocabulary."""
        self.count += 1
        logits_V = logits_V.float().cpu()
        logprobs_V = logits_V.log_softmax(-1)
        temperature = self.sampling.temperature
        token = int(logits_V.argmax()) if temperature < GREEDY_BELOW else self._draw((logits_V - logits_V.max()) / temperature)
        top = logprobs_V.topk(self.sampling.top_logprobs) if self.sampling.top_logprobs else None
        alternatives = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top is not None else ()
        return Token(token, float(logprobs_V[token]), alternatives)

    def _draw(self, logits_V: torch.Tensor) -> int:
        chances_V, order_V = logits_V.softmax(-1).sort(descending=True)
        within_V = chances_V.cumsum(-1) - chances_V < self.sampling.top_p  # the most likely token is always within
        return int(order_V[torch.multinomial(chances_V * within_V, 1, generator=self.generator)])


class TextDecoder:
    """Turns the tokens of one job into text. It holds text back while it may be part of a character or of a stop text.

    stops: texts that end the answer and are no part of it. send: called with each piece of new text and its tokens.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], send: Callable[[str, list[Token]], None] | None = None) -> None:
        self.tokenizer = tokenizer
        self.stops = list(stops)
        self.send = send
        self.tokens: list[Token] = []
        self.text = ""
        self.sent = 0
        self._unsent: list[Token] = []

    def add(self, token: Token) -> bool:
        """Append a token, on the engine's thread. Returns False if a stop text is complete."""
        self.tokens.append(token)
        self._unsent.append(token)
        decoded = self._decode(self.tokens)
        end = min((at for stop in self.stops if (at := decoded.find(stop)) >= 0), default=None)
        self.text = decoded if end is None else decoded[:end]
        if end is None:
            begun_stop = max((_overlap(decoded, stop) for stop in self.stops), default=0)
            begun_character = len(decoded) - len(decoded.rstrip("�"))  # bytes of a character that is not complete yet
            self._flush(len(decoded) - max(begun_stop, begun_character))
            return True
        while self.tokens and self._decode(self.tokens[:-1]).startswith(self.text):
            removed = self.tokens.pop()  # a token of the stop text, so no part of the answer
            self._unsent = [token for token in self._unsent if token is not removed]
        return False

    def _decode(self, tokens: Sequence[Token]) -> str:
        return self.tokenizer.decode([t.id for t in tokens], skip_special_tokens=True).lstrip()

    def remaining(self) -> tuple[str, list[Token]]:
        """The text that is still held back at the end, and its tokens."""
        text, tokens = self.text[self.sent :], self._unsent
        self.sent, self._unsent = len(self.text), []
        return text, tokens

    def _flush(self, until: int) -> None:
        if self.send is not None and until > self.sent:
            self.send(self.text[self.sent : until], self._unsent)
            self.sent, self._unsent = until, []

    def logprobs(self, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        """Log-probabilities in OpenAI's format."""
        return [{**self._entry(t.id, t.logprob), "top_logprobs": [self._entry(*alternative) for alternative in t.top]} for t in tokens]

    def _text_of(self, token: int) -> str:
        """A token's text inside a sentence. Decoded alone, it would lose the space before a word."""
        before = self.tokenizer.encode("a", add_special_tokens=False)[-1:]
        head, both = self.tokenizer.decode(before), self.tokenizer.decode([*before, token])
        return str(both[len(head) :] if both.startswith(head) else self.tokenizer.decode([token]))

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text_of(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _overlap(text: str, stop: str) -> int:
    """The length of the longest beginning of ``stop`` that ``text`` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
