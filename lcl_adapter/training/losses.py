"""Losses on learned tokens: cross entropy with the right token, or the distance to the base's own distribution.

The distance is the forward Kullback-Leibler divergence KL(base || adapter) at each learned token, over the whole
vocabulary. It is 0 where the adapter changes nothing.

Shapes: B rows, T tokens of a row, R of the rows, L learned tokens of the batch, K of those, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lcl_adapter.base.encoder import Encoder
from lcl_adapter.base.model import Base
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.sources import Picture

CHUNK = 256  # tokens whose probabilities are in memory at a time


def own_logits(
    base: Base, vision: VisionFeatures, encoder: Encoder, inputs: Mapping[str, Any], pictures: Sequence[Picture], rows: Sequence[int],
    read_BT: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The base's own logits [K, V] at the marked tokens of some rows, without gradient.

    Adapter, trained projector, dropout and noise are switched off.

    base: with its adapter. inputs: of the batch, as :func:`~lcl_adapter.training.collate.collate` returns them. pictures: of
    the whole batch. rows: their indices. read_BT: true where the logits are needed.
    """
    ids_BT, positions = inputs["input_ids"], inputs["position_ids"]  # positions: [B, T], or [X, B, T]
    by_row = _pictures_by_row((ids_BT == encoder.image_token_id).sum(1).tolist(), pictures, encoder)
    own_pictures = [picture for row in rows for picture in by_row[row]]
    rows_R, requested = torch.tensor(rows, device=ids_BT.device), vision.requested
    with torch.no_grad(), base.without_adapter(), _without_noise(base.model):
        outputs = base.model(
            input_ids=ids_BT[rows_R],
            attention_mask=inputs["attention_mask"][rows_R],
            position_ids=positions[..., rows_R, :],
            pictures=own_pictures,
            logits_to_keep=read_BT[rows_R],
            use_cache=False,
        )
    vision.requested = requested  # the pictures are shown once, for the adapter
    logits_KV: torch.Tensor = outputs.logits
    return logits_KV.reshape(-1, logits_KV.shape[-1])


def _pictures_by_row(tokens: Sequence[int], pictures: Sequence[Picture], encoder: Encoder) -> list[list[Picture]]:
    """The pictures of each row. tokens: how many a row's pictures have together, without their marks."""
    whole = encoder.image.count(encoder.image_token_id)
    remaining, rows = iter(pictures), []
    for count in tokens:
        row: list[Picture] = []
        while count:
            row.append(next(remaining))
            count -= row[-1].tokens or whole
        rows.append(row)
    return rows


@contextmanager
def _without_noise(model: torch.nn.Module) -> Iterator[None]:
    """The modules that are training do not, so that none drops or adds anything. Quantised layers stay as they are: they
    compute in another way outside of training, and would repack their weights each time.
    """
    changed = [module for module in model.modules() if module.training and not type(module).__module__.startswith("bitsandbytes")]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True


def divergence(logits_KV: torch.Tensor, own_KV: torch.Tensor) -> torch.Tensor:
    """The sum over tokens of KL(softmax(own) || softmax(logits)), in nats.

    A few tokens at a time. Their probabilities are computed again in the backward pass, so that memory does not grow with
    the number of tokens.
    """
    parts = [
        checkpoint(_divergence, logits, own, use_reentrant=False) for logits, own in zip(logits_KV.split(CHUNK), own_KV.split(CHUNK), strict=True)
    ]
    return torch.stack(parts).sum()


def _divergence(logits_KV: torch.Tensor, own_KV: torch.Tensor) -> torch.Tensor:
    own = own_KV.float().log_softmax(-1)
    return functional.kl_div(logits_KV.float().log_softmax(-1), own, reduction="sum", log_target=True)
