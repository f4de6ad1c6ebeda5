"""The photo base, on SmolLM2-135M-Instruct: the chat format of that model, and a short form for pictures alone."""

from __future__ import annotations

from dataclasses import dataclass

from lcl_adapter.base.families.base import IMAGE, Family, Frame, Match
from lcl_adapter.data.conversations import Turn
from lcl_adapter.photo import prompt

SHORT = Frame(prompt.SHORT_USER, prompt.SHORT_ASSISTANT, prompt.SHORT_ANSWER)


@dataclass(frozen=True)
class PhotoFamily(Family):
    """A picture without a text is written as a line: the picture and its label."""

    def frame(self, question: Turn) -> Frame:
        alone = question.picture is not None and not question.further and not question.text
        return SHORT if alone else super().frame(question)

    def chat_template(self, image_token: str = IMAGE) -> str:
        return prompt.chat_template(image_token)


PHOTO = PhotoFamily(
    "photo",
    Match("llava", "llama", "<|im_start|>", prompt.END, towers=("efficientnet_lite",)),
    system=prompt.SYSTEM,
    user=prompt.USER,
    assistant=prompt.ASSISTANT,
    answer=prompt.ANSWER,
    end=prompt.END,
    special_tokens=("<|im_start|>",),
    image=prompt.IMAGE,
    wording="bare",
    version=2,
)
