"""Training in several processes: the same rows in each step, the same loss; a killed process loses only the steps after
the last checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType, PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from lcl_adapter import processes
from lcl_adapter.base.adapter import read_manifest
from lcl_adapter.base.model import load_encoder
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.errors import RecipeError, RunError
from lcl_adapter.recipe import Recipe, load, save
from lcl_adapter.training import sharding, trainer
from lcl_adapter.training.collate import BucketedOrder, Collator
from tests import forked
from tests.test_trainer import losses, small

ROOT = Path(__file__).parent.parent


@given(st.integers(1, 16), st.integers(1, 8), st.integers(1, 8))
def test_a_step_is_divided_evenly_or_refused(batch: int, accumulate: int, count: int) -> None:
    if batch * accumulate % count:
        with pytest.raises(RecipeError, match=rf"{count} processes cannot divide evenly; use \d+ rows"):
            processes.split_step(batch, accumulate, count)
    else:
        size, times = processes.split_step(batch, accumulate, count)
        assert size <= batch
        assert size * times * count == batch * accumulate
    assert processes.split_step(batch, accumulate, 1) == (batch, accumulate)


def test_what_cannot_be_sharded_is_refused(monkeypatch: pytest.MonkeyPatch, pocket_tiny: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="pip install --no-build-isolation deepspeed"):
        processes.join()
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    options = without_dropout(pocket_tiny, tmp_path / "run").model_dump(mode="json", exclude_none=True)
    with pytest.raises(RunError, match="nf4 weights cannot be sharded"):
        trainer.train(Recipe.model_validate({**options, "precision": "nf4"}))
    measured = {"every": 2, "suites": {"a": {"kind": "lcl", "source": {"type": "pocket", "split": "held_out"}}}}
    with pytest.raises(RunError, match="precision=bf16"):
        trainer.train(Recipe.model_validate({**options, "precision": "auto"}))
    with pytest.raises(RunError, match=r"adapter\.pissa=false"):
        trainer.train(Recipe.model_validate({**options, "adapter": {"pissa": True}}))
    with pytest.raises(RunError, match=r"evaluate\.every=null"):
        trainer.train(Recipe.model_validate({**options, "evaluate": measured}))
    assert not (tmp_path / "run").exists()


def test_the_launch_files_are_read_by_accelerate_and_bash() -> None:
    kinds = {name: load_config_from_file(str(ROOT / "launch" / f"{name}.yaml")) for name in ("ddp", "fsdp2", "zero3")}
    assert {name: str(config.distributed_type.value) for name, config in kinds.items()} == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
    assert {f"FSDP_{key.removeprefix('fsdp_').upper()}" for key in kinds["fsdp2"].fsdp_config} >= set(FSDP2) - {"FSDP_TRANSFORMER_CLS_TO_WRAP"}
    assert subprocess.run(["bash", "-n", ROOT / "launch" / "slurm.sh"], capture_output=True).returncode == 0


@pytest.mark.parametrize("bucket", [1, 4])
def test_the_steps_of_all_processes_are_those_of_a_single_one(pocket_tiny: Path, tmp_path: Path, bucket: int) -> None:
    """Step by step, with accelerate's own sharding of batches."""
    made = small(pocket_tiny, tmp_path, max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2, bucket=bucket)
    mixture = Mixture(made)
    order = list(BucketedOrder(Collator(mixture, load_encoder(str(pocket_tiny))), mixture.total, 4, bucket, made.train.seed))
    wanted = [sorted(order[start : start + 8]) for start in range(0, mixture.total, 8)]
    assert sorted(order) == list(range(48))
    for count in (1, 2, 4, 8):
        size, times = processes.split_step(4, 2, count)
        shards = [list(BatchSamplerShard(BatchSampler(order, size, False), count, rank)) for rank in range(count)]
        steps = [sorted(i for shard in shards for batch in shard[step * times : (step + 1) * times] for i in batch) for step in range(len(wanted))]
        assert steps == wanted, count


FSDP2 = {  # the environment that `accelerate launch` sets for launch/fsdp2.yaml
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def zero3() -> dict[str, str]:
    """The environment that `accelerate launch` sets for launch/zero3.yaml."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(ROOT / "launch" / "zero3.yaml"), "train"]))
    args.deepspeed_fields_from_accelerate_config = ""
    return {k: v for k, v in prepare_deepspeed_cmd_env(args)[1].items() if k.startswith("ACCELERATE_")}


def fsdp2_on_cpus() -> None:
    """accelerate shards weights among GPUs only. FSDP2 itself can also shard them on CPUs, with gloo."""
    os.environ |= {**FSDP2, "ACCELERATE_USE_FSDP": "true"}
    begin = PartialState.__init__

    def begun(self: PartialState, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = begun  # type: ignore[method-assign]


def zero3_on_cpus() -> None:
    """DeepSpeed on CPUs.

    By default it neither shards small weights nor releases them once gathered; all weights here are small.
    """
    os.environ |= {**zero3(), "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    import deepspeed
    from accelerate import DeepSpeedPlugin

    begin = DeepSpeedPlugin.__post_init__

    def begun(self: DeepSpeedPlugin) -> None:
        begin(self)
        for name in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance"):
            self.deepspeed_config["zero_optimization"][f"stage3_{name}"] = 0

    DeepSpeedPlugin.__post_init__ = begun  # type: ignore[method-assign]
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    sys.modules[f"{deepspeed.comm.__name__}.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]  # it would be compiled
    processes.training_device = lambda: "cuda"  # accelerate's CPU mode excludes DeepSpeed


def train_in_process(rank: int, port: int, recipe: Path, overrides: tuple[str, ...], shard: str, environment: dict[str, str]) -> None:
    """The body of one process of a launch. What it prints is beside the recipe."""
    forked.begin(printed_by(recipe, rank), printed_by(recipe, rank), environment)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from lcl_adapter.cli import commands as run

    if shard:
        {"fsdp2": fsdp2_on_cpus, "zero3": zero3_on_cpus}[shard]()
        full_state = sharding.full_state

        def checked(model: Any) -> Any:
            parts = [p for n, p in model.named_parameters() if "lora_A" in n or n.endswith("q_proj.base_layer.weight")]
            if not all(p.numel() == 0 if shard == "zero3" else p.to_local().shape[0] * 2 == p.shape[0] for p in parts):
                os._exit(7)  # not sharded
            return full_state(model) or os._exit(8)  # type: ignore[func-returns-value]

        sharding.full_state = checked
    try:
        run.train(str(recipe), overrides)
    except Exception as error:
        print(f"rank {rank}: {error!r}", file=sys.stderr)
        os._exit(1)


def printed_by(recipe: Path, rank: int) -> Path:
    return recipe.with_suffix(f".{rank}.log")


def launched(recipe: Path, *overrides: str, shard: str = "") -> list[Any]:
    """Two processes with the environment of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (port, recipe, overrides, shard, dict(os.environ))
    started = [forked.server().Process(target=train_in_process, args=(rank, *given), daemon=True) for rank in range(2)]
    for process in started:
        process.start()
    return started


def without_dropout(base: Path, output: Path) -> Recipe:
    """A recipe without dropout. Most rows are text only, so in a step one process or both can be without pictures."""
    made = small(base, output, max_steps=8, per_device_train_batch_size=4, save_steps=2).model_dump(mode="json", exclude_none=True)
    made["adapter"]["dropout"] = 0.0
    turns = [{"from": "human", "value": "What is red and blue?"}, {"from": "gpt", "value": "purple"}]
    output.parent.mkdir(parents=True, exist_ok=True)
    text = output.parent / "text.json"
    text.write_text(json.dumps([{"id": str(n), "conversations": turns} for n in range(40)]))
    made["sources"]["text"] = {"type": "llava-json", "file": str(text), "images": str(output.parent), "share": 3.0}
    return Recipe.model_validate(made)


@pytest.fixture(scope="module")
def single(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process."""
    output = tmp_path_factory.mktemp("processes") / "single"
    trainer.train(without_dropout(tiny_folder("pocket"), output))
    return output


def assert_same_run(two: Path, single: Path) -> None:
    assert losses(two) == pytest.approx(losses(single), rel=1e-4)
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (single, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=2e-3, rtol=1e-2), name
    manifests = [read_manifest(folder) for folder in (single, two)]
    assert manifests[0]["tokens"] == manifests[1]["tokens"]
    assert manifests[0]["images"]["shown"] == manifests[1]["images"]["shown"]


def recipe_file(pocket_tiny: Path, tmp_path: Path) -> Path:
    save(without_dropout(pocket_tiny, tmp_path / "two"), tmp_path / "two.yaml")
    return tmp_path / "two.yaml"


def test_a_run_with_a_killed_process_is_resumed_to_the_loss_of_a_single_one(pocket_tiny: Path, tmp_path: Path, single: Path) -> None:
    """One of two processes is killed after the first checkpoint and the run is resumed.

    Every loss and the adapter are those of a single process.
    """
    file = recipe_file(pocket_tiny, tmp_path)
    first = launched(file)
    complete = tmp_path / "two" / "checkpoints" / "checkpoint-2" / trainer.COMPLETE
    until = time.monotonic() + 120
    while not complete.exists():
        assert all(process.is_alive() for process in first)
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(first[1].pid, signal.SIGKILL)
    for process in first:
        process.join(60)
    assert [process.exitcode for process in first] == [1, -signal.SIGKILL]
    assert not (tmp_path / "two" / "adapter_model.safetensors").exists()
    second = launched(file, "resume=true")
    for process in second:
        process.join(120)
    assert [process.exitcode for process in second] == [0, 0]
    assert "".join(printed_by(file, rank).read_text() for rank in range(2)).count("adapter saved in") == 1  # one process prints
    assert_same_run(tmp_path / "two", single)


def test_two_processes_stay_as_near_to_the_base_as_one(pocket_tiny: Path, tmp_path: Path) -> None:
    """The first process asks the base for its answers; the distance to it is that of all learned tokens of a step."""
    (tmp_path / "prompts.txt").write_text("What is this?\nNow, what is this?\nLearn the names.\n", encoding="utf-8")
    own = {"type": "self", "prompts": str(tmp_path / "prompts.txt"), "max_new_tokens": 6, "retain": "distribution", "share": 1.0}
    for name in ("one", "two"):
        values = without_dropout(pocket_tiny, tmp_path / name).model_dump(mode="json", exclude_none=True)
        values["train"]["max_steps"] = 3
        save(Recipe.model_validate({**values, "sources": {"lcl": values["sources"]["lcl"], "own": own}}), tmp_path / f"{name}.yaml")
    trainer.train(load(tmp_path / "one.yaml"))
    for process in (started := launched(tmp_path / "two.yaml")):
        process.join(120)
    assert [process.exitcode for process in started] == [0, 0]
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert read_manifest(tmp_path / "two")["tokens"]["own"]["rows"] > 3


WITH_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="`make interop` has DeepSpeed")


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("zero3", marks=WITH_DEEPSPEED)])
def test_sharded_weights_learn_the_same(pocket_tiny: Path, tmp_path: Path, single: Path, kind: str) -> None:
    """A whole run, and one resumed from its sharded checkpoint."""
    file = recipe_file(pocket_tiny, tmp_path)
    first = launched(file, shard=kind)
    for process in first:
        process.join(120)
    assert [process.exitcode for process in first] == [0, 0]
    assert_same_run(tmp_path / "two", single)
    for file_name in ("adapter_model.safetensors", "lcl_adapter.json"):
        (tmp_path / "two" / file_name).unlink()
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "checkpoint-8")
    second = launched(file, "resume=true", shard=kind)
    for process in second:
        process.join(120)
    assert [process.exitcode for process in second] == [0, 0]
    assert_same_run(tmp_path / "two", single)
