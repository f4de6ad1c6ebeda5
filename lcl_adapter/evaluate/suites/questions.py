"""Suites of plain questions: VQA, POPE, instructions. Only the earlier turns of their own record come before them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from lcl_adapter.data.conversations import from_dialogues
from lcl_adapter.data.sources import open_reader
from lcl_adapter.errors import DataError
from lcl_adapter.evaluate import judges, published
from lcl_adapter.evaluate.cases import Case, Cell, Selection
from lcl_adapter.recipe.sources import QuestionReader
from lcl_adapter.recipe.suites import InstructSuite, PopeSuite, VqaSuite


def vqa(name: str, options: VqaSuite, selection: Selection) -> Cell:
    cases, faults = question_cases(name, options.source, selection)
    if options.rule == "vqav2":
        incomplete = next((c for c in cases if not c.truth), None)
        if incomplete is not None:
            raise DataError(
                f"evaluate.suites.{name}: rule vqav2 needs the answers of several people; the question {incomplete.query.text!r} has only one."
            )
    figures = published.VQAV2 if options.published else ()
    judge = {"exact": judges.exact_figures, "contains": judges.contained_figures, "vqav2": judges.vqav2_figures}[options.rule]
    metric = {"exact": "exact match", "contains": "answer contained", "vqav2": "VQA accuracy"}[options.rule]
    return Cell(name, name, "vqa", metric, _majority_share(cases), cases, judge, published=figures, faults=faults)


def pope(name: str, options: PopeSuite, selection: Selection) -> Cell:
    cases, faults = question_cases(name, options.source, selection)
    return Cell(name, name, "pope", "accuracy", 0.5, cases, judges.pope_figures, published=published.POPE, faults=faults)


def instruct(name: str, options: InstructSuite, selection: Selection) -> Cell:
    cases, faults = question_cases(name, options.source, selection)
    return Cell(name, name, "instruct", "ROUGE-L", 0.0, cases, judges.rouge_figures, new_tokens=options.new_tokens, faults=faults)


def question_cases(name: str, reader: QuestionReader, selection: Selection) -> tuple[tuple[Case, ...], tuple[str, ...]]:
    """The last question of each record, after the record's earlier turns, and the faults of records that are left out.

    Raises DataError if no record is usable, or for the first bad one where the reader refuses faults.
    """
    pool = open_reader(name, reader)
    cases, faults = [], []
    for index in selection.of_list([""] * len(pool))[: selection.limit]:
        try:
            dialogue = pool.dialogues[index]
            turns = from_dialogues((dialogue,)).branches[0]
        except DataError as error:  # a bad sample of a shard, or an impossible box: its picture is broken, or too small for it
            if reader.on_fault == "refuse":
                raise
            faults.append(str(error))
            continue
        earlier = tuple(replace(t, learn=False) for t in turns[:-2])
        picture = str(turns[-2].picture or dialogue.origin)  # the interval resamples pictures
        cases.append(Case(earlier, turns[-2], (), (), turns[-1].text, picture, truth=dialogue.exchanges[-1].answers))
    if not cases:
        raise DataError(f"evaluate.suites.{name}: none of its records can be used{f': {faults[0]}' if faults else '.'}")
    return tuple(cases), tuple(faults)


def _majority_share(cases: tuple[Case, ...]) -> float:
    """The accuracy of always giving the most common answer."""
    return Counter(case.gold for case in cases).most_common(1)[0][1] / len(cases)
