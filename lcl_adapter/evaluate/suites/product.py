"""Two products are shown, and the query is one of them or neither: as in training, on held-out products."""

from __future__ import annotations

from collections.abc import Iterator

from lcl_adapter.data.episodes import Episode
from lcl_adapter.data.sources import ClassPool, open_reader
from lcl_adapter.evaluate import judges
from lcl_adapter.evaluate.cases import Cell, Selection, case_of, draw_episodes
from lcl_adapter.recipe.sources import EpisodeOptions
from lcl_adapter.recipe.suites import ProductSuite
from lcl_adapter.recipe.wording import Wording


def cells(name: str, options: ProductSuite, wording: Wording, selection: Selection) -> Iterator[Cell]:
    pool = open_reader(name, options.source, 1 + max(options.shots))
    for shots in options.shots:
        episode_options = EpisodeOptions(
            policy="product",
            shots=[shots],
            names=options.names,
            neither=options.neither,
            near_neither=options.near_neither,
            hard=0.5 if pool.grouped else 0.0,
            templates=options.templates,
            languages=options.languages,
        )
        drawn = draw_episodes(pool, episode_options, selection, selection.count(options.episodes), "refuse", name)
        yield Cell(
            suite=name,
            name=f"{name}-{shots}shot",
            kind="product",
            metric="balanced accuracy",
            chance=1 / 3,
            cases=tuple(case_of(e, wording, pool.classes[e.queries[0].class_index].name, 0, _truth(e, pool)) for e in drawn),
            judge=judges.product_figures,
            new_tokens=options.new_tokens,
            baseline="prototype or neither",
            policy="product",
            shots=shots,
        )


def _truth(episode: Episode, pool: ClassPool) -> dict[str, object]:
    """The role of each label: A (the product shown first), B or neither.

    near: whether a query of neither is similar to a shown product.
    """
    shown = list(dict.fromkeys(e.label for e in episode.support))
    roles = {shown[0]: "A", shown[1]: "B"} | {label: "neither" for label in episode.labels if label not in shown}
    query = episode.queries[0]
    near = {i for e in episode.support for i in pool.siblings(e.class_index)}
    return {"roles": roles, "near": roles[query.label] == "neither" and query.class_index in near}
