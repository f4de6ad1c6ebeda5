"""The commands about checkpoints and adapters on disk: merge, convert, export, import, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lcl_adapter.cli.common import ADAPTER, LAYOUT, PATH, base_options, emit, json_option, main, shard_option, tower_as_option

if TYPE_CHECKING:
    from lcl_adapter.base.ref import BaseRef


@main.command()
@click.argument("run_folder", metavar="RUN", type=ADAPTER)
@click.option("--out", type=PATH, required=True, help="The folder to write; it must not exist.")
@base_options("--base", "Where the base is now, if it has moved.")
@click.option(
    "--dtype", type=click.Choice(["base", "fp32", "bf16", "fp16"]), default="base", show_default=True, help="Data type of the merged weights."
)
@click.option("--to", type=LAYOUT, help="Layout to write [default: that of the base].")
@click.option(
    "--onto",
    type=click.Choice(["base", "trained"]),
    default="base",
    show_default=True,
    help="Add the adapter to the stored weights, or to the quantised weights that QLoRA trained on.",
)
@click.option("--add", "more", multiple=True, metavar="RUN=WEIGHT", help="A further adapter of the same base. May be given several times.")
@click.option("--weight", type=float, default=1.0, show_default=True, help="Weight of RUN's adapter.")
@click.option(
    "--verify",
    type=click.Choice(["auto", "layers", "full"]),
    default="auto",
    show_default=True,
    help="Compare answers to whole episodes: if memory allows, never, or always. Every changed weight is always compared.",
)
@shard_option
@tower_as_option
@json_option
def merge(
    run_folder: Path,
    out: Path,
    base: BaseRef,
    dtype: str,
    to: str | None,
    onto: str,
    more: tuple[str, ...],
    weight: float,
    verify: str,
    shard_size: int,
    tower_as: str | None,
    as_json: bool,
) -> None:
    """Merge RUN's adapter into its 16-bit base, shard by shard. The result is a plain checkpoint, and is checked before
    it is saved.

    \b
    lcl-adapter merge runs/pocket --out merged/
    lcl-adapter merge runs/mix --out llava-merged/ --to original --dtype bf16
    lcl-adapter merge runs/a --out both/ --to hf --weight 0.5 --add runs/b=0.5
    """  # fmt: skip
    from lcl_adapter.cli import commands

    options = {"base": base, "dtype": dtype, "to": to, "onto": onto, "verify": verify, "tower_as": tower_as}
    further = [_parse_weighted_run(text) for text in more]
    emit(commands.merge(run_folder, out, more=further, weight=weight, shard_size=shard_size, **options), as_json)


def _parse_weighted_run(text: str) -> tuple[Path, float]:
    """``RUN=WEIGHT``, or ``RUN`` with weight 1. Raises BadParameter."""
    folder, _, part = text.rpartition("=")
    try:
        return Path(folder or text), float(part) if folder else 1.0
    except ValueError:
        raise click.BadParameter(f"{text!r}: RUN=WEIGHT is expected, for instance runs/b=0.5", param_hint="--add") from None


@main.command()
@base_options("SOURCE")
@click.argument("out", type=PATH)
@click.option("--to", type=LAYOUT, help="Layout to write [default: the other one].")
@shard_option
@tower_as_option
@click.option(
    "--verify",
    type=click.Choice(["auto", "tensors"]),
    default="auto",
    help="Compare answers to episodes: if memory allows, or never. Tensors are always compared.",
)
@json_option
def convert(base: BaseRef, out: Path, to: str | None, shard_size: int, tower_as: str | None, verify: str, as_json: bool) -> None:
    """Write the base SOURCE in the other layout into OUT. Works shard by shard, and verifies every tensor. A stopped
    conversion continues.

    \b
    lcl-adapter convert /models/llava-v1.5-7b llava-1.5-7b-hf
    lcl-adapter convert llava-1.5-7b-hf llava-v1.5-7b --to original
    """
    from lcl_adapter.cli import commands

    emit(commands.convert(base, out, to=to, shard_size=shard_size, tower_as=tower_as, verify=verify), as_json)


@main.command()
@click.argument("run_folder", metavar="RUN", type=ADAPTER)
@click.option("-o", "--out", type=PATH, required=True, help="The folder to write. Upstream LLaVA needs `llava` and `lora` in its name.")
@click.option("--to", type=click.Choice(["original"]), help="Format of the adapter: upstream LLaVA's [default: original, unless --for is given].")
@click.option("--for", "engine", type=click.Choice(["vllm", "llama-cpp"]), help="Write it for this engine instead. llama-cpp: for Ollama too.")
@click.option("--name", default="lcl", show_default=True, help="With --for: its name among the engine's models.")
@click.option("--images", type=click.IntRange(1), default=17, show_default=True, help="With --for vllm: the most images in a request.")
@click.option("--llama-cpp", type=PATH, help="With --for llama-cpp: a checkout of llama.cpp, whose converter then writes the language model.")
@click.option(
    "--class-token",
    type=click.Choice(["first", "last"]),
    default="last",  # until a llama.cpp without the defect is published
    show_default=True,
    help="With --for llama-cpp: last for a llama.cpp or Ollama with its defect 25814, as all published ones are; first for one without.",
)
@base_options("--base", "The base in the layout to export for, if the run was trained on the same base in the other layout.")
@json_option
def export(
    run_folder: Path,
    out: Path,
    to: str | None,
    engine: str | None,
    name: str,
    images: int,
    llama_cpp: Path | None,
    class_token: str,
    base: BaseRef,
    as_json: bool,
) -> None:
    """Write RUN's adapter for upstream LLaVA or for vLLM, or RUN merged into its base for llama.cpp and Ollama. What
    serves it is written beside it. For llama.cpp, RUN may also be a merged checkpoint.

    \b
    lcl-adapter export runs/mix --to original -o llava-lora-mix
    lcl-adapter export runs/mix --for vllm -o exported
    lcl-adapter export runs/mix --for llama-cpp -o gguf
    """  # fmt: skip
    from lcl_adapter.cli import commands

    if engine and to:
        raise click.UsageError("--to and --for cannot be used together: give one of them.")
    if llama_cpp is not None and engine != "llama-cpp":
        raise click.UsageError("--llama-cpp belongs to --for llama-cpp.")
    if engine == "llama-cpp":
        emit(commands.export_for_llama_cpp(run_folder, out, base, name=name, llama_cpp=llama_cpp, class_token=class_token), as_json)
    elif engine:
        emit(commands.export_for_vllm(run_folder, out, base, name=name, images=images), as_json)
    else:
        emit(commands.export(run_folder, out, base), as_json)


@main.command("import")
@click.argument("adapter", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="The folder of the run to write.")
@base_options("--base", "The base it was trained on, in either layout [default: the one that its adapter_config.json names].")
@json_option
def import_(adapter: Path, out: Path, base: BaseRef, as_json: bool) -> None:
    """Import an ADAPTER of upstream LLaVA or plain PEFT as a run. eval, ask and merge accept the run.

    An adapter of a bare Vicuna brings its own projector. With the Vicuna as --base, a LLaVA is assembled in OUT/base.

    \b
    lcl-adapter import llava-v1.5-7b-lora -o runs/theirs --base /models/vicuna-7b-v1.5
    """
    from lcl_adapter.cli import commands

    emit(commands.import_adapter(adapter, out, base), as_json)


@main.command()
@base_options("PATH")
@json_option
def inspect(base: BaseRef, as_json: bool) -> None:
    """Describe PATH, a base, an adapter or a run. Prints its layout, family, prompt, parameters, data types and hash.

    \b
    lcl-adapter inspect /models/llava-v1.5-7b
    """
    from lcl_adapter.base.describe import describe
    from lcl_adapter.report import fact_lines

    facts = describe(base)
    if as_json:
        emit(facts, True)
    else:
        for line in fact_lines(facts):  # the result itself, so on standard output
            click.echo(line)
