"""What others may depend on, a line each in ``public_surface.txt``, so that a change to it is seen in review.

Names of ``lcl_adapter``, commands with their options, keys of a recipe, routes of the server with their fields. After a change that is
meant, write the file anew, and look at its difference:

    .venv/bin/python -m tests.test_public_surface
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from difflib import unified_diff
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import click
from pydantic import BaseModel

import lcl_adapter
from lcl_adapter.cli import main
from lcl_adapter.data import READERS, Recipe
from lcl_adapter.recipe.renamed import RENAMED
from lcl_adapter.serve import api

FILE = Path(__file__).with_name("public_surface.txt")


def names() -> Iterator[str]:
    """``name`` lines: a function with its signature, a class with its constructor's and its public members."""
    for name in lcl_adapter.__all__:
        value = getattr(lcl_adapter, name)
        if not inspect.isclass(value):
            yield f"name {name}{inspect.signature(value)}"
        elif issubclass(value, BaseModel):
            yield f"name {name}: class, with the recipe's keys"
        elif issubclass(value, Exception):
            yield f"name {name}: exception, a kind of {value.__base__.__name__}"  # type: ignore[union-attr]
        else:
            yield f"name {name}{inspect.signature(value)}"
            yield from (f"name {name}.{member}" for member in members(value))


def members(kind: type) -> Iterator[str]:
    for name, value in vars(kind).items():
        if not name.startswith("_"):
            if isinstance(value, property):
                yield f"{name}: property"
            elif isinstance(value, (classmethod, staticmethod)) or inspect.isfunction(value):
                yield f"{name}{inspect.signature(getattr(kind, name))}"


def commands(command: click.Command = main, path: str = "lcl-adapter") -> Iterator[str]:
    """``command`` lines: a command with its arguments, and each of its options."""
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    yield " ".join([f"command {path}", *(p.make_metavar(click.Context(command)) for p in arguments)])
    for option in command.params:
        if isinstance(option, click.Option):
            default = "" if option.is_flag or not isinstance(option.default, (str, int, float, Path)) else f" = {option.default}"
            several = " (several)" if option.multiple else " (required)" if option.required else ""
            values = "flag" if option.is_flag else "|".join(getattr(option.type, "choices", ())) or option.type.name
            yield f"command {path} {'/'.join(option.opts)}: {values}{several}{default}".replace(str(Path.home()), "~")
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{path} {name}")


def own_keys(schema: dict[str, Any], path: str) -> Iterator[str]:
    """The keys of an object of a JSON schema: ``path.key: type = default``."""
    required = schema.get("required", ())
    for name, inner in schema.get("properties", {}).items():
        default = " (required)" if name in required else f" = {json.dumps(inner['default'])}" if "default" in inner else ""
        yield f"{path}{name}: {written(inner)}{default}"


def keys(schema: dict[str, Any], types: dict[str, Any], path: str = "") -> Iterator[str]:
    """The keys of an object and of the objects in it; ``*`` stands for a name of the user's. A suite's source has a reader's keys."""
    values = {name: inner for name, inner in schema.get("properties", {}).items() if "$ref" not in inner or name == "source"}
    yield from own_keys({**schema, "properties": values}, path)
    for name, inner in schema.get("properties", {}).items():
        if name != "source":
            yield from below(inner, types, f"{path}{name}")


def below(schema: dict[str, Any], types: dict[str, Any], path: str) -> Iterator[str]:
    if "$ref" in schema:
        yield from keys(types[name_of(schema)], types, f"{path}.")
    elif "discriminator" in schema:
        tag = schema["discriminator"]["propertyName"]
        for value, reference in schema["discriminator"]["mapping"].items():
            yield from keys(types[name_of({"$ref": reference})], types, f"{path}({tag}: {value}).")
    elif isinstance(schema.get("additionalProperties"), dict):
        yield from below(schema["additionalProperties"], types, f"{path}.*")
    for branch in schema.get("anyOf", ()):
        yield from below(branch, types, path)


def name_of(reference: dict[str, Any]) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def written(schema: dict[str, Any]) -> str:
    """A JSON schema's type in one line, with its limits."""
    if "$ref" in schema:
        return name_of(schema)
    if "discriminator" in schema:
        return f"keys of {schema['discriminator']['propertyName']} {'|'.join(sorted(schema['discriminator']['mapping']))}"
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return "|".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(written(branch) for branch in schema["anyOf"])
    kind = str(schema.get("type", "anything"))
    if kind == "array":
        kind = f"list of {written(schema.get('items', {}))}"
    elif kind == "object":
        inner = schema.get("additionalProperties")
        kind = f"mapping of {written(inner)}" if isinstance(inner, dict) else "mapping"
        kind += f" by {written(schema['propertyNames'])}" if "enum" in schema.get("propertyNames", {}) else ""
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return " ".join([kind, *(f"{sign} {schema[key]}" for key, sign in limits.items() if key in schema)])


def recipe() -> Iterator[str]:
    schema = Recipe.model_json_schema()
    yield from (f"recipe {line}" for line in keys(schema, schema["$defs"]))
    for reader in READERS:
        own = reader.model_json_schema()
        yield from (f"recipe reader {own['properties']['type']['const']}: {line}" for line in own_keys(own, ""))
    yield from (f"recipe {'.'.join(old)}: the old name of {new}" for old, new in RENAMED.items())


def server() -> Iterator[str]:
    """``server`` lines: method and path of each route, and the fields of the bodies."""
    app = api.make_app(MagicMock())  # no route is called
    for route in app.routes:
        yield from (f"server {method} {route.path}" for method in getattr(route, "methods", ()))  # type: ignore[attr-defined]
    types = app.openapi()["components"]["schemas"]
    for name, schema in types.items():
        yield from (f"server {line}" for line in own_keys(schema, f"{name}."))


def surface() -> list[str]:
    return sorted({*names(), *commands(), *recipe(), *server()})


def test_the_public_surface_is_the_listed_one() -> None:
    listed = FILE.read_text(encoding="utf-8").splitlines()
    changes = list(unified_diff(listed, surface(), "public_surface.txt", "the code", lineterm="", n=0))
    assert not changes, "\n".join(["run `.venv/bin/python -m tests.test_public_surface` if this is meant:", *changes])


def test_every_part_is_listed() -> None:
    """One line of each kind, so that a part that is no longer walked is noticed."""
    lines = surface()
    for line in (
        "command lcl-adapter ask --adapter: path",
        "recipe sources.*(type: mvtec).path: string (required)",
        "recipe evaluate.suites.*(kind: control).control: shuffled-names|no-support (required)",
        "recipe evaluate.retention: mapping of number or string = {}",
        "server POST /v1/classify",
    ):
        assert line in lines, "\n".join(lines)
    assert any(line.startswith("name Predictor.ask(") for line in lines)
    assert any(line.startswith("server ClassifyIn.images: ") for line in lines)


if __name__ == "__main__":
    FILE.write_text("\n".join(surface()) + "\n", encoding="utf-8")
