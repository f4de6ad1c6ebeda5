"""Compare two models that should be equal, by their logits and greedy texts for the same few episodes.

It also says whether there is enough memory to run them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.layouts import Checkpoint
from lcl_adapter.base.model import Base, load_encoder
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data import episodes
from lcl_adapter.data.conversations import WORDINGS, Turn, from_episode
from lcl_adapter.data.sources import read_pocket
from lcl_adapter.devices import free_memory
from lcl_adapter.recipe.schema import WordingName
from lcl_adapter.recipe.sources import EpisodeOptions

PROBE_COUNT = 8
BYTES_PER_PARAMETER = 5  # fp32, and a quarter more for activations
LARGE_MODEL = BYTES_PER_PARAMETER * 3 * 10**9  # bytes for 3 B parameters; a CPU needs hours for a larger model
ANSWER_TOKENS = 32
Probes = Sequence[tuple[tuple[Turn, ...], Turn]]


@dataclass(frozen=True)
class Answers:
    """A model's answers to the probes: greedy texts, and the logits after each prompt, [probes, V] in fp32."""

    texts: list[str]
    logits: torch.Tensor

    def distance(self, other: Answers) -> float:
        """Largest difference of a logit. One layout may have more vocabulary rows; only the shared rows are compared."""
        vocabulary = min(self.logits.shape[1], other.logits.shape[1])
        return float((self.logits[:, :vocabulary] - other.logits[:, :vocabulary]).abs().max())

    def greedy_equal(self, other: Answers) -> int:
        """The number of probes with equal greedy texts."""
        return sum(a == b for a, b in zip(self.texts, other.texts, strict=True))


def probe_turns(wording: WordingName) -> list[tuple[tuple[Turn, ...], Turn]]:
    """Support sets and queries from the shipped held-out drawings: real pictures that every installation has."""
    pool = read_pocket("held_out", "probe", 3)
    drawn = (episodes.draw(pool, EpisodeOptions(shots=[1, 2]), 0, 0, i) for i in range(PROBE_COUNT))
    conversations = [from_episode(episode, WORDINGS[wording]) for episode in drawn]
    return [(conversation.shared, conversation.branches[0][0]) for conversation in conversations]


def probes_within_context(probes: Probes, checkpoint: Checkpoint, tiles: bool) -> list[tuple[tuple[Turn, ...], Turn]]:
    """The probes that fit the base's context together with an answer of ANSWER_TOKENS."""
    encoder = load_encoder(replace(checkpoint.ref, tiles=tiles))
    lengths = [len(encoder.turns([*support, query], opened=True)[0]) for support, query in probes]
    return [probe for probe, length in zip(probes, lengths, strict=True) if length + ANSWER_TOKENS < encoder.context]


@torch.inference_mode()
def probe(base: Base, probes: Probes) -> Answers:
    """Run the probes.

    The logits come from plain forward passes without a cache, because the checkpoint must be right for any code.
    """
    encoder, vision = base.encoder(), VisionFeatures(base)
    logits = []
    for support, query in probes:
        ids = encoder.turns([*support, query], opened=True)[0]
        pictures = encoder.pictures([*support, query])
        positions: dict[str, Any] = {}
        if encoder.grid is not None:
            positions["position_ids"] = torch.tensor([encoder.positions(ids)[0]]).permute(2, 0, 1).to(base.device)
        outputs = base.model(
            input_ids=torch.tensor([ids], device=base.device), mm_encoder_outputs=vision.projected_features(pictures), logits_to_keep=1, **positions
        )
        logits.append(outputs.logits[0, -1].float().cpu())
    texts = [reply.text for reply in Predictor(base, vision).run([(support, query, ()) for support, query in probes])]
    return Answers(texts, torch.stack(logits))


def memory_for_probes(checkpoint: Checkpoint) -> tuple[bool, int, int]:
    """Whether the whole model fits into free memory in fp32; the bytes it needs; the bytes that are free."""
    needed = BYTES_PER_PARAMETER * sum(math.prod(weight.shape) for weight in checkpoint.weights.values())
    free = free_memory("cpu")
    return needed < free, needed, free
