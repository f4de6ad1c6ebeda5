"""Plain words: identifiers and prose use the field's own names (docs/glossary.md), so that a new colleague needs no dictionary of ours."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lcl_adapter"
CODE = [*sorted(PACKAGE.rglob("*.py")), *sorted((ROOT / "contrib").rglob("*.py"))]
PROSE = [*CODE, *sorted(PACKAGE.rglob("*.yaml")), *sorted(PACKAGE.rglob("*.html")), *sorted((ROOT / "recipes").glob("*.yaml"))]
GUIDES = [ROOT / "benchmarks/README.md", ROOT / "contrib/lmms-eval/README.md"]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDES, *sorted((ROOT / "docs").rglob("*.md"))]

# Words of a dialect that this project once had, and what to say in their place.
PLAIN = {
    "adopt": "use, load", "found": "tensors, pools, report, matches", "hand": "artist", "hands": "artist", "hear": "receive", "heard": "received",
    "keep": "cache, store, retain", "keeps": "caches, stores, retains", "kept": "cached, stored, retained", "lone": "single", "odd": "wrong, unknown",
    "ranks": "processes", "said": "message, answer", "seen": "measured, known", "shelf": "store", "speak": "answer", "spoken": "conversation",
    "take": "accept, read, use", "taken": "used", "takes": "accepts, reads, uses", "taught": "trained", "tell": "report, show", "tells": "reports",
    "told": "summary, fields, message, lines, raw", "ways": "remedies, options; classes of an episode",
}  # fmt: skip
# Keys of recipes, and fields of files and of JSON, whose names are part of what users have written; and the field's own meaning of a word.
KEYS = {
    "ways",  # of an N-way episode: sources.*.ways, evaluate.suites.*.ways, and the same field of a report's row
    "RANKS",  # of LoRA, that vLLM accepts
}  # fmt: skip


def words_of(name: str) -> list[str]:
    """``heldOut_names2`` -> held, out, names."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The names that a file gives: of functions, classes, parameters, variables and attributes, with their lines."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node.lineno
            case ast.arg():
                yield node.arg, node.lineno
            case ast.Name(ctx=ast.Store()):
                yield node.id, node.lineno
            case ast.Attribute(ctx=ast.Store()):
                yield node.attr, node.lineno
            case ast.alias(asname=str()):
                yield str(node.asname), node.lineno
            case ast.ExceptHandler(name=str()) | ast.MatchAs(name=str()) | ast.MatchStar(name=str()):
                yield str(node.name), node.lineno


def wrong_identifiers(source: str) -> list[str]:
    return [
        f"line {line}: {name}: {word} -> {PLAIN[word]}"
        for name, line in identifiers(ast.parse(source))
        if name not in KEYS
        for word in words_of(name)
        if word in PLAIN
    ]


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_identifiers_are_plain(path: Path) -> None:
    assert not wrong_identifiers(path.read_text(encoding="utf-8"))


def test_a_word_of_the_dialect_is_noticed() -> None:
    source = "def keep(told):\n    for found in told: pass\n    self.isKept = lambda ranks: 1\nclass OddOne: pass\nways = threshold = rank = 1\n"
    wrong = [line.split(": ")[1] for line in wrong_identifiers(source)]
    assert sorted(wrong) == ["OddOne", "found", "isKept", "keep", "ranks", "told"]


# Prose


DIALECT = re.compile(r"\b(told of|hands|hears?|heard|adopts?|adopted|share_out|shared? out|shares out)\b", re.IGNORECASE)


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Comments, docstrings and other strings of a Python file; every line of another file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}:
            yield from enumerate(token.string.splitlines(), token.start[0])


@pytest.mark.parametrize("path", [*PROSE, *DOCUMENTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_plain(path: Path) -> None:
    wrong = [(number, line.strip()) for number, line in prose_of(path) if DIALECT.search(line)]
    assert not wrong, "\n".join(f"{path.relative_to(ROOT)}, line {number}: {line}" for number, line in wrong)


def test_prose_of_the_dialect_is_noticed(tmp_path: Path) -> None:
    """In comments and strings, and not in code."""
    (tmp_path / "a.py").write_text('adopt = 1  # weights that are shared out\nname = "a process hears of it"\nother = f"told of {adopt}"\n')
    assert [number for number, line in prose_of(tmp_path / "a.py") if DIALECT.search(line)] == [1, 2, 3]
