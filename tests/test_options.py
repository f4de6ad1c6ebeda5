"""Training options: every field of the installed SFTConfig is accepted or refused with its reason; each that is accepted arrives in it."""

from __future__ import annotations

import dataclasses
import re
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from transformers import SchedulerType, Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from lcl_adapter import recipe
from lcl_adapter.base import attention, model
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.errors import ModelError, RecipeError
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.renamed import SYNONYMS
from lcl_adapter.recipe.schema import Attention
from lcl_adapter.recipe.training import REFUSED, REFUSED_VALUES, Optimizer, Scheduler, Tracker, TrainOptions
from lcl_adapter.training import trainer
from lcl_adapter.training.collate import Collator, collate
from lcl_adapter.training.options import check_options
from lcl_adapter.training.trainer import NOT_SFT_OPTIONS, sft_config
from tests.test_recipe import write
from tests.test_trainer import losses, small

OWN = {"projector_learning_rate", "feature_noise", "tokens_per_batch", "bucket", "feature_cache", "threads"}  # not SFTConfig's
FIELDS = {field.name: field for field in dataclasses.fields(SFTConfig)}
ACCEPTED = set(TrainOptions.model_fields) - OWN
GOOD = "base: pocket\nsources: {a: {type: pocket}}\ntrain:\n"


def test_every_field_of_sft_config_is_accepted_or_refused() -> None:
    """A new version of TRL or transformers fails here: decide its new fields in lcl_adapter/recipe/training.py."""
    synonyms = {key[-1] for key in SYNONYMS}
    assert set(FIELDS) == ACCEPTED | set(REFUSED) | synonyms
    assert not ACCEPTED & (set(REFUSED) | synonyms)
    assert not OWN & set(FIELDS)
    assert all(reason and not reason.endswith(".") for reason in REFUSED.values())


def test_the_document_lists_every_accepted_option() -> None:
    section = (Path(__file__).parent.parent / "docs/recipes.md").read_text(encoding="utf-8").split("## Training options")[1].split("## Trackers")[0]
    table = {name for line in section.splitlines() if line.startswith("|") for name in re.findall(r"`(\w+)`", line)}
    assert table - {"activation_checkpointing", "_kwargs"} == set(TrainOptions.model_fields) - {"gradient_checkpointing_kwargs"}


def plain_types(annotation: Any) -> set[Any]:
    """The classes that an annotation allows, without None and without constraints; a Literal's are those of its values."""
    if get_origin(annotation) in {Union, types.UnionType}:
        return set().union(*(plain_types(a) for a in get_args(annotation)))
    if str(get_origin(annotation)) == "typing.Literal":
        return {type(value) for value in get_args(annotation)}
    kind = get_origin(annotation) or annotation
    return set() if kind is types.NoneType else {str if isinstance(kind, type) and issubclass(kind, str) else kind}


def test_the_types_are_those_of_sft_config() -> None:
    theirs, ours = get_type_hints(SFTConfig), get_type_hints(TrainOptions)
    wider = {"trackio_static_space_id"}  # Any, checked by a function of its own
    different = {n: (plain_types(ours[n]), plain_types(theirs[n])) for n in ACCEPTED - wider if not plain_types(ours[n]) <= plain_types(theirs[n])}
    assert not different


def test_the_lists_of_names_are_transformers_own() -> None:
    refused = tuple(REFUSED_VALUES)
    assert set(get_args(Optimizer)) == {o.value for o in OptimizerNames if not o.value.startswith(refused)}
    assert set(get_args(Scheduler)) == {s.value for s in SchedulerType if not s.value.startswith(refused)}
    assert all(any(value.startswith(start) for value in [*OptimizerNames, *SchedulerType]) for start in refused), "each still refuses something"
    assert set(get_args(Tracker)) == {"all", *INTEGRATION_TO_CALLBACK}
    assert set(get_args(Attention)) == {"eager", *(n for n in ALL_ATTENTION_FUNCTIONS if "paged" not in n)} | set(attention.FLASH)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_field_names_its_line_and_its_reason(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, f"{GOOD}  seed: 1\n  {name}: 1\n")
    with pytest.raises(RecipeError) as caught:
        recipe.load(path)
    assert caught.value.faults == (f"{path}, line 5: 'train.{name}' is not used: {REFUSED[name]}",)
    with pytest.raises(RecipeError, match=re.escape(f"override 'train.{name}=1'")):
        recipe.load(write(tmp_path, f"{GOOD}  seed: 1\n"), [f"train.{name}=1"])


EXAMPLES: dict[str, Any] = {
    "max_steps": 7, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "lr_scheduler_type": "polynomial",
    "lr_scheduler_kwargs": {"power": 2.0}, "warmup_steps": 0.5, "optim": "rmsprop", "optim_args": "momentum=0.5", "weight_decay": 0.1,
    "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "max_grad_norm": 2.0, "neftune_noise_alpha": 5.0,
    "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}, "activation_offloading": True,
    "tf32": False, "torch_empty_cache_steps": 4, "full_determinism": False, "logging_steps": 0.25, "logging_first_step": True, "log_level": "error",
    "log_level_replica": "error", "log_on_each_node": False, "run_name": "mine", "project": "parts", "trackio_space_id": "me/space",
    "trackio_bucket_id": "me/bucket", "trackio_static_space_id": False, "save_steps": 3, "save_total_limit": 4,
    "dataloader_num_workers": 1, "dataloader_pin_memory": False, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3,
    "dataloader_multiprocessing_context": "spawn", "ddp_find_unused_parameters": False, "ddp_bucket_cap_mb": 10, "ddp_broadcast_buffers": False,
    "ddp_static_graph": True, "debug": "underflow_overflow", "skip_memory_metrics": True, "seed": 3,
}  # fmt: skip


def test_every_accepted_option_arrives_in_sft_config(tmp_path: Path) -> None:
    """Whatever is not passed is done here: epochs, trackers, the push, label smoothing."""
    done_here = {"num_train_epochs", "label_smoothing_factor", "report_to", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"}
    assert set(EXAMPLES) == ACCEPTED - done_here == ACCEPTED - (NOT_SFT_OPTIONS - {"max_steps"})
    text = GOOD + "".join(f"  {n}: {v!r}\n".replace("True", "true").replace("False", "false") for n, v in EXAMPLES.items()) + "  report_to: trackio\n"
    made = recipe.load(write(tmp_path, text))
    config = sft_config(made, 7)
    for name, value in EXAMPLES.items():
        given = getattr(config, name)
        assert getattr(given, "value", given) == (["underflow_overflow"] if name == "debug" else value), name
    assert config.activation_checkpointing is True
    assert config.report_to == []
    assert sft_config(recipe.load(write(tmp_path, GOOD + "  seed: 0\n"), ["output=runs/mine"]), 7).run_name == "mine"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("optim: adamw_bnb_8bits", "did you mean 'adamw_bnb_8bit'?"),
        ("optim: galore_adamw", "train.optim: 'galore_adamw' projects the gradients"),
        ("optim: schedule_free_adamw", "trains other weights than it answers with"),
        ("lr_scheduler_type: reduce_lr_on_plateau", "suites are measured by `evaluate.every`"),
        ("report_to: [tensorboard, wanb]", "did you mean 'wandb'?"),
        ("save_steps: 2.5", "neither a whole number of steps"),
        ("logging_steps: 0", "greater than 0"),
        ("neftune_noise_alpha: lots", "valid number"),
        ("lr_scheduler_kwargs: 3", "valid dictionary"),
        ("hub_model_id: me/mine", "only with `push_to_hub: true`"),
        ("dataloader_prefetch_factor: 2", "only with `dataloader_num_workers: 1 or more`"),
        ("gradient_checkpointing_kwargs: {use_reentrant: false}", "only with `gradient_checkpointing: true`"),
        ("trackio_space_id: me/space", "only with `report_to: trackio`"),
        ("max_lenght: 5", "did you mean 'max_length'?"),
        ("warmup_step: 5", "did you mean 'warmup_steps'?"),
    ],
)
def test_a_wrong_value_has_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, f"{GOOD}  seed: 1\n  {line}\n")
    with pytest.raises(RecipeError) as caught:
        recipe.load(path)
    assert len(caught.value.faults) == 1
    assert caught.value.faults[0].startswith(f"{path}, line 5: ")
    assert message in caught.value.faults[0]


def test_transformers_own_name_of_checkpointing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = recipe.load(write(tmp_path, GOOD + "  activation_checkpointing: true\n"))
    assert one == recipe.load(write(tmp_path, GOOD + "  gradient_checkpointing: true\n"))
    assert not capsys.readouterr().err, "both names are in use, so no note"
    with pytest.raises(RecipeError, match=r"another name of `train\.gradient_checkpointing`, and both are given"):
        recipe.load(write(tmp_path, GOOD + "  activation_checkpointing: true\n  gradient_checkpointing: true\n"))


# What this machine judges


def checked(tmp_path: Path, **train: Any) -> None:
    made = small(Path("pocket"), tmp_path, **train)
    check_options(lambda: sft_config(made, 6))


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "lion_32bit", "adafactor", "sgd"])
def test_optimizers_that_this_machine_has(tmp_path: Path, name: str) -> None:
    """The trial draws no random number: the seed of the training is set before it."""
    before = torch.get_rng_state()
    checked(tmp_path, optim=name)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"activation_offloading": True}, "train.activation_offloading: activations leave a GPU"),
        ({"tf32": True}, "train: --tf32 requires"),
        ({"optim": "grokadamw"}, "train.optim: grokadamw cannot be used here (Please install grokadamw"),
        ({"optim": "adamw_torch_8bit"}, "torchao"),
        ({"optim": "rmsprop", "optim_args": "momentum=much"}, "train.optim"),
        ({"optim_args": "momentum=0.9"}, "train.optim_args: momentum=0.9 changes nothing of adamw_torch_fused"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "train.lr_scheduler_kwargs: cosine_with_min_lr"),
        ({"lr_scheduler_kwargs": {"num_cycle": 2}}, "train.lr_scheduler_kwargs: cosine: "),
    ],
)
def test_options_are_tried_before_any_weight_is_loaded(
    pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(trainer, "load_base", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(RecipeError, match=re.escape(message)):
        trainer.train(small(pocket_tiny, tmp_path / "run", **train))


def test_a_bitsandbytes_optimizer_without_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(RecipeError, match=r"adamw_bnb_8bit cannot be used here .*bitsandbytes"):
        checked(tmp_path, optim="adamw_bnb_8bit")


# What trains


def test_options_that_change_the_loss(pocket_tiny: Path, tmp_path: Path) -> None:
    """NEFTune and label smoothing change the losses, an 8-bit optimizer the weights; all end with a complete adapter."""
    quick = {"max_steps": 2, "save_steps": 100}
    trainer.train(small(pocket_tiny, tmp_path / "plain", **quick))
    plain = losses(tmp_path / "plain")
    changes: dict[str, dict[str, Any]] = {
        "neftune": {"neftune_noise_alpha": 20.0},
        "smooth": {"label_smoothing_factor": 0.5},
        "bnb": {"optim": "adamw_bnb_8bit", "weight_decay": 0.5},
    }
    for name, change in changes.items():
        facts = trainer.train(small(pocket_tiny, tmp_path / name, **quick, **change))
        assert facts["longest_row"] > 0
        assert losses(tmp_path / name) != plain
        assert (losses(tmp_path / name)[0] == plain[0]) == (name == "bnb"), "an optimizer changes nothing before its first step"


def test_label_smoothing_is_transformers_own(pocket_tiny: Path, tmp_path: Path) -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    base = model.attach(load_base(str(pocket_tiny)), small(pocket_tiny, tmp_path).adapter)
    made = small(pocket_tiny, tmp_path, label_smoothing_factor=0.2)
    collator = Collator(Mixture(made), base.encoder())
    lcl = trainer.LclTrainer(base, made, collator, VisionFeatures(base), 18)
    base.model.train()
    for module in base.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = collate([collator.row(i) for i in range(3)], collator.encoder.pad)
    ours = lcl.compute_loss(base.model, batch)
    features = lcl.vision.projected_features(batch["pictures"])
    plain = {k: v for k, v in batch.items() if k not in {"pictures", "labels"}}
    logits = base.model(**plain, mm_encoder_outputs=features).logits
    theirs = LabelSmoother(0.2)({"logits": logits}, batch["labels"], shift_labels=True)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)


# Epochs


def questions(count: int, **options: Any) -> dict[str, Any]:
    return {"type": "llava-json", "file": "pocket:vqa_train.json", "images": "pocket:drawings.zip", "limit": count, **options}


def mixture(train: dict[str, Any], **sources: dict[str, Any]) -> Mixture:
    return Mixture(Recipe.model_validate({"base": "b", "sources": sources, "train": train}))


def test_an_epoch_of_one_source_is_every_question_once() -> None:
    made = mixture({"num_train_epochs": 2, "per_device_train_batch_size": 3}, q=questions(250, packed=2))
    assert (made.epoch, made.steps, made.total) == (125, 83, 249)
    first = [d.origin for i in range(125) for d in made.draw(i)]  # type: ignore[union-attr]
    assert sorted(first) == sorted(d.origin for d in made.pools["q"].dialogues)


def test_an_epoch_of_a_mixture_is_the_sum_of_its_sources() -> None:
    made = mixture({"num_train_epochs": 1}, q=questions(100, share=0.1), capped=questions(90, cap=30), c={"type": "pocket", "queries": 4, "share": 3})
    photos = sum(len(c.pictures) for c in made.pools["c"].classes)
    assert made.epoch == made.total == 100 + 30 + -(-photos // 4)


@pytest.mark.parametrize("count", [7, 100, 250])
def test_one_epoch_of_a_source_that_ends_uses_each_question_once(count: int) -> None:
    made = mixture({"num_train_epochs": 1}, q=questions(count, at_end="end"))
    drawn = [made.draw(i)[0].origin for i in range(made.total)]  # type: ignore[index]
    assert sorted(drawn) == sorted(d.origin for d in made.pools["q"].dialogues)
    assert made.realised(range(made.total)) == {"q": 1.0}
    with pytest.raises(RecipeError, match="all that have a share end"):
        mixture({"num_train_epochs": 2}, q=questions(count, at_end="end"))


def test_epochs_train_and_are_planned(pocket_tiny: Path, tmp_path: Path) -> None:
    from lcl_adapter.memory.plan import make_plan

    made = small(pocket_tiny, tmp_path / "run").model_dump(mode="json", exclude_none=True)
    del made["train"]["max_steps"]
    made["sources"] = {"q": questions(12)}
    made["train"] |= {"num_train_epochs": 1.5, "save_steps": 100}
    epochs = Recipe.model_validate(made)
    assert make_plan(epochs, memory=10**10, device="cpu")["fits"]
    facts = trainer.train(epochs)
    assert len(losses(tmp_path / "run")) == 6, "12 rows, 1.5 times, 3 a step"
    assert facts["tokens"]["q"]["rows"] == 18
    assert facts["passes"]["q"] == 1.5
    assert recipe.load(tmp_path / "run" / "recipe.yaml").train.num_train_epochs == 1.5


def test_steps_and_epochs_exclude_each_other(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "  max_steps: 5\n")
    with pytest.raises(RecipeError, match=r"train\.max_steps=null as an override"):
        recipe.load(path, ["train.num_train_epochs=1"])
    assert recipe.load(path, ["train.num_train_epochs=1", "train.max_steps=null"]).train.max_steps is None
    assert recipe.load(path, ["train.max_steps=null"]).train.max_steps == 300
    assert TrainOptions().max_steps == 300


# Attention


@pytest.mark.parametrize("family", ["pocket", "llava-onevision", "smolvlm"])
def test_eager_attention_reads_the_mask_of_several_branches(tiny_folder: Any, tmp_path: Path, family: str) -> None:
    """transformers' eager formula adds a bool mask to the scores as zeros and ones."""
    from lcl_adapter.answering.predict import Predictor
    from lcl_adapter.checkpoints.probe import probe_turns

    support, query = probe_turns("short")[0]
    figures = []
    for implementation in ("sdpa", "eager"):
        base = load_base(BaseRef(str(tiny_folder(family)), attn_implementation=implementation))
        assert base.llava.config._attn_implementation == implementation
        collator = Collator(Mixture(small(base.path, tmp_path)), base.encoder())
        batch = collate([collator.row(i) for i in range(2)], collator.encoder.pad)
        assert batch["attention_mask"].dtype == torch.bool
        features = VisionFeatures(base).projected_features(batch.pop("pictures"))
        with torch.no_grad():
            loss = base.llava(**batch, mm_encoder_outputs=features).loss.item()
        figures.append([loss, *Predictor(base).run([(support, query, ("a", "b"))])[0].log_likelihoods])
    assert figures[0] == pytest.approx(figures[1], abs=1e-4)


def test_a_recipe_chooses_the_attention_of_its_training(pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    real = trainer.load_base
    monkeypatch.setattr(trainer, "load_base", lambda ref: (base := real(ref), loaded.append(base.llava.config._attn_implementation))[0])
    for name in ("sdpa", "eager"):
        trainer.train(small(pocket_tiny, tmp_path / name, max_steps=2).model_copy(update={"attn_implementation": name}))
    assert loaded == ["sdpa", "eager"]
    assert losses(tmp_path / "sdpa") == pytest.approx(losses(tmp_path / "eager"), abs=1e-3)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("flash_attention_2", "cpu", torch.float32, "needs a CUDA GPU; this run is on cpu: set `attn_implementation: sdpa`"),
        ("flex_attention", "cpu", torch.float32, "needs a CUDA GPU"),
        ("flash_attention_2", "cuda", torch.bfloat16, "not installed here. pip install flash-attn"),
    ],
)
def test_attention_that_is_not_available(name: Attention, device: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        attention.check_available(name, device, dtype)


def test_flash_attention_is_for_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.FLASH, "flash_attention_2", (lambda: True, ""))
    attention.check_available("flash_attention_2", "cuda", torch.bfloat16)
    with pytest.raises(ModelError, match="computes in 16 bits only: set `precision: bf16`"):
        attention.check_available("flash_attention_2", "cuda", torch.float32)


def test_flash_attention_leaves_masks_of_branches_to_sdpa() -> None:
    """The kernel itself needs a GPU; a stand-in shows which batches reach it."""
    reached: list[Any] = []
    either = attention.FlashOrSdpa(lambda *arguments, **_: reached.append(arguments[4]))
    query = torch.randn(1, 2, 5, 8)
    either(torch.nn.Module(), query, query, query, None)
    either(torch.nn.Module(), query, query, query, torch.ones(1, 5))
    assert [None if mask is None else mask.ndim for mask in reached] == [None, 2]
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    output, _ = either(torch.nn.Module(), query, query, query, mask)
    assert len(reached) == 2
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, mask).transpose(1, 2)
    assert torch.allclose(output, expected, atol=1e-6)


def test_trainers_optimizer_function_is_still_static() -> None:
    """``check_options`` calls it without a trainer."""
    assert isinstance(Trainer.__dict__["get_optimizer_cls_and_kwargs"], staticmethod)
