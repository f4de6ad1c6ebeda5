"""Recipe -> adapter: SFTConfig, and a small SFTTrainer subclass.

What the subclass changes, and why:
    compute_loss        frozen vision features are looked up, and only supervised positions reach the head
    sampler             the mixture's own order: resumable, and independent of workers
    optimizer           a rate of its own for the projector
    checkpoint          complete adapters, marked as complete last
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from datasets import Dataset
from lcl_adapter import processes
from lcl_adapter.amounts import memory_bytes
from lcl_adapter.base import adapter
from lcl_adapter.base.encoder import IGNORED
from lcl_adapter.base.model import PROJECTOR, Base, attach, load_base, load_encoder, parameters_by_part
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import Picture, read_image
from lcl_adapter.errors import RunError
from lcl_adapter.files import disk_is_full, write_json
from lcl_adapter.recipe import Recipe, load
from lcl_adapter.recipe import save as save_recipe
from lcl_adapter.terminal import console
from lcl_adapter.training import sharding
from lcl_adapter.training.callbacks import BarCallback, LongestFirst, MetricsCallback
from lcl_adapter.training.card import PROGRESS, Tally, facts_of, show_start
from lcl_adapter.training.collate import BucketedOrder, Collator
from lcl_adapter.training.lengths import check_rows

COMPLETE = "complete"  # marks a checkpoint, written last
DATA = "data.json"
OURS = {"projector_learning_rate", "feature_noise", "bucket", "feature_cache", "threads"}


def sft_config(recipe: Recipe) -> SFTConfig:
    """The recipe's ``train`` as TRL wants it."""
    own = recipe.train.model_dump(exclude=OURS)
    own["per_device_train_batch_size"], own["gradient_accumulation_steps"] = processes.split_step(
        own["per_device_train_batch_size"], own["gradient_accumulation_steps"], processes.count()
    )
    return SFTConfig(
        output_dir=str(recipe.output / "checkpoints"),
        **own,
        max_length=None,  # our collator never cuts; SFTConfig's default of 1024 would
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        save_strategy="steps",
        report_to="none",
        disable_tqdm=True,
        **sharding.halves(recipe.precision),  # else the base is in its precision and the adapter in fp32, without autocast
        use_cpu=processes.default_device() == "cpu",
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_nan_inf_filter=False,
    )


class LclTrainer(SFTTrainer):
    """SFTTrainer on episodes. ``collator`` reads the mixture by index; ``vision`` keeps the frozen features."""

    def __init__(self, base: Base, recipe: Recipe, collator: Collator, vision: VisionFeatures, total: int) -> None:
        self.base, self.recipe, self.collator, self.vision = base, recipe, collator, vision
        self.tally = Tally()
        self.idle: torch.Tensor | None = None
        # A trained projector has a gradient at every step then, whoever had the pictures; and weights that are shared out need everyone.
        self.idles = recipe.adapter.projector or processes.sharded()
        super().__init__(
            model=base.model,
            args=sft_config(recipe),
            data_collator=collator,
            train_dataset=Dataset.from_dict({"index": range(total)}),
            processing_class=base.tokenizer,
        )
        base.llava.register_forward_pre_hook(self._encode_pictures, with_kwargs=True)
        base.llava.register_forward_hook(self._connect_blank)
        for parameter in self.model.parameters():
            if parameter.requires_grad:  # TRL casts these to bf16 on a quantised base; a CPU is slow in it, Adam imprecise
                parameter.data = parameter.data.to(base.dtype if processes.uses_deepspeed() else torch.float32)
        if processes.sharded():
            base.llava.enable_input_require_grads()  # the layers' backward in one order, pictures or none
        if processes.uses_deepspeed():
            sharding.share_out(self.model, self.accelerator.state.deepspeed_plugin.deepspeed_config)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Mean cross entropy over learned tokens; only their hidden states reach the head."""
        inputs = dict(inputs)
        labels, pictures = inputs.pop("labels"), inputs.pop("pictures")
        self.tally.faults.update(inputs.pop("faults", ()))
        self.tally.count(inputs.pop("counts", ()))
        targets = labels[:, 1:]
        keep = functional.pad(targets != IGNORED, (0, 1))
        outputs = model(**inputs, pictures=pictures, logits_to_keep=keep, use_cache=False)
        logits = outputs.logits.reshape(-1, outputs.logits.shape[-1]).float()
        total = functional.cross_entropy(logits, targets[targets != IGNORED], reduction="sum")
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _encode_pictures(self, _: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pictures become features inside the model's forward, where sharded weights are whole."""
        if "pictures" in given:
            pictures = given.pop("pictures")
            if pictures:
                given = {**given, "mm_encoder_outputs": self.vision.projected(pictures, self._noise())}
            elif self.idles:
                self.idle = self.vision.idle()
        return args, given

    def _connect_blank(self, _: Any, args: tuple[Any, ...], outputs: Any) -> Any:
        """What stands for no picture is part of what the model says, where data parallel looks for what was used."""
        if self.idle is not None:
            outputs.logits = outputs.logits + self.idle.to(outputs.logits.dtype)
            self.idle = None
        return outputs

    def _noise(self) -> float:
        return self.recipe.train.feature_noise if self.model.training else 0.0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW as Trainer makes it, with the projector's rate of its own."""
        if getattr(self, "optimizer", None) is None:
            rate = self.recipe.train.projector_learning_rate or self.args.learning_rate / 10
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for n, p in trained if PROJECTOR not in n], "weight_decay": self.args.weight_decay},
                {"params": [p for n, p in trained if PROJECTOR in n], "lr": rate, "weight_decay": self.args.weight_decay},
            ]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind([g for g in groups if g["params"]], **options)
        return self.optimizer

    def _get_train_sampler(self, *_: Any) -> Sampler[int]:
        """The same order for any number of processes: accelerate gives them its batches in turn."""
        batch = self.recipe.train.per_device_train_batch_size
        return BucketedOrder(self.collator, len(self.train_dataset), batch, self.recipe.train.bucket, self.args.seed)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Marked when every process has written its part."""
        super()._save_checkpoint(*args, **kwargs)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        told = self.tally.so_far(self.vision)  # of all processes, which are all here then
        if processes.is_first():
            write_json(folder / PROGRESS, told)
            (folder / COMPLETE).touch()
        processes.barrier()


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was marked complete; others are remains of a killed run and are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for path in found:
        if not (path / COMPLETE).exists():
            console.print(f"removing {path.name}: it was not completely written", style="yellow")
            shutil.rmtree(path)
    complete = [p for p in found if p.exists()]
    return complete[-1] if complete else None


Watching = Callable[[Base, Callable[[Path, Mapping[str, Any]], None]], TrainerCallback]


def train(recipe: Recipe, resume: bool = False, watching: Watching | None = None, mixture: Mixture | None = None) -> dict[str, Any]:
    """Train the recipe's adapter into ``recipe.output``; returns the manifest's facts. A complete run is not trained again.

    watching: makes a callback that measures during the run; it is given the base and a way to save the adapter as it stands.
    mixture: the recipe's, where it was opened already.

    Raises RecipeError, DataError, EpisodeError, ModelError before anything is trained; RunError for the folder.
    """
    output, options = recipe.output, recipe.train
    sharding.check(recipe)
    processes.join()
    console.quiet = not processes.is_first()
    _together(lambda: adapter.claim_run_folder(output, resume))
    torch.set_num_threads(options.threads or torch.get_num_threads())
    set_seed(options.seed)
    mixture = mixture or Mixture(recipe)
    if resume:
        check_same(recipe, mixture)
        if (output / adapter.MANIFEST).exists():
            return adapter.read_manifest(output)
    total = mixture.total
    unread = Collator(mixture, load_encoder(BaseRef.of(recipe)), on_fault=recipe.data.on_fault)
    rows = check_rows(unread)  # before any weight is loaded
    base = attach(load_base(replace(BaseRef.of(recipe), device="cpu" if processes.sharded() else None)), recipe.adapter)
    if recipe.adapter.pissa and processes.is_first():
        adapter.save_start(base.model, output / "start")
    vision = VisionFeatures(base, memory_bytes(options.feature_cache), in_step=processes.uses_deepspeed())
    collator = Collator(mixture, base.encoder(), _readable(vision), recipe.data.on_fault)
    if processes.is_first():
        write_json(output / DATA, mixture.hashes())
        save_recipe(recipe, output / "recipe.yaml")  # last: where it stands, the run can be resumed
    parts = parameters_by_part(base.model)
    show_start(mixture, parts, rows.lengths, total)

    trainer = LclTrainer(base, recipe, collator, vision, total)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(MetricsCallback(output / "metrics.jsonl"))
    bar = BarCallback()
    trainer.add_callback(bar)
    if not processes.uses_deepspeed():  # its backward is its engine's, which would keep what it saw
        trainer.add_callback(LongestFirst(rows.longest, collator.encoder.pad, vision, trainer.compute_loss))
    checkpoint = _together(lambda: last_complete_checkpoint(output / "checkpoints")) if resume else None
    trainer.tally = Tally.of(checkpoint) if checkpoint else Tally()
    longest = max(length for found in rows.lengths.values() for length in found)

    def facts_now() -> dict[str, Any]:
        return facts_of(mixture, trainer.tally.so_far(vision), parts, longest)

    def save_now(folder: Path, more: Mapping[str, Any]) -> None:
        facts, state = facts_now(), sharding.whole(base.model)
        if processes.is_first():
            folder.mkdir(parents=True, exist_ok=True)
            save_recipe(recipe, folder / "recipe.yaml")
            adapter.save_adapter(base, folder, recipe.base, {**facts, **more}, state)
        processes.barrier()

    if watching is not None:
        trainer.add_callback(watching(base, save_now))
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        if disk_is_full(error):
            raise RunError(f"{output}: the disk is full. Free some room and go on with resume=true.") from error
        raise
    finally:
        bar.bar.stop()
    done = trainer.tally.so_far(vision)
    console.print(f"{'images':>15}: {done['shown']:,} shown, {done['computed']:,} passed the frozen tower", highlight=False)
    for name, (rows, tokens, learned) in done["sources"].items():
        console.print(f"{name:>15}: {rows:,} rows, {tokens:,} tokens, {learned:,} of them learned", highlight=False)
    base.model.eval()
    facts, state = facts_now(), sharding.whole(base.model)
    if processes.is_first():
        adapter.save_adapter(base, output, recipe.base, facts, state)
    processes.barrier()
    return facts


def _together(work: Callable[[], Any]) -> Any:
    """Done by the first process, and what came of it, an error too, told to all."""
    value: Any = None
    fault: Exception | None = None
    if processes.is_first():
        try:
            value = work()
        except Exception as error:
            fault = error
    value, fault = processes.gather((value, fault))[0]
    if fault is not None:
        raise fault
    return value


def check_same(recipe: Recipe, mixture: Mixture) -> None:
    """A run goes on only with the recipe and the data it began with.

    Raises RunError that lists what differs.
    """
    began = load(recipe.output / "recipe.yaml")
    changed = [
        key
        for key in ("base", "precision", "vision_tower", "tiles", "wording", "adapter", "sources", "shares", "train")
        if getattr(began, key) != getattr(recipe, key)
    ]
    if changed:
        raise RunError(
            f"{recipe.output}: began with other values of {', '.join(changed)} (its recipe.yaml has them); give the same, or another output=…."
        )
    hashes = json.loads((recipe.output / DATA).read_text(encoding="utf-8"))
    moved = [name for name, digest in mixture.hashes().items() if hashes.get(name) != digest]
    if moved:
        raise RunError(f"{recipe.output}: the data of {', '.join(moved)} changed since the run began; start a new run with another output=….")


def _readable(vision: VisionFeatures) -> Any:
    """A check that opens a picture once; what is kept already was readable."""
    known: set[Picture] = set()

    def check(picture: Picture) -> None:
        if picture not in known and picture not in vision.cache:
            read_image(picture)
            known.add(picture)

    return check
