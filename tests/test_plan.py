"""Forecasts against measured sizes, remedies, the refusal before training, precisions, and descriptions of paths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from lcl_adapter import recipe
from lcl_adapter.amounts import UNITS, memory_bytes
from lcl_adapter.base import adapter
from lcl_adapter.base.describe import describe
from lcl_adapter.base.layouts import open_checkpoint
from lcl_adapter.base.model import Base, attach, load_base, parameters_by_part
from lcl_adapter.base.precision import choose_precision, quantised_weights
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.checkpoints.probe import probe, probe_turns
from lcl_adapter.cli import commands as run
from lcl_adapter.cli import main
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.errors import ModelError, RunError
from lcl_adapter.memory import budget, plan
from lcl_adapter.recipe.schema import AdapterOptions, TrainOptions
from lcl_adapter.training import trainer
from lcl_adapter.training.collate import Collator
from lcl_adapter.training.lengths import check_rows
from tests.test_trainer import small
from tests.tiny import save_original

WORK = budget.Work(2, 512, 40, 8)


@pytest.mark.parametrize(
    ("text", "size"),
    [("16", 16 * 10**9), ("16GB", 16 * 10**9), ("16 GiB", 16 * 2**30), ("500MB", 5 * 10**8), (" 1.5 TB ", 15 * 10**11), ("16g", 16 * 10**9)],
)
def test_amounts_of_memory_are_read(text: str, size: int) -> None:
    assert memory_bytes(text) == size


@pytest.mark.parametrize("text", ["many", "16kB", "-1GB", "", "0", "GB", "1e3", "16 G B"])
def test_other_texts_are_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ValueError, match="no amount of memory"):
        memory_bytes(text)
    result = CliRunner().invoke(main, ["plan", "recipes/pocket.yaml", "--memory", text])
    assert result.exit_code == 2
    assert "no amount of memory" in result.output


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)))
def test_memory_is_proportional(amount: int, unit: str) -> None:
    assert memory_bytes(f"{amount}{unit}") == amount * UNITS[unit]


@pytest.mark.parametrize("more", [{}, {"query_key_rank": 7}, {"query_key_rank": 7, "dora": True}], ids=str)
def test_parameters_are_counted_without_weights(tiny_folder: Callable[[str], Path], more: dict[str, Any]) -> None:
    """The forecast's counts are those of the loaded model with its adapter."""
    for family in ("llava-1.5", "llava-onevision"):
        folder = tiny_folder(family)
        shape = budget.shape_of(open_checkpoint(str(folder)).config)
        options = AdapterOptions(rank=4, projector=True, **more)
        base = attach(load_base(str(folder)), options)
        parts = parameters_by_part(base.model)
        trained = sum(part["trained"] for part in parts.values())
        assert budget.adapter_parameters(shape, options) == trained
        whole = sum(p.numel() for p in load_base(str(folder)).model.parameters())
        assert shape.language + shape.rest + shape.vision + shape.projector == whole
        assert sum(budget.weights(shape, "fp32", "cpu").values()) == 4 * whole


def test_quantised_weights_are_forecast_to_the_byte(tiny_folder: Callable[[str], Path]) -> None:
    """nf4 with double quantisation, against the tensors that bitsandbytes holds."""
    folder = tiny_folder("llava-1.5")
    shape = budget.shape_of(open_checkpoint(str(folder)).config)
    size = 0
    for _, module in load_base(BaseRef(str(folder), "nf4")).model.named_modules():
        if type(module).__name__ == "Linear4bit":
            state = module.weight.quant_state
            size += module.weight.numel() + state.absmax.numel() + state.state2.absmax.numel() * 4
    assert budget.weights(shape, "nf4", "cpu")["language model"] == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("grown", ["rows", "tokens", "learned", "pictures"])
def test_more_work_is_more_memory(grown: str, pocket_tiny: Path) -> None:
    from dataclasses import replace

    shape = budget.shape_of(open_checkpoint(str(pocket_tiny)).config)
    options, train = AdapterOptions(), TrainOptions()
    before = budget.training(shape, "fp32", "cpu", options, train, WORK).moments["a step"]
    more = budget.training(shape, "fp32", "cpu", options, train, replace(WORK, **{grown: 2 * getattr(WORK, grown)})).moments["a step"]
    assert more > before
    checkpointed = budget.training(shape, "fp32", "cpu", options, TrainOptions(gradient_checkpointing=True), WORK).moments["a step"]
    assert checkpointed < before


@pytest.mark.parametrize(
    ("precision", "dropout", "autocast"), [("fp32", 0.0, False), ("fp32", 0.1, False), ("bf16", 0.0, False), ("bf16", 0.0, True), ("bf16", 0.1, True)]
)
def test_saved_activations_are_those_of_the_formula(precision: Any, dropout: float, autocast: bool, tiny_folder: Callable[[str], Path]) -> None:
    """The bytes that autograd saves in one forward, counted by its hooks, against the formula. Autocast is a GPU's way."""
    folder = tiny_folder("llava-1.5")
    options = AdapterOptions(rank=4, dropout=dropout)
    base = attach(load_base(BaseRef(str(folder), precision)), options)
    base.model.train()
    for parameter in base.model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    ids = torch.randint(3, 259, (2, 256))
    parameters = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    saved: dict[int, int] = {}  # storage -> bytes
    alive: list[torch.Tensor] = []  # so that no storage is reused

    def record(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        # Without the copies of the LoRAs' weights, which are few beside a real model's tokens
        if storage.data_ptr() not in parameters and not (tensor.ndim == 2 and 256 not in tensor.shape and 512 not in tensor.shape):
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    embedded = base.llava.get_input_embeddings()(ids).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        base.llava.model.language_model(inputs_embeds=embedded, use_cache=False)
    shape = budget.shape_of(base.llava.config)
    size = 4 if precision == "fp32" else 2
    formula = shape.layers * budget.layer_activations(shape, options, size, 2 if autocast else 4, 4) * ids.numel()
    assert sum(saved.values()) == pytest.approx(formula, rel=0.12)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "lion_32bit", "lion_8bit", "sgd", "adafactor", "rmsprop", "ademamix"])
def test_the_optimisers_state_is_forecast(name: str, pocket_tiny: Path, tmp_path: Path) -> None:
    """Against the bytes that the optimiser holds after a step on one large weight, without its step counters and scales."""
    config = trainer.sft_config(small(pocket_tiny, tmp_path, optim=name), 2)
    weight = torch.nn.Parameter(torch.zeros(256, 256))
    weight.grad = torch.ones_like(weight)
    optimizer_class, options = trainer.LclTrainer.get_optimizer_cls_and_kwargs(config, torch.nn.Identity())
    optimizer = optimizer_class([weight], **options)
    optimizer.step()
    held = sum(t.numel() * t.element_size() for t in optimizer.state[weight].values() if isinstance(t, torch.Tensor) and t.dim())
    forecast = budget.optimiser(weight.numel(), TrainOptions(optim=name))
    assert abs(held - forecast) < 0.1 * 4 * weight.numel()


def test_a_plan_has_tokens_and_parts(pocket_tiny: Path, tmp_path: Path) -> None:
    made = small(pocket_tiny, tmp_path)
    made_plan = plan.make_plan(made, memory=10**12, device="cpu")
    assert made_plan["fits"]
    assert not made_plan["remedies"]
    row = check_rows(Collator(Mixture(made), load_base(str(pocket_tiny)).encoder())).longest
    assert (made_plan["longest_row"], made_plan["images_in_it"]) == (len(row), len(row.pictures))
    assert set(made_plan["forecasts"]) == {"training", "serving"}
    json.dumps(made_plan)


def test_remedies_make_the_training_fit(pocket_tiny: Path, tmp_path: Path) -> None:
    """Each remedy brings the forecast within the memory, and at most three are shown."""
    made = small(pocket_tiny, tmp_path)
    whole = plan.make_plan(made, memory=10**12, device="cuda")["forecasts"]["training"]["total"]
    memory = whole - 1
    made_plan = plan.make_plan(made, memory=memory, device="cuda")
    assert not made_plan["fits"]
    assert 1 <= len(made_plan["remedies"]) <= 3
    for remedy in made_plan["remedies"]:
        changed, _ = plan.apply_changes(made, "cuda", remedy["overrides"])
        assert plan.make_plan(changed, memory=memory, device="cuda")["fits"]
    assert plan.make_plan(made, memory=1, device="cuda")["remedies"] == []


def test_training_that_does_not_fit_is_refused(pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = small(pocket_tiny, tmp_path / "run")
    path = tmp_path / "recipe.yaml"
    recipe.save(made, path)
    monkeypatch.setattr(plan, "free_memory", lambda device: 10**6)
    with pytest.raises(RunError, match="free memory"):
        run.train(str(path))
    assert not made.output.exists()
    assert run.train(str(path), force=True)["run"] == str(made.output)


def test_the_longest_row_is_run_first_and_leaves_no_trace(pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without it, the adapter is the same to the last bit, and the counts too."""
    first = trainer.train(small(pocket_tiny, tmp_path / "a", max_steps=2))
    lengths: list[int] = []
    original = trainer.LongestFirst.on_train_begin

    def recorded(self: trainer.LongestFirst, *args: object, **options: object) -> None:
        lengths.append(len(self.row))
        original(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer.LongestFirst, "on_train_begin", recorded)
    again = trainer.train(small(pocket_tiny, tmp_path / "b", max_steps=2))
    monkeypatch.setattr(trainer.LongestFirst, "on_train_begin", lambda *_, **__: None)
    without = trainer.train(small(pocket_tiny, tmp_path / "c", max_steps=2))
    assert lengths == [max(again["longest_row"], lengths[0])]
    assert first["images"] == again["images"] == without["images"]
    hashes = [adapter.read_manifest(tmp_path / name)["files"]["adapter_model.safetensors"] for name in "abc"]
    assert len(set(hashes)) == 1


def test_a_row_that_does_not_fit_fails_at_once(pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB\nmore")

    monkeypatch.setattr(trainer.LclTrainer, "compute_loss", no_memory)
    with pytest.raises(RunError, match=r"the longest row, \d+ tokens, does not fit"):
        trainer.train(small(pocket_tiny, tmp_path / "run", max_steps=2))


def test_auto_precision_gives_its_reason(pocket_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_checkpoint(str(pocket_tiny)).config
    assert choose_precision(config, "cpu")[0] == "fp32"
    from types import SimpleNamespace

    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**5))
    chosen, why = choose_precision(config, "cpu")
    assert chosen == "bf16"
    assert "memory free" in why
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    for free, expected in ((10**9, "fp16"), (10**5, "nf4")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, free))
        assert choose_precision(config, "cuda")[0] == expected


@pytest.mark.parametrize("precision", ["bf16", "fp16", "auto"])
def test_every_precision_loads_and_answers_on_a_cpu(precision: str, pocket_tiny: Path, tmp_path: Path) -> None:
    """Close to fp32 in logits; 8 and 4 bits are below."""
    base = load_base(BaseRef(str(pocket_tiny), precision))  # type: ignore[arg-type]
    probes = probe_turns("short")[:2]
    gap = probe(base, probes).distance(probe(load_base(str(pocket_tiny)), probes))
    assert gap < {"bf16": 1.0, "fp16": 0.1, "auto": 1e-6}[precision]
    assert VisionFeatures(base).tower_features([t.picture for t in probes[0][0] if t.picture]).isfinite().all()


def dequantised(base: Base) -> dict[str, torch.Tensor]:
    """The weights of the quantised layers in fp32. To be called before the first forward pass, which packs them anew on a CPU."""
    weights = {}
    for name, module in base.model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__ == "Linear4bit":
            weights[name] = bnb.dequantize_4bit(weight.data, weight.quant_state).float()
        elif type(module).__name__ == "Linear8bitLt":
            weights[name] = weight.data.float() * weight.SCB.float()[:, None] / 127
    return weights


def rounded_to_2_bits(weight: torch.Tensor) -> torch.Tensor:
    largest = weight.abs().amax(dim=1, keepdim=True)
    return (1.5 * weight / largest).round() / 1.5 * largest


def relative_error(weight: torch.Tensor, exact: torch.Tensor) -> float:
    return float((weight - exact).norm() / exact.norm())


@pytest.mark.parametrize(("precision", "largest_error"), [("int8", 0.01), ("nf4", 0.12)])
def test_a_quantised_base_computes_with_the_rounded_weights(precision: str, largest_error: float, pocket_tiny: Path) -> None:
    """Each weight is near the exact one; the answers are those of the rounded weights in a plain fp32 forward pass.

    The gap to the exact weights would say little: in this random base the right rounding to 4 bits moves a logit by 6 (of up to 9).
    """
    base, plain = load_base(BaseRef(str(pocket_tiny), precision)), load_base(str(pocket_tiny))  # type: ignore[arg-type]
    layers, weights = dict(plain.model.named_modules()), dequantised(base)
    assert {f"{name}.weight" for name in weights} == quantised_weights(plain.model)
    for name, weight in weights.items():
        assert relative_error(weight, layers[name].weight) < largest_error
        assert relative_error(rounded_to_2_bits(layers[name].weight), layers[name].weight) > 3 * largest_error, "the bound is no loose one"
        layers[name].weight.data.copy_(weight)

    probes = probe_turns("short")[:2]
    answers = probe(base, probes)
    assert answers.distance(probe(plain, probes)) < 1.0, "of rounded activations"
    assert VisionFeatures(base).tower_features([t.picture for t in probes[0][0] if t.picture]).isfinite().all()
    # The bound notices one layer of 14 in 2 bits, and one that is left out.
    for name, broken in (("layers.1.self_attn.v_proj", rounded_to_2_bits), ("layers.0.mlp.down_proj", torch.zeros_like)):
        layer = layers[f"model.language_model.{name}"]
        right = layer.weight.data.clone()
        layer.weight.data.copy_(broken(right))
        assert answers.distance(probe(plain, probes)) > 2.0, name
        layer.weight.data.copy_(right)


def test_the_probe_measures_a_step(pocket_tiny: Path, tmp_path: Path) -> None:
    made = small(pocket_tiny, tmp_path / "run")
    assert plan.probe(made)["seconds_a_step"] > 0
    assert not made.output.exists()


def test_inspect_shows_what_a_path_holds(pocket_tiny: Path, tmp_path: Path) -> None:
    original = save_original(tmp_path / "llava-v1.5", "v1.5")
    facts = describe(str(original))
    assert (facts["kind"], facts["layout"], facts["family"]) == ("base", "original", "llava-1.5")
    assert facts["types"] == {"float16": sum(v for v in facts["types"].values())} or set(facts["types"]) == {"float16", "float32"}
    assert describe(str(tmp_path / "llava-v1.5-tower"))["kind"] == "vision tower"
    trained = small(pocket_tiny, tmp_path / "run", max_steps=2)
    trainer.train(trained)
    inspected = describe(str(tmp_path / "run"))
    assert inspected["kind"] == "run with its adapter"
    assert inspected["base_hash"] == describe(str(pocket_tiny))["hash"]
    assert inspected["adapter"].startswith("LoRA, rank")
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in adapter.FILES:
        (plain / name).write_bytes((tmp_path / "run" / name).read_bytes())
    assert describe(str(plain))["kind"] == "adapter of PEFT"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="not a LLaVA"):
        describe(str(tmp_path / "other"))
    result = CliRunner().invoke(main, ["inspect", str(original), "--json"])
    assert json.loads(result.stdout)["hash"] == facts["hash"]
