"""How tasks are put into words: a template file with several phrasings for each task and language.

``phrases.yaml`` beside this file is the shipped one; a user may replace it. Each episode draws one of its task's
phrasings with its own random generator, so that the model learns the task and not a single sentence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lcl_adapter import reading
from lcl_adapter.errors import RecipeError, did_you_mean
from lcl_adapter.packaged import packaged

SHIPPED = Path(__file__).parent / "phrases.yaml"
PLACEHOLDERS = frozenset({"name", "thing", "labels", "a", "b"})


@dataclass(frozen=True)
class Wording:
    """The sentences of an episode.

    ``{name}`` stands for the label; queries and support set use the same form of answer.

    good, bad, neither: the words for these answers in this language.
    repeated: whether the instruction stands with every labelled picture, and not with the first alone.
    """

    instruction: str = ""
    question: str = ""
    query: str = ""
    answer: str = "{name}"
    good: str = "good"
    bad: str = "defective"
    neither: str = "neither"
    repeated: bool = False

    def support_question(self, first: bool) -> str:
        return f"{self.instruction} {self.question}".strip() if first or self.repeated else self.question

    def answered(self, label: str) -> str:
        return self.answer.replace("{name}", label)

    def filled(self, **values: str) -> Wording:
        """A copy with ``{thing}``, ``{labels}`` and other placeholders replaced; ``{name}`` stays."""
        texts = {name: getattr(self, name) for name in TEXTS}
        for key, value in values.items():
            texts = {name: text.replace("{" + key + "}", value) for name, text in texts.items()}
        return replace(self, **texts)


TEXTS = tuple(f.name for f in fields(Wording) if f.type == "str")  # what a phrasing of a file may have


@lru_cache(maxsize=8)
def load(file: Path | None = None) -> dict[str, dict[str, tuple[Wording, ...]]]:
    """task -> language -> phrasings. A user's file replaces the tasks that it has; the other tasks stay as shipped.

    Raises RecipeError that lists all faults of the file.
    """
    table = _read(SHIPPED)
    if file is not None:
        own = _read(packaged(file))
        unknown = [
            f"{file}: unknown task {task!r}{did_you_mean(task, list(table))}; there are {', '.join(table)}" for task in own if task not in table
        ]
        if unknown:
            raise RecipeError(unknown)
        table = {**table, **own}
    return table


def phrase(task: str, file: Path | None, choice: int | np.random.Generator, languages: Sequence[str] = ("en",)) -> Wording:
    """One phrasing of a task: the one with this number, or one drawn with this generator.

    Raises RecipeError if the task has no phrasing in these languages.
    """
    available = phrasings(task, file, languages)
    number = choice if isinstance(choice, int) else int(choice.integers(len(available)))
    return available[number % len(available)]


def phrasings(task: str, file: Path | None, languages: Sequence[str] = ("en",)) -> list[Wording]:
    """All phrasings of a task in these languages. Raises RecipeError if there is none."""
    table = load(file)[task]
    available = [wording for language in languages for wording in table.get(language, ())]
    if not available:
        raise RecipeError([f"{file or SHIPPED.name}: task {task!r} has no phrasing in {', '.join(languages)}; there are {', '.join(table)}"])
    return available


def _read(file: Path) -> dict[str, dict[str, tuple[Wording, ...]]]:
    try:
        raw, _ = reading.parse_yaml(reading.read_text(file, reading.MAX_RECIPE))
    except (OSError, ValueError) as error:
        raise RecipeError([f"templates {file}: cannot be read ({getattr(error, 'strerror', None) or error})"]) from error
    if not isinstance(raw, dict):
        raise RecipeError([f"templates {file}: a mapping of task, language, phrasings is expected"])
    faults: list[str] = []
    table: dict[str, dict[str, tuple[Wording, ...]]] = {}
    for task, languages in raw.items():
        if not isinstance(languages, dict):
            faults.append(f"templates {file}: {task}: a mapping of languages is expected")
            continue
        for language, phrasings in languages.items():
            where = f"templates {file}: {task}.{language}"
            wordings = [_wording(entry, where, faults) for entry in (phrasings if isinstance(phrasings, list) else [phrasings])]
            table.setdefault(str(task), {})[str(language)] = tuple(w for w in wordings if w is not None)
    if faults:
        raise RecipeError(faults)
    return table


def _wording(entry: Any, where: str, faults: list[str]) -> Wording | None:
    """One phrasing of the file; None, with a fault added, where it cannot be used."""
    known = list(TEXTS)
    if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
        faults.append(f"{where}: a phrasing is a mapping of texts: {', '.join(known)}")
        return None
    unknown = [k for k in entry if k not in known]
    if unknown:
        faults.append(f"{where}: unknown key {unknown[0]!r}{did_you_mean(unknown[0], known)}; known: {', '.join(known)}")
        return None
    if "query" not in entry:
        faults.append(f'{where}: a phrasing needs a `query`; "" for a picture alone')
        return None
    wording = Wording(**entry)
    if "{name}" not in wording.answer:
        faults.append(f"{where}: its `answer` lacks {{name}}, so all labels would give the same answer")
    if wording.good == wording.bad:
        faults.append(f"{where}: `good` and `bad` are both {wording.good!r}")
    placeholders = {word for text in entry.values() for word in re.findall(r"\{(\w*)\}", text)}
    for word in sorted(placeholders - PLACEHOLDERS)[:1]:
        faults.append(f"{where}: unknown {{{word}}}{did_you_mean(word, sorted(PLACEHOLDERS))}; there are {', '.join(sorted(PLACEHOLDERS))}")
    return wording
