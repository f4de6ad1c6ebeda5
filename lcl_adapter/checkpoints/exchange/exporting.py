"""An adapter for upstream's own ``load_pretrained_model``, with a short script that asks it there as ``lcl-adapter ask`` does here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from lcl_adapter.base.adapter import checkpoint_of, read_manifest
from lcl_adapter.base.layouts import Checkpoint, check_folder_name
from lcl_adapter.base.model import family_of
from lcl_adapter.base.ref import NOT_GIVEN, BaseRef
from lcl_adapter.checkpoints.deltas import Adapter, check_fits
from lcl_adapter.checkpoints.exchange import names
from lcl_adapter.checkpoints.exchange.importing import read_upstream
from lcl_adapter.data.conversations import WORDINGS
from lcl_adapter.errors import AdapterError, MergeError, RunError
from lcl_adapter.files import whole_folder, write_json, write_text
from lcl_adapter.recipe import load

SCRIPT = Path(__file__).parent / "ask_upstream.py"


def export_adapter(run: Path, out: Path, base: BaseRef = NOT_GIVEN) -> dict[str, Any]:
    """Write ``out`` for upstream; what was written is read again and compared with the adapter.

    Raises AdapterError for an adapter that upstream's PEFT cannot hold, a base that is not in the original layout, or a
    folder whose name upstream would misread; RunError where ``out`` exists.
    """
    manifest = read_manifest(run)
    checkpoint = checkpoint_of(run, manifest, base)
    if not family_of(checkpoint).both_layouts:
        raise AdapterError(f"{run}: upstream LLaVA has no {family_of(checkpoint).name}; merge it, and serve that: `lcl-adapter merge {run} --out …`.")
    if checkpoint.layout != "original":
        raise AdapterError(
            f"{run}: upstream reads its base in the original layout, {checkpoint.folder} is in Hugging Face's. Give the original one with --base "
            "(its weights must be the same), or write it: `lcl-adapter convert BASE OUT --to original`."
        )
    if checkpoint.raw.get("model_type") == "llava_mistral":
        raise AdapterError(f"{run}: upstream loads adapters on Llama alone, this base is Mistral. Merge it: `lcl-adapter merge --to original`.")
    check_folder_name(out, adapter=True)
    if out.exists():
        raise RunError(f"{out}: exists already; nothing is overwritten. Give another -o.")
    adapter = Adapter(run)
    _refuse_what_upstream_lacks(adapter)
    check_fits([adapter], {name: w.shape for name, w in checkpoint.weights.items()})
    linear = checkpoint.config.projector_hidden_act == "linear"
    state = {
        f"{names.PREFIX}{names.to_upstream(module)}.lora_{half}.weight": parts[half].contiguous()
        for module, parts in adapter.layers.items()
        for half in ("A", "B")
    }
    trained = names.projector_to_upstream(adapter.whole, linear) if adapter.whole else {}
    with whole_folder(out) as partial:
        write_json(partial / "adapter_config.json", _config(adapter, checkpoint))
        torch.save(state, partial / "adapter_model.bin")
        torch.save(trained, partial / "non_lora_trainables.bin")  # always: upstream looks for a missing one on the hub
        _copy_config(checkpoint, partial)
        write_json(partial / "ask_upstream.json", _prompt(run, manifest, checkpoint))
        shutil.copyfile(SCRIPT, partial / SCRIPT.name)
        write_text(partial / "README.md", _card(run, out, manifest, checkpoint))
        largest = _compare(adapter, partial, checkpoint)
    return {"out": str(out), "layers": len(adapter.layers), "projector": bool(trained), "largest_difference": largest}


def _refuse_what_upstream_lacks(adapter: Adapter) -> None:
    """PEFT 0.7 holds plain LoRA of one rank."""
    config = adapter.config
    for what, there in (
        ("DoRA", config.use_dora),
        ("ranks that differ from layer to layer", config.rank_pattern or config.alpha_pattern),
        ("a bias in LoRA", config.lora_bias),
        ("single tokens trained", getattr(config, "trainable_token_indices", None)),
        ("weights trained in full outside the projector", [n for n in adapter.whole if "multi_modal_projector" not in n]),
    ):
        if there:
            raise AdapterError(f"{adapter.folder}: has {what}, which upstream's PEFT cannot load. Merge it: `lcl-adapter merge --to original`.")


def _config(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, Any]:
    """Only the fields that PEFT 0.7 knows; newer ones make it fail. rsLoRA's scaling is put into alpha."""
    config = adapter.config
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(checkpoint.folder),
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": adapter.scaling * config.r,
        "lora_dropout": config.lora_dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": names.TARGETS_THERE,
        "modules_to_save": None,
    }


def _copy_config(checkpoint: Checkpoint, folder: Path) -> None:
    """The base's own, byte for byte: another vocab_size there would leave its embedding unread, without a word.

    Old ones say ``llava``, which for upstream's transformers is Hugging Face's model; its loader fails on that.
    """
    if checkpoint.raw.get("model_type") == "llava":
        write_json(folder / "config.json", {**checkpoint.raw, "model_type": "llava_llama"})
    else:
        shutil.copyfile(checkpoint.folder / "config.json", folder / "config.json")


def _prompt(run: Path, manifest: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """What ``ask_upstream.py`` needs to write the same prompt and see the same pixels."""
    family = family_of(checkpoint)
    wording = WORDINGS[load(run / "recipe.yaml").wording]
    fields = ("system", "user", "assistant", "answer", "end", "image", "padding")
    return {
        **{field: getattr(family, field) for field in fields},
        "first": wording.support_question(first=True),
        "question": wording.support_question(first=False),
        "query": wording.query,
        "said": wording.answer,
        "next": checkpoint.config.model_type == "llava_next",
        "tiles": manifest["tiles"],
        "side": checkpoint.config.vision_config.image_size,
    }


def _compare(adapter: Adapter, folder: Path, checkpoint: Checkpoint) -> float:
    """Read as upstream's reader would; upstream itself says nothing when keys are wrong and goes on without the adapter."""
    back = read_upstream(folder, checkpoint)
    scaled = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    scaling, worst = scaled["lora_alpha"] / scaled["r"], 0.0
    if back.layers.keys() != adapter.layers.keys():
        raise MergeError(f"{folder}: {len(back.layers)} layers can be read again, {len(adapter.layers)} were written. Not kept.")
    for module, parts in adapter.layers.items():
        wanted = adapter.scaling * parts["B"].double() @ parts["A"].double()
        found = scaling * back.layers[module]["B"].double() @ back.layers[module]["A"].double()
        worst = max(worst, float((wanted - found).abs().max()) / max(1e-12, float(wanted.abs().max())))
    if worst > 1e-6:
        raise MergeError(f"{folder}: what can be read again differs from the adapter by {worst:.2g} of its largest value. Not kept.")
    return worst


def _card(run: Path, out: Path, manifest: dict[str, Any], checkpoint: Checkpoint) -> str:
    return (
        f"# {out.name}\n\nAn adapter for upstream LLaVA (haotian-liu/LLaVA 1.2.2), exported by lcl-adapter from `{run.name}`; its base is "
        f"`{checkpoint.folder.name}` in the original layout, base hash `{manifest['base_hash'][:16]}`.\n\n"
        "Ask it by photos, in upstream's own environment; `photos/` holds a folder of photos a class:\n\n"
        f"```\npython {out.name}/ask_upstream.py --base /path/to/{checkpoint.folder.name} photos/ query.png\n```\n\n"
        "Or load it as upstream does; the folder's name must keep `llava` and `lora` in it:\n\n"
        f"```\npython -m llava.serve.cli --model-path {out.name} --model-base /path/to/{checkpoint.folder.name} --image-file query.png\n```\n\n"
        "Upstream loads an adapter whose keys do not fit without a word, and answers as the base. These were read again after writing and are the "
        "adapter's own.\n"
    )
