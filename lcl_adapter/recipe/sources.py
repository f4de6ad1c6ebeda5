"""``sources``: what is read (a reader), what is made of it (a policy), and its part of the mixture (a share).

A reader is used by suites as well, so that what is trained and what is measured are read the same way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from lcl_adapter.amounts import memory_bytes
from lcl_adapter.recipe.options import IntList, Options, Share, Weight, as_list

PolicyName = Literal["2way-weight", "2way-random-shot", "2way-ref", "ref-or-weight", "jigsaw", "n-way", "product", "locate"]
InspectionPolicy = Literal["inspection", "locate"]
InspectionForm = Literal["plain", "one-class", "two-way", "naming", "localise"]
Names = Literal["random", "real", "mixed"]
Split = Literal["all", "train", "held_out"]
Language = Literal["en", "ja"]


def _words(value: object) -> object:
    """YAML reads a bare yes or no as true or false; in a list of answers the words are meant."""
    return [{True: "yes", False: "no"}.get(v, v) if isinstance(v, bool) else v for v in value] if isinstance(value, list) else value


Columns = Annotated[list[str], BeforeValidator(as_list), Field(min_length=1)]
Languages = Annotated[list[Language], BeforeValidator(as_list), Field(min_length=1)]


class Reader(Options):
    """Every reader: whether a bad record stops the run or is left out and counted."""

    on_fault: Literal["refuse", "skip"] = Field("refuse", description="bad records: list them and stop, or leave them out and count them")


class HeldOut(Reader):
    """Classes set apart by their names, the same ones in every run."""

    split: Split = "all"
    hold_out: Share = 0.2

    @model_validator(mode="after")
    def _split_is_said(self) -> Self:
        if self.split == "all" and self.hold_out != HeldOut.model_fields["hold_out"].default:
            raise ValueError("`hold_out` without `split` holds nothing out: set `split: train` here and `split: held_out` in the suite")
        return self


# --- readers of classes of pictures


class PocketClasses(Options):
    """The emoji that ship with the package."""

    type: Literal["pocket"]
    split: Literal["train", "validation", "held_out"] = "train"


class ClassFolders(HeldOut):
    """A user's ``photos/<class>/*.jpg``, a folder or a zip archive; ``boxes.jsonl`` in it may say where things are."""

    type: Literal["class-folder"]
    path: Path


class Manifest(HeldOut):
    """A product catalogue: CSV, TSV, JSON Lines or COCO JSON, with a column map. ``where`` keeps rows of one value."""

    type: Literal["manifest"]
    file: Path
    images: Path
    columns: dict[Literal["image", "class", "group", "artist", "box"], Columns] = {"image": ["image"], "class": ["class"]}
    where: dict[str, str | int] = {}
    lookup: Path | None = Field(None, description="a CSV with image_id and path, where `image` is an id (ABO)")

    @model_validator(mode="after")
    def _mapped(self) -> Self:
        missing = [c for c in ("image", "class") if c not in self.columns]
        several = [c for c, names in self.columns.items() if c != "image" and len(names) > 1]
        if several:
            raise ValueError(f"`columns`: {several[0]} is one column; only `image` may be several")
        if missing:
            raise ValueError(f"`columns` must say which column is {' and which is '.join(missing)}")
        return self


class ImageNetLcl(Reader):
    """LCL's ``train900_pairs.jsonl`` over ImageNet's folder or archive; neighbours as it ranks them."""

    type: Literal["imagenet-lcl"]
    pairs: Path
    images: Path


class Isekai(Reader):
    """ISEKAI-10 or ISEKAI-pair: unreal concepts and their real counterparts."""

    type: Literal["isekai"]
    file: Path
    images: Path


class ShikraBoxes(Reader):
    """Shikra's REC records as classes with boxes: those of one expression are one class."""

    type: Literal["shikra-boxes"]
    file: Path
    images: Path


class HfClasses(HeldOut):
    """A dataset that ``datasets`` saved to disk, one row a picture."""

    type: Literal["hf-classes"]
    path: Path
    columns: dict[Literal["image", "class", "group"], str] = {"image": "image", "class": "label"}


# --- readers of parts to inspect


class Parts(HeldOut):
    """Categories are trained on or held out; name those held out, or give a share."""

    path: Path
    held_out: Annotated[list[str], BeforeValidator(as_list)] = []

    @model_validator(mode="after")
    def _named_for_a_split(self) -> Self:
        if self.split == "all" and self.held_out:
            raise ValueError("`held_out` without `split` holds nothing out: set `split: train` here and `split: held_out` in the suite")
        return self


class Mvtec(Parts):
    """MVTec AD's tree, or anything laid out like it, a folder or a zip archive."""

    type: Literal["mvtec"]


class Visa(Parts):
    """VisA as it is published."""

    type: Literal["visa"]


# --- readers of questions


class LlavaJson(Reader):
    """LLaVA's training JSON (a list or JSON Lines); ``images`` is a folder or a zip archive. ``limit`` takes the first records only."""

    type: Literal["llava-json"]
    file: Path
    images: Path
    limit: int | None = Field(None, ge=1)


class LlavaQuestions(Reader):
    """LLaVA's question and answer JSON Lines, joined by question_id. ``closed``: the only answers there may be."""

    type: Literal["llava-questions"]
    file: Path
    answers: Path
    images: Path
    closed: Annotated[list[str], BeforeValidator(_words)] = []
    limit: int | None = Field(None, ge=1)


class VqaV2(Reader):
    """VQAv2's questions and annotations. ``image_name`` is a pattern, ``COCO_val2014_{image_id:012}.jpg`` where left out."""

    type: Literal["vqav2"]
    questions: Path
    annotations: Path
    images: Path
    image_name: str = ""
    limit: int | None = Field(None, ge=1)


class Pope(Reader):
    """POPE's questions: is there such a thing in the image, yes or no."""

    type: Literal["pope"]
    file: Path
    images: Path
    limit: int | None = Field(None, ge=1)


class Shikra(Reader):
    """Shikra's JSON Lines of one kind; ``rec`` asks for a box as text."""

    type: Literal["shikra"]
    file: Path
    images: Path
    kind: Literal["rec", "vqa", "gqa", "caption"] = "rec"
    templates: Path | None = None
    limit: int | None = Field(None, ge=1)


class HfQuestions(Reader):
    """A dataset that ``datasets`` saved to disk, one row a question."""

    type: Literal["hf-questions"]
    path: Path
    columns: dict[Literal["question", "answer", "image"], str] = {"question": "question", "answer": "answer"}
    limit: int | None = Field(None, ge=1)


class Shards(Reader):
    """WebDataset shards of questions, in a folder or anywhere that fsspec reads (s3://, https://, …); more than a disk holds."""

    type: Literal["shards"]
    path: Path | None = Field(None, description="a folder of *.tar")
    urls: str = Field("", description="or where they are: https://host/llava-{000000..000663}.tar")
    index: Path | None = Field(None, description="how many samples each has, as WebDataset's `widsindex create` writes it; needed with `urls`")
    cache: Path = Field(Path("shards-cache"), description="with `urls`: the folder they are fetched into")
    keep: str = Field("20GB", description="with `urls`: how much of them lies there at a time")
    mixed: int = Field(4, ge=1, description="shards whose samples are mixed; each is fetched once a pass where `keep` holds so many")
    on_fault: Literal["refuse", "skip"] = Field("skip", description="a bad sample is known when it is read: leave it out and count it, or stop")
    limit: int | None = Field(None, ge=1)

    @field_validator("keep")
    @classmethod
    def _amount(cls, keep: str) -> str:
        memory_bytes(keep)
        return keep

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (not self.urls):
            raise ValueError("give `path`, a folder of shards, or `urls`, where they are")
        return self


ClassReader = PocketClasses | ClassFolders | Manifest | ImageNetLcl | Isekai | ShikraBoxes | HfClasses
QuestionReader = LlavaJson | LlavaQuestions | VqaV2 | Pope | Shikra | HfQuestions | Shards
PartReader = Mvtec | Visa


# --- policies


class Words(Options):
    """Which phrasings are used: a template file of one's own, and its languages."""

    templates: Path | None = Field(None, description="a file like templates/phrases.yaml; the tasks it has replace the shipped ones")
    languages: Languages = ["en"]


class EpisodeOptions(Words):
    """How episodes are drawn from a pool of classes. ``shots`` is per class, so a 2-way 2-shot support set has 4 images."""

    POLICIES_OF: ClassVar[dict[str, tuple[str, ...]]] = {
        "neither": ("product",),
        "near_neither": ("product",),
        "plain": ("product",),
        "tiles": ("jigsaw",),
        "ways": ("n-way",),
        "augment": ("n-way", "2way-weight", "2way-random-shot", "2way-ref", "ref-or-weight"),
        "turned": ("n-way", "2way-weight", "2way-random-shot", "2way-ref", "ref-or-weight", "product"),
        "hard": ("n-way", "product"),
    }

    policy: PolicyName = "n-way"
    ways: IntList = Field([2], description="classes an episode; of several one is drawn")
    shots: IntList = Field([2], description="labelled pictures a class; of several one is drawn")
    queries: int = Field(1, ge=1, le=32, description="queries behind one support set, each blind to the others")
    names: Names = Field("random", description="labels: random letters, the class's own name, or either, an episode at a time")
    real_names: Share = Field(0.2, description="with `names: mixed`, the share of episodes under real names")
    hard: Share = Field(0.5, description="share of episodes whose classes are near neighbours")
    learn: Literal["query", "repeated"] = Field("query", description="`repeated` also learns support labels seen before")
    other_artists: bool = Field(True, description="show support pictures by other artists than the query's, where artists are known")
    further_views: int = Field(0, ge=0, le=16, description="how many further views of a picture may stand in when pictures run out")
    turned: Share = Field(0.0, description="share of episodes whose pictures are all turned by 0 to 3 quarters: a turned thing is a new class")
    augment: int = Field(0, ge=0, le=16, description="show each picture as it is or in one of so many further views, drawn anew each time")
    neither: Share = Field(0.5, description="policy product: share of queries that are neither of the two products shown")
    near_neither: Share = Field(0.5, description="policy product: of those, the share drawn from near classes")
    plain: Share = Field(0.0, description="policy product: share of rows that ask for a product's name with nothing shown before")
    tiles: IntList = Field([4, 6, 9, 12, 16], description="policy jigsaw: pieces an image is cut into; of several one is drawn")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.policy != "n-way" and self.ways != [2]:
            raise ValueError(f"policy {self.policy} has 2 ways or none; leave `ways` out, or use policy n-way")
        if self.policy != "n-way" and self.policy != "jigsaw" and min(self.shots) < 1:
            raise ValueError(f"policy {self.policy} needs `shots` of 1 or more")
        if min(self.ways) < 2:
            raise ValueError("`ways` below 2: there is nothing to tell apart")
        if self.policy not in {"n-way", "product"} and self.names != "random":
            raise ValueError(f"policy {self.policy} names its classes its own way; leave `names` out")
        unfit = [t for t in self.tiles if t not in {4, 6, 9, 12, 16}]
        if unfit:
            raise ValueError(f"`tiles` of {unfit[0]}: an image is cut into 4, 6, 9, 12 or 16 pieces")
        for key, policies in self.POLICIES_OF.items():
            if self.policy not in policies and getattr(self, key) != EpisodeOptions.model_fields[key].default:
                raise ValueError(f"`{key}` belongs to policy {' or '.join(policies)}, not to {self.policy}")
        return self


class InspectionOptions(Words):
    """How parts are shown and asked about. ``shots`` are reference photos; with labelled defects, so many of each label."""

    policy: InspectionPolicy = "inspection"
    forms: dict[InspectionForm, Weight] = Field({"one-class": 1.0}, min_length=1, description="what is asked, and how often")
    shots: IntList = Field([1, 2], description="reference photos; of several one is drawn")
    queries: int = Field(1, ge=1, le=32, description="queries behind one support set, each blind to the others")
    defective: Share = Field(0.5, description="share of queries that have a defect")
    random_names: Share = Field(0.0, description="forms two-way and naming: share of episodes whose labels are random letters")
    learn: Literal["query", "repeated"] = "query"
    turned: Share = Field(0.0, description="share of episodes whose pictures are all turned by 0 to 3 quarters")

    @model_validator(mode="after")
    def _some_form(self) -> Self:
        if sum(self.forms.values()) <= 0:
            raise ValueError("all `forms` are 0: nothing would be asked")
        if min(self.shots) < 1:
            raise ValueError("`shots` below 1: ask without references with form plain")
        return self


class Shared(Options):
    """What every training source has: its part of the mixture, and what happens when it has no more."""

    share: Weight = 1.0
    cap: int | None = Field(None, ge=1, description="at most so many rows of it in a run; its share then goes to the others")


class QuestionOptions(Shared):
    """``packed`` records share a row, each blind to the others."""

    packed: int = Field(1, ge=1, le=32)
    at_end: Literal["repeat", "end"] = Field("repeat", description="gone through once: again in another order, or no more of them")


class PocketSource(PocketClasses, EpisodeOptions, Shared):
    """``type: pocket`` under ``sources``."""


class ClassFolderSource(ClassFolders, EpisodeOptions, Shared):
    """``type: class-folder`` under ``sources``."""


class ManifestSource(Manifest, EpisodeOptions, Shared):
    """``type: manifest`` under ``sources``."""


class ImageNetSource(ImageNetLcl, EpisodeOptions, Shared):
    """``type: imagenet-lcl`` under ``sources``."""


class IsekaiSource(Isekai, EpisodeOptions, Shared):
    """``type: isekai`` under ``sources``."""


class ShikraBoxesSource(ShikraBoxes, EpisodeOptions, Shared):
    """``type: shikra-boxes`` under ``sources``."""


class HfClassesSource(HfClasses, EpisodeOptions, Shared):
    """``type: hf-classes`` under ``sources``."""


class MvtecSource(Mvtec, InspectionOptions, Shared):
    """``type: mvtec`` under ``sources``."""


class VisaSource(Visa, InspectionOptions, Shared):
    """``type: visa`` under ``sources``."""


class LlavaJsonSource(LlavaJson, QuestionOptions):
    """``type: llava-json`` under ``sources``."""


class LlavaQuestionsSource(LlavaQuestions, QuestionOptions):
    """``type: llava-questions`` under ``sources``."""


class VqaV2Source(VqaV2, QuestionOptions):
    """``type: vqav2`` under ``sources``."""


class PopeSource(Pope, QuestionOptions):
    """``type: pope`` under ``sources``."""


class ShikraSource(Shikra, QuestionOptions):
    """``type: shikra`` under ``sources``."""


class HfQuestionsSource(HfQuestions, QuestionOptions):
    """``type: hf-questions`` under ``sources``."""


class ShardsSource(Shards, QuestionOptions):
    """``type: shards`` under ``sources``."""


SourceOptions = (
    PocketSource
    | ClassFolderSource
    | ManifestSource
    | ImageNetSource
    | IsekaiSource
    | ShikraBoxesSource
    | HfClassesSource
    | MvtecSource
    | VisaSource
    | LlavaJsonSource
    | LlavaQuestionsSource
    | VqaV2Source
    | PopeSource
    | ShikraSource
    | HfQuestionsSource
    | ShardsSource
)
AnyReader = ClassReader | PartReader | QuestionReader
TaggedSource = Annotated[SourceOptions, Field(discriminator="type")]
TaggedClasses = Annotated[ClassReader, Field(discriminator="type")]
TaggedParts = Annotated[PartReader, Field(discriminator="type")]
TaggedQuestions = Annotated[QuestionReader, Field(discriminator="type")]
TaggedBoxes = Annotated[ClassReader | PartReader, Field(discriminator="type")]
