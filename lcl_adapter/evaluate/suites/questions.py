"""Plain questions: VQA, POPE, instructions. Nothing is shown before them but the turns of their own record."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from lcl_adapter.data.conversations import from_dialogues
from lcl_adapter.data.sources import open_reader
from lcl_adapter.errors import DataError
from lcl_adapter.evaluate import judges, published
from lcl_adapter.evaluate.cases import Case, Cell
from lcl_adapter.recipe.sources import QuestionReader
from lcl_adapter.recipe.suites import InstructSuite, PopeSuite, VqaSuite


def vqa(name: str, options: VqaSuite, limit: int | None) -> Cell:
    cases = asked(name, options.source, limit)
    if options.rule == "vqav2":
        bare = next((c for c in cases if not c.truth), None)
        if bare is not None:
            raise DataError(f"evaluate.suites.{name}: rule vqav2 needs the answers that people gave; the question {bare.query.text!r} has one only.")
    figures = published.VQAV2 if options.published else ()
    judge = judges.vqav2 if options.rule == "vqav2" else judges.exact
    return Cell(name, name, "vqa", "VQA accuracy" if options.rule == "vqav2" else "exact match", _chance(cases), cases, judge, published=figures)


def pope(name: str, options: PopeSuite, limit: int | None) -> Cell:
    return Cell(name, name, "pope", "accuracy", 0.5, asked(name, options.source, limit), judges.pope, published=published.POPE)


def instruct(name: str, options: InstructSuite, limit: int | None) -> Cell:
    return Cell(name, name, "instruct", "ROUGE-L", 0.0, asked(name, options.source, limit), judges.instructed, new_tokens=options.new_tokens)


def asked(name: str, reader: QuestionReader, limit: int | None) -> tuple[Case, ...]:
    """The last question of each record, behind the record's own turns."""
    pool = open_reader(name, reader)
    cases = []
    for dialogue in (pool.dialogues[i] for i in range(min(len(pool), limit or len(pool)))):
        try:
            turns = from_dialogues((dialogue,)).branches[0]
        except DataError:  # a box that cannot be: its picture is broken, or too small for it
            if reader.on_fault == "refuse":
                raise
            continue
        before = tuple(replace(t, learn=False) for t in turns[:-2])
        picture = str(turns[-2].picture or dialogue.origin)  # answers about one picture go together in the interval
        cases.append(Case(before, turns[-2], (), (), turns[-1].text, picture, truth=dialogue.exchanges[-1].answers))
    if not cases:
        raise DataError(f"evaluate.suites.{name}: no record of it can be asked about.")
    return tuple(cases)


def _chance(cases: tuple[Case, ...]) -> float:
    """What always giving the most common answer gives."""
    return Counter(case.gold for case in cases).most_common(1)[0][1] / len(cases)
