"""API keys. A key file has one key per line: a name, the key, and ``admin`` if it may load adapters and read metrics.

    plant-a   3f9c…            # a namespace: this key sees the support sets stored under plant-a, and no others
    ops       77ab…  admin

The name is the namespace, so a key can be replaced without losing its sets.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lcl_adapter import reading
from lcl_adapter.errors import RunError

MIN_KEY_LENGTH = 16


@dataclass(frozen=True)
class Caller:
    """Who sends a request."""

    namespace: str
    admin: bool = False


LOCAL = Caller("local", admin=True)  # the one caller of a server without keys


class Keys:
    """Callers by the SHA-256 digests of their keys. The keys themselves are not stored."""

    def __init__(self, digests: Mapping[bytes, Caller]) -> None:
        self.digests = dict(digests)

    def find(self, key: str) -> Caller | None:
        """The key's caller. Compares with every digest in constant time, so that the response time reveals nothing."""
        digest, match = _digest(key), None
        for known, caller in self.digests.items():
            if hmac.compare_digest(digest, known):
                match = caller
        return match


def read_keys(file: Path) -> Keys:
    """Raises RunError with file and line, never with the key."""
    try:
        lines = reading.read_text(file, reading.MAX_RECIPE).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{file}: the keys cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'}).") from error
    callers: dict[bytes, Caller] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        if len(words) not in {2, 3} or (len(words) == 3 and words[2] != "admin"):
            raise RunError(f"{file}:{number}: a line has a name, a key, and optionally `admin`.")
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", words[0]):
            raise RunError(f"{file}:{number}: a name has letters, digits, dots, dashes and underscores, at most 64.")
        if len(words[1]) < MIN_KEY_LENGTH:
            raise RunError(f"{file}:{number}: the key has {len(words[1])} characters; at least {MIN_KEY_LENGTH} are needed.")
        digest = _digest(words[1])
        if digest in callers:
            raise RunError(f"{file}:{number}: the same key as {callers[digest].namespace!r}; each name needs its own.")
        callers[digest] = Caller(words[0], len(words) == 3)
    if not callers:
        raise RunError(f"{file}: has no key. A line has a name and a key, for instance one from `openssl rand -hex 24`.")
    return Keys(callers)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
