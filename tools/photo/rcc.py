"""Read a Qt resource file (``.rcc``): a tree of names, and the bytes of each file.

    qres  version  tree  data  names  [flags]        six big-endian numbers of 32 bits, flags from version 3 on
    tree  14 bytes a node (22 from version 2 on): name, flags, then children and first child, or locale and data
    names length, hash, UTF-16
    data  length, bytes; compressed ones begin with their unpacked length

Source: qtbase, src/corelib/io/qresource.cpp and src/tools/rcc/rcc.cpp.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from lcl_adapter.errors import DataError

COMPRESSED, FOLDER, ZSTANDARD = 1, 2, 4  # flags of a node
LARGEST = 64 * 2**20  # bytes of one unpacked file


def files(data: bytes, where: str) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of every file. Paths have no leading slash.

    where: names the file in errors.

    Raises DataError: another kind of file, an offset or a size beyond its end, a folder that contains itself, a name
    that leads out, a compression that the standard library cannot read.
    """

    def broken(what: str) -> DataError:
        return DataError(f"{where}: {what}. This is not a Qt resource file of the pinned package.")

    def at(offset: int, size: int) -> bytes:
        if offset < 0 or offset + size > len(data):
            raise broken(f"bytes {offset} to {offset + size} are beyond its end at {len(data)}")
        return data[offset : offset + size]

    def name(offset: int) -> str:
        (length,) = struct.unpack(">H", at(names + offset, 2))
        text = at(names + offset + 6, 2 * length).decode("utf-16-be", "replace")
        if text in {"", ".", ".."} or "/" in text or "\\" in text or "\0" in text:
            raise broken(f"the name {text!r} leads out of its folder")
        return text

    def content(offset: int, flags: int) -> bytes:
        (length,) = struct.unpack(">I", at(content_start + offset, 4))
        stored = at(content_start + offset + 4, length)
        if flags & ZSTANDARD:
            raise broken("a file in it is compressed with Zstandard, which this reader cannot read")
        if not flags & COMPRESSED:
            return stored
        unpacker = zlib.decompressobj()
        try:
            unpacked = unpacker.decompress(stored[4:], LARGEST)
        except zlib.error as error:
            raise broken(f"a compressed file in it is broken ({error})") from error
        if stored[:4] != struct.pack(">I", len(unpacked)) or not unpacker.eof:
            raise broken("a compressed file in it has another length than it declares")
        return unpacked

    if data[:4] != b"qres":
        raise broken("it does not begin with 'qres'")
    version, tree, content_start, names = struct.unpack(">4I", at(4, 16))
    if version not in {1, 2, 3}:
        raise broken(f"version {version} is unknown")
    node_size = 14 if version == 1 else 22
    visited: set[int] = set()

    def walk(node: int, path: str) -> Iterator[tuple[str, bytes]]:
        if node in visited:
            raise broken("a folder in it contains itself")
        visited.add(node)
        name_offset, flags, first, second = struct.unpack(">IHII", at(tree + node * node_size, 14))
        full = path if node == 0 else f"{path}/{name(name_offset)}"
        if flags & FOLDER:
            for child in range(second, second + first):
                yield from walk(child, full)
        else:  # `first` is its country and language
            yield full.lstrip("/"), content(second, flags)

    try:
        yield from walk(0, "")
    except RecursionError as error:
        raise broken("its folders are nested too deeply") from error
