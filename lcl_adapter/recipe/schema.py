"""A recipe's schema: every key there is, its type, its range, and the rules between keys.

Names under ``train`` are SFTConfig's own where SFTConfig has them. An unknown key is an error everywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Precision = Literal["fp32", "bf16", "nf4"]
PolicyName = Literal["2way-weight", "2way-random-shot", "n-way"]
Neighbours = Literal["easy", "hard"]
Names = Literal["random", "real", "mixed"]
Control = Literal["shuffled-names", "no-support"]


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


IntList = Annotated[list[Annotated[int, Field(ge=0, le=64)]], BeforeValidator(_as_list), Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Options(BaseModel):
    """Base of every part of a recipe: unknown keys refused, values fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataOptions(Options):
    """Where relative paths start (a folder, itself relative to where the command runs), and what a bad picture does."""

    root: Path = Path()
    on_fault: Literal["skip", "refuse"] = Field("skip", description="a bad picture: replace its row and count it, or stop")


class AdapterOptions(Options):
    """LoRA on the language model's attention and MLP projections, by full module path."""

    rank: int = Field(16, ge=1, le=512)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    projector: bool = Field(False, description="train the projector too, in full")
    rslora: bool = False
    dora: bool = False


class EpisodeOptions(Options):
    """How episodes are drawn from a pool of classes. ``shots`` is per class, so a 2-way 2-shot support set has 4 images."""

    policy: PolicyName = "n-way"
    ways: IntList = Field([2], description="classes an episode; of several one is drawn")
    shots: IntList = Field([2], description="labelled pictures a class; of several one is drawn")
    queries: int = Field(1, ge=1, le=32, description="queries behind one support set, each blind to the others")
    names: Names = Field("random", description="labels: random letters, the class's own name, or either, an episode at a time")
    real_names: Share = Field(0.2, description="with `names: mixed`, the share of episodes under real names")
    hard: Share = Field(0.5, description="share of episodes whose classes are near neighbours")
    learn: Literal["query", "repeated"] = Field("query", description="`repeated` also learns support labels seen before")
    other_hands: bool = Field(True, description="show the support set by other hands than the query's, where hands are known")
    further_views: int = Field(0, ge=0, le=16, description="how many further views of a picture may stand in when pictures run out")
    turned: Share = Field(0.0, description="share of episodes whose pictures are all turned by 0 to 3 quarters: a turned thing is a new class")
    augment: int = Field(0, ge=0, le=16, description="show each picture as it is or in one of so many further views, drawn anew each time")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.policy.startswith("2way") and self.ways != [2]:
            raise ValueError(f"policy {self.policy} has 2 ways; leave `ways` out, or use policy n-way")
        if self.policy.startswith("2way") and min(self.shots) < 1:
            raise ValueError(f"policy {self.policy} needs `shots` of 1 or more")
        if min(self.ways) < 2:
            raise ValueError("`ways` below 2: there is nothing to tell apart")
        if self.policy != "n-way" and self.names != "random":
            raise ValueError(f"policy {self.policy} names one class at random and the other by its own name; leave `names` out")
        return self


class PocketClasses(Options):
    """The emoji that ship with the package."""

    type: Literal["pocket"]
    split: Literal["train", "validation", "held_out"] = "train"


class ClassFolders(Options):
    """A user's ``photos/<class>/*.jpg``. ``hold_out`` sets classes apart by their names, the same ones in every run."""

    type: Literal["class-folder"]
    path: Path
    split: Literal["all", "train", "held_out"] = "all"
    hold_out: Share = 0.2


class LlavaJson(Options):
    """LLaVA's training JSON; ``images`` is a folder or a zip archive. ``limit`` takes the first records only."""

    type: Literal["llava-json"]
    file: Path
    images: Path
    on_fault: Literal["refuse", "skip"] = "refuse"
    limit: int | None = Field(None, ge=1)


class Shared(Options):
    """What every training source has: its part of the mixture."""

    share: float = Field(1.0, ge=0, allow_inf_nan=False)


class PocketSource(PocketClasses, EpisodeOptions, Shared):
    """``type: pocket`` under ``sources``."""


class ClassFolderSource(ClassFolders, EpisodeOptions, Shared):
    """``type: class-folder`` under ``sources``."""


class LlavaJsonSource(LlavaJson, Shared):
    """``type: llava-json`` under ``sources``. ``packed`` records share a row, each blind to the others."""

    packed: int = Field(1, ge=1, le=32)


SourceOptions = PocketSource | ClassFolderSource | LlavaJsonSource
ClassSourceOptions = PocketClasses | ClassFolders
TaggedSource = Annotated[SourceOptions, Field(discriminator="type")]
TaggedClasses = Annotated[ClassSourceOptions, Field(discriminator="type")]


class TrainOptions(Options):
    """SFTConfig's own names, and of ours ``projector_learning_rate``, ``feature_noise``, ``bucket``, ``feature_cache``, ``threads``."""

    max_steps: int = Field(300, ge=1)
    learning_rate: float = Field(2e-4, gt=0)
    projector_learning_rate: float | None = Field(None, gt=0, description="defaults to a tenth of learning_rate")
    per_device_train_batch_size: int = Field(1, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta2: float = Field(0.999, gt=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    gradient_checkpointing: bool = False
    logging_steps: int = Field(10, ge=1)
    save_steps: int = Field(100, ge=1)
    feature_noise: float = Field(0.0, ge=0, le=2, description="noise on frozen vision features, in their own standard deviations")
    save_total_limit: int = Field(2, ge=2, description="one would be deleted before the next is complete")
    dataloader_num_workers: int = Field(0, ge=0, le=16)
    seed: int = Field(0, ge=0)
    bucket: int = Field(8, ge=1, description="batches drawn together and sorted by length, so that little is padding")
    feature_cache: str = Field("1GB", pattern=r"^\d+(\.\d+)? ?(MB|GB|MiB|GiB)$", description="memory for frozen vision features")
    threads: int | None = Field(None, ge=1, description="CPU threads; all cores where left out")


class LclSuite(Options):
    """Episodes on held-out classes: one cell for every shot and neighbour; chance is 1 / ways."""

    kind: Literal["lcl"]
    source: TaggedClasses
    ways: int = Field(2, ge=2, le=16)
    shots: IntList = [0, 1, 2, 4]
    neighbours: Annotated[list[Neighbours], BeforeValidator(_as_list), Field(min_length=1)] = ["easy", "hard"]
    names: Names = "random"
    episodes: int = Field(1024, ge=1)
    further_views: int = Field(0, ge=0, le=16)


class ControlSuite(LclSuite):
    """Episodes whose support set tells nothing: names shuffled among its pictures, or no support at all."""

    kind: Literal["control"]  # type: ignore[assignment]
    control: Control
    shots: IntList = [2]


class VqaSuite(Options):
    """Plain questions, scored by exact match after lower-casing and trimming: does the adapter keep what the base could?"""

    kind: Literal["vqa"]
    source: LlavaJson


SuiteOptions = LclSuite | ControlSuite | VqaSuite
TaggedSuite = Annotated[SuiteOptions, Field(discriminator="kind")]


class EvaluateOptions(Options):
    """What is measured at the end of a run, base and adapter side by side."""

    suites: dict[str, TaggedSuite] = {}
    keep: dict[str, float] = Field({}, description="points a vqa suite may fall below the base before the run says so")
    batch_size: int = Field(32, ge=1)
    seed: int = Field(1, ge=0)

    @model_validator(mode="after")
    def _keep_names_suites(self) -> Self:
        for name in self.keep:
            if not isinstance(self.suites.get(name), VqaSuite):
                raise ValueError(f"`keep` names {name!r}, which is no vqa suite; there are {[n for n, s in self.suites.items() if s.kind == 'vqa']}")
        return self


class Recipe(Options):
    """One run, whole: base, precision, adapter, sources with shares, training, evaluation."""

    base: str
    precision: Precision = "fp32"
    wording: Literal["short", "lcl"] = "short"
    output: Path = Field(Path("runs/run"), description="the run's folder")
    data: DataOptions = DataOptions()
    adapter: AdapterOptions = AdapterOptions()
    sources: dict[str, TaggedSource] = Field(min_length=1)
    train: TrainOptions = TrainOptions()
    evaluate: EvaluateOptions = EvaluateOptions()

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if sum(s.share for s in self.sources.values()) <= 0:
            raise ValueError("all shares are 0: nothing would be trained")
        return self
