"""Suites about inspection: good or defective, by category, with k good references, as in few-shot anomaly detection.

References are the first k training photos of the category; test photos are never shown. The score of a photo is the
log-odds of the answer "defective" against "good".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest

from lcl_adapter.data.episodes import inspection_episode
from lcl_adapter.data.sources import InspectionPool, PartCategory, Specimen, open_reader
from lcl_adapter.data.sources.boxes import parse
from lcl_adapter.errors import DataError
from lcl_adapter.evaluate import judges, published
from lcl_adapter.evaluate.cases import Case, Cell, Selection, case_of, draw_episodes
from lcl_adapter.evaluate.suites.boxes import BOX_TOKENS
from lcl_adapter.recipe.sources import InspectionForm, InspectionOptions
from lcl_adapter.recipe.suites import InspectionSuite
from lcl_adapter.recipe.wording import Wording, phrase


def cells(name: str, options: InspectionSuite, wording: Wording, selection: Selection) -> Iterator[Cell]:
    pool = open_reader(name, options.source)
    yield from good_or_defective(name, options, pool, wording, selection)
    for form in options.also:
        for shots in options.also_shots:
            yield _drawn_cell(name, form, shots, options, pool, wording, selection)


def _drawn_cell(
    name: str, form: InspectionForm, shots: int, options: InspectionSuite, pool: InspectionPool, wording: Wording, selection: Selection
) -> Cell:
    """Name or locate the defect: episodes on these categories, drawn as in training."""
    episode_options = InspectionOptions(forms={form: 1.0}, shots=[shots], templates=options.templates, languages=options.languages[:1])
    drawn = draw_episodes(pool, episode_options, selection, selection.count(options.episodes), options.source.on_fault, name, form)
    groups = [pool.categories[e.queries[0].class_index].name for e in drawn]
    if form == "localise":
        cases = tuple(case_of(e, wording, g, 0, parse(e.queries[0].label)) for e, g in zip(drawn, groups, strict=True))
        return Cell(
            suite=name,
            name=f"{name}-{form}-{shots}ref",
            kind="locate",
            metric="IoU > 0.5",
            chance=0.0,
            cases=cases,
            judge=judges.box_figures,
            policy="inspection",
            shots=shots,
            new_tokens=BOX_TOKENS,
        )
    cases = tuple(case_of(e, wording, g) for e, g in zip(drawn, groups, strict=True))
    chance = sum(1 / len(c.labels) for c in cases) / len(cases)
    return Cell(name, f"{name}-{form}-{shots}shot", "naming", "accuracy", chance, cases, judges.label_figures, "prototype", "inspection", shots=shots)


def good_or_defective(name: str, options: InspectionSuite, pool: InspectionPool, wording: Wording, selection: Selection) -> Iterator[Cell]:
    """One cell for each number of references.

    Raises DataError if a category has too few, or none has both kinds of photos.
    """
    for count in options.references:
        words = phrase("inspection.one-class" if count else "inspection.plain", options.templates, 0, options.languages)
        cases = []
        for index, part in enumerate(pool.categories):
            if len(part.references) < count:
                raise DataError(
                    f"evaluate.suites.{name}: category {part.name!r} has {len(part.references)} good photos to show, but `references` is {count}."
                )
            specimens = specimens_of(part, options.limit)
            if len({specimen.defect is None for specimen in specimens}) < 2:
                continue
            episode = inspection_episode(part, index, part.references[:count], specimens, words.filled(thing=part.name))
            for number, specimen in enumerate(specimens):
                case = case_of(episode, wording, part.name, number, {"defect": specimen.defect, "good": words.good})
                cases.append(replace(case, episode=replace(episode, queries=(episode.queries[number],))))
        if not cases:
            raise DataError(f"evaluate.suites.{name}: no category has both good and defective photos to ask about.")
        cases = [cases[i] for i in selection.of_list([_kind(case) for case in cases])]
        chosen = cases if selection.limit is None else alternate(cases)[: max(2, selection.limit)]
        yield Cell(
            suite=name,
            name=f"{name}-{count}ref",
            kind="inspection",
            metric="AUROC",
            chance=0.5,
            cases=tuple(chosen),
            judge=judges.inspection_figures,
            new_tokens=options.new_tokens,
            baseline="patches" if count else None,
            shots=count,
            published=published.inspection(options.published, count),
        )


def alternate(cases: list[Case]) -> list[Case]:
    """Good and defective photos of the categories in turn, so that a few cases have both."""
    groups: dict[tuple[str, bool], list[Case]] = {}
    for case in cases:
        groups.setdefault(_kind(case), []).append(case)
    return [case for cases_in_turn in zip_longest(*groups.values()) for case in cases_in_turn if case is not None]


def _kind(case: Case) -> tuple[str, bool]:
    """A case's category, and whether its photo is good."""
    return case.group, case.truth["defect"] is None


def specimens_of(part: PartCategory, limit: int | None) -> list[Specimen]:
    """Good photos, then each kind of defect, at most ``limit`` of each."""
    return [specimen for group in (part.good, *part.defects.values()) for specimen in group[:limit]]
