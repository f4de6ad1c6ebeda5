"""N-way K-shot episodes on held-out classes, and controls with an uninformative support set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lcl_adapter.data.conversations import pooled_to
from lcl_adapter.data.episodes import Episode
from lcl_adapter.data.sources import open_reader
from lcl_adapter.errors import RecipeError
from lcl_adapter.evaluate import judges
from lcl_adapter.evaluate.cases import Cell, Selection, case_of, draw_episodes
from lcl_adapter.randomness import generator
from lcl_adapter.recipe.sources import EpisodeOptions
from lcl_adapter.recipe.suites import ControlSuite, LclSuite
from lcl_adapter.recipe.wording import Wording


def cells(name: str, options: LclSuite, wording: Wording, selection: Selection) -> Iterator[Cell]:
    control = options.control if isinstance(options, ControlSuite) else None
    # All suites use the shipped classes with at least five drawings, so that all cells are about the same classes.
    wanted = 4 if options.source.shipped else 1 if options.further_views else max(options.shots)
    pool = open_reader(name, options.source, 1 + wanted)
    if len(pool) < options.ways:
        where = f"evaluate.suites.{name}: {len(pool)} class{'es' if len(pool) > 1 else ''} to measure on, but `ways` is {options.ways}"
        raise RecipeError([f"{where}; raise `hold_out` in training and evaluation, add classes, or lower `ways`"])
    if options.neighbours and "hard" in options.neighbours and not pool.grouped:
        raise RecipeError(
            [f"evaluate.suites.{name}: it is not known which classes are near each other; set `neighbours: easy`, or add neighbours.json"]
        )
    for shots in options.shots:
        for neighbours in options.neighbours or (("easy", "hard") if pool.grouped else ("easy",)):
            episode_options = EpisodeOptions(
                policy="n-way",
                ways=[options.ways],
                shots=[shots],
                queries=1,
                names=options.names,
                hard=float(neighbours == "hard"),
                further_views=options.further_views,
            )
            drawn = draw_episodes(pool, episode_options, selection, selection.count(options.episodes), "refuse", name, neighbours)
            asked = [_apply_control(episode, control, name, selection, index) for index, episode in enumerate(drawn)]
            label = f"{name}-{neighbours}" if control and len(options.shots) == 1 else f"{name}-{shots}shot-{neighbours}"
            whole = Cell(
                suite=name,
                name=label,
                kind=options.kind,
                metric="accuracy",
                chance=1 / options.ways,
                cases=tuple(case_of(e, wording, pool.classes[e.queries[0].class_index].name) for e in asked),
                judge=judges.label_figures,
                baseline="prototype",
                policy="n-way",
                ways=options.ways,
                shots=shots,
                neighbours=neighbours,
                control=control,
                new_tokens=options.new_tokens,
            )
            yield from by_tokens(whole, options.support_tokens)


def by_tokens(cell: Cell, numbers: Sequence[int]) -> Iterator[Cell]:
    """The cell with each of these numbers of tokens for a picture that is shown with a label; the cell itself without any."""
    for tokens in numbers:
        cases = tuple(replace(case, support=pooled_to(case.support, tokens)) for case in cell.cases)
        yield replace(cell, name=f"{cell.name}-{tokens}tokens", cases=cases)
    if not numbers:
        yield cell


def _apply_control(episode: Episode, control: str | None, suite: str, selection: Selection, index: int) -> Episode:
    """The same query with an uninformative support set: its names are shuffled, or it is empty."""
    if control == "no-support":
        return replace(episode, support=())
    if control == "shuffled-names":
        order = generator("control", selection.stream, suite, selection.seed, index).permutation(len(episode.support))
        names = [episode.support[i].label for i in order]
        return replace(episode, support=tuple(replace(e, label=n) for e, n in zip(episode.support, names, strict=True)))
    return episode
