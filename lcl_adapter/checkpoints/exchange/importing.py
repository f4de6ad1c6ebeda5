"""Import an adapter of upstream LLaVA, or of plain PEFT on Hugging Face's layout, as a run of this project."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from lcl_adapter import reading
from lcl_adapter.base.adapter import FILES, manifest_of
from lcl_adapter.base.layouts import Checkpoint, open_checkpoint
from lcl_adapter.base.layouts.keys import skeleton
from lcl_adapter.base.layouts.tensors import tensors_in_file
from lcl_adapter.base.model import PROJECTOR, family_of, lora_targets
from lcl_adapter.base.ref import NOT_GIVEN, BaseRef
from lcl_adapter.checkpoints.deltas import Adapter, check_fits
from lcl_adapter.checkpoints.exchange import names
from lcl_adapter.checkpoints.exchange.base_from_language_model import BASE_FOLDER, build_base, find_language_model
from lcl_adapter.errors import AdapterError, ModelError, RunError
from lcl_adapter.files import read_object, whole_folder, write_json, write_text
from lcl_adapter.terminal import console

RECIPE = """# An imported adapter. `lcl-adapter eval` runs the suites below. To train it further, add sources.
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
class UpstreamAdapter:
    """The tensors of an adapter folder that upstream or PEFT wrote, by this project's names.

    layers: module -> {"A": [R, I], "B": [O, R]}. dropped: keys of tensors that change nothing.
    """

    layers: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    projector: dict[str, torch.Tensor] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


def import_adapter(folder: Path, out: Path, base: BaseRef = NOT_GIVEN) -> dict[str, Any]:
    """Write ``out`` as a run, for eval, ask, merge and every other command.

    If the adapter was trained on a bare language model, the LLaVA that it became is built in ``out/base``. Raises
    AdapterError if the folder is no LoRA adapter, fits another base, or changes the vision tower. Raises RunError if
    ``out`` exists.
    """
    config = _read_config(folder)
    if out.exists():
        raise RunError(f"{out}: exists already; nothing is overwritten. Give another -o.")
    given = base.defaulting_to(name=config.get("base_model_name_or_path") or None)
    if given.name is None:
        raise AdapterError(f"{folder}: its adapter_config.json does not name the base it was trained on; give it with --base.")
    language_model = find_language_model(given.name)
    with whole_folder(out) as partial:
        if language_model is None:
            checkpoint = _open_base(folder, given)
            base_name = str(checkpoint.folder)
            upstream = read_upstream(folder, checkpoint)
            _check_base_name(folder, config.get("base_model_name_or_path"), checkpoint)
        else:
            checkpoint = build_base(language_model, folder, partial / BASE_FOLDER, base.tower)
            base_name = str(out.absolute() / BASE_FOLDER)
            upstream = read_upstream(folder, checkpoint)
            upstream.projector.clear()  # it is in the base now
        peft_config, tensors = _to_peft(folder, config, upstream, checkpoint, base_name)
        peft_config.save_pretrained(str(partial))
        save_file(tensors, partial / FILES[1], metadata={"format": "pt"})
        check_fits([Adapter(partial)], {name: weight.shape for name, weight in checkpoint.weights.items()})
        tower_line = "" if checkpoint.tower is None else f"vision_tower: {json.dumps(str(checkpoint.tower))}\n"
        write_text(partial / "recipe.yaml", RECIPE.format(base=json.dumps(base_name), tower=tower_line, output=json.dumps(str(out))))
        facts = {"imported_from": folder.name}
        write_json(partial / "lcl_adapter.json", manifest_of(partial, checkpoint, family_of(checkpoint), base_name, facts))
    return {
        "out": str(out),
        "layers": len(upstream.layers),
        "projector": bool(upstream.projector),
        "dropped": len(upstream.dropped),
        **({} if language_model is None else {"base": base_name}),
    }


def _open_base(folder: Path, base: BaseRef) -> Checkpoint:
    try:
        return open_checkpoint(base)
    except ModelError as error:
        raise AdapterError(f"{folder}: its base cannot be opened, give it with --base. {error}") from error


def _to_peft(
    folder: Path, config: dict[str, Any], upstream: UpstreamAdapter, checkpoint: Checkpoint, base_name: str
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The config and tensors of the installed PEFT. Raises AdapterError if a layer's rank is not the config's."""
    rank = int(config["r"])
    for module, parts in upstream.layers.items():
        if parts["A"].shape[0] != rank:
            raise AdapterError(
                f"{folder}: adapter_config.json says rank {rank}, but {module} has rank {parts['A'].shape[0]}; the files belong to two adapters."
            )
    peft_config = LoraConfig(
        r=rank,
        lora_alpha=config["lora_alpha"],
        lora_dropout=config.get("lora_dropout", 0.0),
        use_rslora=bool(config.get("use_rslora")),
        target_modules=_target_modules(list(upstream.layers), skeleton(checkpoint.config)),
        modules_to_save=[PROJECTOR] if upstream.projector else None,
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    tensors = {f"{names.PREFIX}{module}.lora_{half}.weight": parts[half] for module, parts in upstream.layers.items() for half in ("A", "B")}
    tensors |= {names.PREFIX + key: value for key, value in upstream.projector.items()}
    return peft_config, {key: value.float().contiguous() for key, value in tensors.items()}


def _check_base_name(folder: Path, trained_on: str | None, checkpoint: Checkpoint) -> None:
    """Compare the name of the base the adapter was trained on with the given base.

    The shapes alone do not show a wrong base, because a LLaVA and the Vicuna it was made of have equal widths.

    Raises AdapterError if the adapter was trained on a bare language model. Another name alone is only noted on the
    terminal.
    """
    if not trained_on or Path(trained_on).name == checkpoint.folder.name:
        return
    if (folder / "non_lora_trainables.bin").exists() and "llava" not in trained_on.lower():
        raise AdapterError(
            f"{folder}: trained on {trained_on}, a language model and no LLaVA, as upstream's finetune_lora.sh does; on {checkpoint.folder.name} it "
            "would answer nonsense. Give that language model with --base: a base is made of it and of the adapter's own projector."
        )
    note = f"note: trained on {trained_on}, imported for {checkpoint.folder}; the shapes are equal, the weights cannot be compared"
    console.print(note, style="yellow", markup=False)


def _target_modules(modules: list[str], model: Any) -> str | list[str]:
    """The usual pattern if the adapter changes every projection of the language model, else the modules' names."""
    pattern = lora_targets(model)
    all_projections = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    return pattern if all_projections == set(modules) else sorted(modules)


def _read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises AdapterError if it is missing, broken, or not one of plain LoRA."""
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder.")
    if fault := reading.fault_of_folder(folder):
        raise AdapterError(f"{folder}: {fault}.")
    file = folder / "adapter_config.json"
    try:
        config = read_object(file)
    except FileNotFoundError as error:
        raise AdapterError(
            f"{folder}: no adapter_config.json in it, so it is not a complete adapter. Upstream's intermediate checkpoints have none; give the "
            "folder that upstream wrote at the end of its training."
        ) from error
    except ValueError as error:
        raise AdapterError(f"{folder}: {error}.") from error
    if config.get("peft_type") != "LORA" or "r" not in config or "lora_alpha" not in config:
        raise AdapterError(f"{file}: a {config.get('peft_type')!r} adapter; only LoRA can be imported.")
    if config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise AdapterError(f"{file}: DoRA and ranks that differ from layer to layer cannot be imported.")
    return config


def read_upstream(folder: Path, checkpoint: Checkpoint) -> UpstreamAdapter:
    """The tensors of an adapter folder, by this project's names.

    Raises AdapterError if there are no weights, one of a layer's two matrices is missing, the vision tower was adapted,
    or a key is unknown.
    """
    adapter = UpstreamAdapter()
    for key, value in _read_tensors(folder).items():
        lora_place = names.parse_lora_key(key)
        if lora_place is not None:
            module, half = lora_place
            adapter.layers.setdefault(module, {})[half] = value
        elif "vision_tower" in key or "vision_model" in key:
            # In 1.6 upstream's target suffixes also match the tower, which is not trained: B is zero there.
            if "lora_B" in key and bool(value.any()):
                raise AdapterError(
                    f"{folder}: {key} adapts the vision tower. It cannot be imported, because vision towers are frozen here. "
                    + _merge_first(folder, checkpoint)
                )
            adapter.dropped.append(key)
        elif "multi_modal_projector" in key and ".lora_" in key:
            raise AdapterError(
                f"{folder}: {key} is LoRA on the projector, which cannot be imported: here a projector is trained in full or not at all. "
                + _merge_first(folder, checkpoint)
            )
        elif "multi_modal_projector" in key:
            name = key.removeprefix(names.PREFIX)
            adapter.projector[name if name.startswith("model.") else f"model.{name}"] = value
        else:
            raise AdapterError(f"{folder}: {key!r} is no known weight of a LLaVA adapter.")
    if not adapter.layers:
        raise AdapterError(f"{folder}: no LoRA weights of the language model in it.")
    for module, parts in adapter.layers.items():
        if parts.keys() != {"A", "B"}:
            raise AdapterError(f"{folder}: {module} has only one of its two matrices, A and B; copy the adapter again.")
    if (folder / "non_lora_trainables.bin").exists():
        _add_full_weights(adapter, folder, checkpoint)
    return adapter


MERGE = (
    "from peft import PeftModel; from transformers import AutoModelForImageTextToText as Model, AutoProcessor as Processor; "
    "PeftModel.from_pretrained(Model.from_pretrained({base!r}, dtype='auto'), {adapter!r}).merge_and_unload().save_pretrained({out!r}); "
    "Processor.from_pretrained({base!r}, backend='pil').save_pretrained({out!r})"
)


def _merge_first(folder: Path, checkpoint: Checkpoint) -> str:
    """The two commands that make a base of the adapter instead, as text."""
    out = f"{folder.name}-merged"
    if checkpoint.layout != "hf":
        return "Merge it where it was trained, and use the result as the base."
    merge = MERGE.format(base=str(checkpoint.folder), adapter=str(folder), out=out)
    return f"Merge it into a base of its own, and train or ask that one:\n  python -c {shlex.quote(merge)}\n  lcl-adapter inspect {shlex.quote(out)}"


def _add_full_weights(adapter: UpstreamAdapter, folder: Path, checkpoint: Checkpoint) -> None:
    """Add the projector of upstream's non_lora_trainables.bin. Raises AdapterError if anything else in it was trained."""
    tensors = {key: stored.read() for key, stored in tensors_in_file(folder / "non_lora_trainables.bin").items()}
    linear = getattr(checkpoint.config, "projector_hidden_act", None) == "linear"
    try:
        adapter.projector |= names.projector_from_upstream({key: value for key, value in tensors.items() if "mm_projector" in key}, linear)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from error
    for key, value in tensors.items():
        if "mm_projector" not in key:
            _check_untrained(folder, key, value, checkpoint)
            adapter.dropped.append(key)


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    safetensors_file, pickle_file = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if safetensors_file.exists():
        tensors_in_file(safetensors_file)  # raises an error that names the file, if the file is incomplete
        tensors: dict[str, torch.Tensor] = load_file(safetensors_file)
        return tensors
    if pickle_file.exists():
        return {key: stored.read() for key, stored in tensors_in_file(pickle_file).items()}
    raise AdapterError(f"{folder}: neither adapter_model.safetensors nor adapter_model.bin in it.")


def _check_untrained(folder: Path, key: str, value: torch.Tensor, checkpoint: Checkpoint) -> None:
    """Raises AdapterError if a weight differs from the base's.

    Upstream also saves weights it did not train, such as 1.6's image_newline.
    """
    name = key.removeprefix("base_model.model.")
    weight = checkpoint.weights.get(name)
    if weight is None or not torch.allclose(weight.read().float(), value.float(), atol=1e-3, rtol=1e-2):
        raise AdapterError(
            f"{folder}: {key} was trained in full. Of such weights only the projector can be imported. Merge the adapter upstream and convert that."
        )
