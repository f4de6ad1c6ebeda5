"""``2way-ref`` and ``ref-or-weight`` (the published LCL code): which support images are of the query's class?

Every support image has its own name, ``<random>_<random name of its class>``. The published answer lists the images of
the other class, which inverts the question; here it lists those of the query's own class.
"""

from __future__ import annotations

from dataclasses import replace

from lcl_adapter.data.episodes.base import Episode, Rng, assemble, random_names, retry
from lcl_adapter.data.episodes.two_way import draw_pair, two_way_weight
from lcl_adapter.data.sources import ClassPool
from lcl_adapter.recipe.sources import EpisodeOptions
from lcl_adapter.recipe.wording import phrase

FEWEST = 3  # shots per class in the published code; fewer if the recipe's `shots` has fewer


def two_way_ref(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str) -> Episode:
    """From 3 shots to the recipe's largest number.

    The answer is the names of the query's class, in the order they were shown.
    """
    most = max(options.shots)
    shots = int(rng.integers(min(FEWEST, most), most + 1))
    words = phrase("references", options.templates, rng, options.languages)

    def attempt() -> Episode:
        classes = draw_pair(pool, rng)
        class_names = random_names(rng, 2)
        episode = assemble(pool, options, rng, origin, classes, class_names, shots)
        image_names = random_names(rng, len(episode.support))
        support = tuple(replace(e, label=f"{name}_{e.label}") for e, name in zip(episode.support, image_names, strict=True))
        answers = {c: ", ".join(e.label for e in support if e.class_index == c) for c in classes}
        queries = tuple(replace(q, label=answers[q.class_index]) for q in episode.queries)
        return replace(episode, support=support, queries=queries, labels=tuple(answers[c] for c in classes), wording=words)

    return retry(attempt)


def ref_or_weight(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str) -> Episode:
    """Either of the two policies, with equal probability."""
    return (two_way_ref if rng.random() < 0.5 else two_way_weight)(pool, options, rng, origin)
