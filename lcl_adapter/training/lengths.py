"""Lengths of a recipe's rows, bounded before any weight is loaded. What does not fit the context is refused or left out.

Of episodes, the longest that a source can draw is encoded. Of questions, every record that could be too long is, and as
many of the longest as show how long a row can be. Samples of shards are unknown until they are read. A prompt that the
base will answer counts with the longest answer.

Lengths are in tokens. A row's whole length counts in memory. Its support set and its longest query must fit the context.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from lcl_adapter.base.encoder import Encoded, Encoder, check_alignment
from lcl_adapter.base.families import IMAGE
from lcl_adapter.base.model import load_encoder
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.data.conversations import Conversation, Turn, from_dialogues, from_episode, to_conversation, wording_of
from lcl_adapter.data.episodes import Episode, Place, draw, longest_box, longest_episodes
from lcl_adapter.data.sources import ClassPool, Dialogue, InspectionPool, Picture, QuestionPool
from lcl_adapter.data.sources.records import sizes_of
from lcl_adapter.errors import DataError, EpisodeError
from lcl_adapter.recipe.sources import EpisodeOptions, InspectionOptions, QuestionOptions
from lcl_adapter.recipe.wording import Wording
from lcl_adapter.recipe.wording import load as load_phrases
from lcl_adapter.terminal import console
from lcl_adapter.training.collate import Collator

COUNTED = 100_000  # texts of examples whose number of tokens is remembered
CHECKED = 256  # conversations of the schedule that are encoded
MEASURED = 20_000  # records of a source that are encoded; of more, those that are surely short are bounded by their bytes
JOINED = 2  # tokens that a text may have more in its turn than alone
SHOWN = 10  # records that are named, of those that are left out
MARK = "label-goes-here"
ANY_PICTURE = Picture(Path("any.png"))


@dataclass
class Rows:
    """Lengths in tokens by source, and the longest row of all sources.

    lengths: of the first rows of the schedule. bounds: no row of the source is longer; sources of shards have none.
    left_out: records that do not fit the context.
    """

    lengths: dict[str, list[int]]
    longest: Encoded = field(default_factory=lambda: Encoded([], [], [], [], [], (), [], []))
    bounds: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def add(self, row: Encoded) -> Encoded:
        """Remember the row if it is the longest; returns it."""
        if len(row) > len(self.longest):
            self.longest = row
        return row

    def most(self, source: str) -> int:
        """The bound of a source; of shards, the longest row that was encoded."""
        return max([self.bounds.get(source, 0), *self.lengths[source]])

    def show_left_out(self) -> None:
        """Print which records are left out, and which sources have no bound."""
        for source, messages in self.left_out.items():
            for message in messages[:SHOWN]:
                console.print(f"left out: {message}", style="yellow", markup=False, highlight=False)
            if len(messages) > SHOWN:
                console.print(f"left out: {len(messages) - SHOWN:,} more records of {source}", style="yellow", highlight=False)
        for source in self.lengths.keys() - self.bounds.keys():
            console.print(f"{source}: how long its samples are is known when they are read", style="yellow", markup=False, highlight=False)


def check_rows(collator: Collator, too_long: list[str] | None = None) -> Rows:
    """Bound the rows of every source, and encode the first rows of the schedule.

    The alignment of the first row is checked too. too_long: where given, collects the errors of what does not fit.

    Raises EpisodeError for an episode that can be drawn, or a record, that does not fit the context, and for a row that does
    not fit ``train.tokens_per_batch``; DataError where faults are refused; ModelError where the base's pictures cannot have one
    of the recipe's numbers of tokens.
    """
    mixture, encoder = collator.mixture, collator.encoder
    for tokens in mixture.recipe.image_tokens.numbers[1:]:
        load_encoder(replace(BaseRef.of(mixture.recipe), support_tokens=tokens))
    rows = Rows({name: [] for name in mixture.options})
    refused = False
    for name, pool in mixture.pools.items():
        try:
            if isinstance(pool, QuestionPool):
                _bound_questions(collator, name, pool, rows, too_long)
            else:
                _bound_episodes(collator, name, pool, rows)
        except EpisodeError as error:
            if too_long is None:
                raise
            too_long.append(str(error))
            refused = True
    if refused:
        return rows
    check_alignment(encoder, collator.usable(0)[0])
    for index in range(min(mixture.total, CHECKED)):
        rows.lengths[mixture.slot(index).source].append(len(rows.add(collator.row(index))))
    return rows


# --- lengths without the images' tokens, which are many and all alike


@dataclass(frozen=True)
class Ruler:
    """Measures conversations with the base's encoder."""

    encoder: Encoder  # in which an image is one token
    whole: Encoder
    counts: dict[str, int] = field(default_factory=dict)  # of examples, most of which are asked for several times

    @classmethod
    def of(cls, encoder: Encoder) -> Ruler:
        single = copy.copy(encoder)
        single.image, single.support_tokens = [encoder.image_token_id], None
        return cls(single, encoder)

    def lengths(self, conversation: Conversation) -> tuple[int, int]:
        """What must fit the context, and the whole row."""

        def pictures(turns: tuple[Turn, ...]) -> int:
            """Tokens that these pictures have beside the one that each is measured with."""
            return self.whole.image_tokens(turns) - sum(len(turn.pictures) for turn in turns)

        shared = self.whole.as_read(conversation.shared)
        support = self.encoder.support(conversation.shared)
        first = not conversation.shared
        branches = [len(self.encoder.turns(branch, first=first)[0]) + pictures(branch) for branch in conversation.branches]
        # Pictures of a set have the same number of tokens each
        longest = support.longest + pictures(shared[:2] if support.examples else shared)
        return longest + max(branches), len(support) + pictures(shared) + sum(branches)

    def examples(self, wording: Wording, labels: Sequence[str], place: Place = "between") -> list[int]:
        """Tokens of a labelled example and of what follows it, without images, for each label.

        The label stands between two images, as in a row, or at its end. 0 for what no row can have: a text with a special token.
        """
        following = {"between": [wording.support_question(first=False)], "last": [wording.query], "end": []}[place]
        turns = (
            Turn("user", wording.query if place == "end" else wording.support_question(first=True), ANY_PICTURE),
            Turn("assistant", wording.answered(MARK)),
            *(Turn("user", text, ANY_PICTURE) for text in following),
        )
        if any(self.encoder.special_token_in(turn.text) for turn in turns):
            return [0] * len(labels)
        parts = self.encoder.family.render(turns).text.split(IMAGE)
        (marked,) = (part for part in parts if MARK in part)
        others = [part for part in parts if part != marked]
        counts = self._count([*others, *(marked.replace(MARK, label) for label in labels)])
        fixed = sum(counts[: len(others)])
        return [0 if self.encoder.special_token_in(label) else fixed + n for label, n in zip(labels, counts[len(others) :], strict=True)]

    def _count(self, texts: Sequence[str]) -> list[int]:
        """:meth:`Encoder.count_tokens`, of a text once."""
        if len(self.counts) > COUNTED:
            self.counts.clear()
        if missing := [text for text in dict.fromkeys(texts) if text not in self.counts]:
            self.counts.update(zip(missing, self.encoder.count_tokens(missing), strict=True))
        return [self.counts[text] for text in texts]


# --- episodes


def _bound_episodes(collator: Collator, name: str, pool: ClassPool | InspectionPool, rows: Rows) -> None:
    """The longest episode that can be drawn. Raises EpisodeError where it does not fit, or none can be drawn."""
    mixture, encoder, wording = collator.mixture, collator.encoder, wording_of(collator.mixture.recipe)
    options = mixture.options[name]
    assert isinstance(options, EpisodeOptions | InspectionOptions)
    ruler = Ruler.of(encoder)
    longest, bound = None, 0
    for episode in longest_episodes(pool, options, wording, ruler.examples):
        conversation = from_episode(episode, wording)
        try:
            needed, whole = ruler.lengths(conversation)
        except DataError:  # all names have a special token
            if collator.on_fault == "refuse":
                raise
            continue
        if needed > encoder.context:
            raise EpisodeError(_too_long(episode, conversation, needed, encoder, ruler, wording))
        if whole > bound:
            longest, bound = conversation, whole
    for option in longest_options(options):  # whether the longest can be drawn from this pool
        for index in range(8):
            try:
                drawn = encoder.conversation(to_conversation(draw(pool, option, mixture.seed, 1, index), wording))
                bound = max(bound, len(rows.add(drawn)))
            except DataError:
                if collator.on_fault == "refuse":
                    raise
    if longest is not None:
        rows.add(encoder.conversation(longest))
    rows.bounds[name] = bound
    collator.check_budget(longest.origin if longest is not None else name, bound)


def _too_long(episode: Episode, conversation: Conversation, needed: int, encoder: Encoder, ruler: Ruler, wording: Wording) -> str:
    fault = f"{needed} tokens ({encoder.images_in(conversation)} images of {encoder.image_sizes}) do not fit the {encoder.limit}"
    short = [tuple(replace(example, label="a") for example in examples) for examples in (episode.support, episode.queries)]
    with_short_names = from_episode(replace(episode, support=short[0], queries=short[1]), wording)
    fits = ruler.lengths(with_short_names)[0] <= encoder.context
    remedy = "Shorter names would fit: rename, leave out the long ones, or lower" if fits else "Lower"
    return f"{episode.origin}: {fault}. {remedy} {encoder.what_to_lower}, or use `wording: short`."


def longest_options(options: EpisodeOptions | InspectionOptions) -> list[EpisodeOptions | InspectionOptions]:
    """Options that draw the longest episodes: the most shots and ways, once for each form and language."""
    shots = {"shots": [max(options.shots)]}
    changes: list[dict[str, Any]] = []
    if isinstance(options, InspectionOptions):
        phrases = load_phrases(options.templates)
        for form, weight in options.forms.items():
            if weight:
                languages = [language for language in options.languages if phrases[f"inspection.{form}"].get(language)] or options.languages
                changes += [{**shots, "forms": {form: 1.0}, "languages": [language]} for language in languages]
    else:
        largest = {**shots, "ways": [max(options.ways)], "tiles": [max(options.tiles)]}
        both = options.policy == "product" and 0 < options.plain < 1
        changes = [{**largest, "plain": plain} for plain in (0.0, 1.0)] if both else [largest]
    return [options.model_copy(update=change) for change in changes]


# --- questions


@dataclass(frozen=True)
class Measured:
    """The longest records of a source.

    longest: (length, index), as many as can share a row, the longest first. rest: no other record is longer, nor than the
    last of these. too_long: errors of records that do not fit.
    """

    longest: tuple[tuple[int, int], ...]
    rest: int
    too_long: tuple[str, ...]


MOST_MEASUREMENTS = 16
MEASUREMENTS: dict[tuple[object, ...], Measured] = {}  # a forecast and a training measure the same records


def _bound_questions(collator: Collator, name: str, pool: QuestionPool, rows: Rows, too_long: list[str] | None) -> None:
    """The longest row of questions. Records that do not fit are refused, or left out.

    The same record can be twice in a row that is packed, at the end of one pass and at the beginning of the next.
    """
    options, encoder = collator.mixture.options[name], collator.encoder
    assert isinstance(options, QuestionOptions)
    sizes = sizes_of(pool)
    if sizes is None:
        return
    base = (encoder.tokenizer.name_or_path, encoder.family.name, encoder.context, len(encoder.image))
    key = (pool.fingerprint, len(pool), pool.new_tokens, name, options.model_dump_json(), collator.on_fault, *base)
    measured = MEASUREMENTS.get(key) if pool.fingerprint else None
    box = cache(lambda: longest_box(Wording(), Ruler.of(encoder).examples))
    answer = _text_of(pool.new_tokens, encoder)
    if measured is None:
        measured = _measure(collator, name, pool, sizes, options.packed, box, answer)
        if len(MEASUREMENTS) >= MOST_MEASUREMENTS:
            MEASUREMENTS.pop(next(iter(MEASUREMENTS)))
        MEASUREMENTS[key] = measured
    for message in measured.too_long:
        if too_long is not None:
            too_long.append(message)
        elif collator.refuses(name, error := EpisodeError(message)):
            raise error
    if measured.too_long:
        rows.left_out[name] = list(measured.too_long)
    rows.bounds[name] = 0
    if measured.longest:
        times = 1 if options.packed == 1 else 2 if len(pool) >= options.packed else options.packed
        together = [entry for entry in measured.longest for _ in range(times)][: options.packed]
        rows.bounds[name] = sum(max(length, measured.rest) for length, _ in together)
        dialogues = tuple(_with_longest(pool.dialogues[index], box, answer) for _, index in together)
        conversation = from_dialogues(dialogues)
        rows.add(encoder.conversation(conversation))
        collator.check_budget(f"{name}, with {conversation.origin}", rows.bounds[name])


def _measure(
    collator: Collator, name: str, pool: QuestionPool, sizes: np.ndarray, packed: int, box: Callable[[], str], answer: tuple[str, int]
) -> Measured:
    """Measure records from the one with the most bytes on, until the others are surely no longer than the longest, or are
    many and surely fit the context: a token has at least one byte.

    answer: a text as long as the longest answer, and the tokens that it lacks.
    """
    encoder, ruler = collator.encoder, Ruler.of(collator.encoder)
    frame = ruler.lengths(_empty(1))[0]
    turn = ruler.lengths(_empty(2))[0] - frame
    most = sizes[:, 0] + frame + sizes[:, 1] * (turn + 2 * JOINED) + sizes[:, 2] * (encoder.tokens_an_image + turn) + pool.new_tokens
    longest: list[tuple[int, int]] = []  # the shortest first
    errors: list[str] = []
    rest = 0
    for count, index in enumerate(_tracked((-most).argsort(kind="stable").tolist(), name)):
        if len(longest) == packed and most[index] <= longest[0][0]:
            break
        if count >= MEASURED and most[index] <= encoder.context:
            rest = int(most[index])
            break
        try:
            conversation = from_dialogues((_with_longest(pool.dialogues[index], box, answer),))
            needed, length = (tokens + answer[1] for tokens in ruler.lengths(conversation))
            if needed > encoder.context and pool.new_tokens:
                fault = f"{needed} tokens, with an answer of up to {pool.new_tokens}, do not fit the {encoder.limit}"
                raise EpisodeError(f"{conversation.origin}: {fault}. Shorten the prompt, or lower `max_new_tokens`.")
            if needed > encoder.context:
                encoder.conversation(conversation)  # raises
        except EpisodeError as error:
            errors.append(str(error))
        except DataError as error:
            if collator.refuses(name, error):
                raise
        else:
            heapq.heappush(longest, (length, index))
            if len(longest) > packed:
                heapq.heappop(longest)
    return Measured(tuple(sorted(longest, reverse=True)), rest, tuple(errors))


def _text_of(tokens: int, encoder: Encoder) -> tuple[str, int]:
    """A text of at most so many tokens, and how many it lacks. Words of one token, where the tokenizer has such."""
    if not tokens:
        return "", 0
    text = " ".join("a" * tokens)
    (count,) = encoder.count_tokens([text])
    if count > tokens:
        text = " ".join("a" * max(1, tokens * tokens // count))
        (count,) = encoder.count_tokens([text])
    return text, max(0, tokens - count)


def _with_longest(dialogue: Dialogue, box: Callable[[], str], answer: tuple[str, int]) -> Dialogue:
    """The dialogue with the longest text of a box for each region, so that its picture is not opened, and the longest answer
    to a prompt that waits for one.
    """
    if answer[0]:
        return replace(dialogue, exchanges=tuple(replace(e, answer=answer[0]) for e in dialogue.exchanges))
    if not any(exchange.region for exchange in dialogue.exchanges):
        return dialogue
    exchanges = [replace(e, answer=box(), region=None) if e.region else e for e in dialogue.exchanges]
    return replace(dialogue, exchanges=tuple(exchanges))


def _empty(exchanges: int) -> Conversation:
    """Questions and answers of no text."""
    return Conversation((), ((Turn("user", ""), Turn("assistant", "", learn=True)) * exchanges,), "")


def _tracked(indices: list[int], name: str) -> Iterable[int]:
    """With a progress bar where there are many."""
    shown = console.is_terminal and len(indices) >= MEASURED
    return track(indices, f"measuring {name}", console=console, transient=True, disable=not shown)
