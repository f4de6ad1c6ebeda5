"""Shares -> a deterministic schedule: which source gives the i-th row, and which of its own that is.

Indices are cut into blocks of 100. Every block holds each source as often as its share says (largest remainder), in an
order drawn from (seed, block). So any index can be computed alone: by any number of workers, or by a resumed run. Shares
change between blocks only: where the recipe's curriculum says so, and where a source has reached its cap or its end.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lcl_adapter.data import episodes
from lcl_adapter.data.episodes import Episode
from lcl_adapter.data.sources import ClassPool, Dialogue, InspectionPool, Picture, Pool, QuestionPool, open_reader
from lcl_adapter.errors import DataError, RecipeError
from lcl_adapter.recipe import Recipe, packaged
from lcl_adapter.recipe.sources import ClassReader, EpisodeOptions, InspectionOptions, QuestionOptions, Reader, SourceOptions

BLOCK = 100
RETRY = 10_000_000  # an index is tried again, after a bad image, as index + attempt * RETRY


@dataclass(frozen=True)
class Slot:
    """What the schedule says of one index: the source, and the count of that source's draws before it."""

    source: str
    ordinal: int


@dataclass(frozen=True)
class Stretch:
    """Blocks with the same counts: from block ``begins`` on, a block holds ``counts``; ``before`` is what was drawn by then."""

    begins: int
    counts: Mapping[str, int]
    before: Mapping[str, int]


class Mixture:
    """The episodes and dialogues of a recipe's training sources, by index."""

    def __init__(self, recipe: Recipe, pools: Mapping[str, Pool] | None = None) -> None:
        self.recipe = recipe
        self.seed = recipe.train.seed
        train = recipe.train
        self.total = train.max_steps * train.per_device_train_batch_size * train.gradient_accumulation_steps
        used = {n for _, shares in recipe.phases() for n, share in shares.items() if share > 0}
        self.options: dict[str, SourceOptions] = {n: s for n, s in recipe.sources.items() if n in used}
        self.pools = _opened(self.options) if pools is None else {n: pools[n] for n in self.options}
        phases = [(begins, {n: s for n, s in shares.items() if n in used}) for begins, shares in recipe.phases()]
        self.limits = {n: limit for n, s in self.options.items() if (limit := _limit(s, self.pools[n])) is not None}
        self.ended: dict[str, str] = {}
        self.stretches = self._plan(phases)
        self._starts = [s.begins for s in self.stretches]
        self.requested = _requested(phases)
        unheard = [n for n in self.options if not any(s.counts.get(n) for s in self.stretches)]
        if unheard:
            raise RecipeError([f"sources {', '.join(unheard)}: so small a share would never be drawn, a block has {BLOCK} rows; raise or remove it"])

    def _plan(self, phases: list[tuple[float, dict[str, float]]]) -> list[Stretch]:
        """Stretches of blocks with the same counts; a source that reaches its limit gives what is left of it in one block of its own."""
        blocks = -(-self.total // BLOCK)
        if len({int(part * blocks) for part, _ in phases}) < len(phases):
            short = f"`shares`: a run of {self.total:,} rows is too short for {len(phases)} sets of shares"
            raise RecipeError([f"{short}, each needs {BLOCK} rows or more"])
        begins = [int(part * blocks) for part, _ in phases]
        drawn = dict.fromkeys(self.options, 0)
        stretches: list[Stretch] = []
        block, over = 0, set[str]()
        while True:
            phase = max(i for i, b in enumerate(begins) if b <= block)
            shares = {n: s for n, s in phases[phase][1].items() if s > 0 and n not in over}
            if not shares:
                ends = [n for n, s in phases[phase][1].items() if s > 0]
                given = f"{', '.join(ends)}: all that have a share end, after {sum(self.limits[n] for n in ends):,} rows of {self.total:,}"
                raise RecipeError([f"{given} in blocks of {BLOCK}: set `at_end: repeat`, raise `cap`, or train less"])
            counts = _largest_remainder(shares)
            whole = {n: (self.limits[n] - drawn[n]) // c for n, c in counts.items() if n in self.limits and c}
            until = min([b for b in begins if b > block], default=None)
            length = min([*whole.values(), *([until - block] if until is not None else [])], default=None)
            if length == 0:  # the last rows of those that end in this block
                rest, counts = self._last_rows(shares, counts, drawn)
                over |= set(rest)
                for n in rest:
                    self.ended[n] = "cap" if self.options[n].cap == self.limits[n] else "end"
                if not counts:
                    continue
                length = 1
            stretches.append(Stretch(block, counts, dict(drawn)))
            if length is None or block + length >= blocks:
                self.ended = {n: why for n, why in self.ended.items() if drawn[n] + counts.get(n, 0) >= self.limits[n]}
                return stretches
            for n, c in counts.items():
                drawn[n] += c * length
            block += length

    def _last_rows(self, shares: Mapping[str, float], counts: Mapping[str, int], drawn: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        """What is left of the sources that end in a block, and the counts of that block; no counts where the others cannot fill it."""
        rest: dict[str, int] = {}
        while ending := {
            n: self.limits[n] - drawn[n] for n, c in counts.items() if n in self.limits and n not in rest and self.limits[n] - drawn[n] < c
        }:
            rest |= ending
            others = {n: s for n, s in shares.items() if n not in rest}
            if not others:
                return rest, {}
            counts = {**rest, **_largest_remainder(others, BLOCK - sum(rest.values()))}
        return rest, dict(counts)

    def slot(self, index: int) -> Slot:
        block, place = divmod(index, BLOCK)
        stretch = self.stretches[bisect_right(self._starts, block) - 1]
        names = self._block(block)
        source = names[place]
        before = stretch.before[source] + (block - stretch.begins) * stretch.counts[source]
        return Slot(source, before + names[:place].count(source))

    def draw(self, index: int, attempt: int = 0) -> Episode | tuple[Dialogue, ...]:
        """An episode, or the dialogues that share a row; ``attempt`` > 0 is another one of the same source, for when a picture was bad."""
        slot = self.slot(index)
        options, pool = self.options[slot.source], self.pools[slot.source]
        ordinal = slot.ordinal + attempt * RETRY
        if not isinstance(pool, QuestionPool):
            assert isinstance(options, EpisodeOptions | InspectionOptions)
            return episodes.draw(pool, options, self.seed, 0, ordinal)
        assert isinstance(options, QuestionOptions)
        first, last = ordinal * options.packed, (ordinal + 1) * options.packed
        if options.at_end == "end" and not attempt:
            last = min(last, len(pool))  # what is left for the last row
        return tuple(pool.dialogues[self._shuffled(slot.source, pool, n)] for n in range(first, last))

    def realised(self, indices: Iterable[int]) -> dict[str, float]:
        """The share of each source among ``indices``."""
        tally = Counter(self.slot(i).source for i in indices)
        return {name: tally[name] / max(1, tally.total()) for name in self.options}

    def repeats(self, drawn: int) -> dict[str, float]:
        """How often each question source was gone through after ``drawn`` conversations."""
        tally = Counter(self.slot(i).source for i in range(drawn))
        passes = {}
        for name, pool in self.pools.items():
            options = self.options[name]
            if isinstance(pool, QuestionPool) and isinstance(options, QuestionOptions):
                passes[name] = tally[name] * options.packed / len(pool)
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
            entries: list[list[object]]
            if isinstance(pool, ClassPool):
                entries = [[c.name, c.groups, c.ranked, c.hard, c.boxes, *map(told, c.pictures)] for c in pool.classes]
            elif isinstance(pool, InspectionPool):
                specimens = [(part, s) for part in pool.categories for s in (*part.good, *(s for found in part.defects.values() for s in found))]
                entries = [[part.name, *map(told, part.references)] for part in pool.categories]
                entries += [[part.name, s.defect, told(s.picture), told(s.mask)] for part, s in specimens]
            else:
                entries = [[pool.fingerprint, len(pool)]]
            templates = getattr(self.options[name], "templates", None)
            entries += [[packaged(templates).read_text(encoding="utf-8")]] if templates else []
            hashes[name] = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
        return hashes

    @lru_cache(maxsize=64)  # noqa: B019 - one mixture lives as long as its run
    def _block(self, block: int) -> tuple[str, ...]:
        counts = self.stretches[bisect_right(self._starts, block) - 1].counts
        names = [n for n in self.options for _ in range(counts.get(n, 0))]
        return tuple(names[i] for i in np.random.default_rng([self.seed, block, 7]).permutation(BLOCK))

    def _shuffled(self, source: str, pool: QuestionPool, ordinal: int) -> int:
        epoch, place = divmod(ordinal, len(pool))
        return int(_order(self.seed, list(self.options).index(source), epoch, len(pool), pool.shard_sizes, pool.shards_at_once)[place])


@lru_cache(maxsize=16)
def _order(seed: int, source: int, epoch: int, size: int, chunks: tuple[int, ...] = (), mixed: int = 1) -> np.ndarray:
    """Of all; of those in shards, ``mixed`` shards at a time: the shards in an order of their own, what is in those at hand mixed."""
    rng = np.random.default_rng([seed, source, epoch, 11])
    if not chunks:
        return rng.permutation(size)
    ends = np.cumsum(chunks)
    shards = rng.permutation(len(chunks))
    groups = (shards[start : start + mixed] for start in range(0, len(chunks), mixed))
    return np.concatenate([rng.permutation(np.concatenate([np.arange(ends[s] - chunks[s], ends[s]) for s in group])) for group in groups])


def _limit(options: SourceOptions, pool: Pool) -> int | None:
    """How many rows a source gives at most: its cap, or, where it may not repeat, all it has."""
    limits = [options.cap] if options.cap else []
    if isinstance(options, QuestionOptions) and options.at_end == "end":
        limits.append(-(-len(pool) // options.packed))
    return min(limits, default=None)


def _requested(phases: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Each source's part of the whole run, as the recipe asks it."""
    ends = [begins for begins, _ in phases[1:]] + [1.0]
    asked: dict[str, float] = {}
    for (begins, shares), end in zip(phases, ends, strict=True):
        for name, share in shares.items():
            asked[name] = asked.get(name, 0.0) + (end - begins) * share / sum(shares.values())
    return asked


def _largest_remainder(shares: Mapping[str, float], places: int = BLOCK) -> dict[str, int]:
    total = sum(shares.values())
    exact = {n: s / total * places for n, s in shares.items()}
    counts = {n: int(e) for n, e in exact.items()}
    by_remainder = sorted(shares, key=lambda n: counts[n] - exact[n])
    for name in by_remainder[: places - sum(counts.values())]:
        counts[name] += 1
    return counts


def _opened(sources: Mapping[str, SourceOptions]) -> dict[str, Pool]:
    """Every source's pool. Raises DataError that tells of all that cannot be read, by the source's name."""
    pools: dict[str, Pool] = {}
    faults: list[str] = []
    for name, options in sources.items():
        try:
            pools[name] = open_options(name, options)
        except DataError as error:
            faults.append(f"sources.{name}: {error}")
    if faults:
        raise DataError("\n".join(faults))
    return pools


def open_options(name: str, options: SourceOptions) -> Pool:
    """Open a training source. A class of the user's needs pictures for the longest episode; a shipped class for the shortest."""
    assert isinstance(options, Reader)
    if isinstance(options, ClassReader) and isinstance(options, EpisodeOptions):
        shots = min(options.shots) if options.shipped else max(options.shots)
        return open_reader(name, options, episodes.pictures_needed(options, shots))
    return open_reader(name, options)
