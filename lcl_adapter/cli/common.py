"""The group of all commands, and the options that several commands share."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lcl_adapter import reading
from lcl_adapter.errors import LclError, MergeError, UserError
from lcl_adapter.reading import brief
from lcl_adapter.terminal import json_text, print_json_only, shown

if TYPE_CHECKING:
    from lcl_adapter.recipe.schema import Precision

Command = TypeVar("Command", bound=Callable[..., Any])
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class UsablePath(click.Path):
    """A path with ``~`` expanded, whose names a file can have."""

    name = "path"

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return reading.usable(str(super().convert(value, param, ctx)))
        except ValueError as error:
            self.fail(shown(str(error)), param, ctx)


PATH = UsablePath()


class Commands(click.Group):
    """Turns this package's errors into a message and an exit code: 2 for the caller's mistakes, 1 for other errors, 130
    for Ctrl-C.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.secho(f"error: {shown(str(error))}", fg="red", err=True)
            ctx.exit(2)
        except (MergeError, LclError) as error:
            click.secho(f"error: {shown(str(error))}", fg="red", err=True)
            ctx.exit(1)
        except OSError as error:  # of a path, on which no other message was made
            if error.filename is None:
                raise
            click.secho(f"error: {shown(brief(str(error.filename)))}: {error.strerror or error}.", fg="red", err=True)
            ctx.exit(2)
        except (KeyboardInterrupt, click.Abort):
            click.secho("stopped; no file is half-written. Continue a training run with resume=true.", fg="yellow", err=True)
            ctx.exit(130)


def emit(result: Any, as_json: bool) -> None:
    """With --json, print the result as one object on standard output."""
    if as_json:
        click.echo(json_text(result))


def _only_json(ctx: click.Context, _param: click.Parameter, as_json: bool) -> bool:
    print_json_only(as_json)
    ctx.call_on_close(lambda: print_json_only(False))
    return as_json


json_option = click.option(
    "--json", "as_json", is_flag=True, callback=_only_json, help="Print one JSON object on standard output, and all else on standard error."
)


scores_option = click.option(
    "--scores",
    type=click.Choice(["auto", "text"]),
    default="auto",
    show_default=True,
    help="Where label scores from --endpoint come from: exact probabilities of its /v1/systemone, where it has one that reads photos; or its text.",
)


class Memory(click.ParamType[int]):
    """An amount of memory in bytes, from ``16GB``, ``16 GiB``, or 16 (gigabytes)."""

    name = "memory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from lcl_adapter.amounts import memory_bytes

        try:
            return value if isinstance(value, int) else memory_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Adapter(UsablePath):
    """A run's or an adapter's folder, or the name of a shipped adapter."""

    name = "adapter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from lcl_adapter.packaged import adapter_folder

        return adapter_folder(str(super().convert(value, param, ctx)))


ADAPTER = Adapter()
ORIENTATIONS = (
    "Ask a question about labelled photos so often, each time with all of them mirrored or turned alike; a label's score is the mean "
    "[default: as the adapter's recipe says; the base: 1]."
)
READINGS = (
    "Read a set of labelled photos so often, one time after the other, so that each photo sees all others [default: as the adapter's recipe "
    "says; the base: 1]."
)
PRECISION = click.Choice(["auto", "fp32", "bf16", "fp16", "int8", "nf4"])
LAYOUT = click.Choice(["hf", "original"])


def base_options(name: str, text: str = "", precision: str | None = None, support_tokens: str | None = None) -> Callable[[Command], Command]:
    """An option or argument that names a base, and --vision-tower. The command gets them as one ``base: BaseRef``.

    name: ``--base``, or the metavar of an argument. text: help of the option. precision: help of --precision, None for a
    command without it. support_tokens: help of --support-tokens, None for a command without it, --orientations and --readings.
    """
    named = click.option(name, "base_name", help=text) if name.startswith("--") else click.argument("base_name", metavar=name)

    def decorate(command: Command) -> Command:
        @wraps(command)
        def wrapped(
            base_name: str | None, tower: str | None, precision: Precision | None = None, tiles: bool | None = None,
            support_tokens: int | None = None, orientations: str | None = None, readings: int | None = None, **options: Any,
        ) -> Any:  # fmt: skip
            from lcl_adapter.base.ref import BaseRef

            times = None if orientations is None else int(orientations)
            base = BaseRef(base_name, precision, tower=tower, tiles=tiles, support_tokens=support_tokens, orientations=times, readings=readings)
            return command(base=base, **options)

        inner: Any = wrapped
        if precision is not None:
            inner = click.option("--precision", type=PRECISION, help=precision)(inner)
        if support_tokens is not None:
            inner = click.option("--readings", type=click.IntRange(1, 4), help=READINGS)(inner)
            inner = click.option("--orientations", type=click.Choice(["1", "2", "4", "8"]), help=ORIENTATIONS)(inner)
            inner = click.option("--support-tokens", "support_tokens", type=click.IntRange(1), help=support_tokens)(inner)
        inner = click.option("--vision-tower", "tower", help="The vision tower's folder, if it is not where an original config says.")(inner)
        decorated: Command = named(inner)
        return decorated

    return decorate


shard_option = click.option("--shard-size", type=Memory(), default="5GB", show_default=True, help="Maximum size of a file of weights.")
tower_as_option = click.option("--tower-as", help="The vision tower that a written original config names [default: a folder beside the weights].")


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="lcl-adapter")
def main() -> None:
    """Teach the LLaVA you already run new visual concepts from a few photos.

    \b
    lcl-adapter train recipes/pocket.yaml                      train an adapter on the shipped base
    lcl-adapter eval runs/pocket                               compare base and adapter on held-out classes
    lcl-adapter ask photos/ query.png --adapter runs/pocket    classify a photo by labelled photos
    """
    _quiet()


def _quiet() -> None:
    """Silence the messages of libraries, except in Python's development mode. A label that a pipe's encoding lacks is escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if not sys.flags.dev_mode:
        import logging
        import os
        import warnings

        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs kernels that it could download
        warnings.simplefilter("ignore")
