"""What every source yields: pictures by reference, classes of pictures, and plain questions.

Nothing here opens an image: a source reads names and records, images are read when an episode shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Picture:
    """One image by reference.

    path: the file, or the zip archive that holds it.
    member: the name inside the archive, None for a plain file.
    hand: who drew or took it, where that is known: an episode shows the support set by other hands than the query's.
    view: 0 is the image as it is; k > 0 is its k-th further view (background, scale, turn, light), made when read.
    turned: quarter turns counter-clockwise, before anything else.
    """

    path: Path
    member: str | None = None
    hand: str | None = None
    view: int = 0
    turned: int = 0

    def __str__(self) -> str:
        name = f"{self.path}!{self.member}" if self.member else str(self.path)
        return name + (f" (view {self.view})" if self.view else "") + (f" (turned {self.turned})" if self.turned else "")

    def seen_again(self, view: int) -> Picture:
        """The same picture in its ``view``-th further view."""
        return replace(self, view=view)


@dataclass(frozen=True)
class PictureClass:
    """One visual concept: its name, its pictures, and how near others are.

    groups: from the narrowest to the widest, for instance ("animal-mammal", "nature"); classes that share the first are
    *hard* neighbours.
    hard: whether it may be used as a hard neighbour at all.
    """

    name: str
    pictures: tuple[Picture, ...]
    groups: tuple[str, ...] = ()
    hard: bool = True

    @cached_property
    def hands(self) -> frozenset[str]:
        return frozenset(p.hand for p in self.pictures if p.hand is not None)


@dataclass(frozen=True)
class ClassPool:
    """The classes an episode is drawn from. ``skipped`` counts what was left out, by reason."""

    name: str
    classes: tuple[PictureClass, ...]
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.classes)

    @cached_property
    def _by_group(self) -> dict[str, list[int]]:
        table: dict[str, list[int]] = {}
        for index, one in enumerate(self.classes):
            for group in one.groups:
                table.setdefault(group, []).append(index)
        return table

    def neighbours(self, index: int) -> Sequence[int]:
        """All other classes from near to far: those that share the narrowest group first, then the wider ones."""
        ranked: dict[int, None] = {}
        for group in self.classes[index].groups:
            ranked.update(dict.fromkeys(self._by_group[group]))
        ranked.update(dict.fromkeys(range(len(self.classes))))
        ranked.pop(index)
        return list(ranked)

    @property
    def grouped(self) -> bool:
        """Whether anything is known of which classes are near each other."""
        return any(one.groups for one in self.classes)

    def siblings(self, index: int) -> Sequence[int]:
        """Classes that share the narrowest group; empty where groups are not known."""
        groups = self.classes[index].groups
        return [i for i in self._by_group[groups[0]] if i != index] if groups else []

    def hard_neighbours(self, index: int) -> Sequence[int]:
        """Siblings that may serve as hard ones; empty where there is none."""
        return [i for i in self.siblings(index) if self.classes[i].hard] if self.classes[index].hard else []


@dataclass(frozen=True)
class Exchange:
    """One question and its answer, with the picture it is about, if any."""

    question: str
    answer: str
    picture: Picture | None = None


@dataclass(frozen=True)
class Dialogue:
    """A conversation of one record: exchanges in their order. ``origin`` is file and record, for messages."""

    exchanges: tuple[Exchange, ...]
    origin: str


@dataclass(frozen=True)
class QuestionPool:
    """Plain questions, one dialogue a record."""

    name: str
    dialogues: tuple[Dialogue, ...]
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.dialogues)


Pool = ClassPool | QuestionPool
