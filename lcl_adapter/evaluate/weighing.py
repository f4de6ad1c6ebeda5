"""How much the model and its tower count in a judgement: weights fitted on classes that neither training nor the report has.

The questions are those of the suites under ``evaluate.validation``. Each label's score is a weighted sum of its evidence
(``lcl_adapter.answering.judgement``), and the weights make the right labels most likely: a logistic regression. So the scores are
also calibrated, on classes that are new to the adapter.

Shapes: J questions, K labels (the most that a question has), F kinds of evidence, U = 2 weights of a label that is not shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from lcl_adapter.answering.judgement import Evidence, LeastFamiliar, Shown, TowerEvidence, Weighing, Weights, familiarity, save_weighing
from lcl_adapter.answering.predict import Predictor, Reply
from lcl_adapter.base.prototypes import patch_statistics
from lcl_adapter.base.tower_space import TowerSpace
from lcl_adapter.evaluate.cases import Case, Cell
from lcl_adapter.terminal import console

# The prior of the logarithms of weights: with few questions, or questions that are all answered right, they stay near it
PRIOR = {"model": 1.0, "likeness": 10.0, "distance": 0.1}
PRIOR_SPREAD = 2.0
PRIOR_SPREAD_OF_UNSHOWN = 10.0
PRIOR_SPREAD_BY_SHOTS = 2.0
WRONGLY_REJECTED = 0.07  # the share of photos of known classes that are less familiar than the bound which is fitted


@dataclass(frozen=True)
class Weighed:
    """A question of the validation suites: each label's log-likelihood and evidence, and the index of the right label."""

    log_likelihoods: tuple[float, ...]
    evidence: tuple[Evidence, ...]
    right: int

    @property
    def shown(self) -> int:
        return sum(one.shown for one in self.evidence)


def shown_of(case: Case) -> Shown:
    """The labelled photos of a case; none where it asks about no photo."""
    return tuple((example.picture, example.label) for example in case.episode.support) if case.episode and case.query.picture else ()


def evidence_of(cases: Sequence[Case], tower: TowerEvidence) -> list[tuple[Evidence, ...]]:
    """The tower's evidence for each label of each case; of a case without labelled photos or labels, evidence for none."""
    groups: dict[tuple[Shown, tuple[str, ...]], list[int]] = {}
    for index, case in enumerate(cases):
        groups.setdefault((shown_of(case), case.labels), []).append(index)
    evidence: list[tuple[Evidence, ...]] = [()] * len(cases)
    for (shown, labels), members in groups.items():  # a set's photos are compared once
        queries = [picture for index in members if (picture := cases[index].query.picture) is not None]
        rows = tower.of(shown, queries, labels) if shown else [[Evidence(False)] * len(labels)] * len(members)
        for index, row in zip(members, rows, strict=True):
            evidence[index] = tuple(row)
    return evidence


def questions_of(cases: Sequence[Case], replies: Sequence[Reply], tower: TowerEvidence) -> list[Weighed]:
    """The cases with labels, as questions to fit weights on."""
    evidence = evidence_of(cases, tower)
    return [
        Weighed(reply.log_likelihoods, own, case.labels.index(case.gold))
        for case, reply, own in zip(cases, replies, evidence, strict=True)
        if case.labels
    ]


def fit_familiar(cases: Sequence[Case], tower: TowerEvidence) -> LeastFamiliar | None:
    """What is least familiar among photos with photos of their own class, where several labels are shown; None without such cases.

    What more photos add is fitted within each class, because classes with many photos may be of another kind.
    """
    rows: list[tuple[str, float, float]] = []  # class, logarithm of its photos that are shown, familiarity
    for case in cases:
        shown = shown_of(case)
        own = [picture for picture, label in shown if label == case.gold]
        if own and len({label for _, label in shown}) > 1 and case.query.picture is not None:
            cosines = tower.vectors(own) @ tower.vectors([case.query.picture])[0]
            rows.append((case.group, math.log(len(own)), familiarity(cosines.tolist())))
    if not rows:
        return None
    groups = [group for group, _, _ in rows]
    logs, familiar = np.array([row[1] for row in rows]), np.array([row[2] for row in rows])
    centred = [values - np.array([values[[own == group for own in groups]].mean() for group in groups]) for values in (logs, familiar)]
    spread = float(centred[0] @ centred[0])
    by_shots = max(0.0, float(centred[0] @ centred[1]) / spread) if spread else 0.0
    return LeastFamiliar(float(np.quantile(familiar - by_shots * logs, WRONGLY_REJECTED)), by_shots, len(rows))


def fit(questions: Iterable[Weighed]) -> Weighing:
    """Weights for questions with several shown labels, and with one."""
    questions = list(questions)
    several = [question for question in questions if question.shown > 1]
    single = [question for question in questions if question.shown == 1]
    return Weighing(_fitted(several), _fitted(single), (len(several), len(single)))


def _fitted(questions: Sequence[Weighed]) -> Weights | None:
    """The most probable weights; None without questions."""
    if not questions:
        return None
    most = max(len(question.evidence) for question in questions)
    features_JKF = torch.zeros(len(questions), most, 3, dtype=torch.float64)
    unshown_JKU = torch.zeros(len(questions), most, 2, dtype=torch.float64)
    absent_JK = torch.full((len(questions), most), -math.inf, dtype=torch.float64)
    for j, question in enumerate(questions):
        for k, (likely, one) in enumerate(zip(question.log_likelihoods, question.evidence, strict=True)):
            features_JKF[j, k] = torch.tensor([likely, one.likeness, -one.distance])
            absent_JK[j, k] = 0.0
            if not one.shown:
                unshown_JKU[j, k] = torch.tensor([1.0, math.log(one.shots)])
    right_J = torch.tensor([question.right for question in questions])
    prior_F = torch.tensor([math.log(value) for value in PRIOR.values()], dtype=torch.float64)
    spread_U = torch.tensor([PRIOR_SPREAD_OF_UNSHOWN, PRIOR_SPREAD_BY_SHOTS], dtype=torch.float64)
    logs_F, unshown_U = prior_F.clone().requires_grad_(), torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def loss() -> torch.Tensor:
        scores_JK = features_JKF @ logs_F.exp() + unshown_JKU @ unshown_U + absent_JK
        fault = torch.nn.functional.cross_entropy(scores_JK, right_J, reduction="sum")
        strayed = ((logs_F - prior_F) / PRIOR_SPREAD).square().sum() + (unshown_U / spread_U).square().sum()
        return (fault + strayed / 2) / len(questions)

    optimiser = torch.optim.LBFGS([logs_F, unshown_U], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(closure)  # type: ignore[arg-type]
    model, likeness, distance = logs_F.detach().exp().tolist()
    has_distance = bool(features_JKF[..., 2].abs().sum())
    unshown, by_shots = unshown_U.tolist() if bool(unshown_JKU.any()) else (0.0, 0.0)
    return Weights(model, likeness, distance if has_distance else 0.0, unshown, by_shots)


def weigh(run: Path, cells: Sequence[Cell], predictor: Predictor, trained: Sequence[torch.Tensor] = ()) -> tuple[Weighing, TowerSpace]:
    """Fit the weights of a run's adapter on cells of validation suites, whose pictures can be read, and write them into its folder.

    trained: the tower's features of photos of classes that were trained on, [N, C] of each. Returns the weights, and where the tower's
    features are compared.
    """
    pictures = list(dict.fromkeys(p for cell in cells for case in cell.cases for turn in (*case.support, case.query) for p in turn.pictures))
    space = TowerSpace.fit(predictor.vision.mean_patches(pictures), trained, patch_statistics(pictures, predictor.vision))
    tower = TowerEvidence(predictor.vision, space, predictor.base.orientations)
    questions: list[Weighed] = []
    for cell in cells:
        replies = predictor.run([(c.support, c.query, c.answers) for c in cell.cases], generate=False)
        questions += questions_of(cell.cases, replies, tower)
    weighing = replace(fit(questions), least_familiar=fit_familiar([case for cell in cells for case in cell.cases], tower))
    save_weighing(run, weighing, space)
    classes = sum(len(own) > 1 for own in trained)
    learned = f"compares photos less along {len(space.directions)} directions, in which those of {classes} trained classes vary"
    console.print(
        f"judgement, tower: {learned if classes else 'no trained classes to learn from what varies within one'}", highlight=False, markup=False
    )
    for name, weights, count in zip(
        ("several labels shown", "one label shown"), (weighing.several, weighing.single), weighing.fitted_on, strict=True
    ):
        if weights is not None:
            parts = f"model {weights.model:.2g}, likeness {weights.likeness:.3g}, distance {weights.distance:.2g}, not shown {weights.unshown:.3g}"
            console.print(f"judgement, {name}: {parts} ({count} questions of validation classes)", highlight=False, markup=False)
    return weighing, space
