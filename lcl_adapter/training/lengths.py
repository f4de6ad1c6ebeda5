"""How long a recipe's rows get, before any weight is loaded: what will not fit is refused, and the longest is known."""

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

CHECKED = 256  # conversations of the schedule that are made
LONGEST = 2000  # questions of a source, the longest ones, that are made too


@dataclass
class Rows:
    """Lengths in tokens by source, and the longest row of all, questions included."""

    lengths: dict[str, list[int]]
    longest: Encoded = field(default_factory=lambda: Encoded([], [], [], [], ()))

    def see(self, row: Encoded) -> Encoded:
        if len(row) > len(self.longest):
            self.longest = row
        return row


def check_rows(collator: Collator, too_long: list[str] | None = None) -> Rows:
    """The first rows of the schedule, the longest episodes of each source and its longest questions, each made once.

    So what does not fit is refused before training starts; the first row's alignment is checked too. ``too_long``, where given,
    takes what would be refused or left out of the question sources.
    """
    mixture, encoder, wording = collator.mixture, collator.encoder, WORDINGS[collator.mixture.recipe.wording]
    check_alignment(encoder, collator.usable(0)[0])
    rows = Rows({name: [] for name in mixture.options})
    for index in range(min(mixture.total, CHECKED)):
        rows.lengths[mixture.slot(index).source].append(len(rows.see(collator.row(index))))
    for name, pool in mixture.pools.items():
        options = mixture.options[name]
        if isinstance(pool, QuestionPool):
            assert isinstance(options, QuestionReader)
            for dialogue in longest_dialogues(pool, LONGEST):
                try:
                    rows.see(encoder.conversation(to_conversation((dialogue,), wording)))
                except DataError:
                    if collator.on_fault == "refuse":
                        raise
                except EpisodeError as error:
                    if too_long is not None:
                        too_long.append(str(error))
                        continue
                    if options.on_fault == "refuse":
                        raise
                    console.print(f"left out: {error}", style="yellow", markup=False, highlight=False)
            continue
        assert isinstance(options, EpisodeOptions | InspectionOptions)
        for most in longest_options(options):
            for index in range(8):
                try:
                    drawn = encoder.conversation(to_conversation(draw(pool, most, mixture.seed, 1, index), wording))
                    rows.lengths[name].append(len(rows.see(drawn)))
                except DataError:
                    if collator.on_fault == "refuse":
                        raise
    return rows


def longest_options(options: EpisodeOptions | InspectionOptions) -> list[EpisodeOptions | InspectionOptions]:
    """The same with the most of everything, once for each form, and for each language it is phrased in."""
    most: list[dict[str, Any]] = [{"shots": [max(options.shots)]}]
    if isinstance(options, InspectionOptions):
        table = load_phrases(options.templates)
        spoken = {f: [x for x in options.languages if table[f"inspection.{f}"].get(x)] or options.languages for f, w in options.forms.items() if w}
        most = [{**one, "forms": {form: 1.0}, "languages": [x]} for one in most for form, several in spoken.items() for x in several]
    else:
        most = [{**one, "ways": [max(options.ways)], "tiles": [max(options.tiles)]} for one in most]
        if options.policy == "product" and 0 < options.plain < 1:
            most = [{**one, "plain": plain} for one in most for plain in (0.0, 1.0)]
    return [options.model_copy(update=one) for one in most]
