"""A checkpoint in the other layout: shard by shard, verified tensor by tensor, and on probes where memory allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lcl_adapter.amounts import trim
from lcl_adapter.base.layouts import Checkpoint, Layout, Writing, check_folder_name, find_base, open_checkpoint
from lcl_adapter.base.layouts.tensors import stored_in
from lcl_adapter.base.layouts.writing import TOWER, Change
from lcl_adapter.base.model import family_of, load_base
from lcl_adapter.checkpoints.probe import LARGE, Answers, fitting, probe, probe_turns, room_for
from lcl_adapter.errors import MergeError, ModelError
from lcl_adapter.files import resumable_folder
from lcl_adapter.terminal import console

BOTH = ("llava-v1", "llava-1.5", "llava-next-vicuna", "llava-next-mistral")  # families that have both layouts
SPARE = 64 * 2**20  # configs, tokenizer, and what a file system needs
ROUNDING = 1e-4  # of a logit in fp32, between two layouts of the same weights


def convert(
    source: str,
    out: Path,
    to: Layout | None = None,
    tower: str | None = None,
    shard_size: int = 5 * 10**9,
    tower_as: str | None = None,
    verify: Literal["auto", "tensors"] = "auto",
) -> dict[str, Any]:
    """Write ``source`` into ``out`` in the other layout, or the one named; a conversion that was stopped goes on.

    tower: where the source's vision tower is. tower_as: what ``mm_vision_tower`` says in an original config made here; left
    out, the tower lies beside the weights. verify: "tensors" compares those alone; "auto" also asks both layouts a few episodes
    where the whole model fits into memory, which is more than the conversion itself needs.

    Raises ModelError for a source that is wrong; RunError for the place; MergeError, with nothing left, where what was
    written differs.
    """
    checkpoint = open_checkpoint(source, tower)
    to = to or ("original" if checkpoint.layout == "hf" else "hf")
    writing = writing_of(checkpoint, to, {}, None, shard_size, tower_as, out)
    plan = {"convert": checkpoint.hash(), "to": to, "shard_size": shard_size, "tower": tower_as}
    with resumable_folder(out, plan, writing.size + SPARE) as partial:
        write(writing, partial, out)
        compared = same_tensors(writing, partial)
        asked = verify == "auto"
        found = _same_answers(checkpoint, partial, to, out, tower_as) if asked else {"probes": "not asked (--verify tensors)"}
    return {
        "out": str(out),
        "from": checkpoint.layout,
        "to": to,
        "bytes": writing.size,
        "shards": len(writing.shards.files),
        "tensors_equal": compared,
        **found,
    }


def writing_of(
    checkpoint: Checkpoint, to: Layout, changes: dict[str, Change], dtype: torch.dtype | None, shard_size: int, tower_as: str | None, out: Path
) -> Writing:
    """What is to be written. Raises ModelError for a family that the other layout cannot be, or a name that upstream would misread."""
    family = family_of(checkpoint)
    if to != checkpoint.layout and family.name not in BOTH:
        raise ModelError(f"base {checkpoint.folder}: a {family.name} model has no layout of haotian-liu's; it stays in Hugging Face's (--to hf).")
    if to == "original":
        check_folder_name(out, adapter=False, mistral=checkpoint.config.text_config.model_type == "mistral")
    if out.absolute().is_relative_to(checkpoint.folder):
        raise ModelError(f"{out}: lies inside the base, which is never written to. Give another place.")
    token = checkpoint.tokenizer.convert_ids_to_tokens(checkpoint.config.image_token_id) if checkpoint.config.model_type else ""
    template = family.chat_template(str(token)) if family.user else None
    return Writing(checkpoint, to, changes, dtype, shard_size, tower_as, family.name, template)


def write(writing: Writing, partial: Path, out: Path) -> None:
    """All of it, with a bar."""
    done = 0
    with _bar(f"writing {out.name}", writing.size) as step:
        for size in writing.write(partial, out):
            step(size)
            done = trim(done + size)


@contextmanager
def _bar(text: str, total: int) -> Iterator[Any]:
    columns = (TextColumn(text), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda size: bar.advance(task, size)


def same_tensors(writing: Writing, folder: Path, skipped: frozenset[str] = frozenset()) -> int:
    """Every tensor but the ``skipped`` weights read again and compared; MergeError names the first that differs."""
    written = [(one, folder) for one in writing.shards.planned if writing.names[one.key] not in skipped]
    if writing.tower_shards is not None:
        written += [(one, folder / TOWER) for one in writing.tower_shards.planned]
    on_disk = {place: stored_in(place) for place in {place for _, place in written}}
    for one, place in written:
        first = 0
        for block in one.make():
            expected = block.to(one.dtype).reshape(-1)
            found = on_disk[place][one.key].part(first, first + len(expected))
            first += len(expected)
            if not torch.equal(expected, found):
                gap = float((expected.double() - found.double()).abs().max())
                raise MergeError(f"{place}: {one.key} differs from what was to be written by {gap:.3g}; the disk may be failing. Not kept.")
    return len(written)


def _same_answers(checkpoint: Checkpoint, partial: Path, to: Layout, out: Path, tower_as: str | None) -> dict[str, Any]:
    fits, needed, free = room_for(checkpoint)
    if not fits or needed > LARGE:
        told = f"not asked: {needed / 1e9:.0f} GB and some time would be needed, {free / 1e9:.0f} GB are free; every tensor was compared"
        return {"probes": told}
    probes = fitting(probe_turns("lcl"), checkpoint, tiles=False)[:2]
    tower = tower_of(checkpoint, partial, to, tower_as)
    if to == "original" and tower is None:
        return {"probes": f"not asked: {tower_as} is not here; upstream will fetch it"}
    before = probe(load_base(str(checkpoint.folder), "fp32", "cpu", None if checkpoint.tower is None else str(checkpoint.tower)), probes)
    after = probe(load_base(str(partial), "fp32", "cpu", str(tower) if to == "original" else None), probes)
    return {"probes": len(probes), **agreed(before, after, out)}


def tower_of(checkpoint: Checkpoint, partial: Path, to: Layout, tower_as: str | None) -> Path | None:
    """Where the vision tower of a checkpoint that is not in its place yet is; None where it was named and is not here."""
    if (partial / TOWER).exists():
        return partial / TOWER
    if checkpoint.tower is not None or to == "hf":
        return checkpoint.tower
    try:
        return None if tower_as is None else find_base(tower_as)
    except ModelError:
        return None


def agreed(before: Answers, after: Answers, out: Path) -> dict[str, Any]:
    """How far two answers of the same weights are apart. Raises MergeError beyond rounding."""
    gap, equal = before.distance(after), before.greedy_equal(after)
    allowed = ROUNDING * max(1.0, float(before.logits.abs().max()) / 10)
    if gap > allowed:
        pair = next(((a, b) for a, b in zip(before.texts, after.texts, strict=True) if a != b), None)
        said = f"; for instance {pair[0]!r} became {pair[1]!r}" if pair else ""
        raise MergeError(f"{out}: differs from its source by {gap:.3g} in a logit, {allowed:.3g} is allowed{said}. Not kept.")
    return {"largest_logit_difference": gap, "greedy_equal": equal}
