"""``inspection``: is this part good, and if not, what is wrong with it, and where?

The recipe gives the share of each form:

    plain       no support set: good or defective?
    one-class   good references are shown, then the question
    two-way     good and defective parts are shown
    naming      good parts and named defects are shown; the answer is one of a closed list
    localise    good references are shown; the answer is the box of the defect
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from lcl_adapter.data.episodes.base import Episode, Example, LearnedAnswers, Rng, random_names, retry, shuffled, shuffled_examples
from lcl_adapter.data.sources import InspectionPool, PartCategory, Picture, Specimen
from lcl_adapter.data.sources.boxes import region_box
from lcl_adapter.errors import EpisodeError
from lcl_adapter.recipe.sources import InspectionOptions
from lcl_adapter.recipe.wording import Wording, phrase

Photo = TypeVar("Photo", Picture, Specimen)
MOST_KINDS = 3  # named defects in one episode, besides "good"


def inspection(pool: InspectionPool, options: InspectionOptions, rng: Rng, origin: str) -> Episode:
    """Form, shots and phrasing are drawn first; then the category, its references and the queries."""
    forms = list(options.forms)
    weights = np.array([options.forms[f] for f in forms])
    form = forms[int(rng.choice(len(forms), p=weights / weights.sum()))]
    shots = int(rng.choice(options.shots))
    words = phrase(f"inspection.{form}", options.templates, rng, options.languages)
    with_random_names = bool(rng.random() < options.random_names) and form in {"two-way", "naming"}
    turned = int(rng.integers(4)) if options.turned and rng.random() < options.turned else 0
    turned = 0 if form == "localise" else turned  # its answers are boxes in the picture as it is

    usable = pool.two_sided if 0 < options.defective < 1 and form != "localise" else tuple(range(len(pool)))
    if not usable:
        raise EpisodeError(f"{pool.name}: no category has both good and defective photos ({pool.photos}): half of the answers could not be learned.")

    def attempt() -> Episode:
        index = usable[int(rng.integers(len(usable)))]
        part = pool.categories[index]
        wording = words.filled(thing=part.name)
        match form:
            case "plain":
                episode = inspection_episode(part, index, (), _draw_queries(rng, part, options, ()), wording)
            case "one-class":
                references = _draw_photos(rng, part.references, shots, part, "references")
                episode = inspection_episode(part, index, references, _draw_queries(rng, part, options, ()), wording)
            case "two-way":
                defective = _draw_photos(rng, _defective(part), shots, part, "defective photos", spare=1)
                good = [Specimen(p) for p in _draw_photos(rng, part.references, shots, part, "references")]
                support = [_good_or_bad(s, index, wording) for s in good + defective]
                episode = inspection_episode(part, index, (), _draw_queries(rng, part, options, defective), wording)
                episode = replace(episode, support=shuffled_examples(rng, support))
            case "naming":
                episode = _naming(rng, part, index, shots, options, wording)
            case _:
                episode = _localise(rng, part, index, shots, options, wording)
        if with_random_names:
            episode = _with_random_names(episode, rng)
        labels = shuffled(rng, episode.labels)
        listed = wording.filled(labels=", ".join(shuffled(rng, labels)))  # the closed list, if the question has it
        episode = replace(episode, origin=origin, learned=LearnedAnswers(options.learn), labels=labels, wording=listed)
        return _turned(episode, turned)

    return retry(attempt)


def inspection_episode(part: PartCategory, index: int, references: Sequence[Picture], queries: Sequence[Specimen], words: Wording) -> Episode:
    """Good references (none in the plain form), and queries that are good or defective.

    Training and suites use the same.
    """
    support = tuple(Example(p, words.good, index) for p in references)
    labelled = tuple(_good_or_bad(s, index, words) for s in queries)
    return Episode(support, labelled, (words.good, words.bad), LearnedAnswers.QUERY, part.name, words)


def _naming(rng: Rng, part: PartCategory, index: int, shots: int, options: InspectionOptions, words: Wording) -> Episode:
    enough = [kind for kind, photos in part.defects.items() if len(photos) > shots]
    if not enough:
        raise EpisodeError(f"part {part.name!r}: no kind of defect has {shots + 1} photos: lower `shots`, or leave form naming out.")
    kinds = [enough[i] for i in rng.permutation(len(enough))[:MOST_KINDS]]
    shown = [s for kind in kinds for s in _draw_photos(rng, part.defects[kind], shots, part, f"photos of {kind}", spare=1)]
    support = [Example(p, words.good, index) for p in _draw_photos(rng, part.references, shots, part, "references")]
    support += [Example(s.picture, s.defect or words.good, index) for s in shown]
    queries = []
    for _ in range(options.queries):
        kind = kinds[int(rng.integers(len(kinds)))] if rng.random() < options.defective or not part.good else None
        unused = [s for s in part.defects[kind] if s not in shown] if kind else list(part.good)
        specimen = unused[int(rng.integers(len(unused)))]
        queries.append(Example(specimen.picture, specimen.defect or words.good, index))
    return Episode(shuffled_examples(rng, support), tuple(queries), (words.good, *kinds), LearnedAnswers.QUERY, part.name, words)


def _localise(rng: Rng, part: PartCategory, index: int, shots: int, options: InspectionOptions, words: Wording) -> Episode:
    masked = [s for s in _defective(part) if s.mask is not None]
    if not masked:
        raise EpisodeError(f"part {part.name!r}: no defect has a mask, so none can be located: leave form localise out.")
    support = tuple(Example(p, words.good, index) for p in _draw_photos(rng, part.references, shots, part, "references"))
    chosen = [masked[int(rng.integers(len(masked)))] for _ in range(options.queries)]
    queries = tuple(Example(s.picture, region_box(s.region).text(), index) for s in chosen)
    return Episode(support, queries, tuple(dict.fromkeys(q.label for q in queries)), LearnedAnswers.QUERY, part.name, words)


def _draw_queries(rng: Rng, part: PartCategory, options: InspectionOptions, shown: Sequence[Specimen]) -> list[Specimen]:
    """Good and defective photos that are not shown. All kinds of defect are equally likely."""
    unused_of = {kind: [s for s in photos if s not in shown] for kind, photos in part.defects.items()}
    kinds = [photos for photos in unused_of.values() if photos]
    queries = []
    for _ in range(options.queries):
        defective = bool(rng.random() < options.defective)
        unused: Sequence[Specimen] = kinds[int(rng.integers(len(kinds)))] if defective and kinds else part.good
        if not unused:
            raise EpisodeError(f"part {part.name!r}: no {'defective' if defective else 'good'} photo is left to ask about.")
        queries.append(unused[int(rng.integers(len(unused)))])
    return queries


def _draw_photos(rng: Rng, photos: Sequence[Photo], count: int, part: PartCategory, description: str, spare: int = 0) -> list[Photo]:
    """``count`` random photos. Raises EpisodeError if fewer than ``count + spare`` exist."""
    if len(photos) < count + spare:
        raise EpisodeError(f"part {part.name!r} has {len(photos)} {description}, {count + spare} are needed: lower `shots` or add photos.")
    return [photos[i] for i in rng.permutation(len(photos))[:count]]


def _defective(part: PartCategory) -> list[Specimen]:
    return [specimen for photos in part.defects.values() for specimen in photos]


def _good_or_bad(specimen: Specimen, index: int, words: Wording) -> Example:
    return Example(specimen.picture, words.bad if specimen.defect else words.good, index)


def _with_random_names(episode: Episode, rng: Rng) -> Episode:
    """Random letters instead of the labels: only the support set says what they mean."""
    names = dict(zip(episode.labels, random_names(rng, len(episode.labels)), strict=True))
    support, queries = (tuple(replace(e, label=names[e.label]) for e in examples) for examples in (episode.support, episode.queries))
    return replace(episode, support=support, queries=queries, labels=tuple(names.values()))


def _turned(episode: Episode, turned: int) -> Episode:
    """All pictures rotated by the same number of quarter turns."""

    def rotate(examples: tuple[Example, ...]) -> tuple[Example, ...]:
        return tuple(replace(e, picture=replace(e.picture, turned=turned)) for e in examples)

    return replace(episode, support=rotate(episode.support), queries=rotate(episode.queries))
