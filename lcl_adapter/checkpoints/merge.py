"""Merge adapters into their base, shard by shard. The result is a plain checkpoint in either layout.

Blocks of rows of a weight are read, the adapter's product is added in fp32, and the result is rounded once and written.
Not even one whole weight is in memory. There are two choices of what the product is added to:

    onto="base"      the base's weights as they are stored
    onto="trained"   what a QLoRA adapter was trained on: the weights after quantisation to 4 bits and back

Merging in place into the 4-bit weights themselves is not offered, because it loses the adapter's effect (peft#2586).

Two checks decide whether the result is saved. Every changed weight is read from the disk and compared, element by
element, with what the adapters' files require (``effect``). If the model fits into memory, whole episodes are compared
too, with the adapters as PEFT itself runs them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from functools import partial as bound
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from lcl_adapter.base.adapter import checkpoint_of, read_manifest
from lcl_adapter.base.layouts import Checkpoint, CheckpointWriter, Layout
from lcl_adapter.base.layouts.checkpoint import Weight
from lcl_adapter.base.layouts.keys import skeleton
from lcl_adapter.base.layouts.tensors import row_blocks
from lcl_adapter.base.layouts.writing import Change
from lcl_adapter.base.model import Base, family_of, load_base
from lcl_adapter.base.precision import TYPES, nf4_round_trip, quantised_weights
from lcl_adapter.base.ref import NOT_GIVEN, BaseRef
from lcl_adapter.base.supports import spent_elsewhere, trained_otherwise
from lcl_adapter.checkpoints.deltas import Adapter, blended_weight, check_combinable, check_fits, merged_rows
from lcl_adapter.checkpoints.effect import WeightCheck, check_weights
from lcl_adapter.checkpoints.probe import (
    BYTES_PER_PARAMETER,
    LARGE_MODEL,
    Answers,
    Probes,
    memory_for_probes,
    probe,
    probe_turns,
    probes_within_context,
)
from lcl_adapter.errors import AdapterError, MergeError
from lcl_adapter.files import resumable_folder
from lcl_adapter.recipe import load

# How far a logit of the merged model may be from the adapter's: the larger of the first two. That no weight lost the
# adapter's effect was checked before.
MODEL_ROUNDINGS = 32  # roundings of the largest logit
NEGLIGIBLE = 1e-3  # no answer depends on a difference of this size
EFFECT_SHARE = 0.1  # of the adapter's own effect; a difference above it is reported

Onto = Literal["base", "trained"]
Verify = Literal["auto", "layers", "full"]


@dataclass(frozen=True)
class MergeJob:
    """The adapters, their base, and what they are added to."""

    adapters: tuple[Adapter, ...]
    checkpoint: Checkpoint
    manifest: dict[str, Any]
    onto: Onto

    @cached_property
    def quantised(self) -> frozenset[str]:
        """Names of the weights that a QLoRA adapter was trained on in 4 bits."""
        return quantised_weights(skeleton(self.checkpoint.config))

    @property
    def modules(self) -> list[str]:
        """Names of the modules that at least one adapter changes by LoRA."""
        return sorted({module for adapter in self.adapters for module in adapter.layers})

    @property
    def has_full_weights(self) -> bool:
        return any(adapter.full_weights for adapter in self.adapters)

    @property
    def compute_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.manifest["compute_dtype"])
        return dtype

    def base_rows(self, name: str, weight: Weight) -> Iterator[torch.Tensor]:
        """Blocks of rows that the adapters are added to, see ``onto``."""
        if self.onto == "base" or name not in self.quantised:
            return weight.blocks()
        return row_blocks(nf4_round_trip(weight.read(), self.compute_dtype))

    def changes(self) -> dict[str, Change]:
        """Weight name -> the function that gives the rows to be written."""
        changes: dict[str, Change] = {}
        if self.onto == "trained":
            changes |= {name: bound(self.base_rows, name) for name in self.checkpoint.weights if name in self.quantised}
        changes |= {f"{module}.weight": bound(self._merged_rows, module) for module in self.modules}
        for adapter in self.adapters:
            changes |= {name: bound(self._blended_rows, name) for name in adapter.full_weights}
        return changes

    def _merged_rows(self, module: str, weight: Weight) -> Iterator[torch.Tensor]:
        return merged_rows(module, self.base_rows(f"{module}.weight", weight), self.adapters)

    def _blended_rows(self, name: str, weight: Weight) -> Iterator[torch.Tensor]:
        return row_blocks(blended_weight(name, self.adapters, weight.read()))


def merge(
    run: Path,
    out: Path,
    base: BaseRef = NOT_GIVEN,
    dtype: str = "base",
    to: Layout | None = None,
    onto: Onto = "base",
    shard_size: int = 5 * 10**9,
    more: Sequence[tuple[Path, float]] = (),
    weight: float = 1.0,
    tower_as: str | None = None,
    verify: Verify = "auto",
) -> dict[str, Any]:
    """Merge into ``out``. An interrupted merge is resumed.

    Returns a report: how far the changed weights and the probes' answers are from the adapter's, the smallest share of
    its effect that a weight recovered, and for a QLoRA adapter how far the answers are from those of the 4-bit model
    that was trained.

    dtype: type of the written weights; "base" leaves every weight in its stored type.
    to: layout to write; by default the base's own.
    more: further adapters of the same base, each with its weight. ``weight`` is the weight of the adapter in ``run``.
    tower_as: what ``mm_vision_tower`` says in a config in the original layout; by default the tower is written beside
    the weights.
    verify: "full" runs the probes however little memory is free, "layers" never runs them.

    Raises RunError if ``out`` cannot be written. Raises AdapterError if the adapters do not fit each other or the base.
    Raises MergeError, and leaves nothing behind, if the result differs from the adapter.
    """
    manifest = read_manifest(run)
    checkpoint = checkpoint_of(run, manifest, base)
    adapters = (Adapter(run, weight), *(Adapter(folder, part) for folder, part in more))
    _check_adapters(adapters, manifest, checkpoint, onto)
    job = MergeJob(adapters, checkpoint, manifest, onto)
    to = to or checkpoint.layout
    target = None if dtype == "base" else TYPES[dtype]
    writer = CheckpointWriter.prepare(checkpoint, family_of(checkpoint), to, out, job.changes(), target, shard_size, tower_as)
    plan = {
        "merge": [[read_manifest(a.folder)["files"], a.weight] for a in adapters],
        "base": checkpoint.hash(), "to": to, "onto": onto, "dtype": dtype, "shard_size": shard_size, "tower": tower_as,
    }  # fmt: skip
    with resumable_folder(out, plan, writer.space) as partial:
        writer.write_with_bar(partial, out)
        weight_report = _check_weights(job, writer, partial, out)
        writer.verify(partial, frozenset(f"{module}.weight" for module in job.modules))
        written = writer.ref(partial)
        reason = _reason_to_skip_probes(job, verify, written)
        probe_report = {"probes": reason} if reason or written is None else _check_answers(job, run, written, out, writer)
    notes = spent_elsewhere(manifest)
    for folder, _ in more:
        other = read_manifest(folder)
        notes += [*(f"{folder}: {note}" for note in spent_elsewhere(other)), *trained_otherwise(manifest, other, str(folder))]
    return {
        "out": str(out),
        "layout": to,
        "onto": onto,
        "dtype": _dtype_names(writer),
        "bytes": writer.size,
        "shards": len(writer.shards.files),
        **weight_report,
        **probe_report,
        **({"notes": notes} if notes else {}),
    }


def _check_adapters(adapters: Sequence[Adapter], manifest: dict[str, Any], checkpoint: Checkpoint, onto: Onto) -> None:
    """Raises AdapterError if the adapters do not fit each other, the base or ``onto``.

    ``manifest`` is the first adapter's.
    """
    run = adapters[0].folder
    for adapter in adapters[1:]:
        if read_manifest(adapter.folder)["base_hash"] != manifest["base_hash"]:
            raise AdapterError(f"{adapter.folder}: trained on another base than {run}; only adapters of one base can be added up.")
    for adapter in adapters:
        if not math.isfinite(adapter.weight) or adapter.weight == 0:
            raise AdapterError(f"{adapter.folder}: a weight of {adapter.weight:g} has no meaning; give a finite number other than 0.")
    check_combinable(adapters)
    check_fits(adapters, {name: stored.shape for name, stored in checkpoint.weights.items()})
    if onto == "trained" and manifest["precision"] != "nf4":
        raise AdapterError(f"{run}: trained in {manifest['precision']}, so what it was trained on is the base itself; leave --onto trained out.")


def _dtype_names(writer: CheckpointWriter) -> str:
    names = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in writer.shards.planned})
    return " and ".join(names)


def _check_weights(job: MergeJob, writer: CheckpointWriter, partial: Path, out: Path) -> dict[str, Any]:
    """Compare every changed weight, read from the disk, with what the adapters require.

    Returns the report's fields; raises MergeError.
    """
    written = writer.written(partial)
    checks = list(check_weights(job.adapters, job.checkpoint.weights, job.base_rows, written, writer.joins_projector))
    wrong = [check for check in checks if not check.passes]
    if wrong:
        raise MergeError(f"{out}: {_fault(wrong, len(checks))} Nothing was saved.")
    changed = [check for check in checks if check.effect > 0]
    if not changed:
        raise MergeError(f"{out}: the adapter changes nothing: all its products are zero. Nothing was saved.")
    worst, least = max(checks, key=lambda check: check.error), min(changed, key=lambda check: check.recovered_share)
    return {
        "weights_checked": len(checks),
        "largest_error_ulp": worst.error,
        "largest_error_in": worst.name,
        "smallest_recovered_share": least.recovered_share,
        "smallest_recovered_share_in": least.name,
        "rounded_away": sum(check.rounded_away for check in changed),
        "largest_effect": max(check.effect for check in changed),
    }


def _fault(wrong: Sequence[WeightCheck], count: int) -> str:
    """What is wrong with the written weights, and what to do."""
    worst = max(wrong, key=lambda check: check.excess)
    kind = str(worst.dtype).removeprefix("torch.")
    if worst.out_of_range:
        return f"{worst.name} has values that are not finite as {kind}, {len(wrong)} of {count} changed weights have; --dtype bf16 has the range."
    return (
        f"{worst.name} is not the base plus the adapter's effect. An element is {worst.error:.3g} units in the last place of {kind} away, rounding "
        f"explains 0.5, and {worst.recovered_share:.0%} of the effect arrived; {len(wrong)} of {count} changed weights are wrong. The disk may be "
        "failing, or this is a fault of lcl-adapter; please report it."
    )


def _reason_to_skip_probes(job: MergeJob, verify: Verify, written: BaseRef | None) -> str:
    """Why the probes are not run; "" if they are.

    ``written`` is None if the written base's vision tower is not on this machine.
    """
    if verify == "layers":
        return "not run (--verify layers)"
    partly_trained = any(adapter.full_weights and adapter.weight != 1 for adapter in job.adapters)
    if partly_trained or (len(job.adapters) > 1 and job.has_full_weights):
        return "not run: PEFT cannot combine or scale weights that were trained in full"
    if written is None:
        return "not run: the named vision tower is not on this machine"
    fits, needed, free = memory_for_probes(job.checkpoint)
    if verify == "full":
        return ""
    if needed > LARGE_MODEL:
        return f"not run: a CPU would need hours for {needed / BYTES_PER_PARAMETER / 1e9:.0f} B parameters; --verify full runs them anyway"
    if not fits:
        return f"not run: they need {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free; --verify full runs them anyway"
    return ""


def _base_with_adapters(job: MergeJob, precision: Literal["fp32", "nf4"]) -> Base:
    """The base with all adapters loaded by PEFT and not merged."""
    device = "cpu" if precision == "fp32" else None
    base = load_base(replace(job.checkpoint.ref, precision=precision, device=device, tiles=job.manifest["tiles"]))
    if job.onto == "trained" and precision == "fp32":
        with torch.no_grad():
            for name, parameter in base.llava.named_parameters():
                if name in job.quantised:
                    parameter.copy_(nf4_round_trip(parameter, job.compute_dtype))
    names = [f"adapter{n}" for n in range(len(job.adapters))]
    model = PeftModel.from_pretrained(base.llava, str(job.adapters[0].folder), adapter_name=names[0])
    for name, adapter in zip(names[1:], job.adapters[1:], strict=True):
        model.load_adapter(str(adapter.folder), name)
    model.base_model.set_adapter(names if len(names) > 1 else names[0])
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, adapter in zip(names, job.adapters, strict=True):
                if name in module.scaling:
                    module.scaling[name] *= adapter.weight
    return base.with_model(model.eval())


def _check_answers(job: MergeJob, run: Path, written: BaseRef, out: Path, writer: CheckpointWriter) -> dict[str, Any]:
    """Compare the answers of the merged model with those of the adapter on its base.

    Returns the report's fields; raises MergeError.
    """
    wording = load(run / "recipe.yaml").wording if (run / "recipe.yaml").exists() else "lcl"
    probes = probes_within_context(probe_turns(wording), job.checkpoint, job.manifest["tiles"])
    if not probes:
        return {"probes": "not run: with tiles, none of them fits the context"}
    adapted = _base_with_adapters(job, "fp32")
    expected = probe(adapted, probes)
    with adapted.without_adapter():
        effect = expected.distance(probe(adapted, probes))
    del adapted  # so that one copy of the weights is in memory at a time
    merged = load_base(replace(written, precision="fp32", device="cpu", tiles=job.manifest["tiles"]))
    answers = probe(merged, probes)
    del merged
    difference = expected.distance(answers)
    eps = max(torch.finfo(tensor.dtype).eps for tensor in writer.shards.planned)
    allowed = max(NEGLIGIBLE, MODEL_ROUNDINGS * eps * float(expected.logits.abs().max()))
    changed_texts = [(a, b) for a, b in zip(expected.texts, answers.texts, strict=True) if a != b]
    if difference > allowed or (changed_texts and eps <= torch.finfo(torch.float32).eps):
        example = f"; for instance {changed_texts[0][0]!r} became {changed_texts[0][1]!r}" if changed_texts else ""
        raise MergeError(
            f"{out}: the merged model differs from the adapter by {difference:.3g} in a logit, {allowed:.3g} is allowed "
            f"(the adapter's own effect is {effect:.3g}){example}. Nothing was saved; --dtype fp32 rounds less."
        )
    return {
        "largest_logit_difference": difference,
        "allowed": allowed,
        "adapter_effect": effect,
        "mostly_adapter": difference <= max(NEGLIGIBLE, EFFECT_SHARE * effect),
        "greedy_equal": expected.greedy_equal(answers),
        "probes": len(probes),
        **({"from_4_bit": _distance_from_4_bit(job, answers, probes)} if job.manifest["precision"] == "nf4" else {}),
    }


def _distance_from_4_bit(job: MergeJob, answers: Answers, probes: Probes) -> dict[str, Any]:
    """How far the merged model's answers are from those of the 4-bit model that was trained."""
    trained = probe(_base_with_adapters(job, "nf4"), probes)
    return {"largest_logit_difference": trained.distance(answers), "greedy_equal": trained.greedy_equal(answers)}
