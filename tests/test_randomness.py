"""Random streams: different keys never share one, the same key always does, and nothing else makes a generator."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl_adapter.data import episodes
from lcl_adapter.data.episodes import Episode
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import Picture, read_pocket
from lcl_adapter.evaluate import build_cells
from lcl_adapter.randomness import generator
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.sources import EpisodeOptions
from tests.test_mixture import QUESTIONS

PACKAGE = Path(__file__).parent.parent / "lcl_adapter"
# Surrogates are no text of a recipe, but a file's name can have them.
KEYS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**80), st.text(st.characters(), max_size=3)), max_size=5)


def state(*key: Any) -> list[int]:
    return generator("episode", *key).integers(0, 2**63, 4).tolist()


@given(KEYS, KEYS)
def test_streams_are_equal_only_where_their_keys_are(one: list[str | int], two: list[str | int]) -> None:
    same = list(map(type, one)) == list(map(type, two)) and one == two
    assert (state(*one) == state(*two)) == same


@given(KEYS)
def test_zeros_and_splits_make_another_stream(key: list[str | int]) -> None:
    """numpy pads lists of numbers with zeros: there [7] and [7, 0] are one stream."""
    assert state(*key) == state(*key)
    for other in ([*key, 0], [*key, ""], [0, *key], [*key, *key, 0], [*map(str, key), "0"], ["".join(map(str, key)), 0]):
        assert state(*key) != state(*other)
    assert generator("view", *key).random() != generator("control", *key).random(), "what the stream is for is a part of its key"


def test_the_same_key_is_the_same_stream_in_another_process() -> None:
    """``hash()`` of a text differs between processes; this does not. The numbers are those of every machine."""
    code = 'from lcl_adapter.randomness import generator; print(generator("episode", "lcl", 7, 0, 3).integers(0, 2**63, 2).tolist())'
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert shown == str(state("lcl", 7, 0, 3)[:2]) == "[3094571587514665935, 6291486718679067858]"


@pytest.mark.parametrize("part", [1.0, True, None, np.int64(3), ("a",)])
def test_a_part_that_is_neither_text_nor_number_is_refused(part: Any) -> None:
    with pytest.raises(TypeError, match="texts and whole numbers"):
        generator("episode", part)


def two_sources(first: str = "one", second: str = "two", seed: int = 0) -> Mixture:
    """Two sources of episodes with equal options, and two of questions."""
    lcl, questions = {"type": "pocket", "shots": [2]}, {"type": "llava-json", "file": "f.json", "images": "i"}
    sources = {first: lcl, second: lcl, f"q{first}": questions, f"q{second}": questions}
    pool = read_pocket("train", min_pictures=4)
    made = Recipe.model_validate({"base": "b", "sources": sources, "train": {"seed": seed}})
    return Mixture(made, {name: QUESTIONS if name.startswith("q") else pool for name in sources})


def draws_of(mixture: Mixture, source: str, attempt: int = 0) -> list[Any]:
    return [mixture.draw(i, attempt) for i in range(400) if mixture.slot(i).source == source]


def content(episode: Episode) -> tuple[object, ...]:
    return episode.support, episode.queries, episode.labels


def test_two_sources_with_equal_options_draw_different_episodes() -> None:
    mixture = two_sources()
    one, two = draws_of(mixture, "one"), draws_of(mixture, "two")
    assert len(one) == len(two) == 100
    assert not {content(e) for e in one} & {content(e) for e in two}
    assert sum(a == b for a, b in zip(draws_of(mixture, "qone"), draws_of(mixture, "qtwo"), strict=True)) < 40, "7 questions: one in 7 by chance"


def test_a_sources_episodes_depend_on_its_name_and_not_on_the_others() -> None:
    assert draws_of(two_sources("one", "two"), "one") == draws_of(two_sources("aaa", "one"), "one")
    assert draws_of(two_sources("one", "two"), "qone") == draws_of(two_sources("aaa", "one"), "qone")
    assert draws_of(two_sources(seed=1), "one") != draws_of(two_sources(seed=2), "one")


def test_a_replacement_is_no_episode_that_comes_later() -> None:
    """A row with a broken picture is drawn again: from a stream that no other row has, however long the run."""
    mixture = two_sources()
    attempts = [content(e) for attempt in range(3) for e in draws_of(mixture, "one", attempt)]
    assert len(set(attempts)) == 300
    pool, options = mixture.pools["one"], mixture.options["one"]
    far = episodes.draw(pool, options, 0, 0, 10_000_000, "training", "one")  # type: ignore[arg-type]
    assert content(far) not in attempts


def cases_of(suites: dict[str, Any], seed: int = 0) -> dict[str, list[tuple[object, ...]]]:
    made = Recipe.model_validate({"base": "b", "sources": {"two": {"type": "pocket"}}, "evaluate": {"suites": suites, "seed": seed}})
    return {cell.name: [content(case.episode) for case in cell.cases if case.episode] for cell in build_cells(made)}


def test_suites_of_other_names_ask_other_episodes_and_a_suite_always_the_same() -> None:
    lcl = {"kind": "lcl", "source": {"type": "pocket", "split": "held_out"}, "shots": [1, 2], "episodes": 40}
    cells = cases_of({"a": lcl, "b": lcl})
    assert not set(cells["a-2shot-easy"]) & set(cells["b-2shot-easy"])
    assert cells["a-2shot-easy"] == cases_of({"b": lcl, "a": lcl})["a-2shot-easy"]
    named = [set(case[2]) for case in cells["a-1shot-easy"]]  # type: ignore[attr-defined]
    assert named == [set(case[2]) for case in cells["a-2shot-easy"]], "the numbers of shots are compared on the same classes"


def test_training_and_evaluation_share_no_stream() -> None:
    pool, options = read_pocket("train", min_pictures=4), EpisodeOptions(shots=[2])
    for seed in range(5):
        drawn = [content(episodes.draw(pool, options, seed, 0, 0, *stream, "two")) for stream in (("training",), ("evaluation",), ())]
        assert len(set(drawn)) == 3


def test_a_view_depends_on_the_photos_name_and_number() -> None:
    from PIL import Image

    from lcl_adapter.data.sources.images import further_view

    image = Image.effect_noise((32, 32), 90).convert("RGB")
    views = [further_view(image, name, view).tobytes() for name in ("a.png", "b.png") for view in (1, 2)]
    assert len(set(views)) == 4
    assert views[0] == further_view(image, "a.png", 1).tobytes()
    assert Picture(Path("x/a.png"), view=1) != Picture(Path("x/a.png"))


# One home

MAKERS = {"default_rng", "SeedSequence", "RandomState", "Random", "PCG64", "Philox", "SFC64", "MT19937"}
ELSEWHERE = {
    "randomness.py": "the home",
    "data/conversations.py": "shown_order, a fixed permutation that stored sets and ask_upstream.py repeat",
    "checkpoints/exchange/ask_upstream.py": "runs where this package is not installed",
    "pocket/parts.py": "its seeds define a data set that ships",
    "pocket/products.py": "its seeds define a data set that ships",
}


def makers(source: str) -> list[int]:
    """Lines that make a generator, or draw from numpy's or Python's global one."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).split(".")
            from_global = len(called) > 1 and called[-2] == "random" and called[0] in {"np", "numpy", "random"} and called[-1].islower()
            if called[-1] in MAKERS or from_global:
                lines.append(node.lineno)
    return lines


def test_every_generator_is_made_in_one_place() -> None:
    made = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if makers(p.read_text(encoding="utf-8"))}
    assert made == set(ELSEWHERE)


@pytest.mark.parametrize(
    ("line", "noticed"),
    [("np.random.default_rng([s, 7])", True), ("np.random.permutation(5)", True), ("random.shuffle(x)", True), ("rng.permutation(5)", False)],
)
def test_a_generator_made_elsewhere_is_noticed(line: str, noticed: bool) -> None:
    assert bool(makers(line)) == noticed
