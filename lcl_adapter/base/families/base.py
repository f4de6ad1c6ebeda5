"""What a family is: how turns become text, and how a picture is padded before the image processor.

A family renders turns to text, with ``<image>`` in the place of each image, and marks the learned characters.
``lcl_adapter.base.encoder.Encoder`` tokenises that text. Training and inference use the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lcl_adapter.data.conversations import Turn
from lcl_adapter.recipe.schema import WordingName

IMAGE = "<image>"
TOWERS = ("clip", "siglip")  # beginnings of the model types of LLaVA's usual towers
INSTRUCTIONS = (  # in a Jinja template: adds a system message's texts to those that go before the next user's
    "{% if m['content'] is string %}{% set ns.first = ns.first + m['content'] + '\\n' %}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{% set ns.first = ns.first + c['text'] + '\\n' %}{% endif %}{% endfor %}{% endif %}"
)


@dataclass(frozen=True)
class Rendered:
    """A prompt's text, and its learned parts as (start, end) in characters."""

    text: str
    learned: tuple[tuple[int, int], ...]


class Frame(NamedTuple):
    """The text around a question and its answer: a user turn, with {image} and {text}; what opens an answer; an answer, with {text}."""

    user: str
    assistant: str
    answer: str


@dataclass(frozen=True)
class Family:
    """A prompt format and its padding. Learned are the answer and ``end``, so that the model also learns to stop.
    Of an unfinished answer, ``end`` is not learned.

    matches: whether a config and a tokenizer belong to this family.
    system: the text before the first turn. user: a user turn, with {image} and {text}. answer: an answer, with {text}.
    assistant: the text that opens an answer. end: the token that ends an answer.
    special_tokens: the tokens of the prompt's frame beside ``end``. A user's text must not contain them (``Encoder``).
    image: the text before that of a turn with a picture; ``<image>`` in it becomes the image's tokens.
    padding: the colour that a picture is padded to a square with: the processor's mean, or white.
    version: of the prompt, which an adapter's manifest records.
    both_layouts: whether upstream (haotian-liu/LLaVA) has this family, so that the original layout can be written.
    wording: the wording of episodes for a base of this family without an adapter.
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
    wording: WordingName = "lcl"

    def render(self, turns: Sequence[Turn], opened: bool = False, first: bool = True) -> Rendered:
        """Turns as text. opened: ends with ``assistant``, ready for an answer. first: begins with ``system``."""
        text, learned = self.system if first else "", []
        frame = self.chat_frame
        for turn in turns:
            if turn.role == "user":
                image = self.image if turn.picture and not turn.further else ""
                # The text of a turn with several images contains the place of each.
                content = turn.text.replace(IMAGE, self.image.rstrip("\n")) if turn.further else turn.text
                frame = self.frame(turn)
                text += frame.user.format(text=content, image=image)
            else:
                text += frame.assistant
                start = len(text)
                text += frame.answer.format(text=turn.text) + self.end
                if turn.learn:
                    learned.append((start, len(text) - (len(self.end) if turn.unfinished else 0)))
        return Rendered(text + frame.assistant if opened else text, tuple(learned))

    @property
    def chat_frame(self) -> Frame:
        return Frame(self.user, self.assistant, self.answer)

    def frame(self, question: Turn) -> Frame:
        """The text around a question and its answer. A family with a short form chooses here."""
        return self.chat_frame

    def chat_template(self, image_token: str = IMAGE) -> str:
        """The same prompt as a Jinja template, for transformers and vLLM. Tokenizers add the begin token.

        A system message, which the prompt has no place for, goes before the next user's text, as on our own server.
        """

        def printed(text: str) -> str:
            return "{{ " + repr(text) + " }}" if text else ""

        before, rest = self.user.split("{image}")
        after = rest.split("{text}")[1]
        opening, closing = self.answer.split("{text}")
        texts = "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
        image = printed(self.image.replace(IMAGE, image_token))
        images = "{% for c in m['content'] %}{% if c['type'] == 'image' %}" + image + "{% endif %}{% endfor %}"
        return (
            f"{{% set ns = namespace(first='') %}}{printed(self.system)}{{% for m in messages %}}"
            f"{{% if m['role'] in ['system', 'developer'] %}}{INSTRUCTIONS}"
            f"{{% elif m['role'] == 'user' %}}{printed(before)}{images}{{{{ ns.first }}}}{{% set ns.first = '' %}}{texts}{printed(after)}"
            f"{{% else %}}{printed(self.assistant + opening)}{texts}{printed(closing + self.end)}{{% endif %}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{printed(self.assistant)}{{% endif %}}"
        )


def is_llava(config: Any, kind: str, *languages: str, towers: tuple[str, ...] = TOWERS) -> bool:
    """Whether a config is a LLaVA of model type ``kind`` on one of these towers and one of these language models.

    Others under the same type have other prompts and other pixels.
    """
    known_tower = str(config.vision_config.model_type).startswith(towers)
    return bool(config.model_type == kind and known_tower and config.text_config.model_type in languages)


@dataclass(frozen=True)
class Match:
    """Whether a config and a tokenizer belong to a LLaVA of model type ``kind`` on ``language``.

    token: one that its vocabulary has. end: its end token. None accepts any. towers: beginnings of the tower's model type.
    A class and no lambda, because a family is pickled into the processes that load data.
    """

    kind: str
    language: str
    token: str | None = None
    end: str | None = None
    towers: tuple[str, ...] = TOWERS

    def __call__(self, config: Any, tokenizer: Any) -> bool:
        has_token = self.token is None or self.token in tokenizer.get_vocab()
        return is_llava(config, self.kind, self.language, towers=self.towers) and has_token and self.end in {None, tokenizer.eos_token}
