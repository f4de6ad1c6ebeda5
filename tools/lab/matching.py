"""Which part of a model tells the classes of an episode apart: its pictures' features, its attention heads, or its answers.

    python -m tools.lab.matching photo-lcl recipes/photo.yaml lcl sources.lcl.shots=[1] sources.lcl.ways=[2] sources.lcl.hard=1

Episodes are drawn from one source of a recipe, as training draws them; overrides of the recipe say which. Printed are the share
of right queries of

    features    nearest class mean of the pictures' projected features, mean over a picture's tokens
    answers     first tokens of the episode's labels, compared behind the query (with the right label, as training reads a row)
    each head   the class whose labelled pictures, or the words beside them, get most of its attention from the last token before
                the answer

Heads are compared on the very queries that the table is of, so the best of many is a little too good.

Shapes: T tokens of a row, H heads, K classes of an episode.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import click
import torch
from torch.nn import functional

from tools.lab.rows import Row, adapted, rows


@dataclass(frozen=True)
class Span:
    """A labelled picture's tokens in its row: ``[start, text)`` of the picture, ``[text, stop)`` of the words beside it."""

    start: int
    text: int
    stop: int


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

    def __init__(self, tokens_an_image: int) -> None:
        self.tokens_an_image = tokens_an_image
        self.right: defaultdict[str, list[bool]] = defaultdict(list)

    def add(self, row: Row) -> None:
        """Judge the queries of one row, which was read with ``output_attentions``."""
        shown, starts = row.shown, row.pictures
        spans = [(Span(start, start + self.tokens_an_image, stop), own) for start, stop, own in zip(starts, starts[1:], shown, strict=False)]
        classes = sorted(set(shown))
        vectors_ND = functional.normalize(torch.stack([own_TD.float().mean(0) for own_TD in row.features]), dim=-1)
        means_KD = torch.stack([vectors_ND[[n for n, own in enumerate(shown) if own == index]].mean(0) for index in classes])
        queries = row.episode.queries
        tokens = {query.label: row.labels[place + 1] for query, place in zip(queries, row.answers, strict=True)}
        for number, (query, place) in enumerate(zip(queries, row.answers, strict=True)):
            truth = classes.index(query.class_index)
            nearest = functional.normalize(means_KD, dim=-1) @ vectors_ND[len(shown) + number]
            self.right["features"].append(int(nearest.argmax()) == truth)
            if len(set(tokens.values())) == len(row.episode.labels):
                likely = max(tokens, key=lambda label: float(row.outputs.logits[0, place, tokens[label]]))
                self.right["answers"].append(likely == query.label)
            for layer, attention in enumerate(row.outputs.attentions):
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
    base, collator = adapted(adapter, recipe, source, overrides)
    base.llava.set_attn_implementation("eager")  # the others return no attention
    matching = Matching(collator.encoder.tokens_an_image)
    for row in rows(base, collator, episodes, output_attentions=True):
        matching.add(row)
    click.echo("\n".join(matching.table(heads)))


if __name__ == "__main__":
    main()
