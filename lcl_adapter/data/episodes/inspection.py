"""``inspection``: is this part good, and if not, what is wrong with it, and where?

Forms, of which a recipe gives the shares:

    plain       nothing shown: good or defective?
    one-class   good references shown, then the question
    two-way     good and defective parts shown
    naming      good parts and named defects shown; the answer is one of a closed list
    localise    good references shown; the answer is the box of the defect
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from lcl_adapter.data.episodes.base import Episode, Example, LearnedAnswers, Rng, first_that_works, random_names
from lcl_adapter.data.sources import InspectionPool, Part, Picture, Region, Specimen
from lcl_adapter.data.sources.boxes import located
from lcl_adapter.errors import EpisodeError
from lcl_adapter.recipe.sources import InspectionOptions
from lcl_adapter.recipe.wording import Wording, phrase

Thing = TypeVar("Thing", Picture, Specimen)
MOST_KINDS = 3  # named defects in one episode, beside "good"


def inspection(pool: InspectionPool, options: InspectionOptions, rng: Rng, origin: str) -> Episode:
    """Form, shots and phrasing are drawn first, then the part, its references and the queries."""
    forms = list(options.forms)
    weights = np.array([options.forms[f] for f in forms])
    form = forms[int(rng.choice(len(forms), p=weights / weights.sum()))]
    shots = int(rng.choice(options.shots))
    words = phrase(f"inspection.{form}", options.templates, rng, options.languages)
    scrambled = bool(rng.random() < options.random_names) and form in {"two-way", "naming"}
    turned = int(rng.integers(4)) if options.turned and rng.random() < options.turned else 0
    turned = 0 if form == "localise" else turned  # its answers are places in the picture as it is

    able = pool.two_sided if 0 < options.defective < 1 and form != "localise" else tuple(range(len(pool)))
    if not able:
        raise EpisodeError(f"{pool.name}: no category has both good and defective photos ({pool.photos}): half of the answers could not be learned.")

    def attempt() -> Episode:
        index = able[int(rng.integers(len(able)))]
        part = pool.parts[index]
        own = words.filled(thing=part.name)
        match form:
            case "plain":
                episode = judged(part, index, (), _queries(rng, part, options, ()), own)
            case "one-class":
                episode = judged(part, index, _some(rng, part.references, shots, part, "references"), _queries(rng, part, options, ()), own)
            case "two-way":
                shown = _some(rng, _defective(part), shots, part, "defective photos", spare=1)
                support = _examples([Specimen(p) for p in _some(rng, part.references, shots, part, "references")] + list(shown), index, own)
                episode = replace(judged(part, index, (), _queries(rng, part, options, shown), own), support=_mixed(rng, support))
            case "naming":
                episode = _naming(rng, part, index, shots, options, own)
            case _:
                episode = _localise(rng, part, index, shots, options, own)
        if scrambled:
            episode = _renamed(episode, rng)
        labels = _shuffled(rng, episode.labels)
        told = own.filled(labels=", ".join(_shuffled(rng, labels)))  # the closed list, where the question tells it
        episode = replace(episode, origin=origin, learned=LearnedAnswers(options.learn), labels=labels, wording=told)
        return _turned(episode, turned)

    return first_that_works(attempt)


def judged(part: Part, index: int, references: Sequence[Picture], queries: Sequence[Specimen], words: Wording) -> Episode:
    """Good references shown (none for the plain form), each query good or defective: what training and suites both ask."""
    support = tuple(Example(p, words.good, index) for p in references)
    asked = tuple(Example(s.picture, words.bad if s.defect else words.good, index) for s in queries)
    return Episode(support, asked, (words.good, words.bad), LearnedAnswers.QUERY, part.name, words)


def _naming(rng: Rng, part: Part, index: int, shots: int, options: InspectionOptions, words: Wording) -> Episode:
    enough = [kind for kind, found in part.defects.items() if len(found) > shots]
    if not enough:
        raise EpisodeError(f"part {part.name!r}: no kind of defect has {shots + 1} photos: lower `shots`, or leave form naming out.")
    kinds = [enough[i] for i in rng.permutation(len(enough))[:MOST_KINDS]]
    shown = [s for kind in kinds for s in _some(rng, part.defects[kind], shots, part, f"photos of {kind}", spare=1)]
    support = [Example(p, words.good, index) for p in _some(rng, part.references, shots, part, "references")]
    support += [Example(s.picture, s.defect or words.good, index) for s in shown]
    queries = []
    for _ in range(options.queries):
        kind = kinds[int(rng.integers(len(kinds)))] if rng.random() < options.defective or not part.good else None
        left = [s for s in part.defects[kind] if s not in shown] if kind else list(part.good)
        one = left[int(rng.integers(len(left)))]
        queries.append(Example(one.picture, one.defect or words.good, index))
    labels = (words.good, *kinds)
    return Episode(_mixed(rng, support), tuple(queries), labels, LearnedAnswers.QUERY, part.name, words)


def _localise(rng: Rng, part: Part, index: int, shots: int, options: InspectionOptions, words: Wording) -> Episode:
    found = [s for s in _defective(part) if s.mask is not None]
    if not found:
        raise EpisodeError(f"part {part.name!r}: no defect has a mask, so none can be located: leave form localise out.")
    support = tuple(Example(p, words.good, index) for p in _some(rng, part.references, shots, part, "references"))
    chosen = [found[int(rng.integers(len(found)))] for _ in range(options.queries)]
    queries = tuple(Example(s.picture, located(Region(s.picture, mask=s.mask)).text(), index) for s in chosen)
    return Episode(support, queries, tuple(dict.fromkeys(q.label for q in queries)), LearnedAnswers.QUERY, part.name, words)


def _queries(rng: Rng, part: Part, options: InspectionOptions, shown: Sequence[Specimen]) -> list[Specimen]:
    """Good and defective photos that are not shown; every kind of defect is as likely."""
    kinds = {kind: [s for s in found if s not in shown] for kind, found in part.defects.items()}
    kinds = {kind: found for kind, found in kinds.items() if found}
    queries = []
    for _ in range(options.queries):
        defective = bool(rng.random() < options.defective)
        left: Sequence[Specimen] = list(kinds.values())[int(rng.integers(len(kinds)))] if defective and kinds else part.good
        if not left:
            raise EpisodeError(f"part {part.name!r}: no {'defective' if defective else 'good'} photo is left to ask about.")
        queries.append(left[int(rng.integers(len(left)))])
    return queries


def _some(rng: Rng, found: Sequence[Thing], count: int, part: Part, what: str, spare: int = 0) -> list[Thing]:
    if len(found) < count + spare:
        raise EpisodeError(f"part {part.name!r} has {len(found)} {what}, {count + spare} are needed: lower `shots` or add photos.")
    return [found[i] for i in rng.permutation(len(found))[:count]]


def _defective(part: Part) -> list[Specimen]:
    return [s for found in part.defects.values() for s in found]


def _examples(specimens: Sequence[Specimen], index: int, words: Wording) -> list[Example]:
    return [Example(s.picture, words.bad if s.defect else words.good, index) for s in specimens]


def _mixed(rng: Rng, support: Sequence[Example]) -> tuple[Example, ...]:
    return tuple(support[i] for i in rng.permutation(len(support)))


def _shuffled(rng: Rng, labels: Sequence[str]) -> tuple[str, ...]:
    return tuple(labels[i] for i in rng.permutation(len(labels)))


def _renamed(episode: Episode, rng: Rng) -> Episode:
    """Random letters in the labels' place, so that only the context tells what they mean."""
    names = dict(zip(episode.labels, random_names(rng, len(episode.labels)), strict=True))
    support, queries = (tuple(replace(e, label=names[e.label]) for e in side) for side in (episode.support, episode.queries))
    return replace(episode, support=support, queries=queries, labels=tuple(names.values()))


def _turned(episode: Episode, turned: int) -> Episode:
    """All pictures turned alike."""
    support, queries = (tuple(replace(e, picture=replace(e.picture, turned=turned)) for e in side) for side in (episode.support, episode.queries))
    return replace(episode, support=support, queries=queries)
