"""The base's own answers as plain questions: replay for a base whose training data nobody has.

Reading the source needs no model. It gives the prompts, none of them answered. Before training, the base answers them
(``lcl_adapter.training.replay``), and :func:`with_answers` puts its answers in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from lcl_adapter.data.sources.base import Dialogue, Exchange, QuestionPool
from lcl_adapter.data.sources.images import READ, SUFFIXES
from lcl_adapter.data.sources.picture import Picture
from lcl_adapter.data.sources.text import read_text
from lcl_adapter.data.sources.tree import Tree
from lcl_adapter.errors import DataError
from lcl_adapter.recipe.options import Options
from lcl_adapter.recipe.sources import QuestionOptions, Reader

IMAGE = "<image>"
COMMENT = "#"
NOT_ANSWERED = "not answered yet"


class SelfReplay(Reader):
    """``type: self``. The base answers prompts before training, and its answers are replayed.

    A prompt with ``<image>`` is asked about pictures only: each picture gets one of these prompts, in turn.
    """

    policy_options: ClassVar[type[Options]] = QuestionOptions

    type: Literal["self"]
    prompts: Path = Field(Path("photo:text/prompts.txt"), description="a text file with a prompt on each line; lines that begin with # are comments")
    images: Path | None = Field(None, description="pictures to ask about, a folder or a zip archive; none by default")
    pictures: int = Field(200, ge=1, description="use only this many of the pictures")
    retain: Literal["answers", "distribution"] = Field(
        "answers", description="learn the answers, or stay near the base's own probabilities of every token in them"
    )
    answers: int = Field(1, ge=1, le=64, description="answers to each prompt; more than one needs a temperature")
    temperature: float = Field(0.0, ge=0, le=2, description="0 gives the likeliest answer; above 0, answers are drawn")
    max_new_tokens: int = Field(64, ge=1, le=2048, description="the longest answer, in tokens; the end of a longer one is not learned")

    @model_validator(mode="after")
    def _answers_differ(self) -> Self:
        if self.answers > 1 and not self.temperature:
            raise ValueError(f"`answers: {self.answers}` with `temperature: 0` gives the same answer every time: set a temperature, for instance 0.8")
        return self

    def open(self, name: str, min_pictures: int = 1) -> QuestionPool:
        return read_prompts(self, name)


def read_prompts(options: SelfReplay, name: str = "") -> QuestionPool:
    """The prompts, ``options.answers`` times each, none of them answered. Its paths are absolute.

    Raises DataError: the file cannot be read or has no prompt; pictures without a prompt for them; a folder without
    pictures.
    """
    texts: list[tuple[str, str]] = []
    about_pictures: list[tuple[str, str]] = []
    listed = read_text(options.prompts)
    for number, line in enumerate(listed.text.splitlines(), 1):
        prompt = line.strip()
        if prompt and not prompt.startswith(COMMENT):
            where = f"{options.prompts}, line {number}"
            if prompt.count(IMAGE) > 1:
                raise DataError(f"{where}: {IMAGE} twice in a prompt; a prompt is about one picture.")
            (about_pictures if IMAGE in prompt else texts).append((prompt.replace(IMAGE, "").strip(), where))
    asked: list[tuple[str, str, Picture | None]] = [(prompt, where, None) for prompt, where in texts]
    if options.images is not None:
        if not about_pictures:
            raise DataError(f"{options.prompts}: no prompt has {IMAGE}: nothing would be asked about the pictures. Add one, or leave `images` out.")
        for number, picture in enumerate(_pictures(options.images)[: options.pictures]):
            prompt, where = about_pictures[number % len(about_pictures)]
            asked.append((prompt, f"{where} about {picture}", picture))
    if not asked:
        kind = f"only prompts with {IMAGE}: set `images`" if about_pictures else "no prompt in it"
        raise DataError(f"{options.prompts}: {kind}.")
    dialogues = tuple(Dialogue((Exchange(prompt, NOT_ANSWERED, picture),), where) for prompt, where, picture in asked for _ in range(options.answers))
    # The same before and after the prompts are answered, so that a run can be resumed.
    described = [[prompt, picture and (picture.member or picture.path.name)] for prompt, _, picture in asked]
    key = json.dumps([described, options.answers, options.temperature, options.max_new_tokens])
    fingerprint = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
    return QuestionPool(name or options.prompts.stem, dialogues, {}, (), fingerprint, new_tokens=options.max_new_tokens, notes=listed.notes)


def _pictures(root: Path) -> list[Picture]:
    tree = Tree(root)
    pictures = [tree.picture(name) for name in tree.files if Path(name).suffix.lower() in SUFFIXES]
    if not pictures:
        raise DataError(f"{root}: no pictures in it ({', '.join(sorted(READ))}).")
    return pictures


@dataclass(frozen=True)
class OwnAnswer:
    """finished: whether the base ended the answer itself, within the most tokens."""

    text: str
    finished: bool


def with_answer(dialogue: Dialogue, answer: OwnAnswer) -> Dialogue:
    """The dialogue with its prompt answered."""
    (exchange,) = dialogue.exchanges
    return replace(dialogue, exchanges=(replace(exchange, answer=answer.text, unfinished=not answer.finished),))


def with_answers(pool: QuestionPool, answers: Sequence[OwnAnswer | None]) -> QuestionPool:
    """The pool with its prompts answered, in order.

    A prompt whose answer cannot be learned (None) is counted as skipped, and the next prompt stands in for it: the
    schedule of the run depends on the number of prompts only.

    Raises DataError where no answer can be learned.
    """
    count = len(pool)
    usable = [index for index, answer in enumerate(answers) if answer is not None]
    if not usable:
        raise DataError(f"{pool.name}: the base gave no answer that could be learned, to {count} prompts. Give it other `prompts`.")
    dialogues, following = [], usable[0]
    for index in reversed(range(count)):
        following = index if answers[index] is not None else following
        answer = answers[following]
        assert answer is not None
        dialogues.append(with_answer(pool.dialogues[following], answer))
    missing = {"no answer that can be learned": count - len(usable)} if len(usable) < count else {}
    return replace(pool, dialogues=tuple(reversed(dialogues)), skipped={**pool.skipped, **missing}, new_tokens=0)
