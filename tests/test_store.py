"""Support sets on disk: versions, conflicts, and that no acknowledged set is ever lost."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from lcl_adapter.cli import main
from lcl_adapter.data.sources import read_class_folders
from lcl_adapter.errors import ConflictError, MissingError, RunError
from lcl_adapter.serve import store as store_module
from lcl_adapter.serve.store import MAX_VERSIONS, Example, Store
from tests.forked import Forked

ONE, TWO = [("good", b"a photo"), ("bad", b"another")], [("good", b"a photo"), ("bad", b"a third"), ("ugly", b"a photo")]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def images(store: Store) -> set[str]:
    return {file.name for file in store.images.glob("*/*")}


def test_a_set_survives_a_restart(tmp_path: Path) -> None:
    first = Store(tmp_path)
    put = first.put("local", "screws", ONE, "What is it?")
    first.close()
    again = Store(tmp_path).get("local", "screws")
    assert again == put
    assert (again.version, again.labels, again.question) == (1, ("good", "bad"), "What is it?")
    assert [Store(tmp_path).bytes_of("local", e.image) for e in again.examples] == [b"a photo", b"another"]


def test_a_limited_number_of_versions_is_stored_and_each_image_once(store: Store) -> None:
    for number in range(MAX_VERSIONS + 3):
        assert store.put("local", "screws", (ONE, TWO)[number % 2]).version == number + 1
    assert [version for version, _ in store.versions("local", "screws")] == list(range(MAX_VERSIONS + 3, 3, -1))
    assert store.get("local", "screws", 5).labels == ("good", "bad")
    assert len(images(store)) == 3, "each of the three photos once"
    with pytest.raises(MissingError, match=rf"no version 2; the newest is {MAX_VERSIONS + 3}"):
        store.get("local", "screws", 2)


def test_each_namespace_has_its_own_sets(store: Store) -> None:
    stored = store.put("a", "screws", ONE)
    store.put("b", "screws", TWO)
    assert len(images(store)) == 3
    assert len(list(store.images.glob("*/*"))) == 4, "each namespace has its own copy, so that the time of a write reveals nothing about others"
    with pytest.raises(RunError):
        store.bytes_of("c", stored.examples[0].image)
    store.put("b", "nails", TWO)
    assert (store.names("a"), store.names("b")) == (["screws"], ["nails", "screws"])
    assert store.get("a", "screws").labels == ("good", "bad")
    store.remove("b", "screws")
    assert store.names("a") == ["screws"]
    with pytest.raises(MissingError, match="no support set 'nails'"):
        store.get("a", "nails")


def test_the_id_of_a_removed_set_is_not_used_again(store: Store) -> None:
    """Caches and calibrations use the id as their key."""
    ids = set()
    for _ in range(3):
        ids.add(store.put("local", "screws", ONE).id)
        store.remove("local", "screws")
    assert len(ids) == 3


def test_the_second_of_two_writers_gets_a_conflict(store: Store) -> None:
    """A writer gives the version that it read. A version's number is not used again after a removal."""
    store.put("local", "screws", ONE, expected=0)
    with pytest.raises(ConflictError, match="at version 1, not 0"):
        store.put("local", "screws", TWO, expected=0)
    store.put("local", "screws", TWO, expected=1)
    with pytest.raises(ConflictError, match="at version 2, not 1"):
        store.remove("local", "screws", expected=1)
    store.remove("local", "screws", expected=2)
    with pytest.raises(MissingError):
        store.get("local", "screws")
    with pytest.raises(MissingError):
        store.remove("local", "screws")
    assert store.put("local", "screws", ONE, expected=0).version == 3


def test_many_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    """Two stores of one folder, like two processes. Of the writers that expect the same version, one succeeds."""
    stores, won, failed = [Store(tmp_path), Store(tmp_path)], [], []

    def write(number: int) -> None:
        mine = stores[number % 2]
        mine.put("local", f"own-{number}", [("x", bytes([number])), ("y", b"y")])
        try:
            won.append(mine.put("local", "shared", ONE, expected=0).version)
        except ConflictError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores[0].names("local")) == 13
    assert (won, len(failed)) == ([1], 11)


def test_a_full_disk_stores_nothing_and_loses_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when an image is written, or when the database is."""
    store.put("local", "screws", ONE)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/secret/path")

    with monkeypatch.context() as patched:
        patched.setattr(store_module.os, "fsync", full)
        with pytest.raises(RunError, match="disk is full: nothing was stored") as caught:
            store.put("local", "nails", TWO)
    assert "/secret" not in str(caught.value)
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(RunError, match="disk is full"):
        store.put("local", "nails", [(f"{number} " + "long " * 30, bytes([number])) for number in range(200)])
    assert store.names("local") == ["screws"]
    assert store.get("local", "screws").labels == ("good", "bad")
    store._connection.execute(f"PRAGMA max_page_count = {pages + 1000}")
    assert store.put("local", "nails", TWO).version == 1
    assert not list(store.images.glob("tmp*"))


def test_a_sweep_removes_only_images_that_no_set_names(store: Store) -> None:
    store.put("local", "screws", ONE)
    store.put("local", "nails", TWO)
    store.remove("local", "nails")
    (store.images / "tmpabc").write_bytes(b"half")
    assert len(images(store)) == 3
    assert store.sweep() == 0, "new images stay, for their set may follow"
    for file in store.images.rglob("*"):
        os.utime(file, (1, 1))
    assert store.sweep() == 2
    assert images(store) == {example.image for example in store.get("local", "screws").examples}


def test_a_calibration_is_removed_with_its_version(store: Store) -> None:
    first = store.put("local", "screws", ONE)
    store.write_calibration(first.id, "model", {"temperature": 2.0})
    assert store.read_calibration(first.id, "model") == {"temperature": 2.0}
    assert store.read_calibration(first.id, "other") is None
    second = store.put("local", "screws", TWO)
    assert store.read_calibration(second.id, "model") is None
    store.remove("local", "screws")
    store.write_calibration(first.id, "model", {"temperature": 3.0})
    assert store.read_calibration(first.id, "model") is None


@pytest.mark.parametrize("obstacle", ["a file", "another database"])
def test_a_path_that_cannot_be_a_store_is_refused(tmp_path: Path, obstacle: str) -> None:
    path = tmp_path / "store"
    if obstacle == "a file":
        path.write_text("x")
    else:
        path.mkdir()
        (path / "support.sqlite").write_bytes(b"not a database at all, but long enough to be looked at" * 100)
    with pytest.raises(RunError, match="cannot be used as a store of support sets"):
        Store(path)


WRITER = """
import sys
from pathlib import Path
from lcl_adapter.serve.store import Store
store, number = Store(Path(sys.argv[1])), int(sys.argv[2])
while True:
    number += 1
    name = f"set-{number % 7}"
    put = store.put("local", name, [("good", f"good {number}".encode() * 50), ("bad", f"bad {number}".encode() * 50)])
    print(name, put.version, number, flush=True)
"""


def test_twenty_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """SIGKILL in the middle of writing.

    Every acknowledged set remains with its newest version and photos, and the file is sound.
    """
    acknowledged: dict[str, tuple[int, int]] = {}  # by name: the newest version, and the number in its photos
    last = 0
    for turn in range(20):
        writer = Forked(WRITER, tmp_path, last)
        while not writer.printed():
            assert writer.is_running(), writer.wait()
            time.sleep(0.001)
        time.sleep(0.01 * (turn % 5))
        writer.send_signal(signal.SIGKILL)
        exit_code, printed, _ = writer.wait()
        assert exit_code == -signal.SIGKILL
        for words in map(str.split, printed.splitlines()):
            if len(words) == 3:
                acknowledged[words[0]] = (int(words[1]), int(words[2]))
                last = int(words[2])
        store = Store(tmp_path)
        for name, (version, number) in acknowledged.items():
            newest = store.get("local", name)
            assert newest.version in {version, version + 1}, "the acknowledged version, or the one being written at the kill"
            stored = store.get("local", name, version)
            assert [store.bytes_of("local", e.image) for e in stored.examples] == [f"{label} {number}".encode() * 50 for label in ("good", "bad")]
        assert store._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert store._connection.execute("PRAGMA foreign_key_check").fetchall() == []
        store.close()
    assert len(acknowledged) == 7


def test_errors_of_the_store_contain_no_path(store: Store) -> None:
    (store.images).rename(store.folder / "gone")
    with pytest.raises(RunError) as caught:
        store.put("local", "screws", ONE)
    assert str(store.folder) not in str(caught.value)
    with pytest.raises(RunError) as caught:
        store.bytes_of("local", Example("x", "ab" * 32).image)
    assert str(store.folder) not in str(caught.value)
    store._connection.close()
    with pytest.raises(RunError) as caught:
        store.names("local")
    assert str(store.folder) not in str(caught.value)
    assert isinstance(caught.value.__cause__, sqlite3.Error)


# From a shell


def shell(store: Path, *words: str) -> Any:
    return CliRunner().invoke(main, ["support", *words, "--store", str(store), "--json"])


def output(result: Any) -> Any:
    """The JSON object that a successful command printed."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_an_exported_set_can_be_imported(photos: Path, tmp_path: Path) -> None:
    """Photos, labels, order and question stay the same, and `ask` can read the exported folder."""
    store = tmp_path / "store"
    added = output(shell(store, "add", "parts", str(photos), "--shots", "2", "--question", "Which is it?"))
    assert (added["version"], added["labels"]) == (1, {"dented": 2, "good": 2, "scratched": 2})
    assert [stored["name"] for stored in output(shell(store, "list"))["sets"]] == ["parts"]
    output(shell(store, "export", "parts", str(tmp_path / "out")))
    assert len(read_class_folders(tmp_path / "out")) == 3
    output(shell(store, "import", str(tmp_path / "out"), "--name", "again"))
    first, second = (output(shell(store, "show", name)) for name in ("parts", "again"))
    assert first["examples"] == second["examples"]
    assert first["question"] == second["question"] == "Which is it?"
    assert output(shell(store, "import", str(tmp_path / "out")))["version"] == 2, "without --name it has its own name, so this is a new version"
    assert output(shell(store, "show", "parts"))["versions"] == [2, 1]
    output(shell(store, "remove", "parts"))
    assert [stored["name"] for stored in output(shell(store, "list"))["sets"]] == ["again"]
    assert output(shell(store, "list", "--namespace", "other"))["sets"] == []


def test_labels_that_cannot_be_folder_names_survive_an_export(tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    labels = ["a/b", "..", "CON: x?", "傷あり", "good."]
    opened = Store(store)
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    opened.put("local", "unusual", [(label, data.getvalue()) for label in labels])
    opened.close()
    output(shell(store, "export", "unusual", str(out)))
    assert {path.parent for path in out.rglob("*.png")} == {path for path in out.iterdir() if path.is_dir()}
    assert [example["label"] for example in output(shell(store, "show", "unusual"))["examples"]] == labels
    output(shell(store, "import", str(out), "--name", "back"))
    assert [example["label"] for example in output(shell(store, "show", "back"))["examples"]] == labels


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda photos: (photos / "good" / "1.png").write_bytes(b"<html>"), "good/1.png"),
        (lambda photos: [shutil.rmtree(photos / name) for name in ("good", "dented")], "at least two labels"),
        (lambda photos: (photos / "dented").rename(photos / "ＧＯＯＤ"), "differ only in case or width"),
        (lambda photos: shutil.rmtree(photos), "no such"),
    ],
    ids=["broken photo", "one class", "labels alike", "no folder"],
)
def test_photos_that_make_no_valid_set_are_refused(photos: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    spoil(photos)
    result = shell(tmp_path / "store", "add", "parts", str(photos))
    assert result.exit_code == 2
    assert message in result.output
    assert output(shell(tmp_path / "store", "list"))["sets"] == []


def test_mistakes_in_a_shell_are_reported(photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert "is not a valid name for a support set" in shell(store, "add", "a/b", str(photos)).output
    output(shell(store, "add", "parts", str(photos), "--expected-version", "0"))
    late = shell(store, "add", "parts", str(photos), "--expected-version", "0")
    assert (late.exit_code, "at version 1, not 0" in late.output) == (2, True)
    assert "no support set 'part'" in shell(store, "show", "part").output
    (tmp_path / "existing").mkdir()
    assert "exists already" in shell(store, "export", "parts", str(tmp_path / "existing")).output
    output(shell(store, "export", "parts", str(tmp_path / "out")))
    (tmp_path / "secret.png").write_bytes(b"x")
    index = tmp_path / "out" / "support-set.json"
    text = index.read_text()
    for file in ("../secret.png", "/etc/passwd", "good/none.png"):
        broken = json.loads(text)
        broken["examples"][0]["file"] = file
        index.write_text(json.dumps(broken))
        assert "is not a photo in this folder" in shell(store, "import", str(tmp_path / "out")).output
    index.write_text("{")
    assert "not a file that `support export` wrote" in shell(store, "import", str(tmp_path / "out")).output
