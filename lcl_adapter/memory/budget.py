"""Formulas for the memory that a recipe needs, from configs alone, before any weight is loaded.

They count parameters in their precision, the adapter with its gradients and optimiser, activations saved for the
backward pass, the vision tower's batch, the head's logits, and the KV cache. ``benchmarks/plan.py`` compares them with
measured peaks.

Letters: d width of the language model, f width of its MLP, k width of keys or values. All results are bytes unless
named otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from lcl_adapter.amounts import memory_bytes
from lcl_adapter.answering.predict import QUESTIONS_PER_PASS
from lcl_adapter.base.encoder import IGNORED, Encoded
from lcl_adapter.base.layouts.keys import language_path, skeleton
from lcl_adapter.base.model import PROJECTOR, side_of
from lcl_adapter.base.precision import TYPES, quantised_weights
from lcl_adapter.base.vision import BATCH
from lcl_adapter.recipe.schema import QUANTISED, AdapterOptions, Precision, TrainOptions
from lcl_adapter.training.collate import pad_to

FP32_BYTES = 4  # adapters, gradients and the optimiser are in fp32
RUNTIME = {"cpu": 600 * 10**6, "cuda": 500 * 10**6}  # the process with its libraries; on a GPU, CUDA's context


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that memory depends on."""

    d: int
    f: int
    k: int
    layers: int
    heads: int
    words: int
    language: int  # parameters of the language model's linear layers, which quantisation shrinks
    rest: int  # parameters of the embedding, the head and the norms
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
    """The exact sizes, counted on the meta device in about a second."""
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
    side = side_of(config)
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
    """The work of one step.

    Rows of a batch, tokens of a row, learned tokens of the batch, distinct pictures, tiles of a picture.
    """

    rows: int
    tokens: int
    learned: int
    pictures: int
    tiles: int = 1


@dataclass(frozen=True)
class Forecast:
    """Bytes by part. ``parts`` are present all the time. ``moments`` follow each other, so only the largest counts."""

    parts: dict[str, int]
    moments: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values()) + max(self.moments.values(), default=0)


def width(precision: Precision, device: str) -> int:
    """Bytes of one activation value."""
    if precision in TYPES:
        return TYPES[precision].itemsize
    return FP32_BYTES if device == "cpu" else 2


def weights(shape: Shape, precision: Precision, device: str) -> dict[str, int]:
    """Bytes of the parameters by part.

    nf4: half a byte a parameter, one byte for 64 parameters, and one fp32 value for 256 of those bytes. int8: one byte
    a parameter, and one fp32 value for each output.
    """
    size = width(precision, device)
    language = shape.language * size
    if precision == "nf4":
        language = int(shape.language * (0.5 + 1 / 64 + FP32_BYTES / 64 / 256))
    elif precision == "int8":
        language = shape.language + shape.language // shape.d * FP32_BYTES
    return {
        "language model": language,
        "embedding, head, norms": shape.rest * size,
        "vision tower": shape.vision * size,
        "projector": shape.projector * size,
    }


def adapter_parameters(shape: Shape, adapter: AdapterOptions) -> int:
    """The number of trained parameters: LoRA on all seven projections, and the projector where it is trained."""
    d, f, k = shape.d, shape.f, shape.k
    pair = 2 * (d + d) + 2 * (d + k) + 3 * (d + f)
    magnitudes = 2 * d + 2 * k + 2 * f + d if adapter.dora else 0
    return shape.layers * (adapter.rank * pair + magnitudes) + (shape.projector if adapter.projector else 0)


def layer_activations(shape: Shape, adapter: AdapterOptions, size: int) -> int:
    """Bytes for each token that one layer saves for its backward pass.

    Saved are both norms' inputs and outputs, q, k, v, the attention's output, gate, its activation, up and their
    product, and seven LoRA products of the rank's width. In 16 bits the norms save an fp32 copy of their input, and so
    does every LoRA, because the adapter is in fp32.
    """
    d, f, k = shape.d, shape.f, shape.k
    saved = size * (6 * d + 2 * k + 4 * f)
    low_rank = 7 * adapter.rank * FP32_BYTES
    if size < FP32_BYTES:
        saved += FP32_BYTES * (2 * d)  # the norms
        saved += FP32_BYTES * (3 * d + d + 2 * d + f)  # inputs of q, k, v; o; gate, up; down
    if adapter.dropout:
        saved += (FP32_BYTES + 1) * (3 * d + d + 2 * d + f)  # dropout's output and its mask
    return saved + low_rank


def training(shape: Shape, precision: Precision, device: str, adapter: AdapterOptions, train: TrainOptions, work: Work) -> Forecast:
    """Peak of a training step."""
    size = width(precision, device)
    trained = adapter_parameters(shape, adapter)
    tokens = work.rows * work.tokens
    one_layer = layer_activations(shape, adapter, size) * tokens
    saved = shape.layers * tokens * shape.d * size + one_layer if train.gradient_checkpointing else shape.layers * one_layer
    # Gradients of activations: of the MLP's three wide tensors and of the residual stream.
    gradients = tokens * size * (3 * shape.f + 3 * shape.d)
    mask = work.rows * work.tokens**2  # booleans; every layer saves it as floats
    masks = mask * size * (1 if train.gradient_checkpointing else shape.layers)
    logits = 4 * work.learned * shape.words * FP32_BYTES
    dequantised = shape.widest * size if precision in QUANTISED else 0
    features = work.pictures * work.tiles * shape.tower_tokens * max(1, shape.tower_width) * size
    parts = {
        "runtime": RUNTIME[device],
        **weights(shape, precision, device),
        "adapter": trained * FP32_BYTES,
    }
    step = [
        trained * FP32_BYTES * 3,  # gradients and the optimiser's two moments
        min(memory_bytes(train.feature_cache), features),
        2 * tokens * shape.d * size,  # embedded tokens
        saved,
        gradients,
        mask + masks,
        logits,
    ]
    moments = {
        "loading": _loading(shape, precision, device),
        "vision tower at work": tower(shape, size, work),
        "a step": sum(step) + dequantised,
    }
    return Forecast(parts, moments)


def tower(shape: Shape, size: int, work: Work) -> int:
    """A batch of pictures in the frozen tower: pixels, hidden states, and one layer's activations."""
    count = min(BATCH, work.pictures) * work.tiles
    pixels = count * 3 * shape.side**2 * FP32_BYTES * 2
    activations = count * shape.tower_tokens * size * (shape.tower_width * 8 + shape.tower_mlp * 2)
    return pixels + activations


def answering(
    shape: Shape, precision: Precision, device: str, adapter: AdapterOptions, sets: int, support: int, packed: int, pictures: int
) -> Forecast:
    """Peak of answering questions.

    sets: support sets in a batch, of ``support`` tokens each. packed: tokens of the questions behind one of them.
    """
    size = width(precision, device)
    tokens = sets * support
    activations = size * (4 * shape.d + 2 * shape.k + 3 * shape.f) * max(tokens, sets * packed)
    mask = sets * max(support * support, packed * (support + packed)) * (1 + size)
    parts = {
        "runtime": RUNTIME[device],
        **weights(shape, precision, device),
        "adapter": adapter_parameters(shape, adapter) * FP32_BYTES,
        "KV cache": cache(shape, size, sets * (support + packed)),
    }
    work = Work(sets, support, 0, pictures)
    moments = {
        "loading": _loading(shape, precision, device),
        "vision tower at work": tower(shape, size, work),
        "reading": activations + mask + 4 * sets * QUESTIONS_PER_PASS * shape.words * FP32_BYTES,
    }
    return Forecast(parts, moments)


def cache(shape: Shape, size: int, tokens: int) -> int:
    """Keys and values of every layer."""
    return 2 * shape.layers * shape.k * size * tokens


def _loading(shape: Shape, precision: Precision, device: str) -> int:
    """On a CPU the file stays mapped while its weights are converted to another type.

    On a GPU one tensor is loaded at a time.
    """
    same = TYPES.get(precision) == shape.stored
    return 0 if same or device != "cpu" else (shape.language + shape.rest + shape.vision + shape.projector) * shape.stored.itemsize


def longest(row: Encoded, rows: int, tiles: bool) -> Work:
    """The largest batch: ``rows`` rows as long as ``row``."""
    return Work(
        rows=rows,
        tokens=pad_to(len(row)),
        learned=rows * sum(label != IGNORED for label in row.labels),
        pictures=rows * len(set(row.pictures)),
        tiles=5 if tiles else 1,
    )
