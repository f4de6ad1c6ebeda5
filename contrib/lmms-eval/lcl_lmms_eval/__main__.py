"""``python -m lcl_lmms_eval RECIPE --out FOLDER``: draw episodes, and write them as tasks for lmms-eval."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from lcl_adapter.errors import UserError
from lcl_lmms_eval.draw import draw


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder for the tasks; give it to lmms-eval as --include_path.")
@click.option("--suite", "suites", multiple=True, help="Only this suite; may be repeated. Names of shipped suites are accepted too.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first questions of each task, as in `lcl-adapter eval --limit`.")
@click.option("--seed", type=int, help="Instead of the recipe's seed, as in `lcl-adapter eval --seed`.")
def main(recipe: str, overrides: tuple[str, ...], out: Path, suites: tuple[str, ...], limit: int | None, seed: int | None) -> None:
    """Draw the episodes of RECIPE's suites as `lcl-adapter eval` does. RECIPE is a file, a shipped recipe's name, or a run's folder."""
    try:
        tasks = draw(recipe, out, suites, limit, seed, overrides)
    except UserError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    for name, count in tasks.items():
        click.echo(f"{name}: {count} questions")


if __name__ == "__main__":
    main(prog_name="python -m lcl_lmms_eval")
