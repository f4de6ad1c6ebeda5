"""A base for an adapter that upstream trained on a bare language model (its `finetune_lora.sh`): that model, the projector trained with it, a tower.

Nothing large is copied: the language model's files are linked, the projector is a file beside them, and the index names both.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from lcl_adapter.base.layouts import Checkpoint, find_base, open_checkpoint
from lcl_adapter.base.layouts.checkpoint import layout_of, read_config
from lcl_adapter.base.layouts.configs import LANGUAGE_TYPES
from lcl_adapter.base.layouts.tensors import INDEX, stored_in, stored_in_file
from lcl_adapter.base.layouts.writing import copy_beside
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.errors import AdapterError, ModelError
from lcl_adapter.files import write_json

PROJECTOR_FILE = "mm_projector.safetensors"
FOLDER = "base"


def language_model_of(name: str) -> Path | None:
    """The folder of a language model without a vision tower, None where ``name`` is anything else."""
    try:
        folder = find_base(name)
        raw = read_config(folder)
    except ModelError:
        return None
    kinds = {kind.model_type for kind in LANGUAGE_TYPES.values()}
    return folder if layout_of(raw) is None and raw.get("model_type") in kinds else None


def compose_base(language: Path, adapter: Path, place: Path, tower: str | None) -> Checkpoint:
    """Write a base in the original layout into ``place``: ``language``, and the config and projector that lie in ``adapter``.

    Raises AdapterError where the adapter brings no projector, or was trained with tokens whose rows it does not bring;
    ModelError where the parts do not fit each other.
    """
    try:
        raw = read_config(adapter)
    except ModelError as error:
        raise AdapterError(f"{adapter}: trained on a language model alone, so a config.json of a LLaVA has to lie in it. {error}") from error
    if layout_of(raw) != "original":
        raise AdapterError(f"{adapter}: its config.json names no mm_vision_tower, so it cannot be told what LLaVA {language} became.")
    if raw.get("mm_use_im_start_end"):
        raise AdapterError(f"{adapter}: uses image start and end tokens, whose rows upstream trains and does not save; merge it upstream.")
    beside = _beside_the_language_model(adapter)
    if not beside:
        raise AdapterError(f"{adapter}: trained on {language}, a language model, but brings no projector (non_lora_trainables.bin) of its own.")
    stored = stored_in(language)
    place.mkdir(parents=True)
    copy_beside(language, place)
    for file in {one.file for one in stored.values()}:
        (place / file.name).symlink_to(file.absolute())
    save_file(beside, place / PROJECTOR_FILE, metadata={"format": "pt"})
    placed = {key: one.file.name for key, one in stored.items()} | dict.fromkeys(beside, PROJECTOR_FILE)
    size = sum(one.size for one in stored.values()) + sum(value.numel() * value.element_size() for value in beside.values())
    write_json(place / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))})
    write_json(place / "config.json", {"model_type": "llava_llama", **raw})
    return open_checkpoint(BaseRef(str(place), tower=tower))


def _beside_the_language_model(adapter: Path) -> dict[str, torch.Tensor]:
    """The projector, and 1.6's line break, by the original layout's keys."""
    file = adapter / "non_lora_trainables.bin"
    if not file.exists():
        return {}
    matches = ((re.search(r"(mm_projector\..+|image_newline)$", key), stored) for key, stored in stored_in_file(file).items())
    return {f"model.{match[1]}": stored.read().contiguous() for match, stored in matches if match is not None}
