"""Prefilled support sets: what the model has read, as its cache of keys and values.

The cache is written in place. Each layer reserves room behind the support set, what follows is written there, and a
counter takes it back. So there is one copy of a set's keys and values, and no copy for a generated token.

Shapes: S support sets, P tokens of the longest support set, T tokens of an update, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicLayer

from lcl_adapter.data.conversations import Turn

Part = tuple[Turn, ...]  # of an independent set: an example, or () for the text before the first one


class InPlaceLayer(DynamicLayer):
    """Keys and values of one layer, written into tensors with room for more tokens.

    ``keys`` and ``values`` are views of the written part, [S, H, length, D]. reserved: tokens that the tensors hold from
    the start. An update that does not fit enlarges them, which copies this layer once.
    """

    def __init__(self, reserved: int = 0) -> None:
        super().__init__()
        self.reserved = reserved
        self.length = 0
        self._stored: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def capacity(self) -> int:
        """Tokens that the layer can hold without another allocation."""
        return 0 if self._stored is None else self._stored[0].shape[2]

    @property
    def bytes(self) -> int:
        """Bytes of the tensors, with their room."""
        return 0 if self._stored is None else sum(tensor.untyped_storage().nbytes() for tensor in self._stored)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [S, H, T, D] each. Returns views of everything written so far."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        end = self.length + key_states.shape[2]
        if self._stored is None:
            capacity = max(end, self.reserved)
            self._stored = _empty_like(key_states, capacity), _empty_like(value_states, capacity)
        elif end > self.capacity:
            self.resize(end)
        for stored, new in zip(self._stored, (key_states, value_states), strict=True):
            stored[:, :, self.length : end] = new
        return self._show(end)

    def open_for(self, other: DynamicLayer, sets: int, length: int) -> None:
        """Let an empty layer show ``length`` zeros of so many sets, shaped otherwise as another layer. They can be written in place."""
        if self._stored is not None:
            return
        shape = (sets, other.keys.shape[1], max(length, self.reserved))
        self._stored = other.keys.new_zeros(*shape, other.keys.shape[3]), other.values.new_zeros(*shape, other.values.shape[3])
        self.dtype, self.device, self.is_initialized = other.keys.dtype, other.keys.device, True
        self._show(length)

    def resize(self, capacity: int) -> None:
        """Move what is written to tensors for ``capacity`` tokens. The old ones are freed.

        Where memory runs out, the layer is as before.
        """
        assert self._stored is not None
        keys, values = self._stored
        self._stored = _moved(keys, self.length, capacity), _moved(values, self.length, capacity)
        self._show(self.length)

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens. Nothing is copied or freed."""
        self._show(self.length - abs(tokens_to_remove))

    def truncate(self, length: int, capacity: int) -> None:
        """Take back all but the first ``length`` tokens, and the room beyond ``capacity``."""
        if self._stored is None:
            return
        if not capacity:
            self._stored = self.keys = self.values = None
            self.length, self.is_initialized = 0, False
            return
        self._show(length)
        if self.capacity > capacity:
            self.resize(capacity)

    def _show(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Set the views to the first ``length`` tokens, and return them."""
        assert self._stored is not None
        shown: tuple[Any, Any] = self._stored[0][:, :, :length], self._stored[1][:, :, :length]
        self.length, (self.keys, self.values) = length, shown
        return shown


def _empty_like(states: torch.Tensor, capacity: int) -> torch.Tensor:
    """[S, H, capacity, D]"""
    return states.new_empty(states.shape[0], states.shape[1], capacity, states.shape[3])


def _moved(stored: torch.Tensor, length: int, capacity: int) -> torch.Tensor:
    moved = _empty_like(stored, capacity)
    moved[:, :, :length] = stored[:, :, :length]
    return moved


@dataclass(frozen=True)
class Prefilled:
    """Support sets that the model has read, padded on the left to one length.

    cache: keys and values, [S, ...]. mask [S, P]: 1 where a token is real, 0 where it is padding. next_position [S]: the
    position of the first token that follows each support set. longest: of each set, the tokens that must fit the context.
    parts: of each independent set, where its head and its examples are; empty where sets are ordered. orientations: of each set, in
    which its pictures are, and are those of a question behind it.
    """

    cache: Cache
    mask: torch.Tensor
    next_position: torch.Tensor
    longest: tuple[int, ...]
    parts: tuple[tuple[tuple[Part, slice], ...], ...] = ()
    orientations: tuple[int, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is no support set at all, so that questions stand alone."""
        return self.mask.shape[1] == 0

    @property
    def divisions(self) -> int:
        """The sets as they are, not in other orientations: of one set in parts, how many these are."""
        return self.orientations.count(1)

    @property
    def bytes(self) -> int:
        """Bytes of all keys and values, with the room behind them."""
        return sum(layer.bytes for layer in self.cache.layers)

    @contextmanager
    def room_for(self, tokens: int) -> Iterator[None]:
        """Room for so many tokens behind the support sets. What is read inside the block is taken back at its end, also
        after an error.

        Where a layer has less room, it is enlarged, one layer after another, and gets its former size at the end.
        """
        layers: list[InPlaceLayer] = self.cache.layers
        length = self.mask.shape[1]
        capacities = [layer.capacity for layer in layers]
        try:
            for layer in layers:
                if not layer.capacity:
                    layer.reserved = tokens
                elif layer.capacity < length + tokens:
                    layer.resize(length + tokens)
            yield
        finally:
            for layer in layers:  # first, because giving room back can itself run out of memory
                if layer.length > length:
                    layer.crop(length - layer.length)
            for layer, capacity in zip(layers, capacities, strict=True):
                layer.truncate(length, capacity)


def new_cache(layers: int, reserved: int = 0) -> Cache:
    """An empty cache of so many layers, each with room for ``reserved`` tokens."""
    return Cache(layers=[InPlaceLayer(reserved) for _ in range(layers)])
