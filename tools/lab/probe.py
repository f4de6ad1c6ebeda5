"""How exactly a picture is known, layer by layer, at the places where a model compares it: by linear probes.

    python -m tools.lab.probe photo-lcl recipes/photo.yaml lcl sources.lcl.shots=[2] sources.lcl.ways=[2] sources.lcl.hard=1 \\
        --test sources.lcl.file=photo:real.csv --test sources.lcl.images=photo:real.zip --test sources.lcl.where={}

A ridge regression from the hidden states at a place to the picture's last projected token (of unit length, on its first 64
principal directions) is fitted on the episodes of the recipe, at each place on as many states, and tested on those of the recipe
with the overrides of --test too.
Places: the picture's last token, the one behind it, and the token that predicts a query's answer, where all that is compared with
the labelled pictures must have been copied to. Printed for each layer: the explained variance at each place, and the share of
right queries by the nearest class mean of what is decoded, at a place of the queries against a place of the labelled pictures.

Shapes: N pictures, D width of the language model, C directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import click
import torch
from torch.nn import functional

from tools.lab.rows import Row, adapted, rows

DIRECTIONS = 64
RIDGE = 1e-2  # of the mean variance of a hidden state
PICTURE, BEHIND, ANSWER = "picture", "behind", "answer"
COMPARED = ((PICTURE, PICTURE), (PICTURE, ANSWER), (BEHIND, ANSWER))  # a place of the labelled pictures, one of the queries


@dataclass(frozen=True)
class Probed:
    """One episode: hidden states [layers, N, D] at the labelled pictures' places and the queries', and every picture's token [N, D]."""

    hidden: dict[str, torch.Tensor]
    tokens: torch.Tensor
    shown: list[int]
    asked: list[int]

    @staticmethod
    def of(row: Row, tokens_an_image: int) -> Probed:
        states = torch.stack([layer[0] for layer in row.outputs.hidden_states])
        last = [place + tokens_an_image - 1 for place in row.pictures]
        hidden = {PICTURE: states[:, last], BEHIND: states[:, [place + 1 for place in last[: len(row.shown)]]], ANSWER: states[:, row.answers]}
        tokens_ND = torch.stack([functional.normalize(own_TD[-1].float(), dim=-1) for own_TD in row.features])
        return Probed({name: part.half() for name, part in hidden.items()}, tokens_ND, row.shown, row.asked)

    def targets(self, place: str) -> torch.Tensor:
        """The tokens of the pictures that a place is of."""
        support = len(self.shown)
        return {PICTURE: self.tokens, BEHIND: self.tokens[:support], ANSWER: self.tokens[support:]}[place]


class Probe:
    """A linear map from hidden states to pictures' tokens, fitted in closed form."""

    def __init__(self, states_ND: torch.Tensor, targets_NC: torch.Tensor) -> None:
        states_ND = functional.normalize(states_ND.float(), dim=-1)
        self.state_mean, self.target_mean = states_ND.mean(0), targets_NC.mean(0)
        centred = states_ND - self.state_mean
        squares_DD = centred.T @ centred
        squares_DD += RIDGE * squares_DD.diagonal().mean() * torch.eye(len(squares_DD))
        self.weight_DC = torch.linalg.solve(squares_DD, centred.T @ (targets_NC - self.target_mean))

    def __call__(self, states_ND: torch.Tensor) -> torch.Tensor:
        return (functional.normalize(states_ND.float(), dim=-1) - self.state_mean) @ self.weight_DC + self.target_mean


def explained(decoded_NC: torch.Tensor, targets_NC: torch.Tensor) -> float:
    """R squared."""
    return 1 - float((decoded_NC - targets_NC).square().sum() / (targets_NC - targets_NC.mean(0)).square().sum())


def right(support_NC: torch.Tensor, queries_NC: torch.Tensor, shown: Sequence[int], asked: Sequence[int]) -> list[bool]:
    """Whether the nearest class mean is the query's, for each query."""
    classes = sorted(set(shown))
    vectors = functional.normalize(support_NC, dim=-1)
    means = torch.stack([vectors[[n for n, own in enumerate(shown) if own == index]].mean(0) for index in classes])
    nearest = (queries_NC @ functional.normalize(means, dim=-1).T).argmax(-1).tolist()
    return [classes[n] == own for n, own in zip(nearest, asked, strict=True)]


def layer_line(fitted: Sequence[Probed], tested: Sequence[Probed], layer: int, directions_CD: torch.Tensor) -> str:
    """Explained variance and right queries at one layer."""
    places = (PICTURE, BEHIND, ANSWER)
    fewest = min(sum(one.hidden[place].shape[1] for one in fitted) for place in places)  # more states would make a better probe
    probes, variances = {}, {}
    for place in places:
        states_ND = torch.cat([one.hidden[place][layer] for one in fitted])
        chosen = torch.randperm(len(states_ND), generator=torch.Generator().manual_seed(0))[:fewest]
        targets_NC = torch.cat([one.targets(place) for one in fitted]) @ directions_CD.T
        probes[place] = Probe(states_ND[chosen], targets_NC[chosen])
        decoded = probes[place](torch.cat([one.hidden[place][layer] for one in tested]))
        variances[place] = explained(decoded, torch.cat([one.targets(place) for one in tested]) @ directions_CD.T)

    def share(support: str, asked: str) -> float:
        """Of right queries, decoded at one place of the labelled pictures and one of the queries."""
        judged: list[bool] = []
        for one in tested:
            decoded = [probes[place](one.hidden[place][layer]) for place in (support, asked)]
            queries_NC = decoded[1] if asked == ANSWER else decoded[1][len(one.shown) :]
            judged += right(decoded[0][: len(one.shown)], queries_NC, one.shown, one.asked)
        return sum(judged) / len(judged)

    shares = {(support, asked): share(support, asked) for support, asked in COMPARED}
    return (
        f"{layer:>5}  "
        + "  ".join(f"{variances[place]:>8.2f}" for place in variances)
        + "  "
        + "  ".join(f"{shares[pair]:>9.3f}" for pair in COMPARED)
    )


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.argument("adapter")
@click.argument("recipe")
@click.argument("source")
@click.argument("overrides", nargs=-1)
@click.option("--test", "test", multiple=True, help="An override of the recipe for the episodes that are tested.")
@click.option("--episodes", type=click.IntRange(2), default=150, show_default=True, help="To fit the probes on, and to test them on.")
@click.option("--every", type=click.IntRange(1), default=2, show_default=True, help="Of the layers, every such one is probed.")
def main(adapter: str, recipe: str, source: str, overrides: tuple[str, ...], test: tuple[str, ...], episodes: int, every: int) -> None:
    parts = []
    for more in ((), test):
        base, collator = adapted(adapter, recipe, source, [*overrides, *more])
        tokens = collator.encoder.tokens_an_image
        parts.append([Probed.of(row, tokens) for row in rows(base, collator, episodes, output_hidden_states=True)])
    fitted, tested = parts
    directions_CD = torch.linalg.svd(torch.cat([one.tokens for one in fitted]), full_matrices=False).Vh[:DIRECTIONS]
    by_token = [
        right(one.tokens[: len(one.shown)] @ directions_CD.T, one.tokens[len(one.shown) :] @ directions_CD.T, one.shown, one.asked) for one in tested
    ]
    click.echo(f"by the pictures' own tokens, right: {sum(map(sum, by_token)) / sum(map(len, by_token)):.3f} of {sum(map(len, by_token))} queries")
    click.echo("layer  explained at picture, behind, answer   right: queries' picture against picture, answer against picture, against behind")
    for layer in range(0, len(fitted[0].hidden[PICTURE]), every):
        click.echo(layer_line(fitted, tested, layer, directions_CD))


if __name__ == "__main__":
    main()
