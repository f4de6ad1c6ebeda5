"""WebDataset shards: every sample once a pass, a few shards at a time, a bounded cache, broken shards and samples."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
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
from lcl_adapter.cli import commands
from lcl_adapter.data.mixture import Mixture, _group_ends, _order
from lcl_adapter.data.sources import QuestionPool, read_image, shards
from lcl_adapter.data.sources.shards import Cache, expanded, members_of, read_shards
from lcl_adapter.errors import DataError, RecipeError, RunError
from lcl_adapter.evaluate import check_held_out
from lcl_adapter.recipe import Recipe, load
from lcl_adapter.training import preflight, trainer
from lcl_adapter.training.callbacks import BarCallback
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


def test_a_fetched_shard_has_a_bound(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its host sends, no more than `cache_size` is written, and nothing is tried again."""
    sent: list[int] = []

    class Endless(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            sent.append(size)
            return bytes(size)

    monkeypatch.setattr(fsspec, "open", lambda url, mode: Endless())
    with pytest.raises(RunError, match=r"a.tar: is larger than `cache_size`, 10,000,000 bytes"):
        Cache(tmp_path / "cache", 10_000_000).fetch("https://host/a.tar")
    assert sum(sent) < 10_000_000 + 2 * shards.CHUNK
    assert not list((tmp_path / "cache").glob("*.part"))


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


def many_shards(place: str, tmp_path: Path, broken: range, sizes: range = range(12)) -> dict[str, str]:
    """Shards where only fsspec reads them: the options of a source."""
    memory = fsspec.filesystem("memory")
    listed = []
    for number in sizes:
        memory.pipe(f"/{place}/set-{number:03d}.tar", shard(number * SAMPLES, broken=broken))
        listed.append({"url": f"set-{number:03d}.tar", "nsamples": SAMPLES})
    index = tmp_path / f"{place}.json"
    index.write_text(json.dumps({"wids_version": 1, "shardlist": listed}))
    urls = f"memory://{place}/set-{{{sizes[0]:03d}..{sizes[-1]:03d}}}.tar"
    return {"type": "shards", "urls": urls, "index": str(index), "cache": str(tmp_path / "cache")}


def test_a_bad_sample_is_replaced_by_one_of_the_shards_that_are_mixed_with_it(pocket_tiny: Path, folder: Path, tmp_path: Path) -> None:
    """Any other would have to be fetched, a whole shard for one sample. If all of them are bad, any other is used."""
    (folder / "set-004.tar").write_bytes(shard(24, 3))
    mixture = Mixture(recipe_of(pocket_tiny, tmp_path, path=str(folder), packed=2))
    pool = mixture.pools["vqa"]
    assert isinstance(pool, QuestionPool)
    for epoch in range(2):
        order = _order(0, "vqa", epoch, 27, pool.shard_sizes, 2)
        owner = np.searchsorted(np.cumsum(pool.shard_sizes), order, side="right")
        start = 0
        for end in _group_ends(0, "vqa", epoch, 27, pool.shard_sizes, 2):
            members = set(order[start:end].tolist())
            assert len(set(owner[start:end])) <= 2
            for place in range(start, end):
                replaced = {mixture._shuffled("vqa", pool, 27 * epoch + place, shift) for shift in range(1, end - start)}
                assert replaced == members - {int(order[place])}
            start = end
        assert start == 27
    index = next(i for i in range(30) if mixture.slot(i).source == "vqa")
    assert len({mixture.draw(index, attempt)[0].origin for attempt in range(40)}) > 2 * SAMPLES  # type: ignore[union-attr, index]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_command_fetches_what_it_needs_first_and_counts_bad_samples(
    pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Two sources of shards, a suite of classes, a suite of shards, measured during and after the training."""
    fetched: list[str] = []
    before: list[str] = []
    real = fsspec.open
    monkeypatch.setattr(fsspec, "open", lambda url, mode: fetched.append(url) or real(url, mode))
    begin = BarCallback.on_train_begin
    monkeypatch.setattr(BarCallback, "on_train_begin", lambda *args, **options: before.extend(fetched) or begin(*args, **options))
    made = small(pocket_tiny, tmp_path / "run", max_steps=4, dataloader_num_workers=workers).model_dump(mode="json", exclude_none=True)
    sources = {name: {**many_shards(name, tmp_path, range(0, 72, 3)), "mixed": 2, "share": 0.4} for name in ("one", "two")}
    made["sources"] = {"lcl": {**made["sources"]["lcl"], "split": "train", "share": 0.2}, **sources}
    measured = many_shards("eval", tmp_path, range(0, 72, 5), range(2))
    classes = {"kind": "lcl", "source": {"type": "pocket", "split": "held_out"}, "shots": 1, "neighbours": "easy", "episodes": 2}
    made["evaluate"] = {"suites": {"classes": classes, "vqa": {"kind": "vqa", "source": measured}}, "every": 4, "during": ["vqa"]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(made))
    result = commands.train(str(tmp_path / "recipe.yaml"))
    for name in ("one", "two"):
        first = [url for url in before if f"//{name}/" in url]
        assert 1 <= len(set(first)) == len(first) <= 2, "only the shards that are mixed first, each once"
        assert len({url for url in fetched if f"//{name}/" in url}) <= 4
    bad = read_manifest(tmp_path / "run")["bad_pictures"]
    assert all(re.match(r"memory://(one|two)/set-\d+.tar: sample 'part/\d+': .*are expected", fault) for fault in bad)
    assert bad
    card = (tmp_path / "run" / "README.md").read_text()
    assert all(fault in card for fault in bad)
    row = next(row for row in result["suites"] if row["name"] == "vqa")
    assert (row["n"], row["left_out"]) == (5, 1), "6 of the 12 are measured during the training"
    assert "5 (1 left out)" in card
    assert "5 (1 left out)" in (tmp_path / "run" / "report.html").read_text()
    made["output"] = str(tmp_path / "strict")
    made["evaluate"]["suites"]["vqa"]["source"]["on_fault"] = "refuse"
    (tmp_path / "recipe.yaml").write_text(json.dumps(made))
    with pytest.raises(DataError, match=r"^memory://eval/set-000.tar: sample 'part/00000'"):
        commands.train(str(tmp_path / "recipe.yaml"))
    assert not (tmp_path / "strict").exists()


def test_every_bad_sample_is_listed_and_memory_is_bounded(pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`data check` reads all shards. It holds the pictures of a few samples at a time."""
    alive, most = 0, 0

    class Counted(bytes):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    real = os.pread

    def counted(file: int, size: int, offset: int) -> bytes:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return Counted(real(file, size, offset))

    source = many_shards("check", tmp_path, range(0, 72, 7))
    made = recipe_of(pocket_tiny, tmp_path / "run", **{k: v for k, v in source.items() if k != "type"})
    monkeypatch.setattr(shards.os, "pread", counted)
    monkeypatch.setattr(preflight, "TOGETHER", 8)
    result = preflight.check(made)
    bad = [fault["message"] for fault in result["faults"] if fault["kind"] == "bad sample"]
    assert len(bad) == len(range(0, 72, 7)) == result["sources"]["vqa"]["left_out"]["bad sample"]
    assert 8 <= most <= 8 * 4


def test_a_shard_that_cannot_be_listed_is_left_out_or_refused(folder: Path) -> None:
    cut(folder)
    pool = read_shards(folder, "", None, Path("none"), 1, 4, on_fault="skip")
    assert (len(pool), pool.skipped) == (4 * SAMPLES, {"broken shard": 1})
    with pytest.raises(DataError, match=r"1 fault .*\n.*set-002.tar: not a tar archive"):
        read_shards(folder, "", None, Path("none"), 1, 4, on_fault="refuse")


def test_shards_that_are_trained_on_are_not_measured(pocket_tiny: Path, tmp_path: Path) -> None:
    source = many_shards("same", tmp_path, range(0))
    made = recipe_of(pocket_tiny, tmp_path / "run", **{k: v for k, v in source.items() if k != "type"}).model_dump(mode="json", exclude_none=True)
    made["evaluate"]["suites"] = {"vqa": {"kind": "vqa", "source": {**source, "urls": "memory://same/set-{011..012}.tar"}}}
    recipe = Recipe.model_validate(made)
    with pytest.raises(RecipeError, match="source vqa trains on the same file"):
        check_held_out(recipe, Mixture(recipe))


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
