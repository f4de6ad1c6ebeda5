"""What differs between LLaVA families: how turns become text. One prompt path for training and inference.

A family renders turns to text in which ``<image>`` stands where an image is, and says which characters are learned.
Tokenising that text is ``batches.Encoder``'s work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lcl_adapter.conversations import Turn
from lcl_adapter.errors import DataError, ModelError

IMAGE = "<image>"


@dataclass(frozen=True)
class Rendered:
    """Text, and the learned parts of it as (start, end) in characters."""

    text: str
    learned: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Family:
    """A prompt format. ``learned`` text is the answer and ``end``, so that the model also learns to stop.

    system: text before the first turn. user: with {text}, behind the image mark. answer: with {text}.
    """

    name: str
    system: str
    user: str
    assistant: str
    answer: str
    end: str
    version: int = 1

    def render(self, turns: Sequence[Turn], opened: bool = False, first: bool = True) -> Rendered:
        """Turns as text; ``opened`` ends with the assistant's mark, ready for an answer; ``first`` begins with the system text.

        Raises DataError where a turn's text holds a special mark, which would be read as one.
        """
        text, learned = self.system if first else "", []
        for turn in turns:
            several = bool(turn.further)  # then the text says where each image stands
            for mark in (*(() if several else (IMAGE,)), self.end, "<|user|>", "<|assistant|>"):
                if mark in turn.text:
                    raise DataError(f"the text {turn.text!r} holds {mark!r}, which the model reads as a mark: change it.")
            if several and turn.text.count(IMAGE) != len(turn.pictures):
                raise DataError(f"the text {turn.text!r} has {turn.text.count(IMAGE)} {IMAGE}, there are {len(turn.pictures)} images.")
            if turn.role == "user":
                text += self.user.format(text=turn.text, image=IMAGE + "\n" if turn.picture and not several else "")
            else:
                text += self.assistant
                start = len(text)
                text += self.answer.format(text=turn.text) + self.end
                if turn.learn:
                    learned.append((start, len(text)))
        return Rendered(text + self.assistant if opened else text, tuple(learned))


POCKET = Family("pocket", "", "<|user|>{image}{text}", "<|assistant|>", "{text}", "</s>")
# Vicuna's v1 conversation, as upstream LLaVA-1.5 trains and serves it (llava/conversation.py): every answer ends in </s>.
LLAVA_15 = Family(
    "llava-1.5",
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
    "USER: {image}{text} ",
    "ASSISTANT:",
    " {text}",
    "</s>",
)
FAMILIES = {family.name: family for family in (POCKET, LLAVA_15)}


def detect(config: Any, tokenizer: Any) -> Family:
    """The family of a loaded base.

    Raises ModelError for a model that is no LLaVA, or of a family that is not supported.
    """
    if config.model_type != "llava":
        raise ModelError(
            f"the base is a {config.model_type!r} model, not a LLaVA in Hugging Face layout (model_type 'llava'); "
            f"supported families: {', '.join(FAMILIES)}."
        )
    if "<|user|>" in tokenizer.get_vocab():
        return POCKET
    if tokenizer.eos_token != LLAVA_15.end:
        raise ModelError(f"the base's end token is {tokenizer.eos_token!r}; LLaVA-1.5's is </s>. Supported families: {', '.join(FAMILIES)}.")
    return LLAVA_15
