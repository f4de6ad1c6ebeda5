"""Rules that decide whether a generated text is right: exact text, and the published rules of LCL, VL-ICL Bench, VQAv2 and POPE."""

from __future__ import annotations

import re
from collections.abc import Sequence


def normalise(text: str) -> str:
    """Lower case, with single spaces and without a final full stop."""
    return re.sub(r"\s+", " ", text).strip().rstrip(".").lower()


def exact(text: str, answer: str) -> bool:
    """Whether the text is the answer, after both are normalised."""
    return normalise(text) == normalise(answer)


def contains(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers is in the text as whole words, without regard to case and white space."""
    text = normalise(text)
    return any(re.search(rf"(?<!\w){re.escape(normalise(answer))}(?!\w)", text) is not None for answer in answers)


def lcl_rule(text: str, gold: str, others: Sequence[str]) -> bool:
    """LCL's scoring of generated text (the evaluation code of isekai-portal/Link-Context-Learning).

    "there is", "in the image", quotes and dots are removed from the text. The answer is right if the rest contains the
    true label, and contains no other label once the true one is removed.

    The rule also counts substrings ("cat" in "cattle"), so exact match and label scores are reported beside it.
    """
    rest = text
    for filler in ("there is", "in the image", '"', "'", "."):
        rest = rest.replace(filler, "")
    rest = rest.strip()
    if gold not in rest:
        return False
    rest = rest.replace(gold, "")
    return not any(other in rest for other in others)


def vl_icl_rule(text: str, answer: str) -> bool:
    """VL-ICL Bench's rule for open MiniImageNet (its evals/eval.py): the text, up to the end of its first line or, in a text of
    one line, up to a full stop, is the answer, without regard to case. A full stop at the very beginning ends nothing.
    """
    line, end, _ = text.strip().partition("\n")
    return (line if end else line[:1] + line[1:].partition(".")[0]).lower() == answer.lower()


DIGITS = {w: str(n) for n, w in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
# The published pattern is meant to leave a full stop after a digit in place too, but does not.
FULL_STOP = re.compile(r"\.(?!\d)")
COMMA_IN_NUMBER = re.compile(r"\d,\d")
# VQAv2's evaluation adds missing apostrophes ("dont" -> "don't"); words with two apostrophes may lack one or both.
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
    """VQAv2's normalisation of punctuation, full stops outside numbers, number words, articles and contractions."""
    text = _one_line(text)
    cleaned = text
    for mark in PUNCTUATION:
        next_to_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if next_to_space or COMMA_IN_NUMBER.search(text) else " ")
    words = [DIGITS.get(w, w) for w in FULL_STOP.sub("", cleaned).lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ARTICLES)


def vqa_score(text: str, answers: Sequence[str]) -> float:
    """VQAv2's soft score.

    Each human answer is left out in turn; the mean of min(1, matches among the other nine / 3) counts.

    One match of ten gives 0.3, two 0.6, three 0.9, four and more 1. Texts are normalised only if the human answers
    differ, as in the published code.
    """
    text = _one_line(text)
    answers = [_one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        text, answers = vqa_normalise(text), [vqa_normalise(answer) for answer in answers]
    matches = [text == answer for answer in answers]
    scores = [min(1.0, (sum(matches) - left_out) / 3) for left_out in matches]
    return sum(scores) / len(scores)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def pope_says_no(text: str) -> bool:
    """POPE's reading of a text: no if its first sentence has the word No, no or not, and yes otherwise."""
    words = text.split(".")[0].replace(",", "").split()
    return any(w in {"No", "no", "not"} for w in words)
