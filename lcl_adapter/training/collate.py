"""Encoded rows -> batches for training: padding, the attention mask, and the order of rows.

Several queries behind one support set share a row (``lcl_adapter.base.encoder``), and so do whole conversations
(``lcl_adapter.training.packing``): the mask separates them.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Sampler, get_worker_info

from lcl_adapter.base.encoder import IGNORED, Encoded, Encoder, position_ids
from lcl_adapter.data.conversations import Conversation, pooled_to, to_conversation, wording_of
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import Picture, read_image
from lcl_adapter.errors import DataError, EpisodeError, UserError
from lcl_adapter.randomness import generator
from lcl_adapter.recipe.sources import QuestionReader
from lcl_adapter.training.packing import join, layout, pad_to, places_of

ATTEMPTS = 200  # with one photo in five broken, one episode of eight photos in six has none of them


def attention_mask(
    part_BT: torch.Tensor, branch_BT: torch.Tensor, example_BT: torch.Tensor, hidden_BT: torch.Tensor, real_BT: torch.Tensor
) -> torch.Tensor:
    """bool [B, 1, T, T], true where token i may attend to token j. ``real`` is false for padding.

    j is not after i, is no padding, is of i's own part, and is shared or of i's own branch. Inside a support set it is of i's own
    example, or of none. A query sees no hidden token. Every token attends to itself, padding too, so that no softmax is over an empty set.
    """
    length = branch_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool).tril()
    asks_BT1, hidden_B1T = (branch_BT > 0)[:, :, None], (hidden_BT > 0)[:, None, :]
    related_BTT = _own(part_BT) & _none_or_own(branch_BT) & (_none_or_own(example_BT) | asks_BT1) & ~(asks_BT1 & hidden_B1T)
    allowed_BTT = causal_TT & related_BTT & real_BT[:, None, :]
    return (allowed_BTT | torch.eye(length, dtype=torch.bool))[:, None]


def _own(number_BT: torch.Tensor) -> torch.Tensor:
    """[B, T, T], true where j has i's number."""
    return number_BT[:, None, :] == number_BT[:, :, None]


def _none_or_own(number_BT: torch.Tensor) -> torch.Tensor:
    """[B, T, T], true where j has the number 0, or i's."""
    return (number_BT == 0)[:, None, :] | _own(number_BT)


def collate(rows: Sequence[Encoded], pad: int) -> dict[str, Any]:
    """Tensors [B, T], padded on the right, with the names of the model's arguments. ``pictures`` are not read.

    The attention mask is [B, T] where no row has several parts, branches or independent examples, or hidden tokens, else [B, 1, T, T].
    """
    length = pad_to(max(len(row) for row in rows))

    def padded(field: str, fill: int) -> torch.Tensor:
        return torch.tensor([getattr(row, field) + [fill] * (length - len(row)) for row in rows])

    real_BT = torch.arange(length)[None] < torch.tensor([[len(row)] for row in rows])
    causal = max(max(*row.branch, *row.example) for row in rows) <= 1 and not any(row.part[-1] or any(row.hidden) for row in rows)
    mask = real_BT.long() if causal else attention_mask(padded("part", 0), padded("branch", 0), padded("example", 0), padded("hidden", 0), real_BT)
    return {
        "input_ids": padded("ids", pad),
        "labels": padded("labels", IGNORED),
        "attention_mask": mask,
        "position_ids": position_ids([row.positions for row in rows], length),
        "pictures": [picture for row in rows for picture in row.pictures],
    }


class Readable:
    """Opens each picture once, and raises DataError for a broken one. It remembers the readable ones."""

    def __init__(self) -> None:
        self._readable: set[Picture] = set()

    def __reduce__(self) -> tuple[type[Readable], tuple[()]]:
        return type(self), ()  # each process that loads data remembers its own

    def __call__(self, picture: Picture) -> None:
        if picture not in self._readable:
            read_image(picture)
            # Equal to the picture, without the file's bytes
            self._readable.add(replace(picture, data=None))


@dataclass
class Collator:
    """Indices of the mixture -> a batch. It is pickled into the processes that load data, so it holds no model.

    A conversation with a bad picture or text is replaced by another of its source. The batch lists such faults, counts
    (source, tokens, learned tokens) of its conversations, and their places. In a process that loads data, an error that ends the run becomes
    the batch's ``error``, because its message would otherwise arrive inside a traceback.
    check: opens a picture or raises DataError. on_fault: "refuse" stops the run at such an error.
    """

    mixture: Mixture
    encoder: Encoder
    check: Callable[[Picture], object] | None = None
    on_fault: str = "skip"

    def __call__(self, examples: Sequence[dict[str, int]]) -> dict[str, Any]:
        try:
            return self._batch(examples)
        except UserError as error:
            if get_worker_info() is None:
                raise
            return {"labels": torch.full((len(examples), 1), IGNORED), "error": error}

    def _batch(self, examples: Sequence[dict[str, int]]) -> dict[str, Any]:
        faults: list[str] = []
        rows = [self.row(example["index"], faults) for example in examples]
        counts = [
            (self.mixture.slot(example["index"]).source, len(row), sum(label != IGNORED for label in row.labels))
            for example, row in zip(examples, rows, strict=True)
        ]
        lengths = [len(row) for row in rows]
        near = [number for number, (source, *_) in enumerate(counts) if source in self.mixture.recipe.near_base]
        # The base reads the rows with those once more
        together = layout(lengths, self.budget, self.encoder.width, near)
        packed = [join([rows[number] for number in numbers]) for numbers in together]
        return collate(packed, self.encoder.pad) | {"faults": faults, "counts": counts, "places": places_of(lengths, together)}

    @property
    def budget(self) -> int | None:
        """The most tokens of a packed row."""
        return self.mixture.recipe.train.tokens_per_batch

    def conversation(self, index: int, attempt: int = 0) -> Conversation:
        """The conversation at ``index``; ``attempt`` counts its replacements."""
        recipe = self.mixture.recipe
        conversation = to_conversation(self.mixture.draw(index, attempt), wording_of(recipe))
        if len(numbers := recipe.image_tokens.numbers) < 2:
            return conversation
        tokens = int(generator("support tokens", recipe.train.seed, index).choice(numbers))
        return replace(conversation, shared=pooled_to(conversation.shared, tokens))

    def row(self, index: int, faults: list[str] | None = None) -> Encoded:
        """The row at ``index``. The faults of replaced conversations are added to ``faults``.

        Raises EpisodeError where it does not fit the context or ``tokens_per_batch``; DataError after 200 bad conversations in a
        row.
        """
        return self.usable(index, faults)[1]

    def usable(self, index: int, faults: list[str] | None = None) -> tuple[Conversation, Encoded]:
        """The conversation at ``index`` and its row, or the first replacement from the same source without a fault.

        Raises as :meth:`row`.
        """
        for attempt in range(ATTEMPTS):
            try:
                conversation = self.conversation(index, attempt)
                if self.check is not None:
                    for picture in conversation.pictures:
                        self.check(picture)
                row = self.encoder.conversation(conversation)
                self.check_budget(conversation.origin, len(row))
                return conversation, row
            except (DataError, EpisodeError) as error:
                if self.refuses(self.mixture.slot(index).source, error):
                    raise
                last = str(error)
            if faults is not None:
                faults.append(last)
        raise DataError(f"{ATTEMPTS} conversations in a row had a bad picture or text; the last: {last}")

    def check_budget(self, origin: str, tokens: int) -> None:
        """Raises EpisodeError for a row that is longer than a packed row may be."""
        if self.budget is not None and tokens > self.budget:
            raise EpisodeError(
                f"{origin}: a row of {tokens} tokens does not fit `train.tokens_per_batch: {self.budget}`. Set {tokens} or more, or make the row "
                "shorter: fewer `shots`, `ways`, `queries` or `packed`."
            )

    def refuses(self, source: str, error: UserError) -> bool:
        """Whether an error of one conversation ends the run. If not, the conversation is left out and counted."""
        options = self.mixture.options[source]
        strict = not isinstance(options, QuestionReader) or options.on_fault == "refuse"
        if isinstance(error, EpisodeError):
            return strict
        # Samples of shards are read for the first time when their row is made
        return self.on_fault == "refuse" or (strict and getattr(options, "reads_late", False))


class BucketedOrder(Sampler[int]):
    """Indices in batches of similar length.

    ``window`` batches at a time are sorted by length, then the batches are shuffled. The order depends on the seed and
    the number of the window only, so a resumed run has the same batches.
    """

    def __init__(self, collator: Collator, total: int, batch: int, window: int, seed: int) -> None:
        self.collator, self.total, self.batch, self.window, self.seed = collator, total, batch, window, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        span = self.batch * self.window
        lengths_only = replace(self.collator, check=None)  # does not open pictures
        for number, start in enumerate(range(0, self.total, span)):
            indices = list(range(start, min(start + span, self.total)))
            if self.window > 1:
                lengths = {i: len(lengths_only.row(i)) for i in indices}
                indices.sort(key=lambda i: (lengths[i], i))
            batches = [indices[i : i + self.batch] for i in range(0, len(indices), self.batch)]
            full = [batch for batch in batches if len(batch) == self.batch]
            for place in generator("batch order", self.seed, number).permutation(len(full)):
                yield from full[place]
            for rest in batches[len(full) :]:
                yield from rest
