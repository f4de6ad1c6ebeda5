"""The commands about the server, and about the support sets stored on it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lcl_adapter import reading
from lcl_adapter.cli.common import PATH, Memory, base_options, emit, json_option, main
from lcl_adapter.errors import RunError
from lcl_adapter.terminal import shown

if TYPE_CHECKING:
    from lcl_adapter.base.ref import BaseRef
    from lcl_adapter.serve.server import Options

STORE = Path("support-sets")


class Seconds(click.FloatRange):
    """A number of seconds from 1. Neither "nan" nor "inf" is one, which ``float`` reads."""

    def __init__(self) -> None:
        super().__init__(1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        return seconds if math.isfinite(seconds) else self.fail(f"{value!r} is no number of seconds.", param, ctx)


store_option = click.option("--store", type=PATH, default=STORE, show_default=True, help="The folder where support sets are stored.")
namespace_option = click.option("--namespace", default="local", show_default=True, help="The owner of the sets: a name of the key file, or `local`.")


def serving(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a server, as one value."""

    @wraps(command)
    def wrapped(
        base: BaseRef, adapters: tuple[str, ...], adapter_folder: Path | None, host: str, port: int, key_file: Path | None, memory: int | None,
        queue: int, timeout: float, store: Path,
    ) -> None:  # fmt: skip
        if key_file is not None:
            from lcl_adapter.serve.http.keys import read_keys

            read_keys(key_file)  # its faults are reported at once, not after seconds of imports
        try:
            from lcl_adapter.serve.server import Options
        except ImportError as error:
            raise RunError(f'the server needs {error.name}: pip install "lcl-adapter[serve]".') from error
        named: dict[str, Path] = {}
        for text in adapters:
            name, folder = _parse_adapter(text)
            if name in named:
                raise click.UsageError(f"--adapter: two adapters are named {name!r}; give each a name of its own, NAME=RUN.")
            named[name] = folder
        command(Options(base.defaulting_to(precision="auto"), named, adapter_folder, host, port, key_file, memory, queue, timeout, store))

    options = (
        click.option(
            "--adapter",
            "adapters",
            multiple=True,
            metavar="NAME=RUN",
            help="An adapter, and the model name to serve it under. May be given several times.",
        ),
        click.option(
            "--adapter-folder", type=PATH, help="Runs in this folder can be loaded and unloaded while the server runs, by the names of their folders."
        ),
        click.option(
            "--host", default="127.0.0.1", show_default=True, help="The address to listen on. Any other than this machine's own needs --api-key-file."
        ),
        click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="The port to listen on."),
        click.option(
            "--api-key-file", "key_file", type=PATH, help="A file with one line for each key: name, key, and `admin` if it may load adapters."
        ),
        click.option(
            "--memory", type=Memory(), help="Memory for weights and cached support sets together [default: half of what is free beside the weights]."
        ),
        click.option("--tiles", is_flag=True, help="Split pictures into any-resolution tiles, if the adapter was trained with them."),
        click.option(
            "--queue",
            type=click.IntRange(1),
            default=256,
            show_default=True,
            help="Questions of one caller that may wait. Further ones are refused with status 429.",
        ),
        click.option("--timeout", type=Seconds(), default=120.0, show_default=True, help="Time limit of a request, in seconds."),
        store_option,
        base_options(
            "BASE",
            precision="Precision of the base [default: auto].",
            support_tokens="Tokens of a photo that is shown with a label, for every model [default: as each adapter was trained; the base: all].",
        ),
    )
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


@main.command()
@serving
def serve(options: Options) -> None:
    """Serve BASE and adapters on it: OpenAI's chat API, stored support sets, classification. The API is described under
    /docs.

    \b
    lcl-adapter serve pocket --adapter pocket-lcl=runs/pocket
    lcl-adapter serve /models/llava-v1.5-7b --adapter parts=runs/mix --memory 16GB --host 0.0.0.0 --api-key-file keys.txt
    """
    from lcl_adapter.serve import server

    server.run(options)


@main.command()
@serving
def demo(options: Options) -> None:
    """Serve a page to show BASE labelled photos, ask it about others, and compare base and adapter. The API is served
    too.

    \b
    lcl-adapter demo pocket --adapter lcl=runs/quickstart        # then open http://127.0.0.1:8000

    With --api-key-file, visitors log in with a name and key of the file, and see only the sets of that name.
    """
    try:
        from lcl_adapter.page import server
    except ImportError as error:
        raise RunError(f'the page needs {error.name}: pip install "lcl-adapter[page]".') from error
    if options.port == 0:
        raise RunError("--port 0: the page must know its own address; give a port.")
    server.run(options)


def _parse_adapter(text: str) -> tuple[str, Path]:
    """``NAME=RUN``, or a run's folder; then the folder's name is the model's. A shipped adapter's name stands for its folder."""
    from lcl_adapter.answering import api_types
    from lcl_adapter.packaged import adapter_folder

    name, separator, folder = text.partition("=")
    if not separator:
        name, folder = Path(text).resolve().name, text
    name = api_types.normalized_name(name)
    if not re.fullmatch(api_types.SET_NAME, name):  # what no route of the server can reach
        raise click.UsageError(f"--adapter {text[:80]!r}: {name[:80]!r} is no name for a model: {api_types.SET_NAME_RULE}. Give NAME=RUN.")
    try:
        return name, adapter_folder(reading.usable(folder))
    except ValueError as error:
        raise click.UsageError(f"--adapter: {shown(str(error))}.") from error


version_option = click.option("--expected-version", "expected", type=click.IntRange(1), help="Refuse if the set has another version by now.")


@main.group()
def support() -> None:
    """Manage the support sets in the server's store from a shell."""


@support.command("add")
@click.argument("name")
@click.argument("photos", type=PATH)
@click.option("--shots", type=click.IntRange(1), help="Photos of each class, the first by name [default: all].")
@click.option("--question", help="The question about a new photo [default: the model's own wording].")
@click.option("--expected-version", "expected", type=click.IntRange(0), help="Refuse if the set has another version by now. 0: the set must be new.")
@store_option
@namespace_option
@json_option
def add(name: str, photos: Path, shots: int | None, question: str | None, expected: int | None, store: Path, namespace: str, as_json: bool) -> None:
    """Store PHOTOS as a new version of the set NAME. PHOTOS holds a folder of photos for each class.

    \b
    lcl-adapter support add scratches photos/
    """
    from lcl_adapter.serve import support_sets

    emit(support_sets.add(store, namespace, name, photos, shots, question, expected), as_json)


@support.command("add-photo")
@click.argument("name")
@click.argument("label")
@click.argument("photo", type=PATH)
@version_option
@store_option
@namespace_option
@json_option
def add_photo(name: str, label: str, photo: Path, expected: int | None, store: Path, namespace: str, as_json: bool) -> None:
    """Store a new version of the set NAME, with one more PHOTO of LABEL. The label may be a new one.

    
    lcl-adapter support add-photo parts scratched new.jpg
    """
    from lcl_adapter.serve import support_sets

    emit(support_sets.add_photo(store, namespace, name, label, photo, expected), as_json)


@support.command("drop-photo")
@click.argument("name")
@click.argument("number", type=click.IntRange(0))
@version_option
@store_option
@namespace_option
@json_option
def drop_photo(name: str, number: int, expected: int | None, store: Path, namespace: str, as_json: bool) -> None:
    """Store a new version of the set NAME without the photo NUMBER, as `support show` counts them.

    The only photo of a label stays: add another first.

    
    lcl-adapter support drop-photo parts 17
    """
    from lcl_adapter.serve import support_sets

    emit(support_sets.drop_photo(store, namespace, name, number, expected), as_json)


@support.command("list")
@store_option
@namespace_option
@json_option
def list_(store: Path, namespace: str, as_json: bool) -> None:
    """List the stored sets."""
    from lcl_adapter.serve import support_sets

    emit(support_sets.list_sets(store, namespace), as_json)


@support.command("show")
@click.argument("name")
@click.option("--version", type=click.IntRange(1), help="An earlier version [default: the newest].")
@store_option
@namespace_option
@json_option
def show(name: str, version: int | None, store: Path, namespace: str, as_json: bool) -> None:
    """Show labels, photos and versions of the set NAME."""
    from lcl_adapter.serve import support_sets

    emit(support_sets.show(store, namespace, name, version), as_json)


@support.command("remove")
@click.argument("name")
@store_option
@namespace_option
@json_option
def remove(name: str, store: Path, namespace: str, as_json: bool) -> None:
    """Remove the set NAME with all its versions."""
    from lcl_adapter.serve import support_sets

    emit(support_sets.remove(store, namespace, name), as_json)


@support.command("export")
@click.argument("name")
@click.argument("out", type=PATH)
@click.option("--version", type=click.IntRange(1), help="An earlier version [default: the newest].")
@store_option
@namespace_option
@json_option
def export_set(name: str, out: Path, version: int | None, store: Path, namespace: str, as_json: bool) -> None:
    """Write the set NAME as a folder of photos for each class.

    `ask`, `support add` and `support import` accept the folder.
    """
    from lcl_adapter.serve import support_sets

    emit(support_sets.export(store, namespace, name, out, version), as_json)


@support.command("import")
@click.argument("folder", type=PATH)
@click.option("--name", help="The set's name [default: the name it was exported with, or the folder's]")
@store_option
@namespace_option
@json_option
def import_set(folder: Path, name: str | None, store: Path, namespace: str, as_json: bool) -> None:
    """Store a FOLDER that `support export` wrote. Order and question are the same as before."""
    from lcl_adapter.serve import support_sets

    emit(support_sets.import_set(store, namespace, folder, name), as_json)
