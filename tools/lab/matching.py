"""Which part of a model tells the classes of an episode apart: its pictures' features, its attention heads, or its answers.

    python -m tools.lab.matching photo-lcl recipes/photo.yaml lcl sources.lcl.shots=[1] sources.lcl.ways=[2] sources.lcl.hard=1

Episodes are drawn from one source of a recipe, as training draws them; overrides of the recipe say which. Printed are the share
of right queries of

    features    nearest class mean of the pictures' projected features, mean over a picture's tokens
    answers     first tokens of the episode's labels, compared behind the query (with the right label, as training reads a row)
    each head   the class whose labelled pictures, or the words beside them, get most of its attention from the last token before
                the answer

Heads are compared on the very queries that the table is of, so the best of many is a little too good. The pictures of a row
stand before their words, as in every shipped prompt.

Shapes: T tokens of a row, H heads, K classes of an episode.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
import torch
from torch.nn import functional

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
class Span:
    """A labelled picture's tokens in its row: ``[start, text)`` of the picture, ``[text, stop)`` of the words beside it."""

    start: int
    text: int
    stop: int


def answers_in(labels_T: Sequence[int]) -> list[int]:
    """The place of each learned answer's first token, less one: the token that predicts it."""
    learned = [label != IGNORED for label in labels_T]
    return [place - 1 for place in range(1, len(learned)) if learned[place] and not learned[place - 1]]


def pictures_in(ids_T: Sequence[int], image_token: int, tokens: int) -> list[int]:
    """The place of each picture's first token."""
    return [place for place, token in enumerate(ids_T) if token == image_token][::tokens]


def attended(attention_HT: torch.Tensor, spans: Sequence[tuple[Span, int]], classes: Sequence[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """``[H, K]``: the attention that each class's pictures get, and that the words beside them get."""
    for part in ("pictures", "words"):
        columns = []
        for index in classes:
            own = [span for span, class_index in spans if class_index == index]
            ranges = [(span.start, span.text) if part == "pictures" else (span.text, span.stop) for span in own]
            columns.append(torch.stack([attention_HT[:, start:stop].sum(-1) for start, stop in ranges]).mean(0))
        yield part, torch.stack(columns, 1)


class Matching:
    """Right queries of each way to judge, over episodes."""

    def __init__(self, base: Base, collator: Collator) -> None:
        self.base, self.collator = base, collator
        self.vision = VisionFeatures(base)
        self.right: defaultdict[str, list[bool]] = defaultdict(list)

    @torch.inference_mode()
    def add(self, index: int) -> None:
        """Judge the queries of one row. Raises click.UsageError where it is no episode."""
        episode = self.collator.mixture.draw(index)
        if not isinstance(episode, Episode):
            raise click.UsageError("this source has no episodes; name one that has")
        batch = self.collator([{"index": index}])
        ids_T, labels_T = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        encoder = self.collator.encoder
        starts = pictures_in(ids_T, encoder.image_token_id, encoder.tokens_an_image)
        shown = [example.class_index for example in episode.support]
        spans = [(Span(start, start + encoder.tokens_an_image, stop), own) for start, stop, own in zip(starts, starts[1:], shown, strict=False)]
        classes = sorted(set(shown))
        features = self.vision.projected_features(batch["pictures"])
        mask = batch["attention_mask"]
        outputs = self.base.model(
            input_ids=batch["input_ids"],
            attention_mask=mask if mask.dim() == 2 else torch.where(mask, 0.0, torch.finfo(self.base.dtype).min).to(self.base.dtype),
            position_ids=batch["position_ids"],
            mm_encoder_outputs=features,
            output_attentions=True,
            use_cache=False,
        )
        vectors_ND = functional.normalize(torch.stack([own_TD.float().mean(0) for own_TD in features["image"].pooler_output]), dim=-1)
        means_KD = torch.stack([vectors_ND[[n for n, own in enumerate(shown) if own == index]].mean(0) for index in classes])
        places = answers_in(labels_T)[-len(episode.queries) :]
        tokens = {query.label: labels_T[place + 1] for query, place in zip(episode.queries, places, strict=True)}
        for number, (query, place) in enumerate(zip(episode.queries, places, strict=True)):
            truth = classes.index(query.class_index)
            nearest = functional.normalize(means_KD, dim=-1) @ vectors_ND[len(shown) + number]
            self.right["features"].append(int(nearest.argmax()) == truth)
            if len(set(tokens.values())) == len(episode.labels):
                likely = max(tokens, key=lambda label: float(outputs.logits[0, place, tokens[label]]))
                self.right["answers"].append(likely == query.label)
            for layer, attention in enumerate(outputs.attentions):
                for part, sums_HK in attended(attention[0, :, place], spans, classes):
                    for head, chosen in enumerate(sums_HK.argmax(1).tolist()):
                        self.right[f"layer {layer}, head {head}, {part}"].append(chosen == truth)

    def table(self, heads: int) -> list[str]:
        """Lines: features, answers, and the best heads."""
        shares = {name: sum(right) / len(right) for name, right in self.right.items()}
        best = sorted((name for name in shares if name.startswith("layer")), key=lambda name: -shares[name])[:heads]
        return [f"{name:<28} {shares[name]:.3f}   n {len(self.right[name])}" for name in ("features", "answers", *best) if name in shares]


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.argument("adapter")
@click.argument("recipe")
@click.argument("source")
@click.argument("overrides", nargs=-1)
@click.option("--episodes", type=click.IntRange(1), default=40, show_default=True)
@click.option("--heads", type=click.IntRange(1), default=12, show_default=True, help="How many of the best heads are printed.")
def main(adapter: str, recipe: str, source: str, overrides: tuple[str, ...], episodes: int, heads: int) -> None:
    alone: Any = load(recipe, overrides)
    alone = load(recipe, [*overrides, *(f"sources.{name}=null" for name in alone.sources if name != source), f"sources.{source}.learn=query"])
    folder = adapter_folder(adapter)
    base, _ = load_adapter(folder, BaseRef(alone.base, "fp32", "cpu"))
    base.model.eval()
    base.llava.set_attn_implementation("eager")  # the others return no attention
    matching = Matching(base, Collator(Mixture(alone), base.encoder(), Readable()))
    for index in range(episodes):
        matching.add(index)
    click.echo("\n".join(matching.table(heads)))


if __name__ == "__main__":
    main()
