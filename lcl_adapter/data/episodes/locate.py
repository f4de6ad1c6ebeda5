"""``locate``: few-shot detection.

The support set shows an object with its box as text; the query asks for the box of the same object.
Boxes come from class folders with ``boxes.jsonl``, from lists with a box column, from referring expressions, or from
the masks of defects.
"""

from __future__ import annotations

from lcl_adapter.data.episodes.base import Episode, Example, LearnedAnswers, Rng
from lcl_adapter.data.sources import ClassPool, InspectionPool
from lcl_adapter.data.sources.boxes import region_box
from lcl_adapter.errors import EpisodeError
from lcl_adapter.recipe.sources import EpisodeOptions, InspectionOptions
from lcl_adapter.recipe.wording import phrase


def locate(pool: ClassPool | InspectionPool, options: EpisodeOptions | InspectionOptions, rng: Rng, origin: str) -> Episode:
    """Shots and phrasing are drawn first, then an object with enough pictures.

    Raises EpisodeError if no object has enough; DataError for a box out of range or an empty mask.
    """
    shots = int(rng.choice(options.shots))
    candidates = {name: regions for name, regions in pool.regions.items() if len(regions) > shots}
    if not candidates:
        raise EpisodeError(
            f"{pool.name}: nothing has boxes in {shots + 1} pictures: lower `shots`, or give boxes (boxes.jsonl, a box column, masks)."
        )
    name = list(candidates)[int(rng.integers(len(candidates)))]
    index = list(pool.regions).index(name)
    words = phrase("locate", options.templates, rng, options.languages).filled(thing=name)
    regions = [candidates[name][i] for i in rng.permutation(len(candidates[name]))]
    examples = [Example(r.picture, region_box(r).text(), index) for r in regions[: shots + options.queries]]
    support, queries = tuple(examples[:shots]), tuple(examples[shots:])
    return Episode(support, queries, tuple(dict.fromkeys(q.label for q in queries)), LearnedAnswers(options.learn), origin, words)
