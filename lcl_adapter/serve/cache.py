"""Prefilled sets in memory: the one that was asked longest ago makes room for the next, before that is read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from lcl_adapter.answering.cache import Prefilled
from lcl_adapter.serve.jobs import Key

Place = tuple[str, Key]  # a model's name, and a set
REMEMBERED = 10_000  # places that were evicted, to tell a rebuild from a first reading


@dataclass(frozen=True)
class CachedSet:
    """A prefilled set, and its pictures as the tower sees them: unit vectors [N, width], in the order of its turns."""

    ready: Prefilled
    vectors: torch.Tensor
    bytes: int


@dataclass
class Counters:
    """Since the start."""

    hits: int = 0
    prefills: int = 0
    rebuilds: int = 0
    evictions: int = 0
    answered: int = 0
    refused: int = 0
    cancelled: int = 0
    waves: int = 0


class SetCache:
    """At most ``budget`` bytes of them. Used on the engine's thread alone; numbers may be read on any."""

    def __init__(self, budget: int, counters: Counters) -> None:
        self.budget, self.counters = budget, counters
        self.bytes = 0
        self._sets: OrderedDict[Place, CachedSet] = OrderedDict()
        self._evicted: set[Place] = set()
        self._a_token = 0.0  # bytes, of the last that was read

    def __len__(self) -> int:
        return len(self._sets)

    def values(self) -> Iterator[CachedSet]:
        """From the one that was asked longest ago to the newest."""
        return iter(list(self._sets.values()))

    def get(self, place: Place) -> CachedSet | None:
        found = self._sets.get(place)
        if found is not None:
            self._sets.move_to_end(place)
            self.counters.hits += 1
        return found

    def make_room(self, tokens: int) -> None:
        """For a set of so many tokens, as far as it is known what one takes: read first, it would stand beside what has to go."""
        self._evict(int(tokens * self._a_token))

    def put(self, place: Place, kept: CachedSet) -> None:
        """A set that is larger than all there is, is used and not kept."""
        self._a_token = kept.bytes / max(1, kept.ready.mask.shape[1])
        self.counters.prefills += 1
        self.counters.rebuilds += place in self._evicted
        self._evicted.discard(place)
        self._evict(kept.bytes)
        if kept.bytes <= self.budget:
            self._sets[place] = kept
            self.bytes += kept.bytes

    def drop(self, which: Callable[[Place], bool]) -> None:
        """Sets that are out of date; no evictions."""
        for place in [place for place in self._sets if which(place)]:
            self.bytes -= self._sets.pop(place).bytes

    def _evict(self, room: int) -> None:
        while self._sets and self.bytes + room > self.budget:
            place, gone = self._sets.popitem(last=False)
            self.bytes -= gone.bytes
            self.counters.evictions += 1
            if len(self._evicted) > REMEMBERED:
                self._evicted.clear()
            self._evicted.add(place)


def size_of(ready: Prefilled) -> int:
    """Bytes of keys and values."""
    total = 0
    for layer in ready.cache.layers:
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            total += tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0
    return total
