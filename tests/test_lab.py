"""The lab's probes: what they decode is what was there, and a whole run of them on a tiny adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional

from tests.test_merge import adapter_on
from tools.lab.matching import main as matching
from tools.lab.probe import Probe, explained, right
from tools.lab.probe import main as probe

OVERRIDES = ["sources.lcl.shots=[2]", "sources.lcl.ways=[2]", "sources.lcl.queries=2", "sources.lcl.names=random"]


def test_a_probe_decodes_a_linear_map_and_nothing_from_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    states_ND = functional.normalize(torch.randn(400, 24, generator=generator), dim=-1)
    targets_NC = states_ND @ torch.randn(24, 5, generator=generator)
    probe_of = Probe(states_ND[:300], targets_NC[:300])
    assert explained(probe_of(states_ND[300:]), targets_NC[300:]) > 0.99
    noise_NC = torch.randn(400, 5, generator=generator)
    assert explained(Probe(states_ND[:300], noise_NC[:300])(states_ND[300:]), noise_NC[300:]) < 0.1


def test_right_compares_with_the_mean_of_each_class() -> None:
    support = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.2]])
    assert right(support, torch.tensor([[0.9, 0.1], [0.1, 0.9]]), [3, 7, 3], [3, 3]) == [True, False]


@pytest.fixture(scope="module")
def adapter(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_on(tiny_folder("pocket"), tmp_path_factory.mktemp("lab") / "run", projector=False)


def test_every_layer_is_probed(adapter: Path, tiny_folder: Callable[[str], Path]) -> None:
    base = f"base={tiny_folder('pocket')}"
    arguments = [str(adapter), "recipes/pocket.yaml", "lcl", base, *OVERRIDES, "--test", "train.seed=5", "--episodes", "32", "--every", "1"]
    result = CliRunner().invoke(probe, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    first, _, *layers = result.output.splitlines()
    assert "of 64 queries" in first
    lines = [[float(value) for value in line.split()] for line in layers]
    assert [int(line[0]) for line in lines] == list(range(3))  # the embeddings, and two layers
    assert all(math.isfinite(value) for line in lines for value in line)
    assert lines[0][1] > 0.8  # before the first layer, a picture's place holds its token
    assert lines[0][1] > max(lines[0][2:4])


def test_heads_are_compared_with_features_and_answers(adapter: Path, tiny_folder: Callable[[str], Path]) -> None:
    arguments = [str(adapter), "recipes/pocket.yaml", "lcl", f"base={tiny_folder('pocket')}", *OVERRIDES, "--episodes", "2", "--heads", "3"]
    result = CliRunner().invoke(matching, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("features")
    assert sum(line.startswith("layer") for line in lines) == 3
    assert all(re.search(r" [01]\.\d{3}   n \d+$", line) for line in lines)
