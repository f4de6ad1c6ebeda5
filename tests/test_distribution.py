"""``retain: distribution``: the distance to the base's own distribution, in rows that share a batch with others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional

from lcl_adapter.base.model import attach, load_base
from lcl_adapter.base.precision import allow_gradients
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.errors import RunError
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.schema import AdapterOptions
from lcl_adapter.training import losses, replay, sharding, trainer
from lcl_adapter.training.collate import Collator
from lcl_adapter.training.losses import divergence
from tests.test_self_replay import PROMPTS, made
from tests.test_trainer import losses as losses_of


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    return tmp_path / "prompts.txt"


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 9), words=st.integers(2, 7), chunk=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_divergence_is_that_of_the_formula(tokens: int, words: int, chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    own, logits = (3 * torch.randn(tokens, words, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    p, q = own.softmax(-1), logits.softmax(-1)
    expected = (p * (p.log() - q.log())).sum()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(losses, "CHUNK", chunk)
        computed = divergence(logits, own)
        computed.backward()
    assert computed.item() == pytest.approx(expected.item(), abs=1e-4)
    assert torch.allclose(logits.grad, (q - p).detach(), atol=1e-5)
    assert divergence(own, own).item() == pytest.approx(0, abs=1e-6)


class Step:
    """A trainer on a batch of rows of both kinds, without a training loop."""

    def __init__(self, folder: Path, output: Path, prompts: Path, precision: str = "fp32", **more: Any) -> None:
        base = load_base(BaseRef(str(folder), precision))  # type: ignore[arg-type]
        allow_gradients(base.model)
        recipe = made(base.path, output, prompts, retain="distribution", max_new_tokens=12, **more)
        mixture = replay.answer_prompts(Mixture(recipe), base, output)
        self.base = attach(base, AdapterOptions(rank=4, dropout=0.1, projector=True))
        self.collator = Collator(mixture, self.base.encoder())
        self.trainer = trainer.LclTrainer(self.base, recipe, self.collator, VisionFeatures(self.base), 8)
        self.own = [i for i in range(60) if mixture.slot(i).source == "own"]
        self.lcl = [i for i in range(60) if mixture.slot(i).source == "lcl"]

    def loss(self, indices: list[int], items: int | None = None) -> torch.Tensor:
        return self.trainer.compute_loss(self.base.model, self.collator([{"index": i} for i in indices]), num_items_in_batch=items)

    def trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.base.model.parameters() if p.requires_grad]

    def perturb(self) -> None:
        torch.manual_seed(3)
        for parameter in self.trained():
            parameter.data += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_it_is_0_at_the_start_and_training_lowers_it(
    tiny_folder: Callable[[str], Path],
    prompts: Path,
    photos: Path,
    tmp_path: Path,
    precision: str,
) -> None:
    """With pictures in some rows, dropout and a trained projector, all of which the base's own pass is without."""
    step = Step(tiny_folder("llava-1.5"), tmp_path / "run", prompts, precision, images=str(photos))
    near_0 = 1e-5 if precision == "fp32" else 1e-3  # TRL rounds the trained projector of a quantised base to bf16
    step.base.model.train()
    start = step.loss(step.own[:4])
    assert abs(start.item()) < near_0
    start.backward()
    gradients = [float(p.grad.abs().max()) for p in step.trained() if p.grad is not None]
    assert len(gradients) > 20
    assert max(gradients) < 10 * near_0
    step.perturb()
    before = [p.requires_grad for p in step.base.model.parameters()]
    optimizer = torch.optim.Adam(step.trained(), lr=1e-2)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = step.loss(step.own[:4])
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[0] > 0.01
    assert values[-1] < 0.7 * values[0]
    assert [p.requires_grad for p in step.base.model.parameters()] == before
    assert step.base.model.training


def test_positions_of_rows_and_columns(tiny_folder: Callable[[str], Path], prompts: Path, tmp_path: Path) -> None:
    """Qwen2-VL's positions have three coordinates, and it has no projector of its own."""
    folder = tiny_folder("qwen2-vl")
    base = load_base(str(folder))
    recipe = made(folder, tmp_path / "run", prompts, retain="distribution", packed=3)
    recipe = recipe.model_copy(update={"adapter": AdapterOptions(rank=4)})
    mixture = replay.answer_prompts(Mixture(recipe), base, tmp_path / "run")
    adapted = attach(base, recipe.adapter)
    collator = Collator(mixture, adapted.encoder())
    lcl = trainer.LclTrainer(adapted, recipe, collator, VisionFeatures(adapted), 8)
    own = [i for i in range(60) if mixture.slot(i).source == "own"][:3]
    assert abs(lcl.compute_loss(adapted.model, collator([{"index": i} for i in own])).item()) < 1e-5


def test_rows_of_both_kinds_share_a_batch(tiny_folder: Callable[[str], Path], prompts: Path, photos: Path, tmp_path: Path) -> None:
    """The sum over a batch is that over its parts, each with its own kind of loss, divided by the tokens of the whole step."""
    step = Step(tiny_folder("llava-1.5"), tmp_path / "run", prompts, images=str(photos))
    step.perturb()
    step.base.model.eval()
    mixed = [step.lcl[0], step.own[0], step.lcl[1], step.own[1]]
    with torch.no_grad():
        whole = step.loss(mixed, 100)
        parts = [step.loss([i], 100) for i in mixed]
        assert whole.item() == pytest.approx(sum(p.item() for p in parts), rel=1e-4)
        batch = step.collator([{"index": i} for i in mixed])
        learned = int((batch["labels"][:, 1:] != -100).sum())
        assert step.loss(mixed).item() == pytest.approx(whole.item() * 100 / learned, rel=1e-5)
        # The base's own logits are those of the base alone
        base = load_base(step.base.path.as_posix())
        batch = step.collator([{"index": i} for i in step.own[:2]])
        read = functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
        vision = VisionFeatures(base).projected_features(batch["pictures"]) if batch["pictures"] else {}
        alone = base.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["position_ids"],
            **({"mm_encoder_outputs": vision} if vision else {}), logits_to_keep=read, use_cache=False,
        ).logits  # fmt: skip
        own = losses.own_logits(step.base, step.trainer.vision, step.base.encoder(), batch, batch["pictures"], [0, 1], read)
        assert torch.allclose(own, alone.reshape(own.shape), atol=1e-4)
        asked = step.loss(step.own[:2], 1)
        adapted = losses.divergence(step.base.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["position_ids"],
            pictures=batch["pictures"], logits_to_keep=read, use_cache=False,
        ).logits.reshape(own.shape), own)  # fmt: skip
        assert asked.item() == pytest.approx(adapted.item(), rel=1e-4)


def without_dropout(base: Path, output: Path, prompts: Path, **train: Any) -> Recipe:
    recipe = made(base, output, prompts, {"max_steps": 4, "per_device_train_batch_size": 4, "bucket": 1, **train}, retain="distribution", share=1.0)
    return recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"dropout": 0.0})})


def test_accumulated_batches_learn_as_one(pocket_tiny: Path, prompts: Path, tmp_path: Path) -> None:
    one, two = (
        without_dropout(pocket_tiny, tmp_path / "one", prompts),
        without_dropout(pocket_tiny, tmp_path / "two", prompts, per_device_train_batch_size=2, gradient_accumulation_steps=2),
    )
    facts = trainer.train(one)
    trainer.train(two)
    assert facts["tokens"]["own"]["rows"] > 2
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=2e-3) for name in weights[0])


def test_what_it_cannot_be_combined_with_is_refused(pocket_tiny: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = without_dropout(pocket_tiny, tmp_path / "run", prompts)
    values = recipe.model_dump(mode="json", exclude_none=True)
    with pytest.raises(ValueError, match=r"sources\.own\.retain: answers"):
        Recipe.model_validate({**values, "adapter": {"pissa": True}})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RunError, match="retain: answers"):
        sharding.refuse_unsupported(recipe)
