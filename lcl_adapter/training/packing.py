"""Whole rows laid one behind the other into longer rows, so that fewer tokens of a batch are padding.

With ``train.tokens_per_batch: N`` a batch is the same ``per_device_train_batch_size`` conversations of the schedule as
without, so that shares, seeds, epochs, resuming and each token's weight in the loss do not depend on N. They are laid into rows of
at most N tokens, by first fit, the longest first. Of the layouts within N the cheapest is taken: each token of the tensor,
padding too, costs the same in the linear layers, and in proportion to its row in attention, which reads the whole row. So little
padding is not bought with long rows where the language model is narrow. The rows as they are, are one of the layouts. So N
never adds a token to a batch, and the memory of its activations is bounded as without it.

A step that holds as many conversations as N allows would fill its rows a little better. Its number of conversations, and so its
gradient and a run's shares, would depend on the lengths of texts and on the base's tokenizer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lcl_adapter.base.encoder import IGNORED, Encoded

MULTIPLE = 16
# A row of so many widths of the language model costs as much in attention as in the linear layers: 4 T d operations a token against
# 24 d^2, where the MLP has 2.7 d
EQUAL = 6


def pad_to(length: int, multiple: int = MULTIPLE) -> int:
    """The length that rows are padded to: a multiple, so that few shapes occur."""
    return -(-length // multiple) * multiple


@dataclass(frozen=True)
class Place:
    """Where a conversation is in its batch: the row, and its tokens [start, stop)."""

    row: int
    start: int
    stop: int


def join(rows: Sequence[Encoded]) -> Encoded:
    """One row of several, each a part of its own.

    The first token of a part is not learned: in a row of its own no token predicts it.
    """
    if len(rows) == 1:
        return rows[0]
    return Encoded(
        ids=[token for row in rows for token in row.ids],
        labels=[label for row in rows for label in (IGNORED, *row.labels[1:])],
        branch=[branch for row in rows for branch in row.branch],
        example=[example for row in rows for example in row.example],
        positions=[position for row in rows for position in row.positions],
        pictures=tuple(picture for row in rows for picture in row.pictures),
        part=[number for number, row in enumerate(rows) for _ in row.ids],
        hidden=[hidden for row in rows for hidden in row.hidden],
    )


def layout(lengths: Sequence[int], budget: int | None, width: int, first: Collection[int] = ()) -> list[list[int]]:
    """Which rows share one: their indices, in order. Without a budget each stays alone.

    budget: the most tokens of a row. A longer one stays alone. width: of the language model. first: indices that are laid before
    the others, so that few rows hold them.
    """
    if budget is None:
        return [[index] for index in range(len(lengths))]
    order = sorted(range(len(lengths)), key=lambda i: (i not in first, -lengths[i], i))
    longest = pad_to(max(lengths))

    def cost(count: int, tokens: int) -> int:
        """Of so many rows of so many tokens, in operations that are alike."""
        return count * tokens * (EQUAL * width + tokens)

    best, least = [[index] for index in order], cost(len(lengths), longest)
    for limit in sorted({*range(longest, budget, MULTIPLE), budget}):
        rows = _first_fit(lengths, order, limit)
        needed = cost(len(rows), pad_to(max(sum(lengths[i] for i in row) for row in rows)))
        if needed < least:
            best, least = rows, needed
    return best


def _first_fit(lengths: Sequence[int], order: Sequence[int], limit: int) -> list[list[int]]:
    rows: list[list[int]] = []
    rooms: list[int] = []  # tokens that each row still has room for
    for index in order:
        place = next((number for number, room in enumerate(rooms) if lengths[index] <= room), None)
        if place is None:
            place = len(rows)
            rows.append([])
            rooms.append(limit)
        rows[place].append(index)
        rooms[place] -= lengths[index]
    return rows


def places_of(lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> list[Place]:
    """Where each conversation is. rows: of :func:`layout`."""
    places: dict[int, Place] = {}
    for number, row in enumerate(rows):
        start = 0
        for index in row:
            places[index] = Place(number, start, start + lengths[index])
            start += lengths[index]
    return [places[index] for index in range(len(lengths))]


def widest(row: Encoded, count: int, budget: int | None) -> list[Encoded]:
    """``count`` such rows, laid into rows as long as a layout may have: the batch that needs the most memory."""
    most = max(1, min(count, (budget or 0) // len(row)))
    together = max(number for number in range(1, most + 1) if -(-count // number) * pad_to(number * len(row)) <= count * pad_to(len(row)))
    return [join([row] * min(together, count - start)) for start in range(0, count, together)]
