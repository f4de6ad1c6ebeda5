"""The predictors of a server's models: one for each number of tokens that a picture of a support set has."""

from __future__ import annotations

from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.model import Base
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.serve.model import Model

VISION_CACHE_BYTES = 64 * 2**20  # vision features that are cached between requests
MAX_DECODED = 4  # decoded pictures in memory at a time; one padded to a square can have 200 MB


class Predictors:
    """Predictors of one base, with one cache of vision features.

    own: with the base's own tokens of a support picture. pack: questions in a batch.
    """

    def __init__(self, base: Base, pack: int) -> None:
        self.base = base
        self.own = Predictor(base, VisionFeatures(base, limit=VISION_CACHE_BYTES, batch=MAX_DECODED), batch_size=1, pack=pack)
        self._by_tokens: dict[int | None, Predictor] = {base.support_tokens: self.own}

    def of(self, model: Model) -> Predictor:
        """With this model's tokens of a support picture."""
        tokens = model.support_tokens
        if tokens not in self._by_tokens:
            base = self.base.with_support_tokens(tokens)
            self._by_tokens[tokens] = Predictor(base, self.own.vision, batch_size=1, pack=self.own.pack)
        return self._by_tokens[tokens]
