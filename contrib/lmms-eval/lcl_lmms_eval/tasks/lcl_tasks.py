"""What the tasks' YAML files name: a record -> messages, prompt, photos; an answer -> its scores.

It stands beside the records and imports nothing of lcl-adapter. ``lcl_rules.py`` beside it has the rules of ``lcl-adapter eval``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = Path(__file__).parent
Record = dict[str, Any]


def _load_rules() -> Any:
    spec = importlib.util.spec_from_file_location("lcl_rules", FOLDER / "lcl_rules.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rules = _load_rules()


def _photo(name: str) -> Image.Image:
    """RGB. A plain file is not converted, so that a model can see which file it is."""
    image: Image.Image = Image.open(FOLDER / name)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def doc_to_visual(doc: Record) -> list[Image.Image]:
    """The photos in order: those of the support set, then the query."""
    return [_photo(message["image"]) for message in doc["messages"] if message["image"]]


def doc_to_messages(doc: Record) -> list[dict[str, Any]]:
    """For chat models: one photo in each user turn, before its text. The labels of the support set are the assistant's turns."""
    messages = []
    for message in doc["messages"]:
        content: list[dict[str, Any]] = [{"type": "image", "url": _photo(message["image"])}] if message["image"] else []
        if message["text"]:
            content.append({"type": "text", "text": message["text"]})
        messages.append({"role": message["role"], "content": content})
    return messages


def doc_to_text(doc: Record) -> str:
    """For models that get one text: the same turns in order, with ``<image>`` in the place of each photo."""
    blocks: list[str] = []
    for message in doc["messages"]:
        text = "\n".join(part for part in ("<image>" if message["image"] else "", message["text"]) if part)
        if message["role"] == "assistant":
            blocks[-1] += "\n" + text
        else:
            blocks.append(text)
    return "\n\n".join(blocks)


def doc_to_target(doc: Record) -> str:
    return str(doc["answer"])


def process_labels(doc: Record, results: Sequence[str]) -> dict[str, float]:
    """``accuracy``: the text is the right label. ``lcl_rule``: LCL's rule, which also counts a label inside a sentence."""
    others = [label.lower() for label in doc["labels"] if label != doc["label"]]
    return {
        "accuracy": float(rules.exact(results[0], doc["answer"])),
        "lcl_rule": float(rules.lcl_rule(results[0].lower(), doc["label"].lower(), others)),
    }


def process_open_mi(doc: Record, results: Sequence[str]) -> dict[str, float]:
    """``accuracy``: VL-ICL Bench's rule. ``exact``: the text is the right label."""
    return {
        "accuracy": float(rules.vl_icl_rule(results[0], doc["answer"])),
        "exact": float(rules.exact(results[0], doc["answer"])),
    }


def process_inspection(doc: Record, results: Sequence[str]) -> dict[str, Any]:
    """``accuracy``: the text is the right answer. ``balanced_accuracy`` is of all photos together (``balanced``)."""
    right = float(rules.exact(results[0], doc["answer"]))
    return {"accuracy": right, "balanced_accuracy": [doc["group"], doc["label"], right]}


def balanced(items: Sequence[tuple[str, str, float]]) -> float:
    """The mean of the accuracy on good and on defective photos, by category, then over the categories that have both."""
    shares: dict[str, dict[str, list[float]]] = {}
    for group, label, right in items:
        shares.setdefault(group, {}).setdefault(label, []).append(right)
    values = [sum(sum(own) / len(own) for own in by_label.values()) / len(by_label) for by_label in shares.values() if len(by_label) > 1]
    return sum(values) / len(values) if values else float("nan")
