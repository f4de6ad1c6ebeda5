"""Prefilled support sets: what the model has read, as its cache of keys and values.

Shapes: S support sets, P tokens of the longest support set.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import DynamicCache


@dataclass(frozen=True)
class Prefilled:
    """Support sets that the model has read, padded on the left to one length.

    cache: keys and values, [S, ...]. mask [S, P]: 1 where a token is real, 0 where it is padding. next_position [S]: the
    position of the first token that follows each support set.
    """

    cache: DynamicCache
    mask: torch.Tensor
    next_position: torch.Tensor

    @property
    def empty(self) -> bool:
        """Whether there is no support set at all, so that questions stand alone."""
        return self.mask.shape[1] == 0

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Restore the cache on exit, also after an error, so that what the model read inside is removed from it.

        The old tensors are put back. Cropping the new ones would not free their memory.
        """
        layers = list(self.cache.layers)
        states = [dict(vars(layer)) for layer in layers]
        try:
            yield
        finally:
            self.cache.layers[:] = layers
            for layer, state in zip(layers, states, strict=True):
                vars(layer).clear()
                vars(layer).update(state)
