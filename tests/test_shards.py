"""WebDataset shards: every sample once a pass, a few shards at a time, a bounded cache, broken shards and samples."""

from __future__ import annotations

import io
import json
import multiprocessing
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lcl_adapter.base.adapter import read_manifest
from lcl_adapter.data.mixture import Mixture, _order
from lcl_adapter.data.sources import read_image, shards
from lcl_adapter.data.sources.shards import Cache, expanded, members_of, read_shards
from lcl_adapter.errors import DataError, RecipeError, RunError
from lcl_adapter.recipe import Recipe, load
from lcl_adapter.training import trainer
from tests.test_trainer import losses, small

SAMPLES = 6


def png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20), (colour % 256, 90, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def shard(first: int, count: int = SAMPLES, broken: range = range(0)) -> bytes:
    """Samples ``first``…: every third a LLaVA record with two pictures, the others a question each."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

        for number in range(first, first + count):
            key = f"part/{number:05d}"
            if number in broken:
                add(f"{key}.json", b"{not json")
            elif number % 3 == 0:
                turns = [{"from": "human", "value": "Is <image> like <image>?"}, {"from": "gpt", "value": f"answer {number}"}]
                add(f"{key}.a.png", png(number))
                add(f"{key}.b.png", png(number + 1))
                add(f"{key}.json", json.dumps({"id": number, "conversations": turns}).encode())
            else:
                add(f"{key}.png", png(number))
                add(f"{key}.json", json.dumps({"question": "What is this?", "answer": f"answer {number}"}).encode())
    return buffer.getvalue()


def answers(pool: Any) -> list[str]:
    return [dialogue.exchanges[0].answer for dialogue in pool.dialogues]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "shards"
    root.mkdir()
    for number in range(5):
        (root / f"set-{number:03d}.tar").write_bytes(shard(number * SAMPLES))
    return root


@pytest.fixture
def remote_shards(folder: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The same shards where only fsspec reads them, and their index."""
    memory = fsspec.filesystem("memory")
    listed = []
    for file in sorted(folder.glob("*.tar")):
        memory.pipe(f"/bucket/{file.name}", file.read_bytes())
        listed.append({"url": file.name, "nsamples": SAMPLES, "filesize": file.stat().st_size})
    index = tmp_path / "shards.json"
    index.write_text(json.dumps({"wids_version": 1, "shardlist": listed}))
    yield "memory://bucket/set-{000..004}.tar", index
    memory.rm("/bucket", recursive=True)


def test_every_sample_is_read_by_its_number(folder: Path) -> None:
    pool = read_shards(folder, "", None, Path("none"), 1, 4)
    assert answers(pool) == [f"answer {n}" for n in range(5 * SAMPLES)]
    two, one = pool.dialogues[0], pool.dialogues[7]
    assert [p.member for p in two.pictures] == ["part/00000.a.png", "part/00000.b.png"]
    assert two.exchanges[0].question == "Is <image> like <image>?"
    assert np.asarray(read_image(one.pictures[0]))[0, 0].tolist() == [7, 90, 30]
    assert one.origin.endswith("set-001.tar: sample 'part/00007'")
    assert answers(read_shards(folder, "", None, Path("none"), 1, 4, limit=7)) == [f"answer {n}" for n in range(2 * SAMPLES)]


def test_remote_shards_are_the_same_in_a_bounded_cache(folder: Path, remote_shards: tuple[str, Path], tmp_path: Path) -> None:
    urls, index = remote_shards
    local = read_shards(folder, "", None, Path("none"), 1, 2)
    size = max(file.stat().st_size for file in folder.glob("*.tar"))
    cache = tmp_path / "cache"
    remote = read_shards(None, urls, index, cache, 2 * size, 2)
    assert remote.fingerprint == local.fingerprint
    for order in (range(30), reversed(range(30)), [3, 29, 3, 15]):
        for number in order:
            assert remote.dialogues[number].exchanges == local.dialogues[number].exchanges or remote.dialogues[number].pictures
            assert remote.dialogues[number].exchanges[0].answer == f"answer {number}"
            cached = list(cache.glob("*.tar"))
            assert sum(file.stat().st_size for file in cached) <= 2 * size
    assert not list(cache.glob("*.part"))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 3))
def test_a_pass_has_every_sample_once_and_few_shards_at_a_time(counts: list[int], mixed: int, epoch: int) -> None:
    order = _order(5, "s", epoch, sum(counts), tuple(counts), mixed)
    assert sorted(order.tolist()) == list(range(sum(counts)))
    owner = np.repeat(np.arange(len(counts)), counts)[order]
    owners: list[int] = []
    for shard in owner.tolist():
        if shard not in owners:
            owners.append(shard)
    for start in range(0, len(counts), mixed):  # a group is done before the next begins
        group = set(owners[start : start + mixed])
        places = [i for i, shard in enumerate(owner.tolist()) if shard in group]
        assert places == list(range(places[0], places[0] + len(places)))


def test_each_shard_is_fetched_once_a_pass(remote_shards: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls, index = remote_shards
    fetched: list[str] = []
    real = fsspec.open
    monkeypatch.setattr(fsspec, "open", lambda url, mode: fetched.append(url) or real(url, mode))
    pool = read_shards(None, urls, index, tmp_path / "cache", 2 * 10240 + 20480, 2)
    for number in _order(1, "s", 0, len(pool), pool.shard_sizes, pool.shards_at_once):
        pool.dialogues[int(number)]
    assert sorted(fetched) == expanded(urls)


def fetch_all(folder: Path, urls: list[str]) -> None:
    cache = Cache(folder, 10**9)
    for url in urls:
        with cache.fetch(url).open("rb") as file:
            assert len(members_of(file, url)) == SAMPLES


def test_processes_share_one_copy(folder: Path, tmp_path: Path) -> None:
    """Each sees whole shards, whoever fetched them."""
    urls = [f"file://{file}" for file in sorted(folder.glob("*.tar"))]
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=fetch_all, args=(tmp_path / "cache", urls)) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join(30)
    assert [process.exitcode for process in started] == [0] * 4
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 5
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_members_suffix_begins_at_its_first_dot(tmp_path: Path) -> None:
    """A key that is in its own suffix, and what a Mac puts beside each file."""
    with tarfile.open(tmp_path / "unusual.tar", "w") as archive:
        for name, data in (("0.0.png", png(1)), ("0.1.png", png(2)), ("._0.0.png", b"mac"), (".DS_Store", b"mac")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        record = json.dumps({"conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "two"}]}).encode()
        info = tarfile.TarInfo("0.json")
        info.size = len(record)
        archive.addfile(info, io.BytesIO(record))
    (dialogue,) = read_shards(tmp_path, "", None, Path("none"), 1, 4).dialogues
    assert [np.asarray(read_image(p))[0, 0, 0] for p in dialogue.pictures] == [1, 2]


def test_a_network_that_fails_sometimes(remote_shards: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls, index = remote_shards
    real, tries = fsspec.open, []

    def flaky(url: str, mode: str) -> Any:
        tries.append(url)
        if len(tries) % 3:
            raise ConnectionError("reset by peer")
        return real(url, mode)

    monkeypatch.setattr(shards, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(fsspec, "open", flaky)
    (tmp_path / "cache").mkdir()
    assert answers(read_shards(None, urls, index, tmp_path / "cache", 10**9, 4)) == [f"answer {n}" for n in range(30)]

    def down(url: str, mode: str) -> Any:
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(fsspec, "open", down)
    with pytest.raises(RunError, match=r"cannot be fetched \(ConnectionError: reset by peer\). Go on with resume=true"):
        read_shards(None, urls, index, tmp_path / "other", 10**9, 4).dialogues[0]


def test_partial_files_of_a_killed_process_are_removed(folder: Path, tmp_path: Path) -> None:
    url = f"file://{folder / 'set-000.tar'}"
    cache = Cache(tmp_path / "cache", 10**9)
    target = cache.fetch(url)
    target.unlink()
    left = target.with_suffix(".12345.part")
    left.write_bytes(b"half")
    assert cache.fetch(url) == target
    assert not left.exists()


def recipe_of(base: Path, output: Path, **source: Any) -> Recipe:
    made = small(base, output, max_steps=6).model_dump(mode="json", exclude_none=True)
    made["sources"]["vqa"] = {"type": "shards", "share": 0.5, "mixed": 2, **source}
    return Recipe.model_validate(made)


def test_a_stopped_run_goes_on_with_the_same_samples(pocket_tiny: Path, remote_shards: tuple[str, Path], tmp_path: Path) -> None:
    """Without its cache, which another machine would not have."""
    urls, index = remote_shards
    source = {"urls": urls, "index": str(index), "cache": str(tmp_path / "cache"), "cache_size": "1MB"}
    whole = recipe_of(pocket_tiny, tmp_path / "whole", **source)
    trainer.train(whole)
    half = recipe_of(pocket_tiny, tmp_path / "half", **source)

    class StopError(Exception):
        pass

    def stop(*_: Any) -> Any:
        class Callback(trainer.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 3:
                    raise StopError

        return Callback()

    with pytest.raises(StopError):
        trainer.train(half, make_callback=stop)
    for file in (tmp_path / "cache").glob("*"):
        file.unlink()
    trainer.train(half, resume=True)
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")
    assert read_manifest(tmp_path / "half")["tokens"] == read_manifest(tmp_path / "whole")["tokens"]


def test_a_bad_sample_is_left_out_and_counted(pocket_tiny: Path, folder: Path, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (folder / f"set-{number:03d}.tar").write_bytes(shard(number * SAMPLES, broken=range(100)))
    made = recipe_of(pocket_tiny, tmp_path / "run", path=str(folder))
    facts = trainer.train(made)
    assert any(re.search(r"set-00[123].tar: sample", fault) for fault in facts["bad_pictures"])
    strict = recipe_of(pocket_tiny, tmp_path / "strict", path=str(folder), on_fault="refuse")
    with pytest.raises(DataError, match=r"set-00[123]\.tar"):
        trainer.train(strict)
    pool = read_shards(folder, "", None, Path("none"), 1, 4)
    with pytest.raises(DataError, match=r"set-001.tar: sample 'part/00007': .*are expected"):
        pool.dialogues[7]


def cut(folder: Path) -> None:
    file = folder / "set-002.tar"
    file.write_bytes(file.read_bytes()[:3000])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "set-002.tar"),
        (lambda f: (f / "set-000.tar").write_bytes(b"<html>no tar</html>" * 100), "set-000.tar: not a tar"),
        (lambda f: [file.unlink() for file in f.glob("*.tar")], "no [*].tar in it"),
        (lambda f: [file.write_bytes(shard(0, 0)) for file in f.glob("*.tar")], "no sample in any shard"),
    ],
)
def test_broken_shards_are_named(folder: Path, spoil: Any, message: str) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=message):
        answers(read_shards(folder, "", None, Path("none"), 1, 4))


def test_a_pattern_that_counts_down_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="counts down"):
        expanded("a-{5..2}.tar")
    assert expanded("a-{1..2}-{08..09}.tar") == ["a-1-08.tar", "a-1-09.tar", "a-2-08.tar", "a-2-09.tar"]


def test_remote_shards_that_cannot_be_read(remote_shards: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls, index = remote_shards
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match="widsindex create"):
        read_shards(None, urls, None, cache, 1, 4)
    with pytest.raises(DataError, match=r"has no entry for set-005.tar"):
        read_shards(None, urls.replace("004", "005"), index, cache, 1, 4)
    raw = json.loads(index.read_text())
    raw["shardlist"][1]["nsamples"] = 7
    index.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"has 6 samples, its index says 7"):
        answers(read_shards(None, urls, index, cache, 10**9, 4))
    fsspec.filesystem("memory").rm("/bucket/set-000.tar")
    with pytest.raises(RunError, match=r"set-000.tar: no such shard"):
        read_shards(None, urls, index, tmp_path / "other", 10**9, 4).dialogues[0]
    with pytest.raises(RunError, match=r"cannot be (read without another package|fetched)"):
        Cache(cache, 1).fetch("nowhere://bucket/x.tar")

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fsspec, "open", full)
    with pytest.raises(RunError, match="the disk is full"):
        Cache(tmp_path / "full", 1).fetch("memory://bucket/set-001.tar")


def test_a_recipe_must_say_where_shards_are(pocket_tiny: Path, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"base: {pocket_tiny}\noutput: {tmp_path / 'run'}\nsources:\n  a: {{type: shards}}\n  b: {{type: shards, path: {folder}, cache_size: much}}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load(file)
    assert "give `path`" in str(caught.value)
    assert "no amount of memory" in str(caught.value)


def test_the_mixture_draws_from_them(pocket_tiny: Path, folder: Path, tmp_path: Path) -> None:
    mixture = Mixture(recipe_of(pocket_tiny, tmp_path, path=str(folder)))
    drawn = [mixture.draw(i) for i in range(30) if mixture.slot(i).source == "vqa"]
    assert len({dialogue.origin for row in drawn for dialogue in row}) == len(drawn)  # type: ignore[union-attr]
    assert mixture.draw(4) == Mixture(recipe_of(pocket_tiny, tmp_path, path=str(folder))).draw(4)
