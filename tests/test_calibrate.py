"""A set's calibration: the threshold of "none of these", and the temperature of the probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcl_adapter.answering.judgement import LeastFamiliar, familiarity
from lcl_adapter.serve.calibrate import Calibration, _threshold


def cosines(rng: np.random.Generator, labels: list[str], inside: float, across: float, noise: float = 0.02) -> torch.Tensor:
    """Cosines [N, N] of photos: ``inside`` between photos of the same label, ``across`` between labels, plus noise."""
    cosines_NN = np.array([[inside if first == second else across for second in labels] for first in labels])
    cosines_NN = np.clip(cosines_NN + rng.normal(0, noise, cosines_NN.shape), -0.99, 0.999)
    return torch.tensor((cosines_NN + cosines_NN.T) / 2)


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(2, 6), st.floats(0.5, 0.95), st.floats(0.1, 0.35))
def test_for_labels_far_apart_the_threshold_lies_between(seed: int, ways: int, shots: int, inside: float, gap: float) -> None:
    labels = [f"label {n}" for n in range(ways) for _ in range(shots)]
    threshold = _threshold(cosines(np.random.default_rng(seed), labels, inside, inside - gap - 0.15), labels)
    assert threshold is not None
    assert familiarity([inside - gap - 0.15]) - 0.3 < threshold < familiarity([inside])


@given(st.integers(0, 10**6), st.integers(2, 6))
def test_labels_that_look_alike_reject_few_of_their_own(seed: int, shots: int) -> None:
    """Such as good and scratched: a photo is not rejected because it also looks like the other label's photos."""
    labels = [name for name in ("good", "scratched") for _ in range(shots)]
    cosines_NN = cosines(np.random.default_rng(seed), labels, 0.97, 0.97, 0.002)
    threshold = _threshold(cosines_NN, labels)
    assert threshold is not None
    own = [  # each photo's familiarity, as if it were a new photo of its label
        familiarity([float(cosines_NN[n, m]) for m in range(len(labels)) if m != n and labels[m] == labels[n]]) for n in range(len(labels))
    ]
    assert sum(score < threshold for score in own) <= len(own) / 4
    assert threshold > familiarity([0.8])


def test_there_is_no_threshold_without_two_photos_of_a_label_or_with_one_label() -> None:
    assert _threshold(torch.eye(3), ["a", "b", "c"]) is None
    assert _threshold(torch.ones(2, 2), ["a", "a"]) is None


def test_validation_classes_give_a_set_of_single_photos_a_threshold() -> None:
    expected = LeastFamiliar(0.4, 0.2, 100)
    assert _threshold(torch.eye(3), ["a", "b", "c"], expected) == pytest.approx(0.4)
    assert _threshold(torch.ones(2, 2), ["a", "a"], expected) is None, "with one label, everything would be the one or none"


@given(st.integers(0, 10**6), st.integers(2, 6))
def test_the_more_photos_a_set_has_the_more_its_own_threshold_counts(seed: int, shots: int) -> None:
    labels = [name for name in ("cup", "bowl") for _ in range(shots)]
    cosines_NN = cosines(np.random.default_rng(seed), labels, 0.8, 0.3)
    own, expected = _threshold(cosines_NN, labels), LeastFamiliar(3.0, 0.2)
    assert own is not None
    both = _threshold(cosines_NN, labels, expected)
    assert both == pytest.approx((4 * expected.of(shots) + 2 * shots * own) / (4 + 2 * shots))
    assert own < both < expected.of(shots)


def test_a_calibration_of_another_format_is_not_used() -> None:
    calibration = Calibration(1.5, 0.7, 8, 7)
    assert Calibration.from_json(calibration.to_json()) == calibration
    assert Calibration.from_json({**calibration.to_json(), "format": 1}) is None


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_probabilities_sum_to_one_in_the_order_of_the_likelihoods(temperature: float) -> None:
    probabilities = Calibration(temperature).probabilities([-1.0, -3.0, -0.5])
    assert sum(probabilities) == pytest.approx(1)
    assert sorted(range(3), key=lambda n: probabilities[n]) == [1, 0, 2]
