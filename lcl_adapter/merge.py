"""Merge an adapter into its 16-bit base: a plain Hugging Face checkpoint, kept only if it answers as the adapter does.

The product is computed in fp32 on the base's own stored weights, whatever the adapter was trained on: merging in place
into 4-bit weights loses the adapter's effect (peft#2586). For a QLoRA adapter the merged model therefore differs a
little from the one that was trained; by how much is measured and printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import AutoConfig

from lcl_adapter import episodes
from lcl_adapter.adapter import load_adapter, read_manifest
from lcl_adapter.conversations import WORDINGS, Turn, from_episode
from lcl_adapter.errors import MergeError, RunError
from lcl_adapter.files import whole_folder
from lcl_adapter.model import Base, load_base
from lcl_adapter.predict import Predictor
from lcl_adapter.recipe import load
from lcl_adapter.recipe.sources import EpisodeOptions
from lcl_adapter.sources import read_pocket
from lcl_adapter.vision import VisionFeatures

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROBES = 8
SLACK = 32  # how many roundings of the largest logit the merged model may differ by ...
LEAST = 1e-3  # a difference that no answer depends on
SHARE = 0.1  # ... and at most this share of what the adapter changes, so that one that was lost cannot pass


@dataclass(frozen=True)
class Answers:
    """What a model says to the probes: greedy text, and the logits after each prompt, [probes, V] in fp32."""

    texts: list[str]
    logits: torch.Tensor

    def distance(self, other: Answers) -> float:
        return float((self.logits - other.logits).abs().max())


def merge(run: Path, out: Path, base_name: str | None = None, dtype: str = "base") -> dict[str, Any]:
    """Write ``out``; returns the largest logit difference on the probes, and for QLoRA what leaving 4 bits cost.

    dtype: "base" keeps the stored weights' own type.

    Raises RunError where ``out`` exists; MergeError, with nothing left behind, where the saved model answers otherwise.
    """
    if out.exists():
        raise RunError(f"{out}: exists already; merging never overwrites. Give another --out.")
    manifest = read_manifest(run)
    probes = probe_turns(load(run / "recipe.yaml").wording)
    trained = None
    if manifest["precision"] == "nf4":
        trained = probe(load_adapter(run, base_name, "nf4")[0], probes)
    adapted, _ = load_adapter(run, base_name, "fp32", "cpu")  # fp32 weights of a 7B fit no 16 GB GPU
    expected = probe(adapted, probes)
    with adapted.without_adapter():
        effect = expected.distance(probe(adapted, probes))
    stored = AutoConfig.from_pretrained(adapted.path).dtype or torch.float32
    target = stored if dtype == "base" else DTYPES[dtype]

    assert isinstance(adapted.model, PeftModel)
    merged = adapted.model.merge_and_unload(safe_merge=True).to(target)
    with whole_folder(out) as partial:
        merged.save_pretrained(partial)
        adapted.processor.save_pretrained(partial)
        del merged, adapted  # one copy of the weights in memory at a time
        found = probe(load_base(str(partial), "fp32", "cpu"), probes)
        difference = expected.distance(found)
        rounding = SLACK * torch.finfo(target).eps * float(expected.logits.abs().max())
        allowed = max(LEAST, min(rounding, SHARE * effect))
        changed = [(a, b) for a, b in zip(expected.texts, found.texts, strict=True) if a != b]
        if difference > allowed or (changed and target is torch.float32):
            said = f"; for instance {changed[0][0]!r} became {changed[0][1]!r}" if changed else ""
            raise MergeError(
                f"{out}: the merged model differs from the adapter by {difference:.3g} in a logit, {allowed:.3g} is allowed "
                f"(the adapter's own effect is {effect:.3g}){said}. Not kept; --dtype fp32 rounds less."
            )
    result = {
        "out": str(out),
        "dtype": str(target).removeprefix("torch."),
        "largest_logit_difference": difference,
        "allowed": allowed,
        "adapter_effect": effect,
        "greedy_equal": len(probes) - len(changed),
        "probes": len(probes),
    }
    if trained is not None:
        result["qlora_to_16_bit"] = {
            "largest_logit_difference": trained.distance(found),
            "greedy_equal": sum(a == b for a, b in zip(trained.texts, found.texts, strict=True)),
        }
    return result


def probe_turns(wording: Literal["short", "lcl"]) -> list[tuple[tuple[Turn, ...], Turn]]:
    """Support sets and queries of shipped held-out drawings: real pictures that every installation has."""
    pool = read_pocket("held_out", "probe", 3)
    drawn = (episodes.draw(pool, EpisodeOptions(shots=[1, 2]), 0, 0, i) for i in range(PROBES))
    spoken = [from_episode(e, WORDINGS[wording]) for e in drawn]
    return [(c.shared, c.branches[0][0]) for c in spoken]


@torch.inference_mode()
def probe(base: Base, probes: Sequence[tuple[tuple[Turn, ...], Turn]]) -> Answers:
    """Ask the probes plainly, without a cache: the merged checkpoint must be right for anyone's code, not for ours alone."""
    encoder, vision = base.encoder(), VisionFeatures(base)
    logits = []
    for support, query in probes:
        ids = encoder.turns([*support, query], opened=True)[0]
        pictures = [t.picture for t in (*support, query) if t.picture is not None]
        outputs = base.model(input_ids=torch.tensor([ids], device=base.device), pixel_values=vision.pixels(pictures), logits_to_keep=1)
        logits.append(outputs.logits[0, -1].float().cpu())
    texts = [r.text for r in Predictor(base, vision).run([(s, q, ()) for s, q in probes])]
    return Answers(texts, torch.stack(logits))
