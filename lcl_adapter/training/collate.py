"""Rows -> tensors: padding, who may see whom, and which batches go together; training's half of what the encoder makes.

Several queries behind one support set share a row: each sees the support set and itself, and its positions restart after
the support set, so that it cannot tell that others are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from lcl_adapter.base.encoder import IGNORED, Encoded, Encoder, position_ids
from lcl_adapter.data.conversations import WORDINGS, Conversation, to_conversation
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import DataError, EpisodeError
from lcl_adapter.recipe.sources import QuestionReader

ATTEMPTS = 200  # with one photo in five broken, an episode of eight is whole one time in six


def pad_to(length: int, multiple: int = 16) -> int:
    """Rows are padded to a multiple, so that few shapes occur."""
    return -(-length // multiple) * multiple


def attention(branch: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Who sees whom: bool [B, 1, T, T], true where row token i may look at token j.

    j is not after i, is no padding, and is shared or of i's own branch. Padding looks at itself, so that no softmax is
    over nothing.
    """
    length = branch.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    related = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    allowed = causal & related & padding[:, None, :]
    return (allowed | torch.eye(length, dtype=torch.bool))[:, None]


def collate(rows: Sequence[Encoded], pad: int) -> dict[str, Any]:
    """Right-padded tensors [B, T]; a block mask only where a row has several branches. ``pictures`` stay references."""
    length = pad_to(max(len(row) for row in rows))

    def stacked(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([getattr(row, name) + [fill] * (length - len(row)) for row in rows])

    padding = torch.arange(length)[None] < torch.tensor([[len(row)] for row in rows])
    branch = stacked("branch", 0)
    single = max(max(row.branch) for row in rows) <= 1
    return {
        "input_ids": stacked("ids", pad),
        "labels": stacked("labels", IGNORED),
        "attention_mask": padding.long() if single else attention(branch, padding),
        "position_ids": position_ids([row.positions for row in rows], length),
        "pictures": [picture for row in rows for picture in row.pictures],
    }


@dataclass
class Collator:
    """Indices -> a batch. A conversation with a bad picture or text is replaced by another of its source, and told of.

    ``check`` opens a picture or raises DataError; with ``on_fault="refuse"`` its error stops the run.
    """

    mixture: Mixture
    encoder: Encoder
    check: Callable[[Picture], object] | None = None
    on_fault: str = "skip"

    def __call__(self, examples: Sequence[dict[str, int]]) -> dict[str, Any]:
        faults: list[str] = []
        rows = [self.row(example["index"], faults) for example in examples]
        counts = [
            (self.mixture.slot(example["index"]).source, len(row), sum(label != IGNORED for label in row.labels))
            for example, row in zip(examples, rows, strict=True)
        ]
        return collate(rows, self.encoder.pad) | {"faults": faults, "counts": counts}

    def conversation(self, index: int, attempt: int = 0) -> Conversation:
        return to_conversation(self.mixture.draw(index, attempt), WORDINGS[self.mixture.recipe.wording])

    def row(self, index: int, faults: list[str] | None = None) -> Encoded:
        """The row at ``index``; what had to be replaced on the way is added to ``faults``.

        Raises EpisodeError where it does not fit the context; DataError after 200 bad ones in a row.
        """
        return self.usable(index, faults)[1]

    def usable(self, index: int, faults: list[str] | None = None) -> tuple[Conversation, Encoded]:
        """The conversation at ``index``, or the first after it of the same source without a fault, and its row; raises as :meth:`row`."""
        for attempt in range(ATTEMPTS):
            try:
                conversation = self.conversation(index, attempt)
                if self.check is not None:
                    for picture in conversation.pictures:
                        self.check(picture)
                return conversation, self.encoder.conversation(conversation)
            except DataError as error:
                options = self.mixture.options[self.mixture.slot(index).source]
                strict = (
                    isinstance(options, QuestionReader) and options.reads_late and options.on_fault == "refuse"
                )  # whose samples were not read before
                if self.on_fault == "refuse" or strict:
                    raise
                last = str(error)
            except EpisodeError as error:
                options = self.mixture.options[self.mixture.slot(index).source]
                if not isinstance(options, QuestionReader) or options.on_fault == "refuse":
                    raise
                last = str(error)
            if faults is not None:
                faults.append(last)
        raise DataError(f"{ATTEMPTS} conversations in a row had a bad picture or text; the last: {last}")


class BucketedOrder(Sampler[int]):
    """Indices in batches of like length: drawn ``window`` batches at a time, sorted by length, batches shuffled.

    A pure function of (seed, window number), so a resumed run sees the same batches.
    """

    def __init__(self, collator: Collator, total: int, batch: int, window: int, seed: int) -> None:
        self.collator, self.total, self.batch, self.window, self.seed = collator, total, batch, window, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        span = self.batch * self.window
        unread = replace(self.collator, check=None)  # lengths need no pictures
        for number, start in enumerate(range(0, self.total, span)):
            indices = list(range(start, min(start + span, self.total)))
            if self.window > 1:
                lengths = {i: len(unread.row(i)) for i in indices}
                indices.sort(key=lambda i: (lengths[i], i))
            batches = [indices[i : i + self.batch] for i in range(0, len(indices), self.batch)]
            full = [b for b in batches if len(b) == self.batch]
            for place in np.random.default_rng([self.seed, number, 13]).permutation(len(full)):
                yield from full[place]
            for rest in batches[len(full) :]:
                yield from rest
