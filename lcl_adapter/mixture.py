"""Shares -> a deterministic schedule: which source gives the i-th row, and which of its own that is.

Indices are cut into blocks of 100. Every block holds each source as often as its share says (largest remainder), in an
order drawn from (seed, block). So any index can be computed alone: by any number of workers, or by a resumed run.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lcl_adapter import episodes
from lcl_adapter.episodes import Episode
from lcl_adapter.errors import RecipeError
from lcl_adapter.recipe import Recipe, packaged
from lcl_adapter.recipe.schema import EpisodeOptions, LlavaJsonSource, PocketSource, SourceOptions
from lcl_adapter.sources import ClassPool, Dialogue, Picture, Pool, QuestionPool, open_source

BLOCK = 100
RETRY = 10_000_000  # an index is tried again, after a bad image, as index + attempt * RETRY


@dataclass(frozen=True)
class Slot:
    """What the schedule says of one index: the source, and the count of that source's draws before it."""

    source: str
    ordinal: int


class Mixture:
    """The episodes and dialogues of a recipe's training sources, by index."""

    def __init__(self, recipe: Recipe, pools: Mapping[str, Pool] | None = None) -> None:
        self.recipe = recipe
        self.seed = recipe.train.seed
        self.options: dict[str, SourceOptions] = {n: s for n, s in recipe.sources.items() if s.share > 0}
        self.pools = dict(pools) if pools is not None else {n: open_options(n, s) for n, s in self.options.items()}
        total = sum(s.share for s in self.options.values())
        self.requested = {n: s.share / total for n, s in self.options.items()}
        self.counts = _largest_remainder(self.requested)
        unheard = [n for n, c in self.counts.items() if not c]
        if unheard:
            raise RecipeError([f"sources {', '.join(unheard)}: a share below 1 in {2 * BLOCK} would never be drawn; raise it or remove the source"])

    def slot(self, index: int) -> Slot:
        block, place = divmod(index, BLOCK)
        names = self._block(block)
        source = names[place]
        return Slot(source, block * self.counts[source] + names[:place].count(source))

    def draw(self, index: int, attempt: int = 0) -> Episode | tuple[Dialogue, ...]:
        """An episode, or the dialogues that share a row; ``attempt`` > 0 is another one of the same source, for when a picture was bad."""
        slot = self.slot(index)
        options, pool = self.options[slot.source], self.pools[slot.source]
        ordinal = slot.ordinal + attempt * RETRY
        if isinstance(pool, ClassPool):
            assert isinstance(options, EpisodeOptions)
            return episodes.draw(pool, options, self.seed, 0, ordinal)
        assert isinstance(options, LlavaJsonSource)
        first = ordinal * options.packed
        return tuple(pool.dialogues[self._shuffled(slot.source, len(pool), n)] for n in range(first, first + options.packed))

    def realised(self, indices: Iterable[int]) -> dict[str, float]:
        """The share of each source among ``indices``."""
        tally = Counter(self.slot(i).source for i in indices)
        return {name: tally[name] / max(1, tally.total()) for name in self.options}

    def repeats(self, drawn: int) -> dict[str, float]:
        """How often each question source was gone through after ``drawn`` conversations."""
        passes = {}
        for name, pool in self.pools.items():
            options = self.options[name]
            if isinstance(pool, QuestionPool) and isinstance(options, LlavaJsonSource):
                passes[name] = drawn * self.requested[name] * options.packed / len(pool)
        return passes

    def hashes(self) -> dict[str, str]:
        """A hash for each source: of its classes or records with their pictures' names and sizes, wherever the folder stands."""

        def told(picture: Picture | None) -> str:
            if picture is None or picture.member:
                return picture.member or "" if picture else ""
            size = picture.path.stat().st_size if picture.path.exists() else 0
            return f"{picture.path.parent.name}/{picture.path.name} {size}"

        hashes = {}
        for name, pool in self.pools.items():
            if isinstance(pool, ClassPool):
                entries = [[one.name, *map(told, one.pictures)] for one in pool.classes]
            else:
                entries = [[part for e in d.exchanges for part in (e.question, e.answer, told(e.picture))] for d in pool.dialogues]
            hashes[name] = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
        return hashes

    @lru_cache(maxsize=64)  # noqa: B019 - one mixture lives as long as its run
    def _block(self, block: int) -> tuple[str, ...]:
        names = [n for n, count in self.counts.items() for _ in range(count)]
        return tuple(names[i] for i in np.random.default_rng([self.seed, block, 7]).permutation(BLOCK))

    def _shuffled(self, source: str, size: int, ordinal: int) -> int:
        epoch, place = divmod(ordinal, size)
        return int(_order(self.seed, list(self.options).index(source), epoch, size)[place])


@lru_cache(maxsize=16)
def _order(seed: int, source: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, source, epoch, 11]).permutation(size)


def _largest_remainder(shares: Mapping[str, float]) -> dict[str, int]:
    counts = {n: int(s * BLOCK) for n, s in shares.items()}
    by_remainder = sorted(shares, key=lambda n: counts[n] - shares[n] * BLOCK)
    for name in by_remainder[: BLOCK - sum(counts.values())]:
        counts[name] += 1
    return counts


def open_options(name: str, options: SourceOptions) -> Pool:
    """Open a training source. A class of a user's needs pictures for its longest episode; a shipped one for its shortest."""
    if isinstance(options, EpisodeOptions):
        shots = min(options.shots) if isinstance(options, PocketSource) else max(options.shots)
        return open_source(name, options, episodes.pictures_needed(options, shots))
    return open_source(name, options.model_copy(update={"file": packaged(options.file), "images": packaged(options.images)}))
