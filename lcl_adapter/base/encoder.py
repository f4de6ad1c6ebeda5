"""Turns -> token ids, labels and positions, with placeholder tokens for every image.

Three rules hold here: only learned answers have labels, training uses the same ids as inference, and nothing is cut.
Several queries behind one support set share a row. Each query attends to the support set and to itself, and its
positions restart after the support set, so the other queries do not influence it.

Where supports are independent, each labelled picture attends to the text before the first picture and to itself, and its
positions restart there. So a set has no order. A query's positions follow those of the longest. In a compressed set, a
query sees of a labelled picture only the text beside it, which has seen the picture (as VoCo-LLaMA, arXiv 2406.12275).

Shapes: B rows, T tokens of a row, X coordinates of a position (time, row, column).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import torch

from lcl_adapter.base.families import IMAGE, Family, Rendered
from lcl_adapter.data.conversations import Conversation, Turn, read_again
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import DataError, EpisodeError
from lcl_adapter.recipe.schema import Supports

IGNORED = -100
NOT_AS_PREDICTED = "Training would not match prediction: change the answer."
# An index, or (time, row, column) for models with rotary embeddings of images in three dimensions
Position = int | tuple[int, int, int]


@dataclass(frozen=True)
class Encoded:
    """One row of T tokens, without padding.

    ``branch`` is 0 in the shared support set and k in the k-th query. ``example`` is k in the k-th labelled picture of
    an independent support set, which sees no other, and 0 elsewhere. ``part`` is k in the k-th of several conversations that
    share a packed row (``lcl_adapter.training.packing``), counted from 0. ``hidden`` is 1 where no query sees a token, and 0
    elsewhere. All lists have length T. ``pictures`` say themselves to how many tokens they are pooled.
    """

    ids: list[int]
    labels: list[int]
    branch: list[int]
    example: list[int]
    positions: list[Position]
    pictures: tuple[Picture, ...]
    part: list[int]
    hidden: list[int]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Support:
    """A support set of P tokens. Lists are [P].

    example, hidden: as of :class:`Encoded`. next_position: of the token that follows. head: tokens before the first picture, which
    every example sees; 0 in an ordered set.
    """

    ids: list[int]
    labels: list[int]
    example: list[int]
    positions: list[Position]
    next_position: int
    hidden: list[int]
    head: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def visible(self) -> int:
        """Tokens that a query sees, whose keys and values are stored."""
        return len(self) - sum(self.hidden)

    @property
    def examples(self) -> list[slice]:
        """Where each example of an independent set is; none of an ordered one."""
        starts = [self.example.index(number) for number in range(1, 1 + max(self.example, default=0))]
        return [slice(a, b) for a, b in pairwise([*starts, len(self)])]

    @property
    def longest(self) -> int:
        """Tokens that must fit the context: the whole of an ordered set, the longest example with its head of an independent one."""
        return self.head + max((part.stop - part.start for part in self.examples), default=len(self))


class Encoder:
    """Tokenises rendered turns for one base.

    The text is split at ``<image>`` and each part is tokenised, as in upstream LLaVA.

    image: the token ids that replace an image, most of them ``image_token_id``. context: the longest row, in tokens.
    grid: rows and columns of an image's features, for models whose positions count them. window: the model's sliding
    window, which limits a row if it is shorter than the context. support_tokens: of a picture that is shown with a label;
    None for as many as any other has. supports: how labelled pictures are read. width: of the language model. readings: how often an
    ordered set is read, one time after the other.
    """

    def __init__(
        self,
        family: Family,
        tokenizer: Any,
        image_token_id: int,
        image: Sequence[int],
        context: int,
        grid: tuple[int, int] | None = None,
        window: int | None = None,
        support_tokens: int | None = None,
        supports: Supports = "ordered",
        width: int = 4096,
        readings: int = 1,
    ) -> None:
        self.family = family
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.image = list(image)
        self.support_tokens = support_tokens
        self.supports = supports
        self.readings = readings
        self.width = width
        self.context = min(context, window or context)
        self.window = window
        self.grid = grid
        self.bos: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.eos: int = tokenizer.convert_tokens_to_ids(family.end)
        self.pad: int = self.eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._part = lru_cache(maxsize=8192)(self._tokenise)

    def __getstate__(self) -> dict[str, Any]:
        """Without the cache of tokenised texts: a process that loads data fills its own."""
        return {name: value for name, value in vars(self).items() if name != "_part"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._part = lru_cache(maxsize=8192)(self._tokenise)

    @cached_property
    def _special_tokens(self) -> re.Pattern[str]:
        """Matches every text that the tokenizer or the prompt reads as a special token."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        tokens = {IMAGE, self.family.end, *self.family.special_tokens, *self.tokenizer.all_special_tokens, *added}
        return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token.strip()))

    def special_token_in(self, text: str) -> str | None:
        """The first special token in a text.

        A user's text must contain none: it would be read as a part of the prompt's frame.
        """
        match = self._special_tokens.search(text)
        return match[0] if match else None

    def _refuse_special_tokens(self, turn: Turn) -> None:
        """Raises DataError for a special token in a turn's text, or another number of ``<image>`` than of pictures."""
        if turn.further and turn.text.count(IMAGE) != len(turn.pictures):
            raise DataError(f"the text {turn.text!r} has {turn.text.count(IMAGE)} {IMAGE}, its turn has {len(turn.pictures)} images.")
        token = self.special_token_in(turn.text.replace(IMAGE, " ") if turn.further else turn.text)
        if token is not None:
            raise DataError(f"the text {turn.text!r} holds {token!r}, a special token of this model: change it.")

    @property
    def limit(self) -> str:
        """What a row must fit, for messages."""
        return f"sliding window of {self.context} tokens" if self.context == self.window else f"context of {self.context}"

    @property
    def tokens_an_image(self) -> int:
        """Of a picture that is asked about."""
        return len(self.image)

    def tokens_of(self, picture: Picture) -> int:
        """The number of tokens of a picture that :meth:`pictures` returned."""
        return picture.tokens or self.tokens_an_image

    def pictures(self, turns: Iterable[Turn]) -> tuple[Picture, ...]:
        """The pictures of turns, in the order of their tokens. Those that are pooled say to how many; a turn's own number comes first."""
        pooled = self.support_tokens
        return tuple(
            replace(picture, tokens=picture.tokens or pooled) if turn.shown and pooled else picture for turn in turns for picture in turn.pictures
        )

    def image_tokens(self, turns: Iterable[Turn]) -> int:
        """How many tokens the pictures of turns have together."""
        return sum(map(self.tokens_of, self.pictures(turns)))

    @property
    def image_sizes(self) -> str:
        """The tokens of an image, for messages."""
        return f"{self.tokens_an_image}" + (f", {self.support_tokens} where shown with a label" if self.support_tokens else "")

    def images_in(self, conversation: Conversation) -> int:
        """How many images a row has, each as often as it is read."""
        return sum(len(turn.pictures) for turns in (self.as_read(conversation.shared), *conversation.branches) for turn in turns)

    @property
    def what_to_lower(self) -> str:
        """The recipe's keys that make an episode's row shorter, for messages."""
        return "`readings`, `shots` or `ways`" if self.readings > 1 else "`shots` or `ways`"

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has. The texts contain no image."""
        return [len(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []

    def positions(self, ids: Sequence[int], start: int = 0) -> tuple[list[Position], int]:
        """Each token's position, and the position of the next token.

        An image with a grid advances by its longer side.
        """
        if self.grid is None:
            return list(range(start, start + len(ids))), start + len(ids)
        rows, columns = self.grid
        positions: list[Position] = []
        cell = 0  # of the current image's grid
        for token in ids:
            if token == self.image_token_id:
                positions.append((start, start + cell // columns, start + cell % columns))
                cell += 1
                if cell == rows * columns:
                    start, cell = start + max(rows, columns), 0
            else:
                positions.append((start, start, start))
                start += 1
        return positions, start

    def turns(self, turns: Sequence[Turn], opened: bool = False, first: bool = True) -> tuple[list[int], list[int]]:
        """Ids and labels of turns. ``opened`` and ``first`` are those of :meth:`Family.render`.

        Raises DataError where a text contains a special token, or where a learned answer shares a token with its question.
        """
        for turn in turns:
            self._refuse_special_tokens(turn)
        rendered = self.family.render(turns, opened, first)
        if first:
            ids, labels = self._encode(rendered, turns)
            return self.bos + ids, [IGNORED] * len(self.bos) + labels
        # A tokenizer can split the beginning of a text differently after other text: tokenise it behind the end token,
        # then drop that.
        shift = len(self.family.end)
        shifted = Rendered(self.family.end + rendered.text, tuple((a + shift, b + shift) for a, b in rendered.learned))
        ids, labels = self._encode(shifted, turns)
        return ids[1:], labels[1:]

    def as_read(self, turns: Sequence[Turn]) -> tuple[Turn, ...]:
        """A support set as it stands in a row: an ordered one as often as it is read."""
        return read_again(turns, self.readings) if self.supports == "ordered" else tuple(turns)

    def support(self, turns: Sequence[Turn]) -> Support:
        """A support set, as often as it is read. It is read as a chat, in order, unless supports are independent and it is labelled
        pictures alone.

        Raises DataError as :meth:`turns`.
        """
        pairs = [turns[i : i + 2] for i in range(0, len(turns), 2)]
        if not (
            self.supports != "ordered" and turns and all([turn.role for turn in pair] == ["user", "assistant"] and pair[0].shown for pair in pairs)
        ):
            ids, labels = self.turns(self.as_read(turns)) if turns else ([], [])
            positions, next_position = self.positions(ids)
            return Support(ids, labels, [0] * len(ids), positions, next_position, [0] * len(ids))
        head = [*self.bos, *self._part(self.family.render(pairs[0]).text.split(IMAGE)[0])[0]]
        ids, example = list(head), [0] * len(head)
        positions, start = self.positions(head)
        next_position = start
        for number, pair in enumerate(pairs, 1):
            own = self.turns(pair)[0]
            if own[: len(head)] != head:
                raise DataError(f"this prompt's text before a picture depends on what follows: `supports: {self.supports}` is not possible.")
            own_positions, end = self.positions(own[len(head) :], start)
            ids += own[len(head) :]
            example += [number] * (len(own) - len(head))
            positions += own_positions
            next_position = max(next_position, end)
        # An example knows no earlier one, so its label cannot be learned
        hidden = [int(self.supports == "compressed" and token == self.image_token_id) for token in ids]
        return Support(ids, [IGNORED] * len(ids), example, positions, next_position, hidden, len(head))

    def conversation(self, conversation: Conversation) -> Encoded:
        """A whole row: the shared support set, then every branch.

        Raises EpisodeError where it does not fit the context, or where nothing in it is learned.
        """
        first = not conversation.shared
        try:
            support = self.support(conversation.shared)
            branches = [self.turns(turns, first=first) for turns in conversation.branches]
        except DataError as error:
            raise DataError(f"{conversation.origin}: {error}") from error
        ids, labels, positions = list(support.ids), list(support.labels), list(support.positions)
        branch = [0] * len(support)
        for number, (more_ids, more_labels) in enumerate(branches, 1):
            ids, labels = ids + more_ids, labels + more_labels
            branch += [number] * len(more_ids)
            positions += self.positions(more_ids, support.next_position)[0]
        longest = support.longest + max((len(more_ids) for more_ids, _ in branches), default=0)
        if longest > self.context:
            fault = f"{longest} tokens ({self.images_in(conversation)} images of {self.image_sizes}) do not fit the {self.limit}"
            remedy = (
                f"Lower {self.what_to_lower}, or use `wording: short`."
                if conversation.shared
                else "Shorten it, or set `on_fault: skip` for its source."
            )
            raise EpisodeError(f"{conversation.origin}: {fault}. {remedy}")
        if all(label == IGNORED for label in labels):
            raise EpisodeError(f"{conversation.origin}: nothing in it is learned; check the record's answers.")
        example, hidden = (own + [0] * (len(ids) - len(support)) for own in (support.example, support.hidden))
        read = (*self.as_read(conversation.shared), *(turn for turns in conversation.branches for turn in turns))
        return Encoded(ids, labels, branch, example, positions, self.pictures(read), [0] * len(ids), hidden)

    def _encode(self, rendered: Rendered, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """Ids and labels of rendered turns. A token is learned where its last character is in a learned part.

        Raises DataError where a learned part begins or ends inside a token.
        """
        ids: list[int] = []
        labels: list[int] = []
        start = 0  # of the current part, in characters
        pictures = iter(self.pictures(turns))
        for number, part in enumerate(rendered.text.split(IMAGE)):
            if number:
                tokens = next(pictures).tokens
                image = [self.image_token_id] * tokens if tokens else self.image
                ids += image
                labels += [IGNORED] * len(image)
                start += len(IMAGE)
            part_ids, ends = self._part(part)
            for a, b in rendered.learned:
                if start <= a < start + len(part):
                    self._check_answer(part, part_ids, ends, a - start, b - start)
            ids += part_ids
            labels += [
                token if any(a < start + end <= b for a, b in rendered.learned) else IGNORED for token, end in zip(part_ids, ends, strict=True)
            ]
            start += len(part)
        return ids, labels

    def _check_answer(self, part: str, ids: list[int], ends: list[int], begin: int, end: int) -> None:
        """Raises DataError unless the answer ``part[begin:end]`` has tokens of its own, as in prediction.

        There, the text before it is tokenised alone, and so is a turn that follows it.
        """
        answer = part[begin:end].removesuffix(self.family.end)
        prompt = self._part(part[:begin])[0]
        if ids[: len(prompt)] != prompt:
            raise DataError(f"this tokenizer joins the beginning of the answer {answer!r} to the text before it. {NOT_AS_PREDICTED}")
        following = part[end:]
        if following:
            rest = self._part(self.family.end + following)[0][1:]
            if end not in ends or ids[ends.index(end) + 1 :] != rest:
                raise DataError(f"this tokenizer joins the end of the answer {answer!r} to the next turn. {NOT_AS_PREDICTED}")

    def question(self, turn: Turn, answers: Sequence[str] = (), first: bool = True) -> tuple[list[int], list[list[int]]]:
        """Ids of a question that is opened for an answer, and of each answer, its end token included.

        A turn of role "text" is continued by its one answer as plain text, without end token. The first token of all is
        not predicted where no begin token comes before it.

        Raises DataError as :meth:`turns` and :meth:`answered`, and for a continuation of no token.
        """
        if turn.role == "text":
            (continuation,) = answers
            self._refuse_special_tokens(Turn("text", turn.text + continuation))
            ids, ends = self._part(turn.text + continuation)
            start = max(1 - len(self.bos), sum(end <= len(turn.text) for end in ends))
            if start >= len(ids):
                raise DataError(f"the text {continuation!r} has no token that could be predicted: join it to another sentence.")
            return [*self.bos, *ids[:start]], [ids[start:]]
        prompt = self.turns([turn], opened=True, first=first)[0]
        return prompt, [self.answered(turn, answer, prompt, first)[len(prompt) :] for answer in answers]

    def answered(self, question: Turn, answer: str, prompt: Sequence[int], first: bool) -> list[int]:
        """Ids of a question with its answer. prompt: the ids of the question alone, opened for an answer.

        Raises DataError unless they begin with the prompt: the answer's likelihood would be one of other tokens.
        """
        ids = self.turns([question, Turn("assistant", answer)], first=first)[0]
        if ids[: len(prompt)] != list(prompt):
            raise DataError(f"this tokenizer joins the beginning of the answer {answer!r} to its question. Use another name.")
        return ids

    def _tokenise(self, part: str) -> tuple[list[int], list[int]]:
        """Ids, and where each token ends in the text."""
        encoded = self.tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]


def check_alignment(encoder: Encoder, conversation: Conversation) -> None:
    """Raises EpisodeError unless training ids begin with those of inference, and the parts of a row equal the whole.

    They differ where a tokenizer joins turns that other software tokenises together. Each answer's own tokens are checked
    whenever a row is encoded.
    """
    if encoder.supports != "ordered":  # a set of one picture is what any chat is; the others are read in the same way
        conversation = replace(conversation, shared=conversation.shared[:2])
    encoded = encoder.conversation(conversation)
    branch = conversation.branches[0]
    shared = encoder.as_read(conversation.shared)
    whole, labels = encoder.turns([*shared, *branch])
    prompt, _ = encoder.turns([*shared, *branch[:-1]], opened=True)
    row = [t for t, b in zip(encoded.ids, encoded.branch, strict=True) if b in {0, 1}]
    first_learned = next(i for i, label in enumerate(labels[len(prompt) :], len(prompt)) if label != IGNORED)
    if whole != row or whole[: len(prompt)] != prompt or first_learned != len(prompt):
        raise EpisodeError(f"{conversation.origin}: this tokenizer joins turns or answers, so training would not match inference.")


def position_ids(rows: Sequence[Sequence[Position]], length: int, left: bool = False) -> torch.Tensor:
    """[B, T], or [X, B, T] where positions are (time, row, column); padded with 0 on the right, or on the left."""
    three_dimensional = any(isinstance(row[0], tuple) for row in rows if row)
    fill: Position = (0, 0, 0) if three_dimensional else 0
    pads = [[fill] * (length - len(row)) for row in rows]
    padded = [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, pads, strict=True)]
    positions_BTX = torch.tensor(padded)  # [B, T] where positions are plain indices
    return positions_BTX.permute(2, 0, 1).contiguous() if three_dimensional else positions_BTX
