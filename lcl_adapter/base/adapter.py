"""An adapter on disk: PEFT's own files, so that plain PEFT loads it, and a manifest that names the base it belongs to.

    adapter_config.json, adapter_model.safetensors   as PEFT writes them
    lcl_adapter.json                                 base and its hash, family, prompt version, layout, versions
    recipe.yaml                                      the resolved recipe

The manifest is written last and lists the files' hashes. A folder without it, or whose files have other hashes, is
refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from lcl_adapter import reading
from lcl_adapter.base.families import Family
from lcl_adapter.base.layouts import Checkpoint, open_checkpoint
from lcl_adapter.base.model import Base, check_adapted, load_base
from lcl_adapter.base.ref import NOT_GIVEN, BaseRef
from lcl_adapter.base.supports import most_tokens, orientations_of, readings_of, trained_shots
from lcl_adapter.devices import default_device
from lcl_adapter.errors import AdapterError, RunError
from lcl_adapter.files import LOCK, PARTIAL, read_object, scratch_folder, sha256_of, write_json
from lcl_adapter.packaged import adapter_folder
from lcl_adapter.recipe.schema import Orientations, Precision, Readings, Supports

MANIFEST = "lcl_adapter.json"
FILES = ("adapter_config.json", "adapter_model.safetensors")
FIELDS = {  # of a manifest, those that are read, and their types
    "base": str, "base_hash": str, "family": str, "prompt_version": int, "precision": str, "tiles": bool, "vision_tower": str | None,
}  # fmt: skip
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "lcl-adapter")


def save_adapter(base: Base, folder: Path, name: str, facts: Mapping[str, Any], state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write the adapter's files into ``folder``, completely or not at all.

    name: of the base, for the manifest. facts: further entries of the manifest. state: the trained weights, where the
    model's own are sharded among processes. Raises RunError where the disk is full.
    """
    assert isinstance(base.model, PeftModel)
    own: dict[str, Any] = {"precision": base.precision, "compute_dtype": str(base.dtype).removeprefix("torch."), "tiles": base.tiles}
    if base.support_tokens:
        own["support_tokens"] = base.support_tokens
    if base.supports != "ordered":
        own["supports"] = base.supports
    if base.shots:
        own["shots"] = base.shots
    if base.orientations > 1:
        own["orientations"] = base.orientations
    if base.readings > 1:
        own["readings"] = base.readings
    with scratch_folder(folder / "adapter") as partial:
        save_peft(base.model, partial, state)
        # Of these files, and not of those that another writer may put into the folder meanwhile
        manifest = manifest_of(partial, base.checkpoint, base.family, name, {**own, **facts})
        (folder / MANIFEST).unlink(missing_ok=True)
        for file in FILES:
            os.replace(partial / file, folder / file)
    write_json(folder / MANIFEST, manifest)


def manifest_of(folder: Path, checkpoint: Checkpoint, family: Family, name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of the adapter in ``folder``: its base (``name`` and hash), its prompt, versions, and ``facts``."""
    return {
        "base": name,
        "base_hash": checkpoint.hash(),
        "layout": checkpoint.layout,
        "vision_tower": checkpoint.ref.tower,
        "family": family.name,
        "prompt_version": family.version,
        "precision": "auto",
        "compute_dtype": "float32",
        "tiles": False,
        **facts,
        "libraries": versions(),
        "files": {file: sha256_of(folder / file) for file in FILES},
    }


def save_pissa_start(model: PeftModel, folder: Path) -> None:
    """Save the initial weights of a PiSSA adapter, which :func:`save_peft` subtracts.

    A resumed run uses those of its first start.
    """
    model.peft_config["default"].init_lora_weights = True  # the saved adapter is a plain LoRA
    if not (folder / "adapter_model.safetensors").exists():
        model.save_pretrained(folder, safe_serialization=True)
    model.pissa_start = folder


def save_peft(model: PeftModel, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write PEFT's files.

    PiSSA changes the base's weights; that change is subtracted here (PEFT, `init_lora_weights`).
    """
    start = getattr(model, "pissa_start", None)
    options: dict[str, Any] = {} if start is None else {"path_initial_model_for_weight_conversion": str(start)}
    if state is not None:
        options["state_dict"] = dict(state)
    model.save_pretrained(folder, safe_serialization=True, **options)


def versions() -> dict[str, str | None]:
    """The installed versions of this package and of what computes an adapter's answers; None where one is missing."""
    return {library: _version(library) for library in LIBRARIES}


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:  # optional
        return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete adapter.

    Raises AdapterError: no such folder, no or broken manifest, a file missing or changed.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such run or adapter folder.")
    if fault := reading.fault_of_folder(folder):
        raise AdapterError(f"{folder}: {fault}.")
    path = folder / MANIFEST
    if not path.exists():
        hint = (
            " A run was stopped before it saved one; resume it with `lcl-adapter train RECIPE resume=true`."
            if (folder / "checkpoints").exists()
            else ""
        )
        raise AdapterError(f"{folder}: no {MANIFEST} in it, so it holds no complete adapter.{hint}")
    try:
        manifest = read_object(path)
        files = {file: str(manifest["files"][file]) for file in FILES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path}: not a manifest of this tool ({type(error).__name__}: {str(error)[:200]}).") from error
    if "base_hash" not in manifest:
        raise AdapterError(f"{path}: written by a version before 0.3, which recognised a base by its files and not by its weights; train it again.")
    if manifest.get("supports", "ordered") not in get_args(Supports):
        raise AdapterError(f"{path}: trained with supports {manifest['supports']!r}, which this version does not know.")
    shots = manifest.get("shots", 1)
    if not isinstance(shots, int) or isinstance(shots, bool) or shots < 1:
        raise AdapterError(f"{path}: not a manifest of this tool (shots is {repr(shots)[:60]}).")
    for name, choices in (("orientations", Orientations), ("readings", Readings)):
        if manifest.get(name, 1) not in get_args(choices):
            raise AdapterError(f"{path}: not a manifest of this tool ({name} is {repr(manifest[name])[:60]}).")
    wrong = [f"{name} is {repr(manifest.get(name))[:60]}" for name, kinds in FIELDS.items() if not isinstance(manifest.get(name), kinds)]
    if wrong:
        raise AdapterError(f"{path}: not a manifest of this tool ({wrong[0]}).")
    for file, digest in files.items():
        if not (folder / file).exists():
            raise AdapterError(f"{folder}: {file} is missing; copy the whole folder again.")
        if sha256_of(folder / file) != digest:
            raise AdapterError(f"{folder / file}: not the file that was saved (its hash differs); copy the folder again.")
    return manifest


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, ``checkpoint-<step>``, by step. Any other file or folder is ignored."""
    steps = {path: re.fullmatch(r"checkpoint-([0-9]+)", path.name) for path in folder.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, match in steps.items() if match), key=lambda path: int(path.name.partition("-")[2]))


def load_adapter(folder: Path | str, base: BaseRef = NOT_GIVEN) -> tuple[Base, dict[str, Any]]:
    """The base that an adapter belongs to, with the adapter attached, ready to predict; and the manifest.

    base: replaces the manifest's values, for a base that has moved, another precision or other tokens of a support picture.
    Either layout works; the hash of the weights must be the same. On Apple's GPUs the precision is fp16, where none is given.

    Raises AdapterError where the base is another one.
    """
    folder = adapter_folder(folder)
    manifest = read_manifest(folder)
    checkpoint = checkpoint_of(folder, manifest, base)
    tokens = base.support_tokens or most_tokens(manifest)
    supports: Supports = base.supports or manifest.get("supports", "ordered")
    given = {
        "device": base.device, "tiles": manifest["tiles"], "attn_implementation": base.attn_implementation, "support_tokens": tokens,
        "supports": supports, "shots": base.shots or trained_shots(manifest), "orientations": base.orientations or orientations_of(manifest),
        "readings": base.readings or readings_of(manifest),
    }  # fmt: skip
    own: Precision = "fp16" if (base.device or default_device()) == "mps" else manifest["precision"]
    loaded = load_base(replace(checkpoint.ref, precision=base.precision or own, **given))
    if (loaded.family.name, loaded.family.version) != (manifest["family"], manifest["prompt_version"]):
        raise AdapterError(f"{folder}: trained with prompt {manifest['family']} v{manifest['prompt_version']}, which this version no longer writes.")
    try:
        with reading.one_line():
            model = PeftModel.from_pretrained(loaded.llava, str(folder), is_trainable=False)
    except ValueError as error:
        raise AdapterError(f"{folder}: cannot be loaded on its base ({error}).") from error
    check_adapted(model)
    model.eval()
    return loaded.with_model(model), manifest


def load_weights(base: Base, folder: Path) -> None:
    """Give a model with an adapter the weights of another adapter of the same shape. Raises AdapterError as load_adapter."""
    read_manifest(folder)
    result = set_peft_model_state_dict(base.model, load_file(folder / FILES[1]))
    assert not result.unexpected_keys, result.unexpected_keys[:1]


def checkpoint_of(folder: Path, manifest: Mapping[str, Any], base: BaseRef = NOT_GIVEN) -> Checkpoint:
    """The checkpoint that an adapter was trained on, in either layout.

    Raises AdapterError where the hash differs: it is another base, or one that was changed since.
    """
    tower = manifest["vision_tower"]
    checkpoint = open_checkpoint(base.defaulting_to(name=manifest["base"], tower=tower if tower and Path(tower).exists() else None))
    if checkpoint.hash() != manifest["base_hash"]:
        raise AdapterError(
            f"{folder}: trained on another base than {checkpoint.folder}, or that one was changed since (the hashes of the weights differ). "
            "Give the right base with --base."
        )
    return checkpoint


def claim_run_folder(folder: Path, resume: bool) -> None:
    """Create a run's folder, or check that an existing one can be resumed.

    Raises RunError: the folder exists and is not empty; or there is no run to resume.
    """
    if resume and not (folder / "recipe.yaml").exists():
        raise RunError(f"{folder}: nothing to resume, no run was started in it. Remove `resume=true`.")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: a file, not a folder. Choose another with output=….")
    if not resume and folder.exists() and any(p for p in folder.iterdir() if not p.name.endswith((PARTIAL, LOCK))):
        raise RunError(f"{folder}: exists already. Choose another with output=…, resume it with resume=true, or remove it.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be created ({error.strerror}).") from error
