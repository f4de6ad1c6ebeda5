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
    cases = question_cases(name, options.source, selection)
    if options.rule == "vqav2":
        incomplete = next((c for c in cases if not c.truth), None)
        if incomplete is not None:
            raise DataError(
                f"evaluate.suites.{name}: rule vqav2 needs the answers of several people; the question {incomplete.query.text!r} has only one."
            )
    figures = published.VQAV2 if options.published else ()
    judge = judges.vqav2_figures if options.rule == "vqav2" else judges.exact_figures
    return Cell(
        name, name, "vqa", "VQA accuracy" if options.rule == "vqav2" else "exact match", _majority_share(cases), cases, judge, published=figures
    )


def pope(name: str, options: PopeSuite, selection: Selection) -> Cell:
    return Cell(name, name, "pope", "accuracy", 0.5, question_cases(name, options.source, selection), judges.pope_figures, published=published.POPE)


def instruct(name: str, options: InstructSuite, selection: Selection) -> Cell:
    return Cell(
        name, name, "instruct", "ROUGE-L", 0.0, question_cases(name, options.source, selection), judges.rouge_figures, new_tokens=options.new_tokens
    )


def question_cases(name: str, reader: QuestionReader, selection: Selection) -> tuple[Case, ...]:
    """The last question of each record, after the record's earlier turns. Raises DataError if no record is usable."""
    pool = open_reader(name, reader)
    cases = []
    for dialogue in (pool.dialogues[i] for i in selection.of_list([""] * len(pool))[: selection.limit]):
        try:
            turns = from_dialogues((dialogue,)).branches[0]
        except DataError:  # an impossible box: its picture is broken, or too small for it
            if reader.on_fault == "refuse":
                raise
            continue
        earlier = tuple(replace(t, learn=False) for t in turns[:-2])
        picture = str(turns[-2].picture or dialogue.origin)  # the interval resamples pictures
        cases.append(Case(earlier, turns[-2], (), (), turns[-1].text, picture, truth=dialogue.exchanges[-1].answers))
    if not cases:
        raise DataError(f"evaluate.suites.{name}: none of its records can be used.")
    return tuple(cases)


def _majority_share(cases: tuple[Case, ...]) -> float:
    """The accuracy of always giving the most common answer."""
    return Counter(case.gold for case in cases).most_common(1)[0][1] / len(cases)
