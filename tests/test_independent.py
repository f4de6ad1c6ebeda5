"""Support sets whose labelled pictures do not see each other, and compressed ones: rows, masks, prediction, growing sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lcl_adapter.answering import independent
from lcl_adapter.answering.predict import Predictor, Question, Reply, Request
from lcl_adapter.base.encoder import IGNORED, check_alignment
from lcl_adapter.base.model import Base, load_base, load_encoder
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data import episodes
from lcl_adapter.data.conversations import WORDINGS, Conversation, Turn, from_episode
from lcl_adapter.data.sources import Picture, read_pocket
from lcl_adapter.errors import EpisodeError
from lcl_adapter.recipe.schema import Supports
from lcl_adapter.recipe.sources import EpisodeOptions
from lcl_adapter.training.collate import collate
from tests.conftest import EVERY

APART = replace(WORDINGS["short"], repeated=True)


FORMS: tuple[Supports, ...] = ("independent", "compressed")


def base_of(folder: Path, supports: Supports) -> Base:
    return load_base(BaseRef(str(folder), device="cpu", supports=supports))


@pytest.fixture(scope="module", params=FORMS)
def base(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> Base:
    return base_of(tiny_folder("pocket"), request.param)


def drawn(count: int, shots: int = 2, queries: int = 2, learned: str = "query") -> list[Conversation]:
    pool = read_pocket("held_out", min_pictures=4)
    options = EpisodeOptions(ways=[2], shots=[shots], queries=queries, learn=learned)
    return [from_episode(episodes.draw(pool, options, 0, 0, index), APART) for index in range(count)]


def requests_of(conversations: Sequence[Conversation]) -> list[Request]:
    made = []
    for conversation in conversations:
        answers = tuple(sorted({turn.text for turn in conversation.shared if turn.role == "assistant"}))
        made += [(conversation.shared, branch[0], answers) for branch in conversation.branches]
    return made


def pairs_of(turns: Sequence[Turn]) -> list[tuple[Turn, ...]]:
    return [tuple(turns[i : i + 2]) for i in range(0, len(turns), 2)]


@torch.no_grad()
def reply_in_one_row(base: Base, request: Request) -> Reply:
    """The scores by the forward pass of training: one row with the mask of its batch, without any cache."""
    support, query, answers = request
    encoder, vision, totals = base.encoder(), VisionFeatures(base), []
    for answer in answers:
        conversation = Conversation(support, ((query, Turn("assistant", answer, learn=True)),), "test")
        batch = collate([encoder.conversation(conversation)], encoder.pad)
        labels, pictures = batch.pop("labels")[0, 1:], batch.pop("pictures")
        logits = base.model(**batch, mm_encoder_outputs=vision.projected_features(pictures)).logits[0, :-1]
        learned = labels != IGNORED
        totals.append(float(logits.log_softmax(-1)[learned].gather(1, labels[learned][:, None]).sum()))
    return Reply("", tuple(totals))


def assert_same(replies: Sequence[Reply], others: Sequence[Reply]) -> None:
    for reply, other in zip(replies, others, strict=True):
        assert reply.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-4)


@pytest.mark.parametrize("supports", FORMS)
@pytest.mark.parametrize("family", EVERY)
def test_training_and_prediction_agree_in_every_family(family: str, supports: Supports, tiny_folder: Callable[[str], Path]) -> None:
    """The row of training with its mask, and the predictor that reads each picture in a row of its own; in batches, too."""
    base = base_of(tiny_folder(family), supports)
    asked = [*requests_of(drawn(2, shots=2)), *requests_of(drawn(2, shots=1))]
    replies = Predictor(base, batch_size=4).run(asked, generate=False)
    assert_same(replies, [reply_in_one_row(base, request) for request in asked])
    ordered = Predictor(base.with_supports(None, "ordered")).run(asked, generate=False)
    assert any(a.log_likelihoods != pytest.approx(b.log_likelihoods, abs=1e-3) for a, b in zip(replies, ordered, strict=True))
    assert Predictor(base).run(asked[:1])[0].text == Predictor(base, pack=1).run(asked[:1])[0].text


@pytest.mark.parametrize("supports", FORMS)
@pytest.mark.parametrize("family", EVERY)
def test_a_set_has_no_order(family: str, supports: Supports, tiny_folder: Callable[[str], Path]) -> None:
    predictor = Predictor(base_of(tiny_folder(family), supports))
    asked = requests_of(drawn(3, shots=2))
    turned = [(tuple(turn for pair in pairs_of(support)[::-1] for turn in pair), query, answers) for support, query, answers in asked]
    assert_same(predictor.run(asked, generate=False), predictor.run(turned, generate=False))


def test_a_set_of_one_picture_is_any_chat(base: Base) -> None:
    asked = [(support[:2], query, answers) for support, query, answers in requests_of(drawn(3))]
    ordered = base.with_supports(None, "ordered")
    if base.supports == "independent":  # in a compressed one, the question does not see the picture itself
        assert_same(Predictor(base).run(asked, generate=False), Predictor(ordered).run(asked, generate=False))
    for support, query, _ in asked:
        row = Conversation(support, ((query, Turn("assistant", "x", learn=True)),), "test")
        mine, theirs = base.encoder().conversation(row), ordered.encoder().conversation(row)
        assert (mine.ids, mine.labels, mine.positions) == (theirs.ids, theirs.labels, theirs.positions)


def test_each_example_has_the_instruction_and_nothing_of_the_others(base: Base) -> None:
    encoder = base.encoder()
    (conversation,) = drawn(1, shots=2)
    assert [turn.text for turn in conversation.shared if turn.role == "user"] == [APART.support_question(first=True)] * 4
    support = encoder.support(conversation.shared)
    text = encoder.family.render(conversation.shared[:2]).text.split("<image>")[0]
    head = encoder.bos + encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert support.ids[: support.head] == head
    for pair, part in zip(pairs_of(conversation.shared), support.examples, strict=True):
        assert head + support.ids[part] == encoder.turns(pair)[0], "an example behind the head is a chat of its own"
        assert support.positions[part] == list(range(support.head, support.head + part.stop - part.start))
    assert support.next_position == support.longest == support.head + max(part.stop - part.start for part in support.examples)
    check_alignment(encoder, conversation)


def test_of_a_compressed_set_the_words_are_stored(tiny_folder: Callable[[str], Path]) -> None:
    """Not the pictures' own keys and values, although what the words say depends on the pictures."""
    base = base_of(tiny_folder("pocket"), "compressed")
    predictor, independent = Predictor(base), Predictor(base.with_supports(None, "independent"))
    (conversation,) = drawn(1, shots=2)
    other = tuple(replace(turn, picture=conversation.branches[0][0].picture) if turn.picture else turn for turn in conversation.shared)
    whole, stored, changed = independent.prefill([conversation.shared]), predictor.prefill([conversation.shared]), predictor.prefill([other])
    pictures = base.encoder().tokens_an_image * 4
    assert stored.mask.shape[1] == int(stored.mask.sum()) == whole.mask.shape[1] - pictures
    assert stored.bytes < whole.bytes
    assert torch.equal(stored.next_position, whole.next_position), "positions are those with the pictures"
    row = base.encoder().conversation(conversation)
    image = base.encoder().image_token_id
    assert [bool(h) for h in row.hidden] == [token == image and branch == 0 for token, branch in zip(row.ids, row.branch, strict=True)]
    for layer, with_other in zip(stored.cache.layers[1:], changed.cache.layers[1:], strict=True):
        assert not torch.allclose(layer.keys, with_other.keys, atol=1e-3)
    assert not any(base.encoder().support([*conversation.shared, Turn("user", "And?"), Turn("assistant", "yes")]).hidden)


def test_an_example_depends_on_itself_alone(base: Base) -> None:
    """Another picture in the set changes no key or value of an example."""
    (conversation,) = drawn(1, shots=2)
    other = drawn(2, shots=2)[1].shared[:2]
    caches = [Predictor(base).prefill([turns]) for turns in (conversation.shared, (*conversation.shared[:-2], *other))]
    kept = caches[0].parts[0][:-1]
    assert len(kept) == 4
    for layer, changed in zip(*(prefilled.cache.layers for prefilled in caches), strict=True):
        for _, place in kept:
            assert torch.allclose(layer.keys[0, :, place], changed.keys[0, :, place], atol=1e-5)


def test_no_label_of_a_support_set_is_learned(base: Base) -> None:
    """An example that sees no other cannot know its label."""
    (conversation,) = drawn(1, learned="repeated")
    assert any(turn.learn for turn in conversation.shared)
    row = base.encoder().conversation(conversation)
    assert all(label == IGNORED for label, branch in zip(row.labels, row.branch, strict=True) if branch == 0)
    assert any(label != IGNORED for label in row.labels)


def test_a_chat_that_is_no_support_set_is_read_in_order(base: Base) -> None:
    (conversation,) = drawn(1)
    for turns in ((*conversation.shared, Turn("user", "And?"), Turn("assistant", "yes")), conversation.shared[:-1], ()):
        assert not base.encoder().support(turns).examples


def test_a_set_grows_and_shrinks_without_reading_the_rest(base: Base, reads: list[int]) -> None:
    predictor = Predictor(base)
    (conversation,) = drawn(1, shots=2)
    pairs = pairs_of(conversation.shared)
    asked = [Question(0, query, answers) for _, query, answers in requests_of([conversation])]
    before = predictor.prefill([[turn for pair in pairs[:3] for turn in pair]])
    grown = predictor.prefill([conversation.shared], known=[before])
    shrunk = predictor.prefill([[turn for pair in (pairs[0], pairs[3]) for turn in pair]], known=[grown])
    twice = predictor.prefill([[turn for pair in (pairs[1], pairs[1]) for turn in pair]], known=[grown])
    assert reads == [3, 1], "only the new picture was read"
    for made in (grown, shrunk, twice):
        turns = [turn for part, _ in made.parts[0] for turn in part]
        assert_same(predictor.ask(made, asked, generate=False), predictor.ask(Predictor(base).prefill([turns]), asked, generate=False))


def test_what_is_copied_stays_when_the_other_set_is_dropped(base: Base) -> None:
    predictor = Predictor(base)
    (conversation,) = drawn(1, shots=2)
    asked = [Question(0, query, answers) for _, query, answers in requests_of([conversation])]
    before = predictor.prefill([conversation.shared[:4]])
    grown = predictor.prefill([conversation.shared], known=[before])
    first = predictor.ask(grown, asked, generate=False)
    with torch.inference_mode():
        for layer in before.cache.layers:
            layer.keys.zero_()
            layer.values.zero_()
    assert_same(first, predictor.ask(grown, asked, generate=False))


def test_pictures_are_read_in_passes_of_bounded_size(base: Base, reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests_of(drawn(2, shots=2))
    together = Predictor(base).run(asked, generate=False)
    assert reads == [8]
    reads.clear()
    monkeypatch.setattr(independent, "TOKENS_PER_PASS", 1)
    assert_same(together, Predictor(base).run(asked, generate=False))
    assert reads == [1] * 8


def test_more_photos_than_the_context_are_possible(base: Base, tiny_folder: Callable[[str], Path]) -> None:
    """Positions restart at each picture, so a set may have more tokens than the context. A single one must fit."""
    predictor = Predictor(base)
    conversation = drawn(1, shots=3)[0]
    asked = requests_of([conversation])
    whole = predictor.run(asked, generate=False)
    ordered = load_encoder(str(tiny_folder("pocket")))
    needed = predictor.encoder.support(conversation.shared).longest + 50
    assert needed < len(ordered.turns(conversation.shared)[0])
    for encoder in (predictor.encoder, ordered):
        encoder.context = needed
    assert_same(whole, predictor.run(asked, generate=False))
    assert predictor.encoder.conversation(conversation)
    with pytest.raises(EpisodeError, match="do not fit the context"):
        ordered.conversation(conversation)
    predictor.encoder.context = 12
    with pytest.raises(EpisodeError, match=r"do(es)? not fit the context"):
        predictor.run(asked, generate=False)


def test_a_picture_that_is_shown_twice_counts_twice(base: Base) -> None:
    """As in an ordered set: the same photo under two names is two examples."""
    picture = drawn(1)[0].shared[0].picture
    assert isinstance(picture, Picture)
    turns = tuple(turn for name in ("a", "b", "a") for turn in (Turn("user", "q", picture, shown=True), Turn("assistant", name)))
    assert [len(part) for part, _ in Predictor(base).prefill([turns]).parts[0]] == [0, 2, 2, 2]
