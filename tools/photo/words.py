"""Which training classes are of a class that the real photos hold. Names decide: a common word leaves a class out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

LINKS = frozenset({"a", "and", "for", "in", "of", "on", "the", "with"})  # no thing is named by these
IRREGULAR = {
    "mice": "mouse",
    "knives": "knife",
    "geese": "goose",
    "oxen": "ox",
    "teeth": "tooth",
    "feet": "foot",
    "men": "man",
    "women": "woman",
    "people": "person",
}
GENERIC = frozenset({"face"})  # of an emoji, which draws many an animal as its face
STEM = 4  # letters from which a word also matches as a part of a compound: "fish" in "clownfish"


def singular(word: str) -> str:
    """A word without its plural ending, by rule: "pliers" -> "plier", "cherries" -> "cherry", "leaves" -> "leaf"."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    for ending, replacement in (("ies", "y"), ("ves", "f"), ("sses", "ss"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("oes", "o")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word.removesuffix(ending) + replacement
    return word.removesuffix("s") if len(word) > 3 and not word.endswith("ss") else word


def words(name: str) -> frozenset[str]:
    """The words of a name, singular and in lower case, without "of", "with" and the like."""
    return frozenset(singular(word) for word in re.findall("[a-z]+", name.lower()) if word not in LINKS)


def head(name: str) -> str:
    """The word that says what it is: the last one. "red apple" and "apple" have one head, and "zebra face" and "zebra"."""
    own = re.findall("[a-z]+", name.lower()) or [name]
    return singular(next((word for word in reversed(own) if word not in GENERIC), own[-1]))


def common_word(name: str, held_out: Iterable[str]) -> str | None:
    """The first of the singular words ``held_out`` that the name has, also as a part of a compound; None if none."""
    own = words(name)
    for word in sorted(held_out):
        if word in own or (len(word) >= STEM and any(part.startswith(word) or part.endswith(word) for part in own)):
            return word
    return None


def excluded(names: Iterable[str], evaluated: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Training class -> the evaluated class that it has a word in common with.

    evaluated: class -> other words for it; its name's own words count too.
    """
    class_of = {singular(word): label for label, others in evaluated.items() for name in (label, *others) for word in words(name)}
    return {name: class_of[word] for name in names if (word := common_word(name, class_of))}
