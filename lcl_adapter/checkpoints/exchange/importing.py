"""An adapter that was trained upstream, or by plain PEFT on Hugging Face's layout, as a run of this project."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from lcl_adapter.base.adapter import FILES, manifest_of
from lcl_adapter.base.layouts import Checkpoint, open_checkpoint
from lcl_adapter.base.layouts.keys import skeleton
from lcl_adapter.base.layouts.tensors import stored_in_file
from lcl_adapter.base.model import PROJECTOR, family_of, lora_targets
from lcl_adapter.base.ref import NOT_GIVEN, BaseRef
from lcl_adapter.checkpoints.deltas import Adapter, check_fits
from lcl_adapter.checkpoints.exchange import names
from lcl_adapter.checkpoints.exchange.base_from_language_model import FOLDER, compose_base, language_model_of
from lcl_adapter.errors import AdapterError, ModelError, RunError
from lcl_adapter.files import read_object, whole_folder, write_json, write_text
from lcl_adapter.terminal import console

RECIPE = """# An adapter trained elsewhere; these suites measure it. Add sources to train on from here.
base: {base}
{tower}precision: auto
wording: lcl
output: {output}
sources:
  lcl: {{type: pocket}}
evaluate:
  suites:
    2way: {{kind: lcl, source: {{type: pocket, split: held_out}}, shots: [2], episodes: 200}}
"""


@dataclass
class Upstream:
    """What an adapter folder of upstream's holds, by this project's names."""

    layers: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    projector: dict[str, torch.Tensor] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


def import_adapter(folder: Path, out: Path, base: BaseRef = NOT_GIVEN) -> dict[str, Any]:
    """Write ``out`` as a run that eval, ask and merge take; where the base is a bare language model, with the LLaVA that it became in ``out/base``.

    Raises AdapterError for a folder that is no LoRA adapter, of another base's size, or changes the vision tower.
    """
    config = _config(folder)
    if out.exists():
        raise RunError(f"{out}: exists already; nothing is overwritten. Give another -o.")
    given = base.defaulting_to(name=config.get("base_model_name_or_path") or None)
    if given.name is None:
        raise AdapterError(f"{folder}: does not say what base it was trained on; give it with --base.")
    language = language_model_of(given.name)
    with whole_folder(out) as partial:
        if language is not None:
            checkpoint, name = compose_base(language, folder, partial / FOLDER, base.tower), str(out.absolute() / FOLDER)
        else:
            checkpoint = _open(folder, given)
            name = str(checkpoint.folder)
        found = read_upstream(folder, checkpoint)
        if language is None:
            _check_base_name(folder, config.get("base_model_name_or_path"), checkpoint)
        else:
            found.projector.clear()  # the base has it
        made, state = _as_peft(folder, config, found, checkpoint, name)
        made.save_pretrained(str(partial))
        save_file(state, partial / FILES[1], metadata={"format": "pt"})
        check_fits([Adapter(partial)], {name: w.shape for name, w in checkpoint.weights.items()})
        told = "" if checkpoint.tower is None else f"vision_tower: {json.dumps(str(checkpoint.tower))}\n"
        write_text(partial / "recipe.yaml", RECIPE.format(base=json.dumps(name), tower=told, output=json.dumps(str(out))))
        facts = {"imported_from": folder.name}
        write_json(partial / "lcl_adapter.json", manifest_of(partial, checkpoint, family_of(checkpoint), name, facts))
    composed = {} if language is None else {"base": name}
    return {"out": str(out), "layers": len(found.layers), "projector": bool(found.projector), "dropped": len(found.dropped), **composed}


def _open(folder: Path, base: BaseRef) -> Checkpoint:
    try:
        return open_checkpoint(base)
    except ModelError as error:
        raise AdapterError(f"{folder}: its base cannot be opened, give it with --base. {error}") from error


def _as_peft(folder: Path, config: dict[str, Any], found: Upstream, checkpoint: Checkpoint, name: str) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """PEFT's config and weights of today. Raises AdapterError where the ranks are not the config's."""
    rank = int(config["r"])
    odd = next((module for module, parts in found.layers.items() if parts["A"].shape[0] != rank), None)
    if odd:
        raise AdapterError(f"{folder}: adapter_config.json says rank {rank}, {odd} has {found.layers[odd]['A'].shape[0]}; one of them is another's.")
    made = LoraConfig(
        r=rank,
        lora_alpha=config["lora_alpha"],
        lora_dropout=config.get("lora_dropout", 0.0),
        use_rslora=bool(config.get("use_rslora")),
        target_modules=_targets(list(found.layers), skeleton(checkpoint.config)),
        modules_to_save=[PROJECTOR] if found.projector else None,
        base_model_name_or_path=name,
        inference_mode=True,
    )
    state = {f"{names.PREFIX}{module}.lora_{half}.weight": parts[half].float() for module, parts in found.layers.items() for half in ("A", "B")}
    state |= {names.PREFIX + key: value.float() for key, value in found.projector.items()}
    return made, {key: value.contiguous() for key, value in state.items()}


def _check_base_name(folder: Path, named: str | None, checkpoint: Checkpoint) -> None:
    """Widths alone cannot tell a LLaVA from the Vicuna it was made of. Raises AdapterError; a name that only differs is told of."""
    if not named or Path(named).name == checkpoint.folder.name:
        return
    if (folder / "non_lora_trainables.bin").exists() and "llava" not in named.lower():
        raise AdapterError(
            f"{folder}: trained on {named}, a language model and no LLaVA, as upstream's finetune_lora.sh does; on {checkpoint.folder.name} it would "
            "answer nonsense. Give that language model with --base: a base is made of it and of the adapter's own projector."
        )
    told = f"note: trained on {named}, taken onto {checkpoint.folder}; widths fit, the weights cannot be compared"
    console.print(told, style="yellow", markup=False)


def _targets(modules: list[str], model: Any) -> str | list[str]:
    """The usual pattern where every projection is there, else their names."""
    pattern = lora_targets(model)
    whole = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    return pattern if set(whole) == set(modules) else sorted(modules)


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder.")
    file = folder / "adapter_config.json"
    try:
        config = read_object(file)
    except FileNotFoundError as error:
        raise AdapterError(f"{folder}: no adapter_config.json in it, as in upstream's intermediate checkpoints; it is no whole adapter.") from error
    except ValueError as error:
        raise AdapterError(f"{folder}: {error}.") from error
    if config.get("peft_type") != "LORA" or "r" not in config or "lora_alpha" not in config:
        raise AdapterError(f"{file}: a {config.get('peft_type')!r} adapter; LoRA can be imported.")
    if config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise AdapterError(f"{file}: DoRA and ranks that differ from layer to layer are not imported.")
    return config


def read_upstream(folder: Path, checkpoint: Checkpoint) -> Upstream:
    """Its weights by this project's names.

    Raises AdapterError: no weights, one half missing, a vision tower that was adapted, a key that is not known.
    """
    found = Upstream()
    for key, value in _state(folder).items():
        place = names.from_anywhere(key)
        if place is not None:
            module, half = place
            found.layers.setdefault(module, {})[half[5]] = value
        elif "vision_tower" in key or "vision_model" in key:
            # Upstream's suffixes also reach the tower in 1.6, where nothing was trained: such a product is zero.
            if "lora_B" in key and bool(value.any()):
                raise AdapterError(f"{folder}: {key} adapts the vision tower; the towers here are frozen and shared, so it cannot be taken over.")
            found.dropped.append(key)
        elif "multi_modal_projector" in key and ".lora_" in key:
            raise AdapterError(f"{folder}: {key} is LoRA on the projector; here a projector is trained in full or not at all.")
        elif "multi_modal_projector" in key:
            bare = key.removeprefix(names.PREFIX)
            found.projector[bare if bare.startswith("model.") else f"model.{bare}"] = value
        else:
            raise AdapterError(f"{folder}: {key!r} is no weight of a LLaVA adapter that is known here.")
    if not found.layers:
        raise AdapterError(f"{folder}: no LoRA weights of the language model in it.")
    halves = [module for module, parts in found.layers.items() if parts.keys() != {"A", "B"}]
    if halves:
        raise AdapterError(f"{folder}: {halves[0]} has only one half of its two; copy the adapter again.")
    extra = folder / "non_lora_trainables.bin"
    if extra.exists():
        trained = {key: stored.read() for key, stored in stored_in_file(extra).items()}
        linear = getattr(checkpoint.config, "projector_hidden_act", None) == "linear"
        try:
            found.projector |= names.projector_from_upstream({k: v for k, v in trained.items() if "mm_projector" in k}, linear)
        except AdapterError as error:
            raise AdapterError(f"{folder}: {error}") from error
        for key, value in trained.items():
            if "mm_projector" not in key:
                _same_as_base(folder, key, value, checkpoint)
                found.dropped.append(key)
    return found


def _state(folder: Path) -> dict[str, torch.Tensor]:
    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if safe.exists():
        stored_in_file(safe)
        state: dict[str, torch.Tensor] = load_file(safe)
        return state
    if pickled.exists():
        return {key: stored.read() for key, stored in stored_in_file(pickled).items()}
    raise AdapterError(f"{folder}: neither adapter_model.safetensors nor adapter_model.bin in it.")


def _same_as_base(folder: Path, key: str, value: torch.Tensor, checkpoint: Checkpoint) -> None:
    """Upstream also writes what it left as it was, such as 1.6's line break."""
    name = key.removeprefix("base_model.model.")
    weight = checkpoint.weights.get(name)
    if weight is None or not torch.allclose(weight.read().float(), value.float(), atol=1e-3, rtol=1e-2):
        raise AdapterError(f"{folder}: {key} was trained in full; of such only the projector can be taken over. Merge it upstream and convert that.")
