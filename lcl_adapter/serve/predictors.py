"""The predictors of a server's models: one for each form in which a support set is read."""

from __future__ import annotations

from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.model import Base, SupportForm
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.serve.model import Model

VISION_CACHE_BYTES = 64 * 2**20  # vision features that are cached between requests
MAX_DECODED = 4  # decoded pictures in memory at a time; one padded to a square can have 200 MB


class Predictors:
    """Predictors of one base, with one cache of vision features.

    own: in the base's own form. pack: questions in a batch.
    """

    def __init__(self, base: Base, pack: int) -> None:
        self.base = base
        self.own = Predictor(base, VisionFeatures(base, limit=VISION_CACHE_BYTES, batch=MAX_DECODED), batch_size=1, pack=pack)
        self._by_form: dict[SupportForm, Predictor] = {base.form: self.own}

    def of(self, model: Model) -> Predictor:
        """With this model's form of a support set."""
        if model.form not in self._by_form:
            self._by_form[model.form] = Predictor(self.base.with_supports(*model.form), self.own.vision, batch_size=1, pack=self.own.pack)
        return self._by_form[model.form]
