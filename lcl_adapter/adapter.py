"""An adapter on disk: PEFT's own files, so that plain PEFT loads it, and a manifest that says what it belongs to.

    adapter_config.json, adapter_model.safetensors   as PEFT writes them
    lcl_adapter.json                                 base and its fingerprint, family, prompt version, classes, versions
    recipe.yaml                                      the resolved recipe

The manifest is written last and lists the files' hashes: without it, or with others, a folder is no adapter.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peft import PeftModel

from lcl_adapter.errors import AdapterError, RunError
from lcl_adapter.files import PARTIAL, scratch_folder, write_json
from lcl_adapter.model import Base, check_adapted, load_base
from lcl_adapter.recipe.schema import Precision

MANIFEST = "lcl_adapter.json"
FILES = ("adapter_config.json", "adapter_model.safetensors")
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "lcl-adapter")
EDGE = 1 << 20  # bytes read at each end of a weight file for the fingerprint


def fingerprint(base: Path) -> str:
    """What tells one base from another: its config and the size, first and last MiB of every weight file; sha256."""
    digest = hashlib.sha256((base / "config.json").read_bytes())
    for file in sorted(base.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(EDGE))
            opened.seek(max(0, size - EDGE))
            digest.update(opened.read(EDGE))
    return digest.hexdigest()


def save_adapter(base: Base, folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Write the adapter's files into ``folder``, whole or not at all; ``facts`` go into the manifest.

    Raises RunError where the disk is full.
    """
    assert isinstance(base.model, PeftModel)
    with scratch_folder(folder / "adapter") as partial:
        base.model.save_pretrained(partial, safe_serialization=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        for file in FILES:
            os.replace(partial / file, folder / file)
    manifest = {
        "base": name,
        "base_fingerprint": fingerprint(base.path),
        "family": base.family.name,
        "prompt_version": base.family.version,
        "precision": base.precision,
        **facts,
        "libraries": {library: _version(library) for library in LIBRARIES},
        "files": {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in FILES},
    }
    write_json(folder / MANIFEST, manifest)


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:  # an optional one
        return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete adapter.

    Raises AdapterError: no such folder, no or broken manifest, a file missing or changed.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such run or adapter folder.")
    path = folder / MANIFEST
    if not path.exists():
        hint = (
            " A run was stopped before it saved one; go on with `lcl-adapter train RECIPE resume=true`." if (folder / "checkpoints").exists() else ""
        )
        raise AdapterError(f"{folder}: no {MANIFEST} in it, so it holds no complete adapter.{hint}")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"]
    except (ValueError, KeyError) as error:
        raise AdapterError(f"{path}: not a manifest of this tool ({error}).") from error
    for file, digest in files.items():
        if not (folder / file).exists():
            raise AdapterError(f"{folder}: {file} is missing; copy the whole folder again.")
        if hashlib.sha256((folder / file).read_bytes()).hexdigest() != digest:
            raise AdapterError(f"{folder / file}: not the file that was saved (its hash differs); copy the folder again.")
    return manifest


def load_adapter(
    folder: Path, base_name: str | None = None, precision: Precision | None = None, device: str | None = None
) -> tuple[Base, dict[str, Any]]:
    """The base that an adapter belongs to, with the adapter on it, ready to predict; and its manifest.

    ``base_name`` stands in for the manifest's base when that has moved; its fingerprint must be the same.

    Raises AdapterError where the base is another one.
    """
    manifest = read_manifest(folder)
    base = load_base(base_name or manifest["base"], precision or manifest["precision"], device)
    if fingerprint(base.path) != manifest["base_fingerprint"]:
        raise AdapterError(f"{folder}: trained on another base than {base.path} (the fingerprints differ). Give the right one with --base.")
    if (base.family.name, base.family.version) != (manifest["family"], manifest["prompt_version"]):
        raise AdapterError(f"{folder}: trained with prompt {manifest['family']} v{manifest['prompt_version']}, which this version no longer writes.")
    model = PeftModel.from_pretrained(base.llava, str(folder), is_trainable=False)
    check_adapted(model)
    model.eval()
    return Base(model, base.processor, base.family, base.path, base.precision), manifest


def claim_run_folder(folder: Path, resume: bool) -> None:
    """Make a run's folder, or take an existing one up again.

    Raises RunError: it exists and is not empty; or it is to be resumed and there is nothing.
    """
    if resume and not (folder / "recipe.yaml").exists():
        raise RunError(f"{folder}: nothing to resume, no run was started in it. Leave `resume=true` out.")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: a file, not a folder. Choose another with output=….")
    if not resume and folder.exists() and any(p for p in folder.iterdir() if not p.name.endswith(PARTIAL)):
        raise RunError(f"{folder}: exists already. Choose another with output=…, go on with resume=true, or remove it.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be made ({error.strerror}).") from error
