"""``locate``: few-shot detection. Boxes of a thing are shown as text, then the same thing's box is asked.

Boxes come from class folders with ``boxes.jsonl``, lists with a box column, referring expressions, or the masks of defects.
"""

from __future__ import annotations

from lcl_adapter.data.episodes.base import Episode, Example, LearnedAnswers, Rng
from lcl_adapter.data.sources import ClassPool, InspectionPool
from lcl_adapter.data.sources.boxes import located
from lcl_adapter.errors import EpisodeError
from lcl_adapter.recipe.sources import EpisodeOptions, InspectionOptions
from lcl_adapter.recipe.wording import phrase


def locate(pool: ClassPool | InspectionPool, options: EpisodeOptions | InspectionOptions, rng: Rng, origin: str) -> Episode:
    """Shots and phrasing are drawn first, then a thing with enough pictures.

    Raises EpisodeError where none has; DataError for a box out of range or an empty mask.
    """
    shots = int(rng.choice(options.shots))
    found = {n: r for n, r in pool.regions.items() if len(r) > shots}
    if not found:
        raise EpisodeError(
            f"{pool.name}: nothing has boxes in {shots + 1} pictures: lower `shots`, or give boxes (boxes.jsonl, a box column, masks)."
        )
    name = list(found)[int(rng.integers(len(found)))]
    index = list(pool.regions).index(name)
    words = phrase("locate", options.templates, rng, options.languages).filled(thing=name)
    regions = [found[name][i] for i in rng.permutation(len(found[name]))]
    examples = [Example(r.picture, located(r).text(), index) for r in regions[: shots + options.queries]]
    queries = tuple(examples[shots:])
    return Episode(tuple(examples[:shots]), queries, tuple(dict.fromkeys(q.label for q in queries)), LearnedAnswers(options.learn), origin, words)
