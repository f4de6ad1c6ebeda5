"""``evaluate.suites``: what is measured, and how. Published protocols are presets (``suites.yaml``)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, model_validator

from lcl_adapter.errors import did_you_mean
from lcl_adapter.recipe.options import IntList, Options, Share, as_list
from lcl_adapter.recipe.sources import (
    IsekaiClasses,
    Names,
    PopeQuestions,
    ShikraQuestions,
    TaggedBoxes,
    TaggedClasses,
    TaggedParts,
    TaggedQuestions,
    Words,
)

Neighbours = Literal["easy", "hard"]
NewTokens = Annotated[int, Field(ge=1, le=2048, description="longest answer that is generated, in tokens; scored labels do not depend on it")]
Control = Literal["shuffled-names", "no-support"]


class LclSuite(Options):
    """Episodes on held-out classes: one line of the report for each number of shots and kind of neighbours.

    Chance is 1 / ways.
    """

    kind: Literal["lcl"]
    source: TaggedClasses
    ways: int = Field(2, ge=2, le=16)
    shots: IntList = [0, 1, 2, 4]
    neighbours: Annotated[list[Neighbours] | None, BeforeValidator(lambda v: v if v is None else as_list(v))] = Field(
        None, description="easy, hard, or both; by default both, or easy if the data does not say which classes are near"
    )
    names: Names = "random"
    episodes: int = Field(1024, ge=1)
    further_views: int = Field(0, ge=0, le=16)
    support_tokens: Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(as_list)] = Field(
        [], description="one line for each number of tokens of a picture that is shown with a label; by default as the adapter was trained"
    )
    new_tokens: NewTokens = 24


class ControlSuite(LclSuite):
    """Episodes whose support set has no information: its names are shuffled among its pictures, or it is left out."""

    kind: Literal["control"]  # type: ignore[assignment]
    control: Control
    shots: IntList = [2]


class ImageNet100Suite(Options):
    """LCL's test on ImageNet-100: classes 2k and 2k + 1 are compared.

    ``shots`` is per class; the paper's n is twice that.
    """

    kind: Literal["imagenet-100"]
    pairs: Path
    images: Path
    shots: IntList = [0, 1, 2, 3, 4, 5, 6, 7, 8]
    queries: int = Field(50, ge=1, description="queries of each class; the published test has 50")


class IsekaiSuite(Options):
    """LCL's test on unreal concepts and their real counterparts.

    ``shots`` is per concept; the paper's n is twice that.
    """

    kind: Literal["isekai"]
    source: IsekaiClasses
    shots: IntList = [1, 2, 3, 4, 5, 6, 7, 8]
    published: Literal["isekai-10", "isekai-pair"] | None = None


class OpenMiSuite(Options):
    """VL-ICL Bench's open MiniImageNet: made-up names of two classes, bound in the context; the name is generated.

    ``shots`` is per class, as in its published code.
    """

    kind: Literal["open-mi"]
    file: Path = Field(description="its query.json")
    images: Path = Field(description="the folder or zip that the names in the file are relative to")
    shots: IntList = [1, 2, 4, 5]
    new_tokens: NewTokens = 15


class InspectionSuite(Words):
    """Good or defective, on categories that were not trained on.

    With 0 references the question is asked without a support set.

    also: further forms. ``naming`` asks what is wrong (labelled defects are shown, the list is closed), ``localise``
    where (a box).
    """

    kind: Literal["inspection"]
    source: TaggedParts
    references: IntList = [0, 1, 2, 4]
    also: Annotated[list[Literal["naming", "localise"]], BeforeValidator(as_list)] = []
    also_shots: IntList = Field([1], description="number of references, and of photos of each defect, for the forms under `also`")
    episodes: int = Field(200, ge=1, description="episodes of each form under `also`")
    limit: int | None = Field(None, ge=1, description="at most this many photos of each category and label")
    new_tokens: NewTokens = 24
    published: Literal["mvtec", "visa"] | None = None


class ProductSuite(Words):
    """Two products are shown; the query is one of them, or neither."""

    kind: Literal["product"]
    source: TaggedClasses
    shots: IntList = [2]
    names: Names = "random"
    neither: Share = 0.5
    near_neither: Share = 0.5
    episodes: int = Field(600, ge=1)
    new_tokens: NewTokens = 24


class VqaSuite(Options):
    """Plain questions, with or without pictures. They measure retention.

    rule: the text is the answer; it contains one of the accepted answers; or VQAv2's rule against ten answers.
    """

    kind: Literal["vqa"]
    source: TaggedQuestions
    rule: Literal["exact", "contains", "vqav2"] = "exact"
    published: Literal["vqav2"] | None = None


class PerplexitySuite(Options):
    """Perplexity of a plain text: how well the model still predicts language. Lower is better.

    Every sentence is predicted after the earlier ones of its paragraph, outside of any chat. Blank lines divide paragraphs.
    """

    kind: Literal["perplexity"]
    file: Path = Path("photo:text/page.txt")


class PopeSuite(Options):
    """Is this object in the image? Accuracy, precision, recall, F1, and how often the answer is yes."""

    kind: Literal["pope"]
    source: PopeQuestions


class RecSuite(Options):
    """The box of an expression; correct if its IoU is over 0.5."""

    kind: Literal["rec"]
    source: ShikraQuestions

    @model_validator(mode="after")
    def _asks_for_boxes(self) -> Self:
        kind = getattr(self.source, "kind", None)
        if kind != "rec":
            raise ValueError(f"a rec suite asks for boxes; its source has `kind: {kind}`, which has none")
        return self


class LocateSuite(Words):
    """Few-shot detection: boxes of an object are shown, and its box in the query is asked for.

    Correct if the IoU is over 0.5.
    """

    kind: Literal["locate"]
    source: TaggedBoxes
    shots: IntList = [1, 2, 4]
    episodes: int = Field(256, ge=1)


class InstructSuite(Options):
    """Instructions, scored by exact match and ROUGE-L."""

    kind: Literal["instruct"]
    source: TaggedQuestions
    new_tokens: int = Field(128, ge=1, le=2048, description="longest answer, in tokens")


SuiteOptions = (
    LclSuite
    | ControlSuite
    | ImageNet100Suite
    | IsekaiSuite
    | OpenMiSuite
    | InspectionSuite
    | ProductSuite
    | VqaSuite
    | PerplexitySuite
    | PopeSuite
    | RecSuite
    | LocateSuite
    | InstructSuite
)
TaggedSuite = Annotated[SuiteOptions, Field(discriminator="kind")]
# Of these, model and tower are weighed: the answers are labels, and photos are shown
ValidationSuite = Annotated[LclSuite | InspectionSuite | ProductSuite, Field(discriminator="kind")]


@lru_cache(maxsize=1)
def presets() -> dict[str, dict[str, Any]]:
    """The shipped suites by name: published protocols over a standard folder layout (docs/data.md)."""
    suites: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "suites.yaml").read_text(encoding="utf-8"))
    return suites


def fill_presets(suites: object) -> object:
    """Replace ``preset: NAME`` by that suite's keys; a list of names stands for those presets.

    Raises ValueError for an unknown preset.
    """
    if isinstance(suites, list):
        suites = {str(name): {"preset": name} for name in suites}
    if not isinstance(suites, dict):
        return suites
    return {name: _from_preset(str(name), own) if isinstance(own, dict) and "preset" in own else own for name, own in suites.items()}


def _from_preset(name: str, own: dict[str, Any]) -> dict[str, Any]:
    """The preset's keys under the user's own. A source of another type replaces the preset's source as a whole."""
    known = presets()
    if not isinstance(own["preset"], str) or own["preset"] not in known:
        raise ValueError(f"no suite named {own['preset']!r}{did_you_mean(str(own['preset']), list(known))}; there are {', '.join(known)}")
    preset = known[own["preset"]]
    source, preset_source = own.get("source", {}), preset.get("source", {})
    if not isinstance(source, dict):
        raise ValueError(f"suite {name!r}: `source` is a mapping of keys, for instance {{path: mine}}")
    if source.get("type", preset_source.get("type")) == preset_source.get("type"):
        source = {**preset_source, **source}
    changes = {key: value for key, value in own.items() if key not in {"preset", "source"}}
    return {**preset, **changes, **({"source": source} if source else {})}
