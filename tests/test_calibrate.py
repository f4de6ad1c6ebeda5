"""What a set says of strangers: the threshold of "none of these"."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcl_adapter.serve.calibrate import Calibration, _threshold, familiarity


def cosines(rng: np.random.Generator, labels: list[str], inside: float, across: float, noise: float = 0.02) -> torch.Tensor:
    """Of photos that are so alike within a label and across."""
    made = np.array([[inside if one == other else across for other in labels] for one in labels])
    made = np.clip(made + rng.normal(0, noise, made.shape), -0.99, 0.999)
    return torch.tensor((made + made.T) / 2)


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(2, 6), st.floats(0.5, 0.95), st.floats(0.1, 0.35))
def test_labels_that_are_apart_have_the_threshold_between(seed: int, ways: int, shots: int, inside: float, gap: float) -> None:
    labels = [f"label {n}" for n in range(ways) for _ in range(shots)]
    found = _threshold(cosines(np.random.default_rng(seed), labels, inside, inside - gap - 0.15), labels)
    assert found is not None
    assert familiarity([inside - gap - 0.15]) - 0.3 < found < familiarity([inside])


@given(st.integers(0, 10**6), st.integers(2, 6))
def test_labels_that_look_alike_reject_few_of_their_own(seed: int, shots: int) -> None:
    """Good and scratched: what a label's photos have in common with the other's is no reason."""
    labels = [name for name in ("good", "scratched") for _ in range(shots)]
    likeness = cosines(np.random.default_rng(seed), labels, 0.97, 0.97, 0.002)
    found = _threshold(likeness, labels)
    assert found is not None
    own = [
        familiarity([float(likeness[n, m]) for m in range(len(labels)) if m != n and labels[m] == labels[n]])  # as a new photo of it would be
        for n in range(len(labels))
    ]
    assert sum(one < found for one in own) <= len(own) / 4
    assert found > familiarity([0.8])


def test_nothing_is_said_where_no_label_has_two_photos() -> None:
    assert _threshold(torch.eye(3), ["a", "b", "c"]) is None
    assert _threshold(torch.ones(2, 2), ["a", "a"]) is None


def test_a_calibration_of_another_version_is_made_again() -> None:
    made = Calibration(1.5, 0.7, 8, 7)
    assert Calibration.read(made.written()) == made
    assert Calibration.read({**made.written(), "format": 1}) is None


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_probabilities_sum_to_one_and_keep_the_order(temperature: float) -> None:
    found = Calibration(temperature).probabilities([-1.0, -3.0, -0.5])
    assert sum(found) == pytest.approx(1)
    assert sorted(range(3), key=lambda n: found[n]) == [1, 0, 2]
