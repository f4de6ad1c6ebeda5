"""The engine against plain forwards and plain generate, for each family; padded, cached and batched in every way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lcl_adapter.answering.predict import Predictor, Question, Reply
from lcl_adapter.base.model import Base, load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.data import episodes
from lcl_adapter.data.conversations import WORDINGS, Turn, from_episode
from lcl_adapter.data.sources import read_pocket
from lcl_adapter.errors import EpisodeError
from lcl_adapter.recipe.sources import EpisodeOptions
from tests.conftest import EVERY, FAMILIES

SHORT = WORDINGS["short"]
Request = tuple[tuple[Turn, ...], Turn, tuple[str, ...]]


def requests(count: int, shots: list[int], queries: int = 1) -> list[Request]:
    pool = read_pocket("held_out", min_pictures=4)
    made = []
    for index in range(count):
        episode = episodes.draw(pool, EpisodeOptions(ways=[2, 3], shots=shots, queries=queries), 0, 0, index)
        spoken = from_episode(episode, SHORT)
        made += [(spoken.shared, b[0], tuple(SHORT.answered(label) for label in episode.labels)) for b in spoken.branches]
    return made


def kinds(base: Base, ids: list[int]) -> dict[str, torch.Tensor]:
    """Qwen2-VL wants to be told which tokens are images."""
    return {"mm_token_type_ids": torch.tensor([[int(i == base.encoder().image_token_id) for i in ids]])} if base.encoder().grid else {}


@torch.no_grad()
def plainly(base: Base, request: Request) -> Reply:
    """One request without cache, padding or batch."""
    support, query, answers = request
    encoder, pixels = base.encoder(), Predictor(base).vision.pixels
    prompt = encoder.turns([*support, query], opened=True)[0]
    images = pixels([t.picture for t in (*support, query) if t.picture is not None])
    totals = []
    for answer in answers:
        ids = encoder.turns([*support, query, Turn("assistant", answer)])[0]
        likely = base.model(input_ids=torch.tensor([ids]), **images, **kinds(base, ids)).logits[0].log_softmax(-1)
        totals.append(sum(float(likely[k - 1, ids[k]]) for k in range(len(prompt), len(ids))))
    made = base.model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        **images,
        **kinds(base, prompt),
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=encoder.eos,
        pad_token_id=encoder.pad,
    )
    return Reply(encoder.tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True).strip(), tuple(totals))


@pytest.mark.parametrize(("count", "shots", "queries"), [(9, [1, 2], 1), (2, [2], 5), (4, [0], 1)])
def test_equal_to_the_uncached_path(tiny_base: Base, count: int, shots: list[int], queries: int) -> None:
    asked = requests(count, shots, queries)
    found = Predictor(tiny_base, batch_size=4).run(asked)
    for request, reply in zip(asked, found, strict=True):
        plain = plainly(tiny_base, request)
        assert reply.text == plain.text
        assert max(abs(a - b) for a, b in zip(reply.log_likelihoods, plain.log_likelihoods, strict=True)) < 1e-4


def test_asking_leaves_the_prefilled_set_as_it_was(tiny_base: Base) -> None:
    asked = requests(1, [2], 3)
    predictor = Predictor(tiny_base)
    ready = predictor.prefill([asked[0][0]])
    questions = [Question(0, query, answers) for _, query, answers in asked]
    before = [layer.keys.clone() for layer in ready.cache.layers]
    first = predictor.ask(ready, questions)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, ready.cache.layers, strict=True))
    second = predictor.ask(ready, questions[::-1])[::-1]
    assert [r.text for r in first] == [r.text for r in second]
    assert all(a.log_likelihoods == pytest.approx(b.log_likelihoods, abs=1e-4) for a, b in zip(first, second, strict=True))


def test_probabilities_sum_to_one_and_follow_the_scores() -> None:
    reply = Reply("", (-1000.0, -1001.0, -1002.5))
    assert sum(reply.probabilities) == pytest.approx(1)
    assert reply.best == 0
    assert list(reply.probabilities) == sorted(reply.probabilities, reverse=True)


def test_a_label_that_begins_another_is_scored_with_its_end(tiny_base: Base) -> None:
    """For cat and cattle: p(cat and end) is not p(cat ...), so the two can both be likely or not."""
    support, query, _ = requests(1, [1])[0]
    reply = Predictor(tiny_base).run([(support, query, ("cat", "cattle"))])[0]
    plain = plainly(tiny_base, (support, query, ("cat", "cattle")))
    assert reply.log_likelihoods == pytest.approx(plain.log_likelihoods, abs=1e-4)


def test_a_support_set_beyond_the_context_is_refused(tiny_base: Base) -> None:
    predictor = Predictor(tiny_base)
    predictor.encoder.context = 30
    with pytest.raises(EpisodeError, match="does not fit the context of 30"):
        predictor.prefill([requests(1, [3])[0][0]])


@pytest.mark.parametrize("family", [f for f in EVERY if f not in FAMILIES])
def test_every_family_answers_as_transformers_does(family: str, tiny_folder: Callable[[str], Path]) -> None:
    """Prefilled and packed, against the model's own forward and generate on its own pixels; tiles where the model has no other way."""
    base = load_base(BaseRef(str(tiny_folder(family)), tiles=family.startswith(("llava-next", "llava-onevision"))))
    asked = requests(2, [1, 2], 2)
    for one, reply in zip(asked, Predictor(base, pack=2).run(asked), strict=True):
        expected = plainly(base, one)
        assert reply.log_likelihoods == pytest.approx(expected.log_likelihoods, abs=1e-3)
        assert reply.text == expected.text
