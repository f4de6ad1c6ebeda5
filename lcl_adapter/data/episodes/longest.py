"""The longest episode that a policy can draw, without drawing: the most shots, the longest phrasing, the longest names.

A row's text is cut at its images, and each example has one. So its length is a sum over examples, and the longest row has
the longest label at each place. Here every place gets the longest label that may stand there, so no drawn episode is
longer. It is too long by a little only where such labels never come together. A label may have another number of tokens
before another text, so there are three kinds of places.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice, product
from typing import Literal, Protocol, TypeVar

from lcl_adapter.data.episodes.base import LETTERS, Episode, Example, LearnedAnswers
from lcl_adapter.data.episodes.inspection import MOST_KINDS
from lcl_adapter.data.episodes.jigsaw import GRIDS
from lcl_adapter.data.sources import ClassPool, InspectionPool
from lcl_adapter.data.sources.base import names_of, pictures_of
from lcl_adapter.recipe.sources import EpisodeOptions, InspectionOptions
from lcl_adapter.recipe.wording import Wording, phrasings

Place = Literal["between", "last", "end"]  # of a label: before a labelled picture, before a question, or at the end of a row
Value = TypeVar("Value")
MOST_NAMES = 3000  # of a pool; if it has more, the costs of those with the most bytes are computed
FILLED = 8  # names, the longest ones, that a phrasing is filled with
IN_LABELS = 20  # random names, the longest ones, that are joined to labels


class Cost(Protocol):
    """Tokens of an example, with each of the labels at this place, and of what is around it in this wording."""

    def __call__(self, wording: Wording, labels: Sequence[str], place: Place = "between") -> list[int]: ...


def random_names() -> list[str]:
    """Random names of which some have the most tokens.

    They are two letters in turn: where a tokenizer joins neither order of the two, every letter is a token.
    """
    return [5 * (a + b) for a, b in product(LETTERS.tolist(), repeat=2)]


def longest_episodes(
    pool: ClassPool | InspectionPool, options: EpisodeOptions | InspectionOptions, wording: Wording, cost: Cost
) -> Iterator[Episode]:
    """A few episodes of which one has the longest row. The pictures are the pool's; ``origin`` says what the episode is.

    wording: of episodes whose task has no templates. cost: counts tokens, with the base's tokenizer.
    """
    longest = _Longest(pool, wording, cost)
    if isinstance(pool, InspectionPool):
        assert isinstance(options, InspectionOptions)
        yield from longest.located(options) if options.policy == "locate" else longest.inspected(pool, options)
        return
    assert isinstance(options, EpisodeOptions)
    match options.policy:
        case "n-way":
            yield from longest.classes(options)
        case "2way-weight" | "2way-random-shot":
            yield from longest.pair(options)
        case "2way-ref":
            yield from longest.references(options)
        case "ref-or-weight":
            yield from longest.references(options)
            yield from longest.pair(options)
        case "jigsaw":
            yield from longest.pieces(options)
        case "product":
            yield from longest.products(options)
        case "locate":
            yield from longest.located(options)


def longest_box(words: Wording, cost: Cost) -> str:
    """The text of a box with the most tokens. No token crosses a comma, so each number is chosen alone."""
    numbers = ["0.888"] * 4
    for place in (0, 1, 3):  # the third stands as the second does
        values = [f"{n / 1000:.3f}" for n in range(1001)]
        texts = [f"[{','.join([*numbers[:place], value, *numbers[place + 1 :]])}]" for value in values]
        numbers[place] = _most(values, cost(words, texts))[0]
    numbers[2] = numbers[1]
    return f"[{','.join(numbers)}]"


class _Longest:
    def __init__(self, pool: ClassPool | InspectionPool, wording: Wording, cost: Cost) -> None:
        self.pool, self.wording, self.cost = pool, wording, cost
        self.pictures = list(islice(pictures_of(pool), 256))
        self.boxes: dict[str, str] = {}

    def episode(self, support: Sequence[str], queries: Sequence[str], words: Wording | None, description: str) -> Episode:
        """The episode with these labels. Its pictures differ as far as the pool has pictures."""
        pictures = cycle(self.pictures)
        examples = [Example(next(pictures), label, 0) for label in (*support, *queries)]
        origin = f"{self.pool.name}: its longest episode, {description}"
        labels = tuple(dict.fromkeys([*support, *queries]))
        return Episode(tuple(examples[: len(support)]), tuple(examples[len(support) :]), labels, LearnedAnswers.QUERY, origin, words)

    def top(self, labels: Iterable[str], words: Wording, count: int = 1, place: Place = "between") -> list[str]:
        """The ``count`` labels with the most tokens at this place, the longest first."""
        distinct = list(dict.fromkeys(labels))
        if len(distinct) > MOST_NAMES:
            distinct = heapq.nlargest(MOST_NAMES, distinct, key=lambda label: len(label.encode()))
        return _most(distinct, self.cost(words, distinct, place), count)

    def shown(self, labels: Sequence[str], words: Wording, count: int, shots: int) -> list[str]:
        """``shots`` examples of each of ``count`` labels: the longest ones before others, and the longest one before a question."""
        support = shots * self.top(labels, words, count)
        return [*support[:-1], *self.top(labels, words, place="last")] if support else []

    def asked(self, labels: Sequence[str], words: Wording) -> str:
        """The longest label at the end of a row."""
        return self.top(labels, words, place="end")[0]

    def box(self, words: Wording) -> str:
        """:func:`longest_box`, once for each form of answer."""
        if words.answer not in self.boxes:
            self.boxes[words.answer] = longest_box(words, self.cost)
        return self.boxes[words.answer]

    def filled(self, words: Wording, names: Iterable[str]) -> list[tuple[str, Wording]]:
        """The phrasing with the longest names in it."""
        most_bytes = heapq.nlargest(MOST_NAMES, dict.fromkeys(names), key=lambda name: len(name.encode()))
        phrased = [(name, words.filled(thing=name)) for name in most_bytes]
        return _most(phrased, [self.alone(filled) for _, filled in phrased], FILLED)

    def alone(self, words: Wording) -> int:
        """The cost of a phrasing without a label."""
        return self.cost(words, [""], "last")[0]

    def classes(self, options: EpisodeOptions) -> Iterator[Episode]:
        ways, shots = max(options.ways), max(options.shots)
        if options.names != "real":
            yield self._of_names(random_names(), ways, shots, options.queries, "random names")
        if options.names != "random":
            names = list(names_of(self.pool))
            longest = _listed(self.top(names, self.wording, ways))
            yield self._of_names(names, ways, shots, options.queries, f"the classes {longest}")

    def _of_names(self, names: Sequence[str], ways: int, shots: int, queries: int, description: str) -> Episode:
        support, asked = self.shown(names, self.wording, ways, shots), self.asked(names, self.wording)
        return self.episode(support, [asked] * queries, None, f"{ways} ways of {shots} shots, {description}")

    def pair(self, options: EpisodeOptions) -> Iterator[Episode]:
        shots = max(options.shots)
        names, own = random_names(), list(names_of(self.pool))
        # Either may be the one before the question
        support = shots * [*self.top(names, self.wording), *self.top(own, self.wording)]
        last, query = self.top([*names, *own], self.wording, place="last")[0], self.asked([*names, *own], self.wording)
        for before in (support[:-1], support[1:]):
            description = f"2 ways of {shots} shots, the class {support[1]!r} and a random name"
            yield self.episode([*before, last], [query] * options.queries, None, description)

    def references(self, options: EpisodeOptions) -> Iterator[Episode]:
        shots = max(options.shots)
        for words in phrasings("references", options.templates, options.languages):
            names = self.top(random_names(), words, IN_LABELS)
            labels = [f"{a}_{b}" for a, b in product(names, repeat=2)]
            support = self.shown(labels, words, 1, 2 * shots)
            answer = ", ".join([support[0]] * (shots - 1) + [self.asked(labels, words)])
            yield self.episode(support, [answer] * options.queries, words, f"2 ways of {shots} shots, a name for each image")

    def pieces(self, options: EpisodeOptions) -> Iterator[Episode]:
        for words in phrasings("jigsaw", options.templates, options.languages):
            for count in dict.fromkeys(options.tiles):
                for rows, columns in GRIDS[count]:
                    grid = words.filled(thing=f"{columns} x {rows}")
                    places = [[place % columns, place // columns] for place in range(count)]
                    # Which piece is the first and which the last can change how brackets and numbers join
                    answers = (str([a, *(p for p in places if p not in (a, b)), b]) for a, b in product(places, repeat=2) if a != b)
                    answer = self.asked(list(answers), grid)
                    support = [f"piece {number}" for number in range(1, count + 1)]
                    yield self.episode(support, [answer] * options.queries, grid, f"a jigsaw of {columns} x {rows} pieces")

    def products(self, options: EpisodeOptions) -> Iterator[Episode]:
        shots = max(options.shots)
        if options.plain:
            for words in phrasings("product.plain", options.templates, options.languages):
                name = self.asked(list(names_of(self.pool)), words)
                yield self.episode([], [name] * options.queries, words, f"the product {name!r}")
        if options.plain == 1:
            return
        for words in phrasings("product.context", options.templates, options.languages):
            for real in (False, True):
                if options.names == ("random" if real else "real"):
                    continue
                all_names = list(names_of(self.pool)) if real else random_names()
                names = self.top(all_names, words, 2)
                # The longest at each place of the phrasing; the two together may be one product, which is never drawn
                first = max(names, key=lambda name: self.alone(words.filled(a=name, b="")))
                second = max(names, key=lambda name: self.alone(words.filled(a="", b=name)))
                query = self.asked([*all_names, words.neither], words)
                description = f"2 products of {shots} shots, {f'named {_listed(names)}' if real else 'random names'}"
                support = self.shown(all_names, words, 2, shots)
                yield self.episode(support, [query] * options.queries, words.filled(a=first, b=second), description)

    def located(self, options: EpisodeOptions | InspectionOptions) -> Iterator[Episode]:
        for words in phrasings("locate", options.templates, options.languages):
            for shots in dict.fromkeys(options.shots):
                enough = {name: len(regions) for name, regions in self.pool.regions.items() if len(regions) > shots}
                for name, asked in self.filled(words, enough):
                    box = self.box(words)
                    queries = min(options.queries, enough[name] - shots)
                    yield self.episode([box] * shots, [box] * queries, asked, f"{shots} boxes of {name!r}")

    def inspected(self, pool: InspectionPool, options: InspectionOptions) -> Iterator[Episode]:
        for form, weight in options.forms.items():
            if not weight:
                continue
            for phrasing, shots in product(phrasings(f"inspection.{form}", options.templates, options.languages), dict.fromkeys(options.shots)):
                for name, words in self.filled(phrasing, names_of(pool)):
                    part = next(category for category in pool.categories if category.name == name)
                    description = f"form {form} with {shots} references of the part {name!r}"
                    judged = self.asked([words.good, words.bad], words)
                    match form:
                        case "plain":
                            yield self.episode([], [judged] * options.queries, words, description)
                        case "one-class":
                            yield self.episode([words.good] * shots, [judged] * options.queries, words, description)
                        case "localise":
                            yield self.episode([words.good] * shots, [self.box(words)] * options.queries, words, description)
                        case "two-way":
                            yield from self._labelled([words.good, words.bad], shots, options, words, description)
                        case "naming":
                            enough = [kind for kind, photos in part.defects.items() if len(photos) > shots]
                            kinds = self.top(enough, words, MOST_KINDS)
                            if kinds:
                                yield from self._labelled([words.good, *kinds], shots, options, words, f"{description}, defects {_listed(kinds)}")

    def _labelled(self, labels: list[str], shots: int, options: InspectionOptions, words: Wording, description: str) -> Iterator[Episode]:
        """Labelled parts, under their labels and, where the options allow it, under random names."""
        for allowed in [labels, *([random_names()] if options.random_names else [])]:
            names = self.top(allowed, words, len(labels))
            # A label may have another number of tokens as the first or the last of the list
            orders = [order[start:] + order[:start] for order in (names, names[::-1]) for start in range(len(names))]
            listed = max((words.filled(labels=", ".join(order)) for order in orders), key=self.alone) if "{labels}" in words.query else words
            support = self.shown(allowed, words, len(labels), shots)
            yield self.episode(support, [self.asked(allowed, words)] * options.queries, listed, description)


def _most(values: Sequence[Value], costs: Sequence[int], count: int = 1) -> list[Value]:
    """The ``count`` values with the highest costs, the highest first."""
    order = sorted(range(len(values)), key=lambda index: -costs[index])
    return [values[index] for index in order[:count]]


def _listed(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(map(repr, names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
