"""Support sets whose labelled pictures do not see each other: each picture is read in a row of its own, behind the text
before the first one, and its keys and values are copied to their place.

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
    """An example behind its set's head. copies: (first token, set, place of that token in the set, how many)."""

    ids: list[int]
    positions: list[Position]
    turns: Part
    copies: tuple[tuple[int, int, int, int], ...]


def parts_of(support: Support, turns: Sequence[Turn], end: int) -> tuple[tuple[Part, slice], ...]:
    """The head and the examples of a set, and where they are if the set ends at ``end``. An ordered set is one example."""
    start = end - len(support)
    if not support.examples:
        return ((tuple(turns), slice(start, end)),)
    pairs = [tuple(turns[i : i + 2]) for i in range(0, len(turns), 2)]
    examples = zip(pairs, support.examples, strict=True)
    return (HEAD, slice(start, start + support.head)), *((pair, slice(start + own.start, start + own.stop)) for pair, own in examples)


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
        start = end - len(support)
        head_is_written = HEAD in sources or not support.head
        for part, place in own:
            if part in sources:
                _copy(cache, (len(supports), end), *sources[part], number, place)
            elif part != HEAD:
                head, tokens = support.head, slice(place.start - start, place.stop - start)
                copies = [(head, number, place.start, place.stop - place.start), *([] if head_is_written else [(0, number, start, head)])]
                ids, positions = support.ids[:head] + support.ids[tokens], support.positions[:head] + support.positions[tokens]
                rows.append(PictureRow(ids, positions, part, tuple(copies)))
                head_is_written = True
    for batch in _batches(rows):
        temporary = new_cache(len(cache.layers), max(len(row.ids) for row in batch))
        read([(row.ids, row.positions, row.turns) for row in batch], temporary)
        indices = [
            (line, first + i, number, place + i) for line, row in enumerate(batch) for first, number, place, count in row.copies for i in range(count)
        ]
        for layer, read_layer in zip(cache.layers, temporary.layers, strict=True):
            layer.open_for(read_layer, len(supports), end)
            line_N, token_N, set_N, place_N = torch.tensor(indices, device=read_layer.keys.device).T
            layer.keys[set_N, :, place_N] = read_layer.keys[line_N, :, token_N]
            layer.values[set_N, :, place_N] = read_layer.values[line_N, :, token_N]


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
