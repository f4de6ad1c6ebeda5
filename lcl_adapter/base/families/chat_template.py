"""Any image-text model of transformers whose checkpoint brings a chat template: its own template is the prompt.

What is asked of it: one image a turn as a ``{"type": "image"}`` part, an end mark behind every answer, and that turns
add up (a conversation begins with the text of its beginning). ``batches.check_alignment`` refuses one that does not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from lcl_adapter.base.families.base import IMAGE, Family, Rendered
from lcl_adapter.base.layouts import Checkpoint
from lcl_adapter.data.conversations import Turn
from lcl_adapter.errors import ModelError

ASKED = Turn("user", "q")
ANSWERED = Turn("assistant", "a")


@dataclass(frozen=True)
class ChatTemplate(Family):
    """A family read off a checkpoint. ``placeholder``: what its template writes for an image; ``expanded``: what the processor makes of that."""

    template: Callable[..., str] = lambda *_: ""
    placeholder: str = IMAGE
    expanded: str = IMAGE

    def render(self, turns: Sequence[Turn], opened: bool = False, first: bool = True) -> Rendered:
        before = [] if first else [ASKED, ANSWERED]
        cut = len(self._closed(before)) if before else 0
        learned = []
        for number, turn in enumerate(turns, 1):
            if turn.role == "assistant" and turn.learn:
                begun, ended = self._text([*before, *turns[: number - 1]], opened=True), self._closed([*before, *turns[:number]])
                learned.append((len(begun) - cut, len(ended) - cut))
        text = self._text([*before, *turns], opened=True) if opened else self._closed([*before, *turns])
        return Rendered(text[cut:], tuple(learned))

    def _text(self, turns: Sequence[Turn], opened: bool = False) -> str:
        text = self.template([message(turn) for turn in turns], opened)
        return text.replace(self.placeholder, IMAGE)

    def _closed(self, turns: Sequence[Turn]) -> str:
        """Up to the last answer's end mark; what the template writes behind it belongs to the next turn."""
        text = self._text(turns)
        if turns and turns[-1].role == "assistant":
            text = text[: text.rindex(self.end) + len(self.end)]
        return text


def message(turn: Turn) -> dict[str, Any]:
    """A turn as chat templates take it."""
    image: list[dict[str, Any]] = [{"type": "image"}] if turn.picture and not turn.further else []
    if not turn.further:
        return {"role": turn.role, "content": [*image, {"type": "text", "text": turn.text}]}
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(turn.text.split(IMAGE)):
        parts += [{"type": "image"}] * (number > 0) + ([{"type": "text", "text": text}] if text else [])
    return {"role": turn.role, "content": parts}


def read(checkpoint: Checkpoint, side: int) -> ChatTemplate:
    """The family of a checkpoint by its own template. side: of the square that pictures are made, in pixels.

    Raises ModelError: no chat template, one that takes no images or has no end mark.
    """
    tokenizer, name = checkpoint.tokenizer, checkpoint.config.model_type
    where = f"base {checkpoint.folder}: a {name!r} model is known by its chat template alone, and"
    text = _template_of(checkpoint)
    if text is None:
        raise ModelError(f"{where} there is none (chat_template.jinja, or in tokenizer_config.json).")

    def template(messages: list[dict[str, Any]], opened: bool) -> str:
        made: str = tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False, add_generation_prompt=opened)
        bos = tokenizer.bos_token
        return made.removeprefix(bos) if bos else made

    try:
        closed, begun = template([message(ASKED), message(ANSWERED)], False), template([message(ASKED)], True)
    except Exception as error:  # a template is a program of its own
        raise ModelError(f"{where} it fails on a question and an answer ({error}).") from error
    rest = closed.removeprefix(begun)
    if rest == closed or not rest.lstrip().startswith("a"):
        raise ModelError(f"{where} an answered question does not begin with the text of the open one, so its answers cannot be marked.")
    special = [t for t in tokenizer.all_special_tokens if t in rest]
    if not special:
        raise ModelError(f"{where} it writes no end mark behind an answer, so a model could not learn to stop.")
    end = min(special, key=rest.index)
    placeholder = tokenizer.convert_ids_to_tokens(_image_token_id(checkpoint))
    with_image = template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}], False)
    if with_image.count(placeholder) != 1:
        raise ModelError(f"{where} it writes {placeholder!r} {with_image.count(placeholder)} times for one image; 1 is expected.")
    marks = tuple(t for t in tokenizer.all_special_tokens if t != IMAGE)
    return ChatTemplate(
        f"chat-template:{name}", lambda *_: True, "", "", "", "", end, marks,
        template=template, placeholder=placeholder, expanded=_expanded(checkpoint, side),
    )  # fmt: skip


def _image_token_id(checkpoint: Checkpoint) -> int:
    token: int = checkpoint.config.image_token_id
    return token


def _template_of(checkpoint: Checkpoint) -> str | None:
    for name in ("chat_template.jinja", "chat_template.json"):
        file = checkpoint.folder / name
        if file.exists():
            text = file.read_text(encoding="utf-8")
            return text if name.endswith("jinja") else str(json.loads(text)["chat_template"])
    template: str | None = checkpoint.tokenizer.chat_template
    return template


def _expanded(checkpoint: Checkpoint, side: int) -> str:
    """What stands for one image in the end, by the processor's own code; its video half, which needs torchvision, is left out."""
    told = {name: _json(checkpoint.folder / name) for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")}
    options = told["processor_config.json"]
    named = [one.get("processor_class") for one in (*told.values(), checkpoint.raw)]
    usual = PROCESSOR_MAPPING_NAMES.get(checkpoint.config.model_type)
    kind = getattr(transformers, str(next((n for n in named if n), None) or usual), None)
    images = checkpoint.image_processor
    if kind is None or not hasattr(kind, "replace_image_token"):
        raise ModelError(f"base {checkpoint.folder}: processor_config.json names no processor that says how many tokens an image takes.")

    class Still(kind):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
            """The video processor is none here."""

    parts = ("image_processor", "tokenizer", "video_processor", "feature_extractor")
    plain = {k: v for k, v in options.items() if k not in (*parts, "processor_class") and not isinstance(v, dict)}
    try:
        processor = Still(images, checkpoint.tokenizer, **({"video_processor": None} if "video_processor" in kind.get_attributes() else {}), **plain)
        made: str = processor.replace_image_token(process(images, [Image.new("RGB", (side, side))], told=True), 0)
    except (TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(f"base {checkpoint.folder}: its processor cannot tell how many tokens an image takes ({error}).") from error
    return made


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def process(images: Any, pictures: Sequence[Image.Image], told: bool = False) -> dict[str, Any]:
    """Pixels as the model's ``get_image_features`` takes them: whole pictures, never cut into tiles. told: with what the processor asks of them."""
    options = {"do_image_splitting": False, "return_row_col_info": told} if hasattr(images, "do_image_splitting") else {}
    made: dict[str, Any] = images([[p] for p in pictures] if options else list(pictures), return_tensors="pt", **options)
    return made
