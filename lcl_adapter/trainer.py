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
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn import functional
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from lcl_adapter import adapter
from lcl_adapter.batches import IGNORED, BucketedOrder, Collator, check_alignment
from lcl_adapter.errors import RunError
from lcl_adapter.files import write_text
from lcl_adapter.mixture import Mixture
from lcl_adapter.model import PROJECTOR, Base, attach, load_base, load_encoder, parameters_by_part
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe import save as save_recipe
from lcl_adapter.sources import Picture, read_image
from lcl_adapter.terminal import console
from lcl_adapter.vision import VisionFeatures, memory_bytes

COMPLETE = "complete"
OURS = {"projector_learning_rate", "feature_noise", "bucket", "feature_cache", "threads"}
CHECKED = 256  # conversations whose length is checked before training starts


def sft_config(recipe: Recipe) -> SFTConfig:
    """The recipe's ``train`` as TRL wants it."""
    own = recipe.train.model_dump(exclude=OURS)
    return SFTConfig(
        output_dir=str(recipe.output / "checkpoints"),
        **own,
        max_length=None,  # our collator never cuts; SFTConfig's default of 1024 would
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        save_strategy="steps",
        report_to="none",
        disable_tqdm=True,
        bf16=False,  # the base is loaded in its precision, the adapter stays in fp32
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_nan_inf_filter=False,
    )


class LclTrainer(SFTTrainer):
    """SFTTrainer on episodes. ``collator`` reads the mixture by index; ``vision`` keeps the frozen features."""

    def __init__(self, base: Base, recipe: Recipe, collator: Collator, vision: VisionFeatures, total: int) -> None:
        self.base, self.recipe, self.collator, self.vision = base, recipe, collator, vision
        super().__init__(
            model=base.model,
            args=sft_config(recipe),
            data_collator=collator,
            train_dataset=Dataset.from_dict({"index": range(total)}),
            processing_class=base.processor.tokenizer,
        )
        for parameter in self.model.parameters():
            if parameter.requires_grad:  # TRL casts these to bf16 on a quantised base; a CPU is slow in it, Adam imprecise
                parameter.data = parameter.data.float()

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Mean cross entropy over learned tokens; only their hidden states reach the head (FACTS 3)."""
        inputs = dict(inputs)
        labels, pictures = inputs.pop("labels"), inputs.pop("pictures")
        targets = labels[:, 1:]
        keep = functional.pad(targets != IGNORED, (0, 1))
        outputs = model(**inputs, mm_encoder_outputs=self.vision.projected(pictures, self._noise()), logits_to_keep=keep, use_cache=False)
        logits = outputs.logits.reshape(-1, outputs.logits.shape[-1]).float()
        total = functional.cross_entropy(logits, targets[targets != IGNORED], reduction="sum")
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

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
        batch = self.args.per_device_train_batch_size * self.args.world_size
        return BucketedOrder(self.collator, len(self.train_dataset), batch, self.recipe.train.bucket, self.args.seed)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (folder / COMPLETE).touch()


class MetricsCallback(TrainerCallback):
    """One JSON line for every logged step; on resume, lines after the checkpoint are dropped first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        write_text(self.path, "".join(line + "\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            names = ("loss", "grad_norm", "learning_rate")
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **{n: logs[n] for n in names if n in logs}}) + "\n")


class BarCallback(TrainerCallback):
    """A bar with loss and the time left; silent where the output is no terminal."""

    def __init__(self) -> None:
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"))
        self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.start()
        self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, loss="-")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.bar.update(self.task, loss=f"{float(logs['loss']):.3f}")
            if not console.is_terminal:
                console.print(f"step {state.global_step}/{state.max_steps} loss {float(logs['loss']):.3f}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.stop()


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was marked complete; others are remains of a killed run and are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for path in found:
        if not (path / COMPLETE).exists():
            console.print(f"removing {path.name}: it was not completely written", style="yellow")
            shutil.rmtree(path)
    complete = [p for p in found if p.exists()]
    return complete[-1] if complete else None


def train(recipe: Recipe, resume: bool = False) -> dict[str, Any]:
    """Train the recipe's adapter into ``recipe.output``; returns the facts that the run card shows.

    Raises RecipeError, DataError, EpisodeError, ModelError before anything is trained; RunError for the folder.
    """
    adapter.claim_run_folder(recipe.output, resume)
    torch.set_num_threads(recipe.train.threads or torch.get_num_threads())
    set_seed(recipe.train.seed)
    mixture = Mixture(recipe)
    options = recipe.train
    total = options.max_steps * options.per_device_train_batch_size * options.gradient_accumulation_steps
    lengths = check_rows(Collator(mixture, load_encoder(recipe.base)), min(total, CHECKED))  # before any weight is loaded
    base = attach(load_base(recipe.base, recipe.precision), recipe.adapter)
    vision = VisionFeatures(base, memory_bytes(options.feature_cache))
    collator = Collator(mixture, base.encoder(), check=_readable(vision), on_fault=recipe.data.on_fault)
    checkpoint = last_complete_checkpoint(recipe.output / "checkpoints") if resume else None
    if resume and checkpoint is None:
        raise RunError(f"{recipe.output}: no complete checkpoint in it; remove the folder and start again.")
    save_recipe(recipe, recipe.output / "recipe.yaml")
    parts = parameters_by_part(base.model)
    show_start(mixture, parts, lengths, total)

    trainer = LclTrainer(base, recipe, collator, vision, total)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(MetricsCallback(recipe.output / "metrics.jsonl"))
    trainer.add_callback(BarCallback())
    began = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except OSError as error:
        if error.errno == 28:
            raise RunError(f"{recipe.output}: the disk is full. Free some room and go on with resume=true.") from error
        raise
    facts = {
        "parameters": parts,
        "shares": {"requested": mixture.requested, "realised": mixture.realised(range(total))},
        "passes": mixture.repeats(total),
        "data": mixture.hashes(),
        "skipped": {n: p.skipped for n, p in mixture.pools.items() if p.skipped},
        "bad_pictures": dict(collator.faults),
        "images": {"shown": vision.asked, "through_the_tower": vision.computed},
        "training_seconds": round(time.monotonic() - began, 1),
        "longest_row": max(lengths),
        "held_in": {n: sorted(c.name for c in p.classes) for n, p in mixture.pools.items() if hasattr(p, "classes")},
    }
    console.print(f"{'images':>15}: {vision.asked:,} shown, {vision.computed:,} passed the frozen tower", highlight=False)
    base.model.eval()
    adapter.save_adapter(base, recipe.output, recipe.base, facts)
    return facts


def check_rows(collator: Collator, count: int) -> list[int]:
    """Lengths of the first ``count`` rows, longest possible refusal before training; checks the first row's alignment too."""
    conversations = [collator.conversation(i) for i in range(count)]
    check_alignment(collator.encoder, conversations[0])
    return [len(collator.encoder.conversation(c)) for c in conversations]


def show_start(mixture: Mixture, parts: dict[str, dict[str, int]], lengths: list[int], total: int) -> None:
    for part, count in parts.items():
        console.print(f"{part:>15}: {count['total']:>12,} parameters, {count['trained']:>10,} trained", highlight=False)
    realised = mixture.realised(range(total))
    for name in mixture.options:
        size = len(mixture.pools[name])
        console.print(f"{name:>15}: share {mixture.requested[name]:.2f} requested, {realised[name]:.2f} realised, {size:,} entries", highlight=False)
    console.print(f"{'rows':>15}: {total:,} of {min(lengths)} to {max(lengths)} tokens", highlight=False)


def _readable(vision: VisionFeatures) -> Any:
    """A check that opens a picture once; what is kept already was readable."""
    known: set[Picture] = set()

    def check(picture: Picture) -> None:
        if picture not in known and picture not in vision.kept:
            read_image(picture)
            known.add(picture)

    return check
