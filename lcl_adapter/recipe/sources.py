"""A source's options in three parts: a reader (what is read), a policy (what is made of it), a share of the mixture.

The reader classes themselves are in ``lcl_adapter.data.sources``, one file a kind of source. That package registers
them here (:func:`lcl_adapter.recipe.schema.register_sources`), because this room does not import it. ``sources:`` and
suites use the same readers, so that training and evaluation read the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union, get_args

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, create_model, model_validator
from pydantic_core import CoreSchema

from lcl_adapter.recipe.options import IntList, Options, Share, Weight, as_list

PolicyName = Literal["2way-weight", "2way-random-shot", "2way-ref", "ref-or-weight", "jigsaw", "n-way", "product", "locate"]
InspectionPolicy = Literal["inspection", "locate"]
InspectionForm = Literal["plain", "one-class", "two-way", "naming", "localise"]
Names = Literal["random", "real", "mixed"]
Language = Literal["en", "ja"]
Languages = Annotated[list[Language], BeforeValidator(as_list), Field(min_length=1)]


# --- policies: what is made of a pool


class Words(Options):
    """Which phrasings are used: the user's own template file, and the languages."""

    templates: Path | None = Field(None, description="a file like lcl_adapter/recipe/wording/phrases.yaml; the tasks in it replace the shipped ones")
    languages: Languages = ["en"]


class EpisodeOptions(Words):
    """How episodes are drawn from a pool of classes.

    ``shots`` is per class, so a 2-way 2-shot support set has 4 images.
    """

    POLICIES_OF: ClassVar[dict[str, tuple[str, ...]]] = {
        "neither": ("product",),
        "near_neither": ("product",),
        "plain": ("product",),
        "tiles": ("jigsaw",),
        "ways": ("n-way",),
        "augment": ("n-way", "2way-weight", "2way-random-shot", "2way-ref", "ref-or-weight"),
        "copied": ("n-way", "2way-weight", "2way-random-shot", "2way-ref", "ref-or-weight"),
        "blended": ("n-way", "2way-weight", "2way-random-shot", "2way-ref", "ref-or-weight"),
        "turned": ("n-way", "2way-weight", "2way-random-shot", "2way-ref", "ref-or-weight", "product"),
        "hard": ("n-way", "product"),
        "other_names": ("n-way",),
    }

    policy: PolicyName = "n-way"
    ways: IntList = Field([2], description="classes in an episode; from a list, one value is drawn for each episode")
    shots: IntList = Field([2], description="labelled pictures of each class; from a list, one value is drawn for each episode")
    queries: int = Field(1, ge=1, le=32, description="queries behind one support set; no query can see another")
    names: Names = Field("random", description="labels: random letters, the class's own name, or either of them for each episode")
    real_names: Share = Field(0.2, description="with `names: mixed`, the share of episodes that use real names")
    other_names: Share = Field(
        0.0, description="share of the episodes with real names whose names are those of other classes: they mean something else"
    )
    hard: Share = Field(0.5, description="share of episodes whose classes are near neighbours")
    learn: Literal["query", "repeated"] = Field("query", description="`repeated` also learns support labels that were shown before")
    other_artists: bool = Field(True, description="show support pictures by other artists than the query's, where artists are known")
    further_views: int = Field(0, ge=0, le=16, description="how many further views of each picture may be used when pictures run out")
    turned: Share = Field(0.0, description="share of episodes whose pictures are all rotated by 0 to 3 quarter turns; a turned object is a new class")
    copied: Share = Field(0.0, description="share of queries that are a support picture itself: the easiest match, for the beginning of a run")
    blended: Share = Field(0.0, description="share of episodes whose classes are blends of two classes each: classes without end")
    augment: int = Field(0, ge=0, le=16, description="show each picture as it is or in one of this many further views, drawn anew each time")
    neither: Share = Field(0.5, description="policy product: share of queries that are neither of the two products shown")
    near_neither: Share = Field(0.5, description="policy product: of those, the share drawn from near classes")
    plain: Share = Field(0.0, description="policy product: share of rows that ask for a product's name with no support set")
    tiles: IntList = Field([4, 6, 9, 12, 16], description="policy jigsaw: pieces an image is cut into; from a list, one value is drawn")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.policy != "n-way" and self.ways != [2]:
            raise ValueError(f"policy {self.policy} has 2 ways or none; leave `ways` out, or use policy n-way")
        if self.policy != "n-way" and self.policy != "jigsaw" and min(self.shots) < 1:
            raise ValueError(f"policy {self.policy} needs `shots` of 1 or more")
        if min(self.ways) < 2:
            raise ValueError("`ways` below 2: there is nothing to tell apart")
        if self.policy not in {"n-way", "product"} and self.names != "random":
            raise ValueError(f"policy {self.policy} has its own rule for names; leave `names` out")
        unfit = [t for t in self.tiles if t not in {4, 6, 9, 12, 16}]
        if unfit:
            raise ValueError(f"`tiles` of {unfit[0]}: an image is cut into 4, 6, 9, 12 or 16 pieces")
        for key, policies in self.POLICIES_OF.items():
            if self.policy not in policies and getattr(self, key) != EpisodeOptions.model_fields[key].default:
                raise ValueError(f"`{key}` belongs to policy {' or '.join(policies)}, not to {self.policy}")
        return self


class InspectionOptions(Words):
    """How parts are shown and asked about.

    ``shots`` are reference photos; with labelled defects, photos of each label.
    """

    policy: InspectionPolicy = "inspection"
    forms: dict[InspectionForm, Weight] = Field({"one-class": 1.0}, min_length=1, description="what is asked, and how often")
    shots: IntList = Field([1, 2], description="reference photos; from a list, one value is drawn for each episode")
    queries: int = Field(1, ge=1, le=32, description="queries behind one support set; no query can see another")
    defective: Share = Field(0.5, description="share of queries that have a defect")
    random_names: Share = Field(0.0, description="forms two-way and naming: share of episodes whose labels are random letters")
    learn: Literal["query", "repeated"] = "query"
    turned: Share = Field(0.0, description="share of episodes whose pictures are all rotated by 0 to 3 quarter turns")

    @model_validator(mode="after")
    def _some_form(self) -> Self:
        if sum(self.forms.values()) <= 0:
            raise ValueError("all `forms` are 0: nothing would be asked")
        if min(self.shots) < 1:
            raise ValueError("`shots` below 1: use form plain to ask without references")
        return self


class SourceOptions(Options):
    """What every training source has: its share of the mixture, and a limit."""

    if TYPE_CHECKING:
        type: str  # every reader declares its own tag

    share: Weight = 1.0
    cap: int | None = Field(None, ge=1, description="at most this many rows of the source in a run; its share then goes to the others")


class QuestionOptions(SourceOptions):
    """How plain questions become rows. ``packed`` records share a row; none of them can see another."""

    packed: int = Field(1, ge=1, le=32)
    at_end: Literal["repeat", "end"] = Field("repeat", description="after one pass: start again in another order, or use no more of them")


# --- readers: what is read


class Reader(Options):
    """Base of every reader. A reader is a class of options with a ``type`` and a method that reads the files.

    policy_options: the options that a source of this kind has under ``sources:`` beside the reader's own.
    """

    policy_options: ClassVar[type[Options]]
    if TYPE_CHECKING:
        type: str  # every reader declares its own tag, `type: Literal["class-folder"]`

    def open(self, name: str, min_pictures: int = 1) -> Any:
        """Read the pool. ``name`` is the source's name in the recipe. Paths are absolute by then.

        min_pictures: how many pictures a class needs. Readers of parts and questions ignore it.
        Raises DataError for files that cannot be read.
        """
        raise NotImplementedError


White = Annotated[
    float | None,
    Field(gt=0, description="the value that is white, of pictures with more than 8 bits; by default the file's own depth, else one scale for all"),
]


class ClassReader(Reader):
    """Reads classes of pictures (a ClassPool).

    shipped: whether the classes come with the package. Then classes with too few pictures are left out and no fault.
    """

    policy_options: ClassVar[type[Options]] = EpisodeOptions
    shipped: ClassVar[bool] = False

    white: White = None


class FileReader(Reader):
    """A reader of a user's files: a bad record stops the run, or is left out and counted."""

    on_fault: Literal["refuse", "skip"] = Field("refuse", description="bad records: list them and stop, or leave them out and count them")


class PartReader(FileReader):
    """Reads categories of parts to inspect (an InspectionPool)."""

    policy_options: ClassVar[type[Options]] = InspectionOptions

    white: White = None


class QuestionReader(FileReader):
    """Reads plain questions (a QuestionPool).

    reads_late: whether a record is read only when its row is drawn. Bad records are then discovered during the run.
    """

    policy_options: ClassVar[type[Options]] = QuestionOptions
    reads_late: ClassVar[bool] = False


# --- the registered readers, as types of the schema


_readers: list[type[Reader]] = []


def set_readers(readers: tuple[type[Reader], ...]) -> None:
    """Replace the table of readers.

    Use :func:`lcl_adapter.recipe.schema.register_sources`, which updates the schema too.
    """
    _readers[:] = readers
    for reader in readers:  # a process that receives a pickled recipe looks these classes up before it reads any recipe
        source_class(reader)


def tag_of(reader: type[Options]) -> str:
    """A reader's ``type`` in a recipe."""
    return str(get_args(reader.model_fields["type"].annotation)[0])


@cache
def source_class(reader: type[Reader]) -> type[Options]:
    """The class of a reader's entry under ``sources:``: the reader's keys, its policy's keys, share and cap."""
    bases = (reader, reader.policy_options) if issubclass(reader.policy_options, SourceOptions) else (reader, reader.policy_options, SourceOptions)
    name = f"{reader.__name__}Source"
    make: Any = create_model
    combined: type[Options] = make(name, __base__=bases, __doc__=f"``type: {tag_of(reader)}`` under ``sources``.", __module__=__name__)
    globals()[name] = combined  # pickle, which sends a recipe to other processes, looks a class up by its module and name
    return combined


@dataclass(frozen=True)
class Registered:
    """Marks a field whose type is one of the registered readers, chosen by its ``type``.

    kinds: base classes of the readers that the field accepts. tag: the only reader that it accepts.
    as_source: whether the field is an entry under ``sources:``, with policy and share.
    """

    kinds: tuple[type[Reader], ...] = (Reader,)
    tag: str | None = None
    as_source: bool = False

    def union(self) -> Any:
        """The field's type: a union of models with a discriminator, or one model.

        Raises RuntimeError where none is registered.
        """
        readers = [r for r in _readers if issubclass(r, self.kinds) and self.tag in {None, tag_of(r)}]
        if not readers:
            raise RuntimeError("no source is registered: import lcl_adapter.data.sources before a recipe is read")
        members = tuple(source_class(r) if self.as_source else r for r in readers)
        return members[0] if len(members) == 1 else Annotated[Union[members], Field(discriminator="type")]  # noqa: UP007

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler.generate_schema(self.union())


TaggedSource = Annotated[SourceOptions, Registered(as_source=True)]
TaggedClasses = Annotated[ClassReader, Registered((ClassReader,))]
TaggedParts = Annotated[PartReader, Registered((PartReader,))]
TaggedQuestions = Annotated[QuestionReader, Registered((QuestionReader,))]
TaggedBoxes = Annotated[ClassReader | PartReader, Registered((ClassReader, PartReader))]
IsekaiClasses = Annotated[ClassReader, Registered(tag="isekai")]
PopeQuestions = Annotated[QuestionReader, Registered(tag="pope")]
ShikraQuestions = Annotated[QuestionReader, Registered(tag="shikra")]
