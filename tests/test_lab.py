"""The lab's probes: what they decode is what was there, and a whole run of them on a tiny adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional

from lcl_adapter.answering.judgement import Weighing, Weights
from lcl_adapter.base.model import load_base
from lcl_adapter.base.tower_space import TowerSpace
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.conversations import WORDINGS, from_episode
from lcl_adapter.data.episodes.base import Episode
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import ClassPool, Picture, PictureClass
from lcl_adapter.recipe import load, save
from tests.test_merge import adapter_on
from tools.lab import evidence, likeness
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


def test_the_line_of_evidence_is_of_its_question(adapter: Path, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A query that is one of the labelled photos is most alike to their label, and only its question says so."""
    monkeypatch.setattr(evidence, "read_weighing", lambda *_: (Weighing(several=Weights(0.0, 50.0)), None))
    drawn = Mixture(load("recipes/pocket.yaml", [f"base={tiny_folder('pocket')}", *OVERRIDES])).draw(0)
    assert isinstance(drawn, Episode)
    first = drawn.support[0]
    episode = replace(drawn, queries=(first, *drawn.queries[1:]))
    plain, lined = (read(episode, WORDINGS["short"]) for read in (from_episode, evidence.with_evidence(str(adapter), from_episode)))
    assert lined.shared == plain.shared
    for (question, answer), (with_line, same) in zip(plain.branches, lined.branches, strict=True):
        assert (answer, question.picture) == (same, with_line.picture)
        assert re.fullmatch(r"(\S+ \d, )+\S+ \d\. " + re.escape(question.text), with_line.text)
    tenths = dict(part.rsplit(" ", 1) for part in lined.branches[0][0].text.split(". ")[0].split(", "))
    assert max(tenths, key=lambda label: int(tenths[label])) == first.label


def test_tenths_are_one_digit() -> None:
    assert [evidence.tenths(p) for p in (0.0, 0.099, 0.5, 1.0)] == [0, 0, 5, 9]


def test_pairs_are_of_two_classes_and_hard_ones_of_one_group() -> None:
    counts = {"a": 3, "b": 2, "c": 3, "d": 1}
    classes = [
        PictureClass(name, tuple(Picture(Path(f"{name}{n}")) for n in range(count)), ((name in "ab" and "x") or "y",))
        for name, count in counts.items()
    ]
    pool = ClassPool("pool", tuple(classes))
    owner = [name for name, count in counts.items() for _ in range(count)]
    for hard, apart in ((False, {"ab", "ac", "bc"}), (True, {"ab"})):
        drawn = likeness.pairs(pool, 1, 40, hard, np.random.default_rng(0))
        assert len(drawn) == 40
        assert {"".join(sorted(owner[own[0]] + owner[other[0]])) for own, other, _ in drawn} == apart
        assert all(owner[query] == owner[own[0]] and query not in own for own, _, query in drawn)
    assert likeness.pairs(pool, 3, 5, False, np.random.default_rng(0)) == [], "one class has four photos or more"


def test_the_nearest_class_mean_is_right_where_features_tell_classes_apart() -> None:
    vectors_NC = functional.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    assert likeness.right(vectors_NC, [([0], [2], 1), ([2], [0], 3)]) == 1.0
    assert likeness.right(vectors_NC, [([0], [2], 3), ([2], [0], 3)]) == 0.5


def test_ways_to_compare_stand_side_by_side(adapter: Path, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    save(load("recipes/pocket.yaml", [f"base={tiny_folder('pocket')}", f"output={adapter}"]), adapter / "recipe.yaml")
    generator = torch.Generator().manual_seed(0)
    width = VisionFeatures(load_base(str(tiny_folder("pocket")))).mean_patches([Picture(Path("lcl_adapter/photo/example/new/hammer5.jpg"))]).shape[1]
    space = TowerSpace.fit(torch.randn(50, width, generator=generator), [torch.randn(4, width, generator=generator)])
    monkeypatch.setattr(likeness, "read_weighing", lambda *_: (Weighing(), space))
    result = CliRunner().invoke(likeness.main, [str(adapter), "--shots", "1", "--count", "30"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = re.findall(r"(\S+), 1-shot +30((?: +[01]\.\d{3}){4})\n", result.output)
    assert [name for name, _ in lines] == ["validation.words", "suites.2way"]
