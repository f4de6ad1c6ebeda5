"""What is said: how a token is drawn, and how tokens become text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

GREEDY = 1e-3  # temperatures below are none


@dataclass(frozen=True)
class Token:
    """One that was said: the text that it adds, its id and log-probability, and those of the likeliest ones beside it."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 takes the likeliest; top_p: of the smallest set with this much probability; top: alternatives told."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top: int = 0
    max_tokens: int = 256


class Chooser:
    """Draws tokens as one request asks, from a generator of its own, so that batching with others changes nothing."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.count = 0
        seed = sampling.seed if sampling.seed is not None else int(torch.randint(2**31, (1,)))
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> Token:
        self.count += 1
        logits = logits.float().cpu()
        logprobs = logits.log_softmax(-1)
        hot = self.sampling.temperature
        token = int(logits.argmax()) if hot < GREEDY else self._drawn((logits - logits.max()) / hot)
        top = logprobs.topk(self.sampling.top) if self.sampling.top else None
        beside = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top is not None else ()
        return Token(token, float(logprobs[token]), beside)

    def _drawn(self, logits: torch.Tensor) -> int:
        chances, order = logits.softmax(-1).sort(descending=True)
        within = chances.cumsum(-1) - chances < self.sampling.top_p  # the likeliest always
        chances = chances * within
        return int(order[torch.multinomial(chances, 1, generator=self.generator)])


class Speaker:
    """Tokens to text, for one job: held back while a character or a stop text may still be under way."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], send: Callable[[str, list[Token]], None] | None = None) -> None:
        self.tokenizer = tokenizer
        self.stops = list(stops)
        self.send = send
        self.tokens: list[Token] = []
        self.text = ""
        self.sent = 0
        self._unsent: list[Token] = []

    def hear(self, token: Token) -> bool:
        """On the engine's thread; False where a stop text was said."""
        self.tokens.append(token)
        self._unsent.append(token)
        whole = self._decoded(self.tokens)
        ends = min((at for stop in self.stops if (at := whole.find(stop)) >= 0), default=None)
        self.text = whole if ends is None else whole[:ends]
        if ends is None:
            held = max((_overlap(whole, stop) for stop in self.stops), default=0)
            half = len(whole) - len(whole.rstrip("�"))  # bytes of a character that is not whole yet
            self._flush(len(whole) - max(held, half))
            return True
        while self.tokens and self._decoded(self.tokens[:-1]).startswith(self.text):
            gone = self.tokens.pop()  # said, and no part of the text
            self._unsent = [kept for kept in self._unsent if kept is not gone]
        return False

    def _decoded(self, tokens: Sequence[Token]) -> str:
        return self.tokenizer.decode([t.id for t in tokens], skip_special_tokens=True).lstrip()

    def rest(self) -> tuple[str, list[Token]]:
        """What was held back to the end."""
        found = self.text[self.sent :], self._unsent
        self.sent, self._unsent = len(self.text), []
        return found

    def _flush(self, until: int) -> None:
        if self.send is not None and until > self.sent:
            self.send(self.text[self.sent : until], self._unsent)
            self.sent, self._unsent = until, []

    def told(self, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        """Log-probabilities as OpenAI gives them."""
        return [{**self._named(t.id, t.logprob), "top_logprobs": [self._named(*one) for one in t.top]} for t in tokens]

    def _within(self, token: int) -> str:
        """As it stands in a sentence: alone, a decoder drops the space that a word begins with."""
        before = self.tokenizer.encode("a", add_special_tokens=False)[-1:]
        head, both = self.tokenizer.decode(before), self.tokenizer.decode([*before, token])
        return str(both[len(head) :] if both.startswith(head) else self.tokenizer.decode([token]))

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._within(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _overlap(text: str, stop: str) -> int:
    """How much of ``stop``'s beginning ``text`` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
