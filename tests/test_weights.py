"""Weights on disk: read exactly or refused with the reason; written so that every reader gets the same tensors."""

from __future__ import annotations

import datetime
import json
import math
import os
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lcl_adapter.base.layouts import tensors as weights
from lcl_adapter.base.layouts.tensors import INDEX, SINGLE, TYPES, PlannedTensor, Shards, row_blocks, tensors_in_file, tensors_in_folder
from lcl_adapter.errors import ModelError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).half()}


def two_shards(folder: Path, **placed: str) -> Path:
    """``a`` and ``b`` in a file each, and their index. ``placed`` replaces entries of the index."""
    for name, value in TENSORS.items():
        save_file({name: value}, folder / f"{name}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors", **placed}}))
    return folder


def file_of(folder: Path, header: bytes, data: bytes = b"") -> Path:
    """A file with a safetensors header of any kind."""
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + data)
    return folder / SINGLE


def raw(value: torch.Tensor) -> bytes:
    """Bits, so that NaN equals itself."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def planned(tensors: dict[str, torch.Tensor]) -> list[PlannedTensor]:
    return [PlannedTensor(key, value.dtype, tuple(value.shape), lambda v=value: row_blocks(v)) for key, value in tensors.items()]  # type: ignore[misc]


def test_shards_of_an_index_are_all_read(tmp_path: Path) -> None:
    """Every tensor of every file."""
    tensors = tensors_in_folder(two_shards(tmp_path))
    assert {key: tensor.file.name for key, tensor in tensors.items()} == {"a": "a.safetensors", "b": "b.safetensors"}
    assert all(torch.equal(tensors[key].read(), value) and tensors[key].dtype == value.dtype for key, value in TENSORS.items())


def test_the_blocks_of_a_tensor_make_up_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are whole rows of about BLOCK values, for any shape, when written and when read."""
    monkeypatch.setattr(weights, "BLOCK", 10)
    state = {"tall": torch.randn(7, 4), "wide": torch.randn(3, 25).bfloat16(), "flat": torch.randn(23), "one": torch.tensor(3.0)}
    state["none"] = torch.empty(0, 4)
    list(Shards(planned(state), 80).write(tmp_path))
    tensors = tensors_in_folder(tmp_path)
    for key, value in state.items():
        assert raw(tensors[key].read()) == raw(value)
        for blocks in (list(tensors[key].blocks()), list(row_blocks(value))):
            assert raw(torch.cat([block.reshape(-1, *value.shape[1:]) for block in blocks]) if blocks else torch.empty(0)) == raw(value)
            assert [block.numel() for block in blocks] == {"tall": [8, 8, 8, 4], "wide": [25] * 3, "flat": [10, 10, 3], "one": [1], "none": []}[key]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "b.safetensors").unlink(), r"1 of 2 shards are missing, for instance b\.safetensors"),
        (lambda f: two_shards(f, c="a.safetensors"), "c is in the index and in no shard"),
        (lambda f: save_file({**TENSORS, "extra": torch.ones(1)}, f / "b.safetensors"), "extra is in a shard and not in the index"),
        (lambda f: save_file(TENSORS, f / "b.safetensors"), r"a is in both a\.safetensors and b\.safetensors"),
        (lambda f: (f / INDEX).write_text("{"), "not an index of weights"),
        (lambda f: (f / INDEX).write_text("{}"), "not an index of weights"),
        (lambda f: (f / INDEX).write_text('{"weight_map": ["a.safetensors"]}'), "not an index of weights"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'), "not an index of weights"),
    ],
    ids=["missing", "key-in-no-shard", "key-not-in-index", "key-in-two", "no-json", "no-map", "list-for-map", "number-for-name"],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, spoil: Any, message: str) -> None:
    """The message names the folder and the wrong shard or key."""
    tensors_in_folder(two_shards(tmp_path))
    spoil(tmp_path)
    with pytest.raises(ModelError, match=message):
        tensors_in_folder(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x.safetensors", "sub/../../x.safetensors", ".."])
def test_an_index_never_leads_out_of_its_folder(tmp_path: Path, name: str) -> None:
    """Even where the named file exists and could be read."""
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "base").mkdir()
    two_shards(tmp_path / "base", a=name)
    with pytest.raises(ModelError, match=r"which is outside its folder\. It is not read"):
        tensors_in_folder(tmp_path / "base")


def test_a_key_in_two_files_without_an_index_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "old.safetensors")
    with pytest.raises(ModelError, match=r"a is in both model\.safetensors and old\.safetensors; the folder mixes two checkpoints"):
        tensors_in_folder(tmp_path)


def test_an_empty_folder_has_no_weights(tmp_path: Path) -> None:
    """The files of an adapter or a projector do not count."""
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    torch.save(TENSORS, tmp_path / "mm_projector.bin")
    with pytest.raises(ModelError, match="no weights in it"):
        tensors_in_folder(tmp_path)


@pytest.mark.parametrize("left", [0, 4, 40, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, left: int) -> None:
    """Wherever it was cut: in the length, the header or the data. It is refused before any tensor is read."""
    save_file(TENSORS, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:left])
    with pytest.raises(ModelError, match=r"model\.safetensors: .*cut short or damaged, copy it again"):
        tensors_in_folder(tmp_path)


def test_a_file_cut_short_after_it_was_opened_is_noticed_when_read(tmp_path: Path) -> None:
    """The process does not end in a bus error, and no tensor is filled up with zeros."""
    save_file({"a": torch.ones(1000)}, tmp_path / SINGLE)
    tensors = tensors_in_folder(tmp_path)["a"]
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:-8])
    with pytest.raises(ModelError, match=r"model\.safetensors: .*cut short or damaged, copy it again"):
        tensors.read()


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xfe\x00garbage",
        b"{",
        b"[]",
        b"null",
        b"5",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 6]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-999, -995]}}',
        b'{"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_header_that_is_garbage_is_refused(tmp_path: Path, header: bytes) -> None:
    """Whatever it is: with the file's name, and as a ModelError."""
    file = file_of(tmp_path, header, b"\0" * 64)
    with pytest.raises(ModelError, match=r"model\.safetensors: "):
        tensors_in_file(file)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.text(max_size=4) | st.sampled_from(["F32", "F16"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4)
        | st.fixed_dictionaries({"dtype": st.just("F32"), "shape": st.lists(inner, max_size=2), "data_offsets": st.lists(inner, max_size=3)})
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=JSON)
def test_any_header_is_read_or_refused(tmp_path: Path, header: Any) -> None:
    """The tensors of an accepted header can be read."""
    file = file_of(tmp_path, json.dumps(header).encode(), b"\0" * 64)
    try:
        tensors = tensors_in_file(file)
    except ModelError:
        return
    for tensor in tensors.values():
        assert tuple(tensor.read().shape) == tensor.shape


def test_a_pickle_of_tensors_is_read(tmp_path: Path) -> None:
    """Views, other types and parameters too. Each tensor that is read is a copy."""
    wide = torch.randn(4, 6)
    state = OrderedDict(plain=wide, transposed=wide.T, half=wide.half(), brain=wide.bfloat16(), parameter=torch.nn.Parameter(wide + 1))
    torch.save(state, tmp_path / "pytorch_model.bin")
    tensors = tensors_in_folder(tmp_path)
    assert tensors.keys() == state.keys()
    for key, value in state.items():
        read = tensors[key].read()
        assert (tensors[key].dtype, tensors[key].shape) == (value.dtype, tuple(value.shape))
        assert torch.equal(read, value)
        read.detach().fill_(0)
        assert torch.equal(tensors[key].read(), value), "a tensor that was read is a copy"


def test_a_tensor_has_the_same_fingerprint_in_a_pickle_and_in_safetensors(tmp_path: Path) -> None:
    """Parameters and views too: the fingerprint is of the values, not of their storage."""
    state = {"plain": torch.randn(60, 60), "transposed": torch.randn(70, 50).T, "scalar": torch.tensor(2.0), "none": torch.empty(0, 3)}
    torch.save({k: torch.nn.Parameter(v) for k, v in state.items()}, tmp_path / "pytorch_model.bin")
    pickled = {key: tensor.fingerprint() for key, tensor in tensors_in_folder(tmp_path).items()}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / SINGLE)
    assert {key: tensor.fingerprint() for key, tensor in tensors_in_folder(tmp_path).items()} == pickled


class Command:
    """The content of a hostile pickle."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (lambda marker: OrderedDict(a=torch.ones(2), b=Command(marker)), r"it holds (posix|os|nt)\.system, which is no tensor"),
        (lambda marker: {"a": torch.ones(2), "when": datetime.datetime(2024, 1, 1)}, r"it holds datetime\.datetime, which is no tensor"),
        (lambda marker: {"a": torch.ones(2), "b": "text"}, "b is no tensor"),
        (lambda marker: {"model": {"a": torch.ones(2)}}, "model is no tensor"),
        (lambda marker: [torch.ones(2)], "all of it is no tensor"),
        (lambda marker: torch.nn.Linear(2, 2), r"it holds torch\.nn\.modules\.linear\.Linear, which is no tensor"),
    ],
    ids=["command", "datetime", "text", "nested", "list", "module"],
)
def test_a_pickle_with_anything_but_tensors_is_refused_and_never_run(tmp_path: Path, thing: Any, message: str) -> None:
    """The message names the other content."""
    marker = tmp_path / "ran"
    torch.save(thing(marker), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=rf"pytorch_model\.bin: .*{message}"):
        tensors_in_folder(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 no archive"])
def test_a_file_that_is_no_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: refused"):
        tensors_in_folder(tmp_path)


def test_a_pickle_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    """The last pickle stays open, but only while it is the file on disk."""
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(3)}, file)
    assert torch.equal(tensors_in_folder(tmp_path)["a"].read(), torch.zeros(3))
    torch.save({"a": torch.ones(3)}, tmp_path / "new")
    os.replace(tmp_path / "new", file)
    assert torch.equal(tensors_in_folder(tmp_path)["a"].read(), torch.ones(3))


def test_files_are_split_at_the_limit(tmp_path: Path) -> None:
    """In order, none above the limit but a single larger tensor, with an index of all."""
    state = {name: torch.randn(size) for name, size in {"a": 10, "b": 10, "c": 50, "d": 1, "e": 19}.items()}
    shards = Shards(planned(state), 80)
    assert [key for key, _ in shards.write(tmp_path)] == list(state)
    files = {name: [p.key for p in planned] for name, planned in shards.files.items()}
    assert list(files.values()) == [["a", "b"], ["c"], ["d", "e"]]
    assert sorted(files) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == shards.size == 4 * 90
    assert index["weight_map"] == {key: name for name, keys in files.items() for key in keys}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*files, INDEX]), "no other file"


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_the_librarys_own_reader_gets_the_same_tensors(tmp_path: Path, kind: torch.dtype) -> None:
    state = {name: (torch.randn(shape) * 100).to(kind) for name, shape in {"w": (5, 7), "b": (3,), "s": (), "none": (0, 4)}.items()}
    list(Shards(planned(state), 40).write(tmp_path))
    tensors = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}, "transformers refuses a file without it"
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    assert tensors.keys() == state.keys()
    assert all(tensors[key].dtype == kind and torch.equal(tensors[key], value) for key, value in state.items())


def never() -> torch.Tensor:
    raise AssertionError("a complete shard was computed again")


def test_writing_is_resumed_where_it_stopped(tmp_path: Path) -> None:
    """A complete shard is neither computed nor written again; the interrupted one is."""
    state = {name: torch.randn(10) for name in "abcd"}

    def stop() -> torch.Tensor:
        raise KeyboardInterrupt

    cut = [*planned(state)[:3], PlannedTensor("d", torch.float32, (10,), stop)]
    with pytest.raises(KeyboardInterrupt):
        list(Shards(cut, 80).write(tmp_path, resume=True))
    first = tmp_path / "model-00001-of-00002.safetensors"
    assert [p.name for p in tmp_path.iterdir()] == [first.name], "no incomplete file, and no index yet"
    before = first.stat()
    resumed = [PlannedTensor(key, torch.float32, (10,), never) for key in "ab"] + planned(state)[2:]
    done = list(Shards(resumed, 80).write(tmp_path, resume=True))
    assert sum(size for _, size in done) == 160, "the first shard counts as done"
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert {key: raw(tensor.read()) for key, tensor in tensors_in_folder(tmp_path).items()} == {key: raw(value) for key, value in state.items()}


@pytest.mark.parametrize("on_disk", ["another shape", "another type", "another key", "cut short", "garbage"])
def test_a_shard_that_is_not_the_planned_one_is_written_again(tmp_path: Path, on_disk: str) -> None:
    """Only a file with exactly the planned tensors stays when writing is resumed."""
    file = tmp_path / SINGLE
    states = {"another shape": {"a": torch.zeros(3)}, "another type": {"a": torch.zeros(2).half()}, "another key": {"b": torch.zeros(2)}}
    save_file(states.get(on_disk, {"a": torch.zeros(2)}), file)
    if on_disk == "cut short":
        file.write_bytes(file.read_bytes()[:-3])
    if on_disk == "garbage":
        file.write_bytes(b"garbage that is no file at all")
    list(Shards(planned({"a": torch.ones(2)}), 80).write(tmp_path, resume=True))
    assert torch.equal(tensors_in_folder(tmp_path)["a"].read(), torch.ones(2))


def test_without_resume_everything_is_written_again(tmp_path: Path) -> None:
    list(Shards(planned({"a": torch.zeros(2)}), 80).write(tmp_path))
    list(Shards(planned({"a": torch.ones(2)}), 80).write(tmp_path))
    assert torch.equal(tensors_in_folder(tmp_path)["a"].read(), torch.ones(2))


@st.composite
def any_tensor(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any type, small shape and bits, contiguous or not."""
    kind = draw(st.sampled_from(list(TYPES.values())))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    if kind is torch.bool:
        made = torch.randint(0, 2, shape, generator=generator).bool()
    else:
        made = torch.randint(0, 256, (math.prod(shape) * kind.itemsize,), generator=generator, dtype=torch.uint8).view(kind).reshape(shape)
    return made.T if made.ndim == 2 and draw(st.booleans()) else made


@settings(max_examples=150, deadline=None)
@given(state=st.dictionaries(st.text(min_size=1, max_size=6), any_tensor(), max_size=6), limit=st.integers(1, 400))
def test_whatever_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, state: dict[str, torch.Tensor], limit: int) -> None:
    """Any tensors, split anywhere: bit for bit, by this reader and by the library's."""
    folder = tmp_path_factory.mktemp("any")
    shards = Shards(planned(state), limit)
    assert sum(size for _, size in shards.write(folder)) == shards.size
    assert all(len(part) == 1 or sum(p.size for p in part) <= limit for part in shards.files.values() if part)
    tensors = {key: tensor.read() for key, tensor in tensors_in_folder(folder).items()}
    library = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            library |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    for read in (tensors, library):
        assert read.keys() == state.keys()
        assert all((read[k].dtype, read[k].shape, raw(read[k])) == (v.dtype, v.shape, raw(v)) for k, v in state.items())
