"""An adapter for vLLM: PEFT's files with the names and fields that its loader takes, the prompt as a template, and a script with the flags.

Written by what vLLM 0.33 reads: vllm/lora/peft_helper.py (fields), vllm/lora/utils.py (names), vllm/config/lora.py (ranks), and which of
vllm/model_executor/models/llava*.py say SupportsLoRA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lcl_adapter.base.adapter import checkpoint_of, read_manifest
from lcl_adapter.base.encoder import Encoder
from lcl_adapter.base.layouts import Checkpoint
from lcl_adapter.base.layouts.configs import UPSTREAM_TYPES
from lcl_adapter.base.model import family_of, load_encoder
from lcl_adapter.base.ref import NOT_GIVEN, BaseRef
from lcl_adapter.checkpoints.deltas import Adapter, check_fits
from lcl_adapter.checkpoints.exchange import names
from lcl_adapter.data.conversations import Turn
from lcl_adapter.errors import AdapterError, MergeError, RunError
from lcl_adapter.files import whole_folder, write_json, write_text
from lcl_adapter.recipe import load

WITH_LORA = UPSTREAM_TYPES  # vLLM's classes that say SupportsLoRA are of the same types
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
IMAGES = 17  # a request: two classes of 8 photos, and the one that is asked about
SCRIPT = """#!/bin/sh
# vLLM with this adapter: serve.sh /path/to/{base} [/path/to/this/folder]; more flags go behind.
#   max-lora-rank        the smallest that vLLM has for rank {rank}
#   limit-mm-per-prompt  images a request: {images}
#   prefix caching       a support set is read once, as long as requests begin with it
#   max-model-len        the base's context
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
    """Write ``out``; what was written is read again and compared. ``name``: the adapter's among vLLM's models; ``images``: a request.

    Raises AdapterError for what vLLM does not take, with what to do; RunError where ``out`` exists.
    """
    manifest = read_manifest(run)
    checkpoint = checkpoint_of(run, manifest, base)
    if out.exists():
        raise RunError(f"{out}: exists already; nothing is overwritten. Give another -o.")
    adapter = Adapter(run)
    _refuse_what_vllm_lacks(run, adapter, checkpoint, bool(manifest["tiles"]))
    check_fits([adapter], {key: w.shape for key, w in checkpoint.weights.items()})
    encoder = load_encoder(checkpoint.ref)
    state = {
        f"{names.PREFIX}{module}.lora_{half}.weight": parts[half].contiguous() for module, parts in adapter.layers.items() for half in ("A", "B")
    }
    config = _config(adapter, checkpoint)
    told = {
        "base": checkpoint.folder.name,
        "rank": config["r"],
        "slots": next(rank for rank in RANKS if rank >= config["r"]),
        "images": images,
        "name": name,
        "context": encoder.context,
    }
    with whole_folder(out) as partial:
        write_json(partial / "adapter_config.json", config)
        save_file(state, partial / "adapter_model.safetensors")
        write_text(partial / "chat_template.jinja", template_of(checkpoint, encoder))
        write_text(partial / "serve.sh", SCRIPT.format(**told))
        (partial / "serve.sh").chmod(0o755)
        write_text(partial / "README.md", _card(run, manifest, told))
        _compare(adapter, partial)
    return {"out": str(out), "layers": len(adapter.layers), "max_lora_rank": told["slots"], "images": images}


def template_of(checkpoint: Checkpoint, encoder: Encoder) -> str:
    """The family's prompt. vLLM adds no beginning mark to a chat, so the template has it where the model was trained with one."""
    family, tokenizer = family_of(checkpoint), checkpoint.tokenizer
    if not family.user:
        raise AdapterError(f"{checkpoint.folder}: brings its own chat template; vLLM reads it from there.")
    begins = encoder.turns([Turn("user", "a")])[0][0] == tokenizer.bos_token_id is not None
    image = str(tokenizer.convert_ids_to_tokens(checkpoint.config.image_token_id))
    return (tokenizer.bos_token if begins else "") + family.chat_template(image)


def _refuse_what_vllm_lacks(run: Path, adapter: Adapter, checkpoint: Checkpoint, tiles: bool) -> None:
    instead = f"Merge it, and serve that: `lcl-adapter merge {run} --out … --to hf`."
    if checkpoint.layout != "hf":
        raise AdapterError(
            f"{run}: vLLM reads Hugging Face's layout, {checkpoint.folder} is in the original one. Write that with `lcl-adapter convert`, and "
            "give it with --base: the weights are the same."
        )
    kind, config, tower = str(checkpoint.config.model_type), adapter.config, checkpoint.config.vision_config
    if kind not in WITH_LORA:
        raise AdapterError(f"{run}: vLLM takes LoRA on {' and '.join(WITH_LORA)}, this base is {kind}. {instead}")
    if tower.image_size % tower.patch_size:
        raise AdapterError(
            f"{run}: its tower's {tower.image_size} pixels are no multiple of its patches' {tower.patch_size}; vLLM reads no such tower."
        )
    for what, there in (
        ("a trained projector", adapter.whole or config.modules_to_save or any("multi_modal_projector" in module for module in adapter.layers)),
        ("DoRA", config.use_dora),
        ("ranks that differ from layer to layer", config.rank_pattern or config.alpha_pattern),
        (f"rank {config.r}, more than {RANKS[-1]}", config.r > RANKS[-1]),
    ):
        if there:
            raise AdapterError(f"{run}: it has {what}, which vLLM does not take in an adapter. {instead}")
    if kind == "llava_next" and not tiles:
        raise AdapterError(f"{run}: was trained without tiles, and vLLM shows a LLaVA-NeXT every picture in tiles; `lcl-adapter serve` does not.")


def _config(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, Any]:
    """Only what vLLM and PEFT both read; rsLoRA's scaling is put into alpha."""
    config = adapter.config
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": checkpoint.folder.name,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": adapter.scaling * config.r,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": sorted({module.rpartition(".")[2] for module in adapter.layers}),
        "modules_to_save": None,
    }


def _compare(adapter: Adapter, folder: Path) -> None:
    """What PEFT reads back is the adapter's own."""
    back = Adapter(folder)
    if back.layers.keys() != adapter.layers.keys():
        raise MergeError(f"{folder}: other layers can be read again than were written. Not kept.")
    for module, parts in adapter.layers.items():
        if not all(torch.equal(parts[half], back.layers[module][half]) for half in ("A", "B")):
            raise MergeError(f"{folder}: {module} read again differs from the adapter's. Not kept.")


def _card(run: Path, manifest: dict[str, Any], told: dict[str, Any]) -> str:
    wording = load(run / "recipe.yaml").wording
    return (
        f"# {run.name}, for vLLM\n\nA LoRA adapter exported by lcl-adapter; its base is `{told['base']}` in Hugging Face's layout, "
        f"base hash `{manifest['base_hash'][:16]}`.\n\n```\n./serve.sh /path/to/{told['base']}\n```\n\n"
        f"The base is the model `base`, the adapter `{told['name']}`. "
        "Ask and measure both from any machine:\n\n```\n"
        f"lcl-adapter ask photos/ query.png --endpoint http://127.0.0.1:8000 --model {told['name']} --wording {wording} --pad\n"
        f"lcl-adapter eval RUN --endpoint http://127.0.0.1:8000 --model {told['name']} --pad\n```\n\n"
        "`--pad` makes pictures square before they are sent, as training does: vLLM crops a picture that is not.\n"
    )
