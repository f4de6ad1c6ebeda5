"""Pictures of a support set with fewer tokens: pooled features, rows, training, and every command that asks with them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from lcl_adapter.answering.ask import ask_model
from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.adapter import load_adapter, read_manifest
from lcl_adapter.base.encoder import IGNORED
from lcl_adapter.base.model import Base, attach, load_base, load_encoder
from lcl_adapter.base.pooling import pool, sizes_of
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.supports import asked_otherwise
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.cli import main
from lcl_adapter.data.conversations import WORDINGS, Conversation, Turn, shown_before, to_conversation
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import EpisodeError, ModelError
from lcl_adapter.memory.plan import make_plan
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.schema import AdapterOptions
from lcl_adapter.report.preview import pieces_of
from lcl_adapter.serve.engine import Engine
from lcl_adapter.serve.service import Service
from lcl_adapter.serve.store import Store
from lcl_adapter.training.collate import Collator, collate
from lcl_adapter.training.lengths import check_rows
from lcl_adapter.training.losses import own_logits
from lcl_adapter.training.trainer import LclTrainer
from tests import tiny
from tests.conftest import paint
from tests.test_merge import adapter_on
from tests.test_predict import requests
from tests.test_serve import client_of, examples, offline, png, put, url
from tests.test_trainer import small

WHOLE, POOLED = 36, 9  # a grid of 6 x 6, and of 3 x 3


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA whose pictures are grids of 6 x 6 patches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "SIDE", 96)
        return tiny.save_tiny(tmp_path_factory.mktemp("wide"), "pocket")


@pytest.fixture(scope="module")
def base(wide: Path) -> Base:
    return load_base(BaseRef(str(wide), device="cpu", support_tokens=POOLED))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def recipe_of(wide: Path, run: Path, support: int | None = POOLED, **train: Any) -> Recipe:
    values = small(wide, run, max_steps=2, **train).model_dump(mode="json", exclude_none=True)
    return Recipe.model_validate({**values, "image_tokens": {"support": support}})


# Features


def test_pooled_features_are_the_means_of_blocks(base: Base) -> None:
    """Against a plain loop over the blocks. A picture may stand in one row whole and pooled."""
    picture, other = requests(1, [1])[0][0][0].picture, requests(2, [1])[1][0][0].picture
    assert picture
    assert other
    pictures = [replace(picture, tokens=POOLED), other, picture, replace(other, tokens=4), replace(picture, tokens=POOLED)]
    vision = VisionFeatures(base)
    features = vision.projected_features(pictures)["image"].pooler_output
    assert [len(own) for own in features] == [9, 36, 36, 4, 9]
    assert vision.computed == 2, "a pooled picture is no other picture for the tower"
    for own, whole, side in ((features[0], features[2], 3), (features[3], features[1], 2), (features[4], features[2], 3)):
        grid, block = whole.reshape(6, 6, -1), 6 // side
        for place, (row, column) in enumerate(itertools.product(range(side), repeat=2)):
            cells = [grid[row * block + a, column * block + b] for a, b in itertools.product(range(block), repeat=2)]
            assert torch.allclose(own[place], torch.stack(cells).mean(0), atol=1e-5)


def test_pooling_is_nested_where_one_side_divides_the_other() -> None:
    features = torch.randn(2, 576, 8)
    assert sizes_of(576) == [576, 144, 64, 36, 16, 9, 4, 1]
    for larger, smaller in itertools.combinations(sizes_of(576), 2):
        if larger**0.5 % smaller**0.5 == 0:
            assert torch.allclose(pool(pool(features, larger), smaller), pool(features, smaller), atol=1e-6)
    assert torch.equal(pool(features, 576), features)


def test_noise_is_of_each_occurrence(base: Base) -> None:
    picture = requests(1, [1])[0][0][0].picture
    assert picture
    same = replace(picture, tokens=POOLED)
    first, second = VisionFeatures(base).projected_features([same, same], noise=0.5)["image"].pooler_output
    assert first.shape == second.shape == (POOLED, 64)
    assert not torch.allclose(first, second)


# Rows


def test_only_shown_pictures_are_pooled(wide: Path, base: Base) -> None:
    """The row equals the whole one without the placeholders that are saved: same text, same labels, same branches."""
    whole_encoder, encoder = load_encoder(str(wide)), base.encoder()
    assert whole_encoder.support_tokens is None
    mixture = Mixture(recipe_of(wide, Path("run")))
    for index in range(8):
        conversation = to_conversation(mixture.draw(index), WORDINGS["short"])
        whole, pooled = whole_encoder.conversation(conversation), encoder.conversation(conversation)
        shown = sum(len(turn.pictures) for turn in conversation.shared)
        assert len(whole) - len(pooled) == shown * (WHOLE - POOLED)
        assert [p.tokens for p in pooled.pictures] == [POOLED] * shown + [None] * (len(conversation.pictures) - shown)
        assert all(p.tokens is None for p in whole.pictures)
        image = encoder.image_token_id
        for field in ("ids", "labels", "branch"):
            texts = [[v for v, i in zip(getattr(row, field), row.ids, strict=True) if i != image] for row in (whole, pooled)]
            assert texts[0] == texts[1]
        assert pooled.ids.count(image) == sum(map(encoder.tokens_of, pooled.pictures))
        pieces = pieces_of(pooled, Collator(mixture, encoder))
        assert [piece.picture for piece in pieces if piece.picture] == list(pooled.pictures)


def test_all_tokens_are_the_default_and_may_be_asked_for(wide: Path) -> None:
    assert load_encoder(BaseRef(str(wide), support_tokens=WHOLE)).support_tokens is None


def test_rows_and_forecasts_are_shorter(wide: Path) -> None:
    rows, plans = [], []
    for support in (None, POOLED):
        recipe = recipe_of(wide, Path("run"), support)
        rows.append(check_rows(Collator(Mixture(recipe), load_encoder(BaseRef.of(recipe)))))
        plans.append(make_plan(recipe, 10**10, "cuda"))
    pooled = len(rows[1].longest.pictures) - 2  # the two questions keep all tokens
    assert rows[0].most("lcl") - rows[1].most("lcl") == pooled * (WHOLE - POOLED)
    assert rows[0].most("vqa") == rows[1].most("vqa"), "a question about a picture keeps all"
    assert plans[0]["longest_row"] - plans[1]["longest_row"] == pooled * (WHOLE - POOLED)
    assert plans[1]["support_tokens"] == POOLED
    assert "support_tokens" not in plans[0]
    assert plans[1]["forecasts"]["training"]["total"] < plans[0]["forecasts"]["training"]["total"]


def test_a_row_that_does_not_fit_names_both_numbers(base: Base) -> None:
    encoder = base.encoder()
    encoder.context = 60
    conversation = to_conversation(Mixture(recipe_of(base.path, Path("run"))).draw(0), WORDINGS["short"])
    with pytest.raises(EpisodeError, match=r"images of 36, 9 where shown with a label\) do not fit the context of 60"):
        encoder.conversation(conversation)


def test_in_a_chat_the_picture_of_the_last_question_keeps_all() -> None:
    first, answer, last = Turn("user", "a", Picture("a.png")), Turn("assistant", "b"), Turn("user", "c", Picture("c.png"))
    assert [turn.shown for turn in shown_before((first, answer, last))] == [True, False, False]
    assert shown_before((first, answer, replace(last, picture=None))) == (first, answer, replace(last, picture=None)), "the question is about it"


# Training and prediction


def test_training_and_prediction_agree(base: Base) -> None:
    """An answer's log-likelihood by the predictor, from its cache and in a batch, is that of the training forward."""
    torch.manual_seed(0)
    adapted = attach(base, AdapterOptions(rank=4, projector=True))
    for name, parameter in adapted.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    vision, encoder = VisionFeatures(adapted), adapted.encoder()
    asked = requests(3, [1, 2], queries=2)
    replies = Predictor(adapted, vision).run(asked, generate=False)
    whole = Predictor(adapted.with_supports(None, "ordered"), vision).run(asked, generate=False)
    for (support, query, answers), reply, other in zip(asked, replies, whole, strict=True):
        for answer, log_likelihood in zip(answers, reply.log_likelihoods, strict=True):
            quiet = tuple(replace(turn, learn=False) for turn in support)
            conversation = Conversation(quiet, ((query, Turn("assistant", answer, learn=True)),), "test")
            batch = collate([encoder.conversation(conversation)], encoder.pad)
            labels, pictures = batch.pop("labels"), batch.pop("pictures")
            with torch.no_grad():
                logits = adapted.model(**batch, mm_encoder_outputs=vision.projected_features(pictures)).logits[0, :-1]
            learned = labels[0, 1:] != IGNORED
            expected = logits.log_softmax(-1)[learned].gather(1, labels[0, 1:][learned][:, None]).sum()
            assert log_likelihood == pytest.approx(float(expected), abs=1e-3)
        assert reply.log_likelihoods != pytest.approx(other.log_likelihoods, abs=1e-3), "fewer tokens say something else"


def test_rows_near_the_base_get_their_pictures_beside_pooled_ones(wide: Path) -> None:
    """A batch of an episode with pooled pictures and a question: the question's own pictures go to the base."""
    recipe = recipe_of(wide, Path("run"))
    base = attach(load_base(BaseRef.of(recipe)), recipe.adapter)
    mixture, encoder, vision = Mixture(recipe), base.encoder(), VisionFeatures(base)
    by_kind = {bool(c.shared): c for c in (to_conversation(mixture.draw(i), WORDINGS["short"]) for i in range(30))}
    rows = [encoder.conversation(by_kind[True]), encoder.conversation(by_kind[False])]
    trainer = LclTrainer(base, recipe, Collator(mixture, encoder), vision, 6)
    trainer.model.eval()
    results = []
    for order in (rows, rows[1:]):
        batch = collate(order, encoder.pad)
        read = torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
        results.append(own_logits(base, vision, encoder, batch, batch["pictures"], [len(order) - 1], read))
    assert torch.allclose(results[0], results[1], atol=1e-4)


def recipe_of_several(wide: Path, run: Path, **train: Any) -> Recipe:
    values = recipe_of(wide, run, **train).model_dump(mode="json", exclude_none=True)
    return Recipe.model_validate({**values, "image_tokens": {"support": [4, WHOLE, POOLED, 4]}})


def test_of_several_numbers_each_row_has_one(wide: Path) -> None:
    """All numbers occur, one in each row, and the same again in another process or a resumed run. Lengths are bounded by the largest."""
    recipe = recipe_of_several(wide, Path("run"))
    assert (recipe.image_tokens.numbers, recipe.image_tokens.most) == ((WHOLE, POOLED, 4), WHOLE)
    encoder = load_encoder(BaseRef.of(recipe))
    assert encoder.support_tokens is None, "the whole grid is the default of longest rows"
    collators = [Collator(Mixture(recipe), encoder) for _ in range(2)]
    drawn = []
    for index in range(40):
        conversation, row = collators[0].usable(index)
        shown = {picture.tokens for turn in conversation.shared for picture in turn.pictures}
        assert len(shown) == (1 if conversation.shared else 0)
        drawn += shown
        assert row.ids.count(encoder.image_token_id) == sum(map(encoder.tokens_of, row.pictures))
        assert row.ids == collators[1].row(index).ids
    assert set(drawn) == {WHOLE, POOLED, 4}
    rows = check_rows(collators[0])
    assert rows.most("lcl") >= max(len(collators[0].row(index)) for index in range(40))


def test_a_run_with_several_numbers_is_asked_with_any(wide: Path, tmp_path: Path) -> None:
    recipe = recipe_of_several(wide, tmp_path / "several", logging_steps=1)
    suite = {"kind": "lcl", "source": {"type": "pocket", "split": "held_out"}, "shots": [1], "neighbours": "easy", "episodes": 4}
    values = recipe.model_dump(mode="json", exclude_none=True)
    file = tmp_path / "several.yaml"
    file.write_text(json.dumps({**values, "evaluate": {"suites": {"by": {**suite, "support_tokens": [WHOLE, POOLED, 4]}}}}, default=str))
    trained = call("train", file)
    assert trained.exit_code == 0, trained.output
    run = tmp_path / "several"
    assert read_manifest(run)["support_tokens"] == [WHOLE, POOLED, 4]
    assert "36 or 9 or 4, pooled" in (run / "README.md").read_text()
    report = json.loads((run / "report.json").read_text())
    assert [row["name"] for row in report["suites"]] == [f"by-1shot-easy-{tokens}tokens" for tokens in (WHOLE, POOLED, 4)]
    for tokens, notes in ((None, 0), (4, 0), (WHOLE, 0), (1, 1)):
        loaded, manifest = load_adapter(run, BaseRef(support_tokens=tokens))
        assert loaded.form.tokens == {None: None, WHOLE: None}.get(tokens, tokens)
        assert len(asked_otherwise(manifest, loaded)) == notes
    for key in ("image_tokens.support=[36,7]", "evaluate.suites.by.support_tokens=[7]"):
        refused = call("train", file, key, f"output={tmp_path / 'other'}")
        assert refused.exit_code == 2
        assert "support pictures of 7 tokens are not possible" in " ".join(refused.output.split())
        assert not (tmp_path / "other").exists()
    assert call("eval", run, "evaluate.suites.by.support_tokens=[7]").exit_code == 2


# The commands


SUITE = {"2way": {"kind": "lcl", "source": {"type": "pocket", "split": "held_out"}, "ways": 2, "shots": [1], "neighbours": ["easy"], "episodes": 4}}


@pytest.fixture(scope="module")
def run(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the command trained with pooled supports, and measured."""
    run = tmp_path_factory.mktemp("runs") / "pooled"
    values = recipe_of(wide, run, None).model_dump(mode="json", exclude_none=True)
    (run.parent / "recipe.yaml").write_text(json.dumps({**values, "evaluate": {"suites": SUITE}}))
    result = call("train", run.parent / "recipe.yaml", f"image_tokens.support={POOLED}")
    assert result.exit_code == 0, result.output
    return run


def test_the_run_records_it(run: Path) -> None:
    assert read_manifest(run)["support_tokens"] == POOLED
    assert "tokens of a picture shown with a label: 9, pooled" in (run / "README.md").read_text()
    assert json.loads((run / "report.json").read_text())["support_tokens"] == POOLED
    assert json.loads(call("inspect", run, "--json").stdout)["support_tokens"] == POOLED
    assert load_adapter(run)[0].support_tokens == POOLED
    assert read_manifest(run)["shots"] == load_adapter(run)[0].shots == json.loads(call("inspect", run, "--json").stdout)["shots"] == 2
    assert "photos of a label that were shown together: 2 at most; more are read in parts" in (run / "README.md").read_text()
    again = call("train", run.parent / "recipe.yaml", "image_tokens.support=4", "resume=true")
    assert again.exit_code == 2
    assert "other values of image_tokens" in again.output


def test_eval_asks_as_it_was_trained_or_as_it_is_overridden(run: Path) -> None:
    assert json.loads(call("eval", run, "--json").stdout)["support_tokens"] == POOLED
    other = call("eval", run, f"image_tokens.support={WHOLE}", "--json")
    assert other.exit_code == 0, other.output
    report = json.loads(other.stdout)
    assert "support_tokens" not in report
    assert report["folder"] == str(run / "partial")
    assert "was trained with 9 tokens for a picture shown with a label, and is asked with all tokens" in other.stderr


def test_ask_asks_as_it_was_trained_or_with_a_note(run: Path, photos: Path, tmp_path: Path) -> None:
    query = paint(tmp_path / "q.png", (90, 160, 60))
    own, same, whole = (json.loads(call("ask", photos, query, "--adapter", run, "--shots", 2, "--json", *more).stdout) for more in (
        (), ("--support-tokens", POOLED), ("--support-tokens", WHOLE)
    ))  # fmt: skip
    assert own["answers"] == same["answers"]
    assert not own["notes"]
    assert own["answers"][0]["scores"] != pytest.approx(whole["answers"][0]["scores"], abs=1e-4)
    assert whole["notes"] == ["the adapter was trained with 9 tokens for a picture shown with a label, and is asked with all tokens"]


def test_an_adapter_of_all_tokens_can_be_asked_with_fewer(wide: Path, photos: Path, tmp_path: Path) -> None:
    run, query = adapter_on(wide, tmp_path / "run"), paint(tmp_path / "q.png", (90, 160, 60))
    assert "support_tokens" not in read_manifest(run)
    judged = ask_model(photos, [query], adapter=run, base=BaseRef(support_tokens=4))
    assert judged.result["notes"] == ["the adapter was trained with all tokens for a picture shown with a label, and is asked with 4 tokens"]


def test_the_server_asks_each_adapter_as_it_was_trained(run: Path, wide: Path, tmp_path: Path) -> None:
    """Beside an adapter with all tokens: from a stored set, from its cached prefix, and in a chat."""
    whole_run = adapter_on(wide, tmp_path / "whole")
    engine = Engine(load_base(BaseRef(str(wide), device="cpu")), memory=10**8)
    engine.load_adapter("pooled", run)
    engine.load_adapter("whole", whole_run)
    service = Service(engine.start(), Store(tmp_path / "store"), timeout=60)
    client = client_of(service)
    try:
        put(client)
        queries = [png(100 + n) for n in range(3)]
        asked = {"support_set": "parts-set", "images": [url(query) for query in queries]}
        for folder, name in ((run, "pooled"), (whole_run, "whole"), (run, "pooled")):
            response = client.post("/v1/classify", json={**asked, "model": name}).json()
            sharpness = 1 / response["calibration"]["temperature"]
            for probabilities, result in zip(offline(folder, examples(), queries), response["results"], strict=True):
                scaled = np.array(probabilities) ** sharpness
                assert np.allclose(list(result["probabilities"].values()), scaled / scaled.sum(), atol=1e-4)
        content = [{"type": "image_url", "image_url": {"url": url(png(1))}}, {"type": "text", "text": "What is this?"}]
        question = {"role": "user", "content": content}
        tokens = {}
        for name in ("pooled", "whole", "base"):
            for messages in ([question, {"role": "assistant", "content": "good"}, question], [question]):
                body = {"model": name, "messages": messages, "max_tokens": 1, "temperature": 0}
                usage = client.post("/v1/chat/completions", json=body).json()["usage"]
                tokens[name, len(messages)] = usage["prompt_tokens"]
        assert tokens["whole", 3] - tokens["pooled", 3] == WHOLE - POOLED
        assert tokens["whole", 3] == tokens["base", 3]
        assert tokens["whole", 1] == tokens["pooled", 1], "the picture that is asked about"
        # Typed decisions: the same turns before a question with a photo, and before one without, are two prefixes
        before, text = [question, {"role": "assistant", "content": "good"}], {"role": "user", "content": "And the first?"}
        decision = {"type": "choice", "instructions": "Which?", "criteria": {"good": None, "bad": None}}
        answers: dict[bool, list[Any]] = {True: [], False: []}
        for with_photo in (True, False, False, True):
            body = {"model": "pooled", "state": {"messages": [*before, question if with_photo else text]}, "questions": {"q": decision}}
            response = client.post("/v1/systemone", json=body)
            assert response.status_code == 200, response.text
            answers[with_photo].append(response.json()["answers"]["q"])
            if len(answers[True]) + len(answers[False]) == 2:
                engine.call(lambda e: e.cache.drop(lambda _: True), 30)
        for first, second in answers.values():
            assert first["probabilities"] == pytest.approx(second["probabilities"], abs=1e-6)
    finally:
        engine.stop()
        service.store.close()


def test_a_server_with_a_number_of_its_own(run: Path, wide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For every model, with a note, and with calibrations of their own."""
    identities = []
    for tokens in (None, WHOLE, 4):
        engine = Engine(load_base(BaseRef(str(wide), device="cpu")), memory=10**8, asked=BaseRef(support_tokens=tokens))
        model = engine.load_adapter("pooled", run)
        assert model.form.tokens == {None: POOLED, WHOLE: None, 4: 4}[tokens]
        assert engine.models["base"].form.tokens == {None: None, WHOLE: None, 4: 4}[tokens]
        identities.append((model.identity, engine.models["base"].identity))
        assert ("pooled: the adapter was trained with 9 tokens" in capsys.readouterr().err) == (tokens is not None)
    assert len({own for own, _ in identities}) == 3
    assert [base == identities[0][1] for _, base in identities] == [True, True, False]


def test_exports_and_merges_say_what_other_programs_spend(run: Path, tmp_path: Path) -> None:
    from lcl_adapter.base.supports import spent_elsewhere

    note = re.sub(r"\s+", " ", spent_elsewhere({"support_tokens": POOLED})[0])
    merged = call("merge", run, "--out", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output
    assert note in re.sub(r"\s+", " ", merged.stderr)
    assert not spent_elsewhere({})
    exported = call("merge", run, "--out", tmp_path / "again", "--json")
    assert json.loads(exported.stdout)["notes"] == spent_elsewhere({"support_tokens": POOLED})


# Errors


@pytest.mark.parametrize("asked", [5, 16, 37])
def test_a_number_that_the_grid_cannot_be_pooled_to(wide: Path, photos: Path, tmp_path: Path, asked: int) -> None:
    """An error of the recipe and of the command, before any weight is loaded; it lists the numbers."""
    query = paint(tmp_path / "q.png", (90, 160, 60))
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe_of(wide, tmp_path / "run").model_dump(mode="json", exclude_none=True)))
    for arguments in (
        ("ask", photos, query, "--base", wide, "--support-tokens", asked),
        ("train", file, f"image_tokens.support={asked}"),
        ("plan", file, f"image_tokens.support={asked}"),
        ("data", "preview", file, f"image_tokens.support={asked}", "--out", tmp_path / "preview.html"),
        ("serve", wide, "--support-tokens", asked),
    ):
        result = call(*arguments)
        assert result.exit_code == 2, result.output
        text = re.sub(r"\s+", " ", result.output)
        assert f"support pictures of {asked} tokens are not possible. A picture is a grid of 6 x 6, which can be pooled to 36, 9, 4 or 1" in text


@pytest.mark.parametrize(("family", "reason"), [
    ("llava-next-vicuna", "with a line-break vector"), ("llava-onevision", "with a line-break vector"), ("qwen2-vl", "no projector of its own"),
    ("smolvlm", "no projector of its own"), ("photo", "the 2 tokens of its pictures are no square grid of patches"),
])  # fmt: skip
def test_bases_without_a_plain_grid_say_why(tiny_folder: Callable[[str], Path], family: str, reason: str) -> None:
    folder = tiny_folder(family)
    for load in (load_encoder, load_base):
        with pytest.raises(ModelError, match=reason):
            load(BaseRef(str(folder), device="cpu", support_tokens=1))


@pytest.mark.parametrize("text", ["0", "-4", "many", "1.5"])
def test_a_recipe_with_no_number(wide: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe_of(wide, tmp_path / "run").model_dump(mode="json", exclude_none=True)))
    result = call("plan", file, f"image_tokens.support={text}")
    assert result.exit_code == 2
    assert "image_tokens.support" in result.output


def test_an_endpoint_decides_its_tokens_itself(photos: Path) -> None:
    result = call("ask", photos, photos / "good", "--endpoint", "http://127.0.0.1:1", "--support-tokens", 64)
    assert result.exit_code == 2
    assert "--support-tokens: with --endpoint" in result.output
