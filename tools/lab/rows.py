"""A training row of one episode, read by a model: where its pictures and answers are, and what the model makes of them.

The pictures of a row stand before their words, as in every shipped prompt.

Shapes: T tokens of a row, N pictures of a row, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
import torch

from lcl_adapter.base.adapter import load_adapter
from lcl_adapter.base.encoder import IGNORED
from lcl_adapter.base.model import Base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.episodes import Episode
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.packaged import adapter_folder
from lcl_adapter.recipe import load
from lcl_adapter.training.collate import Collator, Readable


@dataclass(frozen=True)
class Row:
    """An episode as the model read it.

    pictures: the place of each picture's first token. answers: of each query, the token that predicts its label's first one.
    labels: the row's learned tokens, IGNORED elsewhere. features: each picture's projected tokens, [P, D]. outputs: the model's.
    """

    episode: Episode
    pictures: list[int]
    answers: list[int]
    labels: list[int]
    features: tuple[torch.Tensor, ...]
    outputs: Any

    @property
    def shown(self) -> list[int]:
        """The class of each labelled picture, in the order of the row."""
        return [example.class_index for example in self.episode.support]

    @property
    def asked(self) -> list[int]:
        """The class of each query."""
        return [query.class_index for query in self.episode.queries]


def answers_in(labels_T: Sequence[int]) -> list[int]:
    """The place of each learned answer's first token, less one: the token that predicts it."""
    learned = [label != IGNORED for label in labels_T]
    return [place - 1 for place in range(1, len(learned)) if learned[place] and not learned[place - 1]]


def pictures_in(ids_T: Sequence[int], image_token: int, tokens: int) -> list[int]:
    """The place of each picture's first token."""
    return [place for place, token in enumerate(ids_T) if token == image_token][::tokens]


def adapted(adapter: str, recipe: str, source: str, overrides: Sequence[str]) -> tuple[Base, Collator]:
    """An adapter on its base in fp32, and the rows of one source of a recipe. Only the queries' answers are learned in them."""
    alone: Any = load(recipe, overrides)
    alone = load(recipe, [*overrides, *(f"sources.{name}=null" for name in alone.sources if name != source), f"sources.{source}.learn=query"])
    base, _ = load_adapter(adapter_folder(adapter), BaseRef(alone.base, "fp32", "cpu"))
    base.model.eval()
    return base, Collator(Mixture(alone), base.encoder(), Readable())


def rows(base: Base, collator: Collator, count: int, **options: Any) -> Iterator[Row]:
    """The first ``count`` rows, each read alone. options: of the model's forward, such as ``output_attentions``.

    Raises click.UsageError where a row is no episode.
    """
    vision, encoder = VisionFeatures(base), collator.encoder
    for index in range(count):
        episode = collator.mixture.draw(index)
        if not isinstance(episode, Episode):
            raise click.UsageError("this source has no episodes; name one that has")
        batch = collator([{"index": index}])
        labels_T = batch["labels"][0].tolist()
        mask = batch["attention_mask"]
        with torch.inference_mode():
            features = vision.projected_features(batch["pictures"])
            outputs = base.model(
                input_ids=batch["input_ids"],
                attention_mask=mask if mask.dim() == 2 else torch.where(mask, 0.0, torch.finfo(base.dtype).min).to(base.dtype),
                position_ids=batch["position_ids"],
                mm_encoder_outputs=features,
                use_cache=False,
                **options,
            )
        yield Row(
            episode,
            pictures_in(batch["input_ids"][0].tolist(), encoder.image_token_id, encoder.tokens_an_image),
            answers_in(labels_T)[-len(episode.queries) :],
            labels_T,
            features["image"].pooler_output,
            outputs,
        )
