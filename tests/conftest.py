"""Fixtures: tiny random bases of each family, and folders of generated photos."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads cost more than they save on short texts

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:  # imported where used, because the process that distributes the tests needs neither torch nor transformers
    from lcl_adapter.base.model import Base

FAMILIES = ("pocket", "llava-1.5")
EVERY = (
    "pocket", "llava-v1", "llava-1.5", "llava-next-vicuna", "llava-next-mistral", "llava-next-llama-3", "llava-onevision", "llava-interleave",
    "qwen2-vl", "smolvlm",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that trains for a minute or two runs first, so that it does not run alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_pocket.py")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Any:
    """Collections of garbage would be a quarter of the time of the imports."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _ready() -> None:
    """Threads are set. In a process that runs many files, all that commands import later is imported now, for the fixture below."""
    import torch

    from tests.forked import PRELOADED

    many = "PYTEST_XDIST_WORKER" in os.environ
    torch.set_num_threads(1 if many else int(os.environ.get("OMP_NUM_THREADS", 2)))
    gc.disable()
    for module in PRELOADED if many else []:
        importlib.import_module(module)
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _small_garbage_collections(_ready: None) -> None:
    """What is imported by now is left out of later collections.

    There are a million such objects, and visiting them took half the time of the tests that train.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _on_a_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test but those of the devices runs on a CPU, also where there is a GPU."""
    import torch

    if not request.node.get_closest_marker("cuda"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The tests of the devices are never skipped silently."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "test_cuda.py" in report.nodeid]
    if skipped:
        terminalreporter.write_line(
            f"tests/test_cuda.py: {len(skipped)} tests NOT RUN: {skipped[0].longrepr[2].removeprefix('Skipped: ')}", yellow=True
        )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> the folder of its tiny base."""
    from tests.tiny import save_tiny

    made: dict[str, Path] = {}

    def folder(family: str = "pocket") -> Path:
        if family not in made:
            made[family] = save_tiny(tmp_path_factory.mktemp(f"tiny-{family}"), family)
        return made[family]

    return folder


@pytest.fixture(params=FAMILIES)
def tiny_base(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> Base:
    """A tiny base of each family in turn."""
    from lcl_adapter.base.model import load_base

    return load_base(str(tiny_folder(request.param)))


@pytest.fixture
def pocket_tiny(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("pocket")


def paint(path: Path, colour: tuple[int, int, int], seed: int = 0, size: tuple[int, int] = (48, 40)) -> Path:
    """A noisy picture of one colour."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(np.array(colour) + rng.integers(-20, 20, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """``photos/<class>/*.png``: three classes of four pictures."""
    root = tmp_path / "photos"
    for number, (name, colour) in enumerate({"good": (40, 160, 60), "scratched": (180, 50, 40), "dented": (40, 60, 190)}.items()):
        for index in range(4):
            paint(root / name / f"{index}.png", colour, seed=10 * number + index)
    return root


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many labelled pictures of independent sets were read, by pass."""
    from lcl_adapter.answering.predict import Predictor

    counts: list[int] = []
    real = Predictor._read_alone

    def counted(self: Predictor, rows: Any, cache: Any) -> None:
        counts.append(len(rows))
        real(self, rows, cache)

    monkeypatch.setattr(Predictor, "_read_alone", counted)
    return counts
