"""Write questions about single shipped drawings, in LLaVA's training JSON.

The base can answer them, and the adapter must not lose that.

``vqa_train.json`` asks about training classes, for replay. ``captions_eval.json`` asks for the names of training
classes. ``vqa_eval.json`` asks what kind of thing a *held-out* drawing shows, and yes-or-no questions about that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

NAME, KIND = "What is this?", "What kind of thing is this?"


def _entry(number: int, record: dict[str, Any], drawing: str, question: str, answer: str) -> dict[str, Any]:
    return {
        "id": f"{record['id']}-{number}",
        "image": f"{record['id']}/{drawing}.webp",
        "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
    }


def _kind_question(record: dict[str, Any], kinds: list[str], rng: np.random.Generator) -> tuple[str, str]:
    """A question and its answer: half of the time the kind, else yes or no with equal chances."""
    if rng.random() < 0.5:
        return KIND, record["kind"]
    if rng.random() < 0.5:
        return f"Is this a {record['kind']}?", "yes"
    return f"Is this a {rng.choice([k for k in kinds if k != record['kind']])}?", "no"


def write(data: Path, seed: int = 0) -> None:
    """Write the three files beside ``classes.json``."""
    rng = np.random.default_rng(seed)
    records = json.loads((data / "classes.json").read_text())
    kinds = sorted({r["kind"] for r in records})
    files: dict[str, list[dict[str, Any]]] = {"vqa_train": [], "captions_eval": [], "vqa_eval": []}
    for record in records:
        drawings = record["drawings"]
        if record["split"] == "train":
            for drawing in drawings:
                question, answer = (NAME, record["name"]) if rng.random() < 0.7 else _kind_question(record, kinds, rng)
                files["vqa_train"].append(_entry(len(files["vqa_train"]), record, drawing, question, answer))
            chosen = str(rng.choice(drawings))
            files["captions_eval"].append(_entry(len(files["captions_eval"]), record, chosen, NAME, record["name"]))
        elif record["split"] == "held_out":
            for drawing in rng.choice(drawings, 2, replace=False):
                question, answer = _kind_question(record, kinds, rng)
                files["vqa_eval"].append(_entry(len(files["vqa_eval"]), record, str(drawing), question, answer))
    for name, entries in files.items():
        order = rng.permutation(len(entries))
        lines = ",\n".join(json.dumps(entries[i], ensure_ascii=False) for i in order)
        (data / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
