"""The same few episodes asked of two models that should be one: greedy text and logits, and whether there is memory to ask them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import psutil
import torch

from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.layouts import Checkpoint
from lcl_adapter.base.model import Base, load_encoder
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data import episodes
from lcl_adapter.data.conversations import WORDINGS, Turn, from_episode
from lcl_adapter.data.sources import read_pocket
from lcl_adapter.recipe.sources import EpisodeOptions

PROBES = 8
LARGE = 5 * 3 * 10**9  # bytes that ``room_for`` counts for 3 B parameters: above it a CPU takes hours
ROOM = 32  # tokens for an answer
Probes = Sequence[tuple[tuple[Turn, ...], Turn]]


@dataclass(frozen=True)
class Answers:
    """What a model says to the probes: greedy text, and the logits after each prompt, [probes, V] in fp32."""

    texts: list[str]
    logits: torch.Tensor

    def distance(self, other: Answers) -> float:
        """Largest difference of a logit; of the words that both have, where one layout has a row more."""
        words = min(self.logits.shape[1], other.logits.shape[1])
        return float((self.logits[:, :words] - other.logits[:, :words]).abs().max())

    def greedy_equal(self, other: Answers) -> int:
        return sum(a == b for a, b in zip(self.texts, other.texts, strict=True))


def probe_turns(wording: Literal["short", "lcl"]) -> list[tuple[tuple[Turn, ...], Turn]]:
    """Support sets and queries of shipped held-out drawings: real pictures that every installation has."""
    pool = read_pocket("held_out", "probe", 3)
    drawn = (episodes.draw(pool, EpisodeOptions(shots=[1, 2]), 0, 0, i) for i in range(PROBES))
    spoken = [from_episode(e, WORDINGS[wording]) for e in drawn]
    return [(c.shared, c.branches[0][0]) for c in spoken]


def fitting(probes: Probes, checkpoint: Checkpoint, tiles: bool) -> list[tuple[tuple[Turn, ...], Turn]]:
    """Those that the base's context holds, with room for an answer."""
    encoder = load_encoder(replace(checkpoint.ref, tiles=tiles))
    return [(support, query) for support, query in probes if len(encoder.turns([*support, query], opened=True)[0]) + ROOM < encoder.context]


@torch.inference_mode()
def probe(base: Base, probes: Probes) -> Answers:
    """Ask the probes plainly, without a cache: a checkpoint must be right for anyone's code, not for ours alone."""
    encoder, vision = base.encoder(), VisionFeatures(base)
    logits = []
    for support, query in probes:
        ids = encoder.turns([*support, query], opened=True)[0]
        pictures = [t.picture for t in (*support, query) if t.picture is not None]
        placed: dict[str, Any] = {} if encoder.grid is None else {"position_ids": _grid(encoder.positions(ids)[0]).to(base.device)}
        outputs = base.model(
            input_ids=torch.tensor([ids], device=base.device), mm_encoder_outputs=vision.projected(pictures), logits_to_keep=1, **placed
        )
        logits.append(outputs.logits[0, -1].float().cpu())
    texts = [r.text for r in Predictor(base, vision).run([(s, q, ()) for s, q in probes])]
    return Answers(texts, torch.stack(logits))


def _grid(positions: Sequence[Any]) -> torch.Tensor:
    return torch.tensor([positions]).permute(2, 0, 1)


def room_for(checkpoint: Checkpoint) -> tuple[bool, int, int]:
    """Whether the whole model fits this machine's free memory in fp32, with a quarter of room; the bytes it takes, and those free."""
    needed = 5 * sum(math.prod(w.shape) for w in checkpoint.weights.values())
    free = int(psutil.virtual_memory().available)
    return needed < free, needed, free
