"""Properties that every episode of every policy has, for any pool, seed and index."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_adapter.data import episodes
from lcl_adapter.data.episodes import Episode
from lcl_adapter.data.episodes.base import clash
from lcl_adapter.data.episodes.two_way import draw_by_rank
from lcl_adapter.data.sources import ClassPool, Picture, PictureClass, read_pocket
from lcl_adapter.errors import EpisodeError
from lcl_adapter.recipe.sources import EpisodeOptions

QUICK = settings(max_examples=150, deadline=None)


def made_pool(classes: int, pictures: int, artists: int) -> ClassPool:
    """Classes of ``pictures`` each, by ``artists`` artists (0: unknown), in groups of three."""
    return ClassPool(
        "made",
        tuple(
            PictureClass(
                f"thing {n}",
                tuple(Picture(Path(f"{n}-{i}.png"), artist=f"artist{i % artists}" if artists else None) for i in range(pictures)),
                (f"group{n // 3}",),
            )
            for n in range(classes)
        ),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[ClassPool, EpisodeOptions]:
    policy = draw(st.sampled_from(["n-way", "2way-weight", "2way-random-shot"]))
    ways = draw(st.integers(2, 4)) if policy == "n-way" else 2
    shots = draw(st.integers(1, 4))
    queries = draw(st.integers(1, 5))
    artists = draw(st.sampled_from([0, 0, shots + 1, shots + 3]))
    pool = made_pool(draw(st.integers(ways + 3, 14)), artists or draw(st.integers(shots + 1, shots + 5)), artists)
    options = EpisodeOptions(
        policy=policy,
        ways=[ways],
        shots=[shots],
        queries=queries,
        names=draw(st.sampled_from(["random", "real", "mixed"])) if policy == "n-way" else "random",
        hard=draw(st.sampled_from([0.0, 0.5, 1.0])) if policy == "n-way" else 0.5,
        learn=draw(st.sampled_from(["query", "repeated"])),
    )
    return pool, options


def key(picture: Picture) -> tuple[Path, str | None]:
    return picture.path, picture.member


@QUICK
@given(cases(), st.integers(0, 2**31), st.integers(0, 5), st.integers(0, 10**6))
def test_every_episode(case: tuple[ClassPool, EpisodeOptions], seed: int, epoch: int, index: int) -> None:
    pool, options = case
    episode = episodes.draw(pool, options, seed, epoch, index)
    assert episode == episodes.draw(pool, options, seed, epoch, index), "a pure function of (seed, epoch, index)"
    ways = options.ways[0]
    shown = Counter(e.label for e in episode.support)
    assert len(episode.labels) == len(set(episode.labels)) == ways
    assert set(shown) == set(episode.labels)
    assert len(set(shown.values())) == 1, "as many of each"
    shots = next(iter(shown.values()))
    assert shots == options.shots[0] if options.policy != "2way-random-shot" else 1 <= shots <= options.shots[0]
    assert len(episode.queries) == options.queries
    assert len({key(e.picture) for e in episode.support}) == len(episode.support), "no picture twice"
    assert not {key(e.picture) for e in episode.support} & {key(q.picture) for q in episode.queries}
    by_label = {e.label: e.class_index for e in episode.support}
    assert len(set(by_label.values())) == ways
    for example in (*episode.support, *episode.queries):
        assert by_label[example.label] == example.class_index, "a label is one class, also for the query"
        assert example.picture in pool.classes[example.class_index].pictures
    assert not any(clash(a, b) for a in episode.labels for b in episode.labels if a != b)
    artists = {q.picture.artist for q in episode.queries if q.picture.artist}
    assert not artists & {e.picture.artist for e in episode.support}, "no artist of a query in any class's support"


def many(options: EpisodeOptions, count: int = 4000) -> list[Episode]:
    pool = read_pocket("train", min_pictures=4)
    return [episodes.draw(pool, options, 3, 0, i) for i in range(count)]


def test_positions_do_not_give_the_answer_away() -> None:
    """The query's label is as often the first shown, the last shown, or the first listed, as any other."""
    drawn = many(EpisodeOptions(ways=[2], shots=[2], queries=1))
    for guess in (
        lambda e: e.support[0].label,
        lambda e: e.support[-1].label,
        lambda e: e.labels[0],
        lambda e: min(e.labels, key=len),
        lambda e: min(e.labels),
    ):
        share = np.mean([guess(e) == e.queries[0].label for e in drawn])
        assert abs(share - 0.5) < 4 * 0.5 / len(drawn) ** 0.5, share


def test_rank_weights_prefer_near() -> None:
    rng = np.random.default_rng(0)
    tally = Counter(draw_by_rank(rng, [10, 11, 12]) for _ in range(6000))
    assert [round(tally[k] / 6000, 1) for k in (10, 11, 12)] == [0.5, 0.3, 0.2]


def test_two_way_names_one_at_random_and_the_neighbour_by_its_own() -> None:
    pool = read_pocket("train", min_pictures=4)
    for index in range(200):
        episode = episodes.draw(pool, EpisodeOptions(policy="2way-weight", shots=[2]), 0, 0, index)
        real = [pool.classes[e.class_index].name == e.label for e in {e.label: e for e in episode.support}.values()]
        assert sorted(real) == [False, True]


def test_random_shots_come_more_often_the_more_they_are() -> None:
    pool = read_pocket("train", min_pictures=4)
    drawn = [episodes.draw(pool, EpisodeOptions(policy="2way-random-shot", shots=[3]), 0, 0, i) for i in range(1500)]
    tally = Counter(len(e.support) // 2 for e in drawn)
    weights = np.exp(np.arange(1, 4) / 2)
    expected = weights / weights.sum()
    assert [abs(tally[s] / 1500 - expected[s - 1]) < 0.05 for s in (1, 2, 3)] == [True] * 3


def test_hard_pairs_share_the_narrowest_group_and_easy_ones_do_not() -> None:
    pool = read_pocket("train", min_pictures=3)
    for hard in (0.0, 1.0):
        for index in range(200):
            episode = episodes.draw(pool, EpisodeOptions(shots=[1], hard=hard), 0, 0, index)
            groups = {pool.classes[e.class_index].groups[0] for e in episode.support}
            assert (len(groups) == 1) == bool(hard)
            if hard:
                assert all(pool.classes[e.class_index].hard for e in episode.support), "lookalikes are no hard neighbours"


def test_held_out_classes_are_never_drawn() -> None:
    held = {key(p) for split in ("held_out", "validation") for c in read_pocket(split).classes for p in c.pictures}
    for episode in many(EpisodeOptions(ways=[2, 3, 4], shots=[1, 2], queries=4), 500):
        assert not held & {key(e.picture) for e in (*episode.support, *episode.queries)}


def test_zero_shots_has_no_support_set() -> None:
    episode = episodes.draw(made_pool(6, 3, 0), EpisodeOptions(shots=[0], queries=2), 0, 0, 0)
    assert not episode.support
    assert len(episode.queries) == 2


def test_eight_shots_from_five_drawings_use_further_views() -> None:
    pool = read_pocket("held_out", min_pictures=5)
    for index in range(100):
        episode = episodes.draw(pool, EpisodeOptions(shots=[8], further_views=2), 0, 0, index)
        assert len({e.picture for e in episode.support}) == 16
        assert max(e.picture.view for e in episode.support) >= 1
        assert episode.queries[0].picture.view == 0


@pytest.mark.parametrize("policy", ["n-way", "2way-weight"])
def test_without_groups_every_class_comes_as_often(policy: str) -> None:
    """Where nothing is known of nearness, neither `hard` nor rank weights may favour the first names."""
    pool = ClassPool("p", tuple(PictureClass(f"n{i:02}", tuple(Picture(Path(f"{i}-{k}")) for k in range(3))) for i in range(20)))
    options = EpisodeOptions(policy=policy, shots=[1], **({"hard": 1.0} if policy == "n-way" else {}))
    drawn = [episodes.draw(pool, options, 0, 0, i) for i in range(1500)]
    tally = Counter(c for e in drawn for c in {x.class_index for x in e.support})
    assert max(tally.values()) < 1.5 * min(tally.values())


def test_a_single_class_is_refused() -> None:
    for policy in ("n-way", "2way-weight", "2way-random-shot"):
        with pytest.raises(EpisodeError, match="1 classes, 2 ways"):
            episodes.draw(made_pool(1, 4, 0), EpisodeOptions(policy=policy, shots=[1]), 0, 0, 0)


def test_what_cannot_be_drawn_is_an_error() -> None:
    with pytest.raises(EpisodeError, match="2 classes, 3 ways"):
        episodes.draw(made_pool(2, 3, 0), EpisodeOptions(ways=[3]), 0, 0, 0)
    with pytest.raises(EpisodeError, match=r"has 2 pictures, 2 besides the query"):
        episodes.draw(made_pool(4, 2, 0), EpisodeOptions(shots=[2]), 0, 0, 0)
    prefix = ClassPool("p", tuple(PictureClass(n, (Picture(Path(f"{n}1")), Picture(Path(f"{n}2")))) for n in ("cat", "cattle")))
    with pytest.raises(EpisodeError, match="begins another"):
        episodes.draw(prefix, EpisodeOptions(shots=[1], names="real"), 0, 0, 0)
