"""Classes without end: blends of two classes, in episodes, in features and in pixels. And copies of support pictures as queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_adapter.base.model import load_base
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data import episodes
from lcl_adapter.data.episodes.base import BLENDS
from lcl_adapter.data.sources import Picture, read_image
from lcl_adapter.recipe.sources import EpisodeOptions
from tests.conftest import paint
from tests.test_episodes import made_pool


@settings(max_examples=60, deadline=None)
@given(ways=st.integers(2, 4), shots=st.integers(1, 3), seed=st.integers(0, 50), classes=st.integers(4, 9))
def test_a_blended_class_is_one_mix_of_two(ways: int, shots: int, seed: int, classes: int) -> None:
    options = EpisodeOptions(ways=[ways], shots=[shots], queries=4, blended=1.0)
    episode = episodes.draw(made_pool(classes, 5, 0), options, seed, 0, 0)
    weights: dict[int, set[float]] = {}
    partners: dict[int, set[str]] = {}
    for example in (*episode.support, *episode.queries):
        assert example.picture.blend is not None
        partner, weight = example.picture.blend
        weights.setdefault(example.class_index, set()).add(weight)
        partners.setdefault(example.class_index, set()).add(partner.path.name.split("-")[0])
        assert BLENDS[0] <= weight <= BLENDS[1]
    assert all(len(of_class) == 1 for of_class in (*weights.values(), *partners.values()))
    assert all(str(index) not in names for index, names in partners.items())


def test_without_the_option_episodes_are_what_they_were() -> None:
    pool = made_pool(8, 5, 0)
    plain = EpisodeOptions(ways=[3], shots=[2], queries=3)
    for index in range(20):
        episode = episodes.draw(pool, plain, 0, 0, index)
        assert all(example.picture.blend is None for example in (*episode.support, *episode.queries))
        blended = episodes.draw(pool, plain.model_copy(update={"blended": 1.0}), 0, 0, index)
        assert {e.class_index for e in episode.queries} <= {e.class_index for e in blended.support}


def test_a_class_under_its_own_name_is_not_blended() -> None:
    options = EpisodeOptions(ways=[2], shots=[1], names="real", blended=1.0)
    drawn = [episodes.draw(made_pool(8, 5, 0), options, 0, 0, index) for index in range(30)]
    assert all(example.picture.blend is None for episode in drawn for example in episode.support)


@pytest.mark.parametrize("blended", [0.0, 1.0])
def test_a_copied_query_is_a_support_picture_with_its_label(blended: float) -> None:
    options = EpisodeOptions(ways=[3], shots=[2], queries=5, copied=1.0, blended=blended)
    for index in range(20):
        episode = episodes.draw(made_pool(8, 5, 0), options, 0, 0, index)
        assert {(q.picture, q.label) for q in episode.queries} <= {(s.picture, s.label) for s in episode.support}


def test_features_are_mixed_and_pixels_too(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    first, second = Picture(paint(tmp_path / "a.png", (200, 30, 30))), Picture(paint(tmp_path / "b.png", (30, 30, 200), seed=1, size=(30, 30)))
    blend = replace(first, blend=(second, 0.25))
    vision = VisionFeatures(load_base(str(tiny_folder("pocket"))))
    alone = vision.tower_features([first, second])
    mixed = vision.tower_features([second, blend, first])
    assert torch.allclose(mixed[0], alone[1])
    assert torch.allclose(mixed[1], 0.75 * alone[0] + 0.25 * alone[1], atol=1e-6)
    assert torch.allclose(mixed[2], alone[0])
    assert vision.computed == 2  # a blend goes through the tower as its two pictures, once
    seen = np.asarray(read_image(blend), dtype=float).mean((0, 1))
    assert seen == pytest.approx([0.75 * 200 + 0.25 * 30, 30, 0.75 * 30 + 0.25 * 200], abs=6)
    assert "blended with 0.25 of" in str(blend)
