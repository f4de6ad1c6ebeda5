"""Weights on disk: safetensors files and pickles are read in blocks of rows; safetensors files are written so too.

A whole file is never in memory. Reading uses ``safetensors.safe_open``, which maps the file. The file is opened again
for every read: the pages of one read are then released before the next, and a file that was cut short is refused by its
header instead of ending the process. Writing is done here, because the library's writer needs all tensors at once. The
format is eight bytes of header length, a JSON header, and raw bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from lcl_adapter import reading
from lcl_adapter.errors import ModelError
from lcl_adapter.files import whole_file, write_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TYPES.items()}
# Values processed at a time; small enough that the allocator reuses the memory instead of mapping new pages
BLOCK = 1 << 21
EDGE = 1024  # values at each end of a tensor that its fingerprint is made of


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: its file, its key there, its type and shape.

    position: its place among the file's tensors, by offset; 0 in a pickle.
    """

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    position: int = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return _size(self.dtype, self.shape)

    def read(self) -> torch.Tensor:
        """The whole tensor, a copy in memory."""
        return self.flat(0, math.prod(self.shape)).reshape(self.shape)

    def blocks(self) -> Iterator[torch.Tensor]:
        """The tensor as consecutive blocks of rows, about ``BLOCK`` values each."""
        if not self.shape:
            yield self.read()
            return
        row_size = math.prod(self.shape[1:])
        for first, last in _row_ranges(self.shape):
            yield self.flat(first * row_size, last * row_size).reshape(-1, *self.shape[1:])

    def flat(self, first: int, last: int) -> torch.Tensor:
        """Values ``first`` to ``last`` (exclusive) of the flattened tensor, a copy in memory.

        Raises ModelError where the file was cut short since it was listed.
        """
        if self.file.suffix != ".safetensors":
            return _pickled_tensors(self.file)[self.key].contiguous().flatten()[first:last].clone()
        with _open_safetensors(self.file) as opened:
            if not self.shape or first == last:
                return opened.get_tensor(self.key).flatten()[first:last].clone()
            row_size = math.prod(self.shape[1:])
            first_row, last_row = first // row_size, -(-last // row_size)
            rows = opened.get_slice(self.key)[first_row:last_row].flatten()
            return rows[first - first_row * row_size : last - first_row * row_size].clone()

    def fingerprint(self, rows: int | None = None) -> bytes:
        """Identifies a tensor by its shape and the values at both ends, rounded to fp16: equal for any stored type.

        rows: reads the first rows only.
        """
        shape = self.shape if rows is None else (rows, *self.shape[1:])
        count = math.prod(shape)
        ends = [self.flat(0, min(EDGE, count)), self.flat(max(0, count - EDGE), count)]
        return str(list(shape)).encode() + b"".join(values.to(torch.float16).numpy().tobytes() for values in ends)


def _size(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return dtype.itemsize * math.prod(shape)


def row_blocks(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor as consecutive blocks of rows, cut as :meth:`StoredTensor.blocks` cuts it. The blocks are views."""
    return (value[first:last] if value.ndim else value for first, last in _row_ranges(value.shape))


def _row_ranges(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first row, last row exclusive) of each block."""
    rows = shape[0] if shape else 1
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def tensors_in_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder, by its key on disk.

    Raises ModelError: no weights; an index that names a missing file or one outside the folder; a file that was cut
    short; a key in two files, or in none; a pickle that holds anything but tensors.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        for key, tensor in tensors_in_file(file).items():
            if key in tensors:
                both = f"{tensors[key].file.name} and {file.name}"
                raise ModelError(f"{folder}: {key} is in both {both}; the folder mixes two checkpoints. Give each a folder of its own.")
            tensors[key] = tensor
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder: those that its index names, else every file of weights in it."""
    for index in (folder / INDEX, folder / "pytorch_model.bin.index.json"):
        if index.exists():
            return _indexed_files(folder, index)
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        files = sorted(p for p in folder.glob(pattern) if not p.name.startswith(("adapter_model", "mm_projector")))
        if files:
            return files
    raise ModelError(f"{folder}: no weights in it (*.safetensors or pytorch_model*.bin).")


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    try:
        file_of_key: dict[str, str] = reading.read_json(index)["weight_map"]
        if not isinstance(file_of_key, dict) or not all(isinstance(name, str) for name in file_of_key.values()):
            raise TypeError("weight_map must name a file for every weight")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index}: not an index of weights ({error}).") from error
    names = sorted(set(file_of_key.values()))
    for name in names:
        if Path(name).name != name or name in {"", ".", ".."}:
            raise ModelError(f"{index}: names {name!r}, which is outside its folder. It is not read.")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ModelError(f"{folder}: {len(missing)} of {len(names)} shards are missing, for instance {missing[0]}; copy them.")
    files = [folder / name for name in names]
    stored, indexed = {key for file in files for key in tensors_in_file(file)}, file_of_key.keys()
    for fault, keys in (("in the index and in no shard", indexed - stored), ("in a shard and not in the index", stored - indexed)):
        if keys:
            raise ModelError(f"{folder}: {sorted(keys)[0]} is {fault}; the index belongs to another checkpoint.")
    return files


@contextmanager
def _open_safetensors(file: Path) -> Iterator[Any]:
    """The library's reader of a file. Raises ModelError where its header or its length is wrong; FileNotFoundError."""
    if kind := reading.irregular(file):
        raise ModelError(f"{file}: {kind}, a file of weights is expected.")
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ModelError(f"{file}: not a complete safetensors file ({error}); it was cut short or damaged, copy it again.") from error


def tensors_in_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by key, in the order of their offsets. Raises ModelError as :func:`tensors_in_folder`."""
    if file.suffix != ".safetensors":
        return {key: StoredTensor(file, key, value.dtype, tuple(value.shape)) for key, value in _pickled_tensors(file).items()}
    tensors: dict[str, StoredTensor] = {}
    with _open_safetensors(file) as opened:
        for position, key in enumerate(opened.offset_keys()):
            header = opened.get_slice(key)
            if header.get_dtype() not in TYPES:
                raise ModelError(f"{file}: {key} has type {header.get_dtype()}, which cannot be read; there are {', '.join(TYPES)}.")
            tensors[key] = StoredTensor(file, key, TYPES[header.get_dtype()], tuple(header.get_shape()), position)
    return tensors


# The last one that was read, with its version on disk
_OPEN_PICKLE: dict[Path, tuple[tuple[int, ...], dict[str, torch.Tensor]]] = {}


def _pickled_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, mapped and not read.

    The last file stays open. Raises ModelError where it holds anything else.
    """
    if kind := reading.irregular(file):
        raise ModelError(f"{file}: {kind}, a file of weights is expected.")
    status = file.stat()
    # A clock ticks too slowly to tell two files apart by time alone
    version = (status.st_ino, status.st_size, status.st_mtime_ns)
    if _OPEN_PICKLE.get(file, (None,))[0] != version:
        _OPEN_PICKLE.clear()
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # unpickling raises whatever the file makes it raise
            match = re.search(r"(?:GLOBAL|Unsupported global:) (?:GLOBAL )?([\w.]+)", str(error))
            reason = f"it holds {match[1]}, which is no tensor" if match else str(error).splitlines()[0]
            raise ModelError(f"{file}: refused, {reason}. A checkpoint holds tensors only; nothing else of a pickle is ever run.") from error
        others = [k for k, v in state.items() if not isinstance(v, torch.Tensor)] if isinstance(state, dict) else ["all of it"]
        if others:
            raise ModelError(f"{file}: {others[0]} is no tensor. A checkpoint holds tensors only.")
        _OPEN_PICKLE[file] = (version, {k: v.detach() for k, v in state.items()})
    return _OPEN_PICKLE[file][1]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written. ``make`` computes its blocks of rows when it is written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Iterable[torch.Tensor]]

    @property
    def size(self) -> int:
        """Bytes."""
        return _size(self.dtype, self.shape)


@dataclass(frozen=True)
class Shards:
    """Tensors split into files of at most ``limit`` bytes, in order. A larger tensor gets a file of its own."""

    planned: Sequence[PlannedTensor]
    limit: int

    @cached_property
    def files(self) -> dict[str, list[PlannedTensor]]:
        """File name -> its tensors."""
        groups: list[list[PlannedTensor]] = [[]]
        for tensor in self.planned:
            if groups[-1] and sum(t.size for t in groups[-1]) + tensor.size > self.limit:
                groups.append([])
            groups[-1].append(tensor)
        if len(groups) == 1:
            return {SINGLE: groups[0]}
        return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.planned)

    def write(self, folder: Path, resume: bool = False) -> Iterator[tuple[str, int]]:
        """Write file after file, then the index. Yields each tensor's key and bytes when it is written.

        resume: a file that already holds exactly the planned tensors stays as it is. Each file is written completely or
        not at all. Raises RunError where the disk is full.
        """
        for name, tensors in self.files.items():
            if resume and _holds(folder / name, tensors):
                yield name, sum(tensor.size for tensor in tensors)
                continue
            with whole_file(folder / name) as partial, partial.open("wb") as opened:
                yield from ((tensor.key, tensor.size) for tensor in _write(opened, tensors))
        if len(self.files) > 1:
            file_of_key = {tensor.key: name for name, tensors in self.files.items() for tensor in tensors}
            write_json(folder / INDEX, {"metadata": {"total_size": self.size}, "weight_map": dict(sorted(file_of_key.items()))})


def _holds(file: Path, planned: Sequence[PlannedTensor]) -> bool:
    """Whether a file holds exactly these tensors, by key, type and shape."""
    try:
        stored = tensors_in_file(file)
    except (OSError, ModelError):  # missing, or incomplete because the writing was stopped
        return False
    return {k: (s.dtype, s.shape) for k, s in stored.items()} == {p.key: (p.dtype, tuple(p.shape)) for p in planned}


def _write(opened: BinaryIO, planned: Sequence[PlannedTensor]) -> Iterator[PlannedTensor]:
    """Write one file; yields each tensor when it is written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in planned:
        header[tensor.key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.size]}
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    opened.write(struct.pack("<Q", len(text)) + text)
    for tensor in planned:
        rows = 0
        for block in tensor.make():
            if block.shape[1:] != tensor.shape[1:]:
                raise AssertionError(f"{tensor.key}: made rows of {tuple(block.shape[1:])}, planned {tuple(tensor.shape)}")
            rows += block.shape[0] if block.ndim else 1
            if block.numel():
                opened.write(block.to(tensor.dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if rows != (tensor.shape[0] if tensor.shape else 1):
            raise AssertionError(f"{tensor.key}: made {rows} rows, planned {tuple(tensor.shape)}")
        yield tensor


def combined_hash(fingerprints: Mapping[str, bytes]) -> str:
    """One sha256 over named fingerprints, independent of their order."""
    combined = hashlib.sha256()
    for name in sorted(fingerprints):
        combined.update(name.encode() + b"\0" + hashlib.sha256(fingerprints[name]).digest())
    return combined.hexdigest()
