"""Judgements by model and tower, for a server: what the tower remembers of a set's labels, and what it adds to the model's scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lcl_adapter.answering.api_types import JudgeName
from lcl_adapter.answering.judgement import Evidence, ShownLabels, TowerEvidence
from lcl_adapter.answering.predict import Reply
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.conversations import Turn
from lcl_adapter.serve.model import Model


def shown_labels(model: Model, turns: Sequence[Turn], vision: VisionFeatures) -> ShownLabels | None:
    """What the tower remembers of a support set, by its worded labels. None where the model judges alone, or nothing is shown."""
    shown = tuple((user.picture, answer.text) for user, answer in zip(turns[::2], turns[1::2], strict=False) if user.picture is not None)
    return tower_of(model, vision).remember(shown) if model.weighing is not None and shown else None


def judged(
    model: Model,
    shown: ShownLabels | None,
    questions: Sequence[tuple[Turn, tuple[str, ...]]],
    replies: Sequence[Reply],
    vision: VisionFeatures,
    judge: JudgeName = "both",
) -> list[Reply]:
    """The replies with the scores of model and tower, or of the tower; unchanged where the model judges alone, or the adapter has
    no weights for such questions.

    questions: each with its worded labels.
    """
    if model.weighing is None or shown is None or judge == "model":
        return list(replies)
    tower = tower_of(model, vision)
    judged_replies = []
    for (turn, answers), reply in zip(questions, replies, strict=True):
        evidence = tower.about(shown, turn.pictures[:1], answers)[0] if turn.picture else [Evidence(False)] * len(answers)
        scores = model.weighing.scores(reply.log_likelihoods, evidence, judge)
        judged_replies.append(reply if scores is None else replace(reply, log_likelihoods=scores))
    return judged_replies


def tower_of(model: Model, vision: VisionFeatures) -> TowerEvidence:
    """What the tower says for a model, compared where its judgements compare."""
    return TowerEvidence(vision, model.space, model.form.orientations)
