"""The recipe's ``train``: SFTConfig's fields under their own names, and the reason of each that is refused.

``tests/test_options.py`` compares this file with the installed SFTConfig, so that a field of a new version is decided.
transformers and trl are not imported here: reading a recipe stays fast.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from lcl_adapter.amounts import memory_bytes
from lcl_adapter.recipe.options import Options, as_list

STEPS = 300  # of a training whose recipe gives neither steps nor epochs

_EVALUATED = "suites are measured by `evaluate.every`, `evaluate.during` and `evaluate.batch_size`"
_ROWS = "rows are made from `sources`, and no text is prepared by TRL"
_LEARNED = "the loss is on the answers that a source marks as learned (`learn`), and nowhere else"
_PACKED = "`tokens_per_batch` lays whole rows into longer ones; `queries` and `packed` put several questions into a row"
_LAUNCHED = "the launcher decides it: `accelerate launch --config_file launch/fsdp2.yaml`, zero3.yaml or ddp.yaml"
_PRECISION = "`precision` decides the types of weights and activations"
_ORDER = "the mixture decides the order of rows, so that a resumed run reads the same; `bucket` sorts by length"
_COMPILED = "rows differ in length and pictures enter through hooks, so each shape would be compiled again"
_LIGER = "only learned positions reach the head here, which saves the memory that Liger's loss would"
_PUSHED = "`push_to_hub` pushes once, when the run is complete"
_TEMPLATE = "the base's family decides the prompt and its special tokens"
_BEST = "`evaluate.every` saves the best adapter in best/, and `evaluate.patience` ends the run with it"

# Fields of SFTConfig that contradict what a training here does -> why, and what to write instead.
REFUSED: dict[str, str] = {
    "output_dir": "`output` names the run's folder",
    "average_tokens_across_devices": "a step has the same gradient for any number of processes",
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "bf16_full_eval": _PRECISION,
    "fp16_full_eval": _PRECISION,
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "use_cache": "a training step reads each row once and has no use for keys and values",
    "optim_target_modules": "it is for GaLore and APOLLO, which train whole weights; LoRA's are small already",
    "auto_find_batch_size": "it would change the rows of a step; `lcl-adapter plan` forecasts the memory before training",
    "logging_strategy": "figures are logged every `logging_steps`",
    "logging_nan_inf_filter": "a loss that is no number is logged as it is",
    "include_num_input_tokens_seen": "trackers and the run card show the tokens already",
    "disable_tqdm": "the progress bar is off where the output is no terminal",
    "eval_strategy": _EVALUATED,
    "eval_steps": _EVALUATED,
    "eval_delay": _EVALUATED,
    "per_device_eval_batch_size": _EVALUATED,
    "prediction_loss_only": _EVALUATED,
    "eval_on_start": _EVALUATED,
    "eval_do_concat_batches": _EVALUATED,
    "eval_use_gather_object": _EVALUATED,
    "eval_accumulation_steps": _EVALUATED,
    "eval_packing": _EVALUATED,
    "include_for_metrics": _EVALUATED,
    "batch_eval_metrics": _EVALUATED,
    "save_only_model": "a checkpoint without its optimizer could not be resumed; the run's folder has the adapter alone",
    "save_strategy": "checkpoints are written every `save_steps`",
    "save_on_each_node": "the first process writes the run's folder, which all nodes have to share",
    "enable_jit_checkpoint": "a run that was stopped continues at its last checkpoint with resume=true; lower `save_steps`",
    "hub_token": "a recipe is saved with the run, and a token must not be: set HF_TOKEN, or log in with `hf auth login`",
    "hub_strategy": _PUSHED,
    "hub_always_push": _PUSHED,
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "ignore_data_skip": "a resumed run continues at the row where it stopped",
    "restore_callback_states_from_checkpoint": "a resumed run reads what it needs from its folder",
    "data_seed": "every draw comes from `seed`",
    "use_cpu": "the GPU is used where there is one; hide it with CUDA_VISIBLE_DEVICES=",
    "accelerator_config": _ORDER,
    "parallelism_config": _LAUNCHED,
    "dataloader_drop_last": "every step has all of its rows",
    "dataloader_in_order": _ORDER,
    "remove_unused_columns": _ROWS,
    "label_names": _ROWS,
    "train_sampling_strategy": _ORDER,
    "length_column_name": _ORDER,
    "ddp_backend": "processes are connected before training: NCCL on GPUs, Gloo on CPUs",
    "ddp_timeout": "processes are connected before training; set TORCH_NCCL_BLOCKING_WAIT or the launcher's timeout",
    "fsdp": _LAUNCHED,
    "fsdp_config": _LAUNCHED,
    "deepspeed": _LAUNCHED,
    "do_train": "`lcl-adapter train` trains",
    "do_eval": "`lcl-adapter eval` measures, and so does `train` at its end",
    "do_predict": "`lcl-adapter ask` predicts",
    "resume_from_checkpoint": "`lcl-adapter train RECIPE resume=true` continues a run",
    "local_rank": _LAUNCHED,
    "model_init_kwargs": "`base`, `precision`, `tiles` and `attn_implementation` say how the base is loaded",
    "trust_remote_code": "no code from a checkpoint is run",
    "router_aux_loss_coef": "it is for mixtures of experts; LLaVA's language models have none",
    "chat_template_path": _TEMPLATE,
    "eos_token": _TEMPLATE,
    "pad_token": _TEMPLATE,
    "dataset_text_field": _ROWS,
    "dataset_kwargs": _ROWS,
    "dataset_num_proc": _ROWS,
    "max_length": "a row is never cut: one that exceeds the base's context is refused before training",
    "truncation_mode": "a row is never cut: one that exceeds the base's context is refused before training",
    "shuffle_dataset": _ORDER,
    "packing": _PACKED,
    "packing_strategy": _PACKED,
    "padding_free": _PACKED,
    "pad_to_multiple_of": "rows are padded to a multiple of 16, and `bucket` puts rows of similar length together",
    "completion_only_loss": _LEARNED,
    "assistant_only_loss": _LEARNED,
    "loss_type": "the loss is the cross entropy of the learned tokens",
}

Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit",
    "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "ademamix_8bit", "paged_ademamix_32bit",
    "paged_ademamix_8bit", "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit", "adafactor", "sgd", "adagrad", "grokadamw", "stable_adamw",
]  # fmt: skip
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt", "cosine_with_min_lr",
    "cosine_warmup_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
Tracker = Literal[
    "all", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow", "neptune", "swanlab", "tensorboard",
    "trackio", "wandb",
]  # fmt: skip
LogLevel = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]

# Values of `optim` and `lr_scheduler_type` that are refused, by how they begin.
REFUSED_VALUES: dict[str, str] = {
    "galore_": "projects the gradients of whole weights; LoRA's are small already",
    "apollo_": "projects the gradients of whole weights; LoRA's are small already",
    "lomo": "updates weights during the backward pass, which `gradient_accumulation_steps` contradicts",
    "adalomo": "updates weights during the backward pass, which `gradient_accumulation_steps` contradicts",
    "schedule_free_": "trains other weights than it answers with; what is measured and saved would be the wrong ones",
    "reduce_lr_on_plateau": "needs an evaluation by Trainer; suites are measured by `evaluate.every`",
    "greedy": "needs an evaluation by Trainer; suites are measured by `evaluate.every`",
}


def _not_refused(value: object) -> object:
    for start, reason in REFUSED_VALUES.items():
        if isinstance(value, str) and value.startswith(start):
            raise ValueError(f"{value!r} {reason}; choose another")
    return value


def _amount(text: str) -> str:
    memory_bytes(text)
    return text


def _steps(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError(f"{value:g} is neither a whole number of steps nor, below 1, a part of the run")
    return int(value) if value >= 1 else value


def _trackers(value: object) -> object:
    return [] if value in ("none", ["none"]) else as_list(value)


def _space(value: object) -> object:
    if value not in (None, False) and not isinstance(value, str):
        raise ValueError(f"a Space's name, or false for none; not {value!r}")
    return value


Steps = Annotated[float, Field(gt=0), AfterValidator(_steps)]
Megabytes = Annotated[int, Field(ge=1)]


# Options without an effect of their own -> the option that each needs, and its value
NEEDED = {
    **dict.fromkeys(("hub_model_id", "hub_private_repo", "hub_revision"), ("push_to_hub", "true")),
    **dict.fromkeys(
        ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"), ("dataloader_num_workers", "1 or more")
    ),
    "gradient_checkpointing_kwargs": ("gradient_checkpointing", "true"),
}


class TrainOptions(Options):
    """SFTConfig's own names, and these that it does not have: ``projector_learning_rate``, ``feature_noise``,
    ``tokens_per_batch``, ``bucket``, ``feature_cache`` and ``threads``.

    None stands for SFTConfig's own default.
    """

    max_steps: int | None = Field(None, ge=1, description=f"{STEPS} if neither it nor num_train_epochs is given")
    num_train_epochs: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="instead of max_steps: an epoch has as many rows as all sources that have a share"
    )
    learning_rate: float = Field(2e-4, gt=0)
    projector_learning_rate: float | None = Field(None, gt=0, description="defaults to a tenth of learning_rate")
    per_device_train_batch_size: int = Field(1, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    lr_scheduler_type: Annotated[Scheduler, BeforeValidator(_not_refused)] = "cosine"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    warmup_steps: Annotated[float, Field(ge=0), AfterValidator(_steps)] = Field(0, description="below 1: a part of the run")
    optim: Annotated[Optimizer, BeforeValidator(_not_refused)] | None = None
    optim_args: str | None = Field(None, description="further arguments of the optimizer, as a=1,b=2")
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float | None = Field(None, ge=0, lt=1)
    adam_beta2: float = Field(0.999, gt=0, lt=1)
    adam_epsilon: float | None = Field(None, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1)
    neftune_noise_alpha: float | None = Field(None, gt=0)
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    activation_offloading: bool | None = Field(None, description="activations wait in the host's memory for the backward pass")
    tf32: bool | None = None
    torch_empty_cache_steps: int | None = Field(None, ge=1)
    full_determinism: bool | None = None
    logging_steps: Steps = Field(10, description="below 1: a part of the run")
    logging_first_step: bool | None = None
    log_level: LogLevel | None = None
    log_level_replica: LogLevel | None = None
    log_on_each_node: bool | None = None
    report_to: Annotated[list[Tracker], BeforeValidator(_trackers)] = Field([], description="trackers, for instance tensorboard")
    run_name: str | None = Field(None, min_length=1, description="of the run in its trackers; defaults to the folder's name")
    project: str | None = Field(None, min_length=1)
    trackio_space_id: str | None = None
    trackio_bucket_id: str | None = None
    trackio_static_space_id: Annotated[Any, AfterValidator(_space)] = None
    save_steps: Steps = Field(100, description="below 1: a part of the run")
    feature_noise: float = Field(0.0, ge=0, le=2, description="noise on frozen vision features, in standard deviations of the features")
    save_total_limit: int = Field(2, ge=2, description="2 or more: the old checkpoint must remain until the next is complete")
    push_to_hub: bool = Field(False, description="push the adapter and its card when the run is complete and its retention gate passes")
    hub_model_id: str | None = Field(None, min_length=1, description="the repository; defaults to the name of the run's folder")
    hub_private_repo: bool | None = None
    hub_revision: str | None = None
    dataloader_num_workers: int = Field(0, ge=0, le=16)
    dataloader_pin_memory: bool | None = None
    dataloader_persistent_workers: bool | None = None
    dataloader_prefetch_factor: int | None = Field(None, ge=1)
    dataloader_multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = None
    ddp_find_unused_parameters: bool | None = None
    ddp_bucket_cap_mb: Megabytes | None = None
    ddp_broadcast_buffers: bool | None = None
    ddp_static_graph: bool | None = None
    debug: Literal["", "underflow_overflow"] | None = None
    skip_memory_metrics: bool | None = None
    seed: int = Field(0, ge=0, lt=2**32)
    tokens_per_batch: int | None = Field(
        None, ge=1, description="whole rows of a batch share longer ones of at most so many tokens, so that little is padding"
    )
    bucket: int = Field(8, ge=1, description="number of batches drawn together and sorted by length, to reduce padding")
    feature_cache: Annotated[str, AfterValidator(_amount)] = Field("1GB", description="memory for frozen vision features")
    threads: int | None = Field(None, ge=1, description="CPU threads; all cores by default")

    @model_validator(mode="before")
    @classmethod
    def _default_steps(cls, values: Any) -> Any:
        given = isinstance(values, dict) and {name for name in ("max_steps", "num_train_epochs") if values.get(name) is not None}
        return {**values, "max_steps": STEPS} if isinstance(values, dict) and not given else values

    @field_validator("num_train_epochs")
    @classmethod
    def _steps_or_epochs(cls, value: float | None, others: ValidationInfo) -> float | None:
        if value is not None and others.data.get("max_steps") is not None:
            raise ValueError("`max_steps` is given too: remove it (`max_steps: null`, or train.max_steps=null as an override), or this key")
        return value

    @field_validator(*NEEDED)
    @classmethod
    def _only_with_the_needed_option(cls, value: Any, others: ValidationInfo) -> Any:
        key, wanted = NEEDED[str(others.field_name)]
        if value not in (None, False) and not others.data.get(key, True):
            raise ValueError(f"it has an effect only with `{key}: {wanted}`")
        return value

    @field_validator("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
    @classmethod
    def _only_trackio(cls, value: Any, others: ValidationInfo) -> Any:
        trackers = others.data.get("report_to", ["trackio"])
        if value is not None and not {"trackio", "all"} & set(trackers):
            raise ValueError("it has an effect only with `report_to: trackio`")
        return value
