"""Recipes: train, measure, ask, forecast, look at the data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lcl_adapter.cli.common import PATH, Memory, base_options, emit, json_option, main

if TYPE_CHECKING:
    from lcl_adapter.base.ref import BaseRef


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
    from lcl_adapter.cli import commands as run

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
@base_options("--base", "Where the base is now, if it has moved.")
@click.option("--fresh", is_flag=True, help="Measure again what was measured before.")
@click.option("--endpoint", metavar="URL", help="Ask models behind this server instead: serve, vLLM, or any other with OpenAI's API.")
@click.option("--model", help="The adapter's name there [default: the run's own, or the only one beside the base].")
@click.option("--base-model", default="base", show_default=True, help="The base's name there.")
@click.option("--workers", type=click.IntRange(1), default=8, show_default=True, help="Requests under way at a time.")
@click.option("--pad", is_flag=True, help="Make pictures square before they are sent, as training does: vLLM crops others.")
@json_option
def evaluate(
    run_folder: Path,
    overrides: tuple[str, ...],
    suites: tuple[str, ...],
    limit: int | None,
    seed: int | None,
    base: BaseRef,
    fresh: bool,
    endpoint: str | None,
    model: str | None,
    base_model: str,
    workers: int,
    pad: bool,
    as_json: bool,
) -> None:
    """Base against adapter on RUN's suites: the same questions, in one run. OVERRIDES are key=value.

    \b
    lcl-adapter eval runs/pocket --suite 2way --limit 200
    lcl-adapter eval runs/mix --suite isekai-10 --suite mvtec data.root=/data
    lcl-adapter eval runs/mix --endpoint http://127.0.0.1:8000 --model lcl

    A server's key is read from LCL_API_KEY.
    """
    from lcl_adapter.cli import commands as run
    from lcl_adapter.evaluate import ServedModels

    served = ServedModels(endpoint, model, base_model, workers, pad) if endpoint else None
    chosen = {"suites": suites, "limit": limit, "seed": seed, "base": base, "fresh": fresh, "overrides": overrides}
    emit(run.evaluate(run_folder, served=served, **chosen), as_json)


@main.command()
@click.argument("support", type=PATH)
@click.argument("queries", nargs=-1, required=True, type=PATH)
@click.option("--adapter", type=PATH, help="A run's folder; leave out to ask the base alone.")
@base_options(
    "--base",
    "The base to ask (default: the adapter's own, or pocket).",
    precision="Of the base [default: the adapter's own, or auto].",
)
@click.option("--shots", type=click.IntRange(1), help="At most this many photos of each class.")
@click.option("--question", help="Ask this about the query instead of the recipe's question.")
@click.option("--endpoint", metavar="URL", help="Ask a model behind this server instead; its key is read from LCL_API_KEY.")
@click.option("--model", help="Its name there [default: its only one; with --stored, the server's choice].")
@click.option("--stored", is_flag=True, help="SUPPORT is the name of a set that `lcl-adapter serve` keeps at --endpoint.")
@click.option("--wording", type=click.Choice(["lcl", "short"]), default="lcl", show_default=True, help="How photos are shown to --endpoint.")
@click.option("--pad", is_flag=True, help="Make pictures square before they are sent to --endpoint: vLLM crops others.")
@json_option
def ask(
    support: Path, queries: tuple[Path, ...], adapter: Path | None, base: BaseRef, shots: int | None, question: str | None,
    endpoint: str | None, model: str | None, stored: bool, wording: str, pad: bool, as_json: bool,
) -> None:  # fmt: skip
    """Judge QUERIES by labelled photos: SUPPORT holds a folder of photos a class.

    \b
    lcl-adapter ask photos/ query.png --adapter runs/pocket
    lcl-adapter ask photos/ query.png --endpoint http://127.0.0.1:8000 --model lcl --wording short
    lcl-adapter ask screws query.png --stored --endpoint http://127.0.0.1:8000
    """
    from lcl_adapter.cli import commands as run

    local = {"--adapter": adapter, "--base": base.name, "--vision-tower": base.tower, "--precision": base.precision}
    if endpoint is None:
        if stored or model:
            raise click.UsageError(f"{'--stored' if stored else '--model'} needs --endpoint.")
        emit(run.ask(support, queries, adapter=adapter, base=base, shots=shots, question=question), as_json)
        return
    if given := [name for name, value in local.items() if value is not None]:
        raise click.UsageError(f"{', '.join(given)}: with --endpoint the server has the model; name it with --model.")
    if not stored:
        emit(run.ask_endpoint(support, queries, endpoint, model=model, shots=shots, question=question, wording=wording, pad=pad), as_json)
        return
    if shots:
        raise click.UsageError("--shots: a stored set is asked as it was stored.")
    found = run.ask_stored(str(support), queries, endpoint, model=model, question=question)
    emit(found, as_json)
    if any("error" in one for one in found["answers"]):
        click.get_current_context().exit(1)


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
    from lcl_adapter.cli import commands as run

    found = run.plan(recipe, overrides, memory, device or ("cuda" if memory and not probe else None), probe)
    emit(found, as_json)
    if not found["fits"]:
        click.get_current_context().exit(1)


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
    from lcl_adapter.cli import commands as run

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
    from lcl_adapter.cli import commands as run

    found = run.check(recipe, overrides)
    emit(found, as_json)
    if found["faults"]:
        click.get_current_context().exit(1)


@data.command("index")
@click.argument("photos", type=PATH)
@base_options("--base", "Whose vision tower says what is near [default: pocket].")
@click.option("--out", type=PATH, help="File to write [default: PHOTOS/neighbours.json].")
@json_option
def index_data(photos: Path, base: BaseRef, out: Path | None, as_json: bool) -> None:
    """Rank the nearest classes of PHOTOS/<class>/*.jpg by the base's own vision tower, for hard episodes.

    \b
    lcl-adapter data index photos/ --base /models/llava-1.5-7b-hf
    """
    from lcl_adapter.cli import commands as run

    emit(run.index(photos, base, out), as_json)


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
