"""Who asks. A key file has a line a key: a name, the key, and ``admin`` where it may load adapters.

    plant-a   3f9c…            # a namespace of its own: it sees the support sets that it stored, and no others
    ops       77ab…  admin

The name is the namespace, so that a key can be exchanged for a new one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lcl_adapter.errors import RunError

SHORTEST = 16


@dataclass(frozen=True)
class Caller:
    namespace: str
    admin: bool = False


LOCAL = Caller("local", admin=True)


class Keys:
    """Digests only; what was read is not kept."""

    def __init__(self, digests: Mapping[bytes, Caller]) -> None:
        self.digests = dict(digests)

    def find(self, key: str) -> Caller | None:
        """Every key is compared, each in constant time."""
        given, found = _digest(key), None
        for digest, caller in self.digests.items():
            if hmac.compare_digest(given, digest):
                found = caller
        return found


def read_keys(file: Path) -> Keys:
    """Raises RunError with file and line, never with the key."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{file}: the keys cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'}).") from error
    found: dict[bytes, Caller] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        if len(words) not in {2, 3} or (len(words) == 3 and words[2] != "admin"):
            raise RunError(f"{file}:{number}: a line is a name, a key, and perhaps `admin`.")
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", words[0]):
            raise RunError(f"{file}:{number}: a name has letters, digits, dots, dashes and underscores, 64 at most.")
        if len(words[1]) < SHORTEST:
            raise RunError(f"{file}:{number}: the key has {len(words[1])} characters, {SHORTEST} at least are needed.")
        digest = _digest(words[1])
        if digest in found:
            raise RunError(f"{file}:{number}: the same key as {found[digest].namespace!r} has; each needs its own.")
        found[digest] = Caller(words[0], len(words) == 3)
    if not found:
        raise RunError(f"{file}: no key in it. A line is a name and a key, for instance one from `openssl rand -hex 24`.")
    return Keys(found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
