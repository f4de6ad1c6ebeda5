"""Compare every weight that a merge changed with what the adapters' files and the base require, element by element.

A written element may differ from ``base + change`` by half a unit in the last place (ulp) of its type, and by the
rounding errors of fp32 arithmetic, which are bounded here. The change is computed from the definition of LoRA, rsLoRA
(arXiv 2312.03732) or DoRA (arXiv 2402.09353), and not by the code that merges. So an effect that was lost, doubled,
scaled otherwise or added to another weight is noticed, wherever it is larger than the rounding.

Where an honest merge rounds the effect itself away, the elements are right and the effect is lost. The recovered share
shows that: the projection of the actual change on the required one, 1 where everything is there, 0 where nothing is.

Blocks of rows are compared, so that not even one whole weight is in memory. They are small enough for the processor's
cache, which makes the comparison several times faster.
Shapes: O rows of a block, I columns, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lcl_adapter.base.layouts import keys
from lcl_adapter.base.layouts.checkpoint import Weight
from lcl_adapter.base.layouts.tensors import StoredTensor, row_blocks
from lcl_adapter.checkpoints.deltas import Adapter, weight_at_start
from lcl_adapter.errors import MergeError

EPS = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).tiny  # the smallest normal number; matrix products may flush smaller ones to zero
EXPONENT = 0x7F800000  # the bits of an fp32 number that hold its exponent
STEP = 1 << 18  # elements compared at a time
ROUNDED_AWAY = 0.5  # an effect whose recovered share is further than this from 1 is mostly lost in rounding

BaseRows = Callable[[str, Weight], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class Block:
    """Rows of a weight before merging, and the change that they require, [O, I] in fp32.

    allowance: bound of the fp32 errors of both computations of the change, in absolute terms for each row, [O, 1].
    roundings: bound of the other fp32 errors, in fp32's ulps of the merged value.
    """

    base: torch.Tensor
    change: torch.Tensor
    allowance: torch.Tensor
    roundings: float = 0.0


@dataclass
class WeightCheck:
    """One written weight against what it must be.

    error: the largest error of an element beyond the arithmetic's, in ulps of the stored type. excess: how far an error
    is above the allowed one, in ulps; negative if all are allowed. effect: the largest required change of an element.
    """

    name: str
    dtype: torch.dtype
    error: float = 0.0
    excess: float = -math.inf
    effect: float = 0.0
    out_of_range: bool = False
    _actual: float = field(default=0.0, repr=False)  # actual change · required change
    _required: float = field(default=0.0, repr=False)  # required change · required change

    @property
    def passes(self) -> bool:
        return self.excess <= 0

    @property
    def recovered_share(self) -> float:
        """The projection of the actual change on the required one; 1 where no change is required.

        The actual change is the one from what would be written without the adapters.
        """
        return self._actual / self._required if self._required > 0 else 1.0

    @property
    def rounded_away(self) -> bool:
        """Whether most of the effect is lost in the stored type's rounding, or more noise than effect was added."""
        return abs(self.recovered_share - 1) > ROUNDED_AWAY

    def add(self, block: Block, written_OI: torch.Tensor) -> None:
        """Compare some rows with what is on the disk, [O, I] in fp32."""
        base_OI, change_OI = block.base, block.change
        info = torch.finfo(self.dtype if self.dtype.itemsize <= 4 else torch.float32)  # a merge computes in fp32, so fp64 holds no more
        value_OI = base_OI + change_OI
        # A number x has the ulp eps * 2^e with 2^e <= |x| < 2^(e + 1); its exponent's bits alone are 2^e.
        ulp_OI = value_OI.view(torch.int32).bitwise_and_(EXPONENT).view(torch.float32).clamp_(min=info.tiny).mul_(info.eps)
        # What a merge without adapters would write. It differs from the base where the base has another type.
        unchanged_OI = base_OI if self.dtype.itemsize >= 4 else base_OI.to(self.dtype).float()
        self._actual += float(torch.dot((written_OI - unchanged_OI).flatten(), change_OI.flatten()))
        self._required += float(torch.dot(change_OI.flatten(), change_OI.flatten()))
        self.effect = max(self.effect, *(abs(float(edge)) for edge in torch.aminmax(change_OI)))
        error = float((written_OI - base_OI).sub_(change_OI).abs_().sub_(block.allowance + TINY).div_(ulp_OI).amax())
        if not math.isfinite(error):
            error, self.out_of_range = math.inf, True
        self.error = max(self.error, error)
        before_narrowing = 0.5 if info.eps > EPS else 0.0
        self.excess = max(self.excess, error - 0.5 - (before_narrowing + block.roundings) * EPS / info.eps)


def check_weights(
    adapters: Sequence[Adapter],
    base: Mapping[str, Weight],
    base_rows: BaseRows,
    written: Mapping[str, StoredTensor],
    joined_projector: bool = False,
) -> Iterator[WeightCheck]:
    """Compare every weight that an adapter changes with the one on the disk.

    base: every weight of the base by name. base_rows: gives the blocks of rows that the adapters are added to.
    written: the tensors on the disk by the model's names. joined_projector: v1's two projector layers are written as
    their product, under the name of the first. Raises MergeError if a changed weight was not written.
    """
    for module in sorted({module for adapter in adapters for module in adapter.layers}):
        name = f"{module}.weight"
        changing = [adapter for adapter in adapters if module in adapter.layers]
        yield _compare(name, _layer_blocks(module, base_rows(name, base[name]), changing), written)
    trained = {name: adapter for adapter in adapters for name in adapter.full_weights}
    if joined_projector and any(name.startswith(keys.PROJECTOR) for name in trained):
        for part in ("weight", "bias"):
            name = f"{keys.PROJECTOR}linear_1.{part}"
            yield _compare(name, [_product_of_projector(part, trained, base)], written)
        trained = {name: adapter for name, adapter in trained.items() if not name.startswith(keys.PROJECTOR)}
    for name, adapter in trained.items():
        yield _compare(name, _trained_blocks(name, adapter, base[name]), written)


def _compare(name: str, blocks: Iterable[Block], written: Mapping[str, StoredTensor]) -> WeightCheck:
    if name not in written:
        raise MergeError(f"{name}: the adapter changes it, and it is not among the written weights. Nothing was saved.")
    stored = written[name]
    check, rows = WeightCheck(name, stored.dtype), 0
    for block, written_OI in zip(blocks, _pieces(stored.blocks()), strict=False):  # the original layout drops rows of the embedding
        count = len(written_OI)
        check.add(Block(block.base[:count], block.change[:count], block.allowance[:count], block.roundings), written_OI)
        rows += count
    if rows != stored.shape[0]:
        raise MergeError(f"{name}: {stored.shape[0]} rows were written, the base has {rows}. Nothing was saved.")
    return check


def _pieces(blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Consecutive blocks of rows, cut further into at most STEP elements, [O, I] in fp32. A vector is a column."""
    for block in blocks:
        block_OI = block.reshape(len(block), -1)
        yield from (piece.float() for piece in block_OI.split(max(1, STEP // block_OI.shape[1])))


def _layer_blocks(module: str, rows: Iterable[torch.Tensor], adapters: Sequence[Adapter]) -> Iterator[Block]:
    """The blocks of a layer with LoRA."""
    if not any(adapter.starts_from_weight for adapter in adapters):
        return _layer_blocks_on(module, _pieces(rows), None, adapters)
    whole = torch.cat(list(rows))
    return _layer_blocks_on(module, _pieces(row_blocks(whole)), weight_at_start(module, whole, adapters), adapters)


def _layer_blocks_on(module: str, rows: Iterable[torch.Tensor], start: torch.Tensor | None, adapters: Sequence[Adapter]) -> Iterator[Block]:
    """start: the weight that the products are added to, where it is not the base's (PiSSA)."""
    down = [adapter.layers[module]["A"].float() for adapter in adapters]
    longest_column = [float(part.square().sum(0).max().sqrt()) for part in down]
    first = 0
    for base_OI in rows:
        delta_OI = torch.zeros_like(base_OI)
        allowance_O1 = torch.zeros(len(base_OI), 1)
        for adapter, down_RI, longest in zip(adapters, down, longest_column, strict=True):
            up_OR = adapter.layers[module]["B"][first : first + len(base_OI)].float() * (adapter.weight * adapter.scaling_of(module))
            delta_OI.addmm_(up_OR, down_RI)
            # Each of two sums of R products differs from the exact one by R half ulps of the sum of their sizes, which
            # is at most the product of the two vectors' lengths.
            allowance_O1 += (down_RI.shape[0] + 4) * EPS * longest * up_OR.norm(dim=1, keepdim=True)
        roundings = len(adapters) - 1.0  # of the sums before the last, which may be just above a power of two
        start_OI = base_OI if start is None else start[first : first + len(base_OI)]
        width = math.sqrt(base_OI.shape[1])
        if adapters[0].config.use_dora:
            magnitude_O1 = adapters[0].layers[module]["magnitude"][first : first + len(base_OI)].float()[:, None]
            value_OI = start_OI + delta_OI
            length_O1 = value_OI.norm(dim=1, keepdim=True)
            delta_OI = value_OI.mul_(magnitude_O1 / length_O1).sub_(start_OI)
            # A length is wrong by the error of its own sum, and by sqrt(I) times an element's at most.
            allowance_O1 = (allowance_O1 * (magnitude_O1 / length_O1).abs()) * (1 + width)
            roundings += 8 + 2 * width
        if start is not None:
            delta_OI += start_OI - base_OI
            allowance_O1 += 8 * width * EPS * base_OI.norm(dim=1, keepdim=True)  # of the decomposition that gave the start
        yield Block(base_OI, delta_OI, allowance_O1, roundings)
        first += len(base_OI)


def _trained_blocks(name: str, adapter: Adapter, base: Weight) -> Iterator[Block]:
    """The blocks of a weight that was trained in full; the adapter's weight below 1 interpolates from the base's."""
    for base_OI, trained_OI in zip(_pieces(base.blocks()), _pieces(row_blocks(adapter.full_weights[name])), strict=True):
        change_OI = (trained_OI - base_OI) * adapter.weight
        largest_O1 = torch.maximum(base_OI.abs(), trained_OI.abs()).amax(1, keepdim=True)
        yield Block(base_OI, change_OI, 2 * (1 + abs(adapter.weight)) * EPS * largest_O1)


def _product_of_projector(part: str, trained: Mapping[str, Adapter], base: Mapping[str, Weight]) -> Block:
    """v1's projector in the original layout: two linear layers without an activation between them, as one."""

    def values(adapted: bool) -> Iterator[torch.Tensor]:
        for layer, kind in ((1, part), (2, "weight"), (2, "bias")):
            name = f"{keys.PROJECTOR}linear_{layer}.{kind}"
            value = base[name].read().double()
            if adapted and name in trained:
                value += trained[name].weight * (trained[name].full_weights[name].double() - value)
            yield value

    def product(adapted: bool, sizes: bool = False) -> torch.Tensor:
        first, second_weight, second_bias = (value.abs() if sizes else value for value in values(adapted))
        return second_weight @ first if part == "weight" else (second_weight @ first + second_bias)[:, None]

    before = product(adapted=False)
    base_OI = before.float()
    change_OI = (product(adapted=True) - base_OI.double()).float()
    # Blended weights are rounded to fp32 before they are multiplied, in double precision.
    return Block(base_OI, change_OI, 4 * EPS * product(adapted=True, sizes=True).amax(1, keepdim=True).float())
