"""Make a run of `recipes/photo.yaml` the shipped adapter `photo-lcl`: lcl_adapter/photo/adapter.

    python -m tools.photo.ship runs/photo

The weights are written in fp16, the paths of the machine are taken out of the recipe, and the report of its evaluation goes with it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from lcl_adapter.answering.judgement import STATISTICS
from lcl_adapter.base.adapter import FILES, MANIFEST, read_manifest
from lcl_adapter.files import sha256_of, write_json, write_text
from lcl_adapter.packaged import ADAPTERS

NAME = "photo-lcl"


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("run", type=Path)
    run, folder = made.parse_args().run, ADAPTERS[NAME]
    manifest = read_manifest(run)
    folder.mkdir(exist_ok=True)
    config = json.loads((run / FILES[0]).read_text(encoding="utf-8"))
    write_json(folder / FILES[0], {**config, "base_model_name_or_path": "photo"})
    weights = load_file(run / FILES[1])
    save_file({name: value.to(torch.float16).contiguous() for name, value in weights.items()}, folder / FILES[1], metadata={"format": "pt"})
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    recipe |= {"output": "runs/photo", "data": {**recipe.get("data", {}), "root": "."}}
    head = "# The recipe that trained this adapter, resolved.\n"
    write_text(folder / "recipe.yaml", head + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    files = {name: sha256_of(folder / name) for name in FILES}
    # `auto` chooses the precision of the machine that it is used on.
    write_json(folder / MANIFEST, {**manifest, "base": "photo", "precision": "auto", "compute_dtype": "float32", "files": files})
    for name in ("report.json", STATISTICS):
        if (run / name).exists():
            shutil.copyfile(run / name, folder / name)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
