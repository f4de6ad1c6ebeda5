"""The one path to the model for evaluation, the command line and serving.

A support set is encoded and prefilled once and kept. Its queries follow in one row, several at a time, each blind to
the others; the labels to score follow each query the same way, and generated tokens too. So the support set is neither
read again nor copied: what was added is taken off the cache when a wave of queries is done.

    predictor = Predictor(base)
    ready = predictor.prefill([support_turns])
    predictor.ask(ready, [Question(0, query_turn, ("good", "scratched"))])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from transformers import DynamicCache

from lcl_adapter.base.encoder import Position, position_ids
from lcl_adapter.base.model import Base
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.conversations import Turn
from lcl_adapter.errors import EpisodeError

TOGETHER = 8  # questions behind one support set that the model reads at a time
Ids = list[int]
Request = tuple[tuple[Turn, ...], Turn, tuple[str, ...]]
Step = Callable[[torch.Tensor], torch.Tensor]
NOBODY = -1  # the segment of padding, and the parent of a query


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
    def decided(self) -> bool:
        """Whether the scores tell the answers apart."""
        return max(self.log_likelihoods) > min(self.log_likelihoods)

    @property
    def best(self) -> int:
        """Index of the most likely answer."""
        return max(range(len(self.log_likelihoods)), key=self.log_likelihoods.__getitem__)


@dataclass(frozen=True)
class Prefilled:
    """Support sets in the model's memory: a cache of [S, ...], in ``mask`` [S, P] 1 where a token is real, in ``next`` [S] the position behind."""

    cache: DynamicCache
    mask: torch.Tensor
    next: torch.Tensor

    @property
    def empty(self) -> bool:
        """No support set at all: questions stand alone."""
        return self.mask.shape[1] == 0

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """What is read inside is forgotten, errors or not. Tensors are put back, not cropped: a cropped one keeps the memory of all of it."""
        layers = list(self.cache.layers)
        before = [dict(vars(layer)) for layer in layers]
        try:
            yield
        finally:
            self.cache.layers[:] = layers
            for layer, state in zip(layers, before, strict=True):
                vars(layer).clear()
                vars(layer).update(state)


@dataclass
class Row:
    """What follows one support set in a wave. A segment is a query, or an answer whose parent is its query; all [T]."""

    ids: Ids = field(default_factory=list)
    segment: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    position: list[Position] = field(default_factory=list)  # behind the support set
    ends: list[int] = field(default_factory=list)  # where each query's last token is
    places: list[int] = field(default_factory=list)  # and the position behind it
    tails: list[list[tuple[list[int], Ids]]] = field(default_factory=list)  # of each query: (where logits are read, what they must say)
    longest: int = 0  # tokens of the longest query with an answer

    def add(self, ids: Ids, parent: int, positions: Sequence[Position]) -> int:
        """Append a segment that stands at ``positions`` behind the support set; returns where it begins in the row."""
        begins, number = len(self.ids), 1 + max(self.segment, default=NOBODY)
        self.ids += ids
        self.segment += [number] * len(ids)
        self.parent += [parent] * len(ids)
        self.position += positions
        return begins


@dataclass
class Predictor:
    """Asks one base, with its adapter or (inside ``base.without_adapter()``) without.

    batch_size: support sets at a time. pack: queries behind one support set at a time.
    """

    base: Base
    vision: VisionFeatures = field(default=None)  # type: ignore[assignment]
    batch_size: int = 32
    pack: int = TOGETHER
    max_new_tokens: int = 24

    def __post_init__(self) -> None:
        self.vision = self.vision or VisionFeatures(self.base)
        self.encoder = self.base.encoder()
        self.device = self.base.device

    @torch.inference_mode()
    def prefill(self, supports: Sequence[Sequence[Turn]]) -> Prefilled:
        """Read each support set once. Sets without turns are allowed only if all are.

        Raises EpisodeError where one leaves no room in the context; DataError for a broken picture.
        """
        rows = [self.encoder.turns(turns)[0] if turns else [] for turns in supports]
        longest = max(len(row) for row in rows)
        if longest >= self.encoder.context:
            raise EpisodeError(f"a support set of {longest} tokens does not fit the context of {self.encoder.context}: show fewer photos.")
        cache = DynamicCache(config=self.base.llava.config.get_text_config())
        following = [0] * len(rows)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=torch.long, device=self.device)
        if longest:
            ids = torch.tensor([[self.encoder.pad] * (longest - len(row)) + row for row in rows], device=self.device)
            placed = [self.encoder.positions(row) for row in rows]
            following = [begins for _, begins in placed]
            positions = position_ids([row for row, _ in placed], longest, left=True).to(self.device)
            self._forward(ids, mask, positions, cache, [t for turns in supports for t in turns], keep=1)
        return Prefilled(cache, mask, torch.tensor(following, device=self.device))

    @torch.inference_mode()
    def ask(self, ready: Prefilled, questions: Sequence[Question], generate: bool = True) -> list[Reply]:
        """Replies in the order of the questions. ``ready`` is afterwards as it was."""
        queues: list[list[int]] = [[] for _ in range(ready.mask.shape[0])]
        for index, question in enumerate(questions):
            queues[question.support].append(index)
        replies: dict[int, Reply] = {}
        for start in range(0, max(map(len, queues)), self.pack):
            wave = [queue[start : start + self.pack] for queue in queues]
            replies.update(self._wave(ready, [[questions[i] for i in row] for row in wave], wave, generate))
        return [replies[i] for i in range(len(questions))]

    @torch.inference_mode()
    def talk(self, ready: Prefilled, turns: Sequence[Turn], choose: Callable[[int, torch.Tensor], int | None], new_tokens: int) -> None:
        """Continue each turn behind the one set in ``ready``, a token at a time, together.

        choose: told a turn's number and the logits [V] of its next token, says which it is, or None where the turn has
        ended; it may raise, and ``ready`` is afterwards as it was all the same. Raises EpisodeError where there is no room.
        """
        rows = [self._row([Question(0, turn) for turn in turns], ready.empty)]
        prefix = ready.next[:, None]
        furthest = int(ready.mask.sum()) + rows[0].longest + new_tokens
        if furthest > self.encoder.context:
            raise EpisodeError(f"what is asked and up to {new_tokens} new tokens are {furthest}, the context is {self.encoder.context}.")
        segment = self._padded([rows[0].segment], len(rows[0].ids), NOBODY)
        with ready.untouched():
            logits, _ = self._read(ready, rows, segment, turns)
            step = self._steps(ready, rows, segment, prefix, len(turns))
            open_turns = list(range(len(turns)))
            for left in range(new_tokens, 0, -1):
                chosen = {turn: choose(turn, logits[turn]) for turn in open_turns}
                open_turns = [turn for turn in open_turns if chosen[turn] is not None]
                if not open_turns or left == 1:
                    return
                given = [token if (token := chosen.get(turn)) is not None else self.encoder.eos for turn in range(len(turns))]
                logits = step(torch.tensor([given], device=self.device))[0]

    def run(
        self, requests: Sequence[Request], generate: bool = True, done: Callable[[int], None] | None = None, new_tokens: int | None = None
    ) -> list[Reply]:
        """(support set, query, answers) each, in any mix: equal support sets are read once, like lengths go together.

        ``done`` is told how many were answered after each batch; ``new_tokens`` is how long an answer may be, this time.
        """
        if new_tokens is not None and new_tokens != self.max_new_tokens:
            return replace(self, max_new_tokens=new_tokens).run(requests, generate, done)
        groups: dict[tuple[Turn, ...], list[int]] = {}
        for index, (support, _, _) in enumerate(requests):
            if support:
                groups.setdefault(support, []).append(index)
        ordered = sorted(groups.items(), key=lambda item: (len(item[0]), len(item[1]), sum(len(t.text) for t in item[0])))
        alone = sorted((i for i, r in enumerate(requests) if not r[0]), key=lambda i: len(requests[i][1].text))
        replies: dict[int, Reply] = {}
        for chunk in (*self._chunks(ordered), *self._chunks([((), [i]) for i in alone])):
            ready = self.prefill([support for support, _ in chunk])
            indices = [i for _, members in chunk for i in members]
            places = [place for place, (_, members) in enumerate(chunk) for _ in members]
            questions = [Question(place, requests[i][1], requests[i][2]) for i, place in zip(indices, places, strict=True)]
            replies.update(zip(indices, self.ask(ready, questions, generate), strict=True))
            if done:
                done(len(indices))
        return [replies[i] for i in range(len(requests))]

    def _chunks(self, groups: Iterable[tuple[tuple[Turn, ...], list[int]]]) -> Iterator[list[tuple[tuple[Turn, ...], list[int]]]]:
        listed = list(groups)
        for start in range(0, len(listed), self.batch_size):
            yield listed[start : start + self.batch_size]

    def _wave(self, ready: Prefilled, asked: list[list[Question]], numbers: list[list[int]], generate: bool) -> dict[int, Reply]:
        """Up to ``pack`` questions behind each support set: one forward for queries and labels, one for each new token."""
        rows = [self._row(questions, ready.empty) for questions in asked]
        length = max(len(row.ids) for row in rows)
        furthest = int((ready.mask.sum(1) + torch.tensor([r.longest for r in rows], device=self.device)).max())
        if furthest + self.max_new_tokens > self.encoder.context:
            raise EpisodeError(f"support set and query are {furthest} tokens, the context is {self.encoder.context}: show fewer photos.")
        segment = self._padded([r.segment for r in rows], length, NOBODY)
        with ready.untouched():
            return self._replies(ready, rows, segment, asked, numbers, generate)

    def _replies(
        self, ready: Prefilled, rows: Sequence[Row], segment: torch.Tensor, asked: list[list[Question]], numbers: list[list[int]], generate: bool
    ) -> dict[int, Reply]:
        logits, where = self._read(ready, rows, segment, [q.turn for questions in asked for q in questions])
        said = iter(self._sums(logits, [([where[n, p] for p in at], says) for n, row in enumerate(rows) for t in row.tails for at, says in t]))
        scores = [[tuple(next(said) for _ in tails) for tails in row.tails] for row in rows]
        texts = [["" for _ in row.ends] for row in rows]
        if generate:
            likeliest = logits.argmax(-1).tolist()
            first = [[likeliest[where[n, end]] for end in row.ends] for n, row in enumerate(rows)]
            texts = self._greedy(ready, rows, segment, ready.next[:, None], first)
        found = zip(numbers, texts, scores, strict=True)
        return {i: Reply(t, s) for own, said, scored in found for i, t, s in zip(own, said, scored, strict=True)}

    def _read(
        self, ready: Prefilled, rows: Sequence[Row], segment: torch.Tensor, turns: Sequence[Turn]
    ) -> tuple[torch.Tensor, dict[tuple[int, ...], int]]:
        """What follows each support set, in one forward; logits [N, V] where something is read from, and which row of them is which place."""
        length = segment.shape[1]
        parent = self._padded([r.parent for r in rows], length, NOBODY)
        related = (segment[:, :, None] == segment[:, None, :]) | (parent[:, :, None] == segment[:, None, :])
        visible = related & (segment >= 0)[:, None] & torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        visible |= torch.eye(length, dtype=torch.bool, device=self.device)  # padding sees itself: no softmax over nothing
        seen = ready.mask.bool()[:, None, :].expand(-1, length, -1)
        wanted = torch.zeros(len(rows), length, dtype=torch.bool, device=self.device)
        for number, row in enumerate(rows):
            for place in (*row.ends, *(p for tails in row.tails for places, _ in tails for p in places)):
                wanted[number, place] = True
        logits = self._forward(
            self._padded([r.ids for r in rows], length, self.encoder.pad),
            torch.cat([seen, visible], 2)[:, None],
            ready.next[:, None] + position_ids([r.position for r in rows], length).to(self.device),
            ready.cache,
            turns,
            keep=wanted,
        ).reshape(int(wanted.sum()), -1)
        return logits, {tuple(place): i for i, place in enumerate(wanted.nonzero().tolist())}

    def _sums(self, logits: torch.Tensor, answers: Sequence[tuple[list[int], Ids]]) -> list[float]:
        """log p of each answer: the sum over its tokens, given (rows of ``logits``, token ids) each."""
        if not answers:
            return []
        places = torch.tensor([p for at, _ in answers for p in at], device=self.device)
        tokens = torch.tensor([t for _, says in answers for t in says], device=self.device)
        owner = torch.tensor([n for n, (at, _) in enumerate(answers) for _ in at], device=self.device)
        likely = logits.float().log_softmax(-1)[places, tokens]
        totals: list[float] = torch.zeros(len(answers), device=self.device).index_add_(0, owner, likely).tolist()
        return totals

    def _row(self, questions: Sequence[Question], alone: bool) -> Row:
        """A support set's questions and their answers as segments."""
        row = Row()
        for question in questions:
            prompt = self.encoder.turns([question.turn], opened=True, first=alone)[0]
            placed, following = self.encoder.positions(prompt)
            begins = row.add(prompt, NOBODY - 1, placed)
            query, end = row.segment[-1], begins + len(prompt) - 1
            tails = []
            for answer in question.answers:
                whole = self.encoder.turns([question.turn, Turn("assistant", answer)], first=alone)[0]
                says = whole[len(prompt) :]  # check_alignment holds: the prompt is a prefix
                at = row.add(says[:-1], query, self.encoder.positions(says[:-1], following)[0])
                row.longest = max(row.longest, len(whole) - 1)
                tails.append(([end, *range(at, at + len(says) - 1)], says))
            row.ends.append(end)
            row.places.append(following)
            row.longest = max(row.longest, len(prompt))
            row.tails.append(tails)
        return row

    def _greedy(self, ready: Prefilled, rows: Sequence[Row], segment: torch.Tensor, prefix: torch.Tensor, first: list[list[int]]) -> list[list[str]]:
        """The most likely token of every query at a time, until its end or ``max_new_tokens``."""
        width = max(len(f) for f in first)
        current = self._padded(first, width, self.encoder.eos)
        made = [current]
        finished = current == self.encoder.eos
        step = self._steps(ready, rows, segment, prefix, width)
        while not bool(finished.all()) and len(made) < self.max_new_tokens:
            current = step(current).argmax(-1).masked_fill(finished, self.encoder.eos)
            finished = finished | (current == self.encoder.eos)
            made.append(current)
        tokens = torch.stack(made, 2)  # [S, K, steps]
        texts = []
        for number, row in enumerate(rows):
            said = []
            for query in range(len(row.ends)):
                ids = tokens[number, query].tolist()
                ids = ids[: ids.index(self.encoder.eos)] if self.encoder.eos in ids else ids
                said.append(self.encoder.tokenizer.decode(ids, skip_special_tokens=True).strip())
            texts.append(said)
        return texts

    def _steps(self, ready: Prefilled, rows: Sequence[Row], segment: torch.Tensor, prefix: torch.Tensor, width: int) -> Step:
        """What reads one more token of every query, [S, K], behind what it has said, and gives the logits of the next, [S, K, V]."""
        queries = self._padded([[r.segment[end] for end in r.ends] for r in rows], width, NOBODY - 1)  # [S, K]
        position = prefix + self._padded([r.places for r in rows], width, 0)
        if self.encoder.grid is not None:
            position = position.expand(3, -1, -1)
        own_query = queries[:, :, None] == segment[:, None, :]
        seen = torch.cat([ready.mask.bool()[:, None, :].expand(-1, width, -1), own_query], 2)
        itself = torch.eye(width, dtype=torch.bool, device=self.device)[None].expand(len(rows), -1, -1)

        def step(tokens: torch.Tensor) -> torch.Tensor:
            nonlocal seen, position
            seen = torch.cat([seen, itself], 2)
            logits = self._forward(tokens, seen[:, None], position, ready.cache, (), keep=0)
            position = position + 1
            return logits

        return step

    def _padded(self, rows: Sequence[Sequence[int]], length: int, fill: int) -> torch.Tensor:
        """[S, length], padded on the right."""
        return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], dtype=torch.long, device=self.device)

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache, turns: Sequence[Turn], keep: int | torch.Tensor
    ) -> torch.Tensor:
        """Read ``ids`` behind what the cache holds; logits where ``keep`` says."""
        pictures = [picture for turn in turns for picture in turn.pictures]
        images = {"mm_encoder_outputs": self.vision.projected(pictures)} if pictures else {}
        outputs = self.base.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=keep, **images
        )
        logits: torch.Tensor = outputs.logits
        return logits
