"""Memory at work: one copy of keys and values, batches that fit, lack of memory, and what training leaves behind."""

from __future__ import annotations

import gc
import itertools
import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, TrainerCallback

from lcl_adapter import devices
from lcl_adapter.answering import batches, cache
from lcl_adapter.answering.batches import Limits, SetOfRequests, largest_batch, load_of
from lcl_adapter.answering.cache import InPlaceLayer
from lcl_adapter.answering.predict import Predictor, Question
from lcl_adapter.answering.room import Load, Widths, keys_and_values, needed
from lcl_adapter.answering.rows import EncodedQuestion
from lcl_adapter.base import adapter
from lcl_adapter.base.model import Base, load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.conversations import Turn
from lcl_adapter.errors import EpisodeError, ModelError
from lcl_adapter.memory import plan
from lcl_adapter.recipe import Recipe
from lcl_adapter.training import trainer
from tests import forked
from tests.test_merge import adapter_on
from tests.test_predict import requests
from tests.test_trainer import small

WIDTHS = Widths(d=64, f=128, k=64, layers=2, words=300)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=6), st.integers(0, 20))
def test_a_layer_written_in_place_is_a_concatenated_one(updates: list[tuple[int, int]], reserved: int) -> None:
    """After any appending and taking back, with any room: the views equal what concatenation would give."""
    layer, kept = InPlaceLayer(reserved), torch.empty(2, 3, 0, 4)
    for number, (added, removed) in enumerate(updates):
        new = torch.randn(2, 3, added, 4)
        keys, values = layer.update(new, -new, number)
        kept = torch.cat([kept, new], 2)
        assert torch.equal(keys, kept)
        assert torch.equal(values, -kept)
        removed = min(removed, kept.shape[2])
        layer.crop(-removed)
        kept = kept[:, :, : kept.shape[2] - removed]
        assert layer.get_seq_length() == kept.shape[2]
        assert torch.equal(layer.keys, kept)


def questions_of(batch: Sequence[tuple[Any, Turn, tuple[str, ...]]]) -> list[Question]:
    return [Question(0, query, answers) for _, query, answers in batch]


def storages(prefilled: Any) -> set[int]:
    return {getattr(layer, name).untyped_storage().data_ptr() for layer in prefilled.cache.layers for name in ("keys", "values")}


def test_a_set_with_room_is_asked_without_a_copy(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer is allocated anew, neither for the questions nor for a generated token, and nothing is concatenated."""
    batch = requests(1, [2], 3)
    predictor = Predictor(tiny_base)
    prefilled = predictor.prefill([batch[0][0]], behind=1000)
    before, length = storages(prefilled), prefilled.cache.get_seq_length()
    monkeypatch.setattr(InPlaceLayer, "resize", lambda *_: pytest.fail("a layer was copied"))
    replies = predictor.ask(prefilled, questions_of(batch))
    assert storages(prefilled) == before
    assert prefilled.cache.get_seq_length() == length
    monkeypatch.undo()
    tight = predictor.prefill([batch[0][0]])
    size = tight.bytes
    assert [r.text for r in predictor.ask(tight, questions_of(batch))] == [r.text for r in replies]
    assert tight.bytes == size < prefilled.bytes, "room that a pass needed is returned"


def test_a_set_survives_a_lack_of_memory(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the allocation fails, while a layer is enlarged or given its size back, the set answers as before."""
    batch = requests(1, [2], 3)
    predictor = Predictor(tiny_base)
    prefilled = predictor.prefill([batch[0][0]])
    expected, length = predictor.ask(prefilled, questions_of(batch)), prefilled.cache.get_seq_length()
    moved = cache._moved
    layers = 2 * len(prefilled.cache.layers)
    for failing in (1, layers // 2, layers, layers + 1, 2 * layers):
        prefilled = predictor.prefill([batch[0][0]])
        calls = itertools.count(1)

        def short_of_memory(*args: Any, calls: Any = calls, failing: int = failing) -> torch.Tensor:
            if next(calls) == failing:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return moved(*args)

        with monkeypatch.context() as patched:
            patched.setattr(cache, "_moved", short_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                predictor.ask(prefilled, questions_of(batch))
        assert {layer.length for layer in prefilled.cache.layers} == {length}
        again = predictor.ask(prefilled, questions_of(batch))
        assert [r.log_likelihoods for r in again] == [pytest.approx(r.log_likelihoods, abs=1e-4) for r in expected]


def test_run_reserves_what_its_questions_need(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InPlaceLayer, "resize", lambda *_: pytest.fail("a layer was copied"))
    Predictor(tiny_base, batch_size=3, pack=2).run(requests(4, [0, 1, 2], 5))


def test_asking_holds_half_of_what_concatenation_holds(tiny_base: Base) -> None:
    """The bytes of keys and values at the end of a pass, against those that transformers' own cache leaves and holds."""
    batch = requests(1, [3], 2)
    predictor = Predictor(tiny_base)
    prefilled = predictor.prefill([batch[0][0]])
    concatenated = DynamicCache(config=tiny_base.llava.config.get_text_config())
    for number, layer in enumerate(prefilled.cache.layers):
        concatenated.update(layer.keys.clone(), layer.values.clone(), number)
    kept = [(layer.keys, layer.values) for layer in concatenated.layers]
    added = 20
    with prefilled.room_for(added):
        for number, layer in enumerate(prefilled.cache.layers):
            new = layer.keys.new_zeros(*layer.keys.shape[:2], added, layer.keys.shape[3])
            layer.update(new, new)
            concatenated.update(new, new, number)
        ours = prefilled.bytes
    theirs = sum(t.untyped_storage().nbytes() for pair in kept for t in pair)
    theirs += sum(t.untyped_storage().nbytes() for layer in concatenated.layers for t in (layer.keys, layer.values))
    assert ours < 0.6 * theirs


def question(tokens: int, answers: int = 0) -> EncodedQuestion:
    return EncodedQuestion(Turn("user", "?"), [1] * (tokens - answers), [0] * (tokens - answers), 0, (([2] * (answers + 1), [0] * answers),))


def sets_of(lengths: Sequence[int], questions: int = 3) -> list[SetOfRequests]:
    return [
        SetOfRequests((), [n * questions + k for k in range(questions)], length, [question(8, 2)] * questions) for n, length in enumerate(lengths)
    ]


@given(st.lists(st.integers(0, 400), min_size=1, max_size=20), st.integers(1, 10**8), st.integers(1, 8), st.integers(1, 8))
def test_batches_fit_and_lose_nothing(lengths: list[int], free: int, most: int, pack: int) -> None:
    """Every set is in one batch, in order. A batch of several sets fits; so does one set, unless it is asked one by one."""
    limits = Limits(WIDTHS, 4, "cpu", most, pack)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(devices, "free_memory", lambda device: free)
        made = list(limits.batches(iter(sets_of(lengths)), 5))
    assert [one.length for batch, _ in made for one in batch] == lengths
    for batch, questions in made:
        assert 1 <= len(batch) <= most
        fits = needed(WIDTHS, 4, load_of(batch, questions, 5)) <= batches.SHARE_OF_FREE * free
        assert fits or (len(batch) == 1 and questions == 1)


@given(st.integers(1, 2000), st.integers(1, 100), st.integers(0, 10**9), st.integers(1, 32), st.integers(1, 8))
def test_the_largest_batch_is_the_largest(support: int, packed: int, memory: int, sets: int, pack: int) -> None:
    load = Load(1, support, packed, 4, 10)
    chosen_sets, chosen_pack = largest_batch(WIDTHS, 2, load, sets, pack, memory)
    assert 1 <= chosen_sets <= sets
    assert 1 <= chosen_pack <= pack
    if (chosen_sets, chosen_pack) != (1, 1):
        assert needed(WIDTHS, 2, load.times(chosen_sets, chosen_pack)) <= memory
    if chosen_sets < sets:
        assert needed(WIDTHS, 2, load.times(chosen_sets + 1, chosen_pack)) > memory


def test_where_memory_runs_out_the_halves_are_answered(tiny_base: Base, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The same replies, in smaller batches, with a message. Later batches are as small from the start."""
    batch = requests(5, [1], 4)
    expected = Predictor(tiny_base).run(batch)
    predictor = Predictor(tiny_base)
    tried: list[tuple[int, int]] = []
    answer = predictor._answer

    def short_of_memory(generate: bool, sets: Sequence[SetOfRequests], pack: int) -> Any:
        tried.append((len(sets), pack))
        if len(sets) * pack > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return answer(generate, sets, pack)

    monkeypatch.setattr(predictor, "_answer", short_of_memory)
    replies = predictor.run(batch)
    assert [r.text for r in replies] == [r.text for r in expected]
    for reply, same in zip(replies, expected, strict=True):
        assert reply.log_likelihoods == pytest.approx(same.log_likelihoods, abs=1e-4)
    assert tried[0] == (5, 8)
    printed = " ".join(capsys.readouterr().err.split())
    assert "memory ran out (CUDA out of memory. Tried to allocate 2 GiB): going on with 2 support sets at a time" in printed
    assert "one support set at a time" in printed
    assert "2 questions at a time" in printed
    tried.clear()
    predictor.run(batch)
    assert set(tried) == {(1, 2)}, "the limits that memory has shown stay"


def test_one_question_that_does_not_fit_is_named(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)")

    predictor = Predictor(tiny_base)
    monkeypatch.setattr(predictor, "prefill", no_memory)
    with pytest.raises(EpisodeError, match=r"a support set of \d+ tokens with one question does not fit this device's memory"):
        predictor.run(requests(2, [1], 2))
    monkeypatch.setattr(predictor, "prefill", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        predictor.run(requests(2, [1], 2))


def test_features_stay_in_main_memory(tiny_base: Base) -> None:
    vision = VisionFeatures(tiny_base)
    pictures = [t.picture for t in requests(1, [2])[0][0] if t.picture]
    first = vision.tower_features(pictures)
    assert all(features.device.type == "cpu" for features in vision.cache.values())
    assert torch.equal(first, vision.tower_features(pictures))
    assert vision.bytes == sum(f.numel() * f.element_size() for f in vision.cache.values())


class Grab(TrainerCallback):
    """Holds no reference to what it saw."""

    def __init__(self, base: Base) -> None:
        self.model = weakref.ref(base.model)
        self.weight = weakref.ref(base.llava.get_input_embeddings().weight)


def test_a_trained_model_is_released(pocket_tiny: Path, tmp_path: Path) -> None:
    """Otherwise the evaluation would load a second base beside it."""
    grabbed: list[Grab] = []

    def make(base: Base, save: Callable[..., None]) -> TrainerCallback:
        grabbed.append(Grab(base))
        return grabbed[0]

    trainer.train(small(pocket_tiny, tmp_path / "run", max_steps=1), make_callback=make)
    assert grabbed[0].model() is None
    assert grabbed[0].weight() is None


CHILD = """
import resource, sys
from pathlib import Path
from lcl_adapter.cli import commands
from lcl_adapter.training import trainer
from lcl_adapter.recipe import load
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
recipe = sys.argv[1]
if sys.argv[2] == "both":
    trainer.train(load(recipe))
    print(peak())
commands.measure(load(recipe).output)
print(peak())
"""


def test_train_then_evaluate_needs_no_more_than_the_larger_of_the_two(tmp_path: Path) -> None:
    """Peak resident memory of one process that does both, against the larger of each alone, plus 10 %."""
    from benchmarks.common import Size, random_llava

    folder = random_llava(tmp_path / "base", Size(768, 2048, 8, 8), torch.float16)
    suite = {"kind": "lcl", "source": {"type": "pocket", "split": "held_out"}, "shots": [1], "neighbours": "easy", "episodes": 2, "new_tokens": 2}
    settings = {
        "base": str(folder), "output": str(tmp_path / "run"),
        "sources": {"lcl": {"type": "pocket", "shots": [1]}},
        "train": {"max_steps": 1, "per_device_train_batch_size": 1, "threads": 1},
        "evaluate": {"suites": {"2way": suite}},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))

    def peaks(what: str) -> list[int]:
        return [int(line) for line in forked.run(CHILD, tmp_path / "recipe.yaml", what).split()]

    trained, both = peaks("both")
    [alone] = peaks("evaluation")
    weights = 4 * sum(p.numel() for p in load_base(BaseRef(str(folder), "fp32")).model.parameters()) // 1024
    assert weights > 0.15 * max(trained, alone), "a second base would show"
    assert both <= 1.1 * max(trained, alone)


def test_one_process_takes_one_gpu(pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Trainer would wrap the model in DataParallel, and double the batch."""
    made = small(pocket_tiny, tmp_path)
    monkeypatch.setattr(trainer.SFTConfig, "n_gpu", property(lambda self: getattr(self, "_n_gpu", 1)))
    alone = trainer.sft_config(made, 2)
    init = trainer.SFTConfig.__init__

    def two_gpus(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self._n_gpu = 2

    monkeypatch.setattr(trainer.SFTConfig, "__init__", two_gpus)
    config = trainer.sft_config(made, 2)
    assert config.n_gpu == 1
    assert config.train_batch_size == alone.train_batch_size
    assert "2 GPUs are visible" in capsys.readouterr().err


def test_the_trial_runs_beside_the_optimisers_state(pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the longest row is tried, both moments of Adam are allocated; afterwards they are gone."""
    held: list[int] = []
    loss = trainer.LclTrainer.compute_loss

    def recorded(self: Any, *args: Any, **options: Any) -> Any:
        states = getattr(self.optimizer, "optimizer", self.optimizer).state.values()
        held.append(sum(t.numel() for state in states for t in state.values() if t.dim()))
        return loss(self, *args, **options)

    monkeypatch.setattr(trainer.LclTrainer, "compute_loss", recorded)
    facts = trainer.train(small(pocket_tiny, tmp_path / "run", max_steps=2))
    trained = sum(part["trained"] for part in facts["parameters"].values())
    assert held[0] == 2 * trained
    assert held[1] == 0, "the first step starts without them"
    assert held[-1] == 2 * trained


def watched(base: Path, output: Path, **evaluate: Any) -> Recipe:
    suite = {"kind": "lcl", "source": {"type": "pocket", "split": "held_out"}, "shots": [4], "ways": 5, "episodes": 2}
    made = small(base, output, feature_cache="1MB").model_dump(mode="json")
    return Recipe.model_validate({**made, "evaluate": {"suites": {"5way": suite}, "during": ["5way"], "every": 2, **evaluate}})


def test_a_plan_covers_measuring_and_the_evaluation(pocket_tiny: Path, tmp_path: Path) -> None:
    """``fits`` is about the whole command. A batch of the evaluation shrinks to the memory before it counts as too large."""
    recipe = watched(pocket_tiny, tmp_path, batch_size=32)
    ample = plan.make_plan(recipe, memory=10**12, device="cuda")["forecasts"]
    assert set(ample) == {"training", "measuring while training", "evaluation", "serving"}
    assert ample["measuring while training"]["total"] > ample["evaluation"]["total"], "the optimiser's state is beside it"
    tight = ample["training"]["total"] + 10**6
    made = plan.make_plan(recipe, memory=tight, device="cuda")
    assert made["fits"]
    assert made["forecasts"]["evaluation"]["parts"]["KV cache"] < ample["evaluation"]["parts"]["KV cache"]
    one = plan.Plan(recipe, "cuda", plan.Mixture(recipe), 1)
    assert not plan.make_plan(recipe, memory=one.measuring().total - 1, device="cuda")["fits"]


def test_forecast_keys_and_values_are_those_held(tiny_base: Base) -> None:
    batch = requests(1, [2], 1)
    predictor = Predictor(tiny_base)
    prefilled = predictor.prefill([batch[0][0]], behind=7)
    assert prefilled.bytes == keys_and_values(predictor.widths, 4, prefilled.mask.shape[1] + 7)


def test_apples_gpus_answer_in_fp16_and_do_not_train(pocket_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.default_device() == "mps"
    assert devices.training_device() == "cpu"
    with pytest.raises(ModelError, match="not available on Apple's GPUs: use fp16"):
        load_base(BaseRef(str(pocket_tiny), "nf4", device="mps"))
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10**10)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 10**9)
    assert devices.free_memory("mps") == 9 * 10**9
    from lcl_adapter.base.layouts import open_checkpoint
    from lcl_adapter.base.precision import choose_precision

    assert choose_precision(open_checkpoint(str(pocket_tiny)).config, "mps")[0] == "fp16"


def test_an_adapter_is_loaded_in_fp16_on_apples_gpus(pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it was trained in, unless a precision is given."""
    run = adapter_on(pocket_tiny, tmp_path / "run")
    asked: list[BaseRef] = []

    def seen(ref: BaseRef) -> Base:
        asked.append(ref)
        return load_base(replace(ref, device="cpu"))

    monkeypatch.setattr(adapter, "load_base", seen)
    adapter.load_adapter(run, BaseRef(device="mps"))
    adapter.load_adapter(run, BaseRef(device="mps", precision="fp32"))
    adapter.load_adapter(run)
    assert [ref.precision for ref in asked] == ["fp16", "fp32", "fp32"]


def test_loaded_objects_are_looked_through_again_when_an_adapter_is_unloaded() -> None:
    """A server sets them aside, because looking through them stops every thread."""

    class Node:
        me: object

    gone: list[bool] = []
    node = Node()
    node.me = node
    weakref.finalize(node, gone.append, True)
    gc.unfreeze()  # what the tests themselves have set aside
    with devices.loaded_objects_set_aside():
        del node
        devices.release_memory()
        assert not gone
        devices.release_memory(loaded=True)
        assert gone
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0
    gc.freeze()
    with devices.loaded_objects_set_aside():
        pass
    assert gc.get_freeze_count() > 0, "what was set aside before stays so"
