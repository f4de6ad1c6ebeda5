"""Turns -> tensors: token ids with room for every image, exact labels, and who may see whom.

Rules kept here: loss on learned answers alone, training ids are inference ids, nothing is ever cut. Several queries
behind one support set share a row: each sees the support set and itself, and its positions restart after the support
set, so that it cannot tell that others are there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from lcl_adapter.base.families import IMAGE, Family, Rendered
from lcl_adapter.data.conversations import Conversation, Turn
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import DataError, EpisodeError

IGNORED = -100
Position = int | tuple[int, int, int]  # a place, or one in time, row and column for models that turn images by them


@dataclass(frozen=True)
class Encoded:
    """One row, as long as it is. ``branch`` is 0 for the shared opening and k for the k-th query; all [T]."""

    ids: list[int]
    labels: list[int]
    branch: list[int]
    positions: list[Position]
    pictures: tuple[Picture, ...]

    def __len__(self) -> int:
        return len(self.ids)


class Encoder:
    """Tokenises rendered turns for one base.

    The text is split at ``<image>`` and each part tokenised, as upstream LLaVA does; an image becomes the tokens in
    ``image``, most of them ``image_token_id``. grid: rows and columns that an image's features stand in, for models
    whose positions count them.
    """

    def __init__(
        self, family: Family, tokenizer: Any, image_token_id: int, image: Sequence[int], context: int, grid: tuple[int, int] | None = None
    ) -> None:
        self.family = family
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.image = list(image)
        self.context = context
        self.grid = grid
        self.bos: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.eos: int = tokenizer.convert_tokens_to_ids(family.end)
        self.pad: int = self.eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._part = lru_cache(maxsize=8192)(self._tokenise)

    @cached_property
    def _special_tokens(self) -> re.Pattern[str]:
        """Every text that the tokenizer, or the prompt, reads as a token of its own."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        tokens = {IMAGE, self.family.end, *self.family.special_tokens, *self.tokenizer.all_special_tokens, *added}
        return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token.strip()))

    def special_token_in(self, text: str) -> str | None:
        """The first special token that a text holds. A user's text must hold none: it would be read as a part of the prompt's frame."""
        match = self._special_tokens.search(text)
        return match[0] if match else None

    def _refuse_special_tokens(self, turn: Turn) -> None:
        """Raises DataError for a special token in a turn's text, or for another number of ``<image>`` than it has pictures."""
        if turn.further and turn.text.count(IMAGE) != len(turn.pictures):
            raise DataError(f"the text {turn.text!r} has {turn.text.count(IMAGE)} {IMAGE}, there are {len(turn.pictures)} images.")
        token = self.special_token_in(turn.text.replace(IMAGE, " ") if turn.further else turn.text)
        if token is not None:
            raise DataError(f"the text {turn.text!r} holds {token!r}, a special token of this model: change it.")

    @property
    def tokens_an_image(self) -> int:
        return len(self.image)

    def positions(self, ids: Sequence[int], start: int = 0) -> tuple[list[Position], int]:
        """Where each token stands, and where the next one would; an image in a grid takes as many places as its longer side."""
        if self.grid is None:
            return list(range(start, start + len(ids))), start + len(ids)
        rows, columns = self.grid
        found: list[Position] = []
        inside = 0
        for token in ids:
            if token == self.image_token_id:
                found.append((start, start + inside // columns, start + inside % columns))
                inside += 1
                if inside == rows * columns:
                    start, inside = start + max(rows, columns), 0
            else:
                found.append((start, start, start))
                start += 1
        return found, start

    def turns(self, turns: Sequence[Turn], opened: bool = False, first: bool = True) -> tuple[list[int], list[int]]:
        """Ids and labels of turns; with ``first=False``, of turns that go on after an answer's end.

        Raises DataError where a text holds a special token.
        """
        for turn in turns:
            self._refuse_special_tokens(turn)
        rendered = self.family.render(turns, opened, first)
        if first:
            ids, labels = self._encode(rendered)
            return self.bos + ids, [IGNORED] * len(self.bos) + labels
        # What a tokenizer makes of a text's beginning can depend on what stands before it: give it the end mark, take it away.
        shift = len(self.family.end)
        moved = Rendered(self.family.end + rendered.text, tuple((a + shift, b + shift) for a, b in rendered.learned))
        ids, labels = self._encode(moved)
        return ids[1:], labels[1:]

    def conversation(self, conversation: Conversation) -> Encoded:
        """A whole row: the shared opening, then every branch.

        Raises EpisodeError where it would not fit the context, or where nothing in it is learned.
        """
        first = not conversation.shared
        ids, labels = ([], []) if first else self.turns(conversation.shared)
        shared = len(ids)
        branch = [0] * shared
        positions, begins = self.positions(ids)
        for number, turns in enumerate(conversation.branches, 1):
            more_ids, more_labels = self.turns(turns, first=first)
            ids, labels = ids + more_ids, labels + more_labels
            branch += [number] * len(more_ids)
            positions += self.positions(more_ids, begins)[0]
        longest = shared + max((branch.count(n) for n in range(1, len(conversation.branches) + 1)), default=0)
        if longest > self.context:
            what = f"{longest} tokens ({len(conversation.pictures)} images of {self.tokens_an_image}) do not fit the context of {self.context}"
            alone = "Shorten it, or set `on_fault: skip` for its source."
            remedy = "Lower `shots` or `ways`, or use `wording: short`." if conversation.shared else alone
            raise EpisodeError(f"{conversation.origin}: {what}. {remedy}")
        if all(label == IGNORED for label in labels):
            raise EpisodeError(f"{conversation.origin}: nothing in it is learned; check the record's answers.")
        return Encoded(ids, labels, branch, positions, conversation.pictures)

    def _encode(self, rendered: Rendered) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        start = 0
        for number, part in enumerate(rendered.text.split(IMAGE)):
            if number:
                ids += self.image
                labels += [IGNORED] * len(self.image)
                start += len(IMAGE)
            part_ids, ends = self._part(part)
            ids += part_ids
            labels += [
                token if any(a < start + end <= b for a, b in rendered.learned) else IGNORED for token, end in zip(part_ids, ends, strict=True)
            ]
            start += len(part)
        return ids, labels

    def _tokenise(self, part: str) -> tuple[list[int], list[int]]:
        encoded = self.tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]


def check_alignment(encoder: Encoder, conversation: Conversation) -> None:
    """Training ids must begin with the ids that inference will send, and the pieces must make up the whole.

    Raises EpisodeError where the tokenizer joins a mark and an answer into one token.
    """
    encoded = encoder.conversation(conversation)
    branch = conversation.branches[0]
    whole, labels = encoder.turns([*conversation.shared, *branch])
    prompt, _ = encoder.turns([*conversation.shared, *branch[:-1]], opened=True)
    row = [t for t, b in zip(encoded.ids, encoded.branch, strict=True) if b in {0, 1}]
    first_learned = next(i for i, label in enumerate(labels[len(prompt) :], len(prompt)) if label != IGNORED)
    if whole != row or whole[: len(prompt)] != prompt or first_learned != len(prompt):
        raise EpisodeError(f"{conversation.origin}: this tokenizer joins turns or answers, so training would not match inference.")


def position_ids(rows: Sequence[Sequence[Position]], length: int, left: bool = False) -> torch.Tensor:
    """[B, T], or [3, B, T] where positions are time, row and column; padded with 0 on the right, or on the left."""
    fill: Position = (0, 0, 0) if any(isinstance(p, tuple) for row in rows for p in row[:1]) else 0
    pads = [[fill] * (length - len(row)) for row in rows]
    made = torch.tensor([[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, pads, strict=True)])
    return made.permute(2, 0, 1).contiguous() if made.ndim == 3 else made
