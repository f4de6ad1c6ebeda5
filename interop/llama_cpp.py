"""Compare this project's answers with those of a llama.cpp that serves an exported model.

    python -m interop.llama_cpp prepare DIR                      # write DIR/llava-base, DIR/run, DIR/llava-merged, DIR/gguf
    python -m interop.llama_cpp compare DIR --endpoint URL       # compare texts with those of a running llama-server
    python -m interop.llama_cpp logits DIR                       # compare ids, embeddings and logits, through llama-cpp-python
    python -m interop.llama_cpp converter DIR --llama-cpp PATH   # compare the language model with llama.cpp's own converter's

The base is a tiny random LLaVA-1.5 with a random adapter, projector included. `prepare` prints the command that serves
it; `compare` exits with 1 if a text differs. A llama.cpp with defect 25814 gives other texts.
"""

from __future__ import annotations

from pathlib import Path

import click
import gguf
import torch

from lcl_adapter.answering.client import Endpoint, RemotePredictor
from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.adapter import load_adapter
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.checkpoints.exchange import export_for_llama_cpp
from lcl_adapter.checkpoints.merge import merge
from lcl_adapter.checkpoints.probe import probe, probe_turns
from lcl_adapter.data.conversations import Turn
from lcl_adapter.evaluate import build_cells
from lcl_adapter.recipe import Recipe
from tests.test_evaluate import SUITES
from tests.test_llama_cpp import LlamaCpp, pixels_of
from tests.test_merge import adapter_on
from tests.tiny import save_original

NEW_TOKENS = 16
FOLDER = click.Path(path_type=Path)


@click.group()
def main() -> None:
    """Compare answers and files with llama.cpp's."""


@main.command()
@click.argument("folder", type=FOLDER)
def prepare(folder: Path) -> None:
    """Write a base, a run and its export into FOLDER."""
    base = save_original(folder / "llava-base", tower_inside=48, tower_layers=3)
    adapter_on(base, folder / "run", projector=True)
    merge(folder / "run", folder / "llava-merged", dtype="fp32")  # in fp16, rounding decides some of a random model's texts
    export_for_llama_cpp(folder / "llava-merged", folder / "gguf", class_token="first")
    exact = "-ctk f32 -ctv f32 -fa off"  # its cache in fp16 rounds too
    click.echo(f"llama-server -m {folder}/gguf/model.gguf --mmproj {folder}/gguf/mmproj.gguf --alias lcl -c 4096 -np 4 {exact} --temp 0 --port 8080")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--endpoint", required=True)
def compare(folder: Path, endpoint: str) -> None:
    """Ask the run the same questions in this process and at the endpoint."""
    base, _ = load_adapter(folder / "run", BaseRef(str(folder / "llava-base"), precision="fp32", device="cpu"))
    recipe = {"base": str(folder / "llava-base"), "output": str(folder), "sources": {"lcl": {"type": "pocket"}}, "evaluate": {"suites": SUITES}}
    predictor, differ = Predictor(base, max_new_tokens=NEW_TOKENS), 0
    with Endpoint(endpoint) as server:
        for cell in build_cells(Recipe.model_validate(recipe), limit=12):
            requests = [(case.support, case.query, case.answers) for case in cell.cases]
            ours = predictor.run(requests)
            served = RemotePredictor(server, "lcl", pad=True).run(requests, new_tokens=NEW_TOKENS)
            same = sum(a.text == b.text for a, b in zip(ours, served, strict=True))
            click.echo(f"{cell.name:<16} of {len(requests)}: {same} texts the same")
            differ += len(requests) - same
    raise SystemExit(1 if differ else 0)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
def logits(folder: Path) -> None:
    """Print the largest differences from llama-cpp-python, for the files of both kinds of llama.cpp."""
    base = load_base(BaseRef(str(folder / "llava-merged"), "fp32", "cpu"))
    if not (folder / "last").exists():
        export_for_llama_cpp(folder / "llava-merged", folder / "last", class_token="last")
    encoder, vision, probes = base.encoder(), VisionFeatures(base), probe_turns("lcl")
    expected = probe(base, probes).logits
    text = [Turn("user", "What is this?"), Turn("assistant", "good"), Turn("user", "And this?")]
    conversations = [text, *([*support, query] for support, query in probes)]
    with torch.no_grad():
        plain = base.model(input_ids=torch.tensor([encoder.turns(text, opened=True)[0]])).logits[0, -1]
    for name, place in (("first", "gguf"), ("last", "last")):
        model, ids_equal, gaps = LlamaCpp(folder / "gguf", folder / place / "mmproj.gguf"), 0, [0.0] * 4
        for turns, wanted in zip(conversations, [plain, *expected], strict=True):
            pictures = [turn.picture for turn in turns if turn.picture is not None]
            pixels = [pixels_of(base, picture) for picture in pictures]
            ids, embeddings, theirs = model.run(base.family.render(turns, opened=True).text, pixels, encoder.image_token_id)
            ids_equal += ids == encoder.turns(turns, opened=True)[0]
            gap = float((theirs - wanted[: len(theirs)]).abs().max())
            gaps = [max(gaps[0], 0 if pictures else gap), max(gaps[1], gap if pictures else 0), *gaps[2:]]
            if pictures:
                ours = vision.projected_features(pictures)["image"].pooler_output
                for a, b in zip(embeddings, ours, strict=True):  # type: ignore[arg-type]
                    gaps[2:] = [max(gaps[2], float((a - b).abs().max())), max(gaps[3], float((a[:-1] - b[1:]).abs().max()))]
        model.close()
        click.echo(
            f"--class-token {name}: ids equal in {ids_equal} of {len(conversations)} prompts; largest differences: logits of a text {gaps[0]:.2g}, "
            f"of episodes {gaps[1]:.2g}, of {float(expected.abs().max()):.2g}; embeddings {gaps[2]:.2g}, without the first patch {gaps[3]:.2g}"
        )


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--llama-cpp", type=click.Path(path_type=Path, exists=True), required=True)
def converter(folder: Path, llama_cpp: Path) -> None:
    """Export with llama.cpp's converter too, and compare all fields and tensors of the language model."""
    export_for_llama_cpp(folder / "llava-merged", folder / "converted", llama_cpp=llama_cpp)
    ours, theirs = (gguf.GGUFReader(folder / name / "model.gguf") for name in ("gguf", "converted"))
    fields = [{key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")} for reader in (ours, theirs)]
    for key in sorted(fields[0].keys() | fields[1].keys()):
        if fields[0].get(key) != fields[1].get(key):
            click.echo(f"{key}: {fields[0].get(key)!r} here, {fields[1].get(key)!r} there")
    tensors = [{tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in reader.tensors} for reader in (ours, theirs)]
    same = tensors[0] == tensors[1]
    click.echo(f"{len(tensors[0])} tensors, {'all bytes the same' if same else 'NOT the same'}")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
