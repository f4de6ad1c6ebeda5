"""Golden prompts and masks of every task in each family; several images in a turn; near classes; the preview's filters."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.encoder import IGNORED, check_alignment
from lcl_adapter.base.families import FAMILIES
from lcl_adapter.base.model import Base
from lcl_adapter.base.vision import squared
from lcl_adapter.cli import main
from lcl_adapter.data import episodes
from lcl_adapter.data.conversations import WORDINGS, Conversation, from_dialogues, from_episode
from lcl_adapter.data.sources import read_class_folders
from lcl_adapter.errors import DataError
from lcl_adapter.recipe.sources import EpisodeOptions, InspectionOptions
from tests.conftest import paint
from tests.test_episodes import made_pool
from tests.test_formats import opened
from tests.test_policies import PARTS

GOLDEN = Path(__file__).parent / "golden"


def conversations() -> dict[str, Conversation]:
    """One of each task, in a phrasing that (seed 0, index) stands for."""
    wording = WORDINGS["short"]

    def drawn(pool, options, index: int = 0) -> Conversation:  # type: ignore[no-untyped-def]
        return from_episode(episodes.draw(pool, options, 0, 0, index), wording)

    classes = made_pool(6, 6, 0)
    made = {
        f"inspection-{form}": drawn(PARTS, InspectionOptions(forms={form: 1}, shots=[1], queries=1))  # type: ignore[dict-item]
        for form in ("plain", "one-class", "two-way", "naming")
    }
    made["inspection-localise"] = drawn(opened("mvtec"), InspectionOptions(forms={"localise": 1}, shots=[1]))
    made["inspection-one-class-ja"] = drawn(PARTS, InspectionOptions(shots=[1], languages=["ja"]))
    made["product"] = drawn(classes, EpisodeOptions(policy="product", shots=[1]))
    made["product-plain"] = drawn(classes, EpisodeOptions(policy="product", plain=1.0))
    made["locate"] = drawn(opened("class-folder-boxes"), EpisodeOptions(policy="locate", shots=[1]))
    made["2way-ref"] = drawn(classes, EpisodeOptions(policy="2way-ref", shots=[2]))
    made["jigsaw"] = drawn(classes, EpisodeOptions(policy="jigsaw", tiles=[4]))
    made["rec"] = from_dialogues((opened("shikra-rec").dialogues[0],))
    made["pope"] = from_dialogues((opened("pope").dialogues[0],))
    made["vqav2"] = from_dialogues((opened("vqav2").dialogues[0],))
    made["two-images"] = from_dialogues((opened("llava-json").dialogues[-2],))
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_tasks(family: str) -> None:
    """Set GOLDEN=write to write the files anew, then read the difference."""
    rendered_tasks = {}
    for name, conversation in conversations().items():
        rendered = FAMILIES[family].render([*conversation.shared, *conversation.branches[0]])
        rendered_tasks[name] = {"text": rendered.text, "learned": [rendered.text[a:b] for a, b in rendered.learned]}
        assert rendered.text.count("<image>") == sum(len(t.pictures) for t in (*conversation.shared, *conversation.branches[0]))
    path = GOLDEN / f"{family}-tasks.json"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(json.dumps(rendered_tasks, indent=2, ensure_ascii=False) + "\n")
    assert rendered_tasks == json.loads(path.read_text())


def test_training_ids_are_inference_ids_for_every_task(tiny_base: Base) -> None:
    encoder = tiny_base.encoder()
    for name, conversation in conversations().items():
        check_alignment(encoder, conversation)
        encoded = encoder.conversation(conversation)
        images = sum(t == encoder.image_token_id for t in encoded.ids)
        assert images == len(conversation.pictures) * encoder.tokens_an_image, name
        learned = [t for t in encoded.labels if t != IGNORED]
        assert encoder.tokenizer.decode(learned[:-1]).strip().startswith(conversation.branches[0][-1].text[:3]), name


def test_two_images_of_one_turn_are_both_read(tiny_base: Base) -> None:
    """Replacing either of them changes what the model says."""
    from dataclasses import replace

    conversation = conversations()["two-images"]
    query = conversation.branches[0][0]
    other = opened("pope").dialogues[4].pictures[0]
    predictor = Predictor(tiny_base)

    def likelihoods(turn) -> tuple[float, ...]:  # type: ignore[no-untyped-def]
        return predictor.run([((), turn, ("No.", "Yes."))], generate=False)[0].log_likelihoods

    original = likelihoods(query)
    for changed in (replace(query, picture=other), replace(query, further=(other,))):
        assert max(abs(a - b) for a, b in zip(original, likelihoods(changed), strict=True)) > 1e-4
    with pytest.raises(DataError, match="has 1 <image>, its turn has 2 images"):
        tiny_base.encoder().turns([replace(query, text="one <image> only")])


def test_a_picture_is_padded_to_a_square_and_not_cut(tmp_path: Path) -> None:
    from PIL import Image

    with Image.open(paint(tmp_path / "wide.png", (200, 10, 10), size=(60, 20))) as wide:
        page = squared(wide, (0.5, 0.5, 0.5))
    assert page.size == (60, 60)
    assert page.getpixel((30, 2)) == (127, 127, 127)
    assert page.getpixel((1, 30))[0] > 150, "the sides are still there"
    assert page.getpixel((58, 30))[0] > 150


def test_near_classes_by_the_bases_own_tower(tmp_path: Path, pocket_tiny: Path) -> None:
    colours = {"red": (220, 20, 20), "rose": (225, 40, 40), "blue": (20, 20, 220), "navy": (25, 25, 190)}
    for name, colour in colours.items():
        for k in range(4):
            paint(tmp_path / "photos" / name / f"{k}.png", colour, seed=k)
    (tmp_path / "photos" / "red" / "broken.png").write_bytes(b"")
    result = CliRunner().invoke(main, ["data", "index", str(tmp_path / "photos"), "--base", str(pocket_tiny), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) | {"written": ""} == {"written": "", "classes": 4, "pictures": 16, "left_out": 1}
    ranked = json.loads((tmp_path / "photos" / "neighbours.json").read_text())["ranked"]
    assert {name: near[0] for name, near in ranked.items()} == {"red": "rose", "rose": "red", "blue": "navy", "navy": "blue"}
    pool = read_class_folders(tmp_path / "photos")
    assert pool.grouped
    assert next(pool.classes[i].name for i in pool.neighbours(0)) == "navy"


def test_the_preview_filters_by_source_and_policy(tmp_path: Path) -> None:
    out = tmp_path / "preview.html"
    arguments = ["data", "preview", "recipes/mix-pocket.yaml", "--episodes", "2", "--out", str(out)]
    whole = CliRunner().invoke(main, arguments)
    assert whole.exit_code == 0, whole.output
    page = out.read_text()
    for name in ("lcl", "inspect", "products", "vqa"):
        assert page.count(f'data-source="{name}"') == 3, "a section and two strips"
    for policy in ("n-way", "inspection", "product", "llava-json"):
        assert f'data-key="policy" value="{policy}"' in page
    assert CliRunner().invoke(main, [*arguments, "--policy", "inspection"]).exit_code == 0
    assert 'data-source="inspect"' in out.read_text()
    assert 'data-source="lcl"' not in out.read_text()
    wrong = CliRunner().invoke(main, [*arguments, "--source", "inspekt"])
    assert wrong.exit_code == 2
    assert "did you mean 'inspect'?" in wrong.stderr
    none = CliRunner().invoke(main, [*arguments, "--policy", "jigsaw"])
    assert none.exit_code == 2
    assert "no source has jigsaw" in none.stderr
