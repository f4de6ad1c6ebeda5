"""Lengths of a recipe's rows, measured before any weight is loaded. Rows that do not fit the context are refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lcl_adapter.base.encoder import Encoded, check_alignment
from lcl_adapter.data.conversations import WORDINGS, to_conversation
from lcl_adapter.data.episodes import draw
from lcl_adapter.data.sources import QuestionPool
from lcl_adapter.data.sources.records import longest_dialogues
from lcl_adapter.errors import DataError, EpisodeError
from lcl_adapter.recipe.sources import EpisodeOptions, InspectionOptions, QuestionReader
from lcl_adapter.recipe.wording import load as load_phrases
from lcl_adapter.terminal import console
from lcl_adapter.training.collate import Collator

CHECKED = 256  # conversations of the schedule that are encoded
LONGEST = 2000  # of a source's questions, the longest that are encoded


@dataclass
class Rows:
    """Lengths in tokens by source, and the longest row of all sources."""

    lengths: dict[str, list[int]]
    longest: Encoded = field(default_factory=lambda: Encoded([], [], [], [], ()))

    def add(self, row: Encoded) -> Encoded:
        """Remember the row if it is the longest; returns it."""
        if len(row) > len(self.longest):
            self.longest = row
        return row


def check_rows(collator: Collator, too_long: list[str] | None = None) -> Rows:
    """Encode the first rows of the schedule, the longest episodes of each source, and its longest questions.

    A row that does not fit is refused before training starts. The alignment of the first row is checked too.
    too_long: where given, collects the errors of questions that would be refused or left out.

    Raises EpisodeError for a row that does not fit the context; DataError where faults are refused.
    """
    mixture, encoder, wording = collator.mixture, collator.encoder, WORDINGS[collator.mixture.recipe.wording]
    check_alignment(encoder, collator.usable(0)[0])
    rows = Rows({name: [] for name in mixture.options})
    for index in range(min(mixture.total, CHECKED)):
        rows.lengths[mixture.slot(index).source].append(len(rows.add(collator.row(index))))
    for name, pool in mixture.pools.items():
        options = mixture.options[name]
        if isinstance(pool, QuestionPool):
            assert isinstance(options, QuestionReader)
            if options.reads_late:  # other shards than those of the first rows would be fetched
                continue
            for index in longest_dialogues(pool, LONGEST):
                try:
                    rows.add(encoder.conversation(to_conversation((pool.dialogues[index],), wording)))
                except DataError as error:
                    if collator.refuses(name, error):
                        raise
                except EpisodeError as error:
                    if too_long is not None:
                        too_long.append(str(error))
                        continue
                    if collator.refuses(name, error):
                        raise
                    console.print(f"left out: {error}", style="yellow", markup=False, highlight=False)
            continue
        assert isinstance(options, EpisodeOptions | InspectionOptions)
        for longest in longest_options(options):
            for index in range(8):
                try:
                    drawn = encoder.conversation(to_conversation(draw(pool, longest, mixture.seed, 1, index), wording))
                    rows.lengths[name].append(len(rows.add(drawn)))
                except DataError:
                    if collator.on_fault == "refuse":
                        raise
    return rows


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
