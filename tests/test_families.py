"""Prompts: golden files for each family, the order of images, and no way for a label to forge a mark."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lcl_adapter.batches import IGNORED, check_alignment
from lcl_adapter.conversations import WORDINGS, Conversation, Turn, from_episode
from lcl_adapter.episodes import Episode, Example, LearnedAnswers
from lcl_adapter.errors import DataError, ModelError
from lcl_adapter.families import FAMILIES, detect
from lcl_adapter.model import Base
from lcl_adapter.sources import Picture

GOLDEN = Path(__file__).parent / "golden"


def example(name: str, label: str) -> Example:
    return Example(Picture(Path(f"{name}.png")), label, 0)


EPISODE = Episode(
    support=(example("a", "good"), example("b", "qxv"), example("c", "qxv"), example("d", "good")),
    queries=(example("e", "qxv"), example("f", "good")),
    labels=("good", "qxv"),
    learned=LearnedAnswers.REPEATED,
    origin="golden",
)


def conversation(wording: str, learned: LearnedAnswers = LearnedAnswers.REPEATED) -> Conversation:
    from dataclasses import replace

    return from_episode(replace(EPISODE, learned=learned), WORDINGS[wording])


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_golden_prompts_and_masks(family: str, wording: str) -> None:
    """Set GOLDEN=write to write the files anew, then read the difference."""
    spoken = conversation(wording)
    rendered = FAMILIES[family].render([*spoken.shared, *spoken.branches[0]])
    found = {"text": rendered.text, "learned": [rendered.text[a:b] for a, b in rendered.learned]}
    path = GOLDEN / f"{family}-{wording}.json"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    assert found == json.loads(path.read_text())


def test_images_are_in_the_order_of_their_labels(tiny_base: Base) -> None:
    """One image a user turn, each directly in the turn whose answer names it."""
    spoken = conversation("short")
    assert [p.path.stem for p in spoken.pictures] == ["a", "b", "c", "d", "e", "f"]
    text = tiny_base.family.render([*spoken.shared, *spoken.branches[0]]).text
    parts = text.split("<image>")
    assert len(parts) == 6
    for part, label in zip(parts[1:], ["good", "qxv", "qxv", "good", "qxv"], strict=True):
        assert part.split(tiny_base.family.assistant)[1].strip().startswith(label)
    encoded = tiny_base.encoder().conversation(spoken)
    assert sum(t == tiny_base.llava.config.image_token_id for t in encoded.ids) == 6 * tiny_base.tokens_an_image


def test_masks_hold_the_answers_and_their_end_and_nothing_else(tiny_base: Base) -> None:
    encoder = tiny_base.encoder()
    for learned, expected in ((LearnedAnswers.QUERY, ["qxv", "good"]), (LearnedAnswers.REPEATED, ["qxv", "good", "qxv", "good"])):
        encoded = encoder.conversation(conversation("short", learned))
        runs: list[list[int]] = []
        for before, label in zip([IGNORED, *encoded.labels], encoded.labels, strict=False):
            if label != IGNORED:
                if before == IGNORED:
                    runs.append([])
                runs[-1].append(label)
        assert [encoder.tokenizer.decode(r).strip() for r in runs] == [f"{answer}</s>" for answer in expected]
        assert all(label in (IGNORED, token) for label, token in zip(encoded.labels, encoded.ids, strict=True))


@pytest.mark.parametrize("wording", WORDINGS)
def test_training_ids_are_inference_ids(tiny_base: Base, wording: str) -> None:
    check_alignment(tiny_base.encoder(), conversation(wording))


def test_our_prompt_is_the_pocket_chat_template(pocket_tiny: Path) -> None:
    from lcl_adapter.model import load_base

    base = load_base(str(pocket_tiny))
    spoken = conversation("short")
    turns = [*spoken.shared, *spoken.branches[0]]
    messages = [
        {
            "role": t.role,
            "content": ([{"type": "image"}] if t.picture else []) + [{"type": "text", "text": t.text}],
        }
        for t in turns
    ]
    templated = base.processor.apply_chat_template(messages)
    assert templated == "<s>" + base.family.render(turns).text
    opened = base.processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
    assert opened == "<s>" + base.family.render(turns[:-1], opened=True).text


def test_ids_are_the_processors_own(tiny_base: Base) -> None:
    """What a user's own code gets from the processor for the same text is what we train and ask on."""
    from PIL import Image

    spoken = conversation("short")
    turns = [*spoken.shared, *spoken.branches[0][:1]]
    text = tiny_base.family.render(turns, opened=True).text
    images = [Image.new("RGB", (32, 32))] * 5
    theirs = tiny_base.processor(text="<s>" + text, images=images, add_special_tokens=False)["input_ids"][0]
    ours = tiny_base.encoder().turns(turns, opened=True)[0]
    assert list(theirs) == ours


@pytest.mark.parametrize("forged", ["<image>", "x</s>", "<|user|>"])
def test_a_label_cannot_forge_a_mark(tiny_base: Base, forged: str) -> None:
    with pytest.raises(DataError, match="reads as a mark"):
        tiny_base.family.render([Turn("user", forged)])


def test_a_base_that_is_no_llava_is_refused(tiny_base: Base) -> None:
    class Other:
        model_type = "qwen2_vl"

    with pytest.raises(ModelError, match="not a LLaVA"):
        detect(Other(), tiny_base.processor.tokenizer)
