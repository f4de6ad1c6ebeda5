"""Build the LLaVA base of an adapter that upstream trained on a bare language model (with its ``finetune_lora.sh``).

The base consists of the language model, the projector that was trained with the adapter, and a vision tower. No large
file is copied: the language model's files are linked, and the index lists them together with the projector's file.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from lcl_adapter.base.layouts import Checkpoint, find_base, open_checkpoint
from lcl_adapter.base.layouts.checkpoint import layout_of, read_config
from lcl_adapter.base.layouts.configs import LANGUAGE_TYPES
from lcl_adapter.base.layouts.tensors import INDEX, tensors_in_file, tensors_in_folder
from lcl_adapter.base.layouts.writing import copy_other_files
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.errors import AdapterError, ModelError
from lcl_adapter.files import write_json

PROJECTOR_FILE = "mm_projector.safetensors"
BASE_FOLDER = "base"  # inside the imported run


def find_language_model(name: str) -> Path | None:
    """The folder of the language model ``name``; None if it is anything else, for instance a LLaVA."""
    try:
        folder = find_base(name)
        config = read_config(folder)
    except ModelError:
        return None
    language_types = {kind.model_type for kind in LANGUAGE_TYPES.values()}
    return folder if layout_of(config) is None and config.get("model_type") in language_types else None


def build_base(language_model: Path, adapter: Path, folder: Path, tower: str | None) -> Checkpoint:
    """Write a base in the original layout into ``folder``. The config.json and the projector are the adapter's.

    Raises AdapterError if the adapter has no projector, or was trained with new tokens whose embeddings upstream did
    not save. Raises ModelError if the parts do not fit each other.
    """
    try:
        config = read_config(adapter)
    except ModelError as error:
        raise AdapterError(
            f"{adapter}: trained on a bare language model, so the folder must contain the config.json of a LLaVA. Copy it from upstream's "
            f"output folder. {error}"
        ) from error
    if layout_of(config) != "original":
        raise AdapterError(f"{adapter}: its config.json names no mm_vision_tower, so the LLaVA made of {language_model} is unknown.")
    if config.get("mm_use_im_start_end"):
        raise AdapterError(f"{adapter}: uses image start and end tokens; upstream trains their embeddings and does not save them. Merge it upstream.")
    projector = _read_projector(adapter)
    if not projector:
        raise AdapterError(
            f"{adapter}: trained on the language model {language_model}, but has no projector of its own (non_lora_trainables.bin). Copy it there."
        )
    tensors = tensors_in_folder(language_model)
    folder.mkdir(parents=True)
    copy_other_files(language_model, folder)
    for file in {stored.file for stored in tensors.values()}:
        (folder / file.name).symlink_to(file.absolute())
    save_file(projector, folder / PROJECTOR_FILE, metadata={"format": "pt"})
    file_of = {key: stored.file.name for key, stored in tensors.items()} | dict.fromkeys(projector, PROJECTOR_FILE)
    size = sum(stored.size for stored in tensors.values()) + sum(value.numel() * value.element_size() for value in projector.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(file_of.items()))})
    write_json(folder / "config.json", {"model_type": "llava_llama", **config})
    return open_checkpoint(BaseRef(str(folder), tower=tower))


def _read_projector(adapter: Path) -> dict[str, torch.Tensor]:
    """The adapter's projector, and the ``image_newline`` of 1.6, by the keys of the original layout."""
    file = adapter / "non_lora_trainables.bin"
    if not file.exists():
        return {}
    matches = ((re.search(r"(mm_projector\..+|image_newline)$", key), stored) for key, stored in tensors_in_file(file).items())
    return {f"model.{match[1]}": stored.read().contiguous() for match, stored in matches if match is not None}
