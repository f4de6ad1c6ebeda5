"""A checkpoint in the other layout: shard by shard, verified tensor by tensor, and on probes where memory allows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lcl_adapter.base.layouts import Layout, Writing, open_checkpoint
from lcl_adapter.base.model import family_of, load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.checkpoints.probe import LARGE, Answers, fitting, probe, probe_turns, room_for
from lcl_adapter.errors import MergeError
from lcl_adapter.files import resumable_folder

ROUNDING = 1e-4  # of a logit in fp32, between two layouts of the same weights


def convert(
    source: BaseRef | str,
    out: Path,
    to: Layout | None = None,
    shard_size: int = 5 * 10**9,
    tower_as: str | None = None,
    verify: Literal["auto", "tensors"] = "auto",
) -> dict[str, Any]:
    """Write ``source`` into ``out`` in the other layout, or the one named; a conversion that was stopped goes on.

    tower_as: what ``mm_vision_tower`` says in an original config made here; left
    out, the tower lies beside the weights. verify: "tensors" compares those alone; "auto" also asks both layouts a few episodes
    where the whole model fits into memory, which is more than the conversion itself needs.

    Raises ModelError for a source that is wrong; RunError for the place; MergeError, with nothing left, where what was
    written differs.
    """
    checkpoint = open_checkpoint(source)
    to = to or ("original" if checkpoint.layout == "hf" else "hf")
    writing = Writing.of(checkpoint, family_of(checkpoint), to, out, shard_size=shard_size, tower=tower_as)
    plan = {"convert": checkpoint.hash(), "to": to, "shard_size": shard_size, "tower": tower_as}
    with resumable_folder(out, plan, writing.space) as partial:
        writing.write_with_bar(partial, out)
        compared = writing.verify(partial)
        asked = verify == "auto"
        found = _same_answers(writing, partial, out) if asked else {"probes": "not asked (--verify tensors)"}
    return {
        "out": str(out),
        "from": checkpoint.layout,
        "to": to,
        "bytes": writing.size,
        "shards": len(writing.shards.files),
        "tensors_equal": compared,
        **found,
    }


def _same_answers(writing: Writing, partial: Path, out: Path) -> dict[str, Any]:
    checkpoint = writing.source
    fits, needed, free = room_for(checkpoint)
    if not fits or needed > LARGE:
        told = f"not asked: {needed / 1e9:.0f} GB and some time would be needed, {free / 1e9:.0f} GB are free; every tensor was compared"
        return {"probes": told}
    probes = fitting(probe_turns("lcl"), checkpoint, tiles=False)[:2]
    written = writing.ref(partial)
    if written is None:
        return {"probes": f"not asked: {writing.tower} is not here; upstream will fetch it"}
    before, after = (probe(load_base(replace(ref, precision="fp32", device="cpu")), probes) for ref in (checkpoint.ref, written))
    return {"probes": len(probes), **agreed(before, after, out)}


def agreed(before: Answers, after: Answers, out: Path) -> dict[str, Any]:
    """How far two answers of the same weights are apart. Raises MergeError beyond rounding."""
    gap, equal = before.distance(after), before.greedy_equal(after)
    allowed = ROUNDING * max(1.0, float(before.logits.abs().max()) / 10)
    if gap > allowed:
        pair = next(((a, b) for a, b in zip(before.texts, after.texts, strict=True) if a != b), None)
        said = f"; for instance {pair[0]!r} became {pair[1]!r}" if pair else ""
        raise MergeError(f"{out}: differs from its source by {gap:.3g} in a logit, {allowed:.3g} is allowed{said}. Not kept.")
    return {"largest_logit_difference": gap, "greedy_equal": equal}
