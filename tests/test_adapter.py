"""Adapters on disk: complete or refused, and only on the base they were trained on. A merge that differs is removed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from lcl_adapter import recipe
from lcl_adapter.base.adapter import MANIFEST, load_adapter, read_manifest
from lcl_adapter.base.model import Base, load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.checkpoints import merge as merging
from lcl_adapter.errors import AdapterError, MergeError, ModelError, RunError
from lcl_adapter.training import trainer
from tests.test_trainer import small
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    base = save_tiny(folder / "base")
    trainer.train(small(base, folder / "run", max_steps=4))
    return folder / "run"


def test_plain_peft_loads_it(run: Path) -> None:
    base = LlavaForConditionalGeneration.from_pretrained(run.parent / "base", dtype=torch.float32)
    theirs = merging.probe_turns("short")
    model = PeftModel.from_pretrained(base, run).eval()
    ours, _ = load_adapter(run)
    expected = merging.probe(ours, theirs)
    object.__setattr__(ours, "model", model)
    assert merging.probe(ours, theirs).distance(expected) < 1e-5


def test_another_base_is_refused_by_its_weights(run: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "base", seed=1)
    with pytest.raises(AdapterError, match="hashes of the weights differ"):
        load_adapter(run, BaseRef(str(other)))


def test_a_moved_base_is_accepted(run: Path, tmp_path: Path) -> None:
    moved = save_tiny(tmp_path / "moved")
    assert load_adapter(run, BaseRef(str(moved)))[0].path == moved.resolve()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / MANIFEST).unlink(), "no complete adapter"),
        (lambda f: (f / MANIFEST).write_text("{"), "not a manifest"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "is missing"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "its hash differs"),
    ],
)
def test_an_incomplete_adapter_is_refused(run: Path, tmp_path: Path, spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (MANIFEST, "adapter_config.json", "adapter_model.safetensors", "recipe.yaml"):
        (copy / name).write_bytes((run / name).read_bytes())
    read_manifest(copy)
    spoil(copy)
    with pytest.raises(AdapterError, match=message):
        read_manifest(copy)


def test_a_folder_that_is_no_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_base("no/such-base")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_base(str(tmp_path / "bare"))
    for text, message in (
        ('{"model_type": "bert"}', "'bert' model without a vision tower"),
        ('{"model_type": "llava", "mm_vision_tower": "x"}', "its config says 'x', which is not here"),
        ("{", "not JSON"),
    ):
        (tmp_path / "bare" / "config.json").write_text(text)
        with pytest.raises(ModelError, match=message):
            load_base(str(tmp_path / "bare"))
    truncated = save_tiny(tmp_path / "cut")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model\.safetensors: .*cut short or damaged"):
        load_base(str(truncated))


@pytest.mark.parametrize("dtype", ["base", "fp32", "bf16"])
def test_a_merged_model_answers_as_the_adapter(run: Path, tmp_path: Path, dtype: str) -> None:
    result = merging.merge(run, tmp_path / "merged", dtype=dtype)
    assert result["dtype"] == {"base": "float16", "fp32": "float32", "bf16": "bfloat16"}[dtype]
    if dtype == "fp32":
        assert result["largest_logit_difference"] < 1e-4
        assert result["greedy_equal"] == result["probes"]
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert merged.lm_head.weight.data_ptr() == merged.get_input_embeddings().weight.data_ptr(), "tied weights stay tied"
    base, own = (load_file(folder / "model.safetensors") for folder in (run.parent / "base", tmp_path / "merged"))
    assert set(own) == set(base), "the keys of the base's own layout"
    towers = [k for k in base if "vision_tower" in k]
    assert all(torch.equal(base[k].float(), own[k].float()) for k in towers) or dtype == "bf16"
    assert any(not torch.equal(base[k].float(), own[k].float()) for k in base if "q_proj" in k and "language_model" in k)


def test_merging_never_overwrites(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="exists already"):
        merging.merge(run, tmp_path)


def test_a_merge_that_answers_differently_is_removed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = merging.load_base

    def spoiled(ref: BaseRef) -> Base:
        base = plain(ref)
        if not str(ref.name).endswith(".partial"):
            return base
        with torch.no_grad():
            base.llava.model.language_model.layers[0].mlp.up_proj.weight.mul_(-1)
        return base

    monkeypatch.setattr(merging, "load_base", spoiled)
    with pytest.raises(MergeError, match="differs from the adapter"):
        merging.merge(run, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_qlora_merge_reports_its_cost(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    trainer.train(small(base, tmp_path / "q", max_steps=2).model_copy(update={"precision": "nf4"}))
    result = merging.merge(tmp_path / "q", tmp_path / "merged", dtype="fp32")
    assert result["largest_logit_difference"] < 1e-4
    assert result["from_4_bit"]["largest_logit_difference"] > 10 * result["largest_logit_difference"]


def test_the_manifest_describes_the_training(run: Path) -> None:
    manifest = read_manifest(run)
    assert set(manifest["shares"]["realised"]) == {"lcl", "vqa"}
    assert len(manifest["held_in"]["lcl"]) > 900
    assert manifest["libraries"]["trl"]
    assert recipe.load(run / "recipe.yaml").train.max_steps == 4


def test_an_adapter_is_loaded_from_a_path_as_text(run: Path) -> None:
    assert load_adapter(str(run))[1] == read_manifest(run)


def test_the_readmes_example_answers(photos: Path) -> None:
    """Load, prefill, ask, with the names that the package exports and paths as text."""
    import lcl_adapter as lcl

    labels = ("good", "scratched")
    base = lcl.load_base("pocket")
    shown = [(lcl.Picture(f"{photos}/{label}/{n}.png"), label) for label in labels for n in (1, 2)]
    predictor = lcl.Predictor(base)
    support = predictor.prefill([lcl.support_turns(shown)])
    query = lcl.Turn("user", "Now, what is this?", lcl.Picture(f"{photos}/good/3.png"))
    [reply] = predictor.ask(support, [lcl.Question(0, query, labels)])
    assert reply.text
    assert sum(reply.probabilities) == pytest.approx(1)


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    """Under the name of the installed command, in help and in errors."""
    shown = subprocess.run([sys.executable, "-m", "lcl_adapter", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert (shown.returncode, shown.stdout.split(" [")[0]) == (0, "Usage: lcl-adapter")
    refused = subprocess.run([sys.executable, "-m", "lcl_adapter", "no-such-command"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2
    assert "lcl-adapter --help" in refused.stderr
