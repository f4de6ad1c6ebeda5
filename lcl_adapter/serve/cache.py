"""Prefilled support sets in memory, under a limit in bytes. The least recently used set is evicted first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from lcl_adapter.answering.cache import Prefilled
from lcl_adapter.answering.judgement import ShownLabels
from lcl_adapter.serve.jobs import SetKey

CacheKey = tuple[str, SetKey, bool]  # a model's name, a support set, and whether it is read in parts
MAX_EVICTED_KEYS = 10_000  # keys of evicted sets that are remembered, so that a second prefill counts as a rebuild


@dataclass(frozen=True)
class CachedSet:
    """A prefilled set.

    vectors: its N pictures as unit vectors of the vision tower, [N, C], in the order of its turns.
    bytes: of its keys and values. shown: its labels, for a judgement in which the tower counts.
    for_texts: it is read as a whole, for a text; to score answers, it is read in parts.
    """

    prefilled: Prefilled
    vectors: torch.Tensor
    bytes: int
    shown: ShownLabels | None = None
    for_texts: bool = False


@dataclass
class Counters:
    """Counts since the start.

    A field's name is part of its metric's name: ``lcl_<field>_total``.
    waves: batches of jobs that the model answered.
    """

    hits: int = 0
    prefills: int = 0
    rebuilds: int = 0
    evictions: int = 0
    answered: int = 0
    refused: int = 0
    cancelled: int = 0
    waves: int = 0


class SetCache:
    """At most ``budget`` bytes of prefilled sets.

    The engine's thread alone changes it; any thread may read ``bytes`` and the length.
    """

    def __init__(self, budget: int, counters: Counters) -> None:
        self.budget, self.counters = budget, counters
        self.bytes = 0
        self._sets: OrderedDict[CacheKey, CachedSet] = OrderedDict()
        self._evicted: set[CacheKey] = set()
        self._bytes_per_token = 0.0  # of the set that was stored last

    def __len__(self) -> int:
        return len(self._sets)

    def values(self) -> Iterator[CachedSet]:
        """From the least to the most recently used."""
        return iter(list(self._sets.values()))

    def find(self, model: str, key: SetKey, scored: bool) -> CachedSet | None:
        """A set as a question is asked by it. scored: whether the question's answers are scored, or a text is written."""
        for in_parts in (True, False) if scored else (False,):
            cached = self._sets.get((model, key, in_parts))
            if cached is not None and not (scored and cached.for_texts):
                self._sets.move_to_end((model, key, in_parts))
                self.counters.hits += 1
                return cached
        return None

    def of_model(self, name: str) -> list[Prefilled]:
        """The sets that a model has read, from the least to the most recently used."""
        return [cached.prefilled for (model, *_), cached in self._sets.items() if model == name]

    def make_room(self, tokens: int) -> None:
        """Evict sets before a new one of so many tokens is prefilled, so that memory never has to hold both.

        The size is estimated from the last set that was stored. Before the first set, nothing is evicted.
        """
        self._evict(int(tokens * self._bytes_per_token))

    def put(self, key: CacheKey, cached: CachedSet) -> None:
        """Store a set. A set that is larger than the whole budget is not stored."""
        self._bytes_per_token = cached.bytes / max(1, cached.prefilled.mask.shape[1])
        self.counters.prefills += 1
        self.counters.rebuilds += key in self._evicted
        self._evicted.discard(key)
        self._evict(cached.bytes)
        if cached.bytes <= self.budget:
            self._sets[key] = cached
            self.bytes += cached.bytes

    def drop(self, matches: Callable[[CacheKey], bool]) -> None:
        """Remove sets that are out of date. These do not count as evictions."""
        for key in [key for key in self._sets if matches(key)]:
            self.bytes -= self._sets.pop(key).bytes

    def _evict(self, needed: int) -> None:
        """Evict sets until ``needed`` bytes are free, or the cache is empty."""
        while self._sets and self.bytes + needed > self.budget:
            key, cached = self._sets.popitem(last=False)
            self.bytes -= cached.bytes
            self.counters.evictions += 1
            if len(self._evicted) > MAX_EVICTED_KEYS:
                self._evicted.clear()
            self._evicted.add(key)
