"""Export an adapter for upstream LLaVA's own ``load_pretrained_model``.

A short script is written beside it. In upstream's environment it builds the same prompt as ``lcl-adapter ask``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from lcl_adapter.base.adapter import checkpoint_of, read_manifest
from lcl_adapter.base.layouts import Checkpoint, check_folder_name
from lcl_adapter.base.layouts.configs import NEXT
from lcl_adapter.base.model import family_of
from lcl_adapter.base.ref import NOT_GIVEN, BaseRef
from lcl_adapter.base.supports import spent_elsewhere
from lcl_adapter.checkpoints.deltas import Adapter, check_fits
from lcl_adapter.checkpoints.exchange import names
from lcl_adapter.checkpoints.exchange.importing import read_upstream
from lcl_adapter.data.conversations import wording_of
from lcl_adapter.errors import AdapterError, MergeError, RunError
from lcl_adapter.files import read_result, whole_folder, write_json, write_text
from lcl_adapter.recipe import load

SCRIPT = Path(__file__).parent / "ask_upstream.py"


def export_adapter(run: Path, out: Path, base: BaseRef = NOT_GIVEN) -> dict[str, Any]:
    """Write ``out`` for upstream. The written files are read again and compared with the adapter.

    Raises AdapterError if upstream's PEFT cannot load such an adapter, or if the base is not in the original layout.
    Raises ModelError if upstream would misread the name of ``out``, RunError if ``out`` exists.
    """
    manifest = read_manifest(run)
    checkpoint = checkpoint_of(run, manifest, base)
    family = family_of(checkpoint)
    if not family.both_layouts:
        raise AdapterError(f"{run}: upstream LLaVA has no {family.name}; merge the adapter and serve that: `lcl-adapter merge {run} --out …`.")
    if checkpoint.layout != "original":
        raise AdapterError(
            f"{run}: upstream reads its base in the original layout, {checkpoint.folder} is in Hugging Face's. Give the original one with --base "
            "(its weights must be the same), or write it: `lcl-adapter convert BASE OUT --to original`."
        )
    if checkpoint.raw.get("model_type") == "llava_mistral":
        raise AdapterError(f"{run}: upstream loads adapters only on Llama, this base is Mistral. Merge it: `lcl-adapter merge --to original`.")
    check_folder_name(out, adapter=True)
    if out.exists():
        raise RunError(f"{out}: exists already; nothing is overwritten. Give another -o.")
    adapter = Adapter(run)
    _check_supported(adapter)
    check_fits([adapter], {name: weight.shape for name, weight in checkpoint.weights.items()})
    linear = checkpoint.config.projector_hidden_act == "linear"
    lora_tensors = {
        f"{names.PREFIX}{names.module_to_upstream(module)}.lora_{half}.weight": parts[half]
        for module, parts in adapter.of_one_rank().items()
        for half in ("A", "B")
    }
    projector = names.projector_to_upstream(adapter.full_weights, linear) if adapter.full_weights else {}
    with whole_folder(out) as partial:
        write_json(partial / "adapter_config.json", _peft_config(adapter, checkpoint))
        torch.save(lora_tensors, partial / "adapter_model.bin")
        torch.save(projector, partial / "non_lora_trainables.bin")  # even if empty: upstream downloads a missing one from the hub
        _copy_config(checkpoint, partial)
        write_json(partial / "ask_upstream.json", _script_settings(run, manifest, checkpoint))
        shutil.copyfile(SCRIPT, partial / SCRIPT.name)
        write_text(partial / "README.md", _readme(run, out, manifest, checkpoint))
        largest_difference = _check_written(adapter, partial, checkpoint)
    notes = spent_elsewhere(manifest)
    result = {"out": str(out), "layers": len(adapter.layers), "projector": bool(projector), "largest_difference": largest_difference}
    return {**result, **({"notes": notes} if notes else {})}


def _check_supported(adapter: Adapter) -> None:
    """Raises AdapterError if upstream's PEFT 0.7 cannot load the adapter. It loads plain LoRA."""
    config = adapter.config
    for feature, present in (
        ("DoRA", config.use_dora),
        ("a bias in LoRA", config.lora_bias),
        ("single tokens trained", getattr(config, "trainable_token_indices", None)),
        ("weights trained in full outside the projector", [name for name in adapter.full_weights if "multi_modal_projector" not in name]),
    ):
        if present:
            raise AdapterError(f"{adapter.folder}: has {feature}, which upstream's PEFT cannot load. Merge it: `lcl-adapter merge --to original`.")


def _peft_config(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, Any]:
    """Only the fields that PEFT 0.7 knows; it fails on newer ones. rsLoRA's scaling is expressed by alpha, and all layers have one rank."""
    config = adapter.config
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(checkpoint.folder),
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.scaling * adapter.rank,
        "lora_dropout": config.lora_dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": names.UPSTREAM_TARGETS,
        "modules_to_save": None,
    }


def _copy_config(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the base's config byte for byte: with another vocab_size upstream would silently skip the base's embedding.

    Only ``model_type`` "llava", which old configs have, is replaced. Upstream's transformers loads it as Hugging Face's
    model and fails.
    """
    if checkpoint.raw.get("model_type") == "llava":
        write_json(folder / "config.json", {**checkpoint.raw, "model_type": "llava_llama"})
    else:
        shutil.copyfile(checkpoint.folder / "config.json", folder / "config.json")


def _script_settings(run: Path, manifest: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """What ``ask_upstream.py`` needs to build the same prompt and the same pixels."""
    family = family_of(checkpoint)
    wording = wording_of(load(run / "recipe.yaml"))
    prompt_fields = ("system", "user", "assistant", "answer", "end", "image", "padding")
    return {
        **{field: getattr(family, field) for field in prompt_fields},
        "first": wording.support_question(first=True),
        "question": wording.support_question(first=False),
        "query": wording.query,
        "said": wording.answer,
        "next": checkpoint.config.model_type == NEXT,
        "tiles": manifest["tiles"],
        "side": checkpoint.config.vision_config.image_size,
    }


def _check_written(adapter: Adapter, folder: Path, checkpoint: Checkpoint) -> float:
    """Read the written files and compare every product B @ A with the adapter's.

    Returns the largest relative difference.

    This matters because upstream loads no adapter, and prints no warning, if the keys are wrong. Raises MergeError.
    """
    written = read_upstream(folder, checkpoint)
    config = read_result(folder / "adapter_config.json")
    scaling, largest_difference = config["lora_alpha"] / config["r"], 0.0
    if written.layers.keys() != adapter.layers.keys():
        raise MergeError(f"{folder}: {len(adapter.layers)} layers were written, {len(written.layers)} can be read again. Nothing was saved.")
    for module, parts in adapter.layers.items():
        expected = adapter.scaling_of(module) * parts["B"].double() @ parts["A"].double()
        actual = scaling * written.layers[module]["B"].double() @ written.layers[module]["A"].double()
        largest_difference = max(largest_difference, float((expected - actual).abs().max()) / max(1e-12, float(expected.abs().max())))
    if largest_difference > 1e-6:
        raise MergeError(f"{folder}: the written files differ from the adapter by {largest_difference:.2g} of its largest value. Nothing was saved.")
    return largest_difference


def _readme(run: Path, out: Path, manifest: dict[str, Any], checkpoint: Checkpoint) -> str:
    base = checkpoint.folder.name
    return (
        f"# {out.name}\n\nAn adapter for upstream LLaVA (haotian-liu/LLaVA 1.2.2), exported by lcl-adapter from `{run.name}`. Its base is "
        f"`{base}` in the original layout, base hash `{manifest['base_hash'][:16]}`.\n\n"
        "Classify photos with it in upstream's own environment. `photos/` contains one folder of photos per class:\n\n"
        f"```\npython {out.name}/ask_upstream.py --base /path/to/{base} photos/ query.png\n```\n\n"
        "Or load it as upstream does. The folder's name must contain `llava` and `lora`:\n\n"
        f"```\npython -m llava.serve.cli --model-path {out.name} --model-base /path/to/{base} --image-file query.png\n```\n\n"
        "If an adapter's keys are wrong, upstream prints no warning and answers as the base. The keys in this folder were read again after "
        "writing, and they are correct.\n" + "".join(f"\nNote: {note}.\n" for note in spent_elsewhere(manifest))
    )
