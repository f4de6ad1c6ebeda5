"""Shares -> a deterministic schedule: the source of each row, and which draw of that source it is.

Indices are grouped into blocks of 100. Every block has each source as often as its share says (largest remainder), in
an order drawn from (seed, block). So any index can be computed alone, by any worker or by a resumed run. Each source
has random streams of its own, by its name. Shares change between blocks only: where the recipe's curriculum changes
them, and where a source has reached its cap or its end.

An epoch has as many rows as the sources with a share have together (:func:`rows_of_a_pass`). Shares decide which source
they come from, so one epoch can read a small source more than once.
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

from lcl_adapter import reading
from lcl_adapter.data import episodes
from lcl_adapter.data.episodes import Episode
from lcl_adapter.data.sources import ClassPool, Dialogue, InspectionPool, Picture, Pool, QuestionPool, open_reader
from lcl_adapter.data.sources.base import pictures_of
from lcl_adapter.data.sources.encodings import nfc
from lcl_adapter.errors import DataError, RecipeError
from lcl_adapter.packaged import packaged
from lcl_adapter.randomness import generator
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.sources import ClassReader, EpisodeOptions, InspectionOptions, QuestionOptions, Reader, SourceOptions
from lcl_adapter.recipe.training import TrainOptions

BLOCK = 100
NEAR = 20  # attempts to replace a sample of a shard by one of the shards that are mixed with it; another shard is fetched whole


@dataclass(frozen=True)
class Slot:
    """The schedule at one index: the source, and how many draws of that source come before."""

    source: str
    ordinal: int


@dataclass(frozen=True)
class Segment:
    """Consecutive blocks with the same number of rows from each source.

    first_block: where it begins. counts: rows of each source in a block. drawn_before: rows of each source before this
    segment.
    """

    first_block: int
    counts: Mapping[str, int]
    drawn_before: Mapping[str, int]


class Mixture:
    """The episodes and dialogues of a recipe's training sources, by index."""

    def __init__(self, recipe: Recipe, pools: Mapping[str, Pool] | None = None) -> None:
        self.recipe = recipe
        self.seed = recipe.train.seed
        used = {name for _, shares in recipe.phases() for name, share in shares.items() if share > 0}
        self.options: dict[str, SourceOptions] = {n: s for n, s in recipe.sources.items() if n in used}
        self.pools = _open_all(self.options) if pools is None else {n: pools[n] for n in self.options}
        phases = [(start, {n: s for n, s in shares.items() if n in used}) for start, shares in recipe.phases()]
        self.limits = {n: limit for n, s in self.options.items() if (limit := _limit(s, self.pools[n])) is not None}
        self.epoch = sum(rows_of_a_pass(s, self.pools[n]) for n, s in self.options.items())
        self.steps, self.total = _steps_and_rows(recipe.train, self.epoch)
        self.ended: dict[str, str] = {}  # source -> "cap" or "end": why it gives no more rows
        self.segments = self._plan(phases)
        self._first_blocks = [s.first_block for s in self.segments]
        self.requested = _requested(phases)
        unused = [n for n in self.options if not any(s.counts.get(n) for s in self.segments)]
        if unused:
            raise RecipeError([f"sources {', '.join(unused)}: so small a share would never be drawn, a block has {BLOCK} rows; raise or remove it"])

    def _plan(self, phases: list[tuple[float, dict[str, float]]]) -> list[Segment]:
        """The segments of a run.

        A source that reaches its limit gives its remaining rows in a block of its own counts.
        """
        blocks = -(-self.total // BLOCK)
        starts = [int(part * blocks) for part, _ in phases]
        if len(set(starts)) < len(phases):
            short = f"`shares`: a run of {self.total:,} rows is too short for {len(phases)} sets of shares"
            raise RecipeError([f"{short}, each needs {BLOCK} rows or more"])
        drawn = dict.fromkeys(self.options, 0)
        segments: list[Segment] = []
        block, exhausted = 0, set[str]()
        while True:
            phase = max(i for i, start in enumerate(starts) if start <= block)
            shares = {n: s for n, s in phases[phase][1].items() if s > 0 and n not in exhausted}
            if not shares:
                ends = [n for n, s in phases[phase][1].items() if s > 0]
                given = f"{', '.join(ends)}: all that have a share end, after {sum(self.limits[n] for n in ends):,} rows of {self.total:,}"
                raise RecipeError([f"{given} in blocks of {BLOCK}: set `at_end: repeat`, raise `cap`, or train less"])
            counts = _largest_remainder(shares)
            whole_blocks = [(self.limits[n] - drawn[n]) // c for n, c in counts.items() if n in self.limits and c]
            blocks_of_phase = [start - block for start in starts if start > block][:1]
            length = min([*whole_blocks, *blocks_of_phase], default=None)
            if length == 0:  # some sources end in this block
                remaining, counts = self._last_rows(shares, counts, drawn)
                exhausted |= set(remaining)
                for name in remaining:
                    self.ended[name] = "cap" if self.options[name].cap == self.limits[name] else "end"
                if not counts:
                    spare = sum(remaining.values()) - (self.total - block * BLOCK)
                    if spare >= 0:  # they suffice for the last block, which is shorter
                        self.ended = {n: reason for n, reason in self.ended.items() if not spare or n not in remaining}
                        segments.append(Segment(block, remaining, dict(drawn)))
                        return segments
                    continue
                length = 1
            segments.append(Segment(block, counts, dict(drawn)))
            if length is None or block + length >= blocks:
                self.ended = {n: reason for n, reason in self.ended.items() if drawn[n] + counts.get(n, 0) >= self.limits[n]}
                return segments
            for name, count in counts.items():
                drawn[name] += count * length
            block += length

    def _last_rows(self, shares: Mapping[str, float], counts: Mapping[str, int], drawn: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        """The remaining rows of the sources that end in a block, and the counts of that block.

        The counts are empty if no other source can fill the block.
        """

        def left(name: str) -> int:
            return self.limits[name] - drawn[name]

        remaining: dict[str, int] = {}
        while ending := {n: left(n) for n, count in counts.items() if n in self.limits and n not in remaining and left(n) < count}:
            remaining |= ending
            others = {n: s for n, s in shares.items() if n not in remaining}
            if not others:
                return remaining, {}
            counts = {**remaining, **_largest_remainder(others, BLOCK - sum(remaining.values()))}
        return remaining, dict(counts)

    def slot(self, index: int) -> Slot:
        block, place = divmod(index, BLOCK)
        segment = self._segment(block)
        names = self._block(block)
        source = names[place]
        before = segment.drawn_before[source] + (block - segment.first_block) * segment.counts[source]
        return Slot(source, before + names[:place].count(source))

    def draw(self, index: int, attempt: int = 0) -> Episode | tuple[Dialogue, ...]:
        """An episode, or the dialogues that share a row.

        ``attempt`` > 0 draws another of the same source, after a bad picture.
        """
        slot = self.slot(index)
        options, pool = self.options[slot.source], self.pools[slot.source]
        near = attempt if isinstance(pool, QuestionPool) and pool.shard_sizes and attempt <= NEAR else 0
        ordinal = slot.ordinal
        if not isinstance(pool, QuestionPool):
            assert isinstance(options, EpisodeOptions | InspectionOptions)
            return episodes.draw(pool, options, self.seed, attempt, ordinal, "training", slot.source)
        assert isinstance(options, QuestionOptions)
        first, last = ordinal * options.packed, (ordinal + 1) * options.packed
        if options.at_end == "end" and attempt == near:
            last = min(last, len(pool))  # the last row may have fewer
        return tuple(pool.dialogues[self._shuffled(slot.source, pool, n, near * options.packed, 0 if near else attempt)] for n in range(first, last))

    @property
    def pictures(self) -> int:
        """At most so many distinct pictures. A question counts as one, because its source may not be read yet."""
        return sum(len(pool) if isinstance(pool, QuestionPool) else len(set(pictures_of(pool))) for pool in self.pools.values())

    def realised(self, indices: Iterable[int]) -> dict[str, float]:
        """The share of each source among ``indices``."""
        tally = Counter(self.slot(i).source for i in indices)
        return {name: tally[name] / max(1, tally.total()) for name in self.options}

    def repeats(self, drawn: int) -> dict[str, float]:
        """How many passes over each question source the first ``drawn`` rows make."""
        tally = Counter(self.slot(i).source for i in range(drawn))
        passes = {}
        for name, pool in self.pools.items():
            options = self.options[name]
            if isinstance(pool, QuestionPool) and isinstance(options, QuestionOptions):
                passes[name] = tally[name] * options.packed / len(pool)
        return passes

    def hashes(self) -> dict[str, str]:
        """A hash of each source: its classes or records, with the names and sizes of their pictures.

        The folder's own path is left out.
        """
        hashes = {}
        for name, pool in self.pools.items():
            entries = _fingerprint(pool)
            templates = getattr(self.options[name], "templates", None)
            if templates:
                entries.append([reading.read_text(packaged(templates), reading.MAX_RECIPE)])
            hashes[name] = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
        return hashes

    def _segment(self, block: int) -> Segment:
        return self.segments[bisect_right(self._first_blocks, block) - 1]

    @lru_cache(maxsize=64)  # noqa: B019 - one mixture lives as long as its run
    def _block(self, block: int) -> tuple[str, ...]:
        """The sources of a block's rows, in order."""
        counts = self._segment(block).counts
        names = [name for name in self.options for _ in range(counts.get(name, 0))]
        return tuple(names[i] for i in generator("schedule", self.seed, block).permutation(len(names)))

    def _shuffled(self, source: str, pool: QuestionPool, ordinal: int, shift: int = 0, attempt: int = 0) -> int:
        """The dialogue of a source's ``ordinal``-th draw, or the one ``shift`` places on among the shards mixed with it.

        Each ``attempt`` has another order.
        """
        epoch, place = divmod(ordinal, len(pool))
        key = self.seed, source, epoch, len(pool), pool.shard_sizes, pool.shards_at_once, attempt
        if shift:
            ends = _group_ends(*key)
            group = bisect_right(ends, place)
            start = ends[group - 1] if group else 0
            place = start + (place - start + shift) % (ends[group] - start)
        return int(_order(*key)[place])


def _fingerprint(pool: Pool) -> list[list[object]]:
    """What a source's hash is made of."""
    if isinstance(pool, ClassPool):
        return [[c.name, c.groups, c.ranked, c.hard, c.boxes, *map(_name_and_size, c.pictures)] for c in pool.classes]
    if isinstance(pool, InspectionPool):
        entries: list[list[object]] = [[c.name, *map(_name_and_size, c.references)] for c in pool.categories]
        for category in pool.categories:
            for s in category.specimens:
                entries.append([category.name, s.defect, _name_and_size(s.picture), *map(_name_and_size, (s.mask, *s.further_masks))])
        return entries
    return [[pool.fingerprint, len(pool)]]


def _name_and_size(picture: Picture | None) -> str:
    """The name within an archive; of a plain file, the folder's and the file's name, and the size in bytes."""
    if picture is None:
        return ""
    if picture.member:
        return nfc(picture.member)
    size = picture.path.stat().st_size if picture.path.exists() else 0
    return nfc(f"{picture.path.parent.name}/{picture.path.name} {size}")


@lru_cache(maxsize=16)
def _order(seed: int, source: str, epoch: int, size: int, shard_sizes: tuple[int, ...] = (), shards_at_once: int = 1, attempt: int = 0) -> np.ndarray:
    """The order of a source's dialogues in one pass.

    With shards, the order goes through groups of ``shards_at_once`` random shards, and is random within a group.
    """
    rng = generator("question order", source, seed, attempt, epoch)
    if not shard_sizes:
        return rng.permutation(size)
    ends = np.cumsum(shard_sizes)
    shards = rng.permutation(len(shard_sizes))
    groups = []
    for start in range(0, len(shard_sizes), shards_at_once):
        members = [np.arange(ends[s] - shard_sizes[s], ends[s]) for s in shards[start : start + shards_at_once]]
        groups.append(rng.permutation(np.concatenate(members)))
    return np.concatenate(groups)


@lru_cache(maxsize=16)
def _group_ends(seed: int, source: str, epoch: int, size: int, shard_sizes: tuple[int, ...], shards_at_once: int, attempt: int = 0) -> list[int]:
    """Where each group of shards that are mixed ends in the order of a pass."""
    owners = np.searchsorted(np.cumsum(shard_sizes), _order(seed, source, epoch, size, shard_sizes, shards_at_once, attempt), side="right")
    shards, first = np.unique(owners, return_index=True)
    sizes = np.array(shard_sizes)[shards[np.argsort(first)]]
    return [int(end) for end in np.cumsum([sizes[i : i + shards_at_once].sum() for i in range(0, len(sizes), shards_at_once)])]


def rows_of_a_pass(options: SourceOptions, pool: Pool) -> int:
    """The rows in which a source's questions, or photos to ask about, would each be used once; at most its cap."""
    if isinstance(pool, QuestionPool):
        assert isinstance(options, QuestionOptions)
        entries, per_row = len(pool), options.packed
    else:
        assert isinstance(options, EpisodeOptions | InspectionOptions)
        photos = (len(c.pictures) for c in pool.classes) if isinstance(pool, ClassPool) else (len(c.specimens) for c in pool.categories)
        entries, per_row = sum(photos), options.queries
    rows = max(1, -(-entries // per_row))
    return min(rows, options.cap or rows)


def _steps_and_rows(train: TrainOptions, epoch: int) -> tuple[int, int]:
    """Steps of a training and their rows. Epochs are rounded down to whole steps, so that no source has to repeat."""
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps
    steps = train.max_steps or max(1, int((train.num_train_epochs or 1.0) * epoch / batch))
    return steps, steps * batch


def _limit(options: SourceOptions, pool: Pool) -> int | None:
    """The largest number of rows that a source gives: its cap or, if it may not repeat, all its rows.

    None for no limit.
    """
    limits = [options.cap] if options.cap else []
    if isinstance(options, QuestionOptions) and options.at_end == "end":
        limits.append(-(-len(pool) // options.packed))
    return min(limits, default=None)


def _requested(phases: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Each source's share of the whole run, as the recipe requests it."""
    ends = [start for start, _ in phases[1:]] + [1.0]
    requested: dict[str, float] = {}
    for (start, shares), end in zip(phases, ends, strict=True):
        for name, share in shares.items():
            requested[name] = requested.get(name, 0.0) + (end - start) * share / sum(shares.values())
    return requested


def _largest_remainder(shares: Mapping[str, float], places: int = BLOCK) -> dict[str, int]:
    """Whole numbers in proportion to the shares, with sum ``places``."""
    total = sum(shares.values())
    exact = {n: s / total * places for n, s in shares.items()}
    counts = {n: int(e) for n, e in exact.items()}
    by_remainder = sorted(shares, key=lambda n: counts[n] - exact[n])
    for name in by_remainder[: places - sum(counts.values())]:
        counts[name] += 1
    return counts


def _open_all(sources: Mapping[str, SourceOptions]) -> dict[str, Pool]:
    """Every source's pool. Raises one DataError for all sources that cannot be read."""
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
    """Open a training source.

    A class of the user's needs pictures for the longest episode; a shipped class for the shortest.
    """
    assert isinstance(options, Reader)
    if isinstance(options, ClassReader) and isinstance(options, EpisodeOptions):
        shots = min(options.shots) if options.shipped else max(options.shots)
        return open_reader(name, options, episodes.pictures_needed(options, shots))
    return open_reader(name, options)
