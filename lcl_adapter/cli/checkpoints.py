"""Checkpoints and adapters on disk: merge, convert, export, import, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lcl_adapter.cli.common import LAYOUT, PATH, base_options, emit, json_option, main, shard_option, tower_as_option

if TYPE_CHECKING:
    from lcl_adapter.base.ref import BaseRef


@main.command()
@click.argument("run_folder", metavar="RUN", type=PATH)
@click.option("--out", type=PATH, required=True, help="The folder to write; it must not exist.")
@base_options("--base", "Where the base is now, if it has moved.")
@click.option("--dtype", type=click.Choice(["base", "fp32", "bf16", "fp16"]), default="base", show_default=True, help="Type of the merged weights.")
@click.option("--to", type=LAYOUT, help="Layout to write [default: the base's own].")
@click.option(
    "--onto",
    type=click.Choice(["base", "trained"]),
    default="base",
    show_default=True,
    help="Add to the stored weights, or to what QLoRA made of them.",
)
@click.option("--add", "more", multiple=True, metavar="RUN=WEIGHT", help="A further adapter of the same base; may be given several times.")
@click.option("--weight", type=float, default=1.0, show_default=True, help="How much of RUN's adapter counts.")
@click.option(
    "--verify",
    type=click.Choice(["auto", "layers", "full"]),
    default="auto",
    show_default=True,
    help="Ask whole episodes where memory allows, never, or always.",
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
    """Merge RUN's adapter into its 16-bit base, shard by shard: a plain checkpoint, checked before it is kept.

    \b
    lcl-adapter merge runs/pocket --out merged/
    lcl-adapter merge runs/mix --out llava-merged/ --to original --dtype bf16
    lcl-adapter merge runs/a --out both/ --weight 0.5 --add runs/b=0.5
    """  # fmt: skip
    from lcl_adapter.cli import commands as run

    options = {"base": base, "dtype": dtype, "to": to, "onto": onto, "verify": verify, "tower_as": tower_as}
    emit(run.merge(run_folder, out, more=[_weighted(one) for one in more], weight=weight, shard_size=shard_size, **options), as_json)


def _weighted(text: str) -> tuple[Path, float]:
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
@click.option("--verify", type=click.Choice(["auto", "tensors"]), default="auto", help="Ask episodes if memory allows, or never.")
@json_option
def convert(base: BaseRef, out: Path, to: str | None, shard_size: int, tower_as: str | None, verify: str, as_json: bool) -> None:
    """Write the base SOURCE in the other layout into OUT, shard by shard; every tensor is verified. What was stopped goes on.

    \b
    lcl-adapter convert /models/llava-v1.5-7b llava-1.5-7b-hf
    lcl-adapter convert llava-1.5-7b-hf llava-v1.5-7b --to original
    """
    from lcl_adapter.cli import commands as run

    emit(run.convert(base, out, to=to, shard_size=shard_size, tower_as=tower_as, verify=verify), as_json)


@main.command()
@click.argument("run_folder", metavar="RUN", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="The folder to write; upstream wants `llava` and `lora` in its name.")
@click.option("--to", type=click.Choice(["original"]), help="Whose adapter it is to be [default: original, unless --for is given].")
@click.option("--for", "engine", type=click.Choice(["vllm"]), help="The engine that is to serve it.")
@click.option("--name", default="lcl", show_default=True, help="With --for: the adapter's name among its models.")
@click.option("--images", type=click.IntRange(1), default=17, show_default=True, help="With --for: images that a request may have.")
@base_options("--base", "The base in the layout that is wanted, if the run was trained on the same one in the other.")
@json_option
def export(run_folder: Path, out: Path, to: str | None, engine: str | None, name: str, images: int, base: BaseRef, as_json: bool) -> None:
    """Write RUN's adapter for upstream LLaVA's own loader, with a script that asks it there; or for vLLM, with one that serves it.

    \b
    lcl-adapter export runs/mix --to original -o llava-lora-mix
    lcl-adapter export runs/mix --for vllm -o exported
    """
    from lcl_adapter.cli import commands as run

    if engine and to:
        raise click.UsageError("--to and --for: give one of them.")
    if engine:
        emit(run.export_for_vllm(run_folder, out, base, name=name, images=images), as_json)
    else:
        emit(run.export(run_folder, out, base), as_json)


@main.command("import")
@click.argument("adapter", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="The run's folder to write.")
@base_options("--base", "The base it was trained on, in either layout [default: what its adapter_config.json names].")
@json_option
def import_(adapter: Path, out: Path, base: BaseRef, as_json: bool) -> None:
    """Take over an ADAPTER that was trained upstream, or by plain PEFT, as a run: eval, ask and merge take it.

    One that was trained on a bare Vicuna brings its projector: with the Vicuna as --base, a LLaVA is put together in OUT/base.

    \b
    lcl-adapter import llava-v1.5-7b-lora -o runs/theirs --base /models/vicuna-7b-v1.5
    """
    from lcl_adapter.cli import commands as run

    emit(run.import_adapter(adapter, out, base), as_json)


@main.command()
@base_options("PATH")
@json_option
def inspect(base: BaseRef, as_json: bool) -> None:
    """Say what PATH is: a base, an adapter or a run; its layout, family, prompt, parameters, types, hash.

    \b
    lcl-adapter inspect /models/llava-v1.5-7b
    """
    from lcl_adapter.cli import commands as run

    found = run.inspect(base)
    if as_json:
        emit(found, True)
    else:
        for line in run.facts(found):  # the answer itself, so on standard output
            click.echo(line)
