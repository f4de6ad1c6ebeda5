"""Training: the loss equals the model's own, a resumed run equals an uninterrupted one, and a killed run leaves no
incomplete adapter.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lcl_adapter import recipe
from lcl_adapter.amounts import memory_bytes
from lcl_adapter.base import adapter
from lcl_adapter.base.encoder import IGNORED
from lcl_adapter.base.model import Base, attach, load_base, parameters_by_part
from lcl_adapter.base.precision import allow_gradients
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.conversations import WORDINGS, to_conversation
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import Picture, read_image
from lcl_adapter.errors import DataError, EpisodeError, RunError
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.schema import AdapterOptions
from lcl_adapter.training import trainer
from lcl_adapter.training.callbacks import BarCallback
from lcl_adapter.training.collate import Collator, collate


def small(base: Path, output: Path, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "base": str(base),
            "output": str(output),
            "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1, "projector": True},
            "sources": {
                "lcl": {"type": "pocket", "shots": [1, 2], "queries": 2, "names": "mixed", "learn": "repeated", "share": 0.7},
                "vqa": {"type": "llava-json", "file": "pocket:vqa_train.json", "images": "pocket:drawings.zip", "packed": 3, "share": 0.3},
            },
            "train": {
                "max_steps": 6,
                "per_device_train_batch_size": 3,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "save_steps": 2,
                "bucket": 2,
                **train,
            },
        }
    )


def pictures_of(base: Path) -> list[Picture]:
    """The pictures of the first row."""
    return list(to_conversation(Mixture(small(base, Path("run"))).draw(0), WORDINGS["short"]).pictures)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resume_gives_the_uninterrupted_runs_losses_and_weights(pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer.train(small(pocket_tiny, tmp_path / "whole"))
    torch.manual_seed(99)

    def stop(self: object, args: object, state: Any, control: object, **_: object) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(BarCallback, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(small(pocket_tiny, tmp_path / "cut"))
    # Remains of a killed save: newer than the last complete checkpoint, and not to be used.
    half = tmp_path / "cut" / "checkpoints" / "checkpoint-5"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    others = [half.with_name(name) for name in ("checkpoint-x", "checkpoint-", "checkpoint-4-copy", "checkpoint-best")]
    for other in others:
        other.mkdir()
    others.append(half.with_name("checkpoint-7"))
    others[-1].write_text("a file")
    trainer.train(small(pocket_tiny, tmp_path / "cut"), resume=True)
    assert not half.exists()
    remaining = {path.name for path in half.parent.glob("checkpoint-*")}
    assert remaining == {"checkpoint-4", "checkpoint-6", *(other.name for other in others)}
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two


def test_a_run_killed_before_its_first_checkpoint_begins_again(pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(BarCallback, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(small(pocket_tiny, tmp_path / "cut", max_steps=2))
    with pytest.raises(RunError, match="exists already"):
        trainer.train(small(pocket_tiny, tmp_path / "cut", max_steps=2))
    facts = trainer.train(small(pocket_tiny, tmp_path / "cut", max_steps=2), resume=True)
    assert facts["images"]["shown"] > 0
    again = trainer.train(small(pocket_tiny, tmp_path / "cut", max_steps=2), resume=True)
    assert again["images"] == facts["images"], "a complete run is not trained again"


def test_resuming_under_another_recipe_is_refused(pocket_tiny: Path, tmp_path: Path) -> None:
    trainer.train(small(pocket_tiny, tmp_path / "run", max_steps=2))
    with pytest.raises(RunError, match="started with other values of train"):
        trainer.train(small(pocket_tiny, tmp_path / "run", max_steps=3), resume=True)


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"gradient_checkpointing": True}, {"feature_noise": 0.5}])
def test_other_training_options(pocket_tiny: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """bf16 with a trained fp32 projector, checkpointing, noise: each trains, saves and answers."""
    from lcl_adapter.answering.predict import Predictor
    from lcl_adapter.checkpoints.probe import probe_turns

    train = {k: v for k, v in change.items() if k != "precision"}
    made = small(pocket_tiny, tmp_path / "run", max_steps=2, **train)
    made = made.model_copy(update={k: v for k, v in change.items() if k == "precision"})
    trainer.train(made)
    assert all(0 < loss < 20 for loss in losses(tmp_path / "run"))
    base, _ = adapter.load_adapter(tmp_path / "run")
    support, query = probe_turns("short")[0]
    assert Predictor(base).run([(support, query, ("a", "b"))])[0].log_likelihoods[0] < 0


def test_a_record_that_does_not_fit_is_refused_before_training(pocket_tiny: Path, tmp_path: Path) -> None:
    records = [
        {"id": n, "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "word " * (5000 if n == 999 else 1)}]}
        for n in range(1000)
    ]
    (tmp_path / "long.json").write_text(json.dumps(records))
    made = small(pocket_tiny, tmp_path / "run").model_dump(mode="json", exclude_none=True)
    made["sources"] = {"text": {"type": "llava-json", "file": str(tmp_path / "long.json"), "images": str(tmp_path)}}
    with pytest.raises(EpisodeError, match=r"record 1000 \(id 999\): \d+ tokens"):
        trainer.train(Recipe.model_validate(made))


def test_the_resolved_recipe_trains_the_same_adapter_again(pocket_tiny: Path, tmp_path: Path) -> None:
    trainer.train(small(pocket_tiny, tmp_path / "one", max_steps=3))
    again = recipe.load(tmp_path / "one" / "recipe.yaml", [f"output={tmp_path / 'two'}"])
    trainer.train(again)
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_workers_draw_the_same_episodes(pocket_tiny: Path, tmp_path: Path) -> None:
    trainer.train(small(pocket_tiny, tmp_path / "none", max_steps=3))
    trainer.train(small(pocket_tiny, tmp_path / "two", max_steps=3, dataloader_num_workers=2))
    assert losses(tmp_path / "none") == losses(tmp_path / "two")


def test_a_worker_that_is_not_forked_draws_the_same_episodes(pocket_tiny: Path, photos: Path, tmp_path: Path) -> None:
    """As on macOS. It counts the same bad pictures, and an error that ends the run arrives without its traceback."""
    (photos / "good" / "0.png").write_bytes(b"no picture")

    def made(name: str, **changes: Any) -> Recipe:
        source = {"type": "class-folder", "path": str(photos), "shots": [1]}
        raw = small(pocket_tiny, tmp_path / name, max_steps=2, seed=1, **changes).model_dump(mode="json", exclude_none=True)
        return Recipe.model_validate({**raw, "sources": {"photos": source, **raw["sources"]}})

    alone = trainer.train(made("none"))
    facts = trainer.train(made("one", dataloader_num_workers=1, dataloader_multiprocessing_context="spawn"))
    assert losses(tmp_path / "none") == losses(tmp_path / "one")
    assert facts["bad_pictures"] == alone["bad_pictures"] != {}
    strict = made("strict", dataloader_num_workers=1)
    with pytest.raises(DataError) as caught:
        trainer.train(strict.model_copy(update={"data": strict.data.model_copy(update={"on_fault": "refuse"})}))
    assert str(caught.value).startswith(f"{photos}/good/0.png: not an image")


def test_loss_is_the_models_own_on_the_same_rows(tiny_base: Base, tmp_path: Path) -> None:
    """Learned positions only, with cached features: the loss of a plain forward with labels and pixels."""
    base = attach(tiny_base, AdapterOptions(rank=4))
    made = small(tiny_base.path, tmp_path, max_steps=1)
    collator = Collator(Mixture(made), base.encoder())
    lcl = trainer.LclTrainer(base, made, collator, VisionFeatures(base), 8)
    rows = [collator.conversation(i) for i in range(3)]
    single = [type(c)(c.shared, c.branches[:1], c.origin) for c in rows]
    batch = collate([collator.encoder.conversation(c) for c in single], collator.encoder.pad)
    ours = lcl.compute_loss(base.model, batch)
    pixels = VisionFeatures(base).pixels(batch["pictures"])["pixel_values"]
    plain = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=pixels, labels=batch["labels"]).loss
    assert ours.item() == pytest.approx(plain.item(), abs=1e-5)
    assert (batch["labels"] != IGNORED).any(1).all()


def test_lora_touches_the_language_model_only(tiny_base: Base) -> None:
    parts = parameters_by_part(attach(tiny_base, AdapterOptions(rank=4)).model)
    assert parts["vision tower"]["trained"] == parts["projector"]["trained"] == 0
    assert parts["language model"]["trained"] == sum(2 * 4 * (i + o) // 2 for i, o in [(64, 64)] * 4 + [(64, 128)] * 3) * 2


def test_nf4_quantises_the_language_model_only_and_trains(pocket_tiny: Path, tmp_path: Path) -> None:
    import bitsandbytes as bnb

    made = small(pocket_tiny, tmp_path / "q", max_steps=2).model_copy(update={"precision": "nf4"})
    facts = trainer.train(made)
    assert facts["parameters"]["language model"]["trained"] > 0
    base, manifest = adapter.load_adapter(tmp_path / "q")
    four_bit = [n for n, m in base.model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(four_bit) == 14
    assert all("language_model" in n for n in four_bit)
    assert manifest["precision"] == "nf4"
    trained = [p for n, p in load_base(BaseRef(str(pocket_tiny), "nf4")).model.named_parameters() if p.requires_grad]
    assert not trained


def test_a_four_bit_base_that_has_answered_passes_gradients_on(pocket_tiny: Path, tmp_path: Path) -> None:
    """bitsandbytes repacks a 4-bit layer outside of training on some CPUs; through that form no gradient would pass."""
    from lcl_adapter.answering.predict import Predictor
    from lcl_adapter.checkpoints.probe import probe_turns

    torch.manual_seed(0)
    base = load_base(BaseRef(str(pocket_tiny), "nf4"))
    allow_gradients(base.model)
    base = attach(base, AdapterOptions(rank=4))
    made = small(pocket_tiny, tmp_path, max_steps=1)
    collator = Collator(Mixture(made), base.encoder())
    lcl = trainer.LclTrainer(base, made, collator, VisionFeatures(base), 8)
    first = next(p for n, p in base.model.named_parameters() if "layers.0.self_attn.q_proj.lora_B" in n)

    def gradient() -> torch.Tensor:
        base.model.train()
        base.model.zero_grad()
        lcl.compute_loss(base.model, collator([{"index": 0}])).backward()
        return first.grad.clone()

    before = gradient()
    base.model.eval()
    support, query = probe_turns("short")[0]
    Predictor(base).run([(support, query, ("a", "b"))])
    assert float(before.abs().max()) > 0
    assert torch.allclose(gradient(), before, atol=1e-6)


def test_frozen_features_are_computed_once_a_picture(tiny_base: Base) -> None:
    vision = VisionFeatures(tiny_base)
    pictures = pictures_of(tiny_base.path)
    first = vision.tower_features([*pictures, pictures[0]])
    again = vision.tower_features(pictures)
    assert torch.equal(first[:-1], again)
    assert torch.equal(first[0], first[-1])
    assert (vision.requested, vision.computed) == (2 * len(pictures) + 1, len(set(pictures)))
    direct = tiny_base.llava.get_image_features(**vision.pixels(pictures), return_dict=True).pooler_output
    cached = vision.projected_features(pictures)["image"].pooler_output
    assert max(float((a - b).abs().max()) for a, b in zip(direct, cached, strict=True)) < 1e-5


def test_the_feature_cache_stays_within_its_limit(tiny_base: Base) -> None:
    pictures = pictures_of(tiny_base.path)
    one = VisionFeatures(tiny_base).tower_features(pictures[:1])
    vision = VisionFeatures(tiny_base, limit=2 * one.numel() * 4)
    for picture in pictures:
        vision.tower_features([picture])
        assert vision.bytes <= vision.limit
    assert len(vision.cache) == 2
    assert memory_bytes("1.5GB") == 1_500_000_000


def test_a_run_folder_that_exists_is_not_touched(pocket_tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    with pytest.raises(RunError, match="exists already"):
        trainer.train(small(pocket_tiny, tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="a file, not a folder"):
        trainer.train(small(pocket_tiny, tmp_path / "file"))
    with pytest.raises(RunError, match="nothing to resume"):
        trainer.train(small(pocket_tiny, tmp_path / "new"), resume=True)


def test_an_episode_beyond_the_context_is_refused_before_training(pocket_tiny: Path, tmp_path: Path) -> None:
    long = small(pocket_tiny, tmp_path / "run")
    source = long.sources["lcl"].model_copy(update={"ways": [16], "shots": [4], "other_artists": False})
    with pytest.raises(EpisodeError, match=r"do not fit the context of 1024"):
        trainer.train(long.model_copy(update={"sources": {"lcl": source}}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_full_disk_while_saving_leaves_no_adapter(pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    def full(self: object, folder: Path, **_: object) -> None:
        (Path(folder) / "adapter_config.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    base = attach(load_base(str(pocket_tiny)), AdapterOptions(rank=2))
    adapter.save_adapter(base, tmp_path / "old", str(pocket_tiny), {})
    before = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()}
    monkeypatch.setattr(PeftModel, "save_pretrained", full)
    with pytest.raises(RunError, match="the disk is full"):
        adapter.save_adapter(base, tmp_path / "old", str(pocket_tiny), {})
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()} == before, "the earlier adapter is complete"
    (tmp_path / "new").mkdir()
    with pytest.raises(RunError, match="the disk is full"):
        adapter.save_adapter(base, tmp_path / "new", str(pocket_tiny), {})
    assert not list((tmp_path / "new").iterdir())


def test_every_shipped_picture_of_a_class_is_readable() -> None:
    for picture in pictures_of(Path("x")):
        assert read_image(picture).mode == "RGB"
