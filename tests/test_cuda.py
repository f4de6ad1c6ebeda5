"""What only a GPU can show. Without one, all of it is skipped, and pytest's summary says so.

pytest tests/test_cuda.py
"""

from __future__ import annotations

import base64
import gc
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lcl_adapter import devices
from lcl_adapter.answering.predict import Predictor, Question, Reply
from lcl_adapter.base.adapter import load_adapter
from lcl_adapter.base.model import Base, attach, load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.checkpoints.merge import merge
from lcl_adapter.cli import commands
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.evaluate import evaluate
from lcl_adapter.memory import budget, plan
from lcl_adapter.recipe import Recipe, save
from lcl_adapter.training import trainer
from lcl_adapter.training.callbacks import BarCallback
from lcl_adapter.training.collate import Collator, collate
from tests.test_merge import adapter_on
from tests.test_predict import requests
from tests.test_trainer import losses, small

DEVICE = devices.default_device()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(DEVICE == "cpu", reason="this machine has no GPU")]
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="training needs CUDA")

# How far a log-likelihood of a tiny random model may be from the CPU's fp32. nf4 and int8 move it themselves, so they are
# compared with the CPU in the same precision.
ROUNDING = {"fp32": 2e-3, "bf16": 1.5, "fp16": 0.2}


@pytest.fixture(autouse=True)
def _empty_card() -> Iterator[None]:
    devices.release_memory()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield
    devices.release_memory()


def loaded(folder: Path, precision: str, device: str = DEVICE) -> Base:
    return load_base(BaseRef(str(folder), precision, device=device))  # type: ignore[arg-type]


def gap(replies: list[Reply], others: list[Reply]) -> float:
    """The largest difference of a log-likelihood."""
    pairs = zip(replies, others, strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one.log_likelihoods, other.log_likelihoods, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", ["pocket", "llava-1.5", "llava-next-mistral", "llava-onevision"])
def test_a_gpu_answers_as_a_cpu_does(family: str, precision: str, tiny_folder: Callable[[str], Path]) -> None:
    """Packed, padded and cached, within the rounding of the type."""
    batch = requests(3, [1, 2], 2)
    on_cpu = Predictor(loaded(tiny_folder(family), "fp32", "cpu")).run(batch)
    on_gpu = Predictor(loaded(tiny_folder(family), precision), batch_size=2).run(batch)
    assert gap(on_gpu, on_cpu) < ROUNDING[precision]


def test_sets_of_unequal_length_are_each_as_if_alone(tiny_folder: Callable[[str], Path]) -> None:
    """The shorter set is padded, and its padding attends to nothing: no NaN may come of it."""
    batch = [*requests(1, [1]), *requests(2, [3])[1:]]
    for precision in ("fp32", "bf16"):
        predictor = Predictor(loaded(tiny_folder("llava-1.5"), precision))
        prefilled = predictor.prefill([support for support, _, _ in batch])
        together = predictor.ask(prefilled, [Question(n, query, answers) for n, (_, query, answers) in enumerate(batch)])
        for layer in prefilled.cache.layers:
            real = prefilled.mask.bool()[:, None, :, None].expand_as(layer.keys)
            assert layer.keys[real].isfinite().all()
        alone = [reply for request in batch for reply in predictor.run([request])]
        assert gap(together, alone) < ROUNDING[precision]


def test_a_cached_set_is_not_copied(tiny_folder: Callable[[str], Path]) -> None:
    predictor = Predictor(loaded(tiny_folder("llava-1.5"), "fp32"))
    batch = requests(1, [3], 4)
    ready = predictor.prefill([batch[0][0]], behind=600)
    assert devices.free_memory(DEVICE) > 0
    before = [layer.keys.data_ptr() for layer in ready.cache.layers]
    predictor.ask(ready, [Question(0, query, answers) for _, query, answers in batch])
    assert [layer.keys.data_ptr() for layer in ready.cache.layers] == before


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "nf4", "int8"])
def test_a_step_has_a_finite_loss_near_the_cpus(precision: str, pocket_tiny: Path, tmp_path: Path) -> None:
    """Forward and backward of one batch, through the trainer's own loss."""

    def loss_on(device: str, precision: str) -> tuple[float, float]:
        recipe = small(pocket_tiny, tmp_path / f"{device}-{precision}", feature_cache="10MB").model_copy(update={"precision": precision})
        torch.manual_seed(0)
        base = attach(loaded(pocket_tiny, precision, device), recipe.adapter.model_copy(update={"dropout": 0.0}))
        for name, parameter in base.model.named_parameters():  # each device draws its own numbers
            if "lora_A" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        vision = VisionFeatures(base)
        collator = Collator(Mixture(recipe), base.encoder())
        batch = collate([collator.row(0), collator.row(1)], base.encoder().pad)
        labels = batch.pop("labels").to(device)
        pictures = batch.pop("pictures")
        inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        with torch.autocast(device, enabled=False):
            logits = base.model(**inputs, mm_encoder_outputs=vision.projected_features(pictures), use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        norm = sum(float(p.grad.float().norm() ** 2) for p in base.model.parameters() if p.grad is not None) ** 0.5
        return float(loss.detach()), norm

    loss, norm = loss_on("cuda", precision)
    expected, expected_norm = loss_on("cpu", precision if precision in {"nf4", "int8"} else "fp32")
    # A quantised base computes in 16 bits on a GPU, and in fp32 on a CPU.
    tolerance = {"fp32": 1e-4, "fp16": 0.02}.get(precision, 0.1)
    assert loss == pytest.approx(expected, rel=tolerance)
    assert 0 < norm < float("inf")
    assert norm == pytest.approx(expected_norm, rel=10 * tolerance)


@needs_cuda
@pytest.mark.parametrize("precision", ["nf4", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one(precision: str, pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(name: str) -> Recipe:
        return small(pocket_tiny, tmp_path / name, max_steps=4).model_copy(update={"precision": precision})

    trainer.train(made("whole"))

    def stop(self: object, args: object, state: Any, control: object, **_: object) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(BarCallback, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(made("cut"))
    trainer.train(made("cut"), resume=True)
    whole, cut = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert cut == pytest.approx(whole, rel=1e-3)  # a GPU adds up a gradient in any order
    assert all(loss == loss for loss in whole)


def with_suite(recipe: Recipe) -> Recipe:
    suite = {"kind": "lcl", "source": {"type": "pocket", "split": "held_out"}, "shots": [2], "neighbours": "easy", "episodes": 4}
    evaluation = {"suites": {"2way": suite}, "every": 1, "during_limit": 2, "batch_size": 4}
    return Recipe.model_validate({**recipe.model_dump(mode="json"), "evaluate": evaluation})


@needs_cuda
def test_train_then_evaluate_stays_under_the_forecast(pocket_tiny: Path, tmp_path: Path) -> None:
    """One process: training, measuring while training, the evaluation. Peak allocation against what ``plan`` says."""
    recipe = with_suite(small(pocket_tiny, tmp_path / "run", max_steps=2))
    made = plan.make_plan(recipe)
    save(recipe, tmp_path / "recipe.yaml")
    result = commands.train(str(tmp_path / "recipe.yaml"))
    assert result["suites"]
    largest = max(f["total"] for name, f in made["forecasts"].items() if name != "serving")
    workspaces = 10**8  # cuBLAS takes some from the allocator on its first product, and RUNTIME counts them
    assert torch.cuda.max_memory_allocated() - workspaces + budget.RUNTIME["cuda"] <= largest
    del result
    devices.release_memory()
    left = [tensor for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor) and tensor.is_cuda and tensor.numel() > 1000]
    assert not left, "nothing of a base is left"


@needs_cuda
def test_features_are_on_the_card_only_while_used(pocket_tiny: Path) -> None:
    base = loaded(pocket_tiny, "fp32")
    vision = VisionFeatures(base)
    pictures = [turn.picture for support, _, _ in requests(4, [4]) for turn in support if turn.picture]
    before = torch.cuda.memory_allocated()
    first = vision.tower_features(pictures)
    del first
    assert torch.cuda.memory_allocated() == before
    assert all(features.is_pinned() for features in vision.cache.values())
    assert vision.tower_features(pictures).device.type == "cuda"


@needs_cuda
def test_where_the_card_is_full_the_batch_is_halved(pocket_tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit on this process's memory, and a forecast that knows nothing of it."""
    predictor = Predictor(loaded(pocket_tiny, "fp32"), batch_size=256)
    batch = requests(256, [4], 1)
    expected = predictor.run(batch[:8])
    predictor.run(batch)
    peak, kept = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    devices.release_memory()
    monkeypatch.setattr(devices, "free_memory", lambda device: 10**12)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((kept + (peak - kept) / 3) / total)
    try:
        replies = predictor.run(batch)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "memory ran out" in capsys.readouterr().err
    assert gap(replies[:8], expected) < ROUNDING["fp32"]


@needs_cuda
def test_an_adapter_trained_in_4_bits_is_merged(pocket_tiny: Path, tmp_path: Path) -> None:
    recipe = small(pocket_tiny, tmp_path / "run", max_steps=2).model_copy(update={"precision": "nf4"})
    trainer.train(recipe)
    result = merge(tmp_path / "run", tmp_path / "merged")
    assert result["greedy_equal"] is not None
    batch = requests(2, [1], 1)
    base, _ = load_adapter(tmp_path / "run", BaseRef(precision="fp32"))
    unmerged = Predictor(base).run(batch)
    merged = Predictor(load_base(BaseRef(str(tmp_path / "merged"), "fp32"))).run(batch)
    assert gap(merged, unmerged) < 0.2


def picture(seed: int) -> str:
    """A data URL."""
    written = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 40, 3), dtype=np.uint8)).save(written, "PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


def test_one_set_is_served(pocket_tiny: Path, tmp_path: Path) -> None:
    from fastapi.testclient import TestClient

    from lcl_adapter.serve.api import make_app
    from lcl_adapter.serve.engine import Engine
    from lcl_adapter.serve.service import Service
    from lcl_adapter.serve.store import Store

    run = adapter_on(pocket_tiny, tmp_path / "parts")
    engine = Engine(load_base(BaseRef(str(pocket_tiny), "fp16")), memory=10**8)
    engine.load_adapter("parts", run)
    with TestClient(make_app(Service(engine.start(), Store(tmp_path / "store"))), base_url="http://localhost") as client:
        examples = [{"label": label, "image": picture(n)} for n, label in enumerate(("good", "good", "scratched", "scratched"))]
        client.put("/v1/support-sets/screws", json={"examples": examples}).raise_for_status()
        for _ in range(2):
            answer = client.post("/v1/classify", json={"model": "parts", "support_set": "screws", "images": [picture(5), picture(6)]}).json()
            for result in answer["results"]:
                assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert engine.base.device.type == DEVICE


@needs_cuda
def test_a_run_is_evaluated_in_16_bits(pocket_tiny: Path, tmp_path: Path) -> None:
    trainer.train(with_suite(small(pocket_tiny, tmp_path / "run", max_steps=1)))
    result = evaluate(tmp_path / "run", base=BaseRef(precision="fp16"), fresh=True)
    assert 0 <= result["suites"][0]["adapter"]["value"] <= 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has no second GPU")
def test_two_gpus(pocket_tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Alone, a process takes one of them. Under torchrun, two share the steps and give the losses of one."""
    recipe = small(pocket_tiny, tmp_path / "alone", max_steps=2, per_device_train_batch_size=2)
    trainer.train(recipe)
    assert "2 GPUs are visible" in capsys.readouterr().err
    save(replace_output(recipe, tmp_path / "both"), tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "lcl_adapter", "train", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)


def replace_output(recipe: Recipe, output: Path) -> Recipe:
    return Recipe.model_validate({**json.loads(recipe.model_dump_json()), "output": str(output)})
