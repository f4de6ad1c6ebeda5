"""What every source yields: pictures by reference, classes of pictures, and plain questions.

Nothing here opens an image: a source reads names and records, images are read when an episode shows them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lcl_adapter.errors import DataError

NEAREST = 8  # of a ranked list, these are hard neighbours
SHOWN = 10  # faults listed in one error; `data check` lists all


class Fault(NamedTuple):
    """One thing wrong in a source. ``kind`` is what it is counted under; ``message`` names file, line and remedy."""

    kind: str
    message: str


NAMED = re.compile(r"(.*?)(?:!(.*?))?(?: \(view (\d+)\))?(?: \(turned (\d)\))?(?: \(tile ([\dx:]+)\))?")


@dataclass(frozen=True)
class Picture:
    """One image by reference.

    path: the file, or the zip archive that holds it.
    member: the name inside the archive, None for a plain file.
    artist: who drew or photographed it, where that is known. An episode shows support pictures by other artists than the query's.
    view: 0 is the image as it is; k > 0 is its k-th further view (background, scale, turn, light), made when read.
    turned: quarter turns counter-clockwise, before anything else.
    tile: one piece of the picture, (rows, columns, place), places counted from 0 along the rows.
    data: the image file's bytes, where it is in no file; ``path`` is then a name that tells it from others.
    """

    path: Path
    member: str | None = None
    artist: str | None = None
    view: int = 0
    turned: int = 0
    tile: tuple[int, int, int] | None = None
    data: bytes | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.path, str):  # Picture("photo.png") is convenient in a script
            object.__setattr__(self, "path", Path(self.path))

    def __str__(self) -> str:
        name = f"{self.path}!{self.member}" if self.member else str(self.path)
        name += (f" (view {self.view})" if self.view else "") + (f" (turned {self.turned})" if self.turned else "")
        return name + (" (tile {}x{}:{})".format(*self.tile) if self.tile else "")

    @classmethod
    def parse(cls, name: str) -> Picture:
        """The picture whose ``str`` this is."""
        match = NAMED.fullmatch(name)
        assert match is not None
        tile = tuple(int(n) for n in re.findall(r"\d+", match[5])) if match[5] else None
        return cls(Path(match[1]), match[2], view=int(match[3] or 0), turned=int(match[4] or 0), tile=tile)  # type: ignore[arg-type]

    def in_view(self, view: int) -> Picture:
        """The same picture in its ``view``-th further view."""
        return replace(self, view=view)


PixelBox = tuple[float, float, float, float]


def pixel_box(value: Any) -> PixelBox:
    """A box as a file gives it: four numbers, or text with them. What a picture's size allows is checked when it is read.

    Raises ValueError for a box without extent, or left of or above the picture.
    """
    numbers = value if isinstance(value, list) else str(value).replace(",", " ").split()
    if len(numbers) != 4:
        raise ValueError(f"the box {value!r} is not four numbers, x0 y0 x1 y1 in pixels")
    x0, y0, x1, y1 = (float(v) for v in numbers)
    if not (0 <= x0 < x1 and 0 <= y0 < y1):
        raise ValueError(f"the box {value} is out of range: x0 < x1 and y0 < y1 in pixels, none below 0")
    return x0, y0, x1, y1


@dataclass(frozen=True)
class Region:
    """Where something is in a picture: a box in pixels, or a mask that is not black there."""

    picture: Picture
    box: PixelBox | None = None
    mask: Picture | None = None


@dataclass(frozen=True)
class PictureClass:
    """One visual concept: its name, its pictures, and how near others are.

    groups: from the narrowest to the widest, for instance ("animal-mammal", "nature"); classes that share the first are
    *hard* neighbours.
    hard: whether it may be used as a hard neighbour at all.
    boxes: where the thing is in each picture, in pixels (x0, y0, x1, y1), None where that is not known; empty for no boxes at all.
    ranked: names of the nearest classes, near to far, where a list says so.
    """

    name: str
    pictures: tuple[Picture, ...]
    groups: tuple[str, ...] = ()
    hard: bool = True
    boxes: tuple[PixelBox | None, ...] = ()
    ranked: tuple[str, ...] = ()

    @cached_property
    def artists(self) -> frozenset[str]:
        return frozenset(p.artist for p in self.pictures if p.artist is not None)


@dataclass(frozen=True)
class ClassPool:
    """The classes an episode is drawn from. ``skipped`` counts what was left out, by reason."""

    name: str
    classes: tuple[PictureClass, ...]
    skipped: dict[str, int] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()

    def __len__(self) -> int:
        return len(self.classes)

    @cached_property
    def _by_group(self) -> dict[str, list[int]]:
        table: dict[str, list[int]] = {}
        for index, one in enumerate(self.classes):
            for group in one.groups:
                table.setdefault(group, []).append(index)
        return table

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {one.name: index for index, one in enumerate(self.classes)}

    def neighbours(self, index: int) -> Sequence[int]:
        """From near to far: the classes that a list ranks, where one does; else all others, those of the narrowest group first."""
        listed = [self._by_name[n] for n in self.classes[index].ranked if self._by_name.get(n, index) != index]
        if listed:
            return listed
        ranked: dict[int, None] = {}
        for group in self.classes[index].groups:
            ranked.update(dict.fromkeys(self._by_group[group]))
        ranked.update(dict.fromkeys(range(len(self.classes))))
        ranked.pop(index)
        return list(ranked)

    @property
    def grouped(self) -> bool:
        """Whether anything is known of which classes are near each other."""
        return any(one.groups or one.ranked for one in self.classes)

    @cached_property
    def regions(self) -> dict[str, tuple[Region, ...]]:
        """Where the things of the classes with boxes are, by class."""
        return {
            c.name: tuple(Region(p, box=b) for p, b in zip(c.pictures, c.boxes, strict=True) if b is not None) for c in self.classes if any(c.boxes)
        }

    def siblings(self, index: int) -> Sequence[int]:
        """Classes that share the narrowest group, or the eight nearest that a list ranks; empty where neither is known."""
        one = self.classes[index]
        if one.ranked:
            return [self._by_name[n] for n in one.ranked[:NEAREST] if n in self._by_name and n != one.name]
        return [i for i in self._by_group[one.groups[0]] if i != index] if one.groups else []

    def hard_neighbours(self, index: int) -> Sequence[int]:
        """Siblings that may serve as hard ones; empty where there is none."""
        return [i for i in self.siblings(index) if self.classes[i].hard] if self.classes[index].hard else []


@dataclass(frozen=True)
class Specimen:
    """One photo of a part under test: ``defect`` is its kind, None for a good one; ``mask`` shows where it is."""

    picture: Picture
    defect: str | None = None
    mask: Picture | None = None


@dataclass(frozen=True)
class PartCategory:
    """One category to inspect. ``references`` are good photos set apart to be shown, never to be asked about."""

    name: str
    references: tuple[Picture, ...]
    good: tuple[Specimen, ...]
    defects: Mapping[str, tuple[Specimen, ...]]

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return (*self.references, *(s.picture for s in (*self.good, *(s for group in self.defects.values() for s in group))))


@dataclass(frozen=True)
class InspectionPool:
    """Categories of parts, good and defective."""

    name: str
    categories: tuple[PartCategory, ...]
    skipped: dict[str, int] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()

    def __len__(self) -> int:
        return len(self.categories)

    @cached_property
    def two_sided(self) -> tuple[int, ...]:
        """Categories with both good and defective photos to ask about."""
        return tuple(i for i, part in enumerate(self.categories) if part.good and any(part.defects.values()))

    @property
    def photos(self) -> str:
        """How many good and defective photos there are, in words."""
        good = sum(len(part.good) for part in self.categories)
        bad = sum(len(found) for part in self.categories for found in part.defects.values())
        return f"{good:,} good and {bad:,} defective photos to ask about"

    @cached_property
    def regions(self) -> dict[str, tuple[Region, ...]]:
        """Where the defects are, by kind and part."""
        return {
            f"{kind} on the {part.name}": tuple(Region(s.picture, mask=s.mask) for s in found if s.mask is not None)
            for part in self.categories
            for kind, found in part.defects.items()
        }


@dataclass(frozen=True)
class Exchange:
    """One question and its answer, with the picture it is about, if any.

    further: more pictures of the same question; then ``<image>`` in the question says where each of them stands.
    answers: every answer that people gave, where a suite scores against several.
    region: where the answer is a box, what it is the box of; ``answer`` is then empty until the picture's size is read.
    """

    question: str
    answer: str
    picture: Picture | None = None
    further: tuple[Picture, ...] = ()
    answers: tuple[str, ...] = ()
    region: Region | None = None


@dataclass(frozen=True)
class Dialogue:
    """A conversation of one record: exchanges in their order. ``origin`` is file and record, for messages."""

    exchanges: tuple[Exchange, ...]
    origin: str

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(p for e in self.exchanges for p in ((e.picture,) if e.picture else ()) + e.further)


@dataclass(frozen=True)
class QuestionPool:
    """Plain questions, one dialogue a record. ``dialogues`` may read its file anew for each; ``fingerprint`` is of its contents.

    chunks: dialogues of each shard, where they lie in shards that should be gone through one after the other, ``mixed`` at a time.
    """

    name: str
    dialogues: Sequence[Dialogue]
    skipped: dict[str, int] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    fingerprint: str = ""
    shard_sizes: tuple[int, ...] = ()
    shards_at_once: int = 1

    def __len__(self) -> int:
        return len(self.dialogues)


Pool = ClassPool | QuestionPool | InspectionPool


def names_of(pool: Pool) -> list[str]:
    """The classes or categories of a pool; none for questions."""
    return (
        [c.name for c in pool.classes]
        if isinstance(pool, ClassPool)
        else [p.name for p in pool.categories]
        if isinstance(pool, InspectionPool)
        else []
    )


def pictures_of(pool: Pool) -> Iterator[Picture]:
    """Every picture of a pool, masks left out."""
    if isinstance(pool, ClassPool):
        yield from (p for one in pool.classes for p in one.pictures)
    elif isinstance(pool, InspectionPool):
        yield from (p for part in pool.categories for p in part.pictures)
    else:
        yield from (p for dialogue in pool.dialogues for p in dialogue.pictures)


AnyPool = TypeVar("AnyPool", ClassPool, QuestionPool, InspectionPool)


def settled(pool: AnyPool, on_fault: str) -> AnyPool:
    """The pool with its faults counted as skipped, or, with "refuse", one DataError that lists the first ten.

    Raises DataError too where nothing of use is left.
    """
    if pool.faults and on_fault == "refuse":
        more = f"\n  ... and {len(pool.faults) - SHOWN} more; `lcl-adapter data check` lists them all" if len(pool.faults) > SHOWN else ""
        count = "1 fault" if len(pool.faults) == 1 else f"{len(pool.faults)} faults"
        listed = "\n  ".join([f"{pool.name}: {count} (mend, or set `on_fault: skip`):", *(f.message for f in pool.faults[:SHOWN])])
        raise DataError(listed + more)
    if not len(pool):
        reasons = [f.message for f in pool.faults[:1]] or [f"{count} x {reason}" for reason, count in pool.skipped.items()]
        why = f": {', '.join(reasons)}." if reasons else "; nothing is left for this split, or the file is empty."
        raise DataError(f"{pool.name}: nothing of use in it{why}")
    return replace(pool, skipped={**pool.skipped, **Counter(f.kind for f in pool.faults)})
