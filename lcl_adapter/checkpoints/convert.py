"""Write a checkpoint in the other layout, shard by shard.

Every tensor is read again and compared. If the model fits into memory, its answers in both layouts are compared too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lcl_adapter.base.layouts import CheckpointWriter, Layout, open_checkpoint
from lcl_adapter.base.model import family_of, load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.checkpoints.probe import LARGE_MODEL, Answers, memory_for_probes, probe, probe_turns, probes_within_context
from lcl_adapter.errors import MergeError
from lcl_adapter.files import resumable_folder

ROUNDING = 1e-4  # of a logit in fp32, between two layouts of the same weights
PROBES_TO_RUN = 2


def convert(
    source: BaseRef | str,
    out: Path,
    to: Layout | None = None,
    shard_size: int = 5 * 10**9,
    tower_as: str | None = None,
    verify: Literal["auto", "tensors"] = "auto",
) -> dict[str, Any]:
    """Write ``source`` into ``out`` in the layout ``to``, by default the other one.

    An interrupted conversion is resumed.

    tower_as: what ``mm_vision_tower`` says in a config in the original layout; by default the tower is written beside
    the weights.
    verify: "tensors" compares the tensors only. "auto" also compares the answers to a few episodes if the whole model
    fits into memory, which is more than the conversion itself needs.

    Raises ModelError if the source is not a valid base. Raises RunError if ``out`` cannot be written. Raises
    MergeError, and leaves nothing behind, if the result differs from the source.
    """
    checkpoint = open_checkpoint(source)
    to = to or ("original" if checkpoint.layout == "hf" else "hf")
    writer = CheckpointWriter.prepare(checkpoint, family_of(checkpoint), to, out, shard_size=shard_size, tower=tower_as)
    plan = {"convert": checkpoint.hash(), "to": to, "shard_size": shard_size, "tower": tower_as}
    with resumable_folder(out, plan, writer.space) as partial:
        writer.write_with_bar(partial, out)
        tensors_equal = writer.verify(partial)
        probe_report = _check_answers(writer, partial, out) if verify == "auto" else {"probes": "not run (--verify tensors)"}
    return {
        "out": str(out),
        "from": checkpoint.layout,
        "to": to,
        "bytes": writer.size,
        "shards": len(writer.shards.files),
        "tensors_equal": tensors_equal,
        **probe_report,
    }


def _check_answers(writer: CheckpointWriter, partial: Path, out: Path) -> dict[str, Any]:
    """Compare the answers of both layouts to a few probes. Returns the report's fields; raises MergeError."""
    checkpoint = writer.source
    fits, needed, free = memory_for_probes(checkpoint)
    if not fits or needed > LARGE_MODEL:
        reason = f"not run: they need {needed / 1e9:.0f} GB and some time, {free / 1e9:.0f} GB are free; every tensor was compared"
        return {"probes": reason}
    probes = probes_within_context(probe_turns("lcl"), checkpoint, tiles=False)[:PROBES_TO_RUN]
    written = writer.ref(partial)
    if written is None:
        return {"probes": f"not run: {writer.tower} is not on this machine; upstream will download it"}
    before, after = (probe(load_base(replace(ref, precision="fp32", device="cpu")), probes) for ref in (checkpoint.ref, written))
    return {"probes": len(probes), **_compare(before, after, out)}


def _compare(before: Answers, after: Answers, out: Path) -> dict[str, Any]:
    """How far the answers from the same weights are apart. Raises MergeError if it is more than rounding."""
    difference, equal = before.distance(after), before.greedy_equal(after)
    allowed = ROUNDING * max(1.0, float(before.logits.abs().max()) / 10)
    if difference > allowed:
        pair = next(((a, b) for a, b in zip(before.texts, after.texts, strict=True) if a != b), None)
        example = f"; for instance {pair[0]!r} became {pair[1]!r}" if pair else ""
        raise MergeError(f"{out}: differs from its source by {difference:.3g} in a logit, {allowed:.3g} is allowed{example}. Nothing was saved.")
    return {"largest_logit_difference": difference, "greedy_equal": equal}
