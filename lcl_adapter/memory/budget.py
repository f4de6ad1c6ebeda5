"""Formulas for the memory that a recipe needs, from configs alone, before any weight is loaded.

They count parameters in their precision, the adapter with its gradients and optimiser, activations saved for the
backward pass, the vision tower's batch, the head's logits, and the KV cache. ``benchmarks/plan.py`` compares them with
measured peaks.

Letters: d width of the language model, f width of its MLP, k width of keys or values. All results are bytes unless
named otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lcl_adapter.amounts import memory_bytes
from lcl_adapter.answering.room import FP32_BYTES, Load, Widths, keys_and_values, reading, widths_of
from lcl_adapter.base.encoder import IGNORED, Encoded
from lcl_adapter.base.layouts.keys import language_path, skeleton
from lcl_adapter.base.model import PROJECTOR, side_of
from lcl_adapter.base.precision import TYPES, quantised_weights
from lcl_adapter.base.vision import BATCH
from lcl_adapter.recipe.schema import QUANTISED, AdapterOptions, Precision, TrainOptions
from lcl_adapter.training.packing import pad_to

# The process with its libraries; on a GPU, CUDA's context and cuBLAS's workspace, as an H100 showed them (docs/gpu-results.md)
RUNTIME = {"cpu": 600 * 10**6, "cuda": 700 * 10**6}

# On a CPU, glibc keeps freed blocks below 32 MiB, and reuses only some of them. Both numbers were fitted to ten trainings
# (`python -m benchmarks.plan`; docs/lab.md, what cost training its speed).
HEAP = 1.9  # resident bytes for each byte that a step has in use
RECOMPUTED = 6  # layers whose recomputed activations stay resident, with gradient checkpointing


@dataclass(frozen=True)
class Shape(Widths):
    """The sizes of a model that memory depends on."""

    heads: int
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
    patch = vision.patch_size
    side = side_of(config)
    return Shape(
        **asdict(widths_of(text)),
        heads=text.num_attention_heads,
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

    Rows of a batch, tokens of a row, learned tokens of the batch, distinct pictures, tiles of a picture. cached: distinct
    pictures of the whole run, whose features stay in the cache. copies: of the learned tokens' logits, with their
    probabilities and gradients. pooled: pictures that are projected whole before they are pooled. attended: tokens that a
    token's row may have where rows are packed, which no layout fills with more tokens in all; 0 where a row is as it is.
    """

    rows: int
    tokens: int
    learned: int
    pictures: int
    tiles: int = 1
    cached: int = 0
    copies: int = 4
    pooled: int = 0
    attended: int = 0


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
    query_key, others = (d + d) + (d + k), (d + k) + (d + d) + 3 * (d + f)
    factors = adapter.rank_of("q_proj") * query_key + adapter.rank * others
    magnitudes = 2 * d + 2 * k + 2 * f + d if adapter.dora else 0
    return shape.layers * (factors + magnitudes) + (shape.projector if adapter.projector else 0)


def layer_activations(shape: Shape, adapter: AdapterOptions, size: int, lora: int, mask: int) -> int:
    """Bytes for each token that one layer saves for its backward pass.

    Saved are the inputs of both norms, q, k, v, the attention's output, gate, its activation and up; for the seven LoRAs
    their inputs and their products of the rank's width. In 16 bits the norms save an fp32 copy of their input. A LoRA
    saves the layer's own input, where that has the LoRA's type and no dropout comes between; else a copy.

    size: bytes of an activation. lora: of a value that a LoRA computes with. mask: of a value of dropout's mask.
    """
    d, f, k = shape.d, shape.f, shape.k
    saved = size * (4 * d + 2 * k + 3 * f)
    if size < FP32_BYTES:
        saved += FP32_BYTES * (2 * d)  # the norms
    lora_inputs = 3 * d + d + 2 * d + f  # of q, k, v; o; gate, up; down
    own_inputs = size == FP32_BYTES and not adapter.dropout
    saved += size * (2 * d + f) if own_inputs else lora * lora_inputs
    if adapter.dropout:
        saved += mask * lora_inputs
    return saved + (5 * adapter.rank + 2 * adapter.rank_of("q_proj")) * lora


def training(shape: Shape, precision: Precision, device: str, adapter: AdapterOptions, train: TrainOptions, work: Work) -> Forecast:
    """Peak of a training step."""
    size = width(precision, device)
    trained = adapter_parameters(shape, adapter)
    tokens = work.rows * work.tokens
    autocast = device == "cuda" and size < FP32_BYTES  # training then computes the adapter in 16 bits, from fp32 weights
    # A CPU's dropout has a mask of numbers, a GPU's one of booleans
    one_layer = tokens * layer_activations(shape, adapter, size, size if autocast else FP32_BYTES, 1 if device == "cuda" else FP32_BYTES)
    heap, recomputed = (HEAP, min(RECOMPUTED, shape.layers)) if device == "cpu" else (1.0, 1)
    saved = shape.layers * tokens * shape.d * size + recomputed * one_layer if train.gradient_checkpointing else shape.layers * one_layer
    # Gradients of activations: of the MLP's three wide tensors and of the residual stream.
    gradients = tokens * size * (3 * shape.f + 3 * shape.d)
    mask = tokens * (work.attended or work.tokens)  # booleans; every layer saves it as floats
    masks = mask * size * (1 if train.gradient_checkpointing else shape.layers)
    logits = work.copies * work.learned * shape.words * FP32_BYTES
    dequantised = shape.widest * size if precision in QUANTISED else 0
    parts = {
        "runtime": RUNTIME[device],
        **weights(shape, precision, device),
        "adapter": trained * FP32_BYTES,
    }
    between = sum(lasting(shape, precision, device, adapter, train, work).values())
    # The adapter's gradients come while the backward pass frees the saved activations, layer by layer. Where a step has
    # several batches, they are there from the first one on.
    adapter_gradients = trained * FP32_BYTES
    step = [
        saved + adapter_gradients if train.gradient_accumulation_steps > 1 else max(saved, adapter_gradients),
        trained * size if autocast else 0,  # the adapter in 16 bits
        features(shape, size, work.pictures * work.tiles),
        projected(shape, size, work.pooled),
        2 * tokens * shape.d * size,  # embedded tokens
        gradients,
        mask + masks,
        logits,
    ]
    moments = {
        "loading": _loading(shape, precision, device),
        "vision tower at work": tower(shape, size, work) + between,
        "a step": int(heap * sum(step)) + dequantised + between,
    }
    return Forecast(parts, moments)


def lasting(shape: Shape, precision: Precision, device: str, adapter: AdapterOptions, train: TrainOptions, work: Work) -> dict[str, int]:
    """What training holds between its steps, beside the weights: measuring while training finds it there.

    On a GPU the cache of features is in the main memory.
    """
    cached = features(shape, width(precision, device), max(work.cached, work.pictures) * work.tiles)
    return {
        "optimiser": optimiser(adapter_parameters(shape, adapter), train),
        "cached features": min(memory_bytes(train.feature_cache), cached) if device == "cpu" else 0,
    }


def optimiser(trained: int, train: TrainOptions) -> int:
    """The optimiser's state. AdamW, the default, has two fp32 moments for each trained parameter.

    The bitsandbytes variants in 8 bits have a byte for each moment. Paged ones may leave the GPU, and are counted.
    """
    name = train.optim or "adamw_torch"
    number = {"sgd": 0, "adafactor": 0, "lion": 1, "rmsprop": 1, "adagrad": 1, "ademamix": 3, "grokadamw": 3}
    moments = next((count for part, count in number.items() if part in name), 2)
    return trained * moments * (1 if "8bit" in name else FP32_BYTES)


def features(shape: Shape, size: int, tiles: int) -> int:
    """The tower's features of so many tiles: the projector's input."""
    return tiles * shape.tower_tokens * max(1, shape.tower_width) * size


def projected(shape: Shape, size: int, pictures: int) -> int:
    """What the projector computes for so many pictures, with all their tokens: its hidden states and its output."""
    return 2 * pictures * shape.tower_tokens * shape.d * size


def tower(shape: Shape, size: int, work: Work) -> int:
    """A batch of pictures in the frozen tower: pixels, hidden states, and one layer's activations."""
    count = min(BATCH, work.pictures) * work.tiles
    pixels = count * 3 * shape.side**2 * FP32_BYTES * 2
    activations = count * shape.tower_tokens * size * (shape.tower_width * 8 + shape.tower_mlp * 2)
    return pixels + activations


def answering(
    shape: Shape,
    precision: Precision,
    device: str,
    adapter: AdapterOptions,
    load: Load,
    pictures: int,
    beside: Mapping[str, int] | None = None,
    pooled: int = 0,
) -> Forecast:
    """Peak of answering questions.

    pictures: distinct ones of a batch. beside: what else is in memory, for instance the optimiser while training. pooled:
    pictures that are projected whole before they are pooled.
    """
    size = width(precision, device)
    behind = load.packed + load.generated
    parts = {
        "runtime": RUNTIME[device],
        **weights(shape, precision, device),
        "adapter": adapter_parameters(shape, adapter) * FP32_BYTES,
        **(beside or {}),
        "KV cache": keys_and_values(shape, size, load.sets * (load.support + behind)),
    }
    work = Work(load.sets, load.support, 0, pictures)
    moments = {
        "loading": _loading(shape, precision, device),
        "vision tower at work": tower(shape, size, work),
        "reading": reading(shape, size, load) + features(shape, size, pictures) + projected(shape, size, pooled),
    }
    return Forecast(parts, moments)


def _loading(shape: Shape, precision: Precision, device: str) -> int:
    """On a CPU the file stays mapped while its weights are converted to another type.

    On a GPU one tensor is loaded at a time.
    """
    same = TYPES.get(precision) == shape.stored
    return 0 if same or device != "cpu" else (shape.language + shape.rest + shape.vision + shape.projector) * shape.stored.itemsize


def longest(row: Encoded, rows: int, tiles: bool, cached: int = 0, near_base: bool = False, tokens_per_batch: int | None = None) -> Work:
    """The largest batch: ``rows`` rows as long as ``row``. cached: distinct pictures of the whole run. near_base: whether
    the base's own logits are needed too. tokens_per_batch: of a packed row.
    """
    return Work(
        rows=rows,
        tokens=pad_to(len(row)),
        learned=rows * sum(label != IGNORED for label in row.labels),
        pictures=rows * len(set(row.pictures)),
        tiles=5 if tiles else 1,
        cached=cached,
        copies=5 if near_base else 4,
        pooled=rows * len({picture for picture in row.pictures if picture.tokens is not None}),
        attended=pad_to(max(len(row), min(tokens_per_batch, rows * len(row)))) if tokens_per_batch else 0,
    )
