"""The one path to the model for evaluation, the command line and serving.

A support set is encoded and prefilled once and kept; queries run in batches on copies of its cache; every label is
scored on a copy of the query's. Rows of different lengths are padded on the left, and positions count real tokens
alone, so that a padded row computes what it would alone.

    predictor = Predictor(base)
    ready = predictor.prefill([support_turns])
    predictor.ask(ready, [Question(0, query_turn, ("good", "scratched"))])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, GenerationConfig

from lcl_adapter.conversations import Turn
from lcl_adapter.errors import EpisodeError
from lcl_adapter.model import Base
from lcl_adapter.vision import VisionFeatures

Ids = list[int]


@dataclass(frozen=True)
class Question:
    """A query on the ``support``-th prefilled set. ``answers`` are the worded labels to score, none for free text."""

    support: int
    turn: Turn
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """``text``: greedy answer, "" where none was asked for. ``log_likelihoods``: one an answer, its end token included."""

    text: str
    log_likelihoods: tuple[float, ...] = ()

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Over the answers given; they sum to 1."""
        top = max(self.log_likelihoods, default=0.0)
        weights = [math.exp(v - top) for v in self.log_likelihoods]
        return tuple(w / sum(weights) for w in weights)

    @property
    def best(self) -> int:
        """Index of the most likely answer."""
        return max(range(len(self.log_likelihoods)), key=self.log_likelihoods.__getitem__)


@dataclass(frozen=True)
class Prefilled:
    """Support sets in the model's memory: a cache of [S, ...], the ids [S, P] it stands for, 1 in ``mask`` where real."""

    cache: DynamicCache
    ids: torch.Tensor
    mask: torch.Tensor
    empty: bool = False


@dataclass
class Predictor:
    """Asks one base, with its adapter or (inside ``base.without_adapter()``) without."""

    base: Base
    vision: VisionFeatures = field(default=None)  # type: ignore[assignment]
    batch_size: int = 32
    max_new_tokens: int = 24

    def __post_init__(self) -> None:
        self.vision = self.vision or VisionFeatures(self.base)
        self.encoder = self.base.encoder()
        self.device = self.base.device

    def prefill(self, supports: Sequence[Sequence[Turn]]) -> Prefilled:
        """Read each support set once. Sets without turns are allowed only if all are.

        Raises EpisodeError where one leaves no room in the context; DataError for a broken picture.
        """
        rows = [self.encoder.turns(turns)[0] if turns else [] for turns in supports]
        longest = max(len(row) for row in rows)
        if longest >= self.encoder.context:
            raise EpisodeError(f"a support set of {longest} tokens does not fit the context of {self.encoder.context}: show fewer photos.")
        if not longest:
            nothing = torch.zeros(len(rows), 0, dtype=torch.long, device=self.device)
            return Prefilled(self._cache(), nothing, nothing, empty=True)
        ids, mask = self._left(rows)
        cache = self._cache()
        self._forward(ids, mask, cache, [turns for turns in supports])
        return Prefilled(cache, ids, mask)

    @torch.inference_mode()
    def ask(self, ready: Prefilled, questions: Sequence[Question], generate: bool = True) -> list[Reply]:
        """Replies in the order of the questions."""
        replies: list[Reply] = []
        for start in range(0, len(questions), self.batch_size):
            replies += self._ask(ready, questions[start : start + self.batch_size], generate)
        return replies

    def run(
        self, requests: Sequence[tuple[tuple[Turn, ...], Turn, tuple[str, ...]]], generate: bool = True, done: Callable[[int], None] | None = None
    ) -> list[Reply]:
        """(support set, query, answers) each, in any mix: equal support sets are read once, like lengths go together.

        ``done`` is told how many were answered after each batch.
        """
        groups: dict[tuple[Turn, ...], list[int]] = {}
        for index, (support, _, _) in enumerate(requests):
            groups.setdefault(support, []).append(index)
        replies: list[Reply | None] = [None] * len(requests)
        ordered = sorted(groups.items(), key=lambda item: (len(item[0]), sum(len(t.text) for t in item[0])))
        for chunk in self._chunks(ordered):
            ready = self.prefill([support for support, _ in chunk])
            indices = [i for _, members in chunk for i in members]
            places = [place for place, (_, members) in enumerate(chunk) for _ in members]
            questions = [Question(place, requests[i][1], requests[i][2]) for i, place in zip(indices, places, strict=True)]
            for i, reply in zip(indices, self.ask(ready, questions, generate), strict=True):
                replies[i] = reply
            if done:
                done(len(indices))
        return [reply for reply in replies if reply is not None]

    def _chunks(self, groups: Iterable[tuple[tuple[Turn, ...], list[int]]]) -> Iterator[list[tuple[tuple[Turn, ...], list[int]]]]:
        """Support sets of which at most ``batch_size`` are asked at once; empty ones never with others."""
        chunk: list[tuple[tuple[Turn, ...], list[int]]] = []
        for group in groups:
            full = sum(len(members) for _, members in chunk) + len(group[1]) > self.batch_size
            if chunk and (full or bool(chunk[0][0]) != bool(group[0])):
                yield chunk
                chunk = []
            chunk.append(group)
        if chunk:
            yield chunk

    def _ask(self, ready: Prefilled, questions: Sequence[Question], generate: bool) -> list[Reply]:
        chosen = torch.tensor([q.support for q in questions], device=self.device)
        prompts = [self.encoder.turns([q.turn], opened=True, first=ready.empty)[0] for q in questions]
        query_ids, query_mask = self._left(prompts)
        ids = torch.cat([ready.ids[chosen], query_ids], 1)
        mask = torch.cat([ready.mask[chosen], query_mask], 1)
        if int(mask.sum(1).max()) + self.max_new_tokens > self.encoder.context:
            raise EpisodeError(
                f"support set and query are {int(mask.sum(1).max())} tokens, the context is {self.encoder.context}: show fewer photos."
            )
        cache = self._cache() if ready.empty else select(ready.cache, chosen, self._cache())
        logits = self._forward(query_ids, mask, cache, [[q.turn] for q in questions])
        scores = self._score(cache, mask, logits, questions, prompts, ready.empty)
        texts = self._generate(cache, ids, mask) if generate else [""] * len(questions)
        return [Reply(text, tuple(score)) for text, score in zip(texts, scores, strict=True)]

    def _score(
        self, cache: DynamicCache, mask: torch.Tensor, logits: torch.Tensor, questions: Sequence[Question], prompts: Sequence[Ids], first: bool
    ) -> list[list[float]]:
        """log p(answer and end | prompt) for every answer of every question: [Q][answers]."""
        pairs = [(row, answer) for row, question in enumerate(questions) for answer in question.answers]
        scores: list[list[float]] = [[] for _ in questions]
        for start in range(0, len(pairs), 2 * self.batch_size):
            part = pairs[start : start + 2 * self.batch_size]
            tails = []
            for row, answer in part:
                whole = self.encoder.turns([questions[row].turn, Turn("assistant", answer)], first=first)[0]
                tails.append(whole[len(prompts[row]) :])  # check_alignment holds: the prompt is a prefix
            rows = torch.tensor([row for row, _ in part], device=self.device)
            length = max(len(tail) for tail in tails)
            ids = torch.tensor([tail + [self.encoder.pad] * (length - len(tail)) for tail in tails], device=self.device)
            real = torch.arange(length, device=self.device)[None] < torch.tensor([[len(tail)] for tail in tails], device=self.device)
            steps = [logits[rows][:, None]]
            if length > 1:
                seen = torch.cat([mask[rows], real[:, :-1].long()], 1)
                steps.append(self._language(ids[:, :-1], seen, select(cache, rows, self._cache()), keep=0))
            likely = torch.cat(steps, 1).float().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
            totals = (likely * real).sum(1).tolist()
            for (row, _), total in zip(part, totals, strict=True):
                scores[row].append(total)
        return scores

    def _generate(self, cache: DynamicCache, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
        """Greedy text. The cache holds the whole prompt; its last token is taken back so that generate has one to begin with."""
        cache.crop(-1)
        config = GenerationConfig(
            do_sample=False, max_new_tokens=self.max_new_tokens, eos_token_id=self.encoder.eos, pad_token_id=self.encoder.pad, use_cache=True
        )
        made = self.base.model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=config)
        new: list[str] = self.encoder.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in new]

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache, turns: Sequence[Sequence[Turn]]) -> torch.Tensor:
        """Read ``ids`` behind what the cache holds; logits after the last token, [B, V]."""
        pictures = [turn.picture for row in turns for turn in row if turn.picture is not None]
        return self._language(ids, mask, cache, keep=1, **({"mm_encoder_outputs": self.vision.projected(pictures)} if pictures else {}))[:, -1]

    def _language(self, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache, keep: int, **images: object) -> torch.Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        outputs = self.base.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=keep, **images
        )
        logits: torch.Tensor = outputs.logits
        return logits

    def _left(self, rows: Sequence[Ids]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask [B, longest], padded on the left."""
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[self.encoder.pad] * (longest - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return ids, mask

    def _cache(self) -> DynamicCache:
        return DynamicCache(config=self.base.llava.config)


def select(cache: DynamicCache, rows: torch.Tensor, into: DynamicCache) -> DynamicCache:
    """A copy of the chosen rows of a cache; the original is left as it is."""
    for index, layer in enumerate(cache.layers):
        into.update(layer.keys[rows], layer.values[rows], index)
    return into
