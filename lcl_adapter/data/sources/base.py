"""What sources read: pictures by reference, classes of pictures, parts to inspect, and plain questions.

No image is opened here. A source reads names and records; an image is read when an episode shows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

from lcl_adapter.data.sources.encodings import nfc
from lcl_adapter.data.sources.picture import Picture, PixelBox
from lcl_adapter.errors import DataError

NAMED = 3  # names that a note lists
NEAREST = 8  # the first of a ranked list are hard neighbours
MAX_LISTED = 10  # faults listed in one error; `data check` lists all


class Fault(NamedTuple):
    """One thing wrong in a source.

    Faults are counted by ``kind``; ``message`` has the file, the line and what to do.
    """

    kind: str
    message: str


@dataclass(frozen=True)
class Region:
    """Where something is in a picture: a box in pixels, or masks that are black everywhere else."""

    picture: Picture
    box: PixelBox | None = None
    mask: Picture | None = None
    further_masks: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class PictureClass:
    """One visual concept: its name, its pictures, and which classes are near it.

    groups: from the narrowest to the widest, for instance ("animal-mammal", "nature"). Classes with the same first
    group are *hard* neighbours.
    hard: whether the class may be used as a hard neighbour at all.
    boxes: where the object is in each picture, in pixels; None where that is not known. Empty for a class without
    boxes.
    ranked: names of the nearest classes, from near to far, if a list ranks them.
    """

    name: str
    pictures: tuple[Picture, ...]
    groups: tuple[str, ...] = ()
    hard: bool = True
    boxes: tuple[PixelBox | None, ...] = ()
    ranked: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", nfc(self.name).strip() or self.name)
        object.__setattr__(self, "groups", tuple(map(nfc, self.groups)))
        object.__setattr__(self, "ranked", tuple(map(nfc, self.ranked)))

    @cached_property
    def artists(self) -> frozenset[str]:
        return frozenset(p.artist for p in self.pictures if p.artist is not None)


@dataclass(frozen=True)
class ClassPool:
    """The classes that episodes are drawn from.

    skipped: how many were left out, by reason. notes: what was guessed or passed over, for people.
    """

    name: str
    classes: tuple[PictureClass, ...]
    skipped: dict[str, int] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.classes)

    @cached_property
    def _by_group(self) -> dict[str, list[int]]:
        table: dict[str, list[int]] = {}
        for index, picture_class in enumerate(self.classes):
            for group in picture_class.groups:
                table.setdefault(group, []).append(index)
        return table

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {c.name: index for index, c in enumerate(self.classes)}

    def neighbours(self, index: int) -> Sequence[int]:
        """Indices of other classes, from near to far: the ranked list if there is one; else all others, by narrowest
        common group.
        """
        listed = [self._by_name[n] for n in self.classes[index].ranked if self._by_name.get(n, index) != index]
        if listed:
            return listed
        in_order: dict[int, None] = {}
        for group in self.classes[index].groups:
            in_order.update(dict.fromkeys(self._by_group[group]))
        in_order.update(dict.fromkeys(range(len(self.classes))))
        in_order.pop(index)
        return list(in_order)

    @property
    def grouped(self) -> bool:
        """Whether it is known which classes are near each other."""
        return any(c.groups or c.ranked for c in self.classes)

    @cached_property
    def regions(self) -> dict[str, tuple[Region, ...]]:
        """Class name -> where its objects are; only classes with boxes."""
        return {c.name: _boxed(c) for c in self.classes if any(c.boxes)}

    def siblings(self, index: int) -> Sequence[int]:
        """The eight nearest classes of the ranked list, or the classes of the narrowest group; empty if neither is
        known.
        """
        picture_class = self.classes[index]
        if picture_class.ranked:
            return [self._by_name[n] for n in picture_class.ranked[:NEAREST] if n in self._by_name and n != picture_class.name]
        return [i for i in self._by_group[picture_class.groups[0]] if i != index] if picture_class.groups else []

    def hard_neighbours(self, index: int) -> Sequence[int]:
        """Siblings that may be used as hard neighbours; empty if there is none."""
        return [i for i in self.siblings(index) if self.classes[i].hard] if self.classes[index].hard else []


def _boxed(picture_class: PictureClass) -> tuple[Region, ...]:
    pairs = zip(picture_class.pictures, picture_class.boxes, strict=True)
    return tuple(Region(picture, box=box) for picture, box in pairs if box is not None)


@dataclass(frozen=True)
class Specimen:
    """One test photo of a part.

    ``defect`` is the kind of defect, None for a good part; ``mask`` shows where the defect is, and ``further_masks`` where
    it is too.
    """

    picture: Picture
    defect: str | None = None
    mask: Picture | None = None
    further_masks: tuple[Picture, ...] = ()

    @property
    def region(self) -> Region:
        """Where the defect is."""
        return Region(self.picture, mask=self.mask, further_masks=self.further_masks)


@dataclass(frozen=True)
class PartCategory:
    """One category of parts to inspect. ``references`` are good photos for support sets; no query asks about them."""

    name: str
    references: tuple[Picture, ...]
    good: tuple[Specimen, ...]
    defects: Mapping[str, tuple[Specimen, ...]]

    @property
    def specimens(self) -> tuple[Specimen, ...]:
        """Good specimens, then those of each defect."""
        return (*self.good, *(s for defective in self.defects.values() for s in defective))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return (*self.references, *(s.picture for s in self.specimens))


@dataclass(frozen=True)
class InspectionPool:
    """Categories of parts, with good and defective photos."""

    name: str
    categories: tuple[PartCategory, ...]
    skipped: dict[str, int] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.categories)

    @cached_property
    def two_sided(self) -> tuple[int, ...]:
        """Indices of the categories with both good and defective photos to ask about."""
        return tuple(i for i, c in enumerate(self.categories) if c.good and any(c.defects.values()))

    @property
    def photos(self) -> str:
        """The number of good and of defective photos, as text for messages."""
        good = sum(len(c.good) for c in self.categories)
        bad = sum(len(specimens) for c in self.categories for specimens in c.defects.values())
        return f"{good:,} good and {bad:,} defective photos to ask about"

    @cached_property
    def regions(self) -> dict[str, tuple[Region, ...]]:
        """ "<kind> on the <part>" -> where the defects are; only those with masks."""
        regions = {}
        for category in self.categories:
            for kind, specimens in category.defects.items():
                masked = tuple(s.region for s in specimens if s.mask is not None)
                regions[f"{kind} on the {category.name}"] = masked
        return regions


@dataclass(frozen=True)
class Exchange:
    """One question and its answer, with its picture, if any.

    further: more pictures of the same question. Then each ``<image>`` in the question marks the place of one picture.
    answers: all answers that people gave, if a suite scores against several.
    region: if the answer is a box, the region of that box; ``answer`` is then empty, because the picture's size is not
    read yet.
    unfinished: the answer was cut, so its end is not learned.
    """

    question: str
    answer: str
    picture: Picture | None = None
    further: tuple[Picture, ...] = ()
    answers: tuple[str, ...] = ()
    region: Region | None = None
    unfinished: bool = False


@dataclass(frozen=True)
class Dialogue:
    """The exchanges of one record, in order. ``origin`` is the file and the record, for messages."""

    exchanges: tuple[Exchange, ...]
    origin: str

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(p for e in self.exchanges for p in ((e.picture,) if e.picture else ()) + e.further)


@dataclass(frozen=True)
class QuestionPool:
    """Plain questions, one dialogue a record.

    dialogues: may read a dialogue from its file each time it is used. fingerprint: a hash of the file's contents.
    shard_sizes: the number of dialogues in each shard, if they are in shards. shards_at_once: how many shards a pass
    mixes. new_tokens: each dialogue waits for an answer of the base, of at most so many tokens; 0 where all are answered.
    """

    name: str
    dialogues: Sequence[Dialogue]
    skipped: dict[str, int] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    fingerprint: str = ""
    shard_sizes: tuple[int, ...] = ()
    shards_at_once: int = 1
    new_tokens: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.dialogues)


Pool = ClassPool | QuestionPool | InspectionPool


def names_of(pool: Pool) -> list[str]:
    """The classes or categories of a pool; none for questions."""
    if isinstance(pool, ClassPool):
        return [c.name for c in pool.classes]
    return [c.name for c in pool.categories] if isinstance(pool, InspectionPool) else []


def pictures_of(pool: Pool) -> Iterator[Picture]:
    """Every picture of a pool, without masks."""
    if isinstance(pool, ClassPool):
        yield from (p for c in pool.classes for p in c.pictures)
    elif isinstance(pool, InspectionPool):
        yield from (p for c in pool.categories for p in c.pictures)
    else:
        yield from (p for dialogue in pool.dialogues for p in dialogue.pictures)


class NothingLeftError(DataError):
    """A source of which nothing can be used. faults: why."""

    def __init__(self, message: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(message)
        self.faults = tuple(faults)


def first_names(names: Sequence[str], count: int = NAMED) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count:,} more" if len(names) > count else "")


def remarks(pool: Pool) -> list[str]:
    """What a person should know of a source that was opened: its notes, and what was left out."""
    left_out = ", ".join(f"{count:,} x {reason}" for reason, count in pool.skipped.items())
    return [*pool.notes, *([f"{pool.name}: left out: {left_out}"] if left_out else [])]


AnyPool = TypeVar("AnyPool", ClassPool, QuestionPool, InspectionPool)


def check_faults(pool: AnyPool, on_fault: str) -> AnyPool:
    """The pool with its faults counted as skipped. With "refuse", raises one DataError that lists the first ten faults.

    Raises NothingLeftError if the pool is empty.
    """
    if pool.faults and on_fault == "refuse":
        count = "1 fault" if len(pool.faults) == 1 else f"{len(pool.faults)} faults"
        lines = [f"{pool.name}: {count} (mend, or set `on_fault: skip`):", *(f.message for f in pool.faults[:MAX_LISTED])]
        if len(pool.faults) > MAX_LISTED:
            lines.append(f"... and {len(pool.faults) - MAX_LISTED} more; `lcl-adapter data check` lists them all")
        raise DataError("\n  ".join(lines))
    if not len(pool):
        reasons = [f.message for f in pool.faults[:1]] or [f"{count} x {reason}" for reason, count in pool.skipped.items()]
        reasons += pool.notes[:1]
        explanation = f": {', '.join(reasons)}." if reasons else "; nothing is left for this split, or the file is empty."
        raise NothingLeftError(f"{pool.name}: nothing of use in it{explanation}", pool.faults)
    return replace(pool, skipped={**pool.skipped, **Counter(f.kind for f in pool.faults)})
