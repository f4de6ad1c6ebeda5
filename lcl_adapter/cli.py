"""The command line: each command calls one function of the package. Heavy imports happen inside, so --help is instant."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from lcl_adapter.errors import LclError, MergeError, UserError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
PATH = click.Path(path_type=Path)


class Commands(click.Group):
    """Turns this package's errors into a message and an exit code: 2 for what the caller can mend, 130 for Ctrl-C."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.secho(f"error: {error}", fg="red", err=True)
            ctx.exit(2)
        except (MergeError, LclError) as error:
            click.secho(f"error: {error}", fg="red", err=True)
            ctx.exit(1)
        except (KeyboardInterrupt, click.Abort):
            click.secho("stopped; nothing was left half-written. A training run goes on with resume=true.", fg="yellow", err=True)
            ctx.exit(130)


def emit(result: Any, as_json: bool) -> None:
    """With --json, one object on standard output."""
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output, all else on standard error.")


class Memory(click.ParamType[int]):
    """``16GB``, ``16 GiB``, or 16, which is gigabytes; in bytes."""

    name = "memory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from lcl_adapter.memory import memory_bytes

        try:
            return value if isinstance(value, int) else memory_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


PRECISION = click.Choice(["auto", "fp32", "bf16", "fp16", "int8", "nf4"])
LAYOUT = click.Choice(["hf", "original"])
tower_option = click.option("--vision-tower", "tower", help="Where the vision tower is, if not where an original config says.")
shard_option = click.option("--shard-size", type=Memory(), default="5GB", show_default=True, help="Largest file of weights.")
tower_as_option = click.option(
    "--tower-as", help="What an original config made here names as its vision tower [default: a folder written beside the weights]."
)


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="lcl-adapter")
def main() -> None:
    """Teach the LLaVA you already run new visual concepts from a few photos.

    \b
    lcl-adapter train recipes/pocket.yaml                 train an adapter on the shipped base
    lcl-adapter eval runs/pocket                          base against adapter on held-out classes
    lcl-adapter ask photos/ query.png --adapter runs/pocket
    """
    _quiet()


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--force", is_flag=True, help="Begin although the forecast says that memory will not do.")
@json_option
def train(recipe: str, overrides: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Train RECIPE's adapter, then measure it against its base. OVERRIDES are key=value.

    \b
    lcl-adapter train recipes/pocket.yaml train.max_steps=100 output=runs/short
    lcl-adapter train recipes/pocket.yaml resume=true      # go on after a stop

    Exits with 3 where a suite under `evaluate.keep` fell further below the base than it may.
    """
    from lcl_adapter import run

    found = run.train(recipe, overrides, force)
    emit(found, as_json)
    if not found["kept"]:
        click.get_current_context().exit(3)


@main.command("eval")
@click.argument("run_folder", metavar="RUN", type=PATH)
@click.argument("overrides", nargs=-1)
@click.option("--suite", "suites", multiple=True, help="Only this suite: the recipe's, or one that ships by name. May be given several times.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N queries of each line.")
@click.option("--seed", type=click.IntRange(0), help="Draw other episodes than the recipe's.")
@click.option("--base", "base_name", help="Where the base is now, if it has moved.")
@click.option("--fresh", is_flag=True, help="Measure again what was measured before.")
@json_option
def evaluate(
    run_folder: Path,
    overrides: tuple[str, ...],
    suites: tuple[str, ...],
    limit: int | None,
    seed: int | None,
    base_name: str | None,
    fresh: bool,
    as_json: bool,
) -> None:
    """Base against adapter on RUN's suites: the same questions, in one run. OVERRIDES are key=value.

    \b
    lcl-adapter eval runs/pocket --suite 2way --limit 200
    lcl-adapter eval runs/mix --suite isekai-10 --suite mvtec data.root=/data
    """
    from lcl_adapter import run

    emit(run.evaluate(run_folder, suites=suites, limit=limit, seed=seed, base_name=base_name, fresh=fresh, overrides=overrides), as_json)


@main.command()
@click.argument("support", type=PATH)
@click.argument("queries", nargs=-1, required=True, type=PATH)
@click.option("--adapter", type=PATH, help="A run's folder; leave out to ask the base alone.")
@click.option("--base", "base_name", help="The base to ask (default: the adapter's own, or pocket).")
@click.option("--shots", type=click.IntRange(1), help="At most this many photos of each class.")
@click.option("--question", help="Ask this about the query instead of the recipe's question.")
@tower_option
@click.option("--precision", type=PRECISION, help="Of the base [default: the adapter's own, or auto].")
@json_option
def ask(
    support: Path, queries: tuple[Path, ...], adapter: Path | None, base_name: str | None, shots: int | None, question: str | None,
    tower: str | None, precision: Any, as_json: bool,
) -> None:  # fmt: skip
    """Judge QUERIES by labelled photos: SUPPORT holds a folder of photos a class.

    \b
    lcl-adapter ask photos/ query.png --adapter runs/pocket
    """
    from lcl_adapter import run

    emit(run.ask(support, queries, adapter, base_name, shots, question, tower, precision), as_json)


@main.command()
@click.argument("run_folder", metavar="RUN", type=PATH)
@click.option("--out", type=PATH, required=True, help="The folder to write; it must not exist.")
@click.option("--base", "base_name", help="Where the base is now, if it has moved.")
@tower_option
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
    base_name: str | None,
    tower: str | None,
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
    from lcl_adapter import run

    options = {"base_name": base_name, "tower": tower, "dtype": dtype, "to": to, "onto": onto, "verify": verify, "tower_as": tower_as}
    emit(run.merge(run_folder, out, more=[_weighted(one) for one in more], weight=weight, shard_size=shard_size, **options), as_json)


def _weighted(text: str) -> tuple[Path, float]:
    folder, _, part = text.rpartition("=")
    try:
        return Path(folder or text), float(part) if folder else 1.0
    except ValueError:
        raise click.BadParameter(f"{text!r}: RUN=WEIGHT is expected, for instance runs/b=0.5", param_hint="--add") from None


@main.command()
@click.argument("source")
@click.argument("out", type=PATH)
@click.option("--to", type=LAYOUT, help="Layout to write [default: the other one].")
@tower_option
@shard_option
@tower_as_option
@click.option("--verify", type=click.Choice(["auto", "tensors"]), default="auto", help="Ask episodes if memory allows, or never.")
@json_option
def convert(source: str, out: Path, to: str | None, tower: str | None, shard_size: int, tower_as: str | None, verify: str, as_json: bool) -> None:
    """Write the base SOURCE in the other layout into OUT, shard by shard; every tensor is verified. What was stopped goes on.

    \b
    lcl-adapter convert /models/llava-v1.5-7b llava-1.5-7b-hf
    lcl-adapter convert llava-1.5-7b-hf llava-v1.5-7b --to original
    """
    from lcl_adapter import run

    emit(run.convert(source, out, to=to, tower=tower, shard_size=shard_size, tower_as=tower_as, verify=verify), as_json)


@main.command()
@click.argument("run_folder", metavar="RUN", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="The folder to write; upstream wants `llava` and `lora` in its name.")
@click.option("--to", type=click.Choice(["original"]), default="original", expose_value=False, help="Whose adapter it is to be.")
@click.option("--base", "base_name", help="The base in the original layout, if the run was trained on the same one in Hugging Face's.")
@tower_option
@json_option
def export(run_folder: Path, out: Path, base_name: str | None, tower: str | None, as_json: bool) -> None:
    """Write RUN's adapter for upstream LLaVA's own loader, with a script that asks it there.

    \b
    lcl-adapter export runs/mix --to original -o llava-lora-mix
    """
    from lcl_adapter import run

    emit(run.export(run_folder, out, base_name, tower), as_json)


@main.command("import")
@click.argument("adapter", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="The run's folder to write.")
@click.option("--base", "base_name", help="The base it was trained on, in either layout [default: what its adapter_config.json names].")
@tower_option
@json_option
def import_(adapter: Path, out: Path, base_name: str | None, tower: str | None, as_json: bool) -> None:
    """Take over an ADAPTER that was trained upstream, or by plain PEFT, as a run: eval, ask and merge take it.

    One that was trained on a bare Vicuna brings its projector: with the Vicuna as --base, a LLaVA is put together in OUT/base.

    \b
    lcl-adapter import llava-v1.5-7b-lora -o runs/theirs --base /models/vicuna-7b-v1.5
    """
    from lcl_adapter import run

    emit(run.adopt(adapter, out, base_name, tower), as_json)


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--memory", type=Memory(), help="What there is, for instance 16GB [default: what is free on this machine's device].")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Where it will run [default: cuda where --memory is given or there is one, else cpu]."
)
@click.option("--probe", is_flag=True, help="Load the base after all and time three steps.")
@json_option
def plan(recipe: str, overrides: tuple[str, ...], memory: int | None, device: str | None, probe: bool, as_json: bool) -> None:
    """Forecast RECIPE's memory before any weight is loaded, and say what to change where it is too much. Exits with 1 where it does not fit.

    \b
    lcl-adapter plan recipes/mix.yaml base=/models/llava-v1.5-7b data.root=/data --memory 16GB
    """
    from lcl_adapter import run

    found = run.plan(recipe, overrides, memory, device or ("cuda" if memory and not probe else None), probe)
    emit(found, as_json)
    if not found["fits"]:
        click.get_current_context().exit(1)


@main.command()
@click.argument("path")
@tower_option
@json_option
def inspect(path: str, tower: str | None, as_json: bool) -> None:
    """Say what PATH is: a base, an adapter or a run; its layout, family, prompt, parameters, types, hash.

    \b
    lcl-adapter inspect /models/llava-v1.5-7b
    """
    from lcl_adapter import run

    found = run.inspect(path, tower)
    if as_json:
        emit(found, True)
    else:
        for line in run.facts(found):  # the answer itself, so on standard output
            click.echo(line)


@main.group()
def data() -> None:
    """Look at the data before training on it."""


@data.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--episodes", default=8, show_default=True, type=click.IntRange(1, 200), help="How many of each source.")
@click.option("--out", type=PATH, default=Path("preview.html"), show_default=True, help="The page to write.")
@click.option("--png", is_flag=True, help="Write a picture beside the page too.")
@click.option("--source", "sources", multiple=True, help="Only this source; may be given several times.")
@click.option("--policy", "policies", multiple=True, help="Only sources of this policy; may be given several times.")
@json_option
def preview(
    recipe: str, overrides: tuple[str, ...], episodes: int, out: Path, png: bool, sources: tuple[str, ...], policies: tuple[str, ...], as_json: bool
) -> None:
    """Episodes as pictures, the learned tokens in colour; the page filters by source and policy.

    \b
    lcl-adapter data preview recipes/mix-pocket.yaml --png
    lcl-adapter data preview recipes/mix-pocket.yaml --policy inspection
    """
    from lcl_adapter import run

    emit(run.preview(recipe, overrides, episodes, out, png, sources, policies), as_json)


@data.command("check")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@json_option
def check_data(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Open every file that RECIPE names; tell every fault with its file and line. Exits with 1 where there are faults.

    \b
    lcl-adapter data check recipes/mix-pocket.yaml
    """
    from lcl_adapter import run

    found = run.check(recipe, overrides)
    emit(found, as_json)
    if found["faults"]:
        click.get_current_context().exit(1)


@data.command("index")
@click.argument("photos", type=PATH)
@click.option("--base", "base_name", default="pocket", show_default=True, help="Whose vision tower says what is near.")
@click.option("--out", type=PATH, help="File to write [default: PHOTOS/neighbours.json].")
@json_option
def index_data(photos: Path, base_name: str, out: Path | None, as_json: bool) -> None:
    """Rank the nearest classes of PHOTOS/<class>/*.jpg by the base's own vision tower, for hard episodes.

    \b
    lcl-adapter data index photos/ --base /models/llava-1.5-7b-hf
    """
    from lcl_adapter import run

    emit(run.index(photos, base_name, out), as_json)


@main.group(invoke_without_command=True)
@json_option
@click.pass_context
def recipes(ctx: click.Context, as_json: bool) -> None:
    """The shipped recipes, a line each."""
    from lcl_adapter.recipe.shipped import shipped_recipes

    if ctx.invoked_subcommand is None:
        shipped = shipped_recipes()
        if as_json:
            emit(shipped, True)
        else:
            width = max(map(len, shipped))
            for name, line in shipped.items():
                click.echo(f"{name:<{width}}  {line}")


@recipes.command("copy")
@click.argument("name")
@click.option("--to", type=click.Path(), default=".", help="File to write, or folder (made where it ends in /) [default: here].")
@json_option
def copy(name: str, to: str, as_json: bool) -> None:
    """Copy a shipped recipe here, to edit.

    \b
    lcl-adapter recipes copy pocket --to mine.yaml
    """
    from lcl_adapter.recipe.shipped import copy_recipe, find_recipe

    find_recipe(name)
    if to.endswith("/"):
        Path(to).mkdir(parents=True, exist_ok=True)
    written = copy_recipe(name, Path(to))
    click.echo(f"wrote {written}", err=True)
    emit({"written": str(written)}, as_json)


def _quiet() -> None:
    """Libraries' own chatter off, unless this runs in Python's development mode."""
    if not sys.flags.dev_mode:
        import logging
        import os
        import warnings

        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels it could download
        warnings.simplefilter("ignore")
