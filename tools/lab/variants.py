"""Train variants of a recipe with several seeds and print one table of their figures, for an entry in docs/lab.md.

    python -m tools.lab.variants recipes/pocket.yaml --seed 0 --seed 1 \
        --variant "as it is:" --variant "LoRA dropout 0.15: adapter.dropout=0.15" --variant "200 steps: train.max_steps=200" \
        evaluate.suites.captions=null evaluate.suites.vqa=null

A variant is a name, a colon, and overrides of the recipe. The overrides at the end hold for all variants. Every run stays
in its folder under --out, so that a stopped sweep continues where it was. The table has, for every cell of the report, the
nearest prototype, the base and the adapter of the same run, the time of training, and whether the adapter passed the prototype.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from lcl_adapter.cli import commands
from lcl_adapter.files import write_text


@dataclass(frozen=True)
class Variant:
    """A name for the table, and the overrides that make it."""

    name: str
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Variant:
        """``name: key=value key=value``. Raises click.BadParameter where the colon is missing."""
        name, colon, overrides = text.partition(":")
        if not colon or not name.strip():
            raise click.BadParameter(f"{text!r}: write it as 'name: key=value key=value'", param_hint="--variant")
        return cls(name.strip(), tuple(shlex.split(overrides)))


def report_of(recipe: str, variant: Variant, seed: int, common: Sequence[str], out: Path) -> dict[str, Any]:
    """The report of one run, trained first where its folder holds none yet."""
    folder = out / f"{re.sub(r'[^a-z0-9]+', '-', variant.name.lower()).strip('-')}-seed{seed}"
    if not (folder / "report.json").exists():
        resume = [f"resume={'true' if (folder / 'recipe.yaml').exists() else 'false'}"]
        commands.train(recipe, [*common, *variant.overrides, f"train.seed={seed}", f"output={folder}", *resume])
    manifest = json.loads((folder / "lcl_adapter.json").read_text(encoding="utf-8"))
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {**report, "training_seconds": manifest["training_seconds"]}


def lines_of(variant: Variant, seed: int, report: dict[str, Any]) -> Iterator[str]:
    """A table row a cell."""
    for cell in report["suites"]:
        adapter, prototype = cell["adapter"]["value"], (cell["baseline"] or {}).get("value")
        passed = "-" if prototype is None else "yes" if adapter > prototype else "no"
        low, high = cell["adapter"]["ci95"]
        yield (
            f"| {variant.name} | {seed} | {cell['name']} | {cell['n']} | {cell['chance']:.2f} | {'-' if prototype is None else f'{prototype:.3f}'} | "
            f"{cell['base']['value']:.3f} | {adapter:.3f} | {low:.3f} to {high:.3f} | {passed} | {report['training_seconds'] / 60:.1f} |"
        )


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--variant", "variants", multiple=True, required=True, help="name: key=value …; may be given several times.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True, help="May be given several times.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/lab"), show_default=True, help="Folder of the runs and the table.")
def main(recipe: str, overrides: tuple[str, ...], variants: tuple[str, ...], seeds: tuple[int, ...], out: Path) -> None:
    """Train every variant of RECIPE with every seed; write and print the table."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    head = ("variant", "seed", "cell", "n", "chance", "prototype", "base", "adapter", "95 %", "passed", "minutes of training")
    lines = [f"Commit {commit}, `{recipe} {shlex.join(overrides)}`", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for variant in map(Variant.parse, variants):
        for seed in seeds:
            lines += lines_of(variant, seed, report_of(recipe, variant, seed, overrides, out))
            write_text(out / "table.md", "\n".join(lines) + "\n")
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
