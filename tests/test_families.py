"""Prompts: golden files of each family, the order of images, and special tokens refused in labels."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaForConditionalGeneration

from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.encoder import IGNORED, Encoder, check_alignment
from lcl_adapter.base.families import FAMILIES, chat_template
from lcl_adapter.base.model import Base, load_base, load_encoder, tokens_an_image
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.conversations import WORDINGS, Conversation, Turn, from_episode
from lcl_adapter.data.episodes import Episode, Example, LearnedAnswers
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import DataError, ModelError
from tests.conftest import EVERY, paint
from tests.tiny import tokenizer_of

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
    return from_episode(replace(EPISODE, learned=learned), WORDINGS[wording])


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_golden_prompts_and_masks(family: str, wording: str) -> None:
    """GOLDEN=write writes the files again; then read the difference."""
    sample = conversation(wording)
    rendered = FAMILIES[family].render([*sample.shared, *sample.branches[0]])
    prompt = {"text": rendered.text, "learned": [rendered.text[a:b] for a, b in rendered.learned]}
    path = GOLDEN / f"{family}-{wording}.json"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(json.dumps(prompt, indent=2, ensure_ascii=False) + "\n")
    assert prompt == json.loads(path.read_text())


TILED = ("llava-next-vicuna", "llava-next-mistral", "llava-next-llama-3", "llava-onevision")


def striped(size: tuple[int, int]) -> Picture:
    """A deterministic picture: a slope in each colour, and edges that padding, cropping and resizing move."""
    wide, high = size
    x, y = np.meshgrid(np.arange(wide), np.arange(high))
    pixels = np.stack([x * 255 // (wide - 1), y * 255 // (high - 1), 255 * ((x // 5 + y // 7) % 2)], axis=-1).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return Picture(Path(f"{wide}x{high}.png"), data=data.getvalue())


@pytest.mark.parametrize(("family", "tiles"), [*((family, False) for family in EVERY), *((family, True) for family in TILED)])
def test_golden_pixels(tiny_folder: Callable[[str], Path], family: str, tiles: bool) -> None:
    """The tower's input for a square, a wide and a high picture: shapes, and a sample of the values.

    GOLDEN=write writes the files again.
    """
    vision = VisionFeatures(load_base(BaseRef(str(tiny_folder(family)), device="cpu", tiles=tiles)))
    summary: dict[str, Any] = {}
    for size in ((64, 64), (50, 30), (30, 50)):
        inputs = vision.pixels([striped(size)])
        pixels = inputs["pixel_values"].flatten()
        summary["x".join(map(str, size))] = {
            "shapes": {name: list(value.shape) for name, value in sorted(inputs.items())},
            "mean": round(float(pixels.mean()), 4),
            "spread": round(float(pixels.std()), 4),
            "values": [round(float(v), 3) for v in pixels[:: max(1, len(pixels) // 150)]],
        }
    path = GOLDEN / f"{family}-pixels{'-tiles' if tiles else ''}.json"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(json.dumps(summary) + "\n")
    golden = json.loads(path.read_text())
    assert golden.keys() == summary.keys()
    for size, expected in golden.items():
        assert summary[size]["shapes"] == expected["shapes"]
        for name in ("mean", "spread", "values"):
            assert summary[size][name] == pytest.approx(expected[name], abs=2e-3), (size, name)


def test_images_are_in_the_order_of_their_labels(tiny_base: Base) -> None:
    """One image in each user turn, followed by the answer that names it."""
    sample = conversation("short")
    assert [p.path.stem for p in sample.pictures] == ["a", "b", "c", "d", "e", "f"]
    text = tiny_base.family.render([*sample.shared, *sample.branches[0]]).text
    parts = text.split("<image>")
    assert len(parts) == 6
    for part, label in zip(parts[1:], ["good", "qxv", "qxv", "good", "qxv"], strict=True):
        assert part.split(tiny_base.family.assistant)[1].strip().startswith(label)
    encoded = tiny_base.encoder().conversation(sample)
    assert sum(t == tiny_base.llava.config.image_token_id for t in encoded.ids) == 6 * tiny_base.tokens_an_image


def test_masks_cover_the_answers_and_their_end_tokens_only(tiny_base: Base) -> None:
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
    from transformers import AutoProcessor

    base = load_base(str(pocket_tiny))
    sample = conversation("short")
    turns = [*sample.shared, *sample.branches[0]]
    messages = [
        {
            "role": t.role,
            "content": ([{"type": "image"}] if t.picture else []) + [{"type": "text", "text": t.text}],
        }
        for t in turns
    ]
    processor = AutoProcessor.from_pretrained(base.path)
    templated = processor.apply_chat_template(messages)
    assert templated == "<s>" + base.family.render(turns).text
    opened = processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
    assert opened == "<s>" + base.family.render(turns[:-1], opened=True).text


def test_ids_equal_the_processors(tiny_base: Base) -> None:
    """Training and inference use the ids that a user's own code gets from the processor for the same text."""
    from PIL import Image
    from transformers import AutoProcessor

    sample = conversation("short")
    turns = [*sample.shared, *sample.branches[0][:1]]
    text = tiny_base.family.render(turns, opened=True).text
    images = [Image.new("RGB", (32, 32))] * 5
    theirs = AutoProcessor.from_pretrained(tiny_base.path)(text="<s>" + text, images=images, add_special_tokens=False)["input_ids"][0]
    ours = tiny_base.encoder().turns(turns, opened=True)[0]
    assert list(theirs) == ours


def test_a_chat_template_has_a_bound(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """It is compiled whole. Its time has no bound (docs/security.md)."""
    folder = shutil.copytree(tiny_folder("smolvlm"), tmp_path / "base")
    (folder / "chat_template.jinja").write_text("{# " + "x" * chat_template.MAX_TEMPLATE + " #}")
    with pytest.raises(ModelError, match=r"it has 262,150 characters; at most 262,144 are compiled"):
        load_base(str(folder))


@pytest.mark.parametrize("family", EVERY)
def test_no_text_may_contain_a_special_token(family: str, tiny_folder: Callable[[str], Path]) -> None:
    """Neither those of the prompt nor any other of the tokenizer: each would be read as that token anywhere in a text."""
    encoder = load_encoder(str(tiny_folder(family)))
    tokenizer, own = encoder.tokenizer, encoder.family
    tokens = {"<image>", own.end, *own.special_tokens, *tokenizer.all_special_tokens}
    assert {tokenizer.eos_token, tokenizer.pad_token} - {None} <= tokens
    for token in tokens:
        for turn in (Turn("user", f"x{token} y"), Turn("assistant", f"{token}", learn=True)):
            with pytest.raises(DataError, match=re.escape(f"holds {token!r}, a special token of this model")):
                encoder.turns([turn])
        assert encoder.special_token_in(f"a{token}") == token
    assert encoder.special_token_in("less < more, a | b, [x], </p>") is None


@pytest.mark.parametrize("family", EVERY)
def test_every_family_is_recognised_and_its_prompt_is_consistent(family: str, tiny_folder: Callable[[str], Path]) -> None:
    """Training ids equal inference ids, parts make up the whole, each picture has one image's tokens, only answers and
    end tokens are learned.
    """
    base = load_base(str(tiny_folder(family)))
    assert base.family.name == {"qwen2-vl": "chat-template:qwen2_vl", "smolvlm": "chat-template:smolvlm"}.get(family, family)
    encoder = base.encoder()
    sample = conversation("short")
    check_alignment(encoder, sample)
    ids, labels = encoder.turns([*sample.shared, *sample.branches[0]])
    assert ids.count(encoder.image_token_id) == 5 * encoder.image.count(encoder.image_token_id)
    text = base.family.render([*sample.shared, *sample.branches[0]]).text
    for part, label in zip(text.split("<image>")[1:], ["good", "qxv", "qxv", "good", "qxv"], strict=True):
        assert label in part, "each image is in the turn whose answer names it"
    learned = encoder.tokenizer.decode([label for label in labels if label != IGNORED])
    assert learned.replace(" ", "") == "".join(f"{answer}{base.family.end}" for answer in ("qxv", "good", "qxv"))


@pytest.fixture
def joining(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A base whose tokenizer has one token for the end of a prompt and the beginning of answers with a q."""
    folder = tmp_path / "joining"
    shutil.copytree(tiny_folder("llava-1.5"), folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    model, separate = raw["model"], isinstance(raw["model"]["merges"][0], list)
    for first, second in (("▁", "q"), ("▁ASSISTANT:", "▁q")):
        model["merges"].append([first, second] if separate else f"{first} {second}")
        model["vocab"].setdefault(first + second, len(model["vocab"]) + 10)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return folder


def test_every_answer_is_checked_against_its_prompt(joining: Path) -> None:
    """In training and in prediction, and not only the first one."""
    base = load_base(str(joining))
    encoder = base.encoder()
    sample = conversation("short")
    good = Conversation(sample.shared, sample.branches[1:], "good sample")
    assert sample.branches[1][-1].text == "good"
    quiet = tuple(replace(turn, learn=False) for turn in good.shared)
    encoder.conversation(replace(good, shared=quiet))
    with pytest.raises(DataError, match=r"bad sample: this tokenizer joins the beginning of the answer ' ?qxv' to the text before it"):
        encoder.conversation(Conversation(quiet, sample.branches, "bad sample"))
    with pytest.raises(DataError, match=r"joins the beginning of the answer ' ?qxv'"):
        encoder.conversation(good)  # a label of the support set that is learned
    with pytest.raises(DataError, match="joins the beginning of the answer 'qxv' to its question"):
        Predictor(base).run([((), Turn("user", "What is this?"), ("good", "qxv"))])
    assert Predictor(base).run([((), Turn("user", "What is this?"), ("good", "bad"))], generate=False)


def test_a_later_turn_is_checked_against_the_answer_before_it() -> None:
    """A tokenizer that joins the end token to what follows it."""

    class Joining:
        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer = tokenizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tokenizer, name)

        def __call__(self, text: str, **options: Any) -> Any:
            encoded = self.tokenizer(text, **options)
            if "yes</s>" in text:
                encoded["input_ids"] = encoded["input_ids"][:-1]
                encoded["offset_mapping"] = [*encoded["offset_mapping"][:-2], encoded["offset_mapping"][-1]]
            return encoded

    tokenizer = tokenizer_of("llava-1.5")
    encoder = Encoder(FAMILIES["llava-1.5"], Joining(tokenizer), 3, [3], 1000)

    def dialogue(answer: str) -> Conversation:
        turns = (Turn("user", "a"), Turn("assistant", answer, learn=True), Turn("user", "b"), Turn("assistant", "no", learn=True))
        return Conversation((), (turns,), "record 7")

    encoder.conversation(dialogue("no"))
    with pytest.raises(DataError, match=r"record 7: this tokenizer joins the (end|beginning) of the answer"):
        encoder.conversation(dialogue("yes"))


@pytest.mark.parametrize("family", EVERY)
def test_a_whole_row_is_the_prompt_of_each_of_its_answers(family: str, tiny_folder: Callable[[str], Path]) -> None:
    """Of every learned answer of a dialogue: its ids follow those of the prompt that prediction reads."""
    encoder = load_encoder(str(tiny_folder(family)))
    turns = [Turn(*turn, learn=turn[0] == "assistant") for turn in (("user", "a?"), ("assistant", "x, y."), ("user", "\nb"), ("assistant", "\nz"))]
    row = encoder.conversation(Conversation((), (tuple(turns),), "record"))
    for number in (1, 3):
        prompt = encoder.turns(turns[:number], opened=True)[0]
        assert row.ids[: len(prompt)] == prompt
    earlier = encoder.turns(turns[:2])[0]
    assert row.ids == earlier + encoder.turns(turns[2:], first=False)[0], "the next question is read behind the answer"


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("family", [f for f in EVERY if f.startswith(("llava-next", "llava-onevision"))])
def test_tiles_have_the_announced_number_of_tokens(family: str, tiles: bool, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    base = load_base(BaseRef(str(tiny_folder(family)), tiles=tiles))
    picture = Picture(paint(tmp_path / "wide.png", (200, 40, 40), size=(90, 50)))
    features = VisionFeatures(base).projected_features([picture])["image"].pooler_output[0]
    assert len(features) == base.tokens_an_image == (4 + 4 * 5 if tiles else 5)


def test_tiles_are_refused_where_the_model_has_none(pocket_tiny: Path) -> None:
    with pytest.raises(ModelError, match="LLaVA-NeXT and OneVision"):
        load_base(BaseRef(str(pocket_tiny), tiles=True))


def test_published_models_have_the_tokens_of_their_papers() -> None:
    """576 tokens an image for LLaVA-1.5, 256 for v1 and LCL, 729 and a line break for OneVision, up to 2,880 and its
    line breaks for NeXT.
    """

    def config(kind: str, tower: str, side: int, patch: int, strategy: str) -> SimpleNamespace:
        vision = SimpleNamespace(image_size=side, patch_size=patch, model_type=tower)
        return SimpleNamespace(model_type=kind, vision_config=vision, vision_feature_select_strategy=strategy)

    assert tokens_an_image(config("llava", "clip_vision_model", 336, 14, "default")) == 576
    assert tokens_an_image(config("llava", "clip_vision_model", 224, 14, "default")) == 256
    assert tokens_an_image(config("llava_onevision", "siglip_vision_model", 384, 14, "full")) == 730
    assert tokens_an_image(config("llava_next", "clip_vision_model", 336, 14, "default"), tiles=True) == 576 + 48 * 49


@pytest.mark.parametrize("wording", ["lcl", "bare"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "pocket"])
def test_the_chat_template_is_the_prompt(family: str, wording: str, tiny_folder: Callable[[str], Path]) -> None:
    """The template that a merged checkpoint has for transformers and vLLM renders the same text."""
    base = load_base(str(tiny_folder(family)))
    sample = conversation(wording)
    turns = [*sample.shared, *sample.branches[0]]
    messages = [chat_template.message(t) for t in turns]
    template = FAMILIES[family].chat_template()

    def templated(part: list[dict[str, object]], opened: bool) -> str:
        return str(base.tokenizer.apply_chat_template(part, chat_template=template, tokenize=False, add_generation_prompt=opened))

    assert templated(messages, False) == base.family.render(turns).text
    assert templated(messages[:-1], True) == base.family.render(turns[:-1], opened=True).text


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "pocket"])
@pytest.mark.parametrize("content", ["Be brief.", [{"type": "text", "text": "Be brief."}]], ids=["text", "parts"])
def test_a_system_message_goes_before_the_next_users_text(family: str, content: Any, tiny_folder: Callable[[str], Path]) -> None:
    """As on our own server, and never as an answer of the assistant's."""
    base, picture = load_base(str(tiny_folder(family))), Picture(Path("a.png"))
    first, answer = Turn("user", "What is it?", picture), Turn("assistant", "good")
    messages = [
        {"role": "system", "content": content},
        *(chat_template.message(turn) for turn in (first, answer, Turn("user", "And this?", picture))),
    ]
    template = FAMILIES[family].chat_template()
    rendered = str(base.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True))
    turns = [replace(first, text="Be brief.\nWhat is it?"), answer, Turn("user", "And this?", picture)]
    assert rendered == base.family.render(turns, opened=True).text


def test_several_images_in_a_turn_are_placed_by_its_text() -> None:
    pictures = (Picture(Path("a.png")), Picture(Path("b.png")))
    turn = Turn("user", "Compare <image> with <image>.", pictures[0], further=pictures[1:])
    assert FAMILIES["llava-v1"].render([turn]).text.endswith("Compare <im_start><image><im_end> with <im_start><image><im_end>. ")
    assert [p["type"] for p in chat_template.message(turn)["content"]] == ["text", "image", "text", "image", "text"]


def test_a_base_of_no_family_is_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A LLaVA whose language model has no known prompt; a model without a chat template."""
    strange = tmp_path / "strange"
    shutil.copytree(tiny_folder("llava-1.5"), strange)
    settings = json.loads((strange / "tokenizer_config.json").read_text())
    (strange / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<unk>"}))
    with pytest.raises(ModelError, match="of no family known here"):
        load_base(str(strange))
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder("qwen2-vl"), bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="there is none"):
        load_base(str(bare))
    (bare / "chat_template.jinja").write_text("{{ messages | length }}{% for m in messages %}{{ m['role'] }}<|im_end|>{% endfor %}")
    with pytest.raises(ModelError, match="answered question does not begin"):
        load_base(str(bare))


def test_a_model_that_would_ignore_the_pictures_is_refused(tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.17 has no ``mm_encoder_outputs``, accepts any other argument, and answers without pictures."""

    def forward(self: Any, input_ids: Any = None, pixel_values: Any = None, **kwargs: Any) -> None: ...

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", forward)
    with pytest.raises(ModelError, match=r"LlavaForConditionalGeneration of transformers .* accepts no picture .* install transformers 5\.23"):
        load_base(str(tiny_folder("llava-1.5")))
