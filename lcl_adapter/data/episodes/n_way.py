"""``n-way``: N classes with K shots each, under random names, their own names, names of other classes, or any of these."""

from __future__ import annotations

from lcl_adapter.data.episodes.base import Episode, Rng, assemble, clash, draw_classes, random_names, retry
from lcl_adapter.data.sources import ClassPool
from lcl_adapter.errors import EpisodeError
from lcl_adapter.recipe.sources import EpisodeOptions


def n_way(pool: ClassPool, options: EpisodeOptions, rng: Rng, origin: str) -> Episode:
    """Ways, shots, nearness and the kind of names are drawn first; then classes, names and pictures."""
    ways, shots = int(rng.choice(options.ways)), int(rng.choice(options.shots))
    hard = bool(rng.random() < options.hard)
    real = options.names == "real" or (options.names == "mixed" and bool(rng.random() < options.real_names))
    others = real and bool(options.other_names) and bool(rng.random() < options.other_names)

    def attempt() -> Episode:
        classes = draw_classes(rng, pool, ways, hard)
        named_after = [int(i) for i in rng.choice(len(pool), ways, replace=False)] if others else classes
        names = [pool.classes[i].name for i in named_after] if real else random_names(rng, ways)
        if any(clash(a, b) for n, a in enumerate(names) for b in names[:n]):
            listed = ", ".join(map(repr, names))
            raise EpisodeError(f"{pool.name}: one of the names {listed} begins another: rename it, or use `names: random`.")
        return assemble(pool, options, rng, origin, classes, names, shots)

    return retry(attempt)
