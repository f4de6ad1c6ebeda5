"""Adapters to and from upstream LLaVA: PEFT 0.7 can load what is exported; what is imported is complete, or refused."""

from __future__ import annotations

import datetime
import importlib.util
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from lcl_adapter.base.adapter import load_adapter, read_manifest
from lcl_adapter.base.layouts import open_checkpoint
from lcl_adapter.base.model import family_of, load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.checkpoints.convert import convert
from lcl_adapter.checkpoints.deltas import Adapter
from lcl_adapter.checkpoints.exchange import export_adapter, import_adapter
from lcl_adapter.checkpoints.exchange.exporting import SCRIPT
from lcl_adapter.checkpoints.merge import merge
from lcl_adapter.checkpoints.probe import probe, probe_turns
from lcl_adapter.data.conversations import WORDINGS, Turn
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import AdapterError, ModelError, RunError, UserError
from tests import forked
from tests.test_merge import WEIGHTS, adapter_on, delta, rewritten, weights_in
from tests.tiny import VERSIONS, save_language, save_original, save_tiny

# peft 0.7.1, src/peft/tuners/lora/config.py and src/peft/config.py
FIELDS_OF_PEFT_07 = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r", "target_modules", "lora_alpha",
    "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "megatron_config", "megatron_core", "loftq_config",
}  # fmt: skip
PREFIX = "base_model.model."
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Version -> its original folder."""
    root = tmp_path_factory.mktemp("bases")
    return {version: save_original(root / f"llava-{version}", version) for version in VERSIONS}


@pytest.fixture(scope="module")
def hf(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1.5 in Hugging Face's layout."""
    out = tmp_path_factory.mktemp("hf") / "base"
    convert(str(bases["v1.5"]), out)
    return out


@pytest.fixture(scope="module")
def runs(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Version and options -> a run on the original base, made once. Tests never change it."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(version: str = "v1.5", **options: Any) -> Path:
        key = f"{version}{options}"
        if key not in made:
            made[key] = adapter_on(bases[version], root / str(len(made)), **options)
        return made[key]

    return run


@pytest.fixture(scope="module")
def exported(runs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with its projector in upstream's format. Tests copy it before they change it."""
    out = tmp_path_factory.mktemp("exported") / "llava-lora"
    export_adapter(runs(projector=True), out)
    return out


def foreign(exported: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object] | None = None, **config: Any) -> Path:
    """A copy of an upstream adapter with other weights or another config."""
    shutil.copytree(exported, folder)
    state = torch.load(folder / "adapter_model.bin", weights_only=True)
    if change is not None:
        change(state)
        torch.save(state, folder / "adapter_model.bin")
    before = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**before, **config}))
    return folder


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"projector": True}, {"projector": True, "rslora": True}, {"query_key_rank": 7}], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_exported_and_imported_again_it_is_the_same_adapter(
    runs: Callable[..., Path], tmp_path: Path, version: str, options: dict[str, bool]
) -> None:
    """Every product, the projector's outputs and the hash of the base, from the files alone."""
    run = runs(version, **options)
    report = export_adapter(run, tmp_path / "llava-lora")
    assert (report["layers"], report["projector"]) == (14, "projector" in options)
    assert report["largest_difference"] < 1e-6
    import_adapter(tmp_path / "llava-lora", tmp_path / "back")
    ours, back = Adapter(run), Adapter(tmp_path / "back")
    assert ours.layers.keys() == back.layers.keys()
    for module in ours.layers:
        assert torch.allclose(delta(run, module), delta(tmp_path / "back", module), atol=1e-6)
        assert float(delta(run, module).abs().max()) > 0.01
    assert read_manifest(tmp_path / "back")["base_hash"] == read_manifest(run)["base_hash"]
    assert ours.full_weights.keys() == back.full_weights.keys()
    if version != "v1":
        assert all(torch.equal(ours.full_weights[name], back.full_weights[name]) for name in ours.full_weights)
    elif ours.full_weights:
        inputs = torch.randn(5, 32)
        assert torch.allclose(_project_v1(ours.full_weights, inputs), _project_v1(back.full_weights, inputs), atol=1e-5)


def _project_v1(projector: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """The outputs of v1's projector, which has no activation between its layers."""
    for layer in "12":
        at = f"model.multi_modal_projector.linear_{layer}"
        inputs = inputs @ projector[f"{at}.weight"].T + projector[f"{at}.bias"]
    return inputs


@pytest.mark.parametrize("version", VERSIONS)
def test_an_imported_adapter_answers_and_merges_as_the_exported_one(runs: Callable[..., Path], tmp_path: Path, version: str) -> None:
    """Every command can use the imported run: it is loaded, merged, and exported again."""
    run = runs(version, projector=True)
    export_adapter(run, tmp_path / "llava-lora")
    import_adapter(tmp_path / "llava-lora", tmp_path / "back")
    original, imported = (load_adapter(folder, BaseRef(precision="fp32", device="cpu"))[0] for folder in (run, tmp_path / "back"))
    expected = probe(original, probe_turns("lcl")[:3])
    assert probe(imported, probe_turns("lcl")[:3]).distance(expected) < 1e-4
    merge(tmp_path / "back", tmp_path / "llava-merged", dtype="fp32")
    assert probe(load_base(BaseRef(str(tmp_path / "llava-merged"), device="cpu")), probe_turns("lcl")[:3]).distance(expected) < 1e-4
    export_adapter(tmp_path / "back", tmp_path / "llava-lora-again")
    for name in ("adapter_model.bin", "non_lora_trainables.bin"):
        first, again = (torch.load(tmp_path / folder / name, weights_only=True) for folder in ("llava-lora", "llava-lora-again"))
        assert first.keys() == again.keys()
        assert all(torch.allclose(first[key], again[key], atol=1e-6) for key in first)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("options", [{}, {"projector": True, "rslora": True}], ids=str)
def test_an_export_has_the_fields_and_keys_of_upstreams_old_peft(
    runs: Callable[..., Path], tmp_path: Path, version: str, options: dict[str, bool]
) -> None:
    """No other config fields, rsLoRA's scaling in alpha, and both files of weights."""
    run = runs(version, **options)
    export_adapter(run, tmp_path / "llava-lora")
    config = json.loads((tmp_path / "llava-lora" / "adapter_config.json").read_text())
    assert set(config) <= FIELDS_OF_PEFT_07
    assert config["lora_alpha"] / config["r"] == pytest.approx(8 / math.sqrt(4) if options else 8 / 4)
    state = torch.load(tmp_path / "llava-lora" / "adapter_model.bin", weights_only=True)
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert set(state) == {f"{PREFIX}model.layers.{n}.{part}.lora_{half}.weight" for n in range(2) for part in parts for half in "AB"}
    trained = torch.load(tmp_path / "llava-lora" / "non_lora_trainables.bin", weights_only=True)
    layers = {"v1": ["weight", "bias"]}.get(version, ["0.weight", "0.bias", "2.weight", "2.bias"])
    assert set(trained) == ({f"{PREFIX}model.mm_projector.{layer}" for layer in layers} if options else set())


@pytest.mark.parametrize("version", VERSIONS)
def test_the_exported_config_is_the_bases_own(bases: dict[str, Path], runs: Callable[..., Path], tmp_path: Path, version: str) -> None:
    """Byte for byte, except in old configs, whose ``llava`` upstream's transformers would load as another model."""
    export_adapter(runs(version), tmp_path / "llava-lora")
    ours, base = (folder / "config.json" for folder in (tmp_path / "llava-lora", bases[version]))
    if version == "v1":
        assert json.loads(ours.read_text()) == {**json.loads(base.read_text()), "model_type": "llava_llama"}
    else:
        assert ours.read_bytes() == base.read_bytes()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The exported script as a module.

    Upstream's modules are replaced by empty ones, because its prompt does not need them.
    """
    for name in ("llava", "llava.mm_utils", "llava.model", "llava.model.builder"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in ("expand2square", "process_anyres_image", "tokenizer_image_token"):
        setattr(sys.modules["llava.mm_utils"], name, None)
    sys.modules["llava.model.builder"].load_pretrained_model = None  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("ask_upstream", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("wording", ["short", "lcl"])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_script_writes_the_familys_own_prompt(
    bases: dict[str, Path], runs: Callable[..., Path], script: ModuleType, tmp_path: Path, version: str, wording: str
) -> None:
    """Letter by letter, for any characters in the labels, from the settings file beside it."""
    run = Path(shutil.copytree(runs(version), tmp_path / "run"))
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("wording: short", f"wording: {wording}"))
    export_adapter(run, tmp_path / "llava-lora")
    assert (tmp_path / "llava-lora" / "ask_upstream.py").read_bytes() == SCRIPT.read_bytes()
    settings = json.loads((tmp_path / "llava-lora" / "ask_upstream.json").read_text())
    family, words, picture = family_of(open_checkpoint(str(bases[version]))), WORDINGS[wording], Picture(Path("a.png"))  # type: ignore[index]
    for labels in (["good", "bad"], ["a {b} c", "{name}", "50% {text} \\n", "ü"]):
        turns = []
        for place, label in enumerate(labels):
            turns += [Turn("user", words.support_question(place == 0), picture), Turn("assistant", words.answered(label))]
        turns.append(Turn("user", words.query, picture))
        assert script.prompt_of(settings, labels) == family.render(turns, opened=True).text
    assert settings["padding"] == family.padding
    assert settings["next"] == (version == "v1.6")
    assert settings["end"] == family.end


def test_a_pissa_adapter_is_exported_as_plain_lora(bases: dict[str, Path], tmp_path: Path) -> None:
    """It has twice the rank."""
    from lcl_adapter.base.adapter import save_adapter, save_pissa_start
    from lcl_adapter.base.model import attach
    from lcl_adapter.recipe.schema import AdapterOptions

    made = attach(load_base(BaseRef(str(bases["v1.5"]), device="cpu")), AdapterOptions(rank=4, alpha=4, pissa=True))
    save_pissa_start(made.model, tmp_path / "start")
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(0.05)
    run = adapter_on(bases["v1.5"], tmp_path / "run")
    save_adapter(made, run, str(bases["v1.5"]), {})
    export_adapter(run, tmp_path / "llava-lora")
    assert json.loads((tmp_path / "llava-lora" / "adapter_config.json").read_text())["r"] == 8
    import_adapter(tmp_path / "llava-lora", tmp_path / "back")
    assert all(torch.allclose(delta(run, m), delta(tmp_path / "back", m), atol=1e-6) for m in Adapter(run).layers)


def test_an_adapter_that_upstreams_peft_cannot_load_is_not_exported(runs: Callable[..., Path], tmp_path: Path) -> None:
    """The message says what to do instead, and nothing is written."""
    with pytest.raises(AdapterError, match=r"has DoRA, which upstream's PEFT cannot load\. Merge it: `lcl-adapter merge --to original`"):
        export_adapter(runs(dora=True), tmp_path / "llava-lora")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"query_key_rank": 7}, {"query_key_rank": 2, "rslora": True}], ids=str)
def test_layers_are_exported_with_one_rank_and_one_scaling(runs: Callable[..., Path], tmp_path: Path, options: dict[str, Any]) -> None:
    """Upstream, vLLM and others know no other adapters. Each product B @ A stays what it was."""
    trained = runs(**options)
    for run in (trained, rewritten(trained, tmp_path / "run", lambda state: None, alpha_pattern={"q_proj": 3, "down_proj": 5})):
        adapter, out = Adapter(run), tmp_path / f"llava-lora-{run.name}"
        assert len({parts["A"].shape[0] for parts in adapter.layers.values()}) == 2
        export_adapter(run, out)
        config = json.loads((out / "adapter_config.json").read_text())
        assert not config.get("rank_pattern")
        assert not config.get("alpha_pattern")
        import_adapter(out, tmp_path / f"back-{run.name}")
        back = Adapter(tmp_path / f"back-{run.name}")
        assert {parts["A"].shape[0] for parts in back.layers.values()} == {config["r"]} == {adapter.rank}
        for module, parts in adapter.layers.items():
            expected = adapter.scaling_of(module) * parts["B"] @ parts["A"]
            assert torch.allclose(delta(tmp_path / f"back-{run.name}", module), expected, atol=1e-6)


def test_upstream_needs_the_original_base(bases: dict[str, Path], hf: Path, tmp_path: Path) -> None:
    """For a run that was trained on the other layout, the original base of the same weights can be given.

    Another base cannot.
    """
    run = adapter_on(hf, tmp_path / "run")
    with pytest.raises(AdapterError, match=r"in the original layout, .* is in Hugging Face's\. Give the original one with --base .*convert BASE OUT"):
        export_adapter(run, tmp_path / "llava-lora")
    with pytest.raises(AdapterError, match="the hashes of the weights differ"):
        export_adapter(run, tmp_path / "llava-lora", BaseRef(str(bases["v1.6"])))
    assert not (tmp_path / "llava-lora").exists()
    report = export_adapter(run, tmp_path / "llava-lora", BaseRef(str(bases["v1.5"])))
    assert report["layers"] == 14
    assert json.loads((tmp_path / "llava-lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(bases["v1.5"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my-lora", "this one needs 'llava' in it; for instance llava-lora-mine"),
        ("llava-mine", "this one needs 'lora' in it; for instance llava-lora-mine"),
        ("checkpoint-5", "upstream uses the parent's name for a folder called checkpoint-"),
        ("llava-lora-mpt", "'mpt' in its name would make upstream load it as something else"),
    ],
)
def test_a_name_that_upstream_would_misread_is_refused(runs: Callable[..., Path], tmp_path: Path, name: str, message: str) -> None:
    """Upstream decides by a folder's name how to load it."""
    with pytest.raises(ModelError, match=message):
        export_adapter(runs(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(exported: Path, runs: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "llava-lora").mkdir()
    with pytest.raises(RunError, match=r"llava-lora: exists already; nothing is overwritten\. Give another -o"):
        export_adapter(runs(), tmp_path / "llava-lora")
    with pytest.raises(RunError, match=r"llava-lora: exists already; nothing is overwritten\. Give another -o"):
        import_adapter(exported, tmp_path / "llava-lora")
    assert not list((tmp_path / "llava-lora").iterdir())


def key_of(module: str, half: str) -> str:
    return f"{PREFIX}{module}.lora_{half}.weight"


TOWER = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (None, {"peft_type": "IA3"}, r"adapter_config\.json: a 'IA3' adapter; only LoRA can be imported"),
        (None, {"peft_type": None}, r"a None adapter; only LoRA can be imported"),
        (None, {"use_dora": True}, "DoRA and ranks that differ from layer to layer cannot be imported"),
        (None, {"rank_pattern": {"q_proj": 2}}, "DoRA and ranks that differ from layer to layer cannot be imported"),
        (None, {"base_model_name_or_path": None}, "does not name the base it was trained on; give it with --base"),
        (None, {"base_model_name_or_path": "no/such-base"}, "its base cannot be opened, give it with --base"),
        (None, {"r": 8}, r"adapter_config\.json says rank 8, but model\..* has rank 4"),
        (lambda s: s.update({key_of(TOWER, "B"): torch.ones(32, 4)}), {},
         r"adapts the vision tower\. It cannot be imported, because vision towers are frozen here"),
        (lambda s: s.pop(key_of(Q_PROJ, "B")), {}, r"layers\.0\.self_attn\.q_proj has only one of its two matrices, A and B; copy the adapter again"),
        (lambda s: s.update({f"{PREFIX}lm_head.lora_A.weight": torch.ones(4, 64)}), {}, r"lm_head\.lora_A\.weight' is no known weight of a LLaVA"),
        (lambda s: s.update({"what.is.this": torch.ones(1)}), {}, r"'what\.is\.this' is no known weight of a LLaVA adapter"),
        (lambda s: s.clear(), {}, "no LoRA weights of the language model in it"),
        (lambda s: s.update({key_of(Q_PROJ, "A"): torch.ones(4, 96)}), {}, "from width 96 to 64, the base's is 64 to 64; it belongs to a base"),
        (lambda s: s.update({key_of(Q_PROJ.replace("0", "9"), half): torch.ones(4, 64).T if half == "B" else torch.ones(4, 64) for half in "AB"}), {},
         r"changes model\.language_model\.layers\.9\.self_attn\.q_proj, which the base does not have"),
        (lambda s: s.update({key_of("model.mm_projector.0", half): torch.ones(4, 32) if half == "A" else torch.ones(64, 4) for half in "AB"}), {},
         r"mm_projector\.0\.lora_A\.weight' is no known weight of a LLaVA adapter"),
        (lambda s: s.update({key_of("multi_modal_projector.linear_1", h): torch.ones(4, 32) if h == "A" else torch.ones(64, 4) for h in "AB"}), {},
         "is LoRA on the projector, which cannot be imported"),
    ],
    ids=[
        "IA3", "no type", "DoRA", "ranks", "no base", "base not here", "rank of config", "tower", "half", "head", "unknown key", "empty",
        "another width", "another depth", "LoRA on the projector", "LoRA on the projector by PEFT",
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_refused(exported: Path, tmp_path: Path, change: Any, config: dict[str, Any], message: str) -> None:
    """The message names the key or the field, and no run is left behind."""
    folder = foreign(exported, tmp_path / "theirs", change, **config)
    with pytest.raises(AdapterError, match=message):
        import_adapter(folder, tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


def test_a_folder_that_is_no_adapter_is_refused(exported: Path, tmp_path: Path) -> None:
    """It does not exist, has no config as upstream's intermediate checkpoints, has a broken one, or has no weights."""
    with pytest.raises(AdapterError, match="no such adapter folder"):
        import_adapter(tmp_path / "nothing", tmp_path / "run")
    folder = foreign(exported, tmp_path / "theirs")
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin in it"):
        import_adapter(folder, tmp_path / "run")
    for text in ("{", "[]", "null"):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError, match=r"adapter_config\.json"):
            import_adapter(folder, tmp_path / "run")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(
        AdapterError, match=r"no adapter_config\.json in it, so it is not a complete adapter\. Upstream's intermediate checkpoints have none"
    ):
        import_adapter(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Command:
    """An object that runs a command when it is unpickled, as in a hostile file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("file", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_a_pickle_with_anything_but_tensors_is_refused_and_never_run(exported: Path, tmp_path: Path, file: str) -> None:
    """In either of the two files."""
    folder, marker = foreign(exported, tmp_path / "theirs"), tmp_path / "ran"
    state = torch.load(folder / file, weights_only=True)
    for thing, name in ((Command(marker), r"(posix|os|nt)\.system"), (datetime.datetime(2024, 1, 1), r"datetime\.datetime")):
        torch.save({**state, "more": thing}, folder / file)
        with pytest.raises(UserError, match=rf"{file}: refused, it holds {name}, which is no tensor"):
            import_adapter(folder, tmp_path / "run")
        (folder / file).unlink()
    assert not marker.exists()
    assert not (tmp_path / "run").exists()


def test_zero_products_on_the_tower_are_dropped(exported: Path, runs: Callable[..., Path], tmp_path: Path) -> None:
    """In 1.6 upstream's target suffixes also match the tower.

    Those products are zero; the report counts them as dropped.
    """
    nothing = {key_of(TOWER, "A"): torch.randn(4, 32), key_of(TOWER, "B"): torch.zeros(32, 4)}
    report = import_adapter(foreign(exported, tmp_path / "theirs", lambda s: s.update(nothing)), tmp_path / "run")
    assert (report["layers"], report["dropped"]) == (14, 2)
    assert Adapter(tmp_path / "run").changed_weights == Adapter(runs(projector=True)).changed_weights
    load_adapter(tmp_path / "run", BaseRef(precision="fp32", device="cpu"))


def test_untrained_weights_are_dropped(bases: dict[str, Path], runs: Callable[..., Path], tmp_path: Path) -> None:
    """Upstream also saves 1.6's image_newline. If it was trained, the adapter is refused."""
    export_adapter(runs("v1.6"), tmp_path / "llava-lora")
    newline = weights_in(bases["v1.6"])["model.image_newline"]
    torch.save({f"{PREFIX}model.image_newline": newline}, tmp_path / "llava-lora" / "non_lora_trainables.bin")
    assert import_adapter(tmp_path / "llava-lora", tmp_path / "run")["dropped"] == 1
    torch.save({f"{PREFIX}model.image_newline": newline + 1}, tmp_path / "llava-lora" / "non_lora_trainables.bin")
    with pytest.raises(AdapterError, match=r"image_newline was trained in full\. Of such weights only the projector can be imported"):
        import_adapter(tmp_path / "llava-lora", tmp_path / "other")


@pytest.mark.parametrize("prefix", ["", "base_model.", "base_model.model."])
def test_a_projector_is_read_under_each_of_upstreams_prefixes(exported: Path, runs: Callable[..., Path], tmp_path: Path, prefix: str) -> None:
    """Its versions wrote the keys with and without the prefix of PEFT's wrapper."""
    folder = foreign(exported, tmp_path / "theirs")
    state = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    torch.save({prefix + key.removeprefix(PREFIX): value for key, value in state.items()}, folder / "non_lora_trainables.bin")
    import_adapter(folder, tmp_path / "run")
    ours, theirs = Adapter(runs(projector=True)).full_weights, Adapter(tmp_path / "run").full_weights
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_projector_of_another_width_is_refused(exported: Path, tmp_path: Path) -> None:
    """Before a run is written that no command could use."""
    folder = foreign(exported, tmp_path / "theirs")
    state = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    torch.save({k: torch.ones(64, 48) if k.endswith("mm_projector.0.weight") else v for k, v in state.items()}, folder / "non_lora_trainables.bin")
    with pytest.raises(AdapterError, match=r"linear_1\.weight"):
        import_adapter(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_projector_of_one_layer_where_the_base_has_two_is_refused(exported: Path, tmp_path: Path) -> None:
    """An adapter of v1 on a later base, whose projector has a second layer."""
    folder = foreign(exported, tmp_path / "theirs")
    single_layer = {f"{PREFIX}model.mm_projector.weight": torch.ones(64, 32), f"{PREFIX}model.mm_projector.bias": torch.ones(64)}
    torch.save(single_layer, folder / "non_lora_trainables.bin")
    with pytest.raises(AdapterError, match="projector"):
        import_adapter(folder, tmp_path / "run")


def plain(run: Path, folder: Path, named: str, projector: str, only: str = "_proj") -> Path:
    """An adapter as plain PEFT saves it on Hugging Face's layout, with the names of one version of transformers.

    named: the path of the layers. projector: the path of the projector. only: the part of a key that selects LoRA
    weights.
    """
    shutil.copytree(run, folder)
    for name in ("lcl_adapter.json", "recipe.yaml"):
        (folder / name).unlink()
    renamed = {
        key.replace("model.language_model.layers", named).replace("model.multi_modal_projector", projector): value
        for key, value in load_file(run / WEIGHTS).items()
        if only in key or "projector" in key
    }
    assert len({k.partition("layers")[0] for k in renamed if "lora" in k}) == 1
    save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("named", "projector"),
    [("language_model.model.layers", "multi_modal_projector"), ("model.language_model.layers", "model.multi_modal_projector")],
    ids=["transformers 4", "transformers 5"],
)
@pytest.mark.parametrize("options", [{"rslora": True}, {"projector": True}], ids=str)
def test_an_adapter_of_plain_peft_is_imported(
    runs: Callable[..., Path], hf: Path, tmp_path: Path, named: str, projector: str, options: dict[str, bool]
) -> None:
    """With the names of either version of transformers, for a base in either layout."""
    run = runs(**options)
    folder = plain(run, tmp_path / "theirs", named, projector)
    report = import_adapter(folder, tmp_path / "run", BaseRef(str(hf)))
    assert (report["layers"], report["projector"], report["dropped"]) == (14, "projector" in options, 0)
    assert all(torch.allclose(delta(run, module), delta(tmp_path / "run", module), atol=1e-6) for module in Adapter(run).layers)
    original, imported = (load_adapter(place, BaseRef(precision="fp32", device="cpu"))[0] for place in (run, tmp_path / "run"))
    assert probe(original, probe_turns("lcl")[:2]).distance(probe(imported, probe_turns("lcl")[:2])) < 1e-4


def test_an_adapter_of_some_projections_is_imported(runs: Callable[..., Path], hf: Path, tmp_path: Path) -> None:
    """Such as PEFT's common choice of q and v. It loads without a warning, and the other projections are unchanged."""
    folder = plain(runs(), tmp_path / "theirs", "language_model.model.layers", "multi_modal_projector", only="q_proj")
    assert import_adapter(folder, tmp_path / "run", BaseRef(str(hf)))["layers"] == 2
    base, _ = load_adapter(tmp_path / "run", BaseRef(precision="fp32", device="cpu"))
    merge(tmp_path / "run", tmp_path / "out", dtype="fp32", verify="layers")
    before, after = weights_in(hf), weights_in(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert changed == {f"model.language_model.layers.{n}.self_attn.q_proj.weight" for n in range(2)}
    probes = probe_turns("lcl")[:2]
    assert probe(load_base(BaseRef(str(tmp_path / "out"), device="cpu")), probes).distance(probe(base, probes)) < 1e-4


@pytest.fixture
def vicuna(bases: dict[str, Path], tmp_path: Path) -> Path:
    """The language model of the v1.5 base alone."""
    return save_language(tmp_path / "vicuna", bases["v1.5"])


@pytest.fixture
def on_vicuna(exported: Path, tmp_path: Path) -> Path:
    """An adapter with its projector whose config names a Vicuna, like the published llava-v1.5-7b-lora."""
    return foreign(exported, tmp_path / "llava-v1.5-lora", base_model_name_or_path="lmsys/vicuna-7b-v1.5")


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "two pickled shards"])
def test_a_base_is_built_for_an_adapter_trained_on_a_bare_language_model(
    bases: dict[str, Path], runs: Callable[..., Path], on_vicuna: Path, tmp_path: Path, pickled: bool
) -> None:
    """No shard is copied. The adapter on that base answers as before, can be merged, and the base can be converted."""
    vicuna = save_language(tmp_path / "bare", bases["v1.5"], pickled)
    before = {file.name: file.read_bytes() for file in vicuna.iterdir()}
    report = import_adapter(on_vicuna, tmp_path / "theirs", BaseRef(str(vicuna)))
    assert report["base"] == read_manifest(tmp_path / "theirs")["base"] == str(tmp_path / "theirs" / "base")
    links = {file.name for file in (tmp_path / "theirs" / "base").iterdir() if file.is_symlink()}
    assert links == {name for name in before if name.endswith((".bin", ".safetensors"))}
    assert {file.name: file.read_bytes() for file in vicuna.iterdir()} == before
    assert Adapter(tmp_path / "theirs").full_weights == {}, "the projector is the base's"
    turns = probe_turns("lcl")[:3]
    expected = probe(load_adapter(runs(projector=True), BaseRef(precision="fp32", device="cpu"))[0], turns)
    assert probe(load_adapter(tmp_path / "theirs", BaseRef(precision="fp32", device="cpu"))[0], turns).distance(expected) < 1e-5
    merge(tmp_path / "theirs", tmp_path / "llava-merged", dtype="fp32")
    assert probe(load_base(BaseRef(str(tmp_path / "llava-merged"), device="cpu")), turns).distance(expected) < 1e-4
    convert(str(tmp_path / "theirs" / "base"), tmp_path / "hf")
    assert open_checkpoint(str(tmp_path / "hf")).hash() == read_manifest(tmp_path / "theirs")["base_hash"]
    export_adapter(tmp_path / "theirs", tmp_path / "llava-lora-again")


def test_such_an_adapter_is_refused_on_a_llava(bases: dict[str, Path], on_vicuna: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"answer nonsense\. Give that language model with --base"):
        import_adapter(on_vicuna, tmp_path / "theirs", BaseRef(str(bases["v1.5"])))
    assert not (tmp_path / "theirs").exists()


def _without(name: str) -> Callable[[Path, Path], None]:
    return lambda adapter, _: (adapter / name).unlink()


def _config_with(**fields: Any) -> Callable[[Path, Path], None]:
    def change(adapter: Path, _: Path) -> None:
        config = json.loads((adapter / "config.json").read_text()) | fields
        (adapter / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def _lacks_a_shard(_: Path, vicuna: Path) -> None:
    state = load_file(vicuna / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, vicuna / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without("config.json"), "the folder must contain the config.json of a LLaVA"),
        (_config_with(mm_vision_tower=None), "names no mm_vision_tower"),
        (_config_with(mm_use_im_start_end=True), "start and end tokens; upstream trains their embeddings and does not save them"),
        (_without("non_lora_trainables.bin"), "has no projector of its own"),
        (_config_with(hidden_size=32), "mismatched keys"),
        (_config_with(mm_vision_tower="openai/none"), "vision_tower=FOLDER"),
        (_lacks_a_shard, "1 weights are missing"),
    ],
    ids=["no config", "no tower named", "start and end", "no projector", "another width", "no tower here", "a weight missing"],
)
def test_parts_that_do_not_fit_are_refused(on_vicuna: Path, vicuna: Path, tmp_path: Path, spoil: Callable[[Path, Path], None], message: str) -> None:
    """The message says what is wrong, and nothing is left behind."""
    spoil(on_vicuna, vicuna)
    with pytest.raises(UserError, match=message):
        import_adapter(on_vicuna, tmp_path / "theirs", BaseRef(str(vicuna)))
    assert not list(tmp_path.glob("theirs*"))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_an_adapter_that_reaches_the_tower_is_refused_with_commands_that_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: Any) -> None:
    """PEFT's and TRL's own defaults for a LLaVA."""
    save_tiny(tmp_path / "base", "llava-1.5")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="Merge it into a base of its own") as refused:
        import_adapter(tmp_path / "adapter", tmp_path / "run", BaseRef(str(tmp_path / "base")))
    python, inspect = str(refused.value).splitlines()[1:]
    program, option, code = shlex.split(python)
    assert (program, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    forked.run(code)
    name = "vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    merged = open_checkpoint(str(tmp_path / shlex.split(inspect)[-1]))
    (weight,) = (weight for key, weight in merged.weights.items() if key.endswith(name))
    (before,) = (weight for key, weight in open_checkpoint(str(tmp_path / "base")).weights.items() if key.endswith(name))
    assert not torch.equal(weight.read(), before.read())


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
        ({"quant_method": "gptq", "bits": 8}, "gptq, 8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
    ],
)
def test_a_base_that_was_saved_quantised_is_told(tmp_path: Path, config: dict[str, Any], told: str) -> None:
    save_tiny(tmp_path / "base", "llava-1.5")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    with pytest.raises(ModelError, match=rf"saved quantised \({told}\).*`precision: nf4`"):
        open_checkpoint(str(tmp_path / "base"))
