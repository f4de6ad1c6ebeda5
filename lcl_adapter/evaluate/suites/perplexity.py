"""Perplexity of a page of plain text: each sentence after the earlier ones of its paragraph. Nothing is generated."""

from __future__ import annotations

import re

from lcl_adapter.data.conversations import Turn
from lcl_adapter.data.sources.text import read_text
from lcl_adapter.errors import DataError
from lcl_adapter.evaluate import judges
from lcl_adapter.evaluate.cases import Case, Cell, Selection
from lcl_adapter.packaged import packaged
from lcl_adapter.recipe.suites import PerplexitySuite

# Behind a sentence's last mark and closing quotes, before a space and the beginning of another sentence
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*(?=\s+[\"'“‘(]*[A-Z0-9À-ÖØ-Þ])")
KIND = "perplexity"


def page(name: str, options: PerplexitySuite, selection: Selection) -> Cell:
    """One cell. Raises DataError for a file that cannot be read, or that has no two sentences."""
    pieces = sentences(read_text(packaged(options.file)).text)
    if len(pieces) < 2:
        raise DataError(f"evaluate.suites.{name}: {options.file} has no two sentences; a page of text is expected.")
    chosen = [(index, pieces[index]) for index in selection.of_list([""] * len(pieces))[: selection.limit]]
    cases = tuple(
        Case((), Turn("text", before), (sentence.strip(),), (sentence,), sentence.strip(), f"sentence {index + 1}")
        for index, (before, sentence) in chosen
    )
    return Cell(name, name, KIND, "perplexity, lower is better", None, cases, judges.perplexity_figures, new_tokens=0)


def sentences(text: str) -> list[tuple[str, str]]:
    """(the paragraph before it, the sentence) for each sentence. Joined, they are the paragraph; line breaks are spaces."""
    pieces = []
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        ends = [match.end() for match in SENTENCE_END.finditer(paragraph)] + [len(paragraph)]
        starts = [0, *ends[:-1]]
        pieces += [(paragraph[:start], paragraph[start:end]) for start, end in zip(starts, ends, strict=True) if paragraph[start:end].strip()]
    return pieces
