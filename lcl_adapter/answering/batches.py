"""Which support sets and questions go through the model together: as many as the free memory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lcl_adapter import devices
from lcl_adapter.answering.room import Load, Widths, needed
from lcl_adapter.answering.rows import EncodedQuestion
from lcl_adapter.data.conversations import Turn
from lcl_adapter.errors import EpisodeError
from lcl_adapter.terminal import console

QUESTIONS_PER_PASS = 8  # questions behind one support set that the model reads at a time
SHARE_OF_FREE = 0.8  # of the free memory; the rest is for the tower's batch and for gaps between allocations


@dataclass(frozen=True)
class SetOfRequests:
    """A support set of ``length`` tokens, with the indices of the requests about it and their questions."""

    support: tuple[Turn, ...]
    members: list[int]
    length: int
    questions: list[EncodedQuestion]


Batch = tuple[list[SetOfRequests], int]  # support sets of one pass, and how many questions of each go together


def packs(questions: Sequence[EncodedQuestion], pack: int) -> Iterator[Sequence[EncodedQuestion]]:
    """The questions about one support set, ``pack`` at a time."""
    for start in range(0, len(questions), pack):
        yield questions[start : start + pack]


def room(one: SetOfRequests, pack: int, new_tokens: int) -> int:
    """The tokens that the largest of a set's passes puts behind it."""
    return max(sum(q.tokens for q in some) + new_tokens * len(some) for some in packs(one.questions, pack))


def load_of(sets: Sequence[SetOfRequests], pack: int, new_tokens: int) -> Load:
    """What the largest pass over these sets reads. new_tokens: generated for each question."""
    return Load(
        sets=len(sets),
        support=max(one.length for one in sets),
        packed=max(sum(q.tokens for q in some) for one in sets for some in packs(one.questions, pack)),
        scored=sum(max(sum(q.places for q in some) for some in packs(one.questions, pack)) for one in sets),
        generated=new_tokens * min(pack, max(len(one.questions) for one in sets)),
    )


def largest_batch(widths: Widths, size: int, load: Load, sets: int, pack: int, memory: int) -> tuple[int, int]:
    """The support sets, and the questions about each, that fit into ``memory`` bytes together: at least 1 and 1.

    load: of one set with one question. Questions are reduced only where one set does not fit with all of them.
    """

    def fits(sets: int, pack: int) -> bool:
        return needed(widths, size, load.times(sets, pack)) <= memory

    while pack > 1 and not fits(1, pack):
        pack //= 2
    while sets > 1 and not fits(sets, pack):
        sets -= 1
    return sets, pack


class Limits:
    """How much goes through the model together. A lack of memory that shows only at work lowers the limits.

    size: bytes of an activation. device: "cuda", "mps" or "cpu". sets: support sets of a pass. pack: questions behind one.
    """

    def __init__(self, widths: Widths, size: int, device: str, sets: int, pack: int) -> None:
        self.widths, self.size, self.device, self.sets, self.pack = widths, size, device, sets, pack

    def batches(self, sets: Iterable[SetOfRequests], new_tokens: int) -> Iterator[Batch]:
        """The sets in their order, as many together as fit."""
        batch: list[SetOfRequests] = []
        for one in sets:
            if batch and (len(batch) >= self.sets or not self._fits([*batch, one], self.pack, new_tokens)):
                yield batch, self._largest_pack(batch, new_tokens)
                batch = []
            batch.append(one)
        if batch:
            yield batch, self._largest_pack(batch, new_tokens)

    def _fits(self, sets: Sequence[SetOfRequests], pack: int, new_tokens: int) -> bool:
        return needed(self.widths, self.size, load_of(sets, pack, new_tokens)) <= SHARE_OF_FREE * devices.free_memory(self.device)

    def _largest_pack(self, sets: Sequence[SetOfRequests], new_tokens: int) -> int:
        """The questions that go together. One is tried in every case."""
        pack = self.pack
        while pack > 1 and not self._fits(sets, pack, new_tokens):
            pack //= 2
        return pack

    def parts_that_fit(self, batch: Batch, answer: Callable[[Sequence[SetOfRequests], int], dict[int, Any]]) -> Iterator[dict[int, Any]]:
        """``answer(sets, pack)`` of the batch. Where memory runs out, its halves are answered one after the other.

        Raises EpisodeError where one question about one set does not fit.
        """
        waiting = [batch]
        while waiting:
            sets, pack = waiting.pop()
            try:
                answered = answer(sets, pack)
            except RuntimeError as error:
                if not devices.is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            else:
                yield answered
                continue
            # Outside the except block, because the error holds the tensors of the failed pass
            devices.release_memory()
            pack = min(pack, max(len(one.questions) for one in sets))
            if len(sets) > 1:
                half = len(sets) // 2
                self.sets = min(self.sets, half)
                waiting += [(sets[half:], pack), (sets[:half], pack)]
                smaller = f"{half} support sets at a time" if half > 1 else "one support set at a time"
            elif pack > 1:
                self.pack = min(self.pack, pack // 2)
                waiting.append((sets, self.pack))
                smaller = f"{self.pack} questions at a time" if self.pack > 1 else "one question at a time"
            else:
                raise EpisodeError(
                    f"a support set of {sets[0].length} tokens with one question does not fit this device's memory ({reason}): "
                    "show fewer photos, or use a lower precision."
                )
            console.print(f"memory ran out ({reason}): going on with {smaller}", style="yellow", markup=False, highlight=False)
