"""Export an adapter for vLLM: PEFT's files, the prompt as a chat template, and a script that starts the server.

It follows vLLM 0.33: vllm/lora/peft_helper.py (config fields), vllm/lora/utils.py (names), vllm/config/lora.py (ranks),
and the classes in vllm/model_executor/models/llava*.py that declare SupportsLoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lcl_adapter.base.adapter import checkpoint_of, read_manifest
from lcl_adapter.base.encoder import Encoder
from lcl_adapter.base.layouts import Checkpoint
from lcl_adapter.base.layouts.configs import NEXT, UPSTREAM_TYPES
from lcl_adapter.base.model import family_of, load_encoder
from lcl_adapter.base.ref import NOT_GIVEN, BaseRef
from lcl_adapter.base.supports import spent_elsewhere
from lcl_adapter.checkpoints.deltas import Adapter, check_fits
from lcl_adapter.checkpoints.exchange import names
from lcl_adapter.data.conversations import Turn
from lcl_adapter.errors import AdapterError, MergeError, RunError
from lcl_adapter.files import whole_folder, write_json, write_text
from lcl_adapter.recipe import load

LORA_TYPES = UPSTREAM_TYPES  # vLLM supports LoRA on these model types, which happen to be upstream's
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM accepts for --max-lora-rank
IMAGES = 17  # per request: two classes of 8 photos, and the query
SCRIPT = """#!/bin/sh
# Start vLLM with this adapter: serve.sh /path/to/{base} [/path/to/this/folder] [further flags of vllm serve]
#   max-lora-rank        the smallest value that vLLM accepts for rank {rank}
#   limit-mm-per-prompt  images per request: {images}
#   prefix caching       a support set is computed once, if requests begin with it
#   max-model-len        the context of the base
set -e
base=$1
adapter=${{2:-$(dirname "$0")}}
[ $# -ge 2 ] && shift 2 || shift 1
exec vllm serve "$base" --served-model-name base \\
    --enable-lora --max-lora-rank {slots} --lora-modules {name}="$adapter" \\
    --chat-template "$adapter/chat_template.jinja" --chat-template-content-format openai \\
    --limit-mm-per-prompt '{{"image": {images}}}' --enable-prefix-caching --max-logprobs 20 --max-model-len {context} "$@"
"""


def export_for_vllm(run: Path, out: Path, base: BaseRef = NOT_GIVEN, name: str = "lcl", images: int = IMAGES) -> dict[str, Any]:
    """Write ``out`` for vLLM. The written files are read again and compared with the adapter.

    name: the model name that vLLM serves the adapter under. images: the largest number of images in a request.

    Raises AdapterError, with what to do instead, if vLLM cannot serve such an adapter. Raises RunError if ``out``
    exists.
    """
    manifest = read_manifest(run)
    checkpoint = checkpoint_of(run, manifest, base)
    if out.exists():
        raise RunError(f"{out}: exists already; nothing is overwritten. Give another -o.")
    adapter = Adapter(run)
    _check_supported(run, adapter, checkpoint, bool(manifest["tiles"]))
    check_fits([adapter], {key: weight.shape for key, weight in checkpoint.weights.items()})
    encoder = load_encoder(checkpoint.ref)
    layers = adapter.of_one_rank()
    lora_tensors = {f"{names.PREFIX}{module}.lora_{half}.weight": parts[half] for module, parts in layers.items() for half in ("A", "B")}
    config = _peft_config(adapter, checkpoint)
    settings = {
        "base": checkpoint.folder.name,
        "rank": config["r"],
        "slots": next(rank for rank in RANKS if rank >= config["r"]),
        "images": images,
        "name": name,
        "context": encoder.context,
    }
    with whole_folder(out) as partial:
        write_json(partial / "adapter_config.json", config)
        save_file(lora_tensors, partial / "adapter_model.safetensors")
        write_text(partial / "chat_template.jinja", chat_template_of(checkpoint, encoder))
        write_text(partial / "serve.sh", SCRIPT.format(**settings))
        (partial / "serve.sh").chmod(0o755)
        write_text(partial / "README.md", _readme(run, manifest, settings))
        _check_written(layers, partial)
    notes = spent_elsewhere(manifest)
    return {
        "out": str(out),
        "layers": len(adapter.layers),
        "max_lora_rank": settings["slots"],
        "images": images,
        **({"notes": notes} if notes else {}),
    }


def chat_template_of(checkpoint: Checkpoint, encoder: Encoder) -> str:
    """The family's prompt as a chat template.

    It begins with the BOS token if the model was trained with it, because vLLM adds none.
    """
    family, tokenizer = family_of(checkpoint), checkpoint.tokenizer
    if not family.user:
        raise AdapterError(f"{checkpoint.folder}: this base has a chat template of its own; vLLM reads it from the base's folder.")
    has_bos = encoder.turns([Turn("user", "a")])[0][0] == tokenizer.bos_token_id is not None
    image_token = str(tokenizer.convert_ids_to_tokens(checkpoint.config.image_token_id))
    return (tokenizer.bos_token if has_bos else "") + family.chat_template(image_token)


def _check_supported(run: Path, adapter: Adapter, checkpoint: Checkpoint, tiles: bool) -> None:
    """Raises AdapterError if vLLM cannot serve the adapter. ``tiles``: it was trained on pictures in tiles."""
    instead = f"Merge it, and serve that: `lcl-adapter merge {run} --out … --to hf`."
    if checkpoint.layout != "hf":
        raise AdapterError(
            f"{run}: vLLM reads Hugging Face's layout, {checkpoint.folder} is in the original one. Write it in Hugging Face's with "
            "`lcl-adapter convert BASE OUT`, and give that with --base: the weights are the same."
        )
    model_type, config, tower = str(checkpoint.config.model_type), adapter.config, checkpoint.config.vision_config
    if model_type not in LORA_TYPES:
        raise AdapterError(f"{run}: vLLM supports LoRA on {' and '.join(LORA_TYPES)}, this base is {model_type}. {instead}")
    if tower.image_size % tower.patch_size:
        raise AdapterError(
            f"{run}: vLLM needs an image size that is a multiple of the patch size; this tower's are {tower.image_size} and {tower.patch_size} "
            "pixels. Use `lcl-adapter serve`."
        )
    changes_projector = adapter.full_weights or config.modules_to_save or any("multi_modal_projector" in module for module in adapter.layers)
    for feature, present in (
        ("a trained projector", changes_projector),
        ("DoRA", config.use_dora),
        (f"rank {adapter.rank}, more than {RANKS[-1]}", adapter.rank > RANKS[-1]),
    ):
        if present:
            raise AdapterError(f"{run}: it has {feature}, which vLLM does not support in an adapter. {instead}")
    if model_type == NEXT and not tiles:
        raise AdapterError(
            f"{run}: trained without tiles, and vLLM always splits a LLaVA-NeXT's pictures into tiles. Use `lcl-adapter serve`, which does not."
        )


def _peft_config(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, Any]:
    """Only the fields that both vLLM and PEFT read. rsLoRA's scaling is expressed by alpha, and all layers have one rank."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": checkpoint.folder.name,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.scaling * adapter.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": sorted({module.rpartition(".")[2] for module in adapter.layers}),
        "modules_to_save": None,
    }


def _check_written(layers: Mapping[str, Mapping[str, torch.Tensor]], folder: Path) -> None:
    """Read the written files with PEFT. Raises MergeError if their tensors differ from the layers'."""
    written = Adapter(folder)
    if written.layers.keys() != layers.keys():
        raise MergeError(f"{folder}: the layers that can be read again are not those that were written. Nothing was saved.")
    for module, parts in layers.items():
        if not all(torch.equal(parts[half], written.layers[module][half]) for half in ("A", "B")):
            raise MergeError(f"{folder}: {module} in the written file differs from the adapter's. Nothing was saved.")


def _readme(run: Path, manifest: dict[str, Any], settings: dict[str, Any]) -> str:
    notes = "".join(f"\nNote: {note}.\n" for note in spent_elsewhere(manifest))
    wording, base, name = load(run / "recipe.yaml").wording, settings["base"], settings["name"]
    return (
        f"# {run.name}, for vLLM\n\nA LoRA adapter exported by lcl-adapter. Its base is `{base}` in Hugging Face's layout, "
        f"base hash `{manifest['base_hash'][:16]}`.\n\n```\n./serve.sh /path/to/{base}\n```\n\n"
        f"vLLM then serves the base as the model `base` and the adapter as the model `{name}`. "
        "Use and evaluate both from any machine:\n\n```\n"
        f"lcl-adapter ask photos/ query.png --endpoint http://127.0.0.1:8000 --model {name} --wording {wording} --pad\n"
        f"lcl-adapter eval RUN --endpoint http://127.0.0.1:8000 --model {name} --pad\n```\n\n"
        "`--pad` makes pictures square before they are sent, as in training. vLLM would crop a picture that is not square.\n"
        f"{notes}"
    )
