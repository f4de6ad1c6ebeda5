"""Packed rows: whole conversations share a row. They have the loss and the gradients of rows of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lcl_adapter import recipe as recipes
from lcl_adapter.base.encoder import IGNORED, Encoded, Encoder
from lcl_adapter.base.model import Base, attach, load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.errors import EpisodeError
from lcl_adapter.memory import budget, plan
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.schema import AdapterOptions
from lcl_adapter.training import packing, preflight, replay, trainer
from lcl_adapter.training.collate import Collator, attention_mask, collate
from lcl_adapter.training.lengths import check_rows
from lcl_adapter.training.packing import join, layout, pad_to, places_of, widest
from tests.conftest import EVERY
from tests.test_self_replay import PROMPTS
from tests.test_trainer import losses as losses_of
from tests.test_trainer import small

lengths_of_rows = st.lists(st.integers(1, 90), min_size=1, max_size=14)


def mixed(base: Path, output: Path, budget: int | None, supports: str = "ordered", **train: Any) -> Recipe:
    """Episodes with shared support sets of one and of many pictures, and rows of plain questions."""
    values = small(base, output, **{"per_device_train_batch_size": 6, "tokens_per_batch": budget, **train}).model_dump(mode="json", exclude_none=True)
    lcl = {"type": "pocket", "split": "train", "shots": [1, 2], "ways": [2, 3], "queries": 2, "learn": "repeated"}
    plain = {"type": "llava-json", "file": "pocket:vqa_train.json", "images": "pocket:drawings.zip", "packed": 2}
    sources = {"lcl": {**lcl, "share": 0.6}, "vqa": {**plain, "share": 0.4}}
    return Recipe.model_validate({**values, "supports": supports, "sources": sources, "adapter": {"rank": 4, "projector": True}})


@pytest.fixture
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are laid as for a wide language model, whose attention costs little. The tiny ones are narrow."""
    monkeypatch.setattr(packing, "EQUAL", 10**6)


# --- the layout, and the mask


@settings(max_examples=100, deadline=None)
@given(lengths_of_rows, st.integers(90, 400), st.sampled_from([8, 64, 4096]))
def test_a_layout_has_every_row_once_within_the_budget_and_no_more_tokens(lengths: list[int], budget: int, width: int) -> None:
    rows = layout(lengths, budget, width)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert max(filled) <= budget
    assert len(rows) * pad_to(max(filled)) <= len(lengths) * pad_to(max(lengths))
    places = places_of(lengths, rows)
    assert [place.stop - place.start for place in places] == lengths
    assert layout(lengths, None, width) == [[index] for index in range(len(lengths))]


def test_a_narrow_model_has_shorter_rows() -> None:
    """Rows of one length have little padding as they are, so a narrow model's attention decides; a wide model's does not."""
    assert [len(row) for row in layout([165] * 6, 512, 128)] == [1] * 6
    assert [len(row) for row in layout([165] * 6, 512, 4096)] == [3] * 2
    assert len(layout([400, 100, 100, 100], 448, 128)) < 4, "much padding is not computed by any model"


def test_rows_that_the_base_reads_too_are_together() -> None:
    """They are laid first, so that the base's own pass has few rows."""
    lengths = [50, 10, 40, 10, 30, 10, 20, 10]
    near = [1, 3, 5, 7]
    rows = layout(lengths, 90, 4096, near)
    assert sum(bool(set(row) & set(near)) for row in rows) == 1
    assert len(rows) == 2


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6).map(sorted), min_size=1, max_size=3), st.integers(0, 3))
def test_no_token_sees_another_part(branches: list[list[int]], padding: int) -> None:
    """Within each part, the mask is that of a row of its own."""
    rows = [Encoded([7] * len(b), [7] * len(b), b, [0] * len(b), list(range(len(b))), (), [0] * len(b), [0] * len(b)) for b in branches]
    packed = join(rows)
    assert packed.positions == [position for row in rows for position in range(len(row))]
    fill = [0] * padding
    columns = [torch.tensor([numbers + fill]) for numbers in (packed.part, packed.branch, packed.example, packed.hidden)]
    real = torch.tensor([[True] * len(packed) + [False] * padding])
    mask = attention_mask(*columns, real)[0, 0]
    expected = torch.eye(len(packed) + padding, dtype=torch.bool)
    start = 0
    for row in rows:
        own = [torch.tensor([numbers]) for numbers in (row.part, row.branch, row.example, row.hidden)]
        stop = start + len(row)
        expected[start:stop, start:stop] = attention_mask(*own, torch.ones(1, len(row), dtype=torch.bool))[0, 0]
        start = stop
    assert torch.equal(mask[: len(packed)], expected[: len(packed)])


@pytest.mark.usefixtures("_wide")
def test_rows_that_stay_alone_have_a_mask_of_two_dimensions(pocket_tiny: Path, tmp_path: Path) -> None:
    made = small(pocket_tiny, tmp_path, tokens_per_batch=4000, per_device_train_batch_size=1)
    made = made.model_copy(update={"sources": {"lcl": made.sources["lcl"].model_copy(update={"queries": 1})}})
    collator = Collator(Mixture(made), load_base(str(pocket_tiny)).encoder())
    assert collator([{"index": 0}])["attention_mask"].ndim == 2
    assert collator([{"index": 0}, {"index": 1}])["attention_mask"].ndim == 4


# --- loss and gradients


class Step:
    """The trainer's loss of the same conversations, packed and in rows of their own, without a training loop."""

    def __init__(self, base: Base, recipe: Recipe, mixture: Mixture | None = None) -> None:
        torch.manual_seed(0)
        self.base = attach(base, recipe.adapter)
        for name, parameter in self.base.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        for module in self.base.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        self.recipe = recipe
        self.mixture = mixture or Mixture(recipe)
        self.collator = Collator(self.mixture, self.base.encoder())
        self.trainer = trainer.LclTrainer(self.base, recipe, self.collator, VisionFeatures(self.base), 6)
        self.trained = [p for p in self.base.model.parameters() if p.requires_grad]

    def order(self, indices: Sequence[int]) -> list[int]:
        """The conversations in the order in which packed rows have them."""
        lengths = [len(self.collator.row(index)) for index in indices]
        near = [n for n, index in enumerate(indices) if self.mixture.slot(index).source in self.recipe.near_base]
        return [indices[number] for row in layout(lengths, self.collator.budget, self.collator.encoder.width, near) for number in row]

    def losses(self, indices: Sequence[int]) -> list[tuple[torch.Size, torch.Tensor, list[torch.Tensor]]]:
        """(shape of the tensor, loss, gradients): packed, then in rows of their own, in one batch."""
        recipe, results = self.mixture.recipe, []
        for tokens in (recipe.train.tokens_per_batch, None):
            train = recipe.train.model_copy(update={"tokens_per_batch": tokens})
            self.mixture.recipe = recipe.model_copy(update={"train": train})
            batch = self.collator([{"index": index} for index in indices])
            torch.manual_seed(5)
            self.base.model.train()
            loss = self.trainer.compute_loss(self.base.model, batch, num_items_in_batch=40)
            results.append((batch["labels"].shape, loss.detach(), list(torch.autograd.grad(loss, self.trained))))
        self.mixture.recipe = recipe
        return results

    def assert_same(self, indices: Sequence[int]) -> None:
        (packed, loss, gradients), (alone, own_loss, own_gradients) = self.losses(self.order(indices))
        assert packed[0] < alone[0]
        assert packed.numel() < alone.numel()
        assert loss.item() == pytest.approx(own_loss.item(), rel=1e-5)
        largest = max(float(g.abs().max()) for g in own_gradients)
        assert largest > 0
        assert max(float((a - b).abs().max()) for a, b in zip(gradients, own_gradients, strict=True)) < 1e-4 * largest


@pytest.mark.usefixtures("_wide")
@pytest.mark.parametrize("supports", ["ordered", "independent", "compressed"])
@pytest.mark.parametrize("family", EVERY)
def test_packed_rows_equal_separate_rows(family: str, supports: str, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """In every family, qwen2-vl's positions of three coordinates among them."""
    folder = tiny_folder(family)
    made = mixed(folder, tmp_path / "run", 1500, supports)
    base = load_base(BaseRef(str(folder), device="cpu", supports=supports))  # type: ignore[arg-type]
    if not base.own_projector:
        made = made.model_copy(update={"adapter": AdapterOptions(rank=4)})
    step = Step(base, made)
    assert len({step.mixture.slot(index).source for index in range(6)}) == 2
    step.assert_same(range(6))


@pytest.mark.usefixtures("_wide")
def test_noise_is_drawn_as_in_separate_rows(pocket_tiny: Path, tmp_path: Path) -> None:
    """The same noise on the same pictures, where both have them in one order; each picture goes through the tower once."""
    made = mixed(pocket_tiny, tmp_path / "run", 1500, feature_noise=0.5)
    step = Step(load_base(str(pocket_tiny)), made)
    step.assert_same(range(6))
    distinct = {picture for index in range(6) for picture in step.collator.row(index).pictures}
    assert step.trainer.vision.computed == len(distinct)
    quiet = Step(load_base(str(pocket_tiny)), mixed(pocket_tiny, tmp_path / "quiet", 1500))
    assert quiet.losses(range(6))[0][1].item() != pytest.approx(step.losses(range(6))[0][1].item(), rel=1e-3)


@pytest.mark.usefixtures("_wide")
@pytest.mark.parametrize("family", ["llava-1.5", "qwen2-vl"])
def test_rows_near_the_base_share_rows_with_others(family: str, tiny_folder: Callable[[str], Path], photos: Path, tmp_path: Path) -> None:
    folder = tiny_folder(family)
    (tmp_path / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    values = mixed(folder, tmp_path / "run", 1500).model_dump(mode="json", exclude_none=True)
    own = {"type": "self", "prompts": str(tmp_path / "prompts.txt"), "max_new_tokens": 12, "packed": 2, "share": 0.5}
    own |= {"retain": "distribution", "images": str(photos)}
    sources = {"lcl": {**values["sources"]["lcl"], "share": 0.5}, "own": own}
    made = Recipe.model_validate({**values, "sources": sources, "adapter": {"rank": 4}})
    base = load_base(BaseRef(str(folder), device="cpu"))
    mixture = replay.answer_prompts(Mixture(made), base, tmp_path / "run")
    step = Step(base, made, mixture)
    indices = [index for index in range(60) if mixture.slot(index).source == "own"][:3]
    indices += [index for index in range(60) if mixture.slot(index).source == "lcl"][:3]
    step.assert_same(indices)
    batch = step.collator([{"index": index} for index in indices])
    near = {place.row for (source, *_), place in zip(batch["counts"], batch["places"], strict=True) if source == "own"}
    others = {place.row for (source, *_), place in zip(batch["counts"], batch["places"], strict=True) if source == "lcl"}
    assert near & others, "a row has both kinds"


# --- a training


@pytest.mark.usefixtures("_wide")
def test_a_training_learns_the_same(pocket_tiny: Path, tmp_path: Path) -> None:
    """The same losses and the same counts, in fewer rows."""
    facts, shapes = [], {}
    for name, tokens in (("alone", None), ("packed", 1500)):
        made = mixed(pocket_tiny, tmp_path / name, tokens, max_steps=3, logging_steps=1)
        made = made.model_copy(update={"adapter": AdapterOptions(rank=4)})
        facts.append(trainer.train(made))
        shapes[name] = Collator(Mixture(made), load_base(str(pocket_tiny)).encoder())([{"index": i} for i in range(6)])["labels"].shape
    assert losses_of(tmp_path / "packed") == pytest.approx(losses_of(tmp_path / "alone"), rel=1e-4)
    assert facts[0]["tokens"] == facts[1]["tokens"]
    assert facts[0]["shares"] == facts[1]["shares"]
    assert facts[0]["images"] == facts[1]["images"]
    assert shapes["packed"][0] < shapes["alone"][0]
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "packed")]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=2e-3) for name in weights[0])


# --- bounds, forecasts and messages


def longest_row(made: Recipe) -> int:
    return len(check_rows(Collator(Mixture(made), load_base(str(made.base)).encoder())).longest)


def test_a_row_longer_than_the_budget_is_refused_by_name(pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any weight is loaded; of an episode and of a record. `data check` names it too."""
    monkeypatch.setattr(trainer, "load_base", lambda *_: pytest.fail("weights were loaded"))
    bounds = check_rows(Collator(Mixture(mixed(pocket_tiny, tmp_path, None)), load_encoder_of(pocket_tiny))).bounds
    assert bounds["vqa"] < bounds["lcl"]
    with pytest.raises(EpisodeError, match=rf"longest episode.*: a row of {bounds['lcl']} tokens does not fit `train.tokens_per_batch: 60`. Set "):
        trainer.train(mixed(pocket_tiny, tmp_path / "run", 60))
    questions = mixed(pocket_tiny, tmp_path / "run", 20)
    questions = questions.model_copy(update={"sources": {"vqa": questions.sources["vqa"]}})
    with pytest.raises(EpisodeError, match=rf"vqa, with .*vqa_train.json.*: a row of {bounds['vqa']} tokens does not fit"):
        trainer.train(questions)
    path = tmp_path / "recipe.yaml"
    recipes.save(mixed(pocket_tiny, tmp_path / "run", 60), path)
    checked = preflight.check(recipes.load(str(path)))
    assert "does not fit `train.tokens_per_batch: 60`" in json.dumps(checked, default=str)


def load_encoder_of(folder: Path) -> Encoder:
    from lcl_adapter.base.model import load_encoder

    return load_encoder(BaseRef(str(folder), device="cpu"))


def test_a_budget_of_just_the_longest_row_is_enough(pocket_tiny: Path, tmp_path: Path) -> None:
    most = max(check_rows(Collator(Mixture(mixed(pocket_tiny, tmp_path, None)), load_encoder_of(pocket_tiny))).bounds.values())
    assert check_rows(Collator(Mixture(mixed(pocket_tiny, tmp_path, most)), load_encoder_of(pocket_tiny)))
    with pytest.raises(EpisodeError, match="does not fit"):
        check_rows(Collator(Mixture(mixed(pocket_tiny, tmp_path, most - 1)), load_encoder_of(pocket_tiny)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=10), st.integers(60, 300), st.sampled_from([8, 4096]))
def test_a_forecast_bounds_every_layout(lengths: list[int], tokens: int, width: int) -> None:
    """No batch has more tokens, or more in its mask, than the forecast says; the trial is the batch of the longest row."""
    longest = Encoded(*([1] * max(lengths) for _ in range(5)), (), [0] * max(lengths), [0] * max(lengths))  # type: ignore[arg-type]
    work = budget.longest(longest, len(lengths), False, tokens_per_batch=tokens)
    rows = layout(lengths, tokens, width)
    longest_packed = pad_to(max(sum(lengths[index] for index in row) for row in rows))
    assert len(rows) * longest_packed <= work.rows * work.tokens
    assert len(rows) * longest_packed**2 <= work.rows * work.tokens * work.attended
    trial = collate(widest(longest, len(lengths), tokens), 0)["labels"]
    assert trial.numel() <= work.rows * work.tokens
    assert (trial != IGNORED).sum() <= len(lengths) * len(longest)
    assert sum(map(len, widest(longest, len(lengths), tokens))) == len(lengths) * len(longest)


def test_plan_counts_packed_rows(pocket_tiny: Path, tmp_path: Path) -> None:
    """The longer mask, and nothing else."""
    alone, packed = (plan.make_plan(mixed(pocket_tiny, tmp_path, tokens), memory=10**12, device="cuda") for tokens in (None, 1500))
    assert packed["tokens_per_batch"] == 1500
    assert "tokens_per_batch" not in alone
    assert packed["longest_row"] == alone["longest_row"]
    steps = [made["forecasts"]["training"]["moments"]["a step"] for made in (alone, packed)]
    assert steps[0] < steps[1]
    shape = budget.shape_of(load_base(str(pocket_tiny)).model.config)
    row = check_rows(Collator(Mixture(mixed(pocket_tiny, tmp_path, None)), load_encoder_of(pocket_tiny))).longest
    cells = 6 * pad_to(len(row))
    more = cells * (pad_to(min(1500, 6 * len(row))) - pad_to(len(row)))
    size = budget.width("fp32", "cuda")
    assert steps[1] - steps[0] == pytest.approx(more * (1 + size * shape.layers), abs=2)


def test_the_trial_run_is_a_packed_batch(pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []
    real = trainer.LclTrainer.compute_loss

    def recorded(self: trainer.LclTrainer, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        shapes.append(inputs["labels"].shape)
        return real(self, model, inputs, *args, **options)

    monkeypatch.setattr(trainer.LclTrainer, "compute_loss", recorded)
    made = mixed(pocket_tiny, tmp_path / "run", 1500, max_steps=1)
    trainer.train(made.model_copy(update={"adapter": AdapterOptions(rank=4)}))
    longest = longest_row(made)
    assert shapes[0][0] < 6
    assert shapes[0].numel() <= 6 * pad_to(longest)
    assert shapes[1].numel() <= shapes[0].numel()


def test_a_long_sample_of_a_shard_is_left_out(pocket_tiny: Path, tmp_path: Path) -> None:
    """Its length is known when it is read: it is a fault of its source then, as one that does not fit the context."""
    made = mixed(pocket_tiny, tmp_path, 1500)
    collator = Collator(Mixture(made), load_encoder_of(pocket_tiny))
    lengths = {index: len(collator.row(index)) for index in range(40) if collator.mixture.slot(index).source == "vqa"}
    short = min(lengths.values())
    index = max(lengths, key=lambda i: lengths[i])
    assert short < lengths[index]
    train = made.train.model_copy(update={"tokens_per_batch": lengths[index] - 1})
    collator = replace(collator, mixture=Mixture(made.model_copy(update={"train": train})))
    options = collator.mixture.options["vqa"].model_copy(update={"on_fault": "skip"})
    collator.mixture.options["vqa"] = options
    faults: list[str] = []
    assert len(collator.row(index, faults)) < lengths[index]
    assert "does not fit `train.tokens_per_batch" in faults[0]
