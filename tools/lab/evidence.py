"""Trains an adapter whose questions say how alike the photo is to each label's photos, for an entry in docs/lab.md.

    python -m tools.lab.evidence runs/quickstart recipes/pocket.yaml output=runs/evidence

RUN is an adapter on the same base with weights of a judgement: they say how much a difference of likeness counts. The line is
"kado 8, bemu 2. Now, what is this?": the tower's probability of each shown label, in tenths, before the query's own sentence. It
is in the questions of training and of every suite that show two labels or more; all else is as in `lcl-adapter train`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import click

from lcl_adapter.answering.judgement import TowerEvidence, read_weighing
from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.adapter import load_adapter
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.cli import commands
from lcl_adapter.data import conversations
from lcl_adapter.data.conversations import Conversation, Turn
from lcl_adapter.data.conversations import from_episode as from_plain_episode
from lcl_adapter.data.episodes.base import Episode
from lcl_adapter.evaluate import cases
from lcl_adapter.packaged import adapter_folder
from lcl_adapter.recipe.wording import Wording
from lcl_adapter.training import lengths

FromEpisode = Callable[[Episode, Wording], Conversation]
READERS = (conversations, cases, lengths)  # the modules that turn episodes into conversations


def tenths(probability: float) -> int:
    """0 to 9, so that each is one digit."""
    return min(9, int(10 * probability))


def with_evidence(run: str, plain: FromEpisode) -> FromEpisode:
    """``plain``, with the line in each question. Raises click.UsageError if the run has no weights."""
    folder = adapter_folder(run)
    base, manifest = load_adapter(folder, BaseRef(device="cpu"))
    judged = read_weighing(folder, manifest)
    if judged is None:
        raise click.UsageError(f"{run} has no weights of a judgement")
    weighing, space = judged
    tower = TowerEvidence(Predictor(base).vision, space)

    def from_episode(episode: Episode, wording: Wording) -> Conversation:
        conversation = plain(episode, wording)
        labels = tuple(dict.fromkeys(example.label for example in episode.support))
        if len(labels) < 2:
            return conversation
        shown = tuple((example.picture, example.label) for example in episode.support)
        evidence = tower.of(shown, [query.picture for query in episode.queries], labels)
        branches = []
        for (question, answer), own in zip(conversation.branches, evidence, strict=True):
            scores = weighing.scores([0.0] * len(labels), own, "tower")
            assert scores is not None
            line = ", ".join(f"{label} {tenths(math.exp(score))}" for label, score in zip(labels, scores, strict=True))
            branches.append((_before(line, question), answer))
        return replace(conversation, branches=tuple(branches))

    return from_episode


def _before(line: str, question: Turn) -> Turn:
    return replace(question, text=f"{line}. {question.text}".rstrip())


@click.command(help=__doc__.splitlines()[0])
@click.argument("run")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
def main(run: str, recipe: str, overrides: tuple[str, ...]) -> None:
    from_episode = with_evidence(run, from_plain_episode)
    for module in READERS:
        vars(module)["from_episode"] = from_episode
    commands.train(recipe, overrides)


if __name__ == "__main__":
    main()
