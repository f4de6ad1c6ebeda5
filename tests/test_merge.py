"""Merging, shard by shard, is PEFT's own merging; and what does not belong together, or does not answer alike, is not kept."""

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

from lcl_adapter.base.adapter import MANIFEST, load_adapter, save_adapter, save_start
from lcl_adapter.base.layouts import open_checkpoint
from lcl_adapter.base.layouts import tensors as weights
from lcl_adapter.base.layouts.tensors import SINGLE, Planned
from lcl_adapter.base.model import attach, load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.checkpoints import deltas
from lcl_adapter.checkpoints.convert import convert
from lcl_adapter.checkpoints.deltas import Adapter, check_fits
from lcl_adapter.checkpoints.merge import merge, trained_on
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
    made = attach(load_base(BaseRef(str(base), device="cpu")), AdapterOptions(**{"rank": 4, "alpha": 8, **options}))
    torch.manual_seed(seed)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
        elif "lora_magnitude" in name:
            parameter.data.mul_(1 + 0.1 * torch.rand_like(parameter))
        elif "modules_to_save" in name:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(made, folder, str(base), {})
    (folder / "recipe.yaml").write_text(RECIPE.format(base=json.dumps(str(base)), output=json.dumps(str(folder))))
    return folder


def rewritten(run: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: Any) -> Path:
    """A copy of a run with other weights or another config, and the hashes that go with them."""
    shutil.copytree(run, copy)
    state = load_file(copy / WEIGHTS)
    change(state)
    save_file(state, copy / WEIGHTS, metadata={"format": "pt"})
    told = json.loads((copy / CONFIG).read_text())
    (copy / CONFIG).write_text(json.dumps({**told, **config}))
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"] = {name: hashlib.sha256((copy / name).read_bytes()).hexdigest() for name in manifest["files"]}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return copy


def by_peft(run: Path, base: Path) -> dict[str, torch.Tensor]:
    """What PEFT's own merging makes of it, in fp32."""
    model = PeftModel.from_pretrained(load_base(BaseRef(str(base), "fp32", "cpu")).model, str(run))
    return {name: value.detach() for name, value in model.merge_and_unload().state_dict().items()}


def merged_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight.read() for name, weight in open_checkpoint(str(folder)).weights.items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in sorted(one.keys() | other.keys()) if name not in one or name not in other or not torch.equal(one[name], other[name])]


def said(folder: Path, tower: str | None = None) -> Answers:
    return probe(load_base(BaseRef(str(folder), "fp32", "cpu", tower)), probe_turns("short"))


def delta(run: Path, module: str) -> torch.Tensor:
    """alpha / r, or of rsLoRA alpha / sqrt(r), times B times A; from the files alone."""
    state, config = load_file(run / WEIGHTS), json.loads((run / "adapter_config.json").read_text())
    up, down = (state[f"base_model.model.{module}.lora_{half}.weight"] for half in "BA")
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"]) * up @ down


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(version, layout) -> a base of the same weights; read, never changed."""
    root = tmp_path_factory.mktemp("bases")
    found = {}
    for version in VERSIONS:
        found[version, "original"] = save_original(root / f"llava-{version}", version)
        convert(str(found[version, "original"]), root / f"hf-{version}")
        found[version, "hf"] = root / f"hf-{version}"
    return found


KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "projector": {"projector": True}}


@pytest.fixture(scope="module")
def runs(bases: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Kind, version, seed -> a run on the original base; made once, never changed."""
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
    """Every weight, from either layout into either, in shards; and the adapter shows in every layer it is in."""
    run, base = runs(kind, version), bases[version, layout]
    result = merge(run, tmp_path / "llava-out", BaseRef(str(base)), "fp32", to, shard_size=120_000, verify="layers")
    wanted, found = by_peft(run, base), merged_in(tmp_path / "llava-out")
    assert open_checkpoint(str(tmp_path / "llava-out")).layout == result["layout"] == to
    assert result["shards"] > 1
    assert differing(wanted, found) == []
    changed = {name for name in differing(found, {n: v.float() for n, v in merged_in(base).items()}) if "linear_2" not in name or version != "v1"}
    assert changed == set(Adapter(run).modules)


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_weights_are_merged_and_checked_in_blocks_of_rows(
    bases: dict[tuple[str, str], Path], runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What no tiny weight is large enough for: the same bits, and every layer asked once."""
    monkeypatch.setattr(weights, "BLOCK", 2048)
    asked: list[tuple[str, int]] = []
    own = deltas._asked

    def counted(module: str, layer: Any) -> Any:
        asked.append((module, layer.out_features))
        return own(module, layer)

    monkeypatch.setattr(deltas, "_asked", counted)
    merge(runs(kind), tmp_path / "llava-out", BaseRef(str(bases["v1.5", "hf"])), "fp32", verify="layers")
    assert differing(by_peft(runs(kind), bases["v1.5", "hf"]), merged_in(tmp_path / "llava-out")) == []
    for module, parts in Adapter(runs(kind)).layers.items():
        rows = [count for name, count in asked if name == module]
        assert sum(rows) == parts["B"].shape[0]
        assert len(rows) > 1


@pytest.mark.parametrize("kind", ["lora", "projector", "dora"])
def test_a_merge_in_bf16_rounds_once(bases: dict[tuple[str, str], Path], runs: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """No value is further than one unit in the last place from the exact one."""
    merge(runs(kind), tmp_path / "llava-out", dtype="bf16", to="hf", verify="layers")
    exact, found = by_peft(runs(kind), bases["v1.5", "original"]), merged_in(tmp_path / "llava-out")
    for name, value in exact.items():
        assert found[name].dtype == torch.bfloat16
        unit = torch.exp2(torch.frexp(value)[1].float() - 8)  # eight bits of a bf16 are the number, the first of them one
        assert bool(((found[name].float() - value).abs() <= unit).all()), name


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_an_adapter_names_its_base(bases: dict[tuple[str, str], Path], tmp_path: Path, layout: str) -> None:
    """In PEFT's own config too, whichever layout the base is in; plain PEFT and the hub read it there."""
    run = adapter_on(bases["v1.5", layout], tmp_path / "run")
    told = json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert told == json.loads((run / MANIFEST).read_text())["base"] == str(bases["v1.5", layout])


def test_each_weight_keeps_its_own_type(bases: dict[tuple[str, str], Path], runs: Callable[..., Path], tmp_path: Path) -> None:
    """dtype "base": the tower is in fp32 beside a base in fp16, and stays so."""
    merge(runs(), tmp_path / "llava-out", to="hf", verify="layers")
    kinds = {name: weight.dtype for name, weight in open_checkpoint(str(bases["v1.5", "original"])).weights.items()}
    assert {name: weight.dtype for name, weight in open_checkpoint(str(tmp_path / "llava-out")).weights.items()} == kinds
    assert set(kinds.values()) == {torch.float16, torch.float32}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_merged_model_answers_as_the_adapter(bases: dict[tuple[str, str], Path], runs: Callable[..., Path], tmp_path: Path, version: str) -> None:
    """In the other layout too; asked here again, of what lies on the disk."""
    run = runs("projector", version)
    adapted, _ = load_adapter(run, BaseRef(precision="fp32", device="cpu"))
    expected, bare = probe(adapted, probe_turns("short")), said(bases[version, "original"])
    assert expected.distance(bare) > 0.1
    for to in ("original", "hf"):
        result = merge(run, tmp_path / f"llava-{to}", dtype="fp32", to=to)  # type: ignore[arg-type]
        assert result["greedy_equal"] == result["probes"] == 8
        assert result["largest_logit_difference"] < 1e-4 < result["adapter_effect"]
        assert said(tmp_path / f"llava-{to}").distance(expected) < 1e-4


def test_v1s_trained_projector_becomes_one_layer(bases: dict[tuple[str, str], Path], runs: Callable[..., Path], tmp_path: Path) -> None:
    """Two without anything between them are one: upstream's v1 has no second."""
    run = runs("projector", "v1")
    merge(run, tmp_path / "llava-out", dtype="fp32", to="original")
    state, trained = load_file(tmp_path / "llava-out" / SINGLE), Adapter(run).whole
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
    """W + w1 d1 + w2 d2, of two kinds with another scaling each; answers too."""
    one, other = runs("lora", seed=1), runs("rslora", seed=2)
    result = merge(one, tmp_path / "llava-out", dtype="fp32", more=[(other, second)], weight=first)
    assert result["largest_logit_difference"] < 1e-4 < result["adapter_effect"]
    base, found = merged_in(bases["v1.5", "original"]), merged_in(tmp_path / "llava-out")
    for module in Adapter(one).layers:
        wanted = base[f"{module}.weight"].float() + first * delta(one, module) + second * delta(other, module)
        assert torch.allclose(found[f"{module}.weight"], wanted, atol=1e-6)


def test_part_of_an_adapter_is_part_of_the_way(bases: dict[tuple[str, str], Path], runs: Callable[..., Path], tmp_path: Path) -> None:
    """A weight below one: of the product, and of a projector that was trained in full."""
    run = runs("projector")
    merge(run, tmp_path / "llava-out", dtype="fp32", weight=0.25)
    base, found = merged_in(bases["v1.5", "original"]), merged_in(tmp_path / "llava-out")
    for module in Adapter(run).layers:
        assert torch.allclose(found[f"{module}.weight"], base[f"{module}.weight"].float() + 0.25 * delta(run, module), atol=1e-6)
    for name, trained in Adapter(run).whole.items():
        assert torch.allclose(found[name], 0.75 * base[name].float() + 0.25 * trained, atol=1e-6)


def test_adapters_that_cannot_be_added_up_are_refused(bases: dict[tuple[str, str], Path], runs: Callable[..., Path], tmp_path: Path) -> None:
    """Of two bases; DoRA and another; two that both have trained the projector."""
    for one, other, why in (
        (runs("lora"), runs("lora", "v1"), "trained on another base than .*only adapters of one base can be added up"),
        (runs("dora"), runs("lora"), "DoRA changes a weight's length and cannot be added to another adapter; merge it alone"),
        (runs("lora"), runs("dora"), "DoRA changes a weight's length and cannot be added to another adapter; merge it alone"),
        (runs("projector"), runs("projector", seed=3), r"have both trained model\.multi_modal_projector\..* in full; only one may"),
    ):
        with pytest.raises(AdapterError, match=why):
            merge(one, tmp_path / "llava-out", more=[(other, 1.0)])
        assert not list(tmp_path.iterdir())


def test_dora_is_never_added_in_part(runs: Callable[..., Path], tmp_path: Path) -> None:
    """A weight of its own is PEFT's: the product is scaled before the length is set; answers are the adapter's."""
    result = merge(runs("dora"), tmp_path / "llava-out", dtype="fp32", weight=0.5)
    assert result["largest_logit_difference"] < 1e-4 < result["adapter_effect"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: s.update({k: torch.randn(v.shape[0], 96) for k, v in s.items() if "q_proj.lora_A" in k}), "of 96 to 64, the base's is 64 to 64"),
        (lambda s: s.update({k: torch.randn(80, v.shape[1]) for k, v in s.items() if "q_proj.lora_B" in k}), "of 64 to 80, the base's is 64 to 64"),
        (lambda s: s.pop(next(k for k in s if "q_proj.lora_B" in k)), r"q_proj has only one half of its two; copy the adapter again"),
        (lambda s: s.update({k.replace("layers.0", "layers.9"): v.clone() for k, v in s.items() if "layers.0" in k}), "which the base does not have"),
        (lambda s: s.update({"base_model.model.model.odd.weight": torch.ones(2)}), r"trained model\.odd\.weight in full, which the base does not"),
        (lambda s: s.update({k: torch.randn(32, 32) for k in s if k.endswith("projector.linear_1.weight")}), r"linear_1\.weight is \[32, 32\], the"),
        (
            lambda s: s.update({"base_model.model.model.language_model.layers.0.mlp.up_proj.lora_C.weight": torch.ones(2)}),
            r"lora_C\.weight is a kind of adapter weight that is not known here",
        ),
    ],
    ids=["wider in", "wider out", "half", "another layer", "another weight", "another projector", "another kind"],
)
def test_an_adapter_of_another_base_is_refused(runs: Callable[..., Path], tmp_path: Path, change: Any, why: str) -> None:
    """Though its manifest fits: before anything is written."""
    other = rewritten(runs("projector"), tmp_path / "other", change)
    with pytest.raises(AdapterError, match=why):
        merge(other, tmp_path / "llava-out")
    assert not (tmp_path / "llava-out.partial").exists()
    assert not (tmp_path / "llava-out").exists()


@pytest.mark.parametrize("name", ["model.multi_modal_projector.linear_1.weight", "model.language_model.layers.0.self_attn.q_proj.weight"])
def test_every_shape_is_compared_before_anything_is_written(bases: dict[tuple[str, str], Path], runs: Callable[..., Path], name: str) -> None:
    """Of what was trained in full as of what was adapted."""
    shapes = {n: w.shape for n, w in open_checkpoint(str(bases["v1.5", "original"])).weights.items()}
    check_fits([Adapter(runs("projector"))], shapes)
    with pytest.raises(AdapterError, match="belongs to a"):
        check_fits([Adapter(runs("projector"))], {**shapes, name: (7, 7)})


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_that_changes_nothing_is_refused(bases: dict[tuple[str, str], Path], tmp_path: Path, kind: str) -> None:
    """All its products are zero: it was never trained, or was lost on the way."""
    made = attach(load_base(BaseRef(str(bases["v1.5", "original"]), device="cpu")), AdapterOptions(rank=4, **KINDS[kind]))
    (tmp_path / "run").mkdir()
    save_adapter(made, tmp_path / "run", str(bases["v1.5", "original"]), {})
    with pytest.raises(MergeError, match=r"the adapter changes nothing: all its products are zero\. Not kept"):
        merge(tmp_path / "run", tmp_path / "llava-out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_an_adapter_that_is_not_finite_is_refused(runs: Callable[..., Path], tmp_path: Path) -> None:
    """As a run that diverged leaves it."""
    broken = rewritten(runs(), tmp_path / "run", lambda s: s.update({k: v * float("nan") for k, v in s.items() if "up_proj.lora_B" in k}))
    with pytest.raises(AdapterError, match=r"up_proj: .*not finite"):
        merge(broken, tmp_path / "llava-out")
    assert not list(tmp_path.glob("llava-out*"))


def test_a_base_that_was_changed_since_is_refused(runs: Callable[..., Path], bases: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """One value is enough; the unchanged one in either layout is taken."""
    changed = Path(shutil.copytree(bases["v1.5", "hf"], tmp_path / "base"))
    merge(runs(), tmp_path / "one", BaseRef(str(changed)), verify="layers")
    state = load_file(changed / SINGLE)
    state["language_model.model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(state, changed / SINGLE, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"or that was changed since \(the hashes of the weights differ"):
        merge(runs(), tmp_path / "two", BaseRef(str(changed)))


@pytest.fixture(scope="module")
def qlora(bases: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained in four bits, on an original base."""
    run = tmp_path_factory.mktemp("qlora") / "run"
    trainer.train(small(bases["v1.5", "original"], run, max_steps=2).model_copy(update={"precision": "nf4"}))
    return run


def test_onto_what_was_trained_is_nearer_to_the_four_bit_model(qlora: Path, tmp_path: Path) -> None:
    """By the merge's own figures and asked here again; onto the base the four bits are taken back."""
    results = {onto: merge(qlora, tmp_path / f"llava-{onto}", dtype="fp32", onto=onto) for onto in ("base", "trained")}  # type: ignore[arg-type]
    told = {onto: r["from_4_bit"]["largest_logit_difference"] for onto, r in results.items()}
    trained, _ = load_adapter(qlora)
    assert trained.precision == "nf4"
    expected = probe(trained, probe_turns("short"))
    found = {onto: said(tmp_path / f"llava-{onto}").distance(expected) for onto in results}
    # Not closer still: on a CPU bitsandbytes multiplies in fewer bits than these weights have.
    assert 5 * found["trained"] < found["base"]
    assert 5 * told["trained"] < told["base"]


def test_what_a_qlora_adapter_saw_is_known_exactly(bases: dict[tuple[str, str], Path]) -> None:
    """The four-bit weights of a loaded base, made whole by bitsandbytes itself, are what merging adds to."""
    from bitsandbytes import functional as bnb

    base, plain = (load_base(BaseRef(str(bases["v1.5", "original"]), precision, "cpu")) for precision in ("nf4", "fp32"))  # type: ignore[arg-type]
    whole, seen = dict(plain.model.named_parameters()), 0
    for name, parameter in base.model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            assert torch.equal(bnb.dequantize_4bit(parameter.data, state).float(), trained_on(whole[name], base.dtype))
            seen += 1
    assert seen == 14


def test_onto_trained_is_for_four_bits_alone(runs: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="what it was trained on is the base itself; leave --onto trained out"):
        merge(runs(), tmp_path / "llava-out", onto="trained")
    assert not list(tmp_path.iterdir())


def test_pissa_is_saved_as_plain_lora(bases: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """Of twice the rank, on the base as it was: what PEFT loads and what is merged answers as the trained model did."""
    base = bases["v1.5", "hf"]
    made = attach(load_base(BaseRef(str(base), device="cpu")), AdapterOptions(rank=4, alpha=4, pissa=True))
    save_start(made.model, tmp_path / "start")
    torch.manual_seed(0)
    for name, parameter in made.model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    trained = probe(made, probe_turns("short"))
    assert trained.distance(said(base)) > 0.1
    (tmp_path / "run").mkdir()
    save_adapter(made, tmp_path / "run", str(base), {})
    plain = load_base(BaseRef(str(base), device="cpu"))
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    assert probe(plain.with_model(PeftModel.from_pretrained(model, tmp_path / "run").eval()), probe_turns("short")).distance(trained) < 1e-3
    merge(tmp_path / "run", tmp_path / "llava-out", dtype="fp32")
    assert said(tmp_path / "llava-out").distance(trained) < 1e-3


def test_a_pissa_recipe_trains_loads_and_merges(bases: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """The whole way, stopped and resumed runs' folders included: rank 4 becomes a plain 8."""
    base = bases["v1.5", "original"]
    recipe = small(base, tmp_path / "run", max_steps=3)
    trainer.train(recipe.model_copy(update={"adapter": AdapterOptions(rank=4, alpha=4, pissa=True)}))
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    ranks = {parts["A"].shape[0] for parts in Adapter(tmp_path / "run").layers.values()}
    assert ranks == {8} == {config["r"]}
    adapted, _ = load_adapter(tmp_path / "run", BaseRef(precision="fp32", device="cpu"))
    result = merge(tmp_path / "run", tmp_path / "llava-out", dtype="fp32")
    assert result["largest_layer_effect"] > 0
    assert said(tmp_path / "llava-out").distance(probe(adapted, probe_turns("short"))) < 1e-4


def spoil(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """A disk that keeps another value of one tensor than was written."""
    plain = weights._write

    def other(one: Planned) -> Planned:
        return Planned(one.key, one.dtype, one.shape, lambda: [block + 1 for block in one.make()]) if one.key == key else one

    monkeypatch.setattr(weights, "_write", lambda opened, part: plain(opened, [other(one) for one in part]))


@pytest.mark.parametrize("verify", ["full", "layers"])
@pytest.mark.parametrize(
    "key", ["model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight", "model.mm_projector.0.weight"]
)
def test_a_tensor_that_was_written_otherwise_is_caught(
    runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, verify: Any
) -> None:
    """One that the adapter changed as one that it did not, whether or not the model is asked; and nothing is left."""
    spoil(monkeypatch, key)
    with pytest.raises(MergeError, match="Not kept"):
        merge(runs("projector"), tmp_path / "llava-out", verify=verify)
    assert not list(tmp_path.iterdir())


def test_a_merge_that_was_stopped_goes_on(runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that are done are not written again, and with another weight all are."""
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

    def there(names: Any) -> dict[str, tuple[int, int]]:
        return {n: ((tmp_path / "llava-out" / n).stat().st_ino, (tmp_path / "llava-out" / n).stat().st_mtime_ns) for n in names}

    done = stop()
    assert len(done) == 2
    merge(run, tmp_path / "llava-out", shard_size=60_000, verify="layers")
    assert there(done) == done
    assert not (tmp_path / "llava-out.partial").exists()
    whole = merged_in(tmp_path / "llava-out")
    shutil.rmtree(tmp_path / "llava-out")
    done = stop()
    merge(run, tmp_path / "llava-out", shard_size=60_000, verify="layers", weight=0.5)
    assert there(done) != done
    assert differing(merged_in(tmp_path / "llava-out"), whole), "half an adapter is another model"


def test_the_place_is_told_about_before_anything_is_written(runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llava-there").mkdir()
    with pytest.raises(RunError, match="there: exists already; nothing is overwritten"):
        merge(runs(), tmp_path / "llava-there")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(RunError, match=r"GB are to be written, 0\.0 GB are free there"):
        merge(runs(), tmp_path / "llava-out")
    assert [p.name for p in tmp_path.iterdir()] == ["llava-there"]


def test_the_tower_may_be_named_instead_of_written(bases: dict[tuple[str, str], Path], runs: Callable[..., Path], tmp_path: Path) -> None:
    """From Hugging Face's layout to the original one, with the tower that is there already."""
    tower = f"{bases['v1.5', 'original']}-tower"
    merge(runs(), tmp_path / "llava-out", BaseRef(str(bases["v1.5", "hf"])), "fp32", "original", tower_as=tower)
    assert json.loads((tmp_path / "llava-out" / "config.json").read_text())["mm_vision_tower"] == tower
    assert not (tmp_path / "llava-out" / "vision_tower").exists()


@pytest.mark.parametrize("family", ["pocket", "llava-next-mistral", "llava-onevision"])
def test_a_family_without_an_original_base_merges_in_its_own_layout(tmp_path: Path, family: str) -> None:
    """PEFT's own weights, tied ones tied; and the original layout is refused where there is none."""
    base = save_tiny(tmp_path / "base", family)
    run = adapter_on(base, tmp_path / "run")
    merge(run, tmp_path / "llava-out", dtype="fp32", verify="layers")
    wanted, found = by_peft(run, base), merged_in(tmp_path / "llava-out")
    if family == "pocket":
        assert "lm_head.weight" not in found
        wanted.pop("lm_head.weight")
    assert differing(wanted, found) == []
