"""How tasks are put into words: one template file, several phrasings a task and language, which a user may replace.

``phrases.yaml`` beside this file is the one that ships. An episode chooses among its task's phrasings with its own
randomness, so that the model learns the task and not one sentence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lcl_adapter.errors import RecipeError, did_you_mean
from lcl_adapter.recipe import packaged

SHIPPED = Path(__file__).parent / "phrases.yaml"
PLACES = frozenset({"name", "thing", "labels", "a", "b"})


@dataclass(frozen=True)
class Wording:
    """How an episode is put into words. ``{name}`` stands for the label; the query's answer is worded as the support's.

    good, bad, neither: what those answers are called in this language.
    """

    instruction: str = ""
    question: str = ""
    query: str = ""
    answer: str = "{name}"
    good: str = "good"
    bad: str = "defective"
    neither: str = "neither"

    def support_question(self, first: bool) -> str:
        return f"{self.instruction} {self.question}".strip() if first else self.question

    def answered(self, label: str) -> str:
        return self.answer.replace("{name}", label)

    def filled(self, **values: str) -> Wording:
        """The same with ``{thing}``, ``{labels}`` and the like replaced; ``{name}`` stays."""
        told = {f.name: getattr(self, f.name) for f in fields(self)}
        for key, value in values.items():
            told = {n: text.replace("{" + key + "}", value) for n, text in told.items()}
        return replace(self, **told)


@lru_cache(maxsize=8)
def load(file: Path | None = None) -> dict[str, dict[str, tuple[Wording, ...]]]:
    """task -> language -> phrasings; a user's file replaces the tasks it has and leaves the others as they ship.

    Raises RecipeError with all faults of the file.
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
    """One phrasing of a task, by number or drawn. Raises RecipeError where there is none in these languages."""
    table = load(file)[task]
    found = [w for language in languages for w in table.get(language, ())]
    if not found:
        raise RecipeError([f"{file or SHIPPED.name}: task {task!r} has no phrasing in {', '.join(languages)}; there are {', '.join(table)}"])
    return found[(choice if isinstance(choice, int) else int(choice.integers(len(found)))) % len(found)]


def _read(file: Path) -> dict[str, dict[str, tuple[Wording, ...]]]:
    try:
        told = yaml.safe_load(file.read_bytes().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError([f"templates {file}: cannot be read ({error})"]) from error
    faults: list[str] = []
    table: dict[str, dict[str, tuple[Wording, ...]]] = {}
    if not isinstance(told, dict):
        raise RecipeError([f"templates {file}: a mapping of task, language, phrasings is expected"])
    for task, languages in told.items():
        if not isinstance(languages, dict):
            faults.append(f"templates {file}: {task}: a mapping of languages is expected")
            continue
        for language, phrasings in languages.items():
            made = [
                _wording(one, f"templates {file}: {task}.{language}", faults) for one in (phrasings if isinstance(phrasings, list) else [phrasings])
            ]
            table.setdefault(str(task), {})[str(language)] = tuple(w for w in made if w is not None)
    if faults:
        raise RecipeError(faults)
    return table


def _wording(one: Any, where: str, faults: list[str]) -> Wording | None:
    known = [f.name for f in fields(Wording)]
    if not isinstance(one, dict) or not all(isinstance(v, str) for v in one.values()):
        faults.append(f"{where}: a phrasing is a mapping of texts: {', '.join(known)}")
        return None
    unknown = [k for k in one if k not in known]
    if unknown:
        faults.append(f"{where}: unknown key {unknown[0]!r}{did_you_mean(unknown[0], known)}; known: {', '.join(known)}")
        return None
    if not one.get("query"):
        faults.append(f"{where}: a phrasing needs a `query`")
        return None
    made = Wording(**one)
    if "{name}" not in made.answer:
        faults.append(f"{where}: its `answer` lacks {{name}}, so that every label would be said alike")
    if len({made.good, made.bad}) < 2:
        faults.append(f"{where}: `good` and `bad` are both {made.good!r}")
    odd = {word for text in one.values() for word in re.findall(r"\{(\w*)\}", text)} - PLACES
    if odd:
        near = did_you_mean(min(odd), sorted(PLACES))
        faults.append(f"{where}: unknown {{{min(odd)}}}{near}; there are {', '.join(sorted(PLACES))}")
    return made
