"""A model exported for llama.cpp: two GGUF files with the merged model's weights, and the prompt as llama.cpp and Ollama read it.

Neither is a dependency. Where llama-cpp-python is installed, it also tokenises, encodes pictures and computes logits as
this project does. llama.cpp's own converter is compared by `python -m interop.llama_cpp`.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from lcl_adapter.base.layouts import keys, open_checkpoint
from lcl_adapter.base.model import Base, family_of, load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures, squared
from lcl_adapter.checkpoints.convert import convert
from lcl_adapter.checkpoints.exchange import export_for_llama_cpp, gguf_files
from lcl_adapter.checkpoints.exchange.for_llama_cpp import chat_template
from lcl_adapter.checkpoints.exchange.gguf_files import interleaved
from lcl_adapter.checkpoints.merge import merge
from lcl_adapter.checkpoints.probe import probe, probe_turns
from lcl_adapter.cli import main
from lcl_adapter.data.conversations import WORDINGS, Turn
from lcl_adapter.data.sources import Picture, read_image
from lcl_adapter.errors import AdapterError, MergeError, ModelError, RunError
from lcl_adapter.pocket import BASE
from tests.test_merge import adapter_on
from tests.tiny import save_original

LAYERS = 2  # of the tower, that run before the projector: its last one does not
CONVERTER = "import sys, pathlib\nout = pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1])\n"


@dataclass(frozen=True)
class Exported:
    """A base, a run on it, the run merged in fp32, and what was exported from the merged model."""

    base: Path
    run: Path
    merged: Path
    gguf: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("llama-cpp")
    base = save_original(root / "llava-base", tower_inside=48, tower_layers=LAYERS + 1)
    run = adapter_on(base, root / "run", projector=True)
    merge(run, root / "llava-merged", dtype="fp32", verify="layers")
    export_for_llama_cpp(root / "llava-merged", root / "gguf", class_token="first")
    return Exported(base, run, root / "llava-merged", root / "gguf")


def tensors_of(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Name -> values in the order of axes that torch has."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        for tensor in gguf.GGUFReader(path).tensors
    }


def fields_of(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def export(source: Path, out: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["export", str(source), "--for", "llama-cpp", "-o", str(out), *more])


def test_the_language_model_is_the_merged_one(exported: Exported) -> None:
    weights = {name: weight.read().float().numpy() for name, weight in open_checkpoint(str(exported.merged)).weights.items()}
    written = tensors_of(exported.gguf / "model.gguf")
    own = {"attn_output": "self_attn.o_proj", "attn_v": "self_attn.v_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
    for layer in range(2):
        for name, module in {**own, "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}.items():
            assert np.array_equal(written.pop(f"blk.{layer}.{name}.weight"), weights[f"{keys.LANGUAGE}layers.{layer}.{module}.weight"]), module
        for half in "qk":  # value i of a head's first half and of its second half become neighbours
            stored = weights[f"{keys.LANGUAGE}layers.{layer}.self_attn.{half}_proj.weight"]
            ours, theirs = stored.reshape(2, 32, 64), written.pop(f"blk.{layer}.attn_{half}.weight").reshape(2, 32, 64)
            assert np.array_equal(theirs[:, 0::2], ours[:, :16])
            assert np.array_equal(theirs[:, 1::2], ours[:, 16:])
    assert np.array_equal(written.pop("token_embd.weight"), weights[keys.EMBEDDING][:400])  # without the image token's row
    assert np.array_equal(written.pop("output.weight"), weights[keys.HEAD][:400])
    assert np.array_equal(written.pop("output_norm.weight"), weights[keys.LANGUAGE + "norm.weight"])
    assert not written


def test_the_tower_ends_where_the_projector_reads_it(exported: Exported) -> None:
    weights = {name: weight.read().float().numpy() for name, weight in open_checkpoint(str(exported.merged)).weights.items()}
    written = tensors_of(exported.gguf / "mmproj.gguf")
    for number, layer in ((0, "linear_1"), (2, "linear_2")):
        for part in ("weight", "bias"):
            assert np.array_equal(written.pop(f"mm.{number}.{part}"), weights[f"{keys.PROJECTOR}{layer}.{part}"])
    assert np.array_equal(written["v.position_embd.weight"], weights[keys.TOWER + "embeddings.position_embedding.weight"])
    assert np.array_equal(written["v.patch_embd.weight"], weights[keys.TOWER + "embeddings.patch_embedding.weight"])
    assert np.array_equal(written["v.class_embd"], weights[keys.TOWER + "embeddings.class_embedding"])
    assert np.array_equal(written["v.blk.1.ffn_up.weight"], weights[keys.TOWER + "encoder.layers.1.mlp.fc1.weight"])
    assert np.array_equal(written["v.blk.1.ffn_down.bias"], weights[keys.TOWER + "encoder.layers.1.mlp.fc2.bias"])
    assert np.array_equal(written["v.pre_ln.weight"], weights[keys.TOWER + "pre_layrnorm.weight"])
    assert len(written) == 5 + LAYERS * 16
    fields = fields_of(exported.gguf / "mmproj.gguf")
    assert fields["clip.vision.block_count"] == LAYERS
    assert fields["clip.vision.feature_layer"] == [LAYERS]
    assert (fields["clip.projector_type"], fields["clip.use_gelu"], fields["clip.vision.feed_forward_length"]) == ("mlp", False, 48)
    assert fields["clip.vision.image_mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])


def test_fields_and_tokens(exported: Exported) -> None:
    fields, tokenizer = fields_of(exported.gguf / "model.gguf"), open_checkpoint(str(exported.merged)).tokenizer
    assert fields["general.architecture"] == "llama"
    assert fields["llama.context_length"] == 1024
    assert fields["llama.rope.freq_base"] == 10000
    assert fields["tokenizer.ggml.tokens"] == [tokenizer.convert_ids_to_tokens(n) for n in range(400)]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.chat_template"] == chat_template(family_of(open_checkpoint(str(exported.merged))))


def test_a_run_is_merged_first_in_its_own_type(exported: Exported, tmp_path: Path) -> None:
    report = export_for_llama_cpp(exported.run, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "mmproj.gguf", "Modelfile", "README.md"}
    assert report["merge"]["largest_logit_difference"] < report["merge"]["adapter_effect"]
    assert report["image_tokens"] == 4
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    merge(exported.run, tmp_path / "llava-merged", verify="layers")
    expected = open_checkpoint(str(tmp_path / "llava-merged")).weights[f"{keys.LANGUAGE}layers.0.mlp.up_proj.weight"].read()
    assert np.array_equal(tensors_of(tmp_path / "out" / "model.gguf")["blk.0.ffn_up.weight"], expected.float().numpy())
    assert list(tmp_path.glob("*.partial*")) == []


def test_the_page_says_how_labelled_pictures_were_read_in_training(exported: Exported, tmp_path: Path) -> None:
    """llama.cpp reads them as in any chat."""
    shutil.copytree(exported.run, run := tmp_path / "compressed")
    manifest = json.loads((run / "lcl_adapter.json").read_text())
    (run / "lcl_adapter.json").write_text(json.dumps({**manifest, "supports": "compressed"}))
    export_for_llama_cpp(run, tmp_path / "gguf")
    assert "- The adapter was trained with labelled pictures that do not see each other" in (tmp_path / "gguf" / "README.md").read_text()
    assert "The adapter was" not in (exported.gguf / "README.md").read_text()


def test_hugging_faces_layout_gives_the_same_files(exported: Exported, tmp_path: Path) -> None:
    convert(str(exported.merged), tmp_path / "hf", verify="tensors")
    export_for_llama_cpp(tmp_path / "hf", tmp_path / "out", class_token="first")
    for file in ("model.gguf", "mmproj.gguf"):
        ours, theirs = tensors_of(exported.gguf / file), tensors_of(tmp_path / "out" / file)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_bf16_stays_bf16_in_the_language_model(exported: Exported, tmp_path: Path) -> None:
    merge(exported.run, tmp_path / "llava-bf16", dtype="bf16", verify="layers")
    export_for_llama_cpp(tmp_path / "llava-bf16", tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"BF16", "F32"}
    expected = open_checkpoint(str(tmp_path / "llava-bf16")).weights[keys.HEAD].read()[:400].float().numpy()
    assert np.array_equal(tensors_of(tmp_path / "out" / "model.gguf")["output.weight"], expected)


def test_the_class_token_behind_the_patches(exported: Exported, tmp_path: Path) -> None:
    export_for_llama_cpp(exported.merged, tmp_path / "out", class_token="last")
    first, last = tensors_of(exported.gguf / "mmproj.gguf"), tensors_of(tmp_path / "out" / "mmproj.gguf")
    name = "v.position_embd.weight"
    assert np.array_equal(last[name], np.concatenate([first[name][1:], first[name][:1]]))
    assert all(np.array_equal(first[key], last[key]) for key in first if key != name)
    assert "--class-token last" in (exported.gguf / "README.md").read_text()
    assert "**with**" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("marker", ["<__media__>", "<__media_a1B2__>"])
@pytest.mark.parametrize("line_break", ["", "\n"])
def test_the_template_is_the_familys_prompt(exported: Exported, marker: str, line_break: str) -> None:
    """llama-server joins a picture's marker and the text without a line break; a client may have begun the text with one."""
    family, picture = family_of(open_checkpoint(str(exported.merged))), Picture(Path("a.png"))
    turns = [Turn("user", WORDINGS["lcl"].query, picture), Turn("assistant", "good"), Turn("user", "a __> b")]
    messages = [{"role": t.role, "content": (marker + line_break if t.picture else "") + t.text} for t in turns]
    template = jinja2.Environment().from_string(chat_template(family))
    expected = family.render(turns, opened=True).text.replace("<image>", marker)
    assert template.render(messages=messages, add_generation_prompt=True) == expected
    assert template.render(messages=messages[:2]) == family.render(turns[:2]).text.replace("<image>", marker)
    own = template.render(messages=[{"role": "system", "content": "Be brief."}, *messages[:1]])
    assert own.startswith("Be brief. USER: ")


def test_ollamas_template_is_the_familys_prompt(exported: Exported) -> None:
    """Rendered here: it has no loop but that over the messages, and no field but the role and the content."""
    family = family_of(open_checkpoint(str(exported.merged)))
    text = (exported.gguf / "Modelfile").read_text()
    template = text.split('TEMPLATE """')[1].split('"""')[0]
    system, loop = template.split("{{ range .Messages }}")
    user, rest = loop.removeprefix('{{ if eq .Role "user" }}').split('{{ else if eq .Role "assistant" }}')
    answer, opened = rest.split("{{ end }}{{ end }}")
    turns_in_go = [user.replace("{{ .Content }}", "\nA?"), answer.replace("{{ .Content }}", "good"), user.replace("{{ .Content }}", "B?")]
    rendered = system.split("{{ else }}")[1].removesuffix("{{ end }}") + "".join(turns_in_go) + opened
    turns = [Turn("user", "A?", Picture(Path("a.png"))), Turn("assistant", "good"), Turn("user", "B?")]
    assert rendered == family.render(turns, opened=True).text.replace("<image>", "")
    assert "FROM ./model.gguf\nFROM ./mmproj.gguf\n" in text
    assert "PARAMETER num_ctx 1024" in text


def test_neighbours_rotate_as_halves_did() -> None:
    """The scores of queries and keys are equal when each side rotates its own pairs."""
    torch.manual_seed(0)
    weights, position = torch.randn(2, 16, 8, dtype=torch.double), torch.arange(5.0, dtype=torch.double)
    angles_T4 = position[:, None] / 10000 ** (torch.arange(4) / 4)
    inputs_T8 = torch.randn(5, 8, dtype=torch.double)

    def rotated(values_TC: torch.Tensor, first: Any, second: Any) -> torch.Tensor:
        heads_T28 = values_TC.unflatten(1, (2, 8))
        a, b, cos, sin = heads_T28[..., first], heads_T28[..., second], angles_T4.cos()[:, None], angles_T4.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    halves, neighbours = (slice(0, 4), slice(4, 8)), (slice(0, 8, 2), slice(1, 8, 2))
    for weight in weights:
        assert torch.allclose(rotated(inputs_T8 @ weight.T, *halves), rotated(inputs_T8 @ interleaved(weight, 2).T, *neighbours))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("photo", "its vision tower is .*efficientnet.*, which is not computed in llama.cpp"),
        ("llava-v1", "its projector has one layer"),
        ("llava-next-vicuna", "tiles and line-break vectors"),
        ("llava-onevision", "its vision tower is siglip_vision_model"),
        ("llava-interleave", "its vision tower is siglip_vision_model"),
        ("qwen2-vl", "its vision tower is qwen2_vl"),
        ("llava-1.5", "as wide inside as outside"),
    ],
)
def test_other_bases_are_refused_with_the_reason(tiny_folder: Callable[[str], Path], tmp_path: Path, family: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        export_for_llama_cpp(tiny_folder(family), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_the_shipped_base_is_refused_before_it_is_merged(tmp_path: Path) -> None:
    run = adapter_on(BASE, tmp_path / "run", projector=False)
    result = export(run, tmp_path / "out")
    assert result.exit_code == 2
    assert "its prompt is that of pocket. Use `lcl-adapter serve`." in result.stderr


def changed(folder: Path, copy: Path, **fields: Any) -> Path:
    """A copy of a checkpoint with other fields in its config."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **fields}))
    return copy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "saved quantised (awq, 4 bits)"),
        ({"mm_vision_select_feature": "cls_patch"}, "reads the class token too"),
        ({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4.0}}, "its positions are scaled (linear)"),
        ({"mm_vision_tower": "/no/such/tower"}, "which is not here"),
    ],
)
def test_configs_that_llama_cpp_would_compute_otherwise(exported: Exported, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    source = changed(exported.merged, tmp_path / "llava-changed", **fields)
    result = export(source, tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_input(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="no such run or adapter folder"):
        export_for_llama_cpp(tmp_path / "missing", tmp_path / "out")
    with pytest.raises(AdapterError):
        export_for_llama_cpp(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(RunError, match="exists already"):
        export_for_llama_cpp(exported.merged, tmp_path / "empty")
    with pytest.raises(RunError, match="--base has no meaning"):
        export_for_llama_cpp(exported.merged, tmp_path / "out", BaseRef(str(exported.base)))
    convert(str(exported.merged), tmp_path / "hf", verify="tensors")
    (tmp_path / "hf" / "tokenizer.model").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer.model.*Copy it beside the checkpoint"):
        export_for_llama_cpp(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_belong_together(exported: Exported, tmp_path: Path) -> None:
    for more in (["--for", "vllm", "--llama-cpp", "."], ["--to", "original", "--for", "llama-cpp"]):
        assert CliRunner().invoke(main, ["export", str(exported.run), "-o", str(tmp_path / "out"), *more]).exit_code == 2
    assert not (tmp_path / "out").exists()


def test_the_command(exported: Exported, tmp_path: Path) -> None:
    result = export(exported.run, tmp_path / "out", "--name", "screws", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["written_by"] == "gguf"
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "ollama create screws" in readme
    assert "--alias screws -c 1024" in readme
    assert "--wording short" in readme
    shown = export(exported.merged, tmp_path / "again")
    assert "tensors read again and equal" in shown.stdout
    assert "a llama.cpp with the defect" in shown.stderr


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "has no convert_hf_to_gguf.py"),
        ("import sys\nfor n in range(30): print('line', n)\nsys.exit('Can not map tensor')\n", "Can not map tensor"),
        ("raise KeyError('rope_theta')\n", "KeyError: 'rope_theta'"),
        ("pass\n", "wrote no model.gguf"),
    ],
)
def test_a_converter_that_fails_leaves_nothing(exported: Exported, tmp_path: Path, script: str | None, message: str) -> None:
    checkout = tmp_path / "llama.cpp"
    checkout.mkdir()
    if script is not None:
        (checkout / "convert_hf_to_gguf.py").write_text(script)
    result = export(exported.merged, tmp_path / "out", "--llama-cpp", str(checkout))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "line 1\n" not in result.stderr  # only the last lines
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]
    missing = export(exported.merged, tmp_path / "out", "--llama-cpp", str(tmp_path / "nowhere"))
    assert "is no folder. Give a checkout of llama.cpp's sources" in missing.stderr


def test_a_converter_is_given_a_plain_llama(exported: Exported, tmp_path: Path) -> None:
    """The folder loads as a Llama of transformers, with the merged model's logits; and what the converter wrote is compared."""
    checkout = tmp_path / "llama.cpp"
    checkout.mkdir()
    copied = (
        f"import shutil\nshutil.copytree(sys.argv[1], {str(tmp_path / 'plain')!r})\nshutil.copyfile({str(exported.gguf / 'model.gguf')!r}, out)\n"
    )
    (checkout / "convert_hf_to_gguf.py").write_text(CONVERTER + copied)
    assert export_for_llama_cpp(exported.merged, tmp_path / "out", llama_cpp=checkout)["written_by"] == "llama.cpp"
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(tmp_path / "plain").eval()
    ids = torch.tensor([[1, 300, 301, 302, 350]])
    with torch.no_grad():
        expected = load_base(BaseRef(str(exported.merged), "fp32", "cpu")).model(input_ids=ids).logits[..., :400]
        assert torch.allclose(llama(input_ids=ids).logits, expected, atol=1e-4)
    (checkout / "convert_hf_to_gguf.py").write_text(CONVERTER + f"out.write_bytes(open({str(exported.gguf / 'mmproj.gguf')!r}, 'rb').read())\n")
    with pytest.raises(MergeError, match=r"model.gguf: .* is (missing|in the file and not in the model)"):
        export_for_llama_cpp(exported.merged, tmp_path / "wrong", llama_cpp=checkout)
    assert not (tmp_path / "wrong").exists()


def test_a_tensor_that_differs_on_the_disk_is_refused(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = gguf_files.write_vision

    def spoil(path: Path, *more: Any) -> None:
        write(path, *more)
        content = bytearray(path.read_bytes())
        content[-40] ^= 64
        path.write_bytes(content)

    monkeypatch.setattr(gguf_files, "write_vision", spoil)
    with pytest.raises(MergeError, match=r"mmproj.gguf: .* differs from the merged model's"):
        export_for_llama_cpp(exported.merged, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_gguf(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    result = export(exported.run, tmp_path / "out")
    assert result.exit_code == 2
    assert 'pip install "lcl-adapter[gguf]"' in result.stderr


def test_a_tower_with_its_own_activation_is_marked(tmp_path: Path) -> None:
    base = save_original(tmp_path / "llava-gelu", tower_inside=48, tower_layers=LAYERS + 1)
    tower = tmp_path / "llava-gelu-tower" / "config.json"
    tower.write_text(json.dumps({**json.loads(tower.read_text()), "hidden_act": "gelu"}))
    export_for_llama_cpp(base, tmp_path / "out")
    assert fields_of(tmp_path / "out" / "mmproj.gguf")["clip.use_gelu"] is True


class LlamaCpp:
    """An exported model in llama.cpp, through llama-cpp-python."""

    def __init__(self, folder: Path, mmproj: Path) -> None:
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self.llama, self.mtmd = llama_cpp, mtmd_cpp
        exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}  # its cache rounds by default
        self.model = llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=1024, n_threads=1, logits_all=True, verbose=False, **exact)
        options = mtmd_cpp.mtmd_context_params_default()
        options.use_gpu, options.n_threads, options.print_timings = False, 1, False
        self.vision = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), self.model.model, options)

    def run(self, text: str, pictures: Sequence[np.ndarray[Any, Any]], image_token: int) -> tuple[list[int], list[torch.Tensor], torch.Tensor]:
        """Token ids, each picture's embedding [T, D], and the logits [V] after a text with ``<image>`` in it."""
        content = text.replace("<image>", self.mtmd.mtmd_default_marker().decode()).encode()
        pixels = ctypes.POINTER(ctypes.c_uint8)
        bitmaps = [self.mtmd.mtmd_bitmap_init(p.shape[1], p.shape[0], p.ctypes.data_as(pixels)) for p in pictures]
        chunks, given = self.mtmd.mtmd_input_chunks_init(), self.mtmd.mtmd_input_text(content, len(content), True, True)
        assert self.mtmd.mtmd_tokenize(self.vision, chunks, ctypes.byref(given), (ctypes.c_void_p * len(bitmaps))(*bitmaps), len(bitmaps)) == 0
        ids: list[int] = []
        embeddings = []
        for number in range(self.mtmd.mtmd_input_chunks_size(chunks)):
            chunk, count = self.mtmd.mtmd_input_chunks_get(chunks, number), ctypes.c_size_t()
            if self.mtmd.mtmd_input_chunk_get_type(chunk) == self.mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                tokens = self.mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                ids += tokens[: count.value]
                continue
            length, width = self.mtmd.mtmd_input_chunk_get_n_tokens(chunk), self.model.n_embd()
            ids += [image_token] * length
            assert self.mtmd.mtmd_encode_chunk(self.vision, chunk) == 0
            values = np.ctypeslib.as_array(self.mtmd.mtmd_get_output_embd(self.vision), (length * width,))
            embeddings.append(torch.tensor(values.reshape(length, width)))
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.model.ctx), True)
        past = self.llama.llama_pos()
        assert self.mtmd.mtmd_helper_eval_chunks(self.vision, self.model.ctx, chunks, 0, 0, 512, True, ctypes.byref(past)) == 0
        logits = np.ctypeslib.as_array(self.llama.llama_get_logits_ith(self.model.ctx, -1), (self.model.n_vocab(),))
        return ids, embeddings, torch.tensor(logits)

    def close(self) -> None:
        self.mtmd.mtmd_free(self.vision)
        self.model.close()


def pixels_of(base: Base, picture: Picture) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(np.array(squared(read_image(picture, 32), base.image_processor.image_mean).convert("RGB")))


def test_llama_cpp_computes_the_same(exported: Exported, tmp_path: Path) -> None:
    """Ids and logits of a text, and of episodes: their pictures' embeddings too.

    A llama.cpp with defect 25814 is recognised by the embeddings. With it, the file for it (``class_token="last"``) must
    give all patches but the first, and logits of pictures cannot be equal.
    """
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it builds llama.cpp with CMake")
    base = load_base(BaseRef(str(exported.merged), "fp32", "cpu"))
    encoder, vision = base.encoder(), VisionFeatures(base)
    export_for_llama_cpp(exported.merged, tmp_path / "last", class_token="last")
    probes = probe_turns("lcl")[:3]
    expected = probe(base, probes).logits
    model, for_defect = LlamaCpp(exported.gguf, exported.gguf / "mmproj.gguf"), LlamaCpp(exported.gguf, tmp_path / "last" / "mmproj.gguf")
    try:
        text = [Turn("user", "What is this? 12 naïve __> images"), Turn("assistant", "good"), Turn("user", "And this?")]
        ids = encoder.turns(text, opened=True)[0]
        theirs, _, logits = model.run(base.family.render(text, opened=True).text, [], encoder.image_token_id)
        with torch.no_grad():
            ours = base.model(input_ids=torch.tensor([ids])).logits[0, -1, : len(logits)]
        assert theirs == ids
        assert (logits - ours).abs().max() < 2e-4 * ours.abs().max()
        for (support, query), wanted in zip(probes, expected, strict=True):
            turns = [*support, query]
            pictures = [turn.picture for turn in turns if turn.picture is not None]
            features = list(vision.projected_features(pictures)["image"].pooler_output)
            rendered, pixels = base.family.render(turns, opened=True).text, [pixels_of(base, picture) for picture in pictures]
            ids, embeddings, logits = model.run(rendered, pixels, encoder.image_token_id)
            assert ids == encoder.turns(turns, opened=True)[0]
            close = 2e-3 * max(float(feature.abs().max()) for feature in features)  # its GELU is approximate
            if max(float((a - b).abs().max()) for a, b in zip(embeddings, features, strict=True)) < close:
                assert (logits - wanted[: len(logits)]).abs().max() < 1e-2 * wanted.abs().max()
                continue
            _, embeddings, _ = for_defect.run(rendered, pixels, encoder.image_token_id)
            assert max(float((a[:-1] - b[1:]).abs().max()) for a, b in zip(embeddings, features, strict=True)) < close
    finally:
        model.close()
        for_defect.close()
