"""How a tower's features are compared: standardised, limited, and less along what varies within a class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional

from lcl_adapter.base.model import load_base
from lcl_adapter.base.prototypes import class_means
from lcl_adapter.base.tower_space import LIMIT, SHRINKAGE, TowerSpace
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.evaluate.trained import CLASSES, PHOTOS, trained_features
from lcl_adapter.recipe import Recipe
from tests.conftest import paint

SEEDS = st.integers(0, 10**6)


def features(seed: int, classes: int = 12, photos: int = 4, width: int = 8, light: float = 0.0) -> list[torch.Tensor]:
    """Photos of classes, [N, C] of each. ``light`` is how much more those of one class vary along the diagonal than elsewhere."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return [normal(width) + normal(photos, width) + light * normal(photos, 1) for _ in range(classes)]


@given(SEEDS, st.integers(0, 6))
def test_vectors_have_unit_length_and_do_not_depend_on_the_features_scale(seed: int, classes: int) -> None:
    own = features(seed)
    space = TowerSpace.fit(torch.cat(own), own[:classes])
    vectors = space.vectors(torch.cat(own))
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)))
    scale = torch.logspace(-2, 2, 8)
    scaled = [3 + scale * one for one in own]
    again = TowerSpace.fit(torch.cat(scaled), scaled[:classes]).vectors(torch.cat(scaled))
    assert torch.allclose(vectors @ vectors.T, again @ again.T, atol=1e-3)


@given(SEEDS)
def test_the_likeness_is_that_of_the_inverse_covariance_within_classes(seed: int) -> None:
    own = features(seed, light=2.0)
    space = TowerSpace.fit(torch.cat(own), own)
    around = torch.cat([(limited - limited.mean(0)) * (4 / 3) ** 0.5 for one in own for limited in [space.limited(one)]]).double()
    covariance = around.T @ around
    shrunk = covariance / covariance.diagonal().mean() + SHRINKAGE * torch.eye(8)
    limited = space.limited(torch.cat(own)).double()
    products = limited @ torch.linalg.inv(shrunk) @ limited.T
    lengths = products.diagonal().sqrt()
    vectors = space.vectors(torch.cat(own))
    assert torch.allclose(vectors @ vectors.T, (products / lengths / lengths[:, None]).float(), atol=1e-4)


def test_what_varies_within_classes_counts_less_for_new_ones() -> None:
    trained, new = (features(seed, classes=60, width=16, light=2.0) for seed in (0, 1))

    def right(space: TowerSpace) -> float:
        """Of the last photos of new classes, by the mean of the first ones."""
        means = class_means(space.vectors(torch.cat([one[:2] for one in new])), [n for n in range(60) for _ in range(2)])
        nearest = (space.vectors(torch.stack([one[3] for one in new])) @ means.T).argmax(1)
        return float((nearest == torch.arange(60)).float().mean())

    plain = right(TowerSpace.fit(torch.cat(trained)))
    assert right(TowerSpace.fit(torch.cat(trained), trained)) > plain + 0.05


def test_a_feature_that_is_nearly_always_zero_does_not_become_the_whole_vector() -> None:
    rare = torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    rare[:, 0] = 0
    rare[0, 0] = 1
    space = TowerSpace.fit(rare)
    assert float(space.limited(rare).abs().max()) == LIMIT
    assert abs(float(space.vectors(rare)[0, 0])) < 0.7
    assert abs(float(TowerSpace(space.statistics).vectors(rare)[0, 0])) > 0.95, "without a limit it would be"


@pytest.mark.parametrize("photos", [1, 2])
def test_classes_of_one_photo_say_nothing_about_what_varies(photos: int) -> None:
    own = features(0, photos=photos)
    space = TowerSpace.fit(torch.cat(own), own)
    assert len(space.directions) == (7 if photos > 1 else 0)
    assert torch.isfinite(space.vectors(torch.cat(own))).all()


@pytest.mark.parametrize("photos", [2, 3, 7])
def test_copies_of_a_photo_say_nothing_about_what_varies(photos: int) -> None:
    own = features(0)
    copies = [one[:1].repeat(photos, 1) for one in own]
    plain = TowerSpace.fit(torch.cat(own))
    assert torch.equal(TowerSpace.fit(torch.cat(own), copies).vectors(own[0]), plain.vectors(own[0]))
    assert torch.isfinite(TowerSpace.fit(torch.cat(own), [*copies, own[0]]).vectors(own[0])).all()


@pytest.mark.parametrize("classes", [0, 12])
def test_a_space_is_the_same_after_a_file(classes: int, tmp_path: Path) -> None:
    own = features(0)
    space = TowerSpace.fit(torch.cat(own), own[:classes], patches=torch.rand(2, 8))
    save_file(space.to_tensors(), tmp_path / "tower.safetensors")
    again = TowerSpace.from_tensors(load_file(tmp_path / "tower.safetensors"))
    assert torch.equal(space.vectors(own[0]), again.vectors(own[0]))
    assert torch.equal(space.limited_patches(own[0]), again.limited_patches(own[0]))
    assert space.hash() == again.hash() != TowerSpace.fit(torch.cat(own[:6])).hash()


def test_a_file_of_an_earlier_version_compares_as_it_did() -> None:
    own = torch.cat(features(0))
    own[0, 0] = 100
    mean, deviation = own.mean(0), own.std(0)
    space = TowerSpace.from_tensors({"tower": torch.stack([mean, deviation])})
    assert torch.allclose(space.vectors(own), functional.normalize((own - mean) / deviation, dim=1))
    assert not space.compares_patches


# Photos of the classes that were trained on


def made(pocket_tiny: Path, photos: Path, **more: object) -> Recipe:
    source = {"type": "class-folder", "path": str(photos), "shots": [1]}
    return Recipe.model_validate({"base": str(pocket_tiny), "output": "unused", "sources": {"own": source, **more}})


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, colour in enumerate([(200, 40, 40), (40, 200, 40), (40, 40, 200)]):
        for photo in range(PHOTOS + 2):
            paint(tmp_path / "photos" / f"class{number}" / f"{photo}.png", colour, seed=10 * number + photo)
    return tmp_path / "photos"


def test_some_photos_of_each_trained_class_are_read(pocket_tiny: Path, photos: Path) -> None:
    vision = VisionFeatures(load_base(str(pocket_tiny)))
    questions = {"type": "llava-json", "file": "pocket:captions_eval.json", "images": "pocket:drawings.zip"}
    own = trained_features(made(pocket_tiny, photos, words=questions), vision)
    assert [len(one) for one in own] == [PHOTOS] * 3, "questions have no classes"
    assert vision.computed == 3 * PHOTOS
    again = trained_features(made(pocket_tiny, photos, words=questions), VisionFeatures(load_base(str(pocket_tiny))))
    assert all(map(torch.equal, own, again))


def test_no_more_classes_than_help_are_read(pocket_tiny: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcl_adapter.evaluate.trained.CLASSES", 2)
    assert len(trained_features(made(pocket_tiny, photos), VisionFeatures(load_base(str(pocket_tiny))))) == 2 < CLASSES


def test_a_broken_photo_is_left_out_and_printed(pocket_tiny: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = made(pocket_tiny, photos)
    for photo in (photos / "class1").iterdir():
        photo.write_bytes(b"none")
    (photos / "class2" / "0.png").write_bytes(b"none")
    own = trained_features(recipe, VisionFeatures(load_base(str(pocket_tiny))))
    assert sorted(map(len, own))[:1] == [0]
    assert sum(map(len, own)) in {2 * PHOTOS, 2 * PHOTOS - 1}, "the broken one may not be among those that are read"
    assert "class1" in (shown := capsys.readouterr().err)
    assert "judgement: left out" in shown


def test_a_source_that_is_gone_leaves_the_others(pocket_tiny: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = {"type": "class-folder", "path": str(photos.parent / "gone"), "shots": [1]}
    own = trained_features(made(pocket_tiny, photos, gone=gone), VisionFeatures(load_base(str(pocket_tiny))))
    assert len(own) == 3
    assert "left out: the classes of sources.gone" in capsys.readouterr().err
