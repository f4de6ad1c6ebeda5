"""Suites about boxes in text: referring expressions, and few-shot detection.

An IoU over 0.5 with the true box is right.
"""

from __future__ import annotations

from collections.abc import Iterator

from lcl_adapter.data.sources import InspectionPool, open_reader
from lcl_adapter.data.sources.boxes import parse
from lcl_adapter.evaluate import judges
from lcl_adapter.evaluate.cases import Case, Cell, Selection, case_of, draw_episodes
from lcl_adapter.evaluate.suites.questions import question_cases
from lcl_adapter.recipe.sources import EpisodeOptions, InspectionOptions
from lcl_adapter.recipe.suites import LocateSuite, RecSuite
from lcl_adapter.recipe.wording import Wording

BOX_TOKENS = 40  # four numbers of three decimals are 25 tokens if each digit is a token


def rec(name: str, options: RecSuite, selection: Selection) -> Cell:
    cases, faults = question_cases(name, options.source, selection)
    boxed = tuple(Case(c.support, c.query, (), (), c.gold, c.group, truth=parse(c.gold)) for c in cases)
    return Cell(name, name, "rec", "IoU > 0.5", 0.0, boxed, judges.box_figures, new_tokens=BOX_TOKENS, faults=faults)


def locate(name: str, options: LocateSuite, wording: Wording, selection: Selection) -> Iterator[Cell]:
    pool = open_reader(name, options.source)
    for shots in options.shots:
        kind = InspectionOptions if isinstance(pool, InspectionPool) else EpisodeOptions
        episode_options = kind(policy="locate", shots=[shots], templates=options.templates, languages=options.languages)
        drawn = draw_episodes(
            pool, episode_options, selection, selection.count(options.episodes), getattr(options.source, "on_fault", "refuse"), name
        )
        names = list(pool.regions)
        cases = tuple(case_of(e, wording, names[e.queries[0].class_index], 0, parse(e.queries[0].label)) for e in drawn)
        yield Cell(
            name,
            f"{name}-{shots}shot",
            "locate",
            "IoU > 0.5",
            0.0,
            cases,
            judges.box_figures,
            baseline="copied",
            policy="locate",
            shots=shots,
            new_tokens=BOX_TOKENS,
        )
