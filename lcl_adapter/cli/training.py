"""The commands about recipes and runs: train, eval, plan, data, recipes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lcl_adapter.cli.common import ADAPTER, PATH, Memory, base_options, emit, json_option, main, scores_option

if TYPE_CHECKING:
    from lcl_adapter.answering.client import ScoreSource
    from lcl_adapter.base.ref import BaseRef


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--force", is_flag=True, help="Train even if the forecast exceeds the free memory.")
@json_option
def train(recipe: str, overrides: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Train RECIPE's adapter, then compare it with its base. OVERRIDES are key=value.

    \b
    lcl-adapter train recipes/pocket.yaml train.max_steps=100 output=runs/short
    lcl-adapter train recipes/pocket.yaml resume=true      # continue after a stop

    Exits with 3 if a suite under `evaluate.retention` fell further below the base than allowed: if the whole 95 %
    interval of its fall is above the allowance. Too few questions to say are a warning.
    """
    from lcl_adapter.cli import commands

    result = commands.train(recipe, overrides, force)
    emit(result, as_json)
    if not result["retained"]:
        click.get_current_context().exit(3)


@main.command("eval")
@click.argument("run_folder", metavar="RUN", type=ADAPTER)
@click.argument("overrides", nargs=-1)
@click.option(
    "--suite", "suites", multiple=True, help="Only this suite: one of the recipe, or the name of a shipped one. May be given several times."
)
@click.option("--limit", type=click.IntRange(1), help="Only the first N queries of each line of the report.")
@click.option("--seed", type=click.IntRange(0), help="Draw other episodes than the recipe's seed does.")
@base_options("--base", "Where the base is now, if it has moved.")
@click.option("--fresh", is_flag=True, help="Measure again, without cached results.")
@click.option("--endpoint", metavar="URL", help="Ask models behind this server instead: lcl-adapter serve, vLLM, or any other with OpenAI's API.")
@click.option("--model", help="The adapter's name on the server [default: the run's name, or the only model beside the base].")
@click.option("--base-model", default="base", show_default=True, help="The base's name on the server.")
@click.option("--workers", type=click.IntRange(1), default=8, show_default=True, help="Requests sent at the same time.")
@click.option("--pad", is_flag=True, help="Make pictures square before they are sent, as training does; vLLM crops pictures that are not.")
@scores_option
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
    scores: ScoreSource,
    as_json: bool,
) -> None:
    """Compare base and adapter on RUN's suites. Both get the same questions. OVERRIDES are key=value.

    \b
    lcl-adapter eval runs/pocket --suite 2way --limit 200
    lcl-adapter eval runs/mix --suite isekai-10 --suite mvtec data.root=/data
    lcl-adapter eval runs/mix --endpoint http://127.0.0.1:8000 --model lcl

    The server's API key is read from LCL_API_KEY.
    """
    from lcl_adapter.cli import commands
    from lcl_adapter.evaluate import ServedModels

    served = ServedModels(endpoint, model, base_model, workers, pad, scores) if endpoint else None
    result = commands.evaluate(run_folder, suites=suites, limit=limit, seed=seed, base=base, fresh=fresh, overrides=overrides, served=served)
    emit(result, as_json)


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--memory", type=Memory(), help="Available memory, for instance 16GB [default: what is free on this machine's device].")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="The device to train on [default: cuda if --memory is given or a GPU is present, else cpu]."
)
@click.option("--probe", is_flag=True, help="Also load the base and time three training steps.")
@json_option
def plan(recipe: str, overrides: tuple[str, ...], memory: int | None, device: str | None, probe: bool, as_json: bool) -> None:
    """Forecast RECIPE's memory without loading weights. Suggests changes, and exits with 1, if it does not fit.

    \b
    lcl-adapter plan recipes/mix.yaml base=/models/llava-v1.5-7b data.root=/data --memory 16GB
    """
    from lcl_adapter.cli import commands

    forecast = commands.plan(recipe, overrides, memory, device or ("cuda" if memory and not probe else None), probe)
    emit(forecast, as_json)
    if not forecast["fits"]:
        click.get_current_context().exit(1)


@main.group()
def data() -> None:
    """Inspect the data before training on it."""


@data.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--episodes", default=8, show_default=True, type=click.IntRange(1, 200), help="Episodes of each source.")
@click.option("--out", type=PATH, default=Path("preview.html"), show_default=True, help="The page to write.")
@click.option("--png", is_flag=True, help="Also write the page as a picture beside it.")
@click.option("--source", "sources", multiple=True, help="Only this source. May be given several times.")
@click.option("--policy", "policies", multiple=True, help="Only sources with this policy. May be given several times.")
@json_option
def preview(
    recipe: str, overrides: tuple[str, ...], episodes: int, out: Path, png: bool, sources: tuple[str, ...], policies: tuple[str, ...], as_json: bool
) -> None:
    """Write a page that shows episodes as the model reads them, with learned tokens in colour. It filters by source and
    policy.

    \b
    lcl-adapter data preview recipes/mix-pocket.yaml --png
    lcl-adapter data preview recipes/mix-pocket.yaml --policy inspection
    """
    from lcl_adapter.cli import commands

    emit(commands.preview(recipe, overrides, episodes, out, png, sources, policies), as_json)


@data.command("check")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@json_option
def check_data(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Open every file that RECIPE names, and list every fault with its file and line. Exits with 1 if there are faults.

    \b
    lcl-adapter data check recipes/mix-pocket.yaml
    """
    from lcl_adapter.cli import commands

    result = commands.check_data(recipe, overrides)
    emit(result, as_json)
    if result["faults"]:
        click.get_current_context().exit(1)


@data.command("index")
@click.argument("photos", type=PATH)
@base_options("--base", "The base whose vision tower compares the photos [default: pocket].")
@click.option("--out", type=PATH, help="The file to write [default: PHOTOS/neighbours.json].")
@json_option
def index_data(photos: Path, base: BaseRef, out: Path | None, as_json: bool) -> None:
    """Find the nearest classes of each class in PHOTOS/<class>/*.jpg by the base's vision tower, for hard episodes.

    \b
    lcl-adapter data index photos/ --base /models/llava-1.5-7b-hf
    """
    from lcl_adapter.cli import commands

    emit(commands.index(photos, base, out), as_json)


@main.group(invoke_without_command=True)
@json_option
@click.pass_context
def recipes(ctx: click.Context, as_json: bool) -> None:
    """List the shipped recipes."""
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
@click.option("--to", type=click.Path(), default=".", help="The file to write, or a folder (created if it ends in /) [default: the current folder].")
@json_option
def copy(name: str, to: str, as_json: bool) -> None:
    """Copy the shipped recipe NAME, to edit it.

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
