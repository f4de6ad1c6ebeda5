"""A recipe's schema: all keys, their types and ranges, and the rules between keys.

Names under ``train`` are SFTConfig's own where SFTConfig has them. An unknown key is an error everywhere.
``options`` has what all parts share; ``sources`` and ``suites`` have the two long lists.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from lcl_adapter.amounts import memory_bytes
from lcl_adapter.errors import did_you_mean
from lcl_adapter.recipe.options import Options, Share, Weight
from lcl_adapter.recipe.sources import Reader, TaggedSource, set_readers
from lcl_adapter.recipe.suites import SuiteOptions, TaggedSuite, fill_presets

Precision = Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4"]
QUANTISED = ("int8", "nf4")


def _amount(text: str) -> str:
    memory_bytes(text)
    return text


class DataOptions(Options):
    """Where relative paths start, and what happens at a bad picture.

    ``root`` itself is relative to the working folder.
    """

    root: Path = Path()
    on_fault: Literal["skip", "refuse"] = Field("skip", description="at a bad picture: replace its row and count it, or stop")


class AdapterOptions(Options):
    """LoRA on the language model's attention and MLP projections, by full module path."""

    rank: int = Field(16, ge=1, le=512)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    projector: bool = Field(False, description="also train all weights of the projector")
    rslora: bool = False
    dora: bool = False
    pissa: bool = Field(False, description="start from the principal directions of the weights; saved as plain LoRA of twice the rank")

    @model_validator(mode="after")
    def _one_variant(self) -> Self:
        if self.pissa and (self.dora or self.rslora):
            raise ValueError("`pissa` cannot be combined with `dora` or `rslora`: leave them out")
        return self


class TrainOptions(Options):
    """SFTConfig's own names, and these that it does not have: ``projector_learning_rate``, ``feature_noise``,
    ``bucket``, ``feature_cache`` and ``threads``.
    """

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
    feature_noise: float = Field(0.0, ge=0, le=2, description="noise on frozen vision features, in standard deviations of the features")
    save_total_limit: int = Field(2, ge=2, description="2 or more: the old checkpoint must remain until the next is complete")
    dataloader_num_workers: int = Field(0, ge=0, le=16)
    seed: int = Field(0, ge=0, lt=2**32)
    bucket: int = Field(8, ge=1, description="number of batches drawn together and sorted by length, to reduce padding")
    feature_cache: Annotated[str, AfterValidator(_amount)] = Field("1GB", description="memory for frozen vision features")
    threads: int | None = Field(None, ge=1, description="CPU threads; all cores by default")


class EvaluateOptions(Options):
    """What is measured at the end of a run, base and adapter side by side.

    With ``every``, suites are measured during the run too.
    """

    suites: Annotated[dict[str, TaggedSuite], BeforeValidator(fill_presets)] = {}
    retention: dict[str, float] = Field(
        {}, description="points that a suite may fall below the base; the run fails if the interval of its fall is above"
    )
    every: int | None = Field(None, ge=1, description="steps between the measurements during the run")
    during: list[str] = Field([], description="suites to measure during the run, beside those under `retention`; all if neither names any")
    during_limit: int = Field(200, ge=1, description="number of queries for each line of the report, during the run")
    batch_size: int = Field(32, ge=1)
    seed: int = Field(1, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _suites_exist(self) -> Self:
        for key in ("retention", "during"):
            for name in getattr(self, key):
                if name not in self.suites:
                    known = list(self.suites)
                    raise ValueError(f"`{key}` names {name!r}, which is no suite{did_you_mean(name, known)}; there are {', '.join(known) or 'none'}")
        return self

    @property
    def watched(self) -> list[str]:
        """Suites that are measured during the run."""
        return (list(dict.fromkeys([*self.during, *self.retention])) or list(self.suites)) if self.every else []


class Recipe(Options):
    """One run: base, precision, adapter, sources with shares, training, evaluation."""

    base: str
    precision: Precision = Field("fp32", description="auto chooses by device and memory; int8 and nf4 quantise the language model only")
    vision_tower: str | None = Field(None, description="the vision tower's folder, if a base in the original layout does not contain it")
    tiles: bool = Field(False, description="LLaVA-NeXT and OneVision: read pictures in tiles at twice the size; about five times the tokens")
    wording: Literal["short", "lcl"] = "short"
    output: Path = Field(Path("runs/run"), description="the run's folder")
    data: DataOptions = DataOptions()
    adapter: AdapterOptions = AdapterOptions()
    sources: dict[str, TaggedSource] = Field(min_length=1)
    shares: dict[Share, dict[str, Weight]] = Field(
        {}, description="a curriculum: from this part of the run on (0 to 1), these shares replace those of the sources"
    )
    train: TrainOptions = TrainOptions()
    evaluate: EvaluateOptions = Field(default_factory=EvaluateOptions)

    @model_validator(mode="after")
    def _names_and_shares(self) -> Self:
        for key, names in (("sources", self.sources), ("evaluate.suites", self.evaluate.suites)):
            unfit = [name for name in names if not re.fullmatch(r"\w[\w .+-]*", name)]
            if unfit:
                raise ValueError(f"`{key}`: the name {unfit[0]!r} may hold letters, digits, spaces and . _ + - only: files are named after it")
        for start, shares in self.shares.items():
            for name in shares:
                if name not in self.sources:
                    known = list(self.sources)
                    raise ValueError(f"`shares` from {start:g} on: no source {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
        if self.adapter.pissa and (self.precision in QUANTISED or self.evaluate.every):
            raise ValueError(
                "`adapter.pissa` changes the base's weights during training: set a precision of 16 bits or more, and no `evaluate.every`"
            )
        for start, shares in self.phases():
            if sum(shares.values()) <= 0:
                raise ValueError("all shares are 0: nothing would be trained" + (f" from {start:g} of the run on" if self.shares else ""))
        return self

    def phases(self) -> list[tuple[float, dict[str, float]]]:
        """(start, shares) of each phase; ``start`` is a part of the run, 0 to 1.

        The sources' own shares hold until the first change.
        """
        own = {n: s.share for n, s in self.sources.items()}
        phases = [(start, {**own, **shares}) for start, shares in sorted(self.shares.items())]
        return phases if phases and phases[0][0] == 0 else [(0.0, own), *phases]


def register_sources(readers: tuple[type[Reader], ...]) -> None:
    """Make these readers the types that ``sources:`` and the suites accept.

    ``lcl_adapter.data.sources`` calls this with its table.
    """
    set_readers(readers)
    for model in (*get_args(SuiteOptions), EvaluateOptions, Recipe):
        if model.__pydantic_complete__:  # built with another table
            model.model_rebuild(force=True)
