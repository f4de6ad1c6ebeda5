"""The memory that answering takes, by formulas from the language model's config.

Letters: d width of the language model, f width of its MLP, k width of keys or values. All results are bytes unless
named otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FP32_BYTES = 4


@dataclass(frozen=True)
class Widths:
    """The sizes of a language model that the memory of its activations depends on."""

    d: int
    f: int
    k: int
    layers: int
    words: int


def widths_of(text: Any) -> Widths:
    """From a language model's config."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Widths(text.hidden_size, text.intermediate_size, text.num_key_value_heads * head, text.num_hidden_layers, text.vocab_size)


@dataclass(frozen=True)
class Load:
    """What one batch reads.

    sets: support sets. support: tokens of the longest. packed: tokens of the longest row of questions behind one of them.
    scored: places whose logits are computed, in the whole batch. generated: tokens that may be generated behind one set.
    """

    sets: int
    support: int
    packed: int
    scored: int
    generated: int = 0

    def times(self, sets: int, pack: int) -> Load:
        """Of one set with one question: so many sets, with so many questions each."""
        return Load(sets, self.support, self.packed * pack, self.scored * pack * sets, self.generated * pack)


def keys_and_values(widths: Widths, size: int, tokens: int) -> int:
    """Of every layer. size: bytes of a value."""
    return 2 * widths.layers * widths.k * size * tokens


def reading(widths: Widths, size: int, load: Load) -> int:
    """The most that is needed while one pass is read, beside keys and values: activations, masks, logits."""
    tokens = load.sets * max(load.support, load.packed)
    activations = size * (4 * widths.d + 2 * widths.k + 3 * widths.f) * tokens
    # Booleans, and a copy in the activations' type. A single set needs no mask to be read.
    masked = max(load.support**2 if load.sets > 1 else 0, load.packed * (load.support + load.packed))
    logits = 4 * load.scored * widths.words * FP32_BYTES
    return activations + load.sets * masked * (1 + size) + logits


def needed(widths: Widths, size: int, load: Load) -> int:
    """The peak of one batch, without the weights."""
    return keys_and_values(widths, size, load.sets * (load.support + load.packed + load.generated)) + reading(widths, size, load)
