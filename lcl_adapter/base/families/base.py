"""What a family is: how turns become text, and what a picture becomes before the processor sees it.

A family renders turns to text in which ``<image>`` stands where an image is, and says which characters are learned.
Tokenising that text is ``batches.Encoder``'s work. One prompt path for training and inference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lcl_adapter.data.conversations import Turn

IMAGE = "<image>"


@dataclass(frozen=True)
class Rendered:
    """Text, and the learned parts of it as (start, end) in characters."""

    text: str
    learned: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Family:
    """A prompt format and its pixels. ``learned`` text is the answer and ``end``, so that the model also learns to stop.

    system: text before the first turn. user: with {image} and {text}. answer: with {text}.
    matches: whether (config, tokenizer) are of this family.
    special_tokens: what the prompt is framed with, beside ``end``; no text may hold them (``Encoder``).
    image: what stands before the text of a turn with a picture; ``<image>`` in it becomes the image's tokens.
    padding: the colour a picture is padded to a square with, the processor's mean or white.
    both_layouts: whether upstream (haotian-liu/LLaVA) has it, so that the original layout can be written.
    wording: how episodes are worded for a base of this family that has no adapter.
    """

    name: str
    matches: Callable[[Any, Any], bool]
    system: str
    user: str
    assistant: str
    answer: str
    end: str
    special_tokens: tuple[str, ...] = ()
    image: str = IMAGE + "\n"
    padding: Literal["mean", "white"] = "mean"
    version: int = 1
    both_layouts: bool = False
    wording: Literal["short", "lcl"] = "lcl"

    def render(self, turns: Sequence[Turn], opened: bool = False, first: bool = True) -> Rendered:
        """Turns as text; ``opened`` ends with the assistant's mark, ready for an answer; ``first`` begins with the system text."""
        text, learned = self.system if first else "", []
        for turn in turns:
            if turn.role == "user":
                image = self.image if turn.picture and not turn.further else ""
                # Where a turn has several images, its text says where each of them stands.
                words = turn.text.replace(IMAGE, self.image.rstrip("\n")) if turn.further else turn.text
                text += self.user.format(text=words, image=image)
            else:
                text += self.assistant
                start = len(text)
                text += self.answer.format(text=turn.text) + self.end
                if turn.learn:
                    learned.append((start, len(text)))
        return Rendered(text + self.assistant if opened else text, tuple(learned))

    def chat_template(self, image_token: str = IMAGE) -> str:
        """The same prompt as a Jinja template, for transformers and vLLM; without the beginning mark, which tokenizers add."""

        def said(text: str) -> str:
            return "{{ " + repr(text) + " }}" if text else ""

        before, rest = self.user.split("{image}")
        after = rest.split("{text}")[1]
        opening, closing = self.answer.split("{text}")
        texts = "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
        image = said(self.image.replace(IMAGE, image_token))
        images = "{% for c in m['content'] %}{% if c['type'] == 'image' %}" + image + "{% endif %}{% endfor %}"
        return (
            f"{said(self.system)}{{% for m in messages %}}{{% if m['role'] == 'user' %}}{said(before)}{images}{texts}{said(after)}"
            f"{{% else %}}{said(self.assistant + opening)}{texts}{said(closing + self.end)}{{% endif %}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{said(self.assistant)}{{% endif %}}"
        )


def is_llava(config: Any, kind: str, *languages: str) -> bool:
    """A LLaVA of this model type, on CLIP or SigLIP and one of these language models: others under the same type have other prompts and pixels."""
    seen = str(config.vision_config.model_type).startswith(("clip", "siglip"))
    return bool(config.model_type == kind and seen and config.text_config.model_type in languages)
