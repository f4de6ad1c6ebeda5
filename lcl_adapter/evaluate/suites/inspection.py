"""Good or defective, category by category, with k good references: the protocol of few-shot anomaly detection.

References are the first k training photos of the category; test photos are never shown. The score of a photo is
P(good) against P(defective) of the two answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lcl_adapter.data.episodes import judged
from lcl_adapter.data.sources import InspectionPool, Part, Specimen, open_reader
from lcl_adapter.data.sources.boxes import parse
from lcl_adapter.errors import DataError
from lcl_adapter.evaluate import judges, published
from lcl_adapter.evaluate.cases import Case, Cell, case_of, drawn
from lcl_adapter.evaluate.suites.boxes import BOX_TOKENS
from lcl_adapter.recipe.sources import InspectionForm, InspectionOptions
from lcl_adapter.recipe.suites import InspectionSuite
from lcl_adapter.recipe.wording import Wording, phrase


def cells(name: str, options: InspectionSuite, wording: Wording, seed: int, limit: int | None) -> Iterator[Cell]:
    pool = open_reader(name, options.source)
    yield from judged_cells(name, options, pool, wording, limit)
    for form in options.also:
        for shots in options.also_shots:
            yield _drawn_cell(name, form, shots, options, pool, wording, seed, limit)


def _drawn_cell(
    name: str, form: InspectionForm, shots: int, options: InspectionSuite, pool: InspectionPool, wording: Wording, seed: int, limit: int | None
) -> Cell:
    """What is wrong with it, or where: episodes drawn as in training, on these categories."""
    asked_for = InspectionOptions(forms={form: 1.0}, shots=[shots], templates=options.templates, languages=options.languages[:1])
    count = min(options.episodes, limit or options.episodes)
    made = drawn(pool, asked_for, seed, 5, count, options.source.on_fault)
    groups = [pool.parts[e.queries[0].class_index].name for e in made]
    if form == "localise":
        cases = tuple(case_of(e, wording, g, 0, parse(e.queries[0].label)) for e, g in zip(made, groups, strict=True))
        return Cell(
            suite=name,
            name=f"{name}-{form}-{shots}ref",
            kind="locate",
            metric="IoU > 0.5",
            chance=0.0,
            cases=cases,
            judge=judges.boxed,
            policy="inspection",
            shots=shots,
            new_tokens=BOX_TOKENS,
        )
    cases = tuple(case_of(e, wording, g) for e, g in zip(made, groups, strict=True))
    chance = sum(1 / len(c.labels) for c in cases) / len(cases)
    return Cell(name, f"{name}-{form}-{shots}shot", "naming", "accuracy", chance, cases, judges.labelled, "prototype", "inspection", shots=shots)


def judged_cells(name: str, options: InspectionSuite, pool: InspectionPool, wording: Wording, limit: int | None) -> Iterator[Cell]:
    """Good or defective, one cell for each number of references."""
    for count in options.references:
        words = phrase("inspection.one-class" if count else "inspection.plain", options.templates, 0, options.languages)
        cases = []
        for index, part in enumerate(pool.parts):
            if len(part.references) < count:
                raise DataError(f"evaluate.suites.{name}: category {part.name!r} has {len(part.references)} good photos to show, {count} are asked.")
            asked = specimens(part, options.limit)
            if len({one.defect is None for one in asked}) < 2:
                continue
            episode = judged(part, index, part.references[:count], asked, words.filled(thing=part.name))
            for place, one in enumerate(asked):
                case = case_of(episode, wording, part.name, place, {"defect": one.defect, "good": words.good})
                cases.append(replace(case, episode=replace(episode, queries=(episode.queries[place],))))
        if not cases:
            raise DataError(f"evaluate.suites.{name}: no category has both good and defective photos to ask about.")
        chosen = cases if limit is None else in_turns(cases)[: max(2, limit)]
        yield Cell(
            suite=name,
            name=f"{name}-{count}ref",
            kind="inspection",
            metric="AUROC",
            chance=0.5,
            cases=tuple(chosen),
            judge=judges.inspected,
            baseline="patches" if count else None,
            shots=count,
            published=published.inspection(options.published, count),
        )


def in_turns(cases: list[Case]) -> list[Case]:
    """A good and a defective photo of each category in turn, so that the first few are of both."""
    groups: dict[tuple[str, bool], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.group, case.truth["defect"] is None), []).append(case)
    most = max(map(len, groups.values()))
    return [group[place] for place in range(most) for group in groups.values() if place < len(group)]


def specimens(part: Part, limit: int | None) -> list[Specimen]:
    """Good photos, then each kind of defect, at most ``limit`` of each."""
    return [s for found in (part.good, *part.defects.values()) for s in found[:limit]]
