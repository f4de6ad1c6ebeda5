"""A recipe's schema: all keys, their types and ranges, and the rules between keys.

An unknown key is an error everywhere. ``options`` has what all parts share; ``sources``, ``suites`` and ``training``
have the long lists.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from lcl_adapter.errors import did_you_mean
from lcl_adapter.recipe.options import Options, Share, Weight, as_list
from lcl_adapter.recipe.sources import Reader, TaggedSource, set_readers
from lcl_adapter.recipe.suites import PerplexitySuite, SuiteOptions, TaggedSuite, ValidationSuite, fill_presets
from lcl_adapter.recipe.training import TrainOptions as TrainOptions

Precision = Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4"]
WordingName = Literal["short", "lcl", "bare"]  # of an episode's sentences: data/conversations.py
QUANTISED = ("int8", "nf4")
Supports = Literal["ordered", "independent", "compressed"]  # how labelled pictures are read: base/encoder.py
Orientations = Literal[1, 2, 4, 8]  # of pictures: as they are; mirrored too; each also turned by half; by quarters too (EXIF's order)
Readings = Literal[1, 2, 3, 4]  # of a support set, one after the other
Attention = Literal["sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"]


class DataOptions(Options):
    """Where relative paths start, and what happens at a bad picture.

    ``root`` itself is relative to the working folder.
    """

    root: Path = Path()
    on_fault: Literal["skip", "refuse"] = Field("skip", description="at a bad picture: replace its row and count it, or stop")


class ImageTokens(Options):
    """How many tokens a picture has. The one that is asked about has all of them."""

    support: Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(lambda v: [] if v is None else as_list(v))] = Field(
        [],
        description="of a picture that is shown with a label, pooled from its grid of patches: 144, 64, 36 ... of 576; all by default. Of several "
        "numbers, each row of the training has one at random, and the number is chosen when asking",
    )

    @property
    def numbers(self) -> tuple[int, ...]:
        """From the largest on; empty for all tokens."""
        return tuple(sorted(set(self.support), reverse=True))

    @property
    def most(self) -> int | None:
        """The largest, with which rows are longest and the adapter is asked where nothing else is said; None for all tokens."""
        return max(self.numbers, default=None)


class AdapterOptions(Options):
    """LoRA on the language model's attention and MLP projections, by full module path."""

    rank: int = Field(16, ge=1, le=512)
    alpha: float = Field(32, gt=0, description="alpha / rank is the weight of the LoRA, of every projection")
    query_key_rank: int | None = Field(
        None, ge=1, le=512, description="another rank of the query and key projections, by which attention finds the most alike photo"
    )
    dropout: float = Field(0.0, ge=0, lt=1)
    projector: bool = Field(False, description="also train all weights of the projector")
    rslora: bool = False
    dora: bool = False
    pissa: bool = Field(False, description="start from the principal directions of the weights; saved as plain LoRA of twice the rank")

    @model_validator(mode="after")
    def _one_variant(self) -> Self:
        if self.pissa and (self.dora or self.rslora):
            raise ValueError("`pissa` cannot be combined with `dora` or `rslora`: leave them out")
        if self.pissa and self.query_key_rank is not None:
            raise ValueError("`pissa` cannot be combined with `query_key_rank`: leave one of them out")
        return self

    def rank_of(self, projection: str) -> int:
        """The rank of the LoRA of a projection such as ``q_proj``."""
        return self.query_key_rank or self.rank if projection in {"q_proj", "k_proj"} else self.rank


def _allowance(value: object) -> object:
    """A number of points, or a percentage as text. Raises ValueError for any other text."""
    if isinstance(value, str) and not re.fullmatch(r"\d+(\.\d+)?\s*%", value.strip()):
        try:
            return float(value)
        except ValueError as error:
            raise ValueError(f"{value!r} is neither points, for instance 1.0, nor a percentage, for instance 5%") from error
    return value.replace(" ", "") if isinstance(value, str) else value


Allowance = Annotated[float | str, BeforeValidator(_allowance)]


def amount_of(allowance: float | str) -> float:
    """The number of an allowance: points, or percent."""
    return float(allowance.rstrip("%")) if isinstance(allowance, str) else allowance


class EvaluateOptions(Options):
    """What is measured at the end of a run, base and adapter side by side.

    With ``every``, suites are measured during the run too.
    """

    suites: Annotated[dict[str, TaggedSuite], BeforeValidator(fill_presets)] = {}
    validation: Annotated[dict[str, ValidationSuite], BeforeValidator(fill_presets)] = Field(
        {},
        description="suites on classes that are neither trained on nor reported: the weights of model and tower in a judgement are fitted on them",
    )
    retention: dict[str, Allowance] = Field(
        {},
        description="points that a suite may fall below the base, or the percentage by which a perplexity may rise; the run fails if the "
        "interval of the fall is above",
    )
    every: int | None = Field(None, ge=1, description="steps between the measurements during the run")
    patience: int | None = Field(
        None, ge=1, description="measurements in a row without a better mean after which training ends; the run's adapter is then the best one"
    )
    during: list[str] = Field([], description="suites to measure during the run, beside those under `retention`; all if neither names any")
    during_limit: int = Field(200, ge=1, description="number of queries for each line of the report, during the run")
    batch_size: int = Field(32, ge=1)
    seed: int = Field(1, ge=0, lt=2**32)

    @field_validator("patience")
    @classmethod
    def _only_measured(cls, value: int | None, others: ValidationInfo) -> int | None:
        if value is not None and not (others.data.get("every", True) and others.data.get("suites", True)):
            raise ValueError("it counts the measurements during the run: set `every`, and `suites` to measure")
        return value

    @model_validator(mode="after")
    def _suites_exist(self) -> Self:
        for key in ("retention", "during"):
            for name in getattr(self, key):
                if name not in self.suites:
                    known = list(self.suites)
                    raise ValueError(f"`{key}` names {name!r}, which is no suite{did_you_mean(name, known)}; there are {', '.join(known) or 'none'}")
        for name, allowance in self.retention.items():
            relative = isinstance(self.suites[name], PerplexitySuite)
            if relative and not isinstance(allowance, str):
                raise ValueError(f"`retention` of {name!r}: a perplexity may rise by a percentage; write {name}: {allowance:g}%")
            if isinstance(allowance, str) and not relative:
                raise ValueError(f"`retention` of {name!r}: a share may fall by points; write {name}: {amount_of(allowance):g}")
        return self

    @property
    def watched(self) -> list[str]:
        """Suites that are measured during the run."""
        return (list(dict.fromkeys([*self.during, *self.retention])) or list(self.suites)) if self.every else []


class Recipe(Options):
    """One run: base, precision, adapter, sources with shares, training, evaluation."""

    base: str
    precision: Precision = Field("fp32", description="auto chooses by device and memory; int8 and nf4 quantise the language model only")
    attn_implementation: Attention = Field("sdpa", description="how attention is computed in training; flash_attention needs flash-attn and a GPU")
    vision_tower: str | None = Field(None, description="the vision tower's folder, if a base in the original layout does not contain it")
    tiles: bool = Field(False, description="LLaVA-NeXT and OneVision: read pictures in tiles at twice the size; about five times the tokens")
    image_tokens: ImageTokens = ImageTokens()
    supports: Supports = Field(
        "ordered",
        description="ordered: a labelled picture sees those before it, as in any chat; independent: it sees the instruction and itself, so a set "
        "has no order, and can grow and shrink by a picture; compressed: also, a question sees only the words beside it, so a set takes little "
        "memory",
    )
    orientations: Orientations = Field(
        1,
        description="how often a question about labelled pictures is asked, each time with all of them mirrored or turned alike; scores are means",
    )
    readings: Readings = Field(
        1,
        description="how often an ordered support set is read, one time after the other, before a question: the second time, each labelled picture "
        "sees the whole set",
    )
    wording: WordingName = "short"
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
        for key, names in (("sources", self.sources), ("evaluate.suites", self.evaluate.suites), ("evaluate.validation", self.evaluate.validation)):
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
        if self.adapter.pissa and self.near_base:
            raise ValueError(
                f"`adapter.pissa` changes the base's weights, so they have no distribution to retain: set sources.{self.near_base[0]}.retain: answers"
            )
        if self.readings > 1 and self.supports != "ordered":
            raise ValueError(f"`readings: {self.readings}` changes nothing where labelled pictures do not see each other: set `supports: ordered`")
        for start, shares in self.phases():
            if sum(shares.values()) <= 0:
                raise ValueError("all shares are 0: nothing would be trained" + (f" from {start:g} of the run on" if self.shares else ""))
        return self

    @property
    def near_base(self) -> list[str]:
        """Sources that stay near the base's own distribution instead of learning their tokens."""
        return [name for name, source in self.sources.items() if getattr(source, "retain", None) == "distribution"]

    @field_validator("orientations", "readings", mode="before")
    @classmethod
    def _a_number(cls, value: object, field: ValidationInfo) -> object:
        if isinstance(value, bool):  # YAML's `yes` equals 1
            choices = get_args(Orientations if field.field_name == "orientations" else Readings)
            raise ValueError(f"input should be {', '.join(map(str, choices[:-1]))} or {choices[-1]}")
        return value

    @property
    def most_shots(self) -> int | None:
        """Photos of a label that training shows together, at most; None where no source shows labelled photos."""
        return max((shots for source in self.sources.values() for shots in getattr(source, "shots", [])), default=None) or None

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
