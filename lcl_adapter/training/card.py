"""The run's card: what a training counted (rows, tokens, images, faults, seconds), what its start prints, what its manifest states."""

from __future__ import annotations

import json
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
from lcl_adapter.terminal import console

PROGRESS = "progress.json"


@dataclass
class Tally:
    """What the run card tells of the whole run, carried over stops: seconds, images, faults, and each source's rows and tokens."""

    earlier: dict[str, Any] = field(default_factory=lambda: {"seconds": 0.0, "shown": 0, "computed": 0})
    faults: Counter[str] = field(default_factory=Counter)
    sources: dict[str, list[int]] = field(default_factory=dict)  # rows, tokens, learned tokens
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, checkpoint: Path) -> Tally:
        kept = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        earlier = {k: kept[k] for k in ("seconds", "shown", "computed")}
        return cls(earlier, Counter(kept["faults"]), kept["sources"]) if processes.is_first() else cls(earlier)

    def count(self, told: Sequence[tuple[str, int, int]]) -> None:
        for source, tokens, learned in told:
            counts = self.sources.setdefault(source, [0, 0, 0])
            for place, value in enumerate((1, tokens, learned)):
                counts[place] += value

    def so_far(self, vision: VisionFeatures) -> dict[str, Any]:
        """Of all processes together, each of which has to ask. ``earlier`` and what came with it are counted once, by the first."""
        parts = processes.gather((vision.asked, vision.computed, self.faults, self.sources))
        faults: Counter[str] = Counter()
        sources: dict[str, list[int]] = {}
        for _, _, own, counted in parts:
            faults.update(own)
            for source, counts in counted.items():
                sources[source] = [a + b for a, b in zip(sources.get(source, [0, 0, 0]), counts, strict=True)]
        return {
            "seconds": round(self.earlier["seconds"] + time.monotonic() - self.began, 1),
            "shown": self.earlier["shown"] + sum(asked for asked, _, _, _ in parts),
            "computed": self.earlier["computed"] + sum(computed for _, computed, _, _ in parts),
            "faults": dict(faults),
            "sources": sources,
        }


def facts_of(mixture: Mixture, done: Mapping[str, Any], parts: dict[str, dict[str, int]], longest: int) -> dict[str, Any]:
    """What the manifest and the run card tell of a training."""
    drawn = mixture.total
    return {
        "parameters": parts,
        "shares": {"requested": mixture.requested, "realised": mixture.realised(range(drawn))},
        "tokens": {n: dict(zip(("rows", "tokens", "learned"), counts, strict=True)) for n, counts in done["sources"].items()},
        "ended": mixture.ended,
        "passes": mixture.repeats(drawn),
        "data": mixture.hashes(),
        "skipped": {n: p.skipped for n, p in mixture.pools.items() if p.skipped},
        "bad_pictures": done["faults"],
        "images": {"shown": done["shown"], "through_the_tower": done["computed"]},
        "training_seconds": done["seconds"],
        "longest_row": longest,
        "held_in": {n: sorted(names) for n, p in mixture.pools.items() if (names := names_of(p))},
    }


def show_start(mixture: Mixture, parts: dict[str, dict[str, int]], lengths: dict[str, list[int]], total: int) -> None:
    for part, count in parts.items():
        console.print(f"{part:>15}: {count['total']:>12,} parameters, {count['trained']:>10,} trained", highlight=False)
    realised = mixture.realised(range(total))
    passes = mixture.repeats(total)
    for name in mixture.options:
        pool, found = mixture.pools[name], lengths[name]
        photos = f" ({pool.photos})" if isinstance(pool, InspectionPool) else ""
        average = f", {sum(found) / len(found):.0f} tokens a row, up to {max(found)}" if found else ""
        again = f", gone through {passes[name]:.1f} times" if name in passes else ""
        ended = f", stops at its {mixture.ended[name]} of {mixture.limits[name]:,} rows" if name in mixture.ended else ""
        share = f"share {mixture.requested[name]:.2f} requested, {realised[name]:.2f} realised"
        console.print(f"{name:>15}: {share}, {len(pool):,} entries{photos}{again}{ended}{average}", highlight=False)
    known = [length for found in lengths.values() for length in found]
    console.print(f"{'rows':>15}: {total:,} of {min(known)} to {max(known)} tokens", highlight=False)
