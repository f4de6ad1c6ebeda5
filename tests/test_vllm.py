"""An adapter for vLLM has the names and fields that vLLM reads, and the family's prompt as its template.

Unsupported adapters are refused.

vLLM itself is no dependency. Its rules are copied from vllm/lora and vllm/model_executor/models/llava.py, version 0.33.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from lcl_adapter.base.layouts import open_checkpoint
from lcl_adapter.base.model import family_of, load_encoder
from lcl_adapter.checkpoints.deltas import Adapter
from lcl_adapter.checkpoints.exchange import export_for_vllm
from lcl_adapter.checkpoints.exchange.for_vllm import RANKS
from lcl_adapter.cli import main
from lcl_adapter.data.conversations import WORDINGS, Turn
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import AdapterError, RunError
from lcl_adapter.pocket import BASE
from tests.test_merge import adapter_on

MAPPED = {"model.language_model.": "language_model.model.", "model.multi_modal_projector.": "multi_modal_projector."}  # hf_to_vllm_mapper
READ = {"r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_rslora", "use_dora", "init_lora_weights"}  # PEFTHelper


@pytest.fixture(scope="module")
def run_folder(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_on(tiny_folder("llava-1.5"), tmp_path_factory.mktemp("vllm") / "run", rslora=True, projector=False)


def test_names_and_fields_are_those_that_vllm_reads(run_folder: Path, tmp_path: Path) -> None:
    report = export_for_vllm(run_folder, tmp_path / "out", images=5)
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key in weights:
        name = key.removeprefix("base_model.model.")
        name_in_vllm = next(new + name.removeprefix(old) for old, new in MAPPED.items() if name.startswith(old))
        assert re.fullmatch(
            r"language_model\.model\.layers\.[01]\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.lora_[AB]\.weight", name_in_vllm
        )
    assert report["layers"] == len(weights) // 2 == 14
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert config["lora_alpha"] / config["r"] == pytest.approx(8 / 4**0.5)  # rsLoRA's scaling, expressed by alpha
    assert not config.get("use_rslora")
    assert {key.split(".")[-3] for key in weights} == set(config["target_modules"])
    stored = load_file(run_folder / "adapter_model.safetensors")
    assert all(torch.equal(weights[key], stored[key]) for key in weights)


def test_query_and_key_layers_of_another_rank_are_filled_up(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    run = adapter_on(tiny_folder("llava-1.5"), tmp_path / "run", projector=False, query_key_rank=12)
    export_for_vllm(run, tmp_path / "out")
    exported, stored = Adapter(tmp_path / "out"), Adapter(run)
    assert exported.config.r == 12
    assert not exported.config.rank_pattern
    for module, parts in stored.layers.items():
        assert exported.layers[module]["A"].shape[0] == 12
        assert exported.scaling_of(module) == pytest.approx(stored.scaling_of(module))
        assert torch.equal(exported.layers[module]["B"] @ exported.layers[module]["A"], parts["B"] @ parts["A"])


@pytest.mark.parametrize("family", ["llava-1.5", "llava-next-mistral", "llava-next-llama-3", "pocket"])
def test_the_template_is_the_familys_prompt(tiny_folder: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """Rendered as vLLM renders it: the content is a list of parts, and no token is added in front."""
    from transformers.utils.chat_template_utils import render_jinja_template

    from lcl_adapter.checkpoints.exchange.for_vllm import chat_template_of

    checkpoint, encoder = open_checkpoint(str(tiny_folder(family))), load_encoder(str(tiny_folder(family)))
    wording, picture = WORDINGS["lcl"], Picture(Path("a.png"))
    turns = [Turn("user", wording.query, picture), Turn("assistant", "good"), Turn("user", "And this?", picture)]
    messages = [{"role": t.role, "content": [*([{"type": "image"}] if t.picture else []), {"type": "text", "text": t.text}]} for t in turns]
    template = chat_template_of(checkpoint, encoder)
    (text,), _ = render_jinja_template(conversations=[messages], chat_template=template, add_generation_prompt=True)
    image = checkpoint.tokenizer.convert_ids_to_tokens(checkpoint.config.image_token_id)
    expected = family_of(checkpoint).render(turns, opened=True).text.replace("<image>", image)
    bos = checkpoint.tokenizer.bos_token if encoder.turns(turns)[0][0] == checkpoint.tokenizer.bos_token_id else ""
    assert text == (bos or "") + expected
    assert text.count(image) == 2


def test_the_script_passes_its_flags_and_further_arguments_to_vllm(run_folder: Path, tmp_path: Path) -> None:
    export_for_vllm(run_folder, tmp_path / "out put", name="parts", images=9)
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nfor argument in "$@"; do printf "%s\\n" "$argument"; done\n')
    fake.chmod(0o755)
    script = tmp_path / "out put" / "serve.sh"
    ran = subprocess.run(
        [script, "/models/base", tmp_path / "out put", "--port", "9"], capture_output=True, text=True, env={"PATH": f"{fake.parent}:/usr/bin:/bin"}
    )
    given = ran.stdout.splitlines()
    assert given[:4] == ["serve", "/models/base", "--served-model-name", "base"]
    assert given[-2:] == ["--port", "9"]
    assert int(given[given.index("--max-lora-rank") + 1]) == 8 in RANKS
    assert given[given.index("--lora-modules") + 1] == f"parts={tmp_path / 'out put'}"
    assert json.loads(given[given.index("--limit-mm-per-prompt") + 1]) == {"image": 9}
    assert Path(given[given.index("--chat-template") + 1]).exists()
    alone = subprocess.run([script, "/models/base"], capture_output=True, text=True, env={"PATH": f"{fake.parent}:/usr/bin:/bin"})
    assert f"parts={tmp_path / 'out put'}" in alone.stdout.splitlines()
    assert shlex.split(script.read_text().splitlines()[1].lstrip("# "))  # the command in the comment has valid quotes


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llava-1.5", {"projector": True}, "trained projector"),
        ("llava-1.5", {"dora": True, "projector": False}, "DoRA"),
        ("llava-onevision", {"projector": False}, "llava and llava_next"),
        ("llava-next-vicuna", {"projector": False}, "without tiles"),
    ],
)
def test_an_adapter_that_vllm_does_not_support_is_refused(
    tiny_folder: Callable[[str], Path], tmp_path: Path, family: str, options: dict[str, bool], message: str
) -> None:
    run = adapter_on(tiny_folder(family), tmp_path / "run", **options)
    with pytest.raises(AdapterError, match=message):
        export_for_vllm(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_shipped_base_is_refused_for_its_image_size(tmp_path: Path) -> None:
    run = adapter_on(BASE, tmp_path / "run", projector=False)
    with pytest.raises(AdapterError, match="a multiple of the patch size; this tower's are 64 and 21 pixels"):
        export_for_vllm(run, tmp_path / "out")


def test_nothing_is_overwritten(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match="exists already"):
        export_for_vllm(run_folder, tmp_path / "out")


def test_the_command(run_folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["export", str(run_folder), "--for", "vllm", "-o", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["max_lora_rank"] == 8
    assert (tmp_path / "out" / "README.md").read_text().count("--wording") == 1
    both = CliRunner().invoke(main, ["export", str(run_folder), "--for", "vllm", "--to", "original", "-o", str(tmp_path / "b")])
    assert both.exit_code == 2
