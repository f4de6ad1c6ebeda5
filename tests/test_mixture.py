"""The schedule: exact shares, any index alone, the same for everyone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_adapter.data.mixture import BLOCK, Mixture
from lcl_adapter.data.sources import ClassPool, Dialogue, Exchange, Picture, PictureClass, QuestionPool
from lcl_adapter.errors import RecipeError
from lcl_adapter.recipe import Recipe

CLASSES = ClassPool("c", tuple(PictureClass(f"n{i}", (Picture(Path(f"{i}a")), Picture(Path(f"{i}b")))) for i in range(5)))
QUESTIONS = QuestionPool("q", tuple(Dialogue((Exchange(f"q{i}?", f"a{i}"),), f"q{i}") for i in range(7)))


def mixture(shares: dict[str, float], seed: int = 0, packed: int = 1) -> Mixture:
    sources: dict[str, object] = {}
    pools: dict[str, object] = {}
    for number, (name, share) in enumerate(shares.items()):
        if number % 2:
            sources[name] = {"type": "llava-json", "file": "f.json", "images": "i", "share": share, "packed": packed}
            pools[name] = QUESTIONS
        else:
            sources[name] = {"type": "class-folder", "path": "p", "shots": [1], "share": share}
            pools[name] = CLASSES
    made = Recipe.model_validate({"base": "b", "sources": sources, "train": {"seed": seed}})
    return Mixture(made, pools)  # type: ignore[arg-type]


@given(st.lists(st.floats(0.2, 5), min_size=1, max_size=4), st.integers(0, 999), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_shares_are_exact_in_every_block_and_any_index_can_be_computed_alone(shares: list[float], seed: int, start: int) -> None:
    named = {f"s{i}": share for i, share in enumerate(shares)}
    one, other = mixture(named, seed), mixture(named, seed)
    block = start // BLOCK * BLOCK
    slots = [one.slot(i) for i in range(block, block + BLOCK)]
    tally = Counter(s.source for s in slots)
    for name, share in one.requested.items():
        assert abs(tally[name] - share * BLOCK) < 1
    for name in named:
        ordinals = [s.ordinal for s in slots if s.source == name]
        assert ordinals == list(range(ordinals[0], ordinals[0] + len(ordinals))), "no draw skipped, none twice"
    assert other.slot(start) == one.slot(start), "computed alone, out of order"
    assert other.draw(start) == one.draw(start)


def test_every_question_comes_once_before_any_repeats() -> None:
    made = mixture({"lcl": 0.5, "vqa": 0.5}, packed=2)
    answers: list[str] = []
    index = 0
    while len(answers) < 14:
        drawn = made.draw(index)
        if isinstance(drawn, tuple):
            assert len(drawn) == 2
            answers += [dialogue.exchanges[0].answer for dialogue in drawn]
        index += 1
    assert sorted(answers[:7]) == sorted(answers[7:14]) == [f"a{i}" for i in range(7)]
    assert answers[:7] != answers[7:14], "another order in the next pass"


def test_a_share_too_small_to_be_drawn_is_an_error() -> None:
    with pytest.raises(RecipeError, match="would never be drawn"):
        mixture({"a": 1.0, "b": 0.001})


def test_a_source_of_share_zero_is_left_out() -> None:
    assert list(mixture({"a": 1.0, "b": 0.0}).options) == ["a"]


def test_hashes_follow_the_data(tmp_path: Path) -> None:
    one, two = mixture({"a": 1.0}), mixture({"a": 1.0})
    assert one.hashes() == two.hashes()
    two.pools["a"] = ClassPool("c", CLASSES.classes[:4])
    assert one.hashes() != two.hashes()
    assert json.dumps(one.hashes())


def scheduled(total: int, shares: object = None, **sources: dict[str, object]) -> Mixture:
    """A mixture of question sources over ``total`` rows; each of seven questions."""
    options = {n: {"type": "llava-json", "file": "f.json", "images": "i", **s} for n, s in sources.items()}
    made = Recipe.model_validate({"base": "b", "sources": options, "shares": shares or {}, "train": {"max_steps": total}})
    return Mixture(made, dict.fromkeys(options, QUESTIONS))


@given(
    st.integers(1, 1500),
    st.lists(st.tuples(st.floats(0.1, 3), st.one_of(st.none(), st.integers(1, 400))), min_size=1, max_size=4),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_no_cap_is_exceeded_and_no_draw_is_skipped(total: int, sources: list[tuple[float, int | None]], curriculum: bool) -> None:
    named = {f"s{i}": {"share": share, "cap": cap} for i, (share, cap) in enumerate(sources)}
    named["rest"] = {"share": 1.0}
    shares = {0.5: {"rest": 2.0, "s0": 0.5}} if curriculum and total > 200 else None
    made = scheduled(total, shares, **named)
    slots = [made.slot(i) for i in range(total)]
    tally = Counter(s.source for s in slots)
    for name, options in named.items():
        if options.get("cap"):
            assert tally[name] <= options["cap"]  # type: ignore[operator]
        assert [s.ordinal for s in slots if s.source == name] == list(range(tally[name])), "every draw once, in order"
    assert scheduled(total, shares, **named).slot(total - 1) == slots[-1], "computed alone"


def test_a_cap_is_used_up_to_the_last_row() -> None:
    made = scheduled(1000, a={"share": 0.5, "cap": 230}, b={"share": 0.5})
    tally = Counter(made.slot(i).source for i in range(1000))
    assert tally == {"a": 230, "b": 770}
    assert made.ended == {"a": "cap"}
    assert made.requested == {"a": 0.5, "b": 0.5}


def test_a_source_that_ends_gives_every_question_once() -> None:
    made = scheduled(300, a={"share": 0.5, "at_end": "end"}, b={"share": 0.5})
    drawn = [made.draw(i)[0].exchanges[0].answer for i in range(300) if made.slot(i).source == "a"]  # type: ignore[index]
    assert sorted(drawn) == [f"a{i}" for i in range(7)]
    assert made.ended == {"a": "end"}
    assert made.repeats(300)["b"] == pytest.approx(293 / 7)


def test_sources_that_all_end_too_early_are_an_error() -> None:
    with pytest.raises(RecipeError, match=r"a, b: all that have a share end, after 14 rows of 300"):
        scheduled(300, a={"share": 0.5, "at_end": "end"}, b={"share": 0.5, "at_end": "end"})


def test_a_curriculum_changes_shares_where_it_says() -> None:
    made = scheduled(2000, {0: {"a": 0.9, "b": 0.1}, 0.5: {"a": 0.2, "b": 0.8}}, a={}, b={})
    first, second = made.realised(range(1000)), made.realised(range(1000, 2000))
    assert (first["a"], second["a"]) == (0.9, 0.2)
    assert made.requested == pytest.approx({"a": 0.55, "b": 0.45})
    late = scheduled(2000, {0.75: {"b": 1.0}}, a={"share": 1.0}, b={"share": 0.0})
    assert late.realised(range(1500)) == {"a": 1.0, "b": 0.0}
    assert late.realised(range(1500, 2000))["b"] == 0.5
