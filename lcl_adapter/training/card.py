"""Figures of a training run: counts of rows, tokens, images, faults and seconds; the manifest's facts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcl_adapter import processes
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import InspectionPool
from lcl_adapter.data.sources.base import names_of
from lcl_adapter.errors import RunError
from lcl_adapter.files import read_result
from lcl_adapter.reading import brief
from lcl_adapter.terminal import console
from lcl_adapter.training.lengths import Rows

PROGRESS = "progress.json"


@dataclass
class Tally:
    """Counts of the whole run, which continue when it is resumed.

    earlier: the counts of the run before it was resumed. sources: rows, tokens and learned tokens of each source.
    paused: seconds since the last :meth:`progress` in which nothing was trained.
    """

    earlier: dict[str, Any] = field(default_factory=lambda: {"seconds": 0.0, "shown": 0, "computed": 0})
    faults: Counter[str] = field(default_factory=Counter)
    sources: dict[str, list[int]] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    paused: float = 0.0

    def __post_init__(self) -> None:
        self._logged_at: float | None = None
        self._logged_tokens = sum(tokens for _, tokens, _ in self.sources.values())

    @classmethod
    def resumed(cls, checkpoint: Path) -> Tally:
        """The tally saved with a checkpoint.

        Its faults and sources continue in the first process only, so that they count once.
        """
        saved = read_result(checkpoint / PROGRESS)
        try:
            earlier = {name: float(saved[name]) if name == "seconds" else int(saved[name]) for name in ("seconds", "shown", "computed")}
            faults = Counter({str(kind): int(count) for kind, count in saved["faults"].items()})
            sources = {str(name): [int(count) for count in counts] for name, counts in saved["sources"].items()}
            if any(len(counts) != 3 for counts in sources.values()):
                raise ValueError("three counts a source are expected")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RunError(f"{checkpoint / PROGRESS}: not what a training wrote ({brief(error)}). Remove the checkpoint.") from error
        return cls(earlier, faults, sources) if processes.is_first() else cls(earlier)

    def add_rows(self, rows: Sequence[tuple[str, int, int]]) -> None:
        """Count rows: (source, tokens, learned tokens) of each."""
        self._logged_at = self._logged_at or time.monotonic()  # the clock of `progress` starts with the first batch
        for source, tokens, learned in rows:
            counts = self.sources.setdefault(source, [0, 0, 0])
            for column, value in enumerate((1, tokens, learned)):
                counts[column] += value

    def progress(self) -> dict[str, float]:
        """Each source's share of the rows so far, and the tokens a second since the last call, of all processes together.

        Every process has to call it.
        """
        counted: Counter[str] = Counter()
        tokens = 0
        for sources in processes.gather(self.sources):
            counted.update({source: rows for source, (rows, _, _) in sources.items()})
            tokens += sum(count for _, count, _ in sources.values())
        now = time.monotonic()
        seconds = now - (self._logged_at or now) - self.paused
        speed = {"tokens_per_second": (tokens - self._logged_tokens) / seconds} if seconds > 0 else {}
        self._logged_at, self._logged_tokens, self.paused = now, tokens, 0.0
        return {f"shares/{source}": rows / counted.total() for source, rows in counted.items()} | speed

    def totals(self, vision: VisionFeatures) -> dict[str, Any]:
        """The counts of all processes together. Every process has to call it."""
        parts = processes.gather((vision.requested, vision.computed, self.faults, self.sources))
        faults: Counter[str] = Counter()
        sources: dict[str, list[int]] = {}
        for _, _, part_faults, part_sources in parts:
            faults.update(part_faults)
            for source, counts in part_sources.items():
                sources[source] = [a + b for a, b in zip(sources.get(source, [0, 0, 0]), counts, strict=True)]
        return {
            "seconds": round(self.earlier["seconds"] + time.monotonic() - self.began, 1),
            "shown": self.earlier["shown"] + sum(requested for requested, _, _, _ in parts),
            "computed": self.earlier["computed"] + sum(computed for _, computed, _, _ in parts),
            "faults": dict(faults),
            "sources": sources,
        }


def facts_of(mixture: Mixture, totals: Mapping[str, Any], parts: dict[str, dict[str, int]], longest: int, drawn: int) -> dict[str, Any]:
    """The facts of a training for the manifest and the run card.

    totals: of :meth:`Tally.totals`. parts: parameters of each part of the model. longest: the longest row, in tokens.
    drawn: rows that were trained on.
    """
    return {
        "parameters": parts,
        "shares": {"requested": mixture.requested, "realised": mixture.realised(range(drawn))},
        "tokens": {n: dict(zip(("rows", "tokens", "learned"), counts, strict=True)) for n, counts in totals["sources"].items()},
        "ended": mixture.ended,
        "passes": mixture.repeats(drawn),
        "data": mixture.hashes(),
        "skipped": {n: p.skipped for n, p in mixture.pools.items() if p.skipped},
        "bad_pictures": totals["faults"],
        "images": {"shown": totals["shown"], "through_the_tower": totals["computed"]},
        "training_seconds": totals["seconds"],
        "longest_row": longest,
        "held_in": {n: sorted(names) for n, p in mixture.pools.items() if (names := names_of(p))},
        **({"support_tokens": list(numbers)} if len(numbers := mixture.recipe.image_tokens.numbers) > 1 else {}),
    }


def print_start(mixture: Mixture, parts: dict[str, dict[str, int]], rows: Rows, total: int) -> None:
    """Print parameters, shares and row lengths before a training of ``total`` rows starts."""
    for part, count in parts.items():
        console.print(f"{part:>15}: {count['total']:>12,} parameters, {count['trained']:>10,} trained", highlight=False)
    realised = mixture.realised(range(total))
    passes = mixture.repeats(total)
    for name in mixture.options:
        pool, source_lengths = mixture.pools[name], rows.lengths[name]
        photos = f" ({pool.photos})" if isinstance(pool, InspectionPool) else ""
        average = f", {sum(source_lengths) / len(source_lengths):.0f} tokens a row" if source_lengths else ""
        average += f", up to {rows.most(name)}" if rows.most(name) else ""
        repeats = f", used {passes[name]:.1f} times" if name in passes else ""
        ended = f", stops at its {mixture.ended[name]} of {mixture.limits[name]:,} rows" if name in mixture.ended else ""
        share = f"share {mixture.requested[name]:.2f} requested, {realised[name]:.2f} realised"
        console.print(f"{name:>15}: {share}, {len(pool):,} entries{photos}{repeats}{ended}{average}", highlight=False)
        if pool.skipped:
            left_out = ", ".join(f"{count:,} x {reason}" for reason, count in pool.skipped.items())
            console.print(f"{'':>17}left out: {left_out}", style="yellow", highlight=False, markup=False)
        for note in pool.notes:
            console.print(f"{'':>17}note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    shortest = min(length for source_lengths in rows.lengths.values() for length in source_lengths)
    longest = max(rows.most(name) for name in rows.lengths)
    console.print(f"{'rows':>15}: {total:,} of {shortest} to {longest} tokens", highlight=False)
