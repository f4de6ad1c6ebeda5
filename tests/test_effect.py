"""A merge is checked element by element: every way to lose an adapter's effect is noticed, and no honest merge is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save_file

from lcl_adapter.base.adapter import read_manifest
from lcl_adapter.base.layouts import open_checkpoint
from lcl_adapter.base.layouts.checkpoint import Weight
from lcl_adapter.base.layouts.tensors import tensors_in_file
from lcl_adapter.base.precision import TYPES
from lcl_adapter.checkpoints import merge as merging
from lcl_adapter.checkpoints.deltas import Adapter, merged_rows
from lcl_adapter.checkpoints.effect import WeightCheck, check_weights
from lcl_adapter.cli import main
from lcl_adapter.errors import MergeError
from tests.test_merge import adapter_on, rewritten
from tests.tiny import save_original

Rows = Iterator[torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_original(tmp_path_factory.mktemp("bases") / "llava-v1.5")


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    kinds: dict[str, dict[str, Any]] = {
        "lora": {},
        "second": {},
        "rslora": {"rslora": True},
        "dora": {"dora": True},
        "projector": {"projector": True},
    }
    return {kind: adapter_on(base, root / kind, number, **options) for number, (kind, options) in enumerate(kinds.items())}


def altered_rows(monkeypatch: pytest.MonkeyPatch, alter: Callable[[str, Sequence[torch.Tensor], Sequence[Adapter]], Rows]) -> None:
    """Replace the rows that a merge writes. ``alter`` gets the module, the base's blocks and the adapters."""
    monkeypatch.setattr(merging, "merged_rows", lambda module, weight, adapters: alter(module, list(weight), adapters))


def skipping(part: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The modules with ``part`` in their names keep the base's weights."""
    return lambda patch: altered_rows(
        patch, lambda module, blocks, adapters: iter(blocks) if part in module else merged_rows(module, blocks, adapters)
    )


def with_change(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """The right change of a weight is replaced by another one."""

    def alter(module: str, blocks: Sequence[torch.Tensor], adapters: Sequence[Adapter]) -> Rows:
        for block, merged in zip(blocks, merged_rows(module, blocks, adapters), strict=True):
            yield block.float() + change(merged - block.float())

    return lambda patch: altered_rows(patch, alter)


def with_adapters(change: Callable[[Sequence[Adapter]], Sequence[Adapter]]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: altered_rows(patch, lambda module, blocks, adapters: merged_rows(module, blocks, change(adapters)))


def with_scaling(scaling: Callable[[Adapter], float]) -> Callable[[pytest.MonkeyPatch], None]:
    own = Adapter.load_into

    def load_into(self: Adapter, layer: Any, module: str, name: str, rows: slice) -> None:
        own(self, layer, module, name, rows)
        layer.scaling[name] = self.weight * scaling(self)

    return lambda patch: patch.setattr(Adapter, "load_into", load_into)


def of_another_layer(patch: pytest.MonkeyPatch) -> None:
    altered_rows(patch, lambda module, blocks, adapters: merged_rows(module.replace("layers.0", "layers.1"), blocks, adapters))


def without_magnitude(module: str, blocks: Sequence[torch.Tensor], adapters: Sequence[Adapter]) -> Rows:
    parts = adapters[0].layers[module]
    yield torch.cat(list(blocks)).float() + adapters[0].weight * adapters[0].scaling * parts["B"] @ parts["A"]


def half_the_rows(module: str, blocks: Sequence[torch.Tensor], adapters: Sequence[Adapter]) -> Rows:
    rows, merged = torch.cat(list(blocks)).float(), torch.cat(list(merged_rows(module, blocks, adapters)))
    yield torch.cat([rows[: len(rows) // 2], merged[len(rows) // 2 :]])


LAYERS = 14  # that the adapters of the tiny base change
# name -> the runs that are merged, the fault, and how many of the changed weights are then wrong
PLANTS: dict[str, tuple[tuple[str, ...], Callable[[pytest.MonkeyPatch], None], int]] = {
    "one layer is skipped": (("lora",), skipping("layers.1."), 7),
    "one matrix is skipped": (("lora",), skipping("layers.0.mlp.up_proj"), 1),
    "all but one layer are skipped": (("lora",), skipping("layers."), LAYERS),
    "half the rows are skipped": (("lora",), lambda patch: altered_rows(patch, half_the_rows), LAYERS),
    "the scale is dropped": (("lora",), with_scaling(lambda adapter: 1.0), LAYERS),
    "applied twice": (("lora",), with_change(lambda change: 2 * change), LAYERS),
    "of the other sign": (("lora",), with_change(lambda change: -change), LAYERS),
    "of another layer": (("lora",), of_another_layer, 7),
    "transposed where it is square": (("lora",), with_change(lambda change: change.T if change.shape[0] == change.shape[1] else change), 8),
    "of another weight": (("lora",), with_scaling(lambda adapter: 0.8 * adapter.scaling), LAYERS),
    "rsLoRA scaled as LoRA": (("rslora",), with_scaling(lambda adapter: adapter.config.lora_alpha / adapter.config.r), LAYERS),
    "LoRA scaled as rsLoRA": (("lora",), with_scaling(lambda adapter: adapter.config.lora_alpha / adapter.config.r**0.5), LAYERS),
    "the first of two is lost": (("lora", "rslora"), with_adapters(lambda adapters: adapters[1:]), LAYERS),
    "the second of two is lost": (("lora", "second"), with_adapters(lambda adapters: adapters[:1]), LAYERS),
    "DoRA's magnitude is lost": (("dora",), lambda patch: altered_rows(patch, without_magnitude), LAYERS),
    "DoRA is lost": (("dora",), skipping("layers."), LAYERS),
    "the projector is lost": (
        ("projector",),
        lambda patch: patch.setattr(merging, "blended_weight", lambda name, adapters, weight: weight.float()),
        4,
    ),
}


Jobs = Callable[[Sequence[str], float], merging.MergeJob]


@pytest.fixture(scope="module")
def jobs(runs: dict[str, Path], base: Path) -> Jobs:
    """(kinds, weight) -> the merge of these runs, each of this weight. The files are read once."""
    checkpoint, manifest = open_checkpoint(str(base)), read_manifest(runs["lora"])
    adapters = cache(lambda kind, weight: Adapter(runs[kind], weight))
    return lambda kinds, weight: merging.MergeJob(tuple(adapters(kind, weight) for kind in kinds), checkpoint, manifest, "base")


def merged_weights(job: merging.MergeJob) -> dict[str, torch.Tensor]:
    return {name: torch.cat(list(change(job.checkpoint.weights[name]))) for name, change in job.changes().items()}


def checks_of(job: merging.MergeJob, merged: dict[str, torch.Tensor], dtype: str, folder: Path) -> list[WeightCheck]:
    """What a merge reports of these weights, from the disk."""
    save_file({name: value.to(TYPES[dtype]) for name, value in merged.items()}, folder / "written.safetensors")
    return list(check_weights(job.adapters, job.checkpoint.weights, job.base_rows, tensors_in_file(folder / "written.safetensors")))


@pytest.mark.parametrize("plant", PLANTS)
def test_every_lost_effect_is_noticed(plant: str, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the weights 1, 0.3 and 0.1, in every type: the wrong weights are counted, and no other one is reported."""
    kinds, fault, count = PLANTS[plant]
    for weight in (1.0, 0.3, 0.1):
        job = jobs(kinds, weight)
        with monkeypatch.context() as patch:
            fault(patch)
            merged = merged_weights(job)
        for dtype in TYPES:
            assert sum(not check.passes for check in checks_of(job, merged, dtype, tmp_path)) == count, (weight, dtype)


@pytest.mark.parametrize("kinds", sorted({kinds for kinds, _, _ in PLANTS.values()}))
def test_the_same_merges_without_a_fault_pass(kinds: tuple[str, ...], jobs: Jobs, tmp_path: Path) -> None:
    for weight in (1.0, 0.1):
        job = jobs(kinds, weight)
        merged = merged_weights(job)
        for dtype in TYPES:
            checks = checks_of(job, merged, dtype, tmp_path)
            assert [check for check in checks if not check.passes] == [], (weight, dtype)
            assert all(0.8 < check.recovered_share < 1.2 for check in checks), "the least is a bias of 64 values at the weight 0.1 in bf16"


@pytest.mark.parametrize("plant", ["one matrix is skipped", "applied twice", "the second of two is lost", "the projector is lost"])
def test_a_merge_that_loses_an_effect_is_not_saved(
    plant: str, runs: dict[str, Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the weight 0.1 in bf16, by the whole merge, and without the probes that a large model has no memory for."""
    kinds, fault, count = PLANTS[plant]
    fault(monkeypatch)
    more = [(runs[kind], 0.1) for kind in kinds[1:]]
    with pytest.raises(MergeError, match=rf"is not the base plus the adapter's effect.* {count} of \d+ changed weights are wrong.*Nothing was saved"):
        merging.merge(runs[kinds[0]], tmp_path / "llava-out", dtype="bf16", weight=0.1, more=more, verify="layers")
    assert not list(tmp_path.iterdir())


def test_a_lost_projector_of_v1_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original layout has one layer, the product of the two that were trained."""
    run = adapter_on(save_original(tmp_path / "llava-v1", "v1"), tmp_path / "run", projector=True)
    result = merging.merge(run, tmp_path / "llava-out", dtype="bf16", weight=0.3, verify="layers")
    assert result["weights_checked"] == LAYERS + 2
    assert result["smallest_recovered_share"] > 0.8
    monkeypatch.setattr(merging, "blended_weight", lambda name, adapters, weight: weight.float())
    with pytest.raises(MergeError, match=r"projector\.linear_1\.weight is not the base plus.*2 of 16 changed weights are wrong"):
        merging.merge(run, tmp_path / "llava-lost", dtype="bf16", weight=0.3, verify="layers")


@pytest.mark.parametrize("dtype", TYPES.values())
def test_an_adapter_that_starts_from_the_weight_is_checked(dtype: torch.dtype, tmp_path: Path) -> None:
    """PiSSA as PEFT saves it without conversion: its start is subtracted from the base. That is a part of the change."""
    value = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).half()
    [adapter] = random_adapters(tmp_path, "lora", 1, 48, 64, 4, 0.01, 0, init_lora_weights="pissa")
    weight = Weight(torch.float16, (48, 64), value.clone)
    for merged, passes in ((torch.cat(list(merged_rows("layer", [value], [adapter]))), True), (value, False), (value + product(adapter), False)):
        save_file({"layer.weight": merged.to(dtype)}, tmp_path / "written.safetensors")
        [check] = check_weights([adapter], {"layer.weight": weight}, lambda _, w: w.blocks(), tensors_in_file(tmp_path / "written.safetensors"))
        assert check.passes == passes


def product(adapter: Adapter) -> torch.Tensor:
    return adapter.scaling * adapter.layers["layer"]["B"] @ adapter.layers["layer"]["A"]


@pytest.mark.parametrize("kind", ["lora", "dora", "projector"])
def test_an_honest_merge_at_a_small_weight_is_saved(kind: str, runs: dict[str, Path], tmp_path: Path) -> None:
    """With the probes: rounding to bf16 is then more than a tenth of the adapter's effect, which is reported."""
    result = merging.merge(runs[kind], tmp_path / "llava-out", dtype="bf16", weight=0.1, verify="auto" if kind == "lora" else "layers")
    assert 0.4 < result["largest_error_ulp"] <= 0.501
    assert 0.85 < result["smallest_recovered_share"] < 1.15
    assert result["rounded_away"] == 0
    if kind == "lora":
        assert result["mostly_adapter"] == (result["largest_logit_difference"] < 0.1 * result["adapter_effect"])


def test_an_effect_below_the_types_steps_is_reported(runs: dict[str, Path], base: Path, tmp_path: Path) -> None:
    """In the base's own type, fp16. The elements are right, so the merge is not refused. In fp32 nothing is lost."""
    tiny = rewritten(runs["lora"], tmp_path / "run", lambda state: [value.mul_(1e-4) for key, value in state.items() if "lora_B" in key])
    results = {dtype: merging.merge(tiny, tmp_path / f"llava-{dtype}", dtype=dtype, verify="layers") for dtype in ("base", "fp32")}
    assert results["base"]["rounded_away"] == LAYERS
    assert results["base"]["smallest_recovered_share"] < 0.2
    assert results["fp32"]["rounded_away"] == 0
    assert results["fp32"]["smallest_recovered_share"] == pytest.approx(1, abs=1e-3)
    ran = CliRunner().invoke(main, ["merge", str(tiny), "--out", str(tmp_path / "llava-out"), "--verify", "layers", "--json"])
    assert ran.exit_code == 0
    assert "MOSTLY LOST IN ROUNDING in 14 of them" in " ".join(ran.stderr.split())
    assert json.loads(ran.stdout)["rounded_away"] == LAYERS


def test_a_value_that_the_type_cannot_hold_is_reported(runs: dict[str, Path], tmp_path: Path) -> None:
    """fp16 ends at 65,504."""
    large = rewritten(runs["lora"], tmp_path / "run", lambda state: [value.mul_(1e6) for key, value in state.items() if "up_proj.lora_B" in key])
    with pytest.raises(MergeError, match=r"up_proj\.weight has values that are not finite as float16.*--dtype bf16 has the range"):
        merging.merge(large, tmp_path / "llava-out", dtype="fp16", verify="layers")
    merging.merge(large, tmp_path / "llava-out", dtype="bf16", verify="layers")


def random_adapters(folder: Path, kind: str, count: int, rows: int, columns: int, rank: int, size: float, seed: int, **more: Any) -> list[Adapter]:
    """Adapters of one layer; ``size`` is about that of an element of a product."""
    random = torch.Generator().manual_seed(seed)
    adapters = []
    for number in range(count):
        place = folder / str(number)
        LoraConfig(
            r=rank, lora_alpha=2 * rank, use_rslora=kind == "rslora", use_dora=kind == "dora", target_modules=["layer"], **more
        ).save_pretrained(place)
        parts = {"lora_A.weight": torch.randn(rank, columns, generator=random), "lora_B.weight": torch.randn(rows, rank, generator=random) * size}
        if kind == "dora":
            parts["lora_magnitude_vector"] = torch.rand(rows, generator=random) + 0.5
        save_file({f"base_model.model.layer.{key}": value for key, value in parts.items()}, place / "adapter_model.safetensors")
        adapters.append(Adapter(place, 1 / (number + 1)))
    return adapters


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["lora", "rslora", "dora"]),
    count=st.integers(1, 3),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 8)),
    stored=st.sampled_from([*TYPES.values(), torch.float64]),
    written=st.sampled_from(list(TYPES.values())),
    base_size=st.sampled_from([1e-6, 1e-2, 1.0, 100.0]),
    size=st.sampled_from([1e-9, 1e-5, 1e-3, 0.1, 3.0]),
    seed=st.integers(0, 2**20),
)
def test_every_honest_merge_passes(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    count: int,
    shape: tuple[int, int, int],
    stored: torch.dtype,
    written: torch.dtype,
    base_size: float,
    size: float,
    seed: int,
) -> None:
    """Of any shape, type and size of the effect.

    If the effect is lost and that changes more than a few written elements, the check fails.
    """
    folder = tmp_path_factory.mktemp("merge")
    rows, columns, rank = shape
    adapters = random_adapters(folder, kind, 1 if kind == "dora" else count, rows, columns, rank, size, seed)
    value = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1)) * base_size).to(stored)
    weight = Weight(stored, (rows, columns), value.clone)

    def check(merged: torch.Tensor) -> WeightCheck:
        save_file({"layer.weight": merged.to(written)}, folder / "written.safetensors")
        [result] = check_weights(adapters, {"layer.weight": weight}, lambda _, w: w.blocks(), tensors_in_file(folder / "written.safetensors"))
        return result

    merged = torch.cat(list(merged_rows("layer", [value.clone()], adapters)))
    if not merged.to(written).isfinite().all():
        return
    honest = check(merged)
    assert honest.passes, honest
    lost = value.float().to(written)
    if (lost != merged.to(written)).float().mean() > 0.1:
        assert not check(value.float()).passes, honest
