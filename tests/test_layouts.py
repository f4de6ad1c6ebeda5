"""Both layouts: recognised by the folder itself; the same weights, hash and answers in either; misfits are refused."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, dynamic_module_utils

from lcl_adapter.base.layouts import Checkpoint, layout_of, open_checkpoint, read_config
from lcl_adapter.base.layouts import tensors as weights
from lcl_adapter.base.layouts.tensors import INDEX, SINGLE, PlannedTensor
from lcl_adapter.base.layouts.writing import CheckpointWriter
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.checkpoints import convert as converting
from lcl_adapter.checkpoints.convert import convert
from lcl_adapter.checkpoints.probe import Answers, probe, probe_turns
from lcl_adapter.errors import MergeError, ModelError, RunError, UserError
from tests.tiny import SIDE, VERSIONS, save_original, save_tiny

Q_PROJ = {"original": "model.layers.0.self_attn.q_proj.weight", "hf": "language_model.model.layers.0.self_attn.q_proj.weight"}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time of modification."""
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder))


def values(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight.read() for name, weight in opened(folder).weights.items()}


def answers(folder: Path) -> Answers:
    return probe(load_base(BaseRef(str(folder), device="cpu")), probe_turns("lcl")[:3])


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Version -> its original folder, which tests only read."""
    root = tmp_path_factory.mktemp("originals")
    return {version: save_original(root / f"llava-{version}", version) for version in VERSIONS}


@pytest.fixture(scope="module")
def converted(originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Version -> the same in Hugging Face's layout."""
    root = tmp_path_factory.mktemp("converted")
    for version, folder in originals.items():
        convert(str(folder), root / version)
    return {version: root / version for version in originals}


@pytest.fixture
def copied(originals: dict[str, Path], converted: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a base, which a test may change."""

    def copy(layout: str = "original", version: str = "v1.5") -> Path:
        source = originals[version] if layout == "original" else converted[version]
        return Path(shutil.copytree(source, tmp_path / "copies" / layout / source.name))

    return copy


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the single file of weights in place."""
    state = load_file(folder / SINGLE)
    change(state)
    save_file(state, folder / SINGLE, metadata={"format": "pt"})


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_layout_is_recognised_by_the_folder(originals: dict[str, Path], converted: dict[str, Path], version: str) -> None:
    """Not by model_type, which is ``llava`` in both layouts of v1."""
    assert (opened(originals[version]).layout, opened(converted[version]).layout) == ("original", "hf")
    assert layout_of({"model_type": "llama"}) is None
    kinds = {"v1": "llava", "v1.5": "llava", "v1.6": "llava_next"}
    assert opened(originals[version]).config.model_type == opened(converted[version]).config.model_type == kinds[version]


@pytest.mark.parametrize("version", VERSIONS)
def test_converting_there_and_back_gives_the_same_weights_and_hash(
    originals: dict[str, Path], converted: dict[str, Path], tmp_path: Path, version: str
) -> None:
    """Bit by bit, with the original keys and types, except buffers that the model computes.

    So are the config's fields that upstream reads.
    """
    result = convert(str(converted[version]), tmp_path / "llava-back")
    assert (result["from"], result["to"], result["greedy_equal"]) == ("hf", "original", result["probes"])
    hashes = {opened(folder).hash() for folder in (originals[version], converted[version], tmp_path / "llava-back")}
    assert len(hashes) == 1
    first, back = load_file(originals[version] / SINGLE), load_file(tmp_path / "llava-back" / SINGLE)
    assert equal({k: v for k, v in first.items() if "inv_freq" not in k}, back)
    assert equal(values(originals[version]), values(converted[version]))
    assert equal(values(originals[version]), values(tmp_path / "llava-back"))
    raw, again = read_config(originals[version]), read_config(tmp_path / "llava-back")
    for field in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps",
        "max_position_embeddings", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "mm_hidden_size",
        "mm_vision_select_layer", "mm_use_im_start_end", "mm_projector_type", "image_aspect_ratio", "mm_patch_merge_type", "image_grid_pinpoints",
    ):  # fmt: skip
        default = {"mm_projector_type": "linear"}.get(field)
        assert again.get(field) == raw.get(field, default), field


@pytest.mark.parametrize("version", VERSIONS)
def test_both_layouts_answer_alike(originals: dict[str, Path], converted: dict[str, Path], version: str) -> None:
    """Up to rounding, with the same words."""
    one, other = answers(originals[version]), answers(converted[version])
    assert one.distance(other) < 1e-5
    assert one.texts == other.texts
    assert float(one.logits.std()) > 0.1, "the logits differ from each other at all"


def with_scaled_positions(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_theta": 10000.0, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_scaled_positions_go_there_and_back(copied: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """Without their scale, a model would be converted into another one that answers otherwise."""
    folder = with_scaled_positions(copied("hf"), rope_type=kind, factor=2.0)
    result = convert(str(folder), tmp_path / "llava-scaled")
    assert result["greedy_equal"] == result["probes"]
    assert json.loads((tmp_path / "llava-scaled" / "config.json").read_text())["rope_scaling"] == {"type": kind, "factor": 2.0}
    convert(str(tmp_path / "llava-scaled"), tmp_path / "back")
    for converted_folder in (tmp_path / "llava-scaled", tmp_path / "back"):
        rope = opened(converted_folder).config.text_config.rope_parameters
        assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == (kind, 2.0, 10000.0)


def test_positions_that_upstream_cannot_scale_are_refused(copied: Callable[..., Path], tmp_path: Path) -> None:
    scaled = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    folder = with_scaled_positions(copied("hf"), rope_type="llama3", **scaled)
    with pytest.raises(ModelError, match=r"scaled \(llama3\), which upstream LLaVA cannot do"):
        convert(str(folder), tmp_path / "llava-scaled")
    assert not (tmp_path / "llava-scaled").exists()


def test_transformers_reads_a_converted_base(originals: dict[str, Path], converted: dict[str, Path]) -> None:
    """Every weight by its name, none missing and none left over."""
    for version, folder in converted.items():
        model, report = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        own = {name: value.float() for name, value in values(originals[version]).items()}
        assert equal(own, {k: v.detach() for k, v in model.state_dict().items()})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("pickled", "shards"), [(True, 1), (True, 3), (False, 3)])
def test_pickles_and_shards_are_the_same_base(originals: dict[str, Path], tmp_path: Path, version: str, pickled: bool, shards: int) -> None:
    """The same weights and hash as the single safetensors file."""
    folder = save_original(tmp_path / "base", version, pickled=pickled, shards=shards)
    assert len(list(folder.glob("*.bin" if pickled else "*.safetensors"))) == shards
    assert opened(folder).hash() == opened(originals[version]).hash()
    assert equal(values(folder), values(originals[version]))


@pytest.mark.parametrize("layout", ["original", "hf"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_copy_in_fp32_has_the_same_hash(originals: dict[str, Path], copied: Callable[..., Path], layout: str, version: str) -> None:
    folder = copied(layout, version)
    rewrite(folder, lambda state: state.update({k: v.float() for k, v in state.items()}))
    assert opened(folder).hash() == opened(originals[version]).hash()


@pytest.mark.parametrize("layout", ["original", "hf"])
@pytest.mark.parametrize("at", ["first", "last"])
@pytest.mark.parametrize("part", ["q_proj.weight", "layernorm.weight", "patch_embedding.weight", "0.bias", "lm_head.weight"])
def test_another_value_is_another_hash(copied: Callable[..., Path], layout: str, at: str, part: str) -> None:
    """In any part; of the embedding and the head, in the first row."""
    folder = copied(layout, "v1.6")
    before = opened(folder).hash()

    def spoil(state: dict[str, torch.Tensor]) -> None:
        ends = {"0.bias": "linear_1.bias"}.get(part, part) if layout == "hf" else part
        name = next(k for k in state if k.endswith(ends) and (part != "0.bias" or "projector" in k))
        flat = state[name][0].view(-1) if part == "lm_head.weight" else state[name].view(-1)
        flat[0 if at == "first" else -1] += 1

    rewrite(folder, spoil)
    assert opened(folder).hash() != before


def test_another_tower_is_another_hash(originals: dict[str, Path], tmp_path: Path) -> None:
    """A tower outside the base counts too."""
    tower = Path(shutil.copytree(f"{originals['v1.5']}-tower", tmp_path / "tower"))
    rewrite(tower, lambda state: next(iter(state.values())).view(-1)[0].add_(1))
    assert open_checkpoint(BaseRef(str(originals["v1.5"]), tower=str(tower))).hash() != opened(originals["v1.5"]).hash()


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_a_base_folder_is_only_read(copied: Callable[..., Path], originals: dict[str, Path], tmp_path: Path, layout: str) -> None:
    """Loading, hashing and converting change none of its files."""
    for version in VERSIONS:
        folder = copied(layout, version)
        before = snapshot(folder.parent), snapshot(originals[version].parent)
        load_base(BaseRef(str(folder), device="cpu"))
        opened(folder).hash()
        convert(str(folder), tmp_path / "llava-out" / f"llava-{version}")
        assert (snapshot(folder.parent), snapshot(originals[version].parent)) == before


@pytest.mark.parametrize("layout", ["original", "hf"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s, k: s.update({k.replace("q_proj", "q_projj"): s.pop(k)}), r"q_projj\.weight.*\(did you mean .*q_proj\.weight'"),
        (lambda s, k: s.update({k.replace("q_proj", "q_pro"): s[k].clone()}), r"q_pro\.weight' is no weight of this model \(did you mean .*q_proj"),
        (lambda s, k: s.update({k.replace("layers.0", "layers.7"): s[k].clone()}), r"layers\.7\.self_attn\.q_proj\.weight' is no weight of this"),
        (lambda s, k: s.update({"something.else.weight": s[k].clone()}), r"something\.else\.weight' is no weight"),
        (lambda s, k: s.pop(k), r"1 weights are missing, for instance .*layers\.0\.self_attn\.q_proj\.weight"),
        (lambda s, k: s.update({k: s[k][:32].clone()}), r"q_proj\.weight is \[32, 64\], its config says \[64, 64\]"),
        (lambda s, k: s.update({k: s[k].to(torch.int8)}), r"q_proj\.weight is torch\.int8, not a float; give the base before it was quantised"),
    ],
    ids=["renamed", "near", "another layer", "unknown", "missing", "another shape", "integers"],
)
def test_weights_that_are_not_the_models_are_refused(copied: Callable[..., Path], layout: str, spoil: Any, message: str) -> None:
    """By name, before any weight is loaded."""
    folder = copied(layout)
    rewrite(folder, lambda state: spoil(state, Q_PROJ[layout]))
    with pytest.raises(ModelError, match=message):
        _ = opened(folder).weights
    with pytest.raises(ModelError, match=message):
        load_base(BaseRef(str(folder), device="cpu"))


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_a_weight_under_two_names_is_refused(copied: Callable[..., Path], layout: str) -> None:
    """Otherwise one of the two would be used silently."""
    folder = copied(layout)
    both = {
        "original": ("model.mm_projector.0.weight", "model.mm_projector.weight"),
        "hf": (Q_PROJ["hf"], "model.language_model.layers.0.self_attn.q_proj.weight"),
    }[layout]
    rewrite(folder, lambda state: state.update({both[1]: state[both[0]] + 1}))
    with pytest.raises(ModelError, match=r"name the same weight|is no weight"):
        _ = opened(folder).weights


def test_two_layers_under_a_linear_config_are_refused(copied: Callable[..., Path]) -> None:
    """Otherwise the second would be dropped silently."""
    folder = copied("original", "v1.5")
    edit(folder / "config.json", mm_projector_type="linear")
    with pytest.raises(ModelError, match=r"linear|projector"):
        _ = opened(folder).weights


def test_one_layer_under_a_config_of_two_is_refused(copied: Callable[..., Path]) -> None:
    folder = copied("original", "v1")
    edit(folder / "config.json", mm_projector_type="mlp2x_gelu")
    with pytest.raises(ModelError, match=r"weights are missing, for instance model\.multi_modal_projector\.linear_2"):
        _ = opened(folder).weights


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("layout", ["original", "hf"])
def test_a_shard_of_another_float_type_is_accepted(copied: Callable[..., Path], tmp_path: Path, layout: str, version: str) -> None:
    """A conversion does not change the type of any weight, and the hash is the same."""
    folder = copied(layout, version)
    before = opened(folder).hash()
    state = load_file(folder / SINGLE)
    keys = sorted(state)
    parts = {"model-00001-of-00002.safetensors": keys[::2], "model-00002-of-00002.safetensors": keys[1::2]}
    (folder / SINGLE).unlink()
    for number, (name, part) in enumerate(parts.items()):
        save_file({k: state[k] if number else state[k].float() for k in part}, folder / name, metadata={"format": "pt"})
    placed = {k: name for name, part in parts.items() for k in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": placed}))
    assert opened(folder).hash() == before
    convert(str(folder), tmp_path / "llava-out")
    assert opened(tmp_path / "llava-out").hash() == before
    kinds = {name: weight.dtype for name, weight in opened(folder).weights.items() if "linear_2" not in name or version != "v1"}
    assert {torch.float32, torch.float16} <= set(kinds.values())
    written = opened(tmp_path / "llava-out").weights
    assert {name: written[name].dtype for name in kinds} == kinds


def test_weights_of_both_layouts_in_one_folder_are_refused(copied: Callable[..., Path], converted: dict[str, Path]) -> None:
    folder = copied()
    shutil.copyfile(converted["v1.5"] / SINGLE, folder / "other.safetensors")
    with pytest.raises(ModelError, match="holds weights of both layouts"):
        load_base(BaseRef(str(folder), device="cpu"))


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_a_config_of_the_other_layout_is_refused(copied: Callable[..., Path], layout: str) -> None:
    folder, other = copied(layout), copied("hf" if layout == "original" else "original")
    shutil.copyfile(other / SINGLE, folder / SINGLE)
    with pytest.raises(ModelError, match=rf"config\.json is of the {layout} layout, the weights are of the other"):
        load_base(BaseRef(str(folder), device="cpu"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type 'mlp3x_gelu' is not known; there are linear, mlp2x_gelu"),
        ({"model_type": "llava_mpt"}, "model_type 'llava_mpt' in the original layout is not known; there are llava, llava_llama, llava_mistral"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature 'cls' is not known"),
        ({"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints: a list"),
    ],
)
def test_an_original_config_without_a_hugging_face_equivalent_is_refused(copied: Callable[..., Path], fields: dict[str, str], message: str) -> None:
    """The message names the value and the known ones."""
    folder = copied()
    edit(folder / "config.json", **fields)
    with pytest.raises(ModelError, match=message.replace("(", r"\(")):
        load_base(BaseRef(str(folder), device="cpu"))


def test_a_missing_tower_is_refused_with_a_command_to_get_it(copied: Callable[..., Path]) -> None:
    """For a published tower the download command, for another one a description."""
    folder = copied()
    edit(folder / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336-not-here")
    with pytest.raises(ModelError, match=r"has its vision tower in a folder of its own.*`hf download openai/clip-vit-large-patch14-336-not-here`"):
        load_base(BaseRef(str(folder), device="cpu"))
    edit(folder / "config.json", mm_vision_tower="/nowhere/tower")
    with pytest.raises(ModelError, match=r"its config says '/nowhere/tower', which is not here\. Give it with vision_tower=FOLDER"):
        load_base(BaseRef(str(folder), device="cpu"))
    with pytest.raises(ModelError, match=r"'/not/here' is no folder with a config\.json"):
        load_base(BaseRef(str(folder), device="cpu", tower="/not/here"))


def test_a_tower_may_be_given(copied: Callable[..., Path], originals: dict[str, Path]) -> None:
    """Where the config's folder does not exist. A folder beside the base is used by its name."""
    folder = copied()
    edit(folder / "config.json", mm_vision_tower="/nowhere/tower")
    base = load_base(BaseRef(str(folder), device="cpu", tower=f"{originals['v1.5']}-tower"))
    assert base.checkpoint.hash() == opened(originals["v1.5"]).hash()
    shutil.copytree(f"{originals['v1.5']}-tower", folder.parent / "tower")
    assert opened(folder).tower == folder.parent / "tower"


def test_a_whole_clip_serves_as_a_tower(originals: dict[str, Path], tmp_path: Path) -> None:
    """As OpenAI published it: a pickle with the text half and old buffers."""
    own = Path(f"{originals['v1.5']}-tower")
    vision = CLIPVisionConfig.from_pretrained(own)
    text = CLIPTextConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    whole.config.save_pretrained(tmp_path)
    state = {**whole.state_dict(), **load_file(own / SINGLE)}
    state |= {f"{half}_model.embeddings.position_ids": torch.arange(5)[None] for half in ("vision", "text")}
    torch.save(state, tmp_path / "pytorch_model.bin")
    shutil.copyfile(own / "preprocessor_config.json", tmp_path / "preprocessor_config.json")
    with_clip = open_checkpoint(BaseRef(str(originals["v1.5"]), tower=str(tmp_path)))
    assert with_clip.hash() == opened(originals["v1.5"]).hash()
    one, other = (checkpoint.config.vision_config.to_dict() for checkpoint in (with_clip, opened(originals["v1.5"])))
    assert {**one, "dtype": None} == {**other, "dtype": None}


def test_a_tower_of_another_width_is_refused(originals: dict[str, Path], tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    size = {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16, "image_size": SIDE}
    CLIPVisionModel(CLIPVisionConfig(**size)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"linear_1\.weight is \[64, 32\], its config says \[64, 48\]"):
        _ = open_checkpoint(BaseRef(str(originals["v1.5"]), tower=str(tmp_path))).weights


def test_a_base_without_tokenizer_model_cannot_become_original(copied: Callable[..., Path], tmp_path: Path) -> None:
    """The message says what to do, and nothing is left on the disk."""
    folder = copied("hf")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.model, which upstream's slow tokenizer reads\. Copy it beside the checkpoint"):
        convert(str(folder), tmp_path / "llava-out")
    assert not (tmp_path / "llava-out").exists()
    assert not (tmp_path / "llava-out.partial").exists()


@pytest.mark.parametrize("family", ["pocket", "photo", "llava-onevision", "qwen2-vl"])
def test_a_family_that_upstream_lacks_cannot_become_original(tmp_path: Path, family: str) -> None:
    base = save_tiny(tmp_path / "base", family)
    with pytest.raises(ModelError, match="has no layout of haotian-liu's"):
        convert(str(base), tmp_path / "llava-out")
    assert not (tmp_path / "llava-out").exists()


def test_a_padded_vocabulary_is_the_same_base(converted: dict[str, Path], copied: Callable[..., Path], tmp_path: Path) -> None:
    """llava-hf's embeddings have padding behind the image token: the hash is the same, upstream gets the vocabulary."""
    folder = copied("hf")

    def pad(state: dict[str, torch.Tensor]) -> None:
        for key in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            state[key] = torch.cat([state[key], torch.zeros(23, 64, dtype=state[key].dtype)])

    rewrite(folder, pad)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder / "config.json", text_config={**text, "vocab_size": text["vocab_size"] + 23})
    assert opened(folder).hash() == opened(converted["v1.5"]).hash()
    convert(str(folder), tmp_path / "llava-out")
    assert opened(tmp_path / "llava-out").hash() == opened(converted["v1.5"]).hash()
    assert load_file(tmp_path / "llava-out" / SINGLE)["lm_head.weight"].shape[0] == read_config(tmp_path / "llava-out")["vocab_size"] == 400


CODE = """
from pathlib import Path
from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast
Path({marker!r}).write_text("ran")
class Own(LlavaConfig): model_type = "llava_of_its_own"
class Model(LlavaForConditionalGeneration): pass
class Tokens(PreTrainedTokenizerFast): pass
class Images(CLIPImageProcessorPil): pass
"""


@pytest.mark.parametrize("kind", [None, "llava_of_its_own"])
@pytest.mark.parametrize("layout", ["original", "hf"])
def test_code_in_a_checkpoint_is_never_run(
    copied: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, kind: str | None
) -> None:
    """Not for any part of a checkpoint, nor for a model_type that only this code defines.

    The user is not asked to allow it.
    """
    folder, marker, questions = copied(layout), tmp_path / "ran", []
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    own = {"AutoConfig": "own.Own", "AutoModelForImageTextToText": "own.Model", "AutoModel": "own.Model"}
    edit(folder / "config.json", auto_map=own, **({"model_type": kind} if kind else {}))
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokens", "own.Tokens"]})
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).exists():
            edit(folder / name, auto_map={"AutoProcessor": "own.Images", "AutoImageProcessor": "own.Images"})

    def answer(question: str = "") -> str:
        questions.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        load_base(BaseRef(str(folder), device="cpu"))
        refused = ""
    except UserError as error:
        refused = str(error)
    assert not marker.exists()
    assert not questions
    assert bool(refused) == (kind is not None), refused


def test_an_index_without_metadata_is_read_or_refused(copied: Callable[..., Path]) -> None:
    """transformers expects a total size in the index. Loading works or raises a ModelError, nothing else."""
    folder = copied("hf")
    (folder / SINGLE).rename(folder / "model-00001-of-00001.safetensors")
    keys = load_file(folder / "model-00001-of-00001.safetensors").keys()
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(keys, "model-00001-of-00001.safetensors")}))
    with suppress(ModelError):
        assert load_base(BaseRef(str(folder), device="cpu")).checkpoint.hash()


@pytest.mark.parametrize("named", ["by its path", "by its published name"])
def test_the_tower_may_be_named_instead_of_written(originals: dict[str, Path], converted: dict[str, Path], tmp_path: Path, named: str) -> None:
    """The value of tower_as is in the config, and no tower is written beside the weights."""
    tower = f"{originals['v1.5']}-tower" if "path" in named else "openai/clip-vit-large-patch14-336"
    convert(str(converted["v1.5"]), tmp_path / "llava-out", tower_as=tower)
    assert read_config(tmp_path / "llava-out")["mm_vision_tower"] == tower
    assert not (tmp_path / "llava-out" / "vision_tower").exists()
    assert open_checkpoint(BaseRef(str(tmp_path / "llava-out"), tower=f"{originals['v1.5']}-tower")).hash() == opened(originals["v1.5"]).hash()


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_a_base_may_be_split_into_other_shards(originals: dict[str, Path], converted: dict[str, Path], tmp_path: Path, layout: Any) -> None:
    """In its own layout: the same keys and values, and the other files byte for byte."""
    source = {"original": originals, "hf": converted}[layout]["v1.5"]
    result = convert(str(source), tmp_path / "llava-out", to=layout, shard_size=60_000)
    assert result["shards"] == len(list((tmp_path / "llava-out").glob("model-*.safetensors"))) > 3
    assert equal(values(source), values(tmp_path / "llava-out"))
    assert (tmp_path / "llava-out" / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    assert opened(tmp_path / "llava-out").hash() == opened(source).hash()


def test_an_existing_folder_is_never_overwritten(originals: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "llava-out").mkdir()
    with pytest.raises(RunError, match=r"out: exists already; nothing is overwritten\. Give another path"):
        convert(str(originals["v1.5"]), tmp_path / "llava-out")
    assert not list((tmp_path / "llava-out").iterdir())


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has the space that is needed and that is free."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 60 * 10**6))
    with pytest.raises(RunError, match=r"needs 0\.1 GB, 0\.1 GB are free\. Free some space"):
        convert(str(originals["v1.5"]), tmp_path / "llava-out")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def stopped(originals: dict[str, Path], tmp_path: Path) -> Iterator[Path]:
    """The target of a conversion that was stopped in its third shard."""
    plain = weights._write

    def write(opened: Any, planned: Any) -> Any:
        for done, tensor in enumerate(plain(opened, planned)):
            if "00003-of" in opened.name and done:
                raise KeyboardInterrupt
            yield tensor

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(weights, "_write", write)
        with pytest.raises(KeyboardInterrupt):
            convert(str(originals["v1.5"]), tmp_path / "llava-out", shard_size=60_000)
    return tmp_path / "llava-out"


def test_a_stopped_conversion_is_resumed(originals: dict[str, Path], stopped: Path) -> None:
    """The complete shards are in a partial folder. The second run adds the others and renames it."""
    partial = stopped.with_name("llava-out.partial")
    assert not stopped.exists()
    done = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in partial.glob("model-*.safetensors")}
    assert len(done) == 2
    assert not list(partial.rglob("*.partial"))
    result = convert(str(originals["v1.5"]), stopped, shard_size=60_000)
    assert not partial.exists()
    assert {name: ((stopped / name).stat().st_ino, (stopped / name).stat().st_mtime_ns) for name in done} == done
    assert result["shards"] == len(list(stopped.glob("*.safetensors"))) > 3
    assert not (stopped / "plan.json").exists()
    assert opened(stopped).hash() == opened(originals["v1.5"]).hash()


@pytest.mark.parametrize("other", ["shards", "source", "unreadable"])
def test_the_remains_of_another_plan_are_removed(originals: dict[str, Path], stopped: Path, other: str) -> None:
    """Other shards, another source, or an unreadable plan: no old file is in the result."""
    partial = stopped.with_name("llava-out.partial")
    (partial / "leftover.txt").write_text("old")
    if other == "unreadable":
        (partial / "plan.json").write_text("")
    source = originals["v1.6" if other == "source" else "v1.5"]
    convert(str(source), stopped, shard_size=50_000 if other == "shards" else 60_000)
    assert not (stopped / "leftover.txt").exists()
    assert not partial.exists()
    assert opened(stopped).hash() == opened(source).hash()


def spoil(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Write another value of one tensor than was planned, as a failing disk would."""
    plain = weights._write

    def changed(tensor: PlannedTensor) -> PlannedTensor:
        return PlannedTensor(tensor.key, tensor.dtype, tensor.shape, lambda: [block + 1 for block in tensor.make()]) if tensor.key == key else tensor

    monkeypatch.setattr(weights, "_write", lambda opened, planned: plain(opened, [changed(tensor) for tensor in planned]))


@pytest.mark.parametrize("with_probes", [True, False], ids=["with probes", "no memory for probes"])
@pytest.mark.parametrize(
    ("to", "key"),
    [
        ("hf", "language_model.model.layers.1.mlp.up_proj.weight"),
        ("hf", "vision_tower.vision_model.encoder.layers.0.layer_norm1.weight"),
        ("original", "model.norm.weight"),
        ("original", "vision_model.encoder.layers.0.layer_norm1.weight"),
    ],
)
def test_a_tensor_that_was_written_differently_is_detected(
    originals: dict[str, Path], converted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, key: str, with_probes: bool
) -> None:
    """In any written file, the tower's too, whether or not the model fits into memory. Nothing is left on the disk."""
    source = converted["v1.5"] if to == "original" else originals["v1.5"]
    if not with_probes:
        monkeypatch.setattr(converting, "memory_for_probes", lambda checkpoint: (False, 10**12, 0))
    with monkeypatch.context() as patched:
        spoil(patched, key)
        with pytest.raises(MergeError, match="differs from"):
            convert(str(source), tmp_path / "llava-out")
    assert not list(tmp_path.iterdir())


def test_swapped_weights_are_detected_by_the_answers(originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two weights of one shape are swapped: each equals the plan, but the model answers differently."""
    plain = CheckpointWriter.names.func  # type: ignore[attr-defined]

    def swapped(self: CheckpointWriter) -> dict[str, str]:
        names = dict(plain(self))
        one, other = (f"language_model.model.layers.{n}.mlp.up_proj.weight" for n in (0, 1))
        return {**names, one: names[other], other: names[one]}

    monkeypatch.setattr(CheckpointWriter, "names", property(swapped))
    with pytest.raises(MergeError, match=r"differs from its source by .* in a logit"):
        convert(str(originals["v1.5"]), tmp_path / "llava-out")
    assert not list(tmp_path.iterdir())


def test_a_conversion_is_resumed_after_a_full_disk(originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the full disk, and the complete shards stay."""
    plain = weights._write

    def full(opened: Any, planned: Any) -> Any:
        if "00002-of" in opened.name:
            raise OSError(28, os.strerror(28))
        return plain(opened, planned)

    with monkeypatch.context() as patched:
        patched.setattr(weights, "_write", full)
        with pytest.raises(RunError, match="the disk is full"):
            convert(str(originals["v1.5"]), tmp_path / "llava-out", shard_size=60_000)
    assert not (tmp_path / "llava-out").exists()
    assert len(list((tmp_path / "llava-out.partial").glob("*.safetensors"))) == 1
    convert(str(originals["v1.5"]), tmp_path / "llava-out", shard_size=60_000)
    assert opened(tmp_path / "llava-out").hash() == opened(originals["v1.5"]).hash()
