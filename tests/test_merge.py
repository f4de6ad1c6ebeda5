"""Merging shard by shard gives the same weights as PEFT's own merging.

Adapters that do not fit are refused, and a wrong result is not saved.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from lcl_adapter.base.adapter import MANIFEST, load_adapter, save_adapter, save_pissa_start
from lcl_adapter.base.layouts import open_checkpoint
from lcl_adapter.base.layouts import tensors as weights
from lcl_adapter.base.layouts.tensors import SINGLE, PlannedTensor
from lcl_adapter.base.model import attach, load_base
from lcl_adapter.base.precision import nf4_round_trip
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.checkpoints import effect
from lcl_adapter.checkpoints.convert import convert
from lcl_adapter.checkpoints.deltas import Adapter, check_fits
from lcl_adapter.checkpoints.merge import merge
from lcl_adapter.checkpoints.probe import Answers, probe, probe_turns
from lcl_adapter.errors import AdapterError, MergeError, RunError
from lcl_adapter.recipe.schema import AdapterOptions
from lcl_adapter.training import trainer
from tests.test_trainer import small
from tests.tiny import VERSIONS, save_original, save_tiny

RECIPE = "base: {base}\nwording: short\noutput: {output}\nsources:\n  lcl: {{type: pocket}}\n"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_on(base: Path, folder: Path, seed: int = 0, **options: Any) -> Path:
    """A run folder with a random adapter of any kind, saved as training saves it."""
    torch.manual_seed(seed)  # of PEFT's own start, which no earlier test may decide
    adapted = attach(load_base(BaseRef(str(base), device="cpu")), AdapterOptions(**{"rank": 4, "alpha": 8, **options}))
    torch.manual_seed(seed)
    for name, parameter in adapted.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
        elif "lora_magnitude" in name:
            parameter.data.mul_(1 + 0.1 * torch.rand_like(parameter))
        elif "modules_to_save" in name:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(adapted, folder, str(base), {})
    (folder / "recipe.yaml").write_text(RECIPE.format(base=json.dumps(str(base)), output=json.dumps(str(folder))))
    return folder


def rewritten(run: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: Any) -> Path:
    """A copy of a run with other weights or another config, and with their hashes in the manifest."""
    shutil.copytree(run, copy)
    state = load_file(copy / WEIGHTS)
    change(state)
    save_file(state, copy / WEIGHTS, metadata={"format": "pt"})
    before = json.loads((copy / CONFIG).read_text())
    (copy / CONFIG).write_text(json.dumps({**before, **config}))
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"] = {name: hashlib.sha256((copy / name).read_bytes()).hexdigest() for name in manifest["files"]}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return copy


def by_peft(run: Path, base: Path) -> dict[str, torch.Tensor]:
    """The weights that PEFT's own merging gives, in fp32."""
    model = PeftModel.from_pretrained(load_base(BaseRef(str(base), "fp32", "cpu")).model, str(run))
    return {name: value.detach() for name, value in model.merge_and_unload().state_dict().items()}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight.read() for name, weight in open_checkpoint(str(folder)).weights.items()}


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are in one of the two only, or differ."""
    common = first.keys() & second.keys()
    return sorted((first.keys() ^ second.keys()) | {name for name in common if not torch.equal(first[name], second[name])})


def answers_of(folder: Path, tower: str | None = None) -> Answers:
    return probe(load_base(BaseRef(str(folder), "fp32", "cpu", tower)), probe_turns("short"))


def delta(run: Path, module: str) -> torch.Tensor:
    """The product that is added to a weight: alpha / r (rsLoRA: alpha / sqrt(r)) times B times A, from the files alone."""
    state, config = load_file(run / WEIGHTS), json.loads((run / "adapter_config.json").read_text())
    up, down = (state[f"base_model.model.{module}.lora_{half}.weight"] for half in "BA")
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"]) * up @ down


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(version, layout) -> a base of the same weights. Tests read it and never change it."""
    root = tmp_path_factory.mktemp("bases")
    folders = {}
    for version in VERSIONS:
        folders[version, "original"] = save_original(root / f"llava-{version}", version)
        convert(str(folders[version, "original"]), root / f"hf-{version}")
        folders[version, "hf"] = root / f"hf-{version}"
    return folders


KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "projector": {"projector": True}}
KINDS |= {"query and key": {"query_key_rank": 7}, "query and key, rslora": {"query_key_rank": 7, "rslora": True}}


@pytest.fixture(scope="module")
def runs(bases: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(kind, version, seed) -> a run on the original base, made once. Tests never change it."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(kind: str = "lora", version: str = "v1.5", seed: int = 0) -> Path:
        key = f"{kind}-{version}-{seed}"
        if key not in made:
            made[key] = adapter_on(bases[version, "original"], root / key, seed, **KINDS[kind])
        return made[key]

    return run


@pytest.mark.parametrize("to", ["hf", "original"])
@pytest.mark.parametrize("layout", ["hf", "original"])
@pytest.mark.parametrize(("kind", "version"), [*((kind, "v1.5") for kind in KINDS), ("lora", "v1"), ("projector", "v1.6"), ("dora", "v1.6")])
def test_a_merge_in_fp32_is_pefts_own_bit_for_bit(
    bases: dict[tuple[str, str], Path], runs: Callable[..., Path], tmp_path: Path, kind: str, version: str, layout: str, to: Any
) -> None:
    """Every weight, from either layout into either, in several shards.

    Exactly the weights that the adapter changes are changed.
    """
    run, base = runs(kind, version), bases[version, layout]
    result = merge(run, tmp_path / "llava-out", BaseRef(str(base)), "fp32", to, shard_size=120_000, verify="layers")
    expected, actual = by_peft(run, base), weights_in(tmp_path / "llava-out")
    assert open_checkpoint(str(tmp_path / "llava-out")).layout == result["layout"] == to
    assert result["shards"] > 1
    assert differing(expected, actual) == []
    changed = {name for name in differing(actual, {n: v.float() for n, v in weights_in(base).items()}) if "linear_2" not in name or version != "v1"}
    assert changed == set(Adapter(run).changed_weights)


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_weights_are_merged_and_checked_in_blocks_of_rows(
    bases: dict[tuple[str, str], Path], runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Tiny weights fit into one block, so blocks are made smaller.

    The merged bits are the same, and every row of a layer is checked once.
    """
    monkeypatch.setattr(weights, "BLOCK", 2048)
    checked: list[tuple[str, int]] = []
    own = effect.WeightCheck.add

    def counted(check: effect.WeightCheck, block: effect.Block, stored: torch.Tensor) -> None:
        checked.append((check.name, len(stored)))
        own(check, block, stored)

    monkeypatch.setattr(effect.WeightCheck, "add", counted)
    merge(runs(kind), tmp_path / "llava-out", BaseRef(str(bases["v1.5", "hf"])), "fp32", verify="layers")
    assert differing(by_peft(runs(kind), bases["v1.5", "hf"]), weights_in(tmp_path / "llava-out")) == []
    for module, parts in Adapter(runs(kind)).layers.items():
        rows = [count for name, count in checked if name == f"{module}.weight"]
        assert sum(rows) == parts["B"].shape[0]
        assert len(rows) > 1


@pytest.mark.parametrize("kind", ["lora", "projector", "dora"])
def test_a_merge_in_bf16_rounds_once(bases: dict[tuple[str, str], Path], runs: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """No value is further than one unit in the last place from the exact value."""
    merge(runs(kind), tmp_path / "llava-out", dtype="bf16", to="hf", verify="layers")
    exact, actual = by_peft(runs(kind), bases["v1.5", "original"]), weights_in(tmp_path / "llava-out")
    for name, value in exact.items():
        assert actual[name].dtype == torch.bfloat16
        unit = torch.exp2(torch.frexp(value)[1].float() - 8)  # a bf16 has 8 significant bits
        assert bool(((actual[name].float() - value).abs() <= unit).all()), name


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_an_adapter_names_its_base(bases: dict[tuple[str, str], Path], tmp_path: Path, layout: str) -> None:
    """In PEFT's own config too, for a base in either layout: plain PEFT and the hub read it from there."""
    run = adapter_on(bases["v1.5", layout], tmp_path / "run")
    name = json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert name == json.loads((run / MANIFEST).read_text())["base"] == str(bases["v1.5", layout])


def test_each_weight_is_written_in_its_stored_type(bases: dict[tuple[str, str], Path], runs: Callable[..., Path], tmp_path: Path) -> None:
    """With dtype "base": the tower is stored in fp32 and the rest of the base in fp16, and both stay so."""
    merge(runs(), tmp_path / "llava-out", to="hf", verify="layers")
    kinds = {name: weight.dtype for name, weight in open_checkpoint(str(bases["v1.5", "original"])).weights.items()}
    assert {name: weight.dtype for name, weight in open_checkpoint(str(tmp_path / "llava-out")).weights.items()} == kinds
    assert set(kinds.values()) == {torch.float16, torch.float32}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_merged_model_answers_as_the_adapter(bases: dict[tuple[str, str], Path], runs: Callable[..., Path], tmp_path: Path, version: str) -> None:
    """In the other layout too. The answers are computed again here, from the files."""
    run = runs("projector", version)
    adapted, _ = load_adapter(run, BaseRef(precision="fp32", device="cpu"))
    expected, bare = probe(adapted, probe_turns("short")), answers_of(bases[version, "original"])
    assert expected.distance(bare) > 0.1
    for to in ("original", "hf"):
        result = merge(run, tmp_path / f"llava-{to}", dtype="fp32", to=to)  # type: ignore[arg-type]
        assert result["greedy_equal"] == result["probes"] == 8
        assert result["largest_logit_difference"] < 1e-4 < result["adapter_effect"]
        assert answers_of(tmp_path / f"llava-{to}").distance(expected) < 1e-4


def test_v1s_trained_projector_becomes_one_layer(bases: dict[tuple[str, str], Path], runs: Callable[..., Path], tmp_path: Path) -> None:
    """Two layers without an activation between them equal one. Upstream's v1 has a single layer."""
    run = runs("projector", "v1")
    merge(run, tmp_path / "llava-out", dtype="fp32", to="original")
    state, trained = load_file(tmp_path / "llava-out" / SINGLE), Adapter(run).full_weights
    assert sorted(k for k in state if "projector" in k) == ["model.mm_projector.bias", "model.mm_projector.weight"]
    at = "model.multi_modal_projector.linear_"
    assert not torch.equal(trained[f"{at}2.weight"], torch.eye(64)), "the second layer was trained"
    inputs = torch.randn(5, 32)
    two = (inputs @ trained[f"{at}1.weight"].T + trained[f"{at}1.bias"]) @ trained[f"{at}2.weight"].T + trained[f"{at}2.bias"]
    one = inputs @ state["model.mm_projector.weight"].T + state["model.mm_projector.bias"]
    assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(("first", "second"), [(1.0, 1.0), (0.7, -0.5)])
def test_two_adapters_add_up_by_their_weights(
    bases: dict[tuple[str, str], Path], runs: Callable[..., Path], tmp_path: Path, first: float, second: float
) -> None:
    """W + w1 d1 + w2 d2, for two kinds with different scalings. The answers are compared too."""
    plain, rslora = runs("lora", seed=1), runs("rslora", seed=2)
    result = merge(plain, tmp_path / "llava-out", dtype="fp32", more=[(rslora, second)], weight=first)
    assert "notes" not in result
    assert result["largest_logit_difference"] < 1e-4 < result["adapter_effect"]
    base, actual = weights_in(bases["v1.5", "original"]), weights_in(tmp_path / "llava-out")
    for module in Adapter(plain).layers:
        expected = base[f"{module}.weight"].float() + first * delta(plain, module) + second * delta(rslora, module)
        assert torch.allclose(actual[f"{module}.weight"], expected, atol=1e-6)


def test_a_merge_names_adapters_that_read_support_sets_otherwise(runs: Callable[..., Path], tmp_path: Path) -> None:
    other = shutil.copytree(runs("lora", seed=2), tmp_path / "other")
    manifest = json.loads((other / "lcl_adapter.json").read_text())
    (other / "lcl_adapter.json").write_text(json.dumps({**manifest, "supports": "compressed", "support_tokens": [4]}))
    notes = merge(runs("lora", seed=1), tmp_path / "llava-out", dtype="fp32", more=[(other, 1.0)], verify="layers")["notes"]
    assert notes[-2] == f"{other} was trained with compressed support sets, the first adapter with ordered ones"
    assert notes[-1] == f"{other} was trained with 4 tokens for a picture shown with a label, the first adapter with all tokens"
    assert all(note.startswith(str(other)) for note in notes)


def test_a_weight_below_one_adds_that_part_of_the_adapter(bases: dict[tuple[str, str], Path], runs: Callable[..., Path], tmp_path: Path) -> None:
    """Of the products, and of a projector that was trained in full."""
    run = runs("projector")
    merge(run, tmp_path / "llava-out", dtype="fp32", weight=0.25)
    base, actual = weights_in(bases["v1.5", "original"]), weights_in(tmp_path / "llava-out")
    for module in Adapter(run).layers:
        assert torch.allclose(actual[f"{module}.weight"], base[f"{module}.weight"].float() + 0.25 * delta(run, module), atol=1e-6)
    for name, trained in Adapter(run).full_weights.items():
        assert torch.allclose(actual[name], 0.75 * base[name].float() + 0.25 * trained, atol=1e-6)


def test_adapters_that_cannot_be_added_up_are_refused(bases: dict[tuple[str, str], Path], runs: Callable[..., Path], tmp_path: Path) -> None:
    """Adapters of two bases, DoRA and another adapter, two adapters that have both trained the projector."""
    for first, second, message in (
        (runs("lora"), runs("lora", "v1"), "trained on another base than .*only adapters of one base can be added up"),
        (runs("dora"), runs("lora"), "DoRA changes a weight's length and cannot be added to another adapter; merge it alone"),
        (runs("lora"), runs("dora"), "DoRA changes a weight's length and cannot be added to another adapter; merge it alone"),
        (runs("projector"), runs("projector", seed=3), r"have both trained model\.multi_modal_projector\..* in full; only one may"),
    ):
        with pytest.raises(AdapterError, match=message):
            merge(first, tmp_path / "llava-out", more=[(second, 1.0)])
        assert not list(tmp_path.iterdir())


def test_a_weight_scales_dora_before_its_length_is_set(runs: Callable[..., Path], tmp_path: Path) -> None:
    """As in PEFT: the product is scaled first. The merged model answers as the adapter does."""
    result = merge(runs("dora"), tmp_path / "llava-out", dtype="fp32", weight=0.5)
    assert result["largest_logit_difference"] < 1e-4 < result["adapter_effect"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update({k: torch.randn(v.shape[0], 96) for k, v in s.items() if "q_proj.lora_A" in k}),
            "from width 96 to 64, the base's is 64 to 64",
        ),
        (
            lambda s: s.update({k: torch.randn(80, v.shape[1]) for k, v in s.items() if "q_proj.lora_B" in k}),
            "from width 64 to 80, the base's is 64 to 64",
        ),
        (lambda s: s.pop(next(k for k in s if "q_proj.lora_B" in k)), r"q_proj has only one of its two matrices, A and B; copy the adapter again"),
        (lambda s: s.update({k.replace("layers.0", "layers.9"): v.clone() for k, v in s.items() if "layers.0" in k}), "which the base does not have"),
        (
            lambda s: s.update({"base_model.model.model.other.weight": torch.ones(2)}),
            r"trained model\.other\.weight in full, which the base does not",
        ),
        (
            lambda s: s.update({k: torch.randn(32, 32) for k in s if k.endswith("projector.linear_1.weight")}),
            r"linear_1\.weight has shape \[32, 32\], the",
        ),
        (
            lambda s: s.update({"base_model.model.model.language_model.layers.0.mlp.up_proj.lora_C.weight": torch.ones(2)}),
            r"lora_C\.weight is an unknown kind of adapter weight",
        ),
    ],
    ids=["wider in", "wider out", "half", "another layer", "another weight", "another projector", "another kind"],
)
def test_an_adapter_of_another_base_is_refused(runs: Callable[..., Path], tmp_path: Path, change: Any, message: str) -> None:
    """Before anything is written, although its manifest names this base."""
    other = rewritten(runs("projector"), tmp_path / "other", change)
    with pytest.raises(AdapterError, match=message):
        merge(other, tmp_path / "llava-out")
    assert not (tmp_path / "llava-out.partial").exists()
    assert not (tmp_path / "llava-out").exists()


@pytest.mark.parametrize("name", ["model.multi_modal_projector.linear_1.weight", "model.language_model.layers.0.self_attn.q_proj.weight"])
def test_every_shape_is_compared_before_anything_is_written(bases: dict[tuple[str, str], Path], runs: Callable[..., Path], name: str) -> None:
    """For a weight that was trained in full, and for one that was adapted by LoRA."""
    shapes = {n: w.shape for n, w in open_checkpoint(str(bases["v1.5", "original"])).weights.items()}
    check_fits([Adapter(runs("projector"))], shapes)
    with pytest.raises(AdapterError, match="belongs to a"):
        check_fits([Adapter(runs("projector"))], {**shapes, name: (7, 7)})


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_that_changes_nothing_is_refused(bases: dict[tuple[str, str], Path], tmp_path: Path, kind: str) -> None:
    """All its products are zero: it was never trained, or its weights were lost."""
    adapted = attach(load_base(BaseRef(str(bases["v1.5", "original"]), device="cpu")), AdapterOptions(rank=4, **KINDS[kind]))
    (tmp_path / "run").mkdir()
    save_adapter(adapted, tmp_path / "run", str(bases["v1.5", "original"]), {})
    with pytest.raises(MergeError, match=r"the adapter changes nothing: all its products are zero\. Nothing was saved"):
        merge(tmp_path / "run", tmp_path / "llava-out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_an_adapter_that_is_not_finite_is_refused(runs: Callable[..., Path], tmp_path: Path) -> None:
    """Such as the adapter of a run that diverged."""
    broken = rewritten(runs(), tmp_path / "run", lambda s: s.update({k: v * float("nan") for k, v in s.items() if "up_proj.lora_B" in k}))
    with pytest.raises(AdapterError, match=r"up_proj: .*not finite"):
        merge(broken, tmp_path / "llava-out")
    assert not list(tmp_path.glob("llava-out*"))


def test_a_base_that_was_changed_since_is_refused(runs: Callable[..., Path], bases: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """One changed value is enough. An unchanged copy, in either layout, is accepted."""
    changed = Path(shutil.copytree(bases["v1.5", "hf"], tmp_path / "base"))
    merge(runs(), tmp_path / "one", BaseRef(str(changed)), verify="layers")
    state = load_file(changed / SINGLE)
    state["language_model.model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(state, changed / SINGLE, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"or that one was changed since \(the hashes of the weights differ"):
        merge(runs(), tmp_path / "two", BaseRef(str(changed)))


@pytest.fixture(scope="module")
def qlora(bases: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained in four bits, on an original base."""
    run = tmp_path_factory.mktemp("qlora") / "run"
    trainer.train(small(bases["v1.5", "original"], run, max_steps=2).model_copy(update={"precision": "nf4"}))
    return run


def test_onto_what_was_trained_is_nearer_to_the_four_bit_model(qlora: Path, tmp_path: Path) -> None:
    """By the merge's own report, and by answers that are computed again here."""
    results = {onto: merge(qlora, tmp_path / f"llava-{onto}", dtype="fp32", onto=onto) for onto in ("base", "trained")}  # type: ignore[arg-type]
    reported = {onto: r["from_4_bit"]["largest_logit_difference"] for onto, r in results.items()}
    trained, _ = load_adapter(qlora)
    assert trained.precision == "nf4"
    expected = probe(trained, probe_turns("short"))
    measured = {onto: answers_of(tmp_path / f"llava-{onto}").distance(expected) for onto in results}
    # They are not equal: on a CPU bitsandbytes multiplies in fewer bits than the merged weights have.
    assert 5 * measured["trained"] < measured["base"]
    assert 5 * reported["trained"] < reported["base"]


def test_the_nf4_round_trip_gives_the_weights_that_qlora_trains_on(bases: dict[tuple[str, str], Path]) -> None:
    """Bit for bit: they are compared with the four-bit weights of a loaded base, which bitsandbytes itself dequantises."""
    from bitsandbytes import functional as bnb

    base, plain = (load_base(BaseRef(str(bases["v1.5", "original"]), precision, "cpu")) for precision in ("nf4", "fp32"))  # type: ignore[arg-type]
    parameters, compared = dict(plain.model.named_parameters()), 0
    for name, parameter in base.model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            assert torch.equal(bnb.dequantize_4bit(parameter.data, state).float(), nf4_round_trip(parameters[name], base.dtype))
            compared += 1
    assert compared == 14


def test_onto_trained_is_for_four_bits_alone(runs: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="what it was trained on is the base itself; leave --onto trained out"):
        merge(runs(), tmp_path / "llava-out", onto="trained")
    assert not list(tmp_path.iterdir())


def test_pissa_is_saved_as_plain_lora(bases: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """It has twice the rank and fits the unchanged base.

    Loaded by plain PEFT or merged, it answers as the trained model did.
    """
    base = bases["v1.5", "hf"]
    adapted = attach(load_base(BaseRef(str(base), device="cpu")), AdapterOptions(rank=4, alpha=4, pissa=True))
    save_pissa_start(adapted.model, tmp_path / "start")
    torch.manual_seed(0)
    for name, parameter in adapted.model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    trained = probe(adapted, probe_turns("short"))
    assert trained.distance(answers_of(base)) > 0.1
    (tmp_path / "run").mkdir()
    save_adapter(adapted, tmp_path / "run", str(base), {})
    plain = load_base(BaseRef(str(base), device="cpu"))
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    assert probe(plain.with_model(PeftModel.from_pretrained(model, tmp_path / "run").eval()), probe_turns("short")).distance(trained) < 1e-3
    merge(tmp_path / "run", tmp_path / "llava-out", dtype="fp32")
    assert answers_of(tmp_path / "llava-out").distance(trained) < 1e-3


def test_a_pissa_recipe_trains_loads_and_merges(bases: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """From the recipe to the merged model. Rank 4 becomes plain LoRA of rank 8."""
    base = bases["v1.5", "original"]
    recipe = small(base, tmp_path / "run", max_steps=3)
    trainer.train(recipe.model_copy(update={"adapter": AdapterOptions(rank=4, alpha=4, pissa=True)}))
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    ranks = {parts["A"].shape[0] for parts in Adapter(tmp_path / "run").layers.values()}
    assert ranks == {8} == {config["r"]}
    adapted, _ = load_adapter(tmp_path / "run", BaseRef(precision="fp32", device="cpu"))
    result = merge(tmp_path / "run", tmp_path / "llava-out", dtype="fp32")
    assert result["largest_effect"] > 0
    assert answers_of(tmp_path / "llava-out").distance(probe(adapted, probe_turns("short"))) < 1e-4


def spoil(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Simulate a disk that stores other values of one tensor than were written."""
    plain = weights._write

    def spoiled(tensor: PlannedTensor) -> PlannedTensor:
        if tensor.key != key:
            return tensor
        return PlannedTensor(tensor.key, tensor.dtype, tensor.shape, lambda: [block + 1 for block in tensor.make()])

    monkeypatch.setattr(weights, "_write", lambda opened, part: plain(opened, [spoiled(tensor) for tensor in part]))


@pytest.mark.parametrize("verify", ["full", "layers"])
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", r"layers\.1\.mlp\.up_proj\.weight is not the base plus the adapter's effect"),
        ("model.layers.1.input_layernorm.weight", r"layers\.1\.input_layernorm\.weight"),
        ("lm_head.weight", r"lm_head\.weight"),
        ("model.mm_projector.0.weight", r"projector\.linear_1\.weight is not the base plus the adapter's effect"),
    ],
)
def test_a_tensor_that_was_written_otherwise_is_caught(
    runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, message: str, verify: Any
) -> None:
    """Whether or not the adapter changes the tensor, and whether or not the probes are run. Nothing is left behind."""
    spoil(monkeypatch, key)
    with pytest.raises(MergeError, match=message):
        merge(runs("projector"), tmp_path / "llava-out", verify=verify)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_merge_is_resumed(runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complete shards are not written again. With another weight, all shards are written again."""
    run, plain = runs(), weights._write

    def write(opened: Any, part: Any) -> Any:
        if "00003-of" in opened.name:
            raise KeyboardInterrupt
        return plain(opened, part)

    def stop() -> dict[str, tuple[int, int]]:
        with monkeypatch.context() as patched:
            patched.setattr(weights, "_write", write)
            with pytest.raises(KeyboardInterrupt):
                merge(run, tmp_path / "llava-out", shard_size=60_000, verify="layers")
        assert not (tmp_path / "llava-out").exists()
        return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (tmp_path / "llava-out.partial").glob("model-*")}

    def written(names: Any) -> dict[str, tuple[int, int]]:
        return {n: ((tmp_path / "llava-out" / n).stat().st_ino, (tmp_path / "llava-out" / n).stat().st_mtime_ns) for n in names}

    done = stop()
    assert len(done) == 2
    merge(run, tmp_path / "llava-out", shard_size=60_000, verify="layers")
    assert written(done) == done
    assert not (tmp_path / "llava-out.partial").exists()
    first = weights_in(tmp_path / "llava-out")
    shutil.rmtree(tmp_path / "llava-out")
    done = stop()
    merge(run, tmp_path / "llava-out", shard_size=60_000, verify="layers", weight=0.5)
    assert written(done) != done
    assert differing(weights_in(tmp_path / "llava-out"), first), "half an adapter is another model"


def test_the_output_folder_and_free_space_are_checked_before_anything_is_written(
    runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llava-exists").mkdir()
    with pytest.raises(RunError, match="llava-exists: exists already; nothing is overwritten"):
        merge(runs(), tmp_path / "llava-exists")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(RunError, match=r"needs \d+\.\d GB, 0\.0 GB are free"):
        merge(runs(), tmp_path / "llava-out")
    assert [p.name for p in tmp_path.iterdir()] == ["llava-exists"]


def test_the_tower_may_be_named_instead_of_written(bases: dict[tuple[str, str], Path], runs: Callable[..., Path], tmp_path: Path) -> None:
    """From Hugging Face's layout to the original one, with a tower that is already on the disk."""
    tower = f"{bases['v1.5', 'original']}-tower"
    merge(runs(), tmp_path / "llava-out", BaseRef(str(bases["v1.5", "hf"])), "fp32", "original", tower_as=tower)
    assert json.loads((tmp_path / "llava-out" / "config.json").read_text())["mm_vision_tower"] == tower
    assert not (tmp_path / "llava-out" / "vision_tower").exists()


@pytest.mark.parametrize("family", ["pocket", "photo", "llava-next-mistral", "llava-onevision"])
def test_a_family_without_an_original_base_merges_in_its_own_layout(tmp_path: Path, family: str) -> None:
    """The weights are PEFT's own, and tied weights stay tied."""
    base = save_tiny(tmp_path / "base", family)
    run = adapter_on(base, tmp_path / "run")
    merge(run, tmp_path / "llava-out", dtype="fp32", verify="layers")
    expected, actual = by_peft(run, base), weights_in(tmp_path / "llava-out")
    if family in {"pocket", "photo"}:
        assert "lm_head.weight" not in actual
        expected.pop("lm_head.weight")
    assert differing(expected, actual) == []
