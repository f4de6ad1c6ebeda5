"""Good or defective, category by category, with k good references: the protocol of few-shot anomaly detection.

References are the first k training photos of the category; test photos are never shown. The score of a photo is
P(good) against P(defective) of the two answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lcl_adapter.episodes import judged
from lcl_adapter.errors import DataError
from lcl_adapter.evaluate import judges, published
from lcl_adapter.evaluate.cases import Cell, case_of
from lcl_adapter.recipe.suites import InspectionSuite
from lcl_adapter.sources import Part, Specimen, open_reader
from lcl_adapter.templates import Wording, phrase


def cells(name: str, options: InspectionSuite, wording: Wording, limit: int | None) -> Iterator[Cell]:
    pool = open_reader(name, options.source)
    for count in options.references:
        words = phrase("inspection.one-class" if count else "inspection.plain", options.templates, 0, options.languages)
        cases = []
        for index, part in enumerate(pool.parts):
            if len(part.references) < count:
                raise DataError(f"evaluate.suites.{name}: category {part.name!r} has {len(part.references)} good photos to show, {count} are asked.")
            asked = specimens(part, options.limit)
            if not asked[0].defect and not asked[-1].defect:
                continue
            episode = judged(part, index, part.references[:count], asked, words.filled(thing=part.name))
            for place, one in enumerate(asked):
                case = case_of(episode, wording, part.name, place, {"defect": one.defect, "good": words.good})
                cases.append(replace(case, episode=replace(episode, queries=(episode.queries[place],))))
        chosen = cases if limit is None else cases[:: max(1, len(cases) // limit)][:limit]
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


def specimens(part: Part, limit: int | None) -> list[Specimen]:
    """Good photos, then each kind of defect, at most ``limit`` of each."""
    return [s for found in (part.good, *part.defects.values()) for s in found[:limit]]
