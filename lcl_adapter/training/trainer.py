"""Recipe -> adapter: SFTConfig, and a small subclass of SFTTrainer.

The subclass changes:
    compute_loss        frozen vision features come from a cache, and only learned positions reach the head
    sampler             the mixture's own order, which can be resumed and does not depend on workers
    optimizer           a separate learning rate for the projector
    checkpoint          a complete adapter, marked as complete at the end

Shapes: B rows, T tokens of a row, L learned tokens of the batch, V words of the vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from trl import SFTConfig

from datasets import Dataset
from lcl_adapter import devices, processes
from lcl_adapter.amounts import memory_bytes
from lcl_adapter.base import adapter
from lcl_adapter.base.encoder import IGNORED
from lcl_adapter.base.model import PROJECTOR, Base, attach, load_base, load_encoder, parameters_by_part
from lcl_adapter.base.precision import allow_gradients
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.errors import RunError
from lcl_adapter.files import disk_is_full, only_writer, read_result, write_json
from lcl_adapter.recipe import Recipe, load
from lcl_adapter.recipe import save as save_recipe
from lcl_adapter.terminal import console
from lcl_adapter.training import sharding
from lcl_adapter.training.callbacks import BarCallback, LongestFirst, MetricsCallback, Running
from lcl_adapter.training.card import PROGRESS, Tally, facts_of, print_start
from lcl_adapter.training.collate import BucketedOrder, Collator, Readable
from lcl_adapter.training.during import use_best
from lcl_adapter.training.lengths import check_rows
from lcl_adapter.training.losses import divergence, own_logits
from lcl_adapter.training.options import check_options
from lcl_adapter.training.replay import answer_prompts, has_prompts
from lcl_adapter.training.resuming import ResumingTrainer, check_checkpoint
from lcl_adapter.training.trackers import Trackers

COMPLETE = "complete"  # an empty file in a checkpoint, written last
DATA = "data.json"
# What a resumed run cannot change
DECISIVE = (
    "base", "precision", "vision_tower", "tiles", "image_tokens", "supports", "readings", "attn_implementation", "wording", "adapter", "sources",
    "shares", "train",
)  # fmt: skip
# Not passed to SFTConfig: what it does not have, and what is done here in its place
NOT_SFT_OPTIONS = {
    "projector_learning_rate", "feature_noise", "tokens_per_batch", "bucket", "feature_cache", "threads", "max_steps", "num_train_epochs",
    "label_smoothing_factor", "report_to", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision",
}  # fmt: skip


def sft_config(recipe: Recipe, steps: int) -> SFTConfig:
    """The recipe's ``train`` as TRL's config for a training of ``steps``, with one process's part of a step."""
    options = {
        "run_name": recipe.output.name,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "max_steps": steps,
        **recipe.train.model_dump(exclude=NOT_SFT_OPTIONS, exclude_none=True),
    }
    for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        if name in options:  # transformers' new name; the old one is deprecated
            options[name.replace("gradient", "activation")] = options.pop(name)
    options["per_device_train_batch_size"], options["gradient_accumulation_steps"] = processes.split_step(
        options["per_device_train_batch_size"], options["gradient_accumulation_steps"], processes.count()
    )
    config = SFTConfig(
        output_dir=str(recipe.output / "checkpoints"),
        **options,
        max_length=None,  # SFTConfig's default of 1024 would cut rows; the collator never does
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        save_strategy="steps",
        report_to="none",  # ``trackers`` opens them, and closes them after the evaluation
        disable_tqdm=True,
        **sharding.mixed_precision(recipe.precision, devices.training_device()),
        use_cpu=devices.training_device() == "cpu",
        logging_nan_inf_filter=False,
    )
    if processes.count() == 1 and config.n_gpu > 1:
        # Otherwise Trainer wraps the model in DataParallel, which a LLaVA's hooks and a quantised base do not stand
        console.print(
            f"{config.n_gpu} GPUs are visible, and this process trains on one of them. To use all: "
            f"torchrun --nproc_per_node {config.n_gpu} -m lcl_adapter train RECIPE",
            style="yellow",
            highlight=False,
        )
        config._n_gpu = 1
    return config


class LclTrainer(ResumingTrainer):
    """SFTTrainer on episodes.

    ``collator`` reads the mixture by index; ``vision`` caches the frozen features; ``total`` rows are trained on.
    """

    def __init__(self, base: Base, recipe: Recipe, collator: Collator, vision: VisionFeatures, total: int) -> None:
        self.base, self.recipe, self.collator, self.vision = base, recipe, collator, vision
        self.tally = Tally()
        self.zero_term: torch.Tensor | None = None
        # A batch without pictures then still runs tower and projector: data parallel expects a gradient of a trained
        # projector in every process, and sharded weights need all processes to run the same modules.
        self.always_runs_tower = recipe.adapter.projector or processes.sharded()
        super().__init__(
            model=base.model,
            args=sft_config(recipe, total // (recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps)),
            data_collator=collator,
            train_dataset=Dataset.from_dict({"index": range(total)}),
            processing_class=base.tokenizer,
        )
        base.llava.register_forward_pre_hook(self._add_picture_features, with_kwargs=True)
        base.llava.register_forward_hook(self._add_zero_term)
        for parameter in self.model.parameters():
            # TRL casts these to bf16 on a quantised base: slow on a CPU, and imprecise for Adam
            if parameter.requires_grad:
                parameter.data = parameter.data.to(base.dtype if processes.uses_deepspeed() else torch.float32)
        if processes.sharded():
            # The backward of layers in the same order, with or without pictures
            base.llava.enable_input_require_grads()
        if processes.uses_deepspeed():
            sharding.shard_weights(self.model, self.accelerator.state.deepspeed_plugin.deepspeed_config)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The mean over learned tokens of the cross entropy or, for sources of ``near_base``, of the distance to the base's own
        distribution. Only their hidden states go through the head.

        num_items_in_batch: learned tokens of the whole step, in all processes.
        """
        inputs = dict(inputs)
        if "error" in inputs:  # of a process that loads data
            raise inputs["error"]
        labels_BT, pictures = inputs.pop("labels"), inputs.pop("pictures")
        self.tally.faults.update(inputs.pop("faults", ()))
        counts, places = inputs.pop("counts", ()), inputs.pop("places", ())
        self.tally.add_rows(counts)
        targets_BT = labels_BT[:, 1:]  # one shorter: position t predicts token t + 1
        learned_BT = targets_BT != IGNORED
        read_BT = functional.pad(learned_BT, (0, 1))
        near = [place for (source, *_), place in zip(counts, places, strict=True) if source in self.recipe.near_base]
        near_BT = torch.zeros_like(read_BT)
        for place in near:
            near_BT[place.row, place.start : place.stop] = True
        rows = sorted({place.row for place in near})
        own_KV = own_logits(self.base, self.vision, self.collator.encoder, inputs, pictures, rows, read_BT & near_BT) if near else None
        outputs = model(**inputs, pictures=pictures, logits_to_keep=read_BT, use_cache=False)
        logits_LV, targets_L = outputs.logits.reshape(-1, outputs.logits.shape[-1]), targets_BT[learned_BT]
        smoothing = self.recipe.train.label_smoothing_factor if self.model.training else 0.0
        if own_KV is None:
            total = functional.cross_entropy(logits_LV.float(), targets_L, reduction="sum", label_smoothing=smoothing)
        else:
            near_L = near_BT[:, 1:][learned_BT]
            learned = functional.cross_entropy(logits_LV[~near_L].float(), targets_L[~near_L], reduction="sum", label_smoothing=smoothing)
            total = learned + divergence(logits_LV[near_L], own_KV)
        loss = total / (learned_BT.sum() if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _add_picture_features(self, _: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the model's forward: replaces ``pictures`` by their features.

        Inside it, sharded weights are gathered.
        """
        if "pictures" in options:
            pictures = options.pop("pictures")
            if pictures:
                options = {**options, "mm_encoder_outputs": self.vision.projected_features(pictures, self._noise())}
            elif self.always_runs_tower:
                self.zero_term = self.vision.zero_term()
        return args, options

    def _add_zero_term(self, _: Any, args: tuple[Any, ...], outputs: Any) -> Any:
        """After the forward of a batch without pictures: adds the zero to the logits.

        The pass through the tower is then a part of the graph.
        """
        if self.zero_term is not None:
            outputs.logits = outputs.logits + self.zero_term.to(outputs.logits.dtype)
            self.zero_term = None
        return outputs

    def _noise(self) -> float:
        return self.recipe.train.feature_noise if self.model.training else 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the shares so far and the tokens a second to what Trainer logs every ``logging_steps``."""
        self.tally.paused += logs.get("eval_runtime", 0.0)
        if "loss" in logs:
            logs = {**logs, **self.tally.progress()}
        super().log(logs, start_time)

    def log_figures(self, figures: dict[str, float]) -> None:
        """Log what a callback measured. The step's own log, which Trainer would then take as done, still follows."""
        should_log = self.control.should_log
        self.log(figures)
        self.control.should_log = should_log

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer as Trainer creates it, with a separate learning rate for the projector."""
        if getattr(self, "optimizer", None) is None:
            rate = self.recipe.train.projector_learning_rate or self.args.learning_rate / 10
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for n, p in trained if PROJECTOR not in n], "weight_decay": self.args.weight_decay},
                {"params": [p for n, p in trained if PROJECTOR in n], "lr": rate, "weight_decay": self.args.weight_decay},
            ]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class([group for group in groups if group["params"]], **options)
        return self.optimizer

    def _get_train_sampler(self, *_: Any) -> Sampler[int]:
        """The same order for any number of processes: accelerate distributes its batches among them in turn."""
        batch = self.recipe.train.per_device_train_batch_size
        return BucketedOrder(self.collator, len(self.train_dataset), batch, self.recipe.train.bucket, self.args.seed)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Writes a checkpoint, and marks it as complete once every process has written its part. Then removes old ones."""
        # transformers would count and remove every folder called checkpoint-…, a user's copies too.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        totals = self.tally.totals(self.vision)  # waits for all processes
        if processes.is_first():
            write_json(folder / PROGRESS, totals)
            (folder / COMPLETE).touch()
            for old in adapter.checkpoints_in(folder.parent)[: -limit if limit else 0]:
                if str(old) != self.state.best_model_checkpoint:
                    shutil.rmtree(old, ignore_errors=True)
        processes.barrier()


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint. Incomplete ones, which a killed run left, are removed."""
    checkpoints = adapter.checkpoints_in(folder)
    for path in checkpoints:
        if not (path / COMPLETE).exists():
            console.print(f"removing {path.name}: it was not written completely", style="yellow")
            shutil.rmtree(path)
    complete = [path for path in checkpoints if path.exists()]
    return complete[-1] if complete else None


CallbackFactory = Callable[[Base, Running], TrainerCallback]


def train(
    recipe: Recipe,
    resume: bool = False,
    make_callback: CallbackFactory | None = None,
    mixture: Mixture | None = None,
    trackers: Trackers | None = None,
) -> dict[str, Any]:
    """Train the recipe's adapter into ``recipe.output``; returns the manifest's facts.

    A complete run is not trained again. With ``evaluate.patience``, the adapter is the best one that was measured.

    make_callback: creates a callback that measures during the run, from the base and what the callback may ask of the
    training. mixture: the recipe's, where the caller has opened it. trackers: those of the recipe, where the caller
    closes them; they are closed at the end of the training otherwise.

    The model is released at the end, so that an evaluation can load another.

    Raises RecipeError, DataError, EpisodeError, ModelError before training starts; RunError for the folder.
    """
    if trackers is None:
        with Trackers(recipe) as trackers:
            return train(recipe, resume, make_callback, mixture, trackers)
    try:
        processes.join()
        with claimed(recipe.output):
            return _train(recipe, resume, make_callback, mixture, trackers)
    finally:
        devices.release_memory()  # the trainer's hooks in the model form a cycle with it


def _train(recipe: Recipe, resume: bool, make_callback: CallbackFactory | None, mixture: Mixture | None, trackers: Trackers) -> dict[str, Any]:
    output, options = recipe.output, recipe.train
    sharding.refuse_unsupported(recipe)
    console.quiet = not processes.is_first()
    _in_first_process(lambda: adapter.claim_run_folder(output, resume))
    torch.set_num_threads(options.threads or torch.get_num_threads())
    set_seed(options.seed)
    mixture = mixture or Mixture(recipe)
    if resume:
        check_unchanged(recipe, mixture)
        if (output / adapter.MANIFEST).exists():
            return adapter.read_manifest(output)
    total, steps = mixture.total, mixture.steps
    # Before any weight is loaded.
    check_options(lambda: sft_config(recipe, steps))
    rows = check_rows(Collator(mixture, load_encoder(BaseRef.of(recipe)), on_fault=recipe.data.on_fault))
    base = load_base(replace(BaseRef.of(recipe), device="cpu" if processes.sharded() else devices.training_device()))
    allow_gradients(base.model)
    if has_prompts(mixture):
        if processes.is_first():
            _save_start(recipe, mixture)  # a run that is stopped while the base answers can be resumed
        mixture = answer_prompts(mixture, base, output)
        rows = check_rows(Collator(mixture, base.encoder(), on_fault=recipe.data.on_fault))
    base = attach(base, recipe.adapter)
    if recipe.adapter.pissa and processes.is_first():
        adapter.save_pissa_start(base.model, output / "start")
    vision = VisionFeatures(base, memory_bytes(options.feature_cache), synchronised=processes.uses_deepspeed())
    collator = Collator(mixture, base.encoder(), Readable(), recipe.data.on_fault)
    if processes.is_first():
        _save_start(recipe, mixture)
    parts = parameters_by_part(base.model)
    print_start(mixture, parts, rows, total)
    rows.show_left_out()

    trainer = LclTrainer(base, recipe, collator, vision, total)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(MetricsCallback(output / "metrics.jsonl"))
    bar = BarCallback()
    trainer.add_callback(bar)
    trainer.add_callback(trackers)
    # DeepSpeed's backward belongs to its engine, which would accumulate the gradients of this trial
    if not processes.uses_deepspeed():
        optimised = not processes.sharded()
        trainer.add_callback(LongestFirst(rows.longest, collator.encoder.pad, vision, trainer.compute_loss, optimised, options.tokens_per_batch))
    checkpoint = _in_first_process(lambda: last_complete_checkpoint(output / "checkpoints")) if resume else None
    if checkpoint:
        check_checkpoint(checkpoint)
    trainer.tally = Tally.resumed(checkpoint) if checkpoint else Tally()
    longest = max(rows.most(name) for name in rows.lengths)

    def facts_now() -> dict[str, Any]:
        rows = trainer.state.global_step * options.per_device_train_batch_size * options.gradient_accumulation_steps
        return facts_of(mixture, trainer.tally.totals(vision), parts, longest, rows)

    def save_now(folder: Path, more: Mapping[str, Any]) -> None:
        facts, state = facts_now(), sharding.full_state(base.model)
        if processes.is_first():
            folder.mkdir(parents=True, exist_ok=True)
            save_recipe(recipe, folder / "recipe.yaml")
            adapter.save_adapter(base, folder, recipe.base, {**facts, **more}, state)
        processes.barrier()

    if make_callback is not None:
        trainer.add_callback(make_callback(base, Running(save_now, trainer.log_figures)))
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        if disk_is_full(error):
            raise RunError(f"{output}: the disk is full. Free some space and resume the run with resume=true.") from error
        raise
    finally:
        bar.bar.stop()
    totals = trainer.tally.totals(vision)
    console.print(f"{'images':>15}: {totals['shown']:,} shown, {totals['computed']:,} went through the frozen tower", highlight=False)
    for name, (row_count, tokens, learned) in totals["sources"].items():
        console.print(f"{name:>15}: {row_count:,} rows, {tokens:,} tokens, {learned:,} of them learned", highlight=False)
    base.model.eval()
    facts = facts_now() | (use_best(recipe, base, trainer.state.global_step, mixture.steps) if recipe.evaluate.patience else {})
    state = sharding.full_state(base.model)
    if processes.is_first():
        adapter.save_adapter(base, output, recipe.base, facts, state)
    processes.barrier()
    return facts


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Inside the block, no other command writes the run's folder. It is entered by all processes of the training.

    Raises RunError where another command writes it, with who that is.
    """
    with ExitStack() as stack:
        _in_first_process(lambda: stack.enter_context(only_writer(output, again=True)))
        yield


def _save_start(recipe: Recipe, mixture: Mixture) -> None:
    """Write what a resumed run is compared with."""
    write_json(recipe.output / DATA, mixture.hashes())
    save_recipe(recipe, recipe.output / "recipe.yaml")  # last: a folder with this file can be resumed


def _in_first_process(work: Callable[[], Any]) -> Any:
    """Run ``work`` in the first process. All processes return its result or raise its error."""
    result: Any = None
    error: Exception | None = None
    if processes.is_first():
        try:
            result = work()
        except Exception as raised:
            error = raised
    result, error = processes.gather((result, error))[0]
    if error is not None:
        raise error
    return result


def check_unchanged(recipe: Recipe, mixture: Mixture) -> None:
    """Raises RunError where a resumed run has another recipe or other data than at its start."""
    original = load(recipe.output / "recipe.yaml")
    changed = [key for key in DECISIVE if getattr(original, key) != getattr(recipe, key)]
    if changed:
        raise RunError(
            f"{recipe.output}: the run started with other values of {', '.join(changed)} (its recipe.yaml has them). "
            "Use the same values, or another output=…."
        )
    hashes = read_result(recipe.output / DATA)
    if not isinstance(hashes, dict):
        raise RunError(f"{recipe.output / DATA}: not what a training wrote.")
    changed_sources = [name for name, digest in mixture.hashes().items() if hashes.get(name) != digest]
    if changed_sources:
        names = ", ".join(changed_sources)
        raise RunError(f"{recipe.output}: the data of {names} changed since the run started; start a new run with another output=….")
