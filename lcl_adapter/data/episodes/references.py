"""``2way-ref`` and ``ref-or-weight`` (the published LCL code): which of the shown images share the query's category?

Each shown image gets a name of its own, ``<random>_<class-random>``. The published answer lists the other class's
images, an inversion; here it lists those of the query's own class.
"""

from __future__ import annotations

from dataclasses import replace

from lcl_adapter.data.episodes.base import Episode, Rng, assemble, first_that_works, random_names
from lcl_adapter.data.episodes.two_way import opponents, two_way_weight
from lcl_adapter.data.sources import ClassPool
from lcl_adapter.recipe.sources import EpisodeOptions
from lcl_adapter.recipe.wording import phrase

FEWEST = 3  # shots a class in the published code; fewer where the recipe's `shots` has fewer


def two_way_ref(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str) -> Episode:
    """Shots from 3 to the recipe's largest; the answer is the names of the query's class, in the order they were shown."""
    most = max(options.shots)
    shots = int(rng.integers(min(FEWEST, most), most + 1))
    words = phrase("references", options.templates, rng, options.languages)

    def attempt() -> Episode:
        classes = opponents(pool, rng)
        shared = random_names(rng, 2)
        episode = assemble(pool, options, rng, origin, classes, shared, shots)
        own = random_names(rng, len(episode.support))
        support = tuple(replace(e, label=f"{name}_{e.label}") for e, name in zip(episode.support, own, strict=True))
        of_class = {c: ", ".join(e.label for e in support if e.class_index == c) for c in classes}
        queries = tuple(replace(q, label=of_class[q.class_index]) for q in episode.queries)
        return replace(episode, support=support, queries=queries, labels=tuple(of_class[c] for c in classes), wording=words)

    return first_that_works(attempt)


def ref_or_weight(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str) -> Episode:
    """Either policy, half and half."""
    return (two_way_ref if rng.random() < 0.5 else two_way_weight)(pool, options, rng, origin)
