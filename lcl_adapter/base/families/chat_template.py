"""A family for any image-text model of transformers whose checkpoint has a chat template: that template is the prompt.

The template must accept one ``{"type": "image"}`` part in a turn and write an end token behind every answer. The text
of a conversation must begin with the text of its first turns. A conversation with another text is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from lcl_adapter import reading
from lcl_adapter.base.families.base import IMAGE, Family, Rendered
from lcl_adapter.base.layouts import Checkpoint
from lcl_adapter.data.conversations import Turn
from lcl_adapter.errors import DataError, ModelError
from lcl_adapter.files import read_object

QUESTION = Turn("user", "q")
ANSWER = Turn("assistant", "a")
MAX_TEMPLATE = 2**18  # characters; the longest that are published have about 20,000


@dataclass(frozen=True)
class Template:
    """A checkpoint's chat template: messages -> text, without the begin token, which the encoder adds."""

    tokenizer: Any
    text: str

    def __call__(self, messages: list[dict[str, Any]], opened: bool) -> str:
        rendered: str = self.tokenizer.apply_chat_template(messages, chat_template=self.text, tokenize=False, add_generation_prompt=opened)
        bos = self.tokenizer.bos_token
        return rendered.removeprefix(bos) if bos else rendered


def any_base(*_: Any) -> bool:
    """A family that was read from a checkpoint matches that checkpoint."""
    return True


@dataclass(frozen=True)
class ChatTemplate(Family):
    """A family read from a checkpoint.

    placeholder: the template's text of an image. expanded: the processor's tokens of an image.
    """

    template: Template = Template(None, "")
    placeholder: str = IMAGE
    expanded: str = IMAGE

    def render(self, turns: Sequence[Turn], opened: bool = False, first: bool = True) -> Rendered:
        """As :meth:`Family.render`.

        Turns that are not first are rendered behind a short exchange, whose text is cut off again.
        """
        before = [] if first else [QUESTION, ANSWER]
        cut = len(self._closed(before)) if before else 0
        learned = []
        text = self._text([*before, *turns], opened=True) if opened else self._closed([*before, *turns])
        for number, turn in enumerate(turns, 1):
            if turn.role == "assistant" and turn.learn:
                prompt, answered = self._text([*before, *turns[: number - 1]], opened=True), self._closed([*before, *turns[:number]])
                if not (text.startswith(answered) and answered.startswith(prompt)):
                    raise DataError(f"the chat template changes the text before the answer {turn.text!r}, so training would not match prediction.")
                learned.append((len(prompt) - cut, len(answered) - cut - (len(self.end) if turn.unfinished else 0)))
        return Rendered(text[cut:], tuple(learned))

    def _text(self, turns: Sequence[Turn], opened: bool = False) -> str:
        text = self.template([message(turn) for turn in turns], opened)
        return text.replace(self.placeholder, IMAGE)

    def _closed(self, turns: Sequence[Turn]) -> str:
        """The text up to the last answer's end token. The template's text behind it belongs to the next turn."""
        text = self._text(turns)
        if turns and turns[-1].role == "assistant":
            text = text[: text.rindex(self.end) + len(self.end)]
        return text


def message(turn: Turn) -> dict[str, Any]:
    """A turn as chat templates expect it."""
    image: list[dict[str, Any]] = [{"type": "image"}] if turn.picture and not turn.further else []
    if not turn.further:
        return {"role": turn.role, "content": [*image, {"type": "text", "text": turn.text}]}
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(turn.text.split(IMAGE)):
        parts += [{"type": "image"}] * (number > 0) + ([{"type": "text", "text": text}] if text else [])
    return {"role": turn.role, "content": parts}


def read_family(checkpoint: Checkpoint, side: int) -> ChatTemplate:
    """The family of a checkpoint by its own template. side: of the square that pictures are resized to, in pixels.

    Raises ModelError: no chat template, or one that does not accept images or writes no end token.
    """
    tokenizer, name = checkpoint.tokenizer, checkpoint.config.model_type
    where = f"base {checkpoint.folder}: a {name!r} model is supported through its chat template only, and"
    text = _template_of(checkpoint)
    if text is None:
        raise ModelError(f"{where} there is none (chat_template.jinja, or in tokenizer_config.json).")
    if len(text) > MAX_TEMPLATE:
        raise ModelError(f"{where} it has {len(text):,} characters; at most {MAX_TEMPLATE:,} are compiled.")
    template = Template(tokenizer, text)
    try:
        closed = template([message(QUESTION), message(ANSWER)], False)
        opened = template([message(QUESTION)], True)
    except Exception as error:  # a template is a program and can raise anything
        raise ModelError(f"{where} it fails on a question and an answer ({error}).") from error
    rest = closed.removeprefix(opened)
    if rest == closed or not rest.lstrip().startswith("a"):
        raise ModelError(f"{where} an answered question does not begin with the text of the open one, so its answers cannot be located.")
    special = [t for t in tokenizer.all_special_tokens if t in rest]
    if not special:
        raise ModelError(f"{where} it writes no end token behind an answer, so a model could not learn to stop.")
    end = min(special, key=rest.index)
    placeholder = tokenizer.convert_ids_to_tokens(_image_token_id(checkpoint))
    with_image = template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}], False)
    if with_image.count(placeholder) != 1:
        raise ModelError(f"{where} it writes {placeholder!r} {with_image.count(placeholder)} times for one image; 1 is expected.")
    special_tokens = tuple(t for t in tokenizer.all_special_tokens if t != IMAGE)
    return ChatTemplate(
        f"chat-template:{name}", any_base, "", "", "", "", end, special_tokens,
        template=template, placeholder=placeholder, expanded=_expanded(checkpoint, side),
    )  # fmt: skip


def _image_token_id(checkpoint: Checkpoint) -> int:
    token: int = checkpoint.config.image_token_id
    return token


def _template_of(checkpoint: Checkpoint) -> str | None:
    """The chat template: from a file of its own, else from the tokenizer."""
    for name in ("chat_template.jinja", "chat_template.json"):
        file = checkpoint.folder / name
        if file.exists():
            return reading.read_text(file) if name.endswith("jinja") else str(read_object(file).get("chat_template", ""))
    template: str | None = checkpoint.tokenizer.chat_template
    return template


def _expanded(checkpoint: Checkpoint, side: int) -> str:
    """The text that replaces one image's placeholder, by the processor's own code.

    Its video part, which needs torchvision, is not loaded.
    """
    files = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    configs = [*(_json(checkpoint.folder / name) for name in files), checkpoint.raw]
    class_name = next((name for config in configs if (name := config.get("processor_class"))), None)
    processor_class = getattr(transformers, str(class_name or PROCESSOR_MAPPING_NAMES.get(checkpoint.config.model_type)), None)
    if processor_class is None or not hasattr(processor_class, "replace_image_token"):
        raise ModelError(f"base {checkpoint.folder}: processor_config.json names no processor that gives the number of tokens of an image.")

    class ImageOnlyProcessor(processor_class):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
            """Accepts None as the video processor."""

    image_processor = checkpoint.image_processor
    not_options = ("image_processor", "tokenizer", "video_processor", "feature_extractor", "processor_class")
    options = {k: v for k, v in configs[0].items() if k not in not_options and not isinstance(v, dict)}
    if "video_processor" in processor_class.get_attributes():
        options["video_processor"] = None
    try:
        processor = ImageOnlyProcessor(image_processor, checkpoint.tokenizer, **options)
        image = Image.new("RGB", (side, side))
        expanded: str = processor.replace_image_token(preprocess(image_processor, [image], with_layout=True), 0)
    except (TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(f"base {checkpoint.folder}: its processor does not give the number of tokens of an image ({error}).") from error
    return expanded


def _json(file: Path) -> dict[str, Any]:
    return read_object(file) if file.exists() else {}


def preprocess(image_processor: Any, images: Sequence[Image.Image], with_layout: bool = False) -> dict[str, Any]:
    """Arguments of the model's ``get_image_features``: whole images, never split into tiles.

    with_layout: includes the rows and columns of tiles, which the processor needs to expand a placeholder.
    """
    splits = hasattr(image_processor, "do_image_splitting")
    options = {"do_image_splitting": False, "return_row_col_info": with_layout} if splits else {}
    arguments: dict[str, Any] = image_processor([[i] for i in images] if splits else list(images), return_tensors="pt", **options)
    return arguments
