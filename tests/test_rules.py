"""Published rules on worked examples, and figures on cases that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lcl_adapter.answering.predict import Reply
from lcl_adapter.data.conversations import Turn
from lcl_adapter.data.sources.boxes import Box
from lcl_adapter.evaluate import judges, metrics, rules
from lcl_adapter.evaluate.cases import Case


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqav2_counts_people_who_agree(matches: int, score: float) -> None:
    answers = ["blue"] * matches + ["red"] * (10 - matches)
    assert rules.vqa_score("blue", answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat.", "cat"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("an apple, a pear", "apple pear"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("yes!", "yes"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("half-open", "half open"),
        ("what?  no", "what no"),
        ("a\nb", "b"),
    ],
)
def test_vqav2_normalisation(text: str, normal: str) -> None:
    assert rules.vqa_normalise(text) == normal


def test_equal_answers_are_not_normalised() -> None:
    assert rules.vqa_score("The cat", ["The cat"] * 10) == 1.0
    assert rules.vqa_score("cat", ["The cat"] * 10) == 0.0
    assert rules.vqa_score("cat", ["The cat"] * 9 + ["dog"]) == 1.0


@pytest.mark.parametrize(
    ("text", "no"),
    [
        ("No", True),
        ("no, there is none", True),
        ("There is not a dog.", True),
        ("Yes. No dog is seen.", False),
        ("Yes", False),
        ("nobody", False),
        ("", False),
    ],
)
def test_pope_reads_the_first_sentence(text: str, no: bool) -> None:
    assert rules.pope_says_no(text) is no


def test_rouge_l_by_hand() -> None:
    assert metrics.rouge_l("the cat sat on the mat", "the cat lay on the mat") == pytest.approx(5 / 6)
    assert metrics.rouge_l("a b c", "c b a") == pytest.approx(1 / 3)
    assert metrics.rouge_l("", "a") == 0.0
    assert metrics.rouge_l("A b", "a B") == 1.0


def case(gold: str, group: str = "g", labels: tuple[str, ...] = (), truth: object = None) -> Case:
    return Case((), Turn("user", "?"), labels, labels, gold, group, truth=truth)


def scored(**scores: float) -> Reply:
    return Reply("", tuple(np.log(list(scores.values())).tolist()))


def test_pope_figures() -> None:
    figures = judges.pope_figures(
        [case("yes"), case("yes"), case("no"), case("no")], [Reply("Yes."), Reply("No."), Reply("yes"), Reply("no")]
    ).figures
    assert (figures["value"], figures["precision"], figures["recall"], figures["f1"], figures["yes_share"]) == (0.5, 0.5, 0.5, 0.5, 0.5)
    always = judges.pope_figures([case("no"), case("no")], [Reply("no"), Reply("no")]).figures
    assert (always["value"], always["f1"]) == (1.0, 0.0), "no division by zero"


def test_inspection_figures_by_category() -> None:
    """One category is ranked perfectly, one at random: the main figure is the mean. A constant answer has an MCC of 0."""
    cases, replies = [], []
    for category, scores in (("clear", (0.1, 0.2, 0.3, 0.9)), ("blind", (0.4, 0.4, 0.4, 0.4))):
        for defect, bad in zip((None, None, "hole", "scratch"), scores, strict=True):
            cases.append(case("bad" if defect else "good", category, ("good", "bad"), {"defect": defect, "good": "good"}))
            replies.append(scored(good=1 - bad, bad=bad))
    figures = judges.inspection_figures(cases, replies).figures
    assert figures["value"] == pytest.approx(0.75)
    assert figures["by_category"]["clear"]["auroc"] == 1.0
    assert figures["by_category"]["clear"]["f1_max"] == 1.0
    assert figures["by_category"]["clear"]["balanced_accuracy"] == 0.75
    assert figures["by_category"]["blind"]["balanced_accuracy"] == 0.5
    assert figures["by_category"]["blind"]["mcc"] == 0.0
    assert figures["by_defect"] == {"hole": 0.75, "scratch": 0.75}


def test_product_figures_by_role() -> None:
    roles = {"a": "A", "b": "B", "neither": "neither"}
    labels = ("a", "neither", "b")
    gold_and_answer = [("a", "a"), ("a", "neither"), ("b", "b"), ("neither", "neither"), ("neither", "neither"), ("neither", "b")]
    cases = [case(gold, str(i), labels, {"roles": roles, "near": i == 5}) for i, (gold, _) in enumerate(gold_and_answer)]
    replies = [Reply("", tuple(0.0 if label == answer else -5.0 for label in labels)) for _, answer in gold_and_answer]
    figures = judges.product_figures(cases, replies).figures
    assert figures["recall"] == {"A": 0.5, "B": 1.0, "neither": 0.6667}
    assert figures["value"] == pytest.approx((0.5 + 1 + 2 / 3) / 3, abs=1e-4)
    assert figures["neither_said_of_a_product"] == 0.3333
    assert figures["product_said_of_neither"] == 0.3333
    assert figures["near_neither_recall"] == 0.0
    assert figures["confusion"]["A"] == {"A": 1, "B": 0, "neither": 1}


def test_a_box_is_right_with_an_iou_over_half_and_wrong_if_missing() -> None:
    truth = Box(0, 0, 0.5, 0.5)
    replies = [Reply("[0.000,0.000,0.500,0.500]"), Reply("It is [0.000,0.000,0.500,0.240]"), Reply("no box")]
    figures = judges.box_figures([case("", str(i), truth=truth) for i in range(3)], replies).figures
    assert figures["value"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures["no_box"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures["mean_iou"] == pytest.approx((1 + 0.48 + 0) / 3, abs=1e-3)


def test_ranking_and_decisions_by_hand() -> None:
    figures = metrics.ranking([False, True, False, True], [0.1, 0.4, 0.35, 0.8])
    assert figures == {"auroc": 1.0, "ap": 1.0, "f1_max": pytest.approx(1.0)}
    assert metrics.ranking([True, False], [0.1, 0.9])["auroc"] == 0.0
    always = metrics.decisions([True, True, False], [True, True, True])
    assert (always["balanced_accuracy"], always["mcc"], always["said_share"]) == (0.5, 0.0, 1.0)
