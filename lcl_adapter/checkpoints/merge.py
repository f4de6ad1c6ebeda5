"""Merge adapters into their base, shard by shard: a plain checkpoint in either layout, kept only if it answers as the adapter does.

Rows of a weight are read, the adapter's product is added in fp32, the result is rounded once and written; not even a whole
weight is in memory for it. What is added to can be the base as it is stored (``onto="base"``), or what a QLoRA adapter was trained
on, the 4-bit weights made whole again (``onto="trained"``): merging in place into 4-bit weights loses the adapter's effect
(peft#2586).

Two checks decide whether the result is kept. Every changed layer is asked with random inputs beside PEFT's own layer; and
where the model fits into memory, whole episodes are asked of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from functools import partial as bound
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from lcl_adapter.base.adapter import checkpoint_of, read_manifest
from lcl_adapter.base.layouts import Checkpoint, Layout, Writing
from lcl_adapter.base.layouts.checkpoint import Weight
from lcl_adapter.base.layouts.keys import skeleton
from lcl_adapter.base.layouts.tensors import Stored, blocks_of, stored_in
from lcl_adapter.base.layouts.writing import Change
from lcl_adapter.base.model import Base, family_of, load_base
from lcl_adapter.base.precision import TYPES, quantised_weights
from lcl_adapter.base.ref import NOT_GIVEN, BaseRef
from lcl_adapter.checkpoints.deltas import Adapter, Expected, check_fits, refuse_together, whole_of, with_adapters
from lcl_adapter.checkpoints.probe import LARGE, Answers, Probes, fitting, probe, probe_turns, room_for
from lcl_adapter.errors import AdapterError, MergeError
from lcl_adapter.files import resumable_folder
from lcl_adapter.recipe import load

SLACK = 32  # how many roundings of the largest logit the merged model may differ by ...
LEAST = 1e-3  # a difference that no answer depends on
SHARE = 0.1  # ... and at most this share of what the adapter changes, so that one that was lost cannot pass
LAYER_SLACK = 4  # roundings of the largest answer of a layer

Onto = Literal["base", "trained"]
Verify = Literal["auto", "layers", "full"]


@dataclass(frozen=True)
class Job:
    """Adapters on one base, and what their merging is to be."""

    adapters: tuple[Adapter, ...]
    checkpoint: Checkpoint
    manifest: dict[str, Any]
    onto: Onto
    expected: dict[str, Expected] = field(default_factory=dict)  # by module, noted while a weight is there anyway

    @cached_property
    def quantised(self) -> frozenset[str]:
        """The weights that QLoRA trained on in 4 bits."""
        return quantised_weights(skeleton(self.checkpoint.config))

    def onto_rows(self, name: str, weight: Weight) -> Iterator[torch.Tensor]:
        """What the adapter is added to: the weight, or what QLoRA made of it."""
        if self.onto == "base" or name not in self.quantised:
            return weight.blocks()
        return blocks_of(trained_on(weight.read(), getattr(torch, self.manifest["compute_dtype"])))

    def changes(self) -> dict[str, Change]:
        changed: dict[str, Change] = {}
        modules = {module for one in self.adapters for module in one.layers}
        if self.onto == "trained":
            changed |= {name: bound(self.onto_rows, name) for name in self.checkpoint.weights if name in self.quantised}
        changed |= {f"{module}.weight": bound(self._added, module) for module in modules}
        for name in {name for one in self.adapters for name in one.whole}:
            changed[name] = bound(self._trained_in_full, name)
        return changed

    def _added(self, module: str, weight: Weight) -> Iterator[torch.Tensor]:
        self.expected[module] = yield from with_adapters(module, self.onto_rows(f"{module}.weight", weight), self.adapters)

    def _trained_in_full(self, name: str, weight: Weight) -> Iterator[torch.Tensor]:
        return blocks_of(whole_of(name, self.adapters, weight.read()))

    def expected_of(self, module: str) -> Expected:
        """Of a layer; asked now where its shard was written before a stop."""
        if module not in self.expected:
            for _ in self._added(module, self.checkpoint.weights[f"{module}.weight"]):
                pass
        return self.expected[module]


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
    """Write ``out``; returns how far it answers from the adapter, in layers and on probes, and for QLoRA what it cost.

    dtype: "base" keeps the stored weights' own types. to: a layout, the base's own where left out. more: further adapters
    of the same base with their weights; ``weight`` is the first one's. verify: "full" asks the probes whatever memory
    there is, "layers" never does. A merge that was stopped goes on.

    Raises RunError for the place; AdapterError for adapters that do not belong together or to the base; MergeError, with
    nothing left behind, where what was saved answers otherwise.
    """
    manifest = read_manifest(run)
    checkpoint = checkpoint_of(run, manifest, base)
    adapters = (Adapter(run, weight), *(Adapter(folder, part) for folder, part in more))
    for folder, _ in more:
        if read_manifest(folder)["base_hash"] != manifest["base_hash"]:
            raise AdapterError(f"{folder}: trained on another base than {run}; only adapters of one base can be added up.")
    for one in adapters:
        if not math.isfinite(one.weight) or one.weight == 0:
            raise AdapterError(f"{one.folder}: a weight of {one.weight:g} makes nothing of it; give a number, and not 0.")
    refuse_together(adapters)
    check_fits(adapters, {name: w.shape for name, w in checkpoint.weights.items()})
    if onto == "trained" and manifest["precision"] != "nf4":
        raise AdapterError(f"{run}: trained in {manifest['precision']}, so what it was trained on is the base itself; leave --onto trained out.")
    job = Job(adapters, checkpoint, manifest, onto)
    to = to or checkpoint.layout
    target = None if dtype == "base" else TYPES[dtype]
    writing = Writing.of(checkpoint, family_of(checkpoint), to, out, job.changes(), target, shard_size, tower_as)
    plan = {
        "merge": [[read_manifest(a.folder)["files"], a.weight] for a in adapters],
        "base": checkpoint.hash(), "to": to, "onto": onto, "dtype": dtype, "shard_size": shard_size, "tower": tower_as,
    }  # fmt: skip
    with resumable_folder(out, plan, writing.space) as partial:
        writing.write_with_bar(partial, out)
        layers = _check_layers(job, writing, partial, out)
        writing.verify(partial, frozenset(f"{module}.weight" for one in adapters for module in one.layers))
        written = writing.ref(partial)
        refused = _cannot_ask(job, verify, written)
        answers = {"probes": refused} if refused or written is None else _check_answers(job, run, written, out, writing)
    return {
        "out": str(out),
        "layout": to,
        "onto": onto,
        "dtype": _named(writing),
        "bytes": writing.size,
        "shards": len(writing.shards.files),
        **layers,
        **answers,
    }


def trained_on(weight: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """What a QLoRA adapter saw in place of a weight: nf4 with double quantisation, made whole again, in fp32."""
    from bitsandbytes import functional as bnb

    kept, state = bnb.quantize_4bit(weight.to(compute).contiguous(), quant_type="nf4", compress_statistics=True)
    return bnb.dequantize_4bit(kept, state).reshape(weight.shape).float()


def _named(writing: Writing) -> str:
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in writing.shards.planned})
    return " and ".join(kinds)


def _check_layers(job: Job, writing: Writing, partial: Path, out: Path) -> dict[str, Any]:
    """Every merged layer, read from the disk, beside PEFT's own with the adapter on it."""
    on_disk = stored_in(partial)
    key_of = {name: key for key, name in writing.names.items()}
    worst, effect, where = 0.0, 0.0, ""
    modules = sorted({module for one in job.adapters for module in one.layers})
    for module in modules:
        stored: Stored = on_disk[key_of[f"{module}.weight"]]
        wanted = job.expected_of(module)
        gap, changed = wanted.distance(stored.blocks()), wanted.effect
        allowed = max(1e-5, LAYER_SLACK * torch.finfo(stored.dtype).eps * float(wanted.answers.abs().max()))
        if gap > allowed:
            raise MergeError(
                f"{out}: layer {module} answers {gap:.3g} away from the adapter on random inputs, {allowed:.3g} is allowed (the adapter's own "
                f"effect there is {changed:.3g}). Not kept; --dtype fp32 rounds less."
            )
        effect = max(effect, changed)
        if gap >= worst:
            worst, where = gap, module
    if effect == 0.0 and not any(one.whole for one in job.adapters):
        raise MergeError(f"{out}: the adapter changes nothing: all its products are zero. Not kept.")
    return {"layers": len(modules), "largest_layer_difference": worst, "in_layer": where, "largest_layer_effect": effect}


def _cannot_ask(job: Job, verify: Verify, written: BaseRef | None) -> str:
    """Why whole episodes are not asked; "" where they are."""
    if verify == "layers":
        return "not asked (--verify layers)"
    if (len(job.adapters) > 1 and any(one.whole for one in job.adapters)) or any(one.whole and one.weight != 1 for one in job.adapters):
        return "not asked: PEFT cannot hold a part of a projector that was trained in full"
    if written is None:
        return "not asked: the vision tower that was named is not here"
    fits, needed, free = room_for(job.checkpoint)
    large = needed > LARGE
    if large and verify != "full":
        return f"not asked: that takes hours on a CPU for {needed / 5e9:.0f} B parameters; --verify full asks them all the same"
    if fits or verify == "full":
        return ""
    return f"not asked: {needed / 1e9:.0f} GB are needed for it, {free / 1e9:.0f} GB are free; --verify full asks them all the same"


def _adapted(job: Job, precision: Literal["fp32", "nf4"]) -> Base:
    """The base with all adapters beside it, as PEFT holds them."""
    device = "cpu" if precision == "fp32" else None
    base = load_base(replace(job.checkpoint.ref, precision=precision, device=device, tiles=job.manifest["tiles"]))
    if job.onto == "trained" and precision == "fp32":
        with torch.no_grad():
            for name, parameter in base.llava.named_parameters():
                if name in job.quantised:
                    parameter.copy_(trained_on(parameter, getattr(torch, job.manifest["compute_dtype"])))
    names = [f"adapter{n}" for n in range(len(job.adapters))]
    model = PeftModel.from_pretrained(base.llava, str(job.adapters[0].folder), adapter_name=names[0])
    for name, one in zip(names[1:], job.adapters[1:], strict=True):
        model.load_adapter(str(one.folder), name)
    model.base_model.set_adapter(names if len(names) > 1 else names[0])
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, one in zip(names, job.adapters, strict=True):
                if name in module.scaling:
                    module.scaling[name] *= one.weight
    return base.with_model(model.eval())


def _check_answers(job: Job, run: Path, written: BaseRef, out: Path, writing: Writing) -> dict[str, Any]:
    """Whole episodes, asked of the adapter on its base and of what was written."""
    wording = load(run / "recipe.yaml").wording if (run / "recipe.yaml").exists() else "lcl"
    probes = fitting(probe_turns(wording), job.checkpoint, job.manifest["tiles"])
    if not probes:
        return {"probes": "not asked: none of them fits the context with tiles"}
    adapted = _adapted(job, "fp32")
    expected = probe(adapted, probes)
    with adapted.without_adapter():
        effect = expected.distance(probe(adapted, probes))
    del adapted  # one copy of the weights in memory at a time
    merged = load_base(replace(written, precision="fp32", device="cpu", tiles=job.manifest["tiles"]))
    found = probe(merged, probes)
    del merged
    difference = expected.distance(found)
    eps = max(torch.finfo(p.dtype).eps for p in writing.shards.planned)
    rounding = SLACK * eps * float(expected.logits.abs().max())
    allowed = max(LEAST, min(rounding, SHARE * effect))
    changed = [(a, b) for a, b in zip(expected.texts, found.texts, strict=True) if a != b]
    if difference > allowed or (changed and eps <= torch.finfo(torch.float32).eps):
        said = f"; for instance {changed[0][0]!r} became {changed[0][1]!r}" if changed else ""
        weak = difference <= rounding and difference > SHARE * effect
        why = " That is rounding: the adapter changes too little for this type, train it longer." if weak else ""
        raise MergeError(
            f"{out}: the merged model differs from the adapter by {difference:.3g} in a logit, {allowed:.3g} is allowed "
            f"(the adapter's own effect is {effect:.3g}){said}.{why} Not kept; --dtype fp32 rounds less."
        )
    return {
        "largest_logit_difference": difference,
        "allowed": allowed,
        "adapter_effect": effect,
        "greedy_equal": expected.greedy_equal(found),
        "probes": len(probes),
        **({"from_4_bit": _cost(job, found, probes)} if job.manifest["precision"] == "nf4" else {}),
    }


def _cost(job: Job, found: Answers, probes: Probes) -> dict[str, Any]:
    """How far what was written answers from the 4-bit model that was trained."""
    trained = probe(_adapted(job, "nf4"), probes)
    return {"largest_logit_difference": trained.distance(found), "greedy_equal": trained.greedy_equal(found)}
