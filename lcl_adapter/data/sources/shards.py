"""Questions in WebDataset shards: tar archives of ``key.json`` and ``key.jpg``, here in a folder or anywhere that fsspec reads.

A sample's JSON is LLaVA's (``conversations``; its pictures are the sample's, in the order of their names) or ``{"question", "answer"}``.
Shards that lie elsewhere come one at a time, whole, into a folder that holds a bounded amount of them; the schedule goes through them a
few at a time (``mixed``), so that each is fetched once a pass. Which row is which sample follows from seed and number alone: a run that was
stopped goes on where it was, and of several processes each reads the samples of its own rows.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import json
import os
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, ClassVar, Literal, NamedTuple, Self

import fsspec
from pydantic import Field, field_validator, model_validator

from lcl_adapter.amounts import memory_bytes
from lcl_adapter.data.sources.base import Dialogue, Exchange, Picture, QuestionPool
from lcl_adapter.data.sources.images import SUFFIXES
from lcl_adapter.data.sources.llava_json import exchanges_of
from lcl_adapter.errors import DataError, RunError
from lcl_adapter.files import disk_is_full
from lcl_adapter.recipe.sources import QuestionReader

CHUNK = 1 << 22
TRIES = 4
PATIENCE = 0.5  # seconds before the second try
LONGEST = 2**24  # bytes of a sample's JSON
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Shards(QuestionReader):
    """``type: shards``. WebDataset shards of questions, in a folder or anywhere that fsspec reads (s3://, https://, …).

    They may be larger than the disk.
    """

    reads_late: ClassVar[bool] = True

    type: Literal["shards"]
    path: Path | None = Field(None, description="a folder of *.tar")
    urls: str = Field("", description="or where they are: https://host/llava-{000000..000663}.tar")
    index: Path | None = Field(None, description="how many samples each has, as WebDataset's `widsindex create` writes it; needed with `urls`")
    cache: Path = Field(Path("shards-cache"), description="with `urls`: the folder they are fetched into")
    cache_size: str = Field("20GB", description="with `urls`: how many bytes of shards the folder may hold")
    mixed: int = Field(4, ge=1, description="shards whose samples are mixed; each is fetched once a pass if `cache_size` holds this many")
    on_fault: Literal["refuse", "skip"] = Field("skip", description="a bad sample is discovered when it is read: leave it out and count it, or stop")
    limit: int | None = Field(None, ge=1)

    @field_validator("cache_size")
    @classmethod
    def _amount_of_memory(cls, text: str) -> str:
        memory_bytes(text)
        return text

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (not self.urls):
            raise ValueError("give `path`, a folder of shards, or `urls`, where they are")
        return self

    def open(self, name: str, min_pictures: int = 1) -> QuestionPool:
        return read_shards(self.path, self.urls, self.index, self.cache, memory_bytes(self.cache_size), self.mixed, name, self.limit)


class Place(NamedTuple):
    """Where a member's bytes are in its shard."""

    name: str
    offset: int
    size: int


class Cache:
    """Shards from elsewhere, at most ``size`` bytes of them (but always the newest): the one that was used longest ago goes first."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size

    def fetch(self, url: str) -> Path:
        """The shard on this disk. Processes that want the same one wait for the first.

        Raises RunError: that a shard cannot be had is no bad sample, to be left out.
        """
        target = self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.tar"
        if self._touched(target):
            return target
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(target.with_suffix(".lock")):
                if not self._touched(target):
                    for left in self.folder.glob(f"{target.stem}.*.part"):  # of a process that was killed: we have its lock
                        left.unlink(missing_ok=True)
                    self._copy(url, target)
                    self._make_room(target)
        except ImportError as error:
            raise RunError(f"{url}: cannot be read without another package ({error}).") from error
        except FileNotFoundError as error:
            raise RunError(f"{url}: no such shard.") from error
        except RunError:
            raise
        except Exception as error:  # whatever a file system's client raises
            if disk_is_full(error):
                raise RunError(f"{self.folder}: the disk is full; make room, or lower `cache_size`.") from error
            raise RunError(f"{url}: cannot be fetched ({type(error).__name__}: {error}). Go on with resume=true when it can.") from error
        return target

    def _copy(self, url: str, target: Path) -> None:
        """Tried a few times, ever later: a network fails now and then."""
        partial = target.with_suffix(f".{os.getpid()}.part")
        for turn in range(TRIES):
            try:
                with fsspec.open(url, "rb") as source, partial.open("wb") as file:
                    while chunk := source.read(CHUNK):
                        file.write(chunk)
                partial.replace(target)
                return
            except (FileNotFoundError, ImportError, ValueError):
                raise
            except Exception as error:
                if turn == TRIES - 1 or disk_is_full(error):
                    raise
                time.sleep(PATIENCE * 2**turn)
            finally:
                partial.unlink(missing_ok=True)

    def _touched(self, target: Path) -> bool:
        try:
            os.utime(target)
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the kernel lets go of it where a process is killed
            yield

    def _make_room(self, newest: Path) -> None:
        kept = []
        for path in self.folder.glob("*.tar"):
            try:
                told = path.stat()
            except FileNotFoundError:  # another process was first
                continue
            kept.append((told.st_mtime, told.st_size, path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total <= self.size:
                break
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size


class ShardDialogues(Sequence[Dialogue]):
    """By number: the shard that has it is fetched where it is not here, and its one sample read."""

    def __init__(self, urls: Sequence[str], counts: Sequence[int], cache: Cache | None) -> None:
        self.urls, self.counts, self.cache = tuple(urls), tuple(counts), cache
        self._ends = list(accumulate(counts))
        self._members = lru_cache(maxsize=8)(self._read_members)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        """Raises DataError for a sample that is none, with shard and key."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        shard = bisect.bisect_right(self._ends, index)
        members = self._members(shard)
        key = list(members)[index - (self._ends[shard - 1] if shard else 0)]
        return self._sample(self.urls[shard], key, members[key])

    def longest(self, count: int) -> list[int]:
        """The first ones that can be read: to know the longest, all would have to be fetched. A longer one is told of when its row comes."""
        return [index for index in range(min(count, self.counts[0])) if self._is_one(index)]

    def _is_one(self, index: int) -> bool:
        try:
            self[index]
        except DataError:
            return False
        return True

    def _here(self, url: str) -> Path:
        return Path(url) if self.cache is None else self.cache.fetch(url)

    @contextmanager
    def _opened(self, url: str) -> Iterator[BinaryIO]:
        """Another process may make room in the moment between fetching and opening: then it is fetched again."""
        for turn in range(TRIES):
            try:
                file = self._here(url).open("rb")
            except FileNotFoundError as error:
                if turn == TRIES - 1:
                    raise RunError(f"{url}: goes as soon as it comes; `cache_size` holds too few shards for so many processes.") from error
                continue
            with file:
                yield file
            return

    def _read_members(self, shard: int) -> dict[str, list[Place]]:
        with self._opened(self.urls[shard]) as file:
            members = members_of(file, self.urls[shard])
        if len(members) != self.counts[shard]:
            raise DataError(f"{self.urls[shard]}: has {len(members)} samples, its index says {self.counts[shard]}. Make the index anew.")
        return members

    def _sample(self, url: str, key: str, places: Sequence[Place]) -> Dialogue:
        origin = f"{url}: sample {key!r}"
        with self._opened(url) as file:
            files = {suffix_of(place.name): os.pread(file.fileno(), place.size, place.offset) for place in places}
        told = files.get(".json")
        if told is None:
            raise DataError(f"{origin} has no {key}.json beside {', '.join(sorted(files))}.")
        images = sorted(suffix for suffix in files if f".{suffix.rpartition('.')[2].lower()}" in SUFFIXES)
        pictures = [Picture(Path(url), f"{key}{suffix}", data=files[suffix]) for suffix in images]
        try:
            record = json.loads(told)
            if "conversations" in record:
                return Dialogue(exchanges_of(record["conversations"], pictures), origin)
            question, answer = str(record["question"]).strip(), str(record["answer"]).strip()
            if not question or not answer or len(pictures) > 1:
                raise ValueError("a question, an answer and at most one image are expected")
            return Dialogue((Exchange(question.replace("<image>", "").strip(), answer, pictures[0] if pictures else None),), origin)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{origin}: `conversations`, or `question` and `answer`, are expected ({error}).") from error


def suffix_of(name: str) -> str:
    """From the first dot of the file's name on, which is WebDataset's rule: ``.a.jpg``."""
    return "." + PurePosixPath(name).name.partition(".")[2]


def members_of(file: BinaryIO, name: str) -> dict[str, list[Place]]:
    """Sample's key -> its members, in the shard's order; by headers alone. Raises DataError for what is no whole tar."""
    found: dict[str, list[Place]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            end = os.fstat(file.fileno()).st_size
            for member in archive:
                if not member.isreg() or PurePosixPath(member.name).name.startswith("."):  # what a Mac puts beside each file
                    continue
                if member.offset_data + member.size > end:
                    raise DataError(f"{name}: is cut short, in {member.name!r}. Copy it again.")
                base = PurePosixPath(member.name)
                key = str(base.with_name(base.name.partition(".")[0]))
                if base.name.endswith(".json") and member.size > LONGEST:
                    raise DataError(f"{name}: {member.name!r} is {member.size:,} bytes of JSON; that is no sample.")
                found.setdefault(key, []).append(Place(member.name, member.offset_data, member.size))
    except tarfile.TarError as error:
        raise DataError(f"{name}: not a tar archive that can be read ({error}).") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error}).") from error
    return found


def expanded(pattern: str) -> list[str]:
    """``a-{000..012}.tar`` -> its names, in order; any number of ranges."""
    match = RANGE.search(pattern)
    if match is None:
        return [pattern]
    width = len(match[1])
    numbers = range(int(match[1]), int(match[2]) + 1)
    if not numbers:
        raise DataError(f"{pattern}: {match[0]} counts down; write the smaller number first.")
    return [one for number in numbers for one in expanded(f"{pattern[: match.start()]}{number:0{width}d}{pattern[match.end() :]}")]


def read_shards(
    path: Path | None, urls: str, index: Path | None, cache: Path, cache_size: int, mixed: int, name: str = "", limit: int | None = None
) -> QuestionPool:
    """Shards of a folder, or at ``urls``; ``index`` is what WebDataset's ``widsindex create`` writes, and needed for those elsewhere.

    ``limit`` takes the first shards that hold so many samples. Raises DataError.
    """
    counts = _indexed(index) if index is not None else None
    if path is not None:
        if not path.is_dir():
            raise DataError(f"{path}: no such folder; one with *.tar is expected.")
        places = [str(one) for one in sorted(path.glob("*.tar"))]
    else:
        places = expanded(urls)
        if counts is None:
            raise DataError(f"{urls}: shards that are not here need `index`, a file that `widsindex create` writes: how many samples each has.")
    if not places:
        raise DataError(f"{path}: no *.tar in it.")
    if counts is None:
        numbers = [_counted(Path(place)) for place in places]
    else:
        missing = [place for place in places if _base(place) not in counts]
        if missing:
            raise DataError(f"{index}: says nothing of {_base(missing[0])}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}.")
        numbers = [counts[_base(place)] for place in places]
    used = [(place, count) for place, count in zip(places, numbers, strict=True) if count]
    if limit is not None:
        enough = next((n for n, total in enumerate(accumulate(c for _, c in used), 1) if total >= limit), len(used))
        used = used[:enough]
    if not used:
        raise DataError(f"{path or urls}: no sample in any shard.")
    told = json.dumps([[_base(place), count] for place, count in used])
    dialogues = ShardDialogues([place for place, _ in used], [count for _, count in used], None if path is not None else Cache(cache, cache_size))
    fingerprint = hashlib.sha256(told.encode()).hexdigest()
    return QuestionPool(name or "shards", dialogues, {}, (), fingerprint, shard_sizes=dialogues.counts, shards_at_once=mixed)


def _counted(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return len(members_of(file, str(path)))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _base(place: str) -> str:
    return place.rpartition("/")[2]


def _indexed(index: Path) -> dict[str, int]:
    """Shard's file name -> how many samples."""
    try:
        told = json.loads(index.read_text(encoding="utf-8"))
        return {_base(str(one["url"])): int(one["nsamples"]) for one in told["shardlist"]}
    except FileNotFoundError as error:
        raise DataError(f"{index}: no such file.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{index}: not an index as `widsindex create` writes it: {{'shardlist': [{{'url', 'nsamples'}}]}} ({error}).") from error
