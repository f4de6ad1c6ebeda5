"""Describe the content of a path: a base in either layout, an adapter, a run, or a vision tower."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from lcl_adapter import reading
from lcl_adapter.base.adapter import MANIFEST, checkpoints_in, read_manifest
from lcl_adapter.base.encoder import Encoder
from lcl_adapter.base.layouts import Checkpoint, find_base, open_checkpoint, read_config
from lcl_adapter.base.layouts.configs import LLAVA_TYPES
from lcl_adapter.base.layouts.keys import PROJECTOR, TOWER
from lcl_adapter.base.layouts.tensors import tensors_in_file
from lcl_adapter.base.model import family_of, load_encoder
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.data.conversations import Turn
from lcl_adapter.errors import AdapterError, ModelError
from lcl_adapter.files import read_object, read_result
from lcl_adapter.pocket import NAME as POCKET

LISTED = 7  # of named layers; of more, the lowest and the highest


def describe(base: BaseRef | str) -> dict[str, Any]:
    """Facts by name, ``kind`` first. Only configs, the tokenizer and the headers of weights are read.

    Raises ModelError for any other path; AdapterError for an incomplete adapter.
    """
    folder = find_base(BaseRef.of(base).name or POCKET)
    if fault := reading.fault_of_folder(folder):
        raise ModelError(f"{folder}: {fault}.")
    if (folder / MANIFEST).exists():
        return _run(folder)
    if (folder / "adapter_config.json").exists():
        return _adapter(folder)
    if (folder / "recipe.yaml").exists():
        return {"kind": "run without an adapter", "folder": str(folder), "checkpoints": len(checkpoints_in(folder / "checkpoints"))}
    raw = read_config(folder)
    if "vision_config" not in raw and "mm_vision_tower" not in raw and "patch_size" in raw:
        return {
            "kind": "vision tower",
            "folder": str(folder),
            **{k: raw.get(k) for k in ("hidden_size", "num_hidden_layers", "patch_size", "image_size")},
        }
    return _base(open_checkpoint(base))


def _base(checkpoint: Checkpoint) -> dict[str, Any]:
    family, encoder, config = family_of(checkpoint), load_encoder(checkpoint.ref), checkpoint.config
    weights = checkpoint.weights if config.model_type in LLAVA_TYPES else {}
    parts: dict[str, int] = {"vision tower": 0, "projector": 0, "language model": 0}
    types: Counter[str] = Counter()
    for weight_name, weight in weights.items():
        count = math.prod(weight.shape)
        part = "vision tower" if weight_name.startswith(TOWER) else "projector" if weight_name.startswith(PROJECTOR) else "language model"
        parts[part] += count
        types[str(weight.dtype).removeprefix("torch.")] += count
    files = {weight.stored.file for weight in weights.values() if weight.stored is not None}
    return {
        "kind": "base",
        "folder": str(checkpoint.folder),
        "layout": checkpoint.layout,
        "family": family.name,
        "model": config.model_type,
        "language model": config.text_config.model_type,
        "vision tower": str(checkpoint.tower or "inside"),
        "parameters": parts,
        "types": dict(types),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "hash": checkpoint.hash(),
        **_prompt(encoder),
    }


def _prompt(encoder: Encoder) -> dict[str, Any]:
    return {
        "tokens an image": encoder.tokens_an_image,
        "context": encoder.context,
        "prompt": encoder.family.render([Turn("user", "What is this?"), Turn("assistant", "a cup")]).text,
        "prompt version": encoder.family.version,
    }


def _run(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    config = _config(folder)
    report = read_result(folder / "report.json") if (folder / "report.json").exists() else {"suites": []}
    fields = ("base", "base_hash", "layout", "family", "prompt_version", "precision", "tiles", "vision_tower", "libraries")
    return {
        "kind": "run with its adapter",
        "folder": str(folder),
        **{name: manifest[name] for name in fields},
        **{name: manifest[name] for name in ("support_tokens", "supports", "shots", "orientations", "readings") if name in manifest},
        **_lora(folder, config),
        "classes seen": {name: len(names) for name, names in manifest.get("held_in", {}).items()},
        "results": _results(folder, report),
    }


def _results(folder: Path, report: Any) -> dict[str, Any]:
    try:
        return {row["name"]: row["adapter"]["value"] for row in report["suites"]}
    except (KeyError, TypeError) as error:
        raise AdapterError(f"{folder / 'report.json'}: not a report of this tool; remove it.") from error


def _adapter(folder: Path) -> dict[str, Any]:
    config = _config(folder)
    upstream = (folder / "non_lora_trainables.bin").exists()
    return {
        "kind": "adapter of upstream LLaVA" if upstream else "adapter of PEFT",
        "folder": str(folder),
        "base": config.get("base_model_name_or_path"),
        **_lora(folder, config),
        "next": f"lcl-adapter import {folder} -o runs/theirs",
    }


def _config(folder: Path) -> dict[str, Any]:
    """PEFT's config of an adapter. Raises AdapterError."""
    try:
        return read_object(folder / "adapter_config.json")
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder}: {error}.") from error


def _lora(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    file = next((folder / n for n in ("adapter_model.safetensors", "adapter_model.bin") if (folder / n).exists()), None)
    if file is None:
        raise ModelError(f"{folder}: adapter_config.json without weights beside it; copy the whole folder again.")
    tensors = tensors_in_file(file)
    kind = "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    other: dict[str, int] = config.get("rank_pattern") or {}
    if len(other) > LISTED:  # as of one that was made smaller layer by layer
        described = f"{kind}, ranks {min(other.values())} to {max(other.values())}, another of each layer"
    else:
        described = ", ".join(
            [f"{kind}, rank {config.get('r')}", *(f"{module} {rank}" for module, rank in other.items()), f"alpha {config.get('lora_alpha')}"]
        )
    return {"adapter": described, "tensors": len(tensors), "adapter parameters": parameters}
