"""Questions in WebDataset shards: tar archives of ``key.json`` and ``key.jpg``, in a local folder or anywhere that
fsspec reads.

A sample is read when it is used, and not before, so a bad one is discovered then.
A sample's JSON is LLaVA's (``conversations``; its pictures are the sample's, in the order of their names) or
``{"question", "answer"}``. Remote shards are fetched whole, one at a time, into a folder of bounded size. The schedule
mixes a few shards at a time (``mixed``), so that each shard is fetched once in a pass. The seed and the row's number
alone decide which sample a row has. So a stopped run continues with the same samples, and each of several processes
reads the samples of its own rows.
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

from lcl_adapter import reading
from lcl_adapter.amounts import memory_bytes
from lcl_adapter.data.sources import chat
from lcl_adapter.data.sources.base import Dialogue, Exchange, Fault, QuestionPool, check_faults
from lcl_adapter.data.sources.images import SUFFIXES
from lcl_adapter.data.sources.llava_json import exchanges_of
from lcl_adapter.data.sources.picture import Picture
from lcl_adapter.errors import DataError, RunError
from lcl_adapter.files import disk_is_full
from lcl_adapter.reading import brief
from lcl_adapter.recipe.sources import QuestionReader

CHUNK = 1 << 22
TRIES = 4
FIRST_WAIT = 0.5  # seconds before the second try; each further wait is twice as long
MAX_JSON = 2**24  # bytes of a sample's JSON
MAX_SHARDS = 1_000_000  # names that one pattern stands for
MAX_HEADER = 2**20  # bytes of a member's name or other fields
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Shards(QuestionReader):
    """``type: shards``. WebDataset shards of questions, in a folder or anywhere that fsspec reads (s3://, https://, …).

    They may be larger than the disk.
    """

    reads_late: ClassVar[bool] = True

    type: Literal["shards"]
    path: Path | None = Field(None, description="a folder of *.tar")
    urls: str = Field("", description="or the shards' addresses: https://host/llava-{000000..000663}.tar")
    index: Path | None = Field(None, description="the samples of each shard, a file that WebDataset's `widsindex create` writes; needed with `urls`")
    cache: Path = Field(Path("shards-cache"), description="with `urls`: the folder that shards are fetched into")
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
    def _path_or_urls(self) -> Self:
        if (self.path is None) == (not self.urls):
            raise ValueError("give `path`, a folder of shards, or `urls`, their addresses")
        return self

    def open(self, name: str, min_pictures: int = 1) -> QuestionPool:
        size = memory_bytes(self.cache_size)
        return read_shards(self.path, self.urls, self.index, self.cache, size, self.mixed, name, self.limit, self.on_fault)

    def shards(self) -> set[str]:
        """The shards that it reads, by file or address."""
        return {str(file) for file in self.path.glob("*.tar")} if self.path is not None else set(expanded(self.urls))


class _Headers:
    """A tar's file for tarfile, which reads names and other fields whole, however long a header says that they are."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        """Raises ReadError for more than MAX_HEADER bytes."""
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a name or a field of {size:,} bytes; at most {MAX_HEADER:,} are read")
        return self._file.read(size)


class Member(NamedTuple):
    """One file of a shard, and where its bytes are."""

    name: str
    offset: int
    size: int


class Cache:
    """A folder of fetched shards with at most ``size`` bytes.

    The shard that was used longest ago is removed first, the newest never.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size

    def fetch(self, url: str) -> Path:
        """The local copy of a shard. Processes that need the same shard wait for the first one.

        Raises RunError if it cannot be fetched. This is not a DataError, because no sample is bad.
        """
        target = self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.tar"
        if self._mark_used(target):
            return target
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(target.with_suffix(".lock")):
                if not self._mark_used(target):
                    for partial in self.folder.glob(f"{target.stem}.*.part"):  # left by a killed process: this one has the lock now
                        partial.unlink(missing_ok=True)
                    self._copy(url, target)
                    self._make_room(target)
        except ImportError as error:
            raise RunError(f"{url}: cannot be read without another package ({error}).") from error
        except FileNotFoundError as error:
            raise RunError(f"{url}: no such shard.") from error
        except RunError:
            raise
        except Exception as error:  # each file system's client has its own errors
            if disk_is_full(error):
                raise RunError(f"{self.folder}: the disk is full; make room, or lower `cache_size`.") from error
            raise RunError(f"{url}: cannot be fetched ({type(error).__name__}: {error}). Go on with resume=true when it can.") from error
        return target

    def _copy(self, url: str, target: Path) -> None:
        """Fetch the shard; after a failure, wait and try again."""
        partial = target.with_suffix(f".{os.getpid()}.part")
        for attempt in range(TRIES):
            try:
                with fsspec.open(url, "rb") as source, partial.open("wb") as file:
                    size = 0
                    while chunk := source.read(CHUNK):
                        size += len(chunk)
                        if size > self.size:
                            raise RunError(
                                f"{url}: is larger than `cache_size`, {self.size:,} bytes, in which the disk has room for shards. Give more."
                            )
                        file.write(chunk)
                partial.replace(target)
                return
            except (FileNotFoundError, ImportError, ValueError, RunError):
                raise
            except Exception as error:
                if attempt == TRIES - 1 or disk_is_full(error):
                    raise
                time.sleep(FIRST_WAIT * 2**attempt)
            finally:
                partial.unlink(missing_ok=True)

    def _mark_used(self, target: Path) -> bool:
        """Set the shard's time of last use. False if it is not in the folder."""
        try:
            os.utime(target)
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the kernel releases the lock of a killed process
            yield

    def _make_room(self, newest: Path) -> None:
        """Remove shards until the folder holds at most ``size`` bytes."""
        shards = []
        for path in self.folder.glob("*.tar"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process removed it
                continue
            shards.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in shards)
        for _, size, path in sorted(shards):
            if total <= self.size:
                break
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size


class ShardDialogues(Sequence[Dialogue]):
    """Dialogues by number. The shard of the number is fetched if it is not local; then only that sample is read."""

    def __init__(self, urls: Sequence[str], counts: Sequence[int], cache: Cache | None) -> None:
        self.urls, self.counts, self.cache = tuple(urls), tuple(counts), cache
        self._ends = list(accumulate(counts))
        self._members = lru_cache(maxsize=8)(self._read_members)

    def __reduce__(self) -> tuple[type[ShardDialogues], tuple[Any, ...]]:
        """Without the cache of listed shards, which another process fills by itself."""
        return type(self), (self.urls, self.counts, self.cache)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        """Raises DataError for a bad sample, with its shard and key."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        shard = bisect.bisect_right(self._ends, index)
        members = self._members(shard)
        key = list(members)[index - (self._ends[shard - 1] if shard else 0)]
        return self._sample(self.urls[shard], key, members[key])

    def _local_path(self, url: str) -> Path:
        return Path(url) if self.cache is None else self.cache.fetch(url)

    @contextmanager
    def _opened(self, url: str) -> Iterator[BinaryIO]:
        """The open shard. If another process removes it between fetching and opening, it is fetched again."""
        for attempt in range(TRIES):
            try:
                file = reading.open_file(self._local_path(url))
            except FileNotFoundError as error:
                if attempt == TRIES - 1:
                    raise RunError(f"{url}: is removed as soon as it is fetched; `cache_size` holds too few shards for so many processes.") from error
                continue
            except OSError as error:
                raise DataError(f"{url}: cannot be read ({error.strerror or error}).") from error
            with file:
                yield file
            return

    def _read_members(self, shard: int) -> dict[str, list[Member]]:
        """Sample's key -> its members."""
        with self._opened(self.urls[shard]) as file:
            members = members_of(file, self.urls[shard])
        if len(members) != self.counts[shard]:
            raise DataError(f"{self.urls[shard]}: has {len(members)} samples, its index says {self.counts[shard]}. Make the index anew.")
        return members

    def _sample(self, url: str, key: str, members: Sequence[Member]) -> Dialogue:
        origin = f"{url}: sample {key!r}"
        if (size := sum(member.size for member in members)) > reading.MAX_UNPACKED:
            raise DataError(f"{origin} has {size:,} bytes; at most {reading.MAX_UNPACKED:,} are read.")
        with self._opened(url) as file:
            files = {suffix_of(member.name): os.pread(file.fileno(), member.size, member.offset) for member in members}
        raw_json = files.get(".json")
        if raw_json is None:
            raise DataError(f"{origin} has no {key}.json beside {', '.join(sorted(files))}.")
        images = sorted(suffix for suffix in files if f".{suffix.rpartition('.')[2].lower()}" in SUFFIXES)
        pictures = [Picture(Path(url), f"{key}{suffix}", data=files[suffix]) for suffix in images]
        try:
            record = reading.parse_json(raw_json)
            if "conversations" in record:
                return Dialogue(exchanges_of(chat.turns_of(record)[0], pictures), origin)
            question, answer = str(record["question"]).strip(), str(record["answer"]).strip()
            if not question or not answer or len(pictures) > 1:
                raise ValueError("a question, an answer and at most one image are expected")
            return Dialogue((Exchange(question.replace("<image>", "").strip(), answer, pictures[0] if pictures else None),), origin)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise DataError(f"{origin}: `conversations`, or `question` and `answer`, are expected ({brief(error)}).") from error


def suffix_of(name: str) -> str:
    """The part of a file's name from its first dot on, as WebDataset defines it: ``.a.jpg``."""
    return "." + PurePosixPath(name).name.partition(".")[2]


def members_of(file: BinaryIO, name: str) -> dict[str, list[Member]]:
    """Sample's key -> its members, in the shard's order.

    Only headers are read. Raises DataError for a broken or incomplete tar.
    """
    members_by_key: dict[str, list[Member]] = {}
    try:
        headers: Any = _Headers(file)
        with tarfile.open(fileobj=headers, mode="r:") as archive:
            end = os.fstat(file.fileno()).st_size
            for member in archive:
                if member.size < 0:
                    raise DataError(f"{name}: {member.name!r} has a size below 0. Copy it again.")
                if not member.isreg() or PurePosixPath(member.name).name.startswith("."):  # macOS adds a hidden file beside each file
                    continue
                if member.offset_data + member.size > end:
                    raise DataError(f"{name}: is cut short, in {member.name!r}. Copy it again.")
                base = PurePosixPath(member.name)
                key = str(base.with_name(base.name.partition(".")[0]))
                if base.name.endswith(".json") and member.size > MAX_JSON:
                    raise DataError(f"{name}: {member.name!r} is {member.size:,} bytes of JSON; a sample has at most {MAX_JSON:,}.")
                members_by_key.setdefault(key, []).append(Member(member.name, member.offset_data, member.size))
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error}).") from error
    except (tarfile.TarError, ValueError, OverflowError, IndexError, KeyError, RecursionError) as error:  # the others: of spoilt headers
        raise DataError(f"{name}: not a tar archive that can be read ({brief(error)}).") from error
    return members_by_key


def expanded(pattern: str) -> list[str]:
    """``a-{000..012}.tar`` -> the names, in order. Any number of ranges is allowed.

    Raises DataError for a range that counts down, and for more than MAX_SHARDS names.
    """
    count = 1
    for first, last in RANGE.findall(pattern):
        if max(len(first), len(last)) > len(str(MAX_SHARDS)) + 6:
            raise DataError(f"{brief(pattern)}: a number of {max(len(first), len(last))} digits in a pattern of shards.")
        count *= max(1, int(last) - int(first) + 1)
        if count > MAX_SHARDS:
            raise DataError(f"{brief(pattern)}: stands for more than {MAX_SHARDS:,} shards. Write the last number that there is.")
    return _expanded(pattern)


def _expanded(pattern: str) -> list[str]:
    match = RANGE.search(pattern)
    if match is None:
        return [pattern]
    width = len(match[1])
    numbers = range(int(match[1]), int(match[2]) + 1)
    if not numbers:
        raise DataError(f"{pattern}: {match[0]} counts down; write the smaller number first.")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [name for number in numbers for name in _expanded(f"{head}{number:0{width}d}{tail}")]


def read_shards(
    path: Path | None,
    urls: str,
    index: Path | None,
    cache: Path,
    cache_size: int,
    mixed: int,
    name: str = "",
    limit: int | None = None,
    on_fault: str = "refuse",
) -> QuestionPool:
    """Shards of a folder, or at ``urls``.

    ``index`` is a file as WebDataset's ``widsindex create`` writes it; ``urls`` need one.

    limit: use only the first shards, until they hold this many samples. on_fault: "refuse" raises DataError for a local
    shard that cannot be listed; "skip" leaves it out and counts it. Raises DataError.
    """
    faults: list[Fault] = []
    sizes = _read_index(index) if index is not None else None
    if path is not None:
        if not path.is_dir():
            raise DataError(f"{path}: no such folder; one with *.tar is expected.")
        shards = [str(file) for file in sorted(path.glob("*.tar"))]
    else:
        shards = expanded(urls)
        if sizes is None:
            raise DataError(f"{urls}: remote shards need `index`, a file that `widsindex create` writes: how many samples each has.")
    if not shards:
        raise DataError(f"{path}: no *.tar in it.")
    if sizes is None:
        counts = [_count_samples(Path(shard), faults) for shard in shards]
    else:
        missing = [shard for shard in shards if _base_name(shard) not in sizes]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DataError(f"{index}: has no entry for {_base_name(missing[0])}{more}.")
        counts = [sizes[_base_name(shard)] for shard in shards]
    used = [(shard, count) for shard, count in zip(shards, counts, strict=True) if count]
    if limit is not None:
        enough = next((n for n, total in enumerate(accumulate(c for _, c in used), 1) if total >= limit), len(used))
        used = used[:enough]
    if not used and not faults:
        raise DataError(f"{path or urls}: no sample in any shard.")
    listed = json.dumps([[_base_name(shard), count] for shard, count in used])
    fingerprint = hashlib.sha256(listed.encode()).hexdigest()
    dialogues = ShardDialogues([shard for shard, _ in used], [count for _, count in used], None if path is not None else Cache(cache, cache_size))
    pool = QuestionPool(name or "shards", dialogues, {}, tuple(faults), fingerprint, shard_sizes=dialogues.counts, shards_at_once=mixed)
    return check_faults(pool, on_fault)


def _count_samples(path: Path, faults: list[Fault]) -> int:
    """How many samples a local shard has; 0, and a fault, where it cannot be listed."""
    try:
        with reading.open_file(path) as file:
            return len(members_of(file, str(path)))
    except OSError as error:
        faults.append(Fault("broken shard", f"{path}: cannot be read ({error.strerror or error})."))
    except DataError as error:
        faults.append(Fault("broken shard", str(error)))
    return 0


def _base_name(shard: str) -> str:
    return shard.rpartition("/")[2]


def _read_index(index: Path) -> dict[str, int]:
    """Shard's file name -> how many samples it has."""
    try:
        raw = reading.read_json(index, reading.MAX_UNPACKED)
        return {_base_name(str(entry["url"])): int(entry["nsamples"]) for entry in raw["shardlist"]}
    except FileNotFoundError as error:
        raise DataError(f"{index}: no such file.") from error
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        form = "{'shardlist': [{'url', 'nsamples'}]}"
        raise DataError(f"{index}: not an index as `widsindex create` writes it: {form} ({brief(error)}).") from error
