"""The predictor against plain forward passes and plain ``generate``, for each family: padded, cached and batched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from lcl_adapter.answering.predict import Predictor, Question, Reply
from lcl_adapter.base.model import Base, attention_window, load_base, load_encoder
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.data import episodes
from lcl_adapter.data.conversations import WORDINGS, Turn, from_episode
from lcl_adapter.data.sources import read_pocket
from lcl_adapter.errors import EpisodeError, ModelError
from lcl_adapter.memory.plan import make_plan
from lcl_adapter.recipe.schema import AdapterOptions
from lcl_adapter.recipe.sources import EpisodeOptions
from lcl_adapter.training import trainer
from tests.conftest import EVERY, FAMILIES
from tests.test_trainer import small

SHORT = WORDINGS["short"]
Request = tuple[tuple[Turn, ...], Turn, tuple[str, ...]]


def requests(count: int, shots: list[int], queries: int = 1) -> list[Request]:
    pool = read_pocket("held_out", min_pictures=4)
    made = []
    for index in range(count):
        episode = episodes.draw(pool, EpisodeOptions(ways=[2, 3], shots=shots, queries=queries), 0, 0, index)
        conversation = from_episode(episode, SHORT)
        answers = tuple(SHORT.answered(label) for label in episode.labels)
        made += [(conversation.shared, branch[0], answers) for branch in conversation.branches]
    return made


def token_types(base: Base, ids: list[int]) -> dict[str, torch.Tensor]:
    """Qwen2-VL needs a marker of the image tokens."""
    return {"mm_token_type_ids": torch.tensor([[int(i == base.encoder().image_token_id) for i in ids]])} if base.encoder().grid else {}


@torch.no_grad()
def reply_without_cache(base: Base, request: Request) -> Reply:
    """The reply to one request, without cache, padding or batch."""
    support, query, answers = request
    encoder, pixels = base.encoder(), Predictor(base).vision.pixels
    prompt = encoder.turns([*support, query], opened=True)[0]
    images = pixels([t.picture for t in (*support, query) if t.picture is not None])
    totals = []
    for answer in answers:
        ids = encoder.turns([*support, query, Turn("assistant", answer)])[0]
        likely = base.model(input_ids=torch.tensor([ids]), **images, **token_types(base, ids)).logits[0].log_softmax(-1)
        totals.append(sum(float(likely[k - 1, ids[k]]) for k in range(len(prompt), len(ids))))
    made = base.model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        **images,
        **token_types(base, prompt),
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=encoder.eos,
        pad_token_id=encoder.pad,
    )
    return Reply(encoder.tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True).strip(), tuple(totals))


@pytest.mark.parametrize(("count", "shots", "queries"), [(9, [1, 2], 1), (2, [2], 5), (4, [0], 1)])
def test_equal_to_the_uncached_path(tiny_base: Base, count: int, shots: list[int], queries: int) -> None:
    batch = requests(count, shots, queries)
    replies = Predictor(tiny_base, batch_size=4).run(batch)
    for request, reply in zip(batch, replies, strict=True):
        plain = reply_without_cache(tiny_base, request)
        assert reply.text == plain.text
        assert max(abs(a - b) for a, b in zip(reply.log_likelihoods, plain.log_likelihoods, strict=True)) < 1e-4


def test_asking_does_not_change_the_prefilled_set(tiny_base: Base) -> None:
    batch = requests(1, [2], 3)
    predictor = Predictor(tiny_base)
    prefilled = predictor.prefill([batch[0][0]])
    questions = [Question(0, query, answers) for _, query, answers in batch]
    before = [layer.keys.clone() for layer in prefilled.cache.layers]
    first = predictor.ask(prefilled, questions)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, prefilled.cache.layers, strict=True))
    second = predictor.ask(prefilled, questions[::-1])[::-1]
    assert [r.text for r in first] == [r.text for r in second]
    assert all(a.log_likelihoods == pytest.approx(b.log_likelihoods, abs=1e-4) for a, b in zip(first, second, strict=True))


def test_probabilities_sum_to_one_and_follow_the_scores() -> None:
    reply = Reply("", (-1000.0, -1001.0, -1002.5))
    assert sum(reply.probabilities) == pytest.approx(1)
    assert reply.best == 0
    assert list(reply.probabilities) == sorted(reply.probabilities, reverse=True)


def test_a_label_that_begins_another_is_scored_with_its_end_token(tiny_base: Base) -> None:
    """For cat and cattle: the score of cat is that of "cat" and the end token, not of all texts that begin with "cat"."""
    support, query, _ = requests(1, [1])[0]
    reply = Predictor(tiny_base).run([(support, query, ("cat", "cattle"))])[0]
    plain = reply_without_cache(tiny_base, (support, query, ("cat", "cattle")))
    assert reply.log_likelihoods == pytest.approx(plain.log_likelihoods, abs=1e-4)


def test_a_support_set_beyond_the_context_is_refused(tiny_base: Base) -> None:
    predictor = Predictor(tiny_base)
    predictor.encoder.context = 30
    with pytest.raises(EpisodeError, match="does not fit the context of 30"):
        predictor.prefill([requests(1, [3])[0][0]])


def with_window(folder: Path, target: Path, **language: Any) -> Path:
    """The same base with other fields of its language model's config."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config["text_config"] |= language
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("family", "layers"),
    [("llava-next-mistral", {}), ("llava-interleave", {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None})],
)
def test_a_sliding_window_is_exact_within_and_refused_beyond(
    family: str, layers: dict[str, Any], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Against transformers' own model with its window. Within the window, full attention is the same."""
    batch = requests(2, [1, 2], 4)
    tiles = family.startswith("llava-next")  # which transformers always reads
    plain = load_encoder(BaseRef(str(tiny_folder(family)), tiles=tiles))
    longest = max(len(plain.turns([*s, q, Turn("assistant", max(answers, key=len))])[0]) for s, q, answers in batch)
    window = longest + 24
    folder = with_window(tiny_folder(family), tmp_path / "windowed", sliding_window=window, **layers)
    base = load_base(BaseRef(str(folder), tiles=tiles))
    assert base.checkpoint.config.text_config.sliding_window == window, "a merged checkpoint keeps it"
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    assert theirs.config.text_config.sliding_window == window
    for request, reply in zip(batch, Predictor(base, pack=4).run(batch), strict=True):
        expected = reply_without_cache(base.with_model(theirs), request)
        assert reply.log_likelihoods == pytest.approx(expected.log_likelihoods, abs=1e-3)
        assert reply.text == expected.text
    support, query, _ = batch[0]
    long = (tuple(turn for _ in range(6) for turn in support), query, ())
    with pytest.raises(EpisodeError, match=f"the context is {window}|context of {window}"):
        Predictor(base).run([long])
    made = small(folder, tmp_path / "run", max_steps=2)
    many = {"lcl": made.sources["lcl"].model_copy(update={"shots": [3]}), "vqa": made.sources["vqa"]}
    made = made.model_copy(update={"sources": many, "adapter": AdapterOptions(rank=2), "tiles": tiles})
    with pytest.raises(EpisodeError, match=rf"\d+ tokens .* do not fit the sliding window of {window} tokens"):
        trainer.train(made)
    with pytest.raises(EpisodeError, match=f"sliding window of {window} tokens"):
        make_plan(made, memory=10**12, device="cpu")


def test_windows_that_cannot_be_replaced_are_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Gemma 3's layers with a window also have other positions."""
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    config = SimpleNamespace(sliding_window=64, layer_types=["sliding_attention", "full_attention"], rope_parameters=rope)
    with pytest.raises(ModelError, match="layers with a sliding window have positions of their own"):
        attention_window(config)
    assert attention_window(SimpleNamespace(sliding_window=64, layer_types=["full_attention"])) is None
    assert attention_window(SimpleNamespace(sliding_window=None)) is None
    assert load_encoder(str(tiny_folder("llava-next-mistral"))).window is None
    shorter = with_window(tiny_folder("llava-next-mistral"), tmp_path / "longer", sliding_window=4096)
    assert load_encoder(str(shorter)).context == 1024, "a window beyond the context changes nothing"


@pytest.mark.parametrize("family", [f for f in EVERY if f not in FAMILIES])
def test_every_family_answers_as_transformers_does(family: str, tiny_folder: Callable[[str], Path]) -> None:
    """Prefilled and packed, against the model's own forward and generate. NeXT and OneVision read tiles, because they always do."""
    base = load_base(BaseRef(str(tiny_folder(family)), tiles=family.startswith(("llava-next", "llava-onevision"))))
    batch = requests(2, [1, 2], 2)
    for request, reply in zip(batch, Predictor(base, pack=2).run(batch), strict=True):
        expected = reply_without_cache(base, request)
        assert reply.log_likelihoods == pytest.approx(expected.log_likelihoods, abs=1e-3)
        assert reply.text == expected.text
