"""A model of the server: the base alone, or the base with one adapter."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from lcl_adapter.answering.api_types import JudgeName
from lcl_adapter.answering.judgement import Weighing
from lcl_adapter.base.model import SupportForm
from lcl_adapter.base.tower_space import TowerSpace
from lcl_adapter.errors import RequestError
from lcl_adapter.recipe.wording import Wording


@dataclass(frozen=True)
class Model:
    """A model that clients can name: the base alone, or the base with one adapter.

    adapter: PEFT's name for the adapter; it allows fewer characters than a client's name.
    identity: hash of the weights, base's and adapter's. A calibration belongs to one identity.
    form: in which the pictures of a support set are read.
    weighing, space: of judgements by model and tower; None where no weights were fitted, and the model judges alone.
    """

    name: str
    wording: Wording
    folder: Path | None = None
    adapter: str = ""
    identity: str = ""
    created: float = field(default_factory=time.time)
    weighing: Weighing | None = None
    space: TowerSpace | None = field(default=None, compare=False)
    form: SupportForm = field(default_factory=SupportForm)

    def judge(self, asked: JudgeName | None = None) -> JudgeName:
        """Who judges by a support set: by default model and tower, where there are weights for them.

        Raises RequestError where the tower is asked for and there are none.
        """
        weighed = self.weighing is not None and self.weighing.several is not None
        if asked in {"tower", "both"} and not weighed:
            raise RequestError(
                f"judge: {self.name!r} has no weights for {asked!r}, so only 'model' can judge. They are fitted where a recipe has suites under "
                "`evaluate.validation`."
            )
        return asked or ("both" if weighed else "model")
