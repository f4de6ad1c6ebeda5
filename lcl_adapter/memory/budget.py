"""How much memory a recipe will take, by formula, before any weight is loaded.

From configs alone: parameters in their precision, the adapter with its gradients and optimiser, activations that wait for
the backward pass, the vision tower's batch, the head's logits, the KV cache. What each line counts is said beside it;
``benchmarks/plan.py`` holds the formulas against measured peaks.

Letters: T tokens a row, B rows at a time, d width, f width of the MLP, k width of keys or values, L layers, V words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from lcl_adapter.amounts import memory_bytes
from lcl_adapter.answering.predict import QUESTIONS_PER_PASS
from lcl_adapter.base.encoder import IGNORED, Encoded
from lcl_adapter.base.layouts.keys import language_path, skeleton
from lcl_adapter.base.model import PROJECTOR
from lcl_adapter.base.precision import TYPES, quantised_weights
from lcl_adapter.base.vision import BATCH
from lcl_adapter.recipe.schema import QUANTISED, AdapterOptions, Precision, TrainOptions
from lcl_adapter.training.collate import pad_to

FULL = 4  # bytes of fp32, which adapters, gradients and optimiser are in
RUNTIME = {"cpu": 600 * 10**6, "cuda": 500 * 10**6}  # the process with its libraries; on a GPU, the context that CUDA takes


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that memory depends on."""

    d: int
    f: int
    k: int
    layers: int
    heads: int
    words: int
    language: int  # parameters of its linear layers, which quantisation shrinks
    rest: int  # of the embedding, the head and the norms
    vision: int
    projector: int
    widest: int  # parameters of the largest linear layer
    tower_width: int
    tower_mlp: int
    tower_layers: int
    tower_tokens: int
    side: int
    stored: torch.dtype


def shape_of(config: Any) -> Shape:
    """Counted on the model without memory; exact, and a second's work."""
    model = skeleton(config)
    inside = language_path(model)
    counts = {"language": 0, "rest": 0, "vision": 0, "projector": 0}
    widest = 0
    linear = quantised_weights(model)
    for name, parameter in model.named_parameters():
        part = "projector" if PROJECTOR in name else "language" if name in linear else "rest" if name.startswith((inside, "lm_head")) else "vision"
        counts[part] += parameter.numel()
        if name in linear:
            widest = max(widest, parameter.numel())
    text, vision = config.text_config, config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    patch = vision.patch_size
    side = getattr(vision, "image_size", None) or 448
    return Shape(
        d=text.hidden_size,
        f=text.intermediate_size,
        k=text.num_key_value_heads * head,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        words=text.vocab_size,
        widest=widest,
        tower_width=getattr(vision, "hidden_size", 0),
        tower_mlp=getattr(vision, "intermediate_size", 0) or 4 * getattr(vision, "embed_dim", 0),
        tower_layers=getattr(vision, "num_hidden_layers", 0) or getattr(vision, "depth", 0),
        tower_tokens=(side // patch) ** 2 + 1,
        side=side,
        stored=config.dtype or text.dtype or torch.float32,
        **counts,
    )


@dataclass(frozen=True)
class Work:
    """What is in memory at once: rows of so many tokens, learned tokens in all, different pictures, tiles of each."""

    rows: int
    tokens: int
    learned: int
    pictures: int
    tiles: int = 1


@dataclass(frozen=True)
class Forecast:
    """Bytes by part, in the order they come; ``moments`` are alternatives of which only the largest counts."""

    parts: dict[str, int]
    moments: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values()) + max(self.moments.values(), default=0)


def width(precision: Precision, device: str) -> int:
    """Bytes of an activation."""
    if precision in TYPES:
        return TYPES[precision].itemsize
    return FULL if device == "cpu" else 2


def weights(shape: Shape, precision: Precision, device: str) -> dict[str, int]:
    """Parameters by part. nf4: half a byte, a byte for 64 of them, and fp32 for 256 of those; int8: a byte, and fp32 for a row of outputs."""
    size = width(precision, device)
    language = shape.language * size
    if precision == "nf4":
        language = int(shape.language * (0.5 + 1 / 64 + FULL / 64 / 256))
    elif precision == "int8":
        language = shape.language + shape.language // shape.d * FULL
    return {
        "language model": language,
        "embedding, head, norms": shape.rest * size,
        "vision tower": shape.vision * size,
        "projector": shape.projector * size,
    }


def adapter_parameters(shape: Shape, adapter: AdapterOptions) -> int:
    """LoRA on q, k, v, o, gate, up, down; with ``projector``, that too."""
    d, f, k = shape.d, shape.f, shape.k
    pair = 2 * (d + d) + 2 * (d + k) + 3 * (d + f)
    magnitudes = 2 * d + 2 * k + 2 * f + d if adapter.dora else 0
    return shape.layers * (adapter.rank * pair + magnitudes) + (shape.projector if adapter.projector else 0)


def layer_activations(shape: Shape, adapter: AdapterOptions, size: int) -> int:
    """Bytes a token that one layer keeps for its backward pass.

    CachedSet: both norms' inputs and outputs, q, k, v, the attention's output, gate, its activation, up and their product, and
    seven times the rank. In 16 bits the norms keep an fp32 copy of their input,
    and every LoRA an fp32 copy of its own: the adapter is in fp32.
    """
    d, f, k = shape.d, shape.f, shape.k
    kept = size * (6 * d + 2 * k + 4 * f)
    low = 7 * adapter.rank * FULL
    if size < FULL:
        kept += FULL * (2 * d)  # the norms
        kept += FULL * (3 * d + d + 2 * d + f)  # inputs of q, k, v; o; gate, up; down
    if adapter.dropout:
        kept += (FULL + 1) * (3 * d + d + 2 * d + f)  # what dropout left, and its mask
    return kept + low


def training(shape: Shape, precision: Precision, device: str, adapter: AdapterOptions, train: TrainOptions, work: Work) -> Forecast:
    """Peak of a training step."""
    size = width(precision, device)
    trained = adapter_parameters(shape, adapter)
    tokens = work.rows * work.tokens
    one = layer_activations(shape, adapter, size) * tokens
    kept = shape.layers * tokens * shape.d * size + one if train.gradient_checkpointing else shape.layers * one
    # Gradients on their way: of the MLP's three wide tensors, and of the stream.
    passing = tokens * size * (3 * shape.f + 3 * shape.d)
    mask = work.rows * work.tokens**2  # who sees whom; every layer keeps it as numbers
    masks = mask * size * (1 if train.gradient_checkpointing else shape.layers)
    logits = 4 * work.learned * shape.words * FULL
    dequantised = shape.widest * size if precision in QUANTISED else 0
    features = work.pictures * work.tiles * shape.tower_tokens * max(1, shape.tower_width) * size
    parts = {
        "runtime": RUNTIME[device],
        **weights(shape, precision, device),
        "adapter": trained * FULL,
    }
    step = [trained * FULL * 3, min(memory_bytes(train.feature_cache), features), 2 * tokens * shape.d * size, kept, passing, mask + masks, logits]
    moments = {
        "loading": _loading(shape, precision, device),
        "vision tower at work": tower(shape, size, work),
        "a step": sum(step) + dequantised,
    }
    return Forecast(parts, moments)


def tower(shape: Shape, size: int, work: Work) -> int:
    """A batch of pictures on its way through the frozen tower: pixels, the hidden states of all layers, one layer's own."""
    count = min(BATCH, work.pictures) * work.tiles
    pixels = count * 3 * shape.side**2 * FULL * 2
    stream = count * shape.tower_tokens * size * (shape.tower_width * 8 + shape.tower_mlp * 2)
    return pixels + stream


def answering(
    shape: Shape, precision: Precision, device: str, adapter: AdapterOptions, sets: int, support: int, packed: int, pictures: int
) -> Forecast:
    """Peak of asking. sets: support sets at a time, of ``support`` tokens; packed: tokens of the questions behind one."""
    size = width(precision, device)
    tokens = sets * support
    passing = size * (4 * shape.d + 2 * shape.k + 3 * shape.f) * max(tokens, sets * packed)
    mask = sets * max(support * support, packed * (support + packed)) * (1 + size)
    parts = {
        "runtime": RUNTIME[device],
        **weights(shape, precision, device),
        "adapter": adapter_parameters(shape, adapter) * FULL,
        "KV cache": cache(shape, size, sets * (support + packed)),
    }
    work = Work(sets, support, 0, pictures)
    moments = {
        "loading": _loading(shape, precision, device),
        "vision tower at work": tower(shape, size, work),
        "reading": passing + mask + 4 * sets * QUESTIONS_PER_PASS * shape.words * FULL,
    }
    return Forecast(parts, moments)


def cache(shape: Shape, size: int, tokens: int) -> int:
    """Keys and values of every layer."""
    return 2 * shape.layers * shape.k * size * tokens


def _loading(shape: Shape, precision: Precision, device: str) -> int:
    """On a CPU the file stays mapped while another type is made of it; on a GPU a tensor at a time passes."""
    same = TYPES.get(precision) == shape.stored
    return 0 if same or device != "cpu" else (shape.language + shape.rest + shape.vision + shape.projector) * shape.stored.itemsize


def longest(row: Encoded, rows: int, tiles: bool) -> Work:
    """The most that a batch can be: so many rows as the longest one there is."""
    return Work(
        rows=rows,
        tokens=pad_to(len(row)),
        learned=rows * sum(label != IGNORED for label in row.labels),
        pictures=rows * len(set(row.pictures)),
        tiles=5 if tiles else 1,
    )
