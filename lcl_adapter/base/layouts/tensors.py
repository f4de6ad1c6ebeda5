"""Weights on disk, one tensor at a time: sharded safetensors and pickles read, safetensors written shard by shard.

Whole shards are never in memory: some rows of a tensor are read, changed, written, dropped. The format is safetensors' own (eight
bytes of length, a JSON header, raw bytes), whose library maps or holds a whole file at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lcl_adapter.errors import ModelError
from lcl_adapter.files import whole_file, write_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {kind: name for name, kind in TYPES.items()}
BLOCK = 1 << 21  # values worked on at a time: pieces so small that the allocator keeps them, as pages of the system's cost more than the sums
EDGE = 1024  # values at each end of a tensor that its mark is made of


@dataclass(frozen=True)
class Stored:
    """Where a tensor is: a file, the key in it, its type and shape; for safetensors its first byte in the file."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int = -1

    @property
    def size(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        return self.part(0, math.prod(self.shape)).reshape(self.shape)

    def blocks(self) -> Iterator[torch.Tensor]:
        """The tensor as consecutive rows, a BLOCK of values at a time."""
        for first, last in _cuts(self.shape):
            row = math.prod(self.shape[1:])
            yield self.part(first * row, last * row).reshape(-1, *self.shape[1:]) if self.shape else self.read()

    def part(self, first: int, last: int) -> torch.Tensor:
        """Values of the flattened tensor, in memory of their own."""
        if self.begin < 0:
            return _pickled(self.file)[self.key].contiguous().flatten()[first:last].clone()
        value = torch.empty(last - first, dtype=self.dtype)
        space, done = value.view(torch.uint8).numpy().data, 0
        with self.file.open("rb", buffering=0) as opened:
            opened.seek(self.begin + first * self.dtype.itemsize)
            while done < len(space) and (count := opened.readinto(space[done:])):  # one call reads 2 GiB at most
                done += count
        if done < len(space):
            raise ModelError(f"{self.file}: ends in the middle of {self.key}; the file was cut short, copy it again.")
        return value

    def fingerprint(self, rows: int | None = None) -> bytes:
        """Shape and the values at both ends, rounded to fp16: enough to tell one checkpoint's tensor from another's, whatever type it is kept in.

        rows: of the first rows alone.
        """
        shape = self.shape if rows is None else (rows, *self.shape[1:])
        count = math.prod(shape)
        ends = [self.part(0, min(EDGE, count)), self.part(max(0, count - EDGE), count)]
        return str(list(shape)).encode() + b"".join(values.to(torch.float16).numpy().tobytes() for values in ends)


def blocks_of(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor as consecutive rows, as :meth:`Stored.blocks` cuts it; they share its memory."""
    return (value[first:last] if value.ndim else value for first, last in _cuts(value.shape))


def _cuts(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    rows = shape[0] if shape else 1
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def stored_in(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by its key on disk.

    Raises ModelError: no weights, an index that names a file which is missing or outside the folder, a file cut short, a
    key in two files or in none, a pickle with anything but tensors in it.
    """
    files = _files(folder)
    found: dict[str, Stored] = {}
    for file in files:
        for key, one in stored_in_file(file).items():
            if key in found:
                raise ModelError(f"{folder}: {key} is in both {found[key].file.name} and {file.name}; two checkpoints lie mixed in one folder.")
            found[key] = one
    return found


def _files(folder: Path) -> list[Path]:
    for index in (folder / INDEX, folder / "pytorch_model.bin.index.json"):
        if index.exists():
            try:
                placed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
                    raise TypeError("weight_map is to name a file for every weight")
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{index}: not an index of weights ({error}).") from error
            for name in set(placed.values()):
                if Path(name).name != name or name in {"", ".", ".."}:
                    raise ModelError(f"{index}: names {name!r}, which is outside its folder. Not read.")
            missing = sorted(name for name in set(placed.values()) if not (folder / name).exists())
            if missing:
                raise ModelError(f"{folder}: {len(missing)} of {len(set(placed.values()))} shards are missing, for instance {missing[0]}; copy them.")
            files = sorted({folder / name for name in placed.values()})
            there = {key for file in files for key in stored_in_file(file)}
            for fault, keys in (("in the index and in no shard", placed.keys() - there), ("in a shard and not in the index", there - placed.keys())):
                if keys:
                    raise ModelError(f"{folder}: {sorted(keys)[0]} is {fault}; the index is another checkpoint's.")
            return files
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        files = sorted(p for p in folder.glob(pattern) if not p.name.startswith(("adapter_model", "mm_projector")))
        if files:
            return files
    raise ModelError(f"{folder}: no weights in it (*.safetensors or pytorch_model*.bin).")


def stored_in_file(file: Path) -> dict[str, Stored]:
    """The tensors of one file, by key. Raises ModelError as :func:`stored_in`."""
    if file.suffix != ".safetensors":
        return {key: Stored(file, key, value.dtype, tuple(value.shape)) for key, value in _pickled(file).items()}
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = struct.unpack("<Q", opened.read(8))[0]
            if length > min(size, 1 << 28):
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        found, ends = {}, {}
        for key, one in header.items():
            shape, (begin, end) = one["shape"], one["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
                raise ValueError(f"{key} has shape {shape} at {begin} to {end}")
            found[key] = Stored(file, key, TYPES[one["dtype"]], tuple(shape), 8 + length + begin)
            ends[key] = 8 + length + end
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ModelError(f"{file}: not a safetensors file that can be read ({error}); copy it again.") from error
    for key, one in found.items():
        if ends[key] > size or one.begin + one.size != ends[key]:
            raise ModelError(f"{file}: {key} should end at byte {ends[key]:,}, the file has {size:,}; it was cut short, copy it again.")
    return found


_OPEN: dict[Path, tuple[float, dict[str, torch.Tensor]]] = {}


def _pickled(file: Path) -> dict[str, torch.Tensor]:
    """A pickle's tensors, mapped and not read; the last one asked for is kept open. Raises ModelError where anything else is in it."""
    stamp = file.stat().st_mtime
    if _OPEN.get(file, (None,))[0] != stamp:
        _OPEN.clear()
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # unpickling raises whatever the file makes it raise
            what = re.search(r"(?:GLOBAL|Unsupported global:) (?:GLOBAL )?([\w.]+)", str(error))
            named = f"it holds {what[1]}, which is no tensor" if what else str(error).splitlines()[0]
            raise ModelError(f"{file}: refused, {named}. A checkpoint is tensors alone; nothing else of a pickle is ever run.") from error
        odd = [k for k, v in state.items() if not isinstance(v, torch.Tensor)] if isinstance(state, dict) else ["all of it"]
        if odd:
            raise ModelError(f"{file}: {odd[0]} is no tensor. A checkpoint is tensors alone.")
        _OPEN[file] = (stamp, {k: v.detach() for k, v in state.items()})
    return _OPEN[file][1]


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its key, its type and shape, and what makes its rows, block by block, when its turn comes."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Iterable[torch.Tensor]]

    @property
    def size(self) -> int:
        return Stored(Path(), self.key, self.dtype, self.shape).size


@dataclass(frozen=True)
class Shards:
    """Tensors cut into files of at most ``limit`` bytes, in their order; a larger tensor has a file of its own."""

    planned: Sequence[Planned]
    limit: int

    @cached_property
    def files(self) -> dict[str, list[Planned]]:
        cut: list[list[Planned]] = [[]]
        for one in self.planned:
            if cut[-1] and sum(p.size for p in cut[-1]) + one.size > self.limit:
                cut.append([])
            cut[-1].append(one)
        if len(cut) == 1:
            return {SINGLE: cut[0]}
        return {f"model-{n:05d}-of-{len(cut):05d}.safetensors": part for n, part in enumerate(cut, 1)}

    @property
    def size(self) -> int:
        return sum(one.size for one in self.planned)

    def write(self, folder: Path, resume: bool = False) -> Iterator[tuple[str, int]]:
        """Writes file after file, then the index; yields each tensor's key and bytes as it is done.

        resume: files that are there with exactly the planned tensors are kept; each is written whole or not at all.
        Raises RunError where the disk is full.
        """
        for name, part in self.files.items():
            if not (resume and _is(folder / name, part)):
                with whole_file(folder / name) as partial, partial.open("wb") as opened:
                    yield from ((one.key, one.size) for one in _write(opened, part))
            else:
                yield name, sum(one.size for one in part)
        if len(self.files) > 1:
            placed = {one.key: name for name, part in self.files.items() for one in part}
            write_json(folder / INDEX, {"metadata": {"total_size": self.size}, "weight_map": dict(sorted(placed.items()))})


def _is(file: Path, part: Sequence[Planned]) -> bool:
    try:
        found = stored_in_file(file)
    except (OSError, ModelError):  # not there, or what a stop left of it
        return False
    return {k: (s.dtype, s.shape) for k, s in found.items()} == {p.key: (p.dtype, tuple(p.shape)) for p in part}


def _write(opened: BinaryIO, part: Sequence[Planned]) -> Iterator[Planned]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for one in part:
        header[one.key] = {"dtype": NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [offset, offset + one.size]}
        offset += one.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    opened.write(struct.pack("<Q", len(text)) + text)
    for one in part:
        rows = 0
        for block in one.make():
            if block.shape[1:] != one.shape[1:]:
                raise AssertionError(f"{one.key}: made rows of {tuple(block.shape[1:])}, planned {tuple(one.shape)}")
            rows += block.shape[0] if block.ndim else 1
            if block.numel():
                opened.write(block.to(one.dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if rows != (one.shape[0] if one.shape else 1):
            raise AssertionError(f"{one.key}: made {rows} rows, planned {tuple(one.shape)}")
        yield one


def digest(fingerprints: Mapping[str, bytes]) -> str:
    """One sha256 over named fingerprints, whatever their order."""
    found = hashlib.sha256()
    for name in sorted(fingerprints):
        found.update(name.encode() + b"\0" + hashlib.sha256(fingerprints[name]).digest())
    return found.hexdigest()
