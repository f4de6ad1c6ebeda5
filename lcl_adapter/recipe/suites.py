"""``evaluate.suites``: what is measured, each on its own terms. A suite that a paper published is a preset (``suites.yaml``)."""

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
Control = Literal["shuffled-names", "no-support"]


class LclSuite(Options):
    """Episodes on held-out classes: one cell for every shot and neighbour; chance is 1 / ways."""

    kind: Literal["lcl"]
    source: TaggedClasses
    ways: int = Field(2, ge=2, le=16)
    shots: IntList = [0, 1, 2, 4]
    neighbours: Annotated[list[Neighbours] | None, BeforeValidator(lambda v: v if v is None else as_list(v))] = Field(
        None, description="easy, hard, or both; where left out: both, or easy where nothing says which classes are near"
    )
    names: Names = "random"
    episodes: int = Field(1024, ge=1)
    further_views: int = Field(0, ge=0, le=16)


class ControlSuite(LclSuite):
    """Episodes whose support set tells nothing: names shuffled among its pictures, or no support at all."""

    kind: Literal["control"]  # type: ignore[assignment]
    control: Control
    shots: IntList = [2]


class ImageNet100Suite(Options):
    """LCL's test on ImageNet-100: classes 2k and 2k + 1 oppose each other; ``shots`` is per class, the paper's n is twice that."""

    kind: Literal["imagenet-100"]
    pairs: Path
    images: Path
    shots: IntList = [0, 1, 2, 3, 4, 5, 6, 7, 8]
    queries: int = Field(50, ge=1, description="a class, as the published test has")


class IsekaiSuite(Options):
    """LCL's test on unreal concepts against their real counterparts; ``shots`` is per side, the paper's n is twice that."""

    kind: Literal["isekai"]
    source: IsekaiClasses
    shots: IntList = [1, 2, 3, 4, 5, 6, 7, 8]
    published: Literal["isekai-10", "isekai-pair"] | None = None


class InspectionSuite(Words):
    """Good or defective, on categories that were not trained on: 0 references is the plain question.

    ``also``: what is wrong with it (``naming``: labelled defects shown, a closed list), and where (``localise``: a box).
    """

    kind: Literal["inspection"]
    source: TaggedParts
    references: IntList = [0, 1, 2, 4]
    also: Annotated[list[Literal["naming", "localise"]], BeforeValidator(as_list)] = []
    also_shots: IntList = Field([1], description="references, and photos of each defect, shown for the forms under `also`")
    episodes: int = Field(200, ge=1, description="of each form under `also`")
    limit: int | None = Field(None, ge=1, description="at most so many photos of each category and label")
    published: Literal["mvtec", "visa"] | None = None


class ProductSuite(Words):
    """Two products are shown; the query is the one, the other, or neither."""

    kind: Literal["product"]
    source: TaggedClasses
    shots: IntList = [2]
    names: Names = "random"
    neither: Share = 0.5
    near_neither: Share = 0.5
    episodes: int = Field(600, ge=1)


class VqaSuite(Options):
    """Plain questions: exact match, or VQAv2's rule against ten answers. Does the adapter keep what the base could?"""

    kind: Literal["vqa"]
    source: TaggedQuestions
    rule: Literal["exact", "vqav2"] = "exact"
    published: Literal["vqav2"] | None = None


class PopeSuite(Options):
    """Is there such a thing in the image: accuracy, precision, recall, F1, and how often the answer is yes."""

    kind: Literal["pope"]
    source: PopeQuestions


class RecSuite(Options):
    """The box of an expression; right if its IoU is over 0.5."""

    kind: Literal["rec"]
    source: ShikraQuestions

    @model_validator(mode="after")
    def _asks_for_boxes(self) -> Self:
        kind = getattr(self.source, "kind", None)
        if kind != "rec":
            raise ValueError(f"a rec suite asks for boxes; its source has `kind: {kind}`, which has none")
        return self


class LocateSuite(Words):
    """Few-shot detection: boxes are shown, the same thing's box is asked; right if its IoU is over 0.5."""

    kind: Literal["locate"]
    source: TaggedBoxes
    shots: IntList = [1, 2, 4]
    episodes: int = Field(256, ge=1)


class InstructSuite(Options):
    """Instructions: exact answers, and ROUGE-L."""

    kind: Literal["instruct"]
    source: TaggedQuestions
    new_tokens: int = Field(128, ge=1, le=2048, description="how long an answer may be")


SuiteOptions = (
    LclSuite
    | ControlSuite
    | ImageNet100Suite
    | IsekaiSuite
    | InspectionSuite
    | ProductSuite
    | VqaSuite
    | PopeSuite
    | RecSuite
    | LocateSuite
    | InstructSuite
)
TaggedSuite = Annotated[SuiteOptions, Field(discriminator="kind")]


@lru_cache(maxsize=1)
def presets() -> dict[str, dict[str, Any]]:
    """The suites that ship by name: published protocols over a standard folder layout (docs/data.md)."""
    told: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "suites.yaml").read_text(encoding="utf-8"))
    return told


def filled(suites: object) -> object:
    """A list of preset names, or a mapping in which ``preset: NAME`` stands for that suite's keys."""
    if isinstance(suites, list):
        suites = {str(name): {"preset": name} for name in suites}
    if not isinstance(suites, dict):
        return suites
    known, made = presets(), {}
    for name, own in suites.items():
        if isinstance(own, dict) and "preset" in own:
            rest = {k: v for k, v in own.items() if k != "preset"}
            if not isinstance(own["preset"], str) or own["preset"] not in known:
                raise ValueError(f"no suite named {own['preset']!r}{did_you_mean(str(own['preset']), list(known))}; there are {', '.join(known)}")
            preset = known[own["preset"]]
            source = rest.pop("source", {})
            if not isinstance(source, dict):
                raise ValueError(f"suite {name!r}: `source` is a mapping of keys, for instance {{path: mine}}")
            own_source = preset.get("source", {})
            other = source.get("type", own_source.get("type")) != own_source.get("type")
            merged = source if other else {**own_source, **source}
            sources = {"source": merged} if merged else {}
            made[name] = {**preset, **rest, **sources}
        else:
            made[name] = own
    return made
