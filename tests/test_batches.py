"""Batches: which tokens attend to which, and that K queries in one row are K separate episodes, in loss and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_adapter.base.encoder import IGNORED
from lcl_adapter.base.model import Base, attach
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.conversations import WORDINGS, Conversation, Turn, to_conversation
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.errors import DataError, EpisodeError
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.schema import AdapterOptions
from lcl_adapter.training.collate import BucketedOrder, Collator, attention_mask, collate
from tests.conftest import paint


def recipe(**changes: object) -> Recipe:
    source = {"type": "pocket", "split": "train", "shots": [1, 2], "ways": [2, 3], "queries": 3, "learn": "repeated"}
    return Recipe.model_validate({"base": "tiny", "sources": {"lcl": {**source, **changes}}})


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12).map(sorted), st.integers(0, 4))
@settings(max_examples=100, deadline=None)
def test_which_tokens_attend_to_which(branch: list[int], padding: int) -> None:
    real = torch.tensor([[True] * len(branch) + [False] * padding])
    none = torch.zeros(1, len(branch) + padding, dtype=torch.long)
    mask = attention_mask(none, torch.tensor([branch + [0] * padding]), none, none, real)[0, 0]
    for i in range(len(branch)):
        for j in range(len(branch) + padding):
            expected = j <= i and j < len(branch) and branch[j] in (0, branch[i])
            assert bool(mask[i, j]) == expected
    assert bool(mask.any(1).all()), "no softmax over nothing"


def conversation_of(index: int, **changes: object) -> Conversation:
    return to_conversation(Mixture(recipe(**changes)).draw(index), WORDINGS["short"])


def split_rows(conversation: Conversation) -> list[Conversation]:
    """Each query as an episode of its own; support labels are learned in the first one only, so that sums agree."""
    quiet = tuple(Turn(t.role, t.text, t.picture) for t in conversation.shared)
    return [Conversation(conversation.shared if n == 0 else quiet, (b,), conversation.origin) for n, b in enumerate(conversation.branches)]


def loss_of(base: Base, rows: list[Conversation], vision: VisionFeatures) -> torch.Tensor:
    encoder = base.encoder()
    batch = collate([encoder.conversation(c) for c in rows], encoder.pad)
    labels = batch.pop("labels")
    outputs = base.model(**{k: v for k, v in batch.items() if k != "pictures"}, mm_encoder_outputs=vision.projected_features(batch["pictures"]))
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def test_shared_support_equals_separate_episodes(tiny_base: Base) -> None:
    torch.manual_seed(0)
    base = attach(tiny_base, AdapterOptions(rank=4, projector=True))
    for name, parameter in base.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    vision = VisionFeatures(base)
    together = [conversation_of(i) for i in range(4)]
    trained = [p for p in base.model.parameters() if p.requires_grad]
    one = loss_of(base, together, vision)
    one_grads = torch.autograd.grad(one, trained)
    apart = [loss_of(base, split_rows(c), vision) for c in together]
    many = torch.stack(apart).sum()
    many_grads = torch.autograd.grad(many, trained)
    assert torch.isclose(one, many, rtol=1e-5)
    largest = max(float(g.abs().max()) for g in many_grads)
    assert max(float((a - b).abs().max()) for a, b in zip(one_grads, many_grads, strict=True)) < 1e-4 * largest


def test_a_query_is_blind_to_the_others(tiny_base: Base) -> None:
    """Changing one query's picture changes its own logits and no other's."""
    conversation = conversation_of(0, queries=2)
    other = conversation_of(5, queries=2).pictures[0]
    first, second = conversation.branches
    changed = Conversation(conversation.shared, ((Turn("user", first[0].text, other), first[1]), second), "changed")
    encoder, vision = tiny_base.encoder(), VisionFeatures(tiny_base)
    logits = []
    for row in (conversation, changed):
        batch = collate([encoder.conversation(row)], encoder.pad)
        with torch.no_grad():
            logits.append(
                tiny_base.model(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    position_ids=batch["position_ids"],
                    mm_encoder_outputs=vision.projected_features(batch["pictures"]),
                ).logits[0]
            )
    branch = torch.tensor(encoder.conversation(conversation).branch)
    difference = (logits[0] - logits[1]).abs().amax(1)[: len(branch)]
    assert difference[branch == 1].max() > 1e-3
    assert difference[branch != 1].max() < 1e-6


def test_nothing_is_cut(tiny_base: Base) -> None:
    encoder = tiny_base.encoder()
    encoder.context = 60
    with pytest.raises(EpisodeError, match=r"lcl episode 0: \d+ tokens .* do not fit the context of 60. Lower `shots`"):
        encoder.conversation(conversation_of(0, shots=[4], ways=[3]))


def test_a_row_with_nothing_learned_is_an_error(tiny_base: Base) -> None:
    silent = Conversation((), ((Turn("user", "What is this?"), Turn("assistant", "good", learn=False)),), "silent")
    with pytest.raises(EpisodeError, match="nothing in it is learned"):
        tiny_base.encoder().conversation(silent)


def test_positions_restart_behind_the_support_set(tiny_base: Base) -> None:
    encoded = tiny_base.encoder().conversation(conversation_of(1))
    shared = encoded.branch.count(0)
    for number in (1, 2, 3):
        own = [p for p, b in zip(encoded.positions, encoded.branch, strict=True) if b == number]
        assert own == list(range(shared, shared + len(own)))


def test_bucketed_order_is_a_permutation_and_a_pure_function(tiny_base: Base) -> None:
    collator = Collator(Mixture(recipe()), tiny_base.encoder())
    order = list(BucketedOrder(collator, 50, 4, 3, seed=5))
    assert sorted(order) == list(range(50))
    assert order == list(BucketedOrder(collator, 50, 4, 3, seed=5))
    assert order != list(BucketedOrder(collator, 50, 4, 3, seed=6))

    def padding(indices: list[int]) -> int:
        lengths = [len(collator.row(i)) for i in indices]
        return sum(max(part) * len(part) - sum(part) for part in (lengths[i : i + 4] for i in range(0, 48, 4)))

    assert padding(order) < 0.6 * padding(list(range(50)))


def test_a_bad_picture_is_replaced_and_counted_or_refused(tiny_base: Base, tmp_path: Path) -> None:
    from lcl_adapter.data.sources import read_image

    for number in range(4):
        for index in range(4):
            paint(tmp_path / f"class{number}" / f"{index}.png", (60 * number, 50, 50), seed=index)
    (tmp_path / "class1" / "2.png").write_bytes(b"")
    made = Recipe.model_validate({"base": "t", "sources": {"mine": {"type": "class-folder", "path": str(tmp_path), "shots": [1]}}})
    collator = Collator(Mixture(made), tiny_base.encoder(), check=read_image)
    faults: list[str] = []
    rows = [collator.row(i, faults) for i in range(40)]
    assert len(rows) == 40
    assert not any(p.path.name == "2.png" and p.path.parent.name == "class1" for row in rows for p in row.pictures)
    assert faults
    assert all("class1/2.png" in fault for fault in faults)
    refusing = Collator(Mixture(made), tiny_base.encoder(), check=read_image, on_fault="refuse")
    with pytest.raises(DataError, match=r"class1/2\.png: the file is empty"):
        [refusing.row(i) for i in range(40)]
