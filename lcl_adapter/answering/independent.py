"""Support sets whose labelled pictures do not see each other: each picture is read in a row of its own, behind the text
before the first one, and its keys and values are copied to their place. Of a compressed set, those of the pictures themselves are
not copied: what a question sees are the words beside them.

So the cost of a set grows with the number of its pictures and not with its square, and what another set has read is not read
again.

Shapes: S support sets, P tokens of the longest, R rows, L tokens of the longest row, N tokens that are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import Cache

from lcl_adapter.answering.cache import Part, Prefilled, new_cache
from lcl_adapter.base.encoder import Position, Support
from lcl_adapter.data.conversations import Turn

TOKENS_PER_PASS = 8192
HEAD: Part = ()  # the text before the first picture
# Reads rows of (ids, positions, turns) into an empty cache, padded on the right to one length
ReadRows = Callable[[Sequence[tuple[list[int], list[Position], Part]], Cache], None]


@dataclass(frozen=True)
class PictureRow:
    """An example behind its set's head. copies: (token of the row, set, place of that token in the set)."""

    ids: list[int]
    positions: list[Position]
    turns: Part
    copies: tuple[tuple[int, int, int], ...]


def parts_of(support: Support, turns: Sequence[Turn], end: int) -> tuple[tuple[Part, slice], ...]:
    """The head and the examples of a set, and where their visible tokens are if the set ends at ``end``. An ordered set is one
    example.
    """
    place = end - support.visible
    if not support.examples:
        return ((tuple(turns), slice(place, end)),)
    parts = [(HEAD, slice(place, place + support.head))]
    place += support.head
    for number, own in enumerate(support.examples):
        visible = own.stop - own.start - sum(support.hidden[own])
        parts.append((tuple(turns[2 * number : 2 * number + 2]), slice(place, place + visible)))
        place += visible
    return tuple(parts)


def fill(
    cache: Cache, supports: Sequence[Support], parts: Sequence[Sequence[tuple[Part, slice]]], known: Sequence[Prefilled], read: ReadRows
) -> None:
    """Put the keys and values of sets into an empty cache, padded on the left to one length.

    parts: as of :func:`parts_of`. known: sets that the same model has read; what they have of these is copied.
    """
    end = parts[0][-1][1].stop
    sources = {part: (prefilled, number, place) for prefilled in known for number, own in enumerate(prefilled.parts) for part, place in own}
    rows: list[PictureRow] = []
    for number, (support, own) in enumerate(zip(supports, parts, strict=True)):
        spans = iter(support.examples or [slice(0, len(support))])
        head_is_written = HEAD in sources or not support.head
        for part, place in own:
            span = next(spans) if part != HEAD else None
            if part in sources:
                _copy(cache, (len(supports), end), *sources[part], number, place)
            elif span is not None:
                rows.append(_row(support, span, part, number, place.start, None if head_is_written else own[0][1].start))
                head_is_written = True
    for batch in _batches(rows):
        temporary = new_cache(len(cache.layers), max(len(row.ids) for row in batch))
        read([(row.ids, row.positions, row.turns) for row in batch], temporary)
        indices = [(line, *copied) for line, row in enumerate(batch) for copied in row.copies]
        for layer, read_layer in zip(cache.layers, temporary.layers, strict=True):
            layer.open_for(read_layer, len(supports), end)
            line_N, token_N, set_N, place_N = torch.tensor(indices, device=read_layer.keys.device).T
            layer.keys[set_N, :, place_N] = read_layer.keys[line_N, :, token_N]
            layer.values[set_N, :, place_N] = read_layer.values[line_N, :, token_N]


def _row(support: Support, span: slice, part: Part, number: int, start: int, head_start: int | None) -> PictureRow:
    """The example at ``span`` of a set, whose visible tokens go to ``start``. head_start: where its head goes, if anywhere."""
    head = support.head
    visible = [head + token for token, hidden in enumerate(support.hidden[span]) if not hidden]
    copies = [(token, number, start + place) for place, token in enumerate(visible)]
    if head_start is not None:
        copies += [(token, number, head_start + token) for token in range(head)]
    return PictureRow(support.ids[:head] + support.ids[span], support.positions[:head] + support.positions[span], part, tuple(copies))


def _copy(cache: Cache, shape: tuple[int, int], source: Prefilled, number: int, place: slice, to_number: int, to_place: slice) -> None:
    """Copy a part of a set that was read before. shape: sets, and tokens of the longest."""
    for layer, other in zip(cache.layers, source.cache.layers, strict=True):
        layer.open_for(other, *shape)
        layer.keys[to_number, :, to_place] = other.keys[number, :, place]
        layer.values[to_number, :, to_place] = other.values[number, :, place]


def _batches(rows: Sequence[PictureRow]) -> Iterator[list[PictureRow]]:
    """Rows of similar length together, as many as have TOKENS_PER_PASS tokens with their padding."""
    batch: list[PictureRow] = []
    for row in sorted(rows, key=lambda one: len(one.ids)):
        if batch and (len(batch) + 1) * len(row.ids) > TOKENS_PER_PASS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
