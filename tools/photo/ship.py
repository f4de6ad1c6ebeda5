"""Make a run of `recipes/photo.yaml` the shipped adapter `photo-lcl`: lcl_adapter/photo/adapter.

    python -m tools.photo.ship runs/photo --energy 0.95 --out runs/photo-small     # smaller: measure it as it will be
    lcl-adapter eval runs/photo-small --fresh --limit 128
    python -m tools.photo.ship runs/photo-small

The weights are written in fp16, the paths of the machine are taken out of the recipe, and the report of its evaluation goes with it. With
``--energy``, each layer's change has the lowest rank that keeps this share of it (PEFT's ``convert_to_lora``); there is no report then.
"""

from __future__ import annotations

import argparse
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from peft import convert_to_lora
from safetensors.torch import load_file, save_file

from lcl_adapter.answering.judgement import STATISTICS
from lcl_adapter.base.adapter import FILES, MANIFEST, load_adapter, read_manifest
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.files import sha256_of, write_json, write_text
from lcl_adapter.packaged import ADAPTERS

NAME = "photo-lcl"


def main(arguments: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("run", type=Path)
    made.add_argument("--energy", type=float, help="of each layer's change, the share of its squares to keep, for instance 0.95")
    made.add_argument("--out", type=Path, help="a folder that is measured before it ships [default: what ships]")
    options = made.parse_args(arguments)
    if options.energy is not None and options.out is None:
        made.error("--energy needs --out: a smaller adapter is measured before it ships")
    run, folder = options.run, options.out or ADAPTERS[NAME]
    manifest = read_manifest(run)
    folder.mkdir(exist_ok=True)
    config = json.loads((run / FILES[0]).read_text(encoding="utf-8"))
    weights = load_file(run / FILES[1])
    if options.energy is not None:
        ranks, weights = smaller(run, options.energy)
        config |= ranks
    write_json(folder / FILES[0], {**config, "base_model_name_or_path": "photo"})
    save_file({name: value.to(torch.float16).contiguous() for name, value in weights.items()}, folder / FILES[1], metadata={"format": "pt"})
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    recipe |= {"output": "runs/photo", "data": {**recipe.get("data", {}), "root": "."}}
    head = "# The recipe that trained this adapter, resolved.\n"
    write_text(folder / "recipe.yaml", head + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    files = {name: sha256_of(folder / name) for name in FILES}
    if options.energy is not None:
        manifest.pop("judgement", None)  # of other weights
    # `auto` chooses the precision of the machine that it is used on.
    write_json(folder / MANIFEST, {**manifest, "base": "photo", "precision": "auto", "compute_dtype": "float32", "files": files})
    for name in ("report.json", STATISTICS):
        if options.energy is None and (run / name).exists():
            shutil.copyfile(run / name, folder / name)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB")


def smaller(run: Path, energy: float) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """The ranks and the weights of an adapter of which each layer keeps this share of its change's squared singular values."""
    base, _ = load_adapter(run, BaseRef(precision="fp32", device="cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a LoRA already
        made, weights = convert_to_lora(base.model, energy)
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")  # the targets stay the recipe's
    return {name: getattr(made, name) for name in names}, weights


if __name__ == "__main__":
    main()
