"""Training in several processes: the same rows a step, the same loss, and a rank that is killed costs what came after the last checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from lcl_adapter import ranks, trainer
from lcl_adapter.adapter import read_manifest
from lcl_adapter.batches import BucketedOrder, Collator
from lcl_adapter.errors import RecipeError, RunError
from lcl_adapter.mixture import Mixture
from lcl_adapter.model import load_encoder
from lcl_adapter.recipe import Recipe, save
from tests.test_trainer import losses, small

ROOT = Path(__file__).parent.parent


@given(st.integers(1, 16), st.integers(1, 8), st.integers(1, 8))
def test_a_step_is_shared_evenly_or_refused(batch: int, accumulate: int, processes: int) -> None:
    if batch * accumulate % processes:
        with pytest.raises(RecipeError, match="could be"):
            ranks.share(batch, accumulate, processes)
    else:
        size, times = ranks.share(batch, accumulate, processes)
        assert size <= batch
        assert size * times * processes == batch * accumulate
    assert ranks.share(batch, accumulate, 1) == (batch, accumulate)


@pytest.mark.parametrize("key", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_shards_weights_is_refused(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv(key, "true")
    with pytest.raises(RunError, match=r"launch/ddp\.yaml"):
        ranks.join()


def test_the_launch_files_are_read_by_accelerate_and_bash() -> None:
    config = load_config_from_file(str(ROOT / "launch" / "ddp.yaml"))
    assert str(config.distributed_type.value) == "MULTI_GPU"
    assert subprocess.run(["bash", "-n", ROOT / "launch" / "slurm.sh"], capture_output=True).returncode == 0


@pytest.mark.parametrize("bucket", [1, 4])
def test_the_union_over_ranks_is_the_single_process_schedule(pocket_tiny: Path, tmp_path: Path, bucket: int) -> None:
    """Step for step, with accelerate's own way of giving batches to processes."""
    made = small(pocket_tiny, tmp_path, max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2, bucket=bucket)
    mixture = Mixture(made)
    order = list(BucketedOrder(Collator(mixture, load_encoder(str(pocket_tiny))), mixture.total, 4, bucket, made.train.seed))
    wanted = [sorted(order[start : start + 8]) for start in range(0, mixture.total, 8)]
    assert sorted(order) == list(range(48))
    for processes in (1, 2, 4, 8):
        size, times = ranks.share(4, 2, processes)
        shards = [list(BatchSamplerShard(BatchSampler(order, size, False), processes, rank)) for rank in range(processes)]
        steps = [sorted(i for shard in shards for batch in shard[step * times : (step + 1) * times] for i in batch) for step in range(len(wanted))]
        assert steps == wanted, processes


def work(rank: int, port: int, recipe: Path, overrides: tuple[str, ...]) -> None:
    """What a launcher's process does; it prints as the first rank alone may."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    from lcl_adapter import run

    try:
        run.train(str(recipe), overrides)
    except Exception as error:
        print(f"rank {rank}: {error!r}", file=sys.stderr)
        os._exit(1)


def launched(recipe: Path, *overrides: str) -> list[Any]:
    """As torchrun starts them; forked from a server that has imported everything, for that is most of the time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lcl_adapter.run", "trl", "tests.test_ranks"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=work, args=(rank, port, recipe, overrides)) for rank in range(2)]
    for process in processes:
        process.start()
    return processes


def without_chance(base: Path, output: Path) -> Recipe:
    made = small(base, output, max_steps=8, per_device_train_batch_size=4, save_steps=2).model_dump(mode="json", exclude_none=True)
    made["adapter"]["dropout"] = 0.0
    return Recipe.model_validate(made)


def test_a_killed_rank_and_the_loss_of_one_process(pocket_tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two processes, one of them killed after the first checkpoint, and gone on with: every loss and the adapter are one process's."""
    trainer.train(without_chance(pocket_tiny, tmp_path / "one"))
    file = tmp_path / "two.yaml"
    save(without_chance(pocket_tiny, tmp_path / "two"), file)
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
    assert capfd.readouterr().err.count("adapter saved in") == 1  # one process speaks
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    weights = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")}
    for name, weight in weights["one"].items():
        assert torch.allclose(weight, weights["two"][name], atol=2e-3, rtol=1e-2), name
    manifests = [read_manifest(tmp_path / name) for name in ("one", "two")]
    assert manifests[0]["tokens"] == manifests[1]["tokens"]
    assert manifests[0]["images"]["shown"] == manifests[1]["images"]["shown"]
