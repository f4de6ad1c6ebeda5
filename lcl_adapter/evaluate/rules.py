"""How published tests judge an answer: exact text, LCL's own rule, VQAv2's, POPE's."""

from __future__ import annotations

import re
from collections.abc import Sequence


def normalise(text: str) -> str:
    """Lower case, white space collapsed, an ending full stop dropped."""
    return re.sub(r"\s+", " ", text).strip().rstrip(".").lower()


def exact(text: str, answer: str) -> bool:
    """Whether the greedy text is the answer."""
    return normalise(text) == normalise(answer)


def lcl_rule(text: str, gold: str, others: Sequence[str]) -> bool:
    """LCL's scoring of generated text (the evaluation code of isekai-portal/Link-Context-Learning).

    "there is", "in the image", quotes and dots are stripped; right if the true label is in what remains, and no other
    label is in what remains once the true one is removed.

    Substrings break it ("cat" in "cattle"), so exact match and label scores are shown beside it.
    """
    rest = text
    for filler in ("there is", "in the image", '"', "'", "."):
        rest = rest.replace(filler, "")
    rest = rest.strip()
    if gold not in rest:
        return False
    rest = rest.replace(gold, "")
    return not any(other in rest for other in others)


DIGITS = {w: str(n) for n, w in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
STOPS = re.compile(r"\.(?!\d)")  # the published pattern means to spare those behind a digit too, and does not
COMMA_IN_NUMBER = re.compile(r"\d,\d")
# Words that VQAv2's evaluation gives their apostrophe back ("dont" -> "don't"), and those of two that lack either.
SHORTENED = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd it'll ma'am mightn't
might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
something'd something'll that's there'd there're there's they'd they'll they're they've wasn't we've weren't what'll what're what's what've
when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've 'twas
""".split()  # noqa: SIM905
TWICE = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've there'd've they'd've we'd've
who'd've wouldn't've y'all'll you'd've
""".split()  # noqa: SIM905
CONTRACTIONS = {w.replace("'", ""): w for w in SHORTENED} | {w.replace("'", "", 1): w for w in TWICE} | {"".join(w.rsplit("'", 1)): w for w in TWICE}
CONTRACTIONS |= {"somebody'd": "somebodyd", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at"}
CONTRACTIONS |= {"yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've"}


def vqa_normalise(text: str) -> str:
    """VQAv2's normalisation: marks, full stops that end no number, number words, articles, contractions."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    kept = text
    for mark in MARKS:
        beside_a_space = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if beside_a_space or COMMA_IN_NUMBER.search(text) else " ")
    words = [DIGITS.get(w, w) for w in STOPS.sub("", kept).lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ARTICLES)


def vqa_score(text: str, answers: Sequence[str]) -> float:
    """VQAv2's soft score: over each answer left out in turn, min(1, matches among the other nine / 3), averaged.

    One match of ten gives 0.3, two 0.6, three 0.9, four and more 1. Answers are normalised only where they are not all equal,
    as the published code does.
    """
    said = text.replace("\n", " ").replace("\t", " ").strip()
    told = [a.replace("\n", " ").replace("\t", " ").strip() for a in answers]
    if len(set(told)) > 1:
        said, told = vqa_normalise(said), [vqa_normalise(a) for a in told]
    scores = [min(1.0, sum(said == other for place, other in enumerate(told) if place != left_out) / 3) for left_out in range(len(told))]
    return sum(scores) / len(scores)


def pope_says_no(text: str) -> bool:
    """POPE's reading of an answer: no, if its first sentence has the word No, no or not; else yes."""
    words = text.split(".")[0].replace(",", "").split()
    return any(w in {"No", "no", "not"} for w in words)
