"""LCL's own tests, by its evaluation code and configurations (isekai-portal/Link-Context-Learning), and VL-ICL Bench's open
MiniImageNet, by its own (ys-zong/VL-ICL).

Names are those of the classes, in lower case. The first ``shots`` pictures of each class are shown, those of both
classes shuffled together (without a seed there, with one here). The answer is generated greedily and scored by LCL's
rule.

Open MiniImageNet shows the first ``shots`` pictures of two classes in turn. Its rule compares the text up to a line's end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lcl_adapter.data.episodes import Episode, Example, LearnedAnswers
from lcl_adapter.data.sources import Isekai, Picture, read_isekai_questions, read_open_mi, read_test_pairs
from lcl_adapter.errors import DataError
from lcl_adapter.evaluate import judges, published
from lcl_adapter.evaluate.cases import Case, Cell, Selection, case_of
from lcl_adapter.packaged import packaged
from lcl_adapter.randomness import generator
from lcl_adapter.recipe.suites import ImageNet100Suite, IsekaiSuite, OpenMiSuite
from lcl_adapter.recipe.wording import Wording


def imagenet_100(name: str, options: ImageNet100Suite, wording: Wording, selection: Selection) -> Iterator[Cell]:
    """Classes 2k and 2k + 1 form a pair. The first ``queries`` test pictures of every class are the queries."""
    pairs = read_test_pairs(packaged(options.pairs), packaged(options.images))
    for shots in options.shots:
        cases = []
        for number, pair in enumerate(pairs):
            names = (pair.names[0].lower(), pair.names[1].lower())
            for side in (0, 1):
                for index, query in enumerate(pair.queries[side][: options.queries]):
                    cases.append(_case(names, pair.support, query, side, shots, wording, (name, selection.seed, shots, number, side, index)))
        yield _cell(name, shots, cases, selection, "imagenet-100", published.imagenet_100(shots))


def isekai(name: str, options: IsekaiSuite, wording: Wording, selection: Selection) -> Iterator[Cell]:
    """Each line of the file is one question."""
    source = options.source
    assert isinstance(source, Isekai)
    questions = read_isekai_questions(packaged(source.file), packaged(source.images), name, source.on_fault)
    for shots in options.shots:
        cases = [_case(q.names, q.support, q.query, q.gold, shots, wording, (name, selection.seed, shots, n)) for n, q in enumerate(questions)]
        yield _cell(name, shots, cases, selection, "isekai", published.isekai(options.published, shots))


def open_mi(name: str, options: OpenMiSuite, wording: Wording, selection: Selection) -> Iterator[Cell]:
    """The query's class and one other of its record, drawn here by the seed, so every number of shots has the same two."""
    questions = read_open_mi(packaged(options.file), packaged(options.images), name)
    for shots in options.shots:
        cases = []
        for number, question in enumerate(questions):
            rng = generator("example order", name, selection.seed, number)
            others = [label for label in question.support if label != question.gold]
            names = [question.gold, others[int(rng.integers(len(others)))]]
            names = names[::-1] if rng.integers(2) else names
            _check_shots(names, [question.support[n] for n in names], shots)
            support = tuple(Example(question.support[n][k], n, side) for k in range(shots) for side, n in enumerate(names))
            query = Example(question.query, question.gold, names.index(question.gold))
            episode = Episode(support, (query,), tuple(names), LearnedAnswers.QUERY, names[0])
            cases.append(case_of(episode, wording, question.gold))
        chosen = [cases[i] for i in selection.of_list([case.group for case in cases])][: selection.limit]
        yield Cell(
            suite=name,
            name=f"{name}-{shots}shot",
            kind="open-mi",
            metric="VL-ICL's rule",
            chance=0.5,
            cases=tuple(chosen),
            judge=judges.open_mi_figures,
            baseline="prototype" if shots else None,
            ways=2,
            shots=shots,
            neighbours="as published",
            new_tokens=options.new_tokens,
        )


def _case(
    names: tuple[str, str],
    shown: tuple[Sequence[Picture], Sequence[Picture]],
    query: Picture,
    side: int,
    shots: int,
    wording: Wording,
    order_key: tuple[str | int, ...],
) -> Case:
    _check_shots(names, shown, shots)
    support = [Example(picture, names[s], s) for s in (0, 1) for picture in shown[s][:shots]]
    order = generator("example order", *order_key).permutation(len(support))
    episode = Episode(tuple(support[i] for i in order), (Example(query, names[side], side),), names, LearnedAnswers.QUERY, names[side])
    return case_of(episode, wording, names[side])


def _check_shots(names: Sequence[str], shown: Sequence[Sequence[Picture]], shots: int) -> None:
    if min(map(len, shown)) < shots:
        raise DataError(
            f"{names[0]!r} and {names[1]!r} have {len(shown[0])} and {len(shown[1])} pictures to show, but `shots` asks for {shots} of each."
        )


def _cell(name: str, shots: int, cases: list[Case], selection: Selection, kind: str, figures: published.Figures) -> Cell:
    classes = [case.group for case in cases]
    several = len(set(classes)) < len(classes)  # then some of each class are set aside, else some classes
    cases, limit = [cases[i] for i in selection.of_list(classes if several else [""] * len(cases))], selection.limit
    chosen = cases if limit is None else cases[:: max(1, len(cases) // limit)][:limit]
    return Cell(
        suite=name,
        name=f"{name}-{shots}shot",
        kind=kind,
        metric="LCL's rule",
        chance=0.5,
        cases=tuple(chosen),
        judge=judges.lcl_rule_figures,
        baseline="prototype" if shots else None,
        ways=2,
        shots=shots,
        neighbours="as published",
        published=figures,
    )
