"""YAML, ``extends`` and ``key.sub=value`` overrides -> :class:`Recipe`, or one error with every fault and its place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from lcl_adapter import reading
from lcl_adapter.errors import RecipeError, did_you_mean
from lcl_adapter.files import write_text
from lcl_adapter.packaged import BASES, is_packaged
from lcl_adapter.recipe.renamed import Key, Places, both_given, new_key, rename_keys
from lcl_adapter.recipe.schema import Recipe
from lcl_adapter.recipe.shipped import find_recipe
from lcl_adapter.recipe.sources import Registered
from lcl_adapter.recipe.training import REFUSED

LONGEST_GIVEN = 200  # characters of a wrong value that a message shows
Location = tuple[int | str, ...]  # where pydantic places a fault


def load(path: str | Path, overrides: Sequence[str] = (), resolved: bool = False) -> Recipe:
    """Read a recipe file (or a shipped recipe by its name), apply overrides, and check everything.

    resolved: the file is a run's saved recipe, whose paths are absolute. Paths below its ``data.root`` follow an
    overridden root.
    Raises RecipeError that lists all faults together.
    """
    places: Places = {}
    faults: list[str] = []
    values = _read(find_recipe(path), places, faults, [])
    if resolved:
        values = _relative_to_root(values)
    _apply_overrides(values, places, faults, overrides)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError([*faults, *_explain(error, places)]) from None
    if faults:
        raise RecipeError(faults)
    return _absolute(recipe)


def save(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe. Loading the file gives an equal recipe."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    head = f"# The resolved recipe of this run. It trains the same adapter again:\n#   lcl-adapter train {path.name} output=runs/again\n"
    write_text(path, head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _read(path: Path, places: Places, faults: list[str], chain: list[Path]) -> dict[str, Any]:
    """One file's values merged over those of the recipe that it extends. ``chain``: the files that led to this one."""
    resolved = path.resolve()
    if resolved in chain:
        circle = " -> ".join(p.name for p in [*chain[chain.index(resolved) :], resolved])
        raise RecipeError([f"{path}: `extends` goes in a circle: {circle}"])
    try:
        values, node = reading.parse_yaml(reading.read_text(path, reading.MAX_RECIPE))
    except OSError as error:
        raise RecipeError([f"{path}: cannot be read ({error.strerror})"]) from error
    except UnicodeDecodeError as error:
        raise RecipeError([f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8"]) from error
    except reading.YamlError as error:
        line = f", line {error.line}" if error.line else ""
        raise RecipeError([f"{path}{line}: {error}"]) from error
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise RecipeError([f"{path}: a recipe is a mapping of keys; this is {type(values).__name__}"])
    own_places: Places = {}
    _record_places(node, (), path, own_places)
    parent = values.pop("extends", None)
    values, own_faults = rename_keys(values, own_places)
    merged: dict[str, Any] = {}
    if parent is not None:
        if not isinstance(parent, str):
            raise RecipeError([f"{own_places[('extends',)]}: `extends` names one recipe"])
        beside = path.parent / parent
        merged = _read(beside if beside.exists() else find_recipe(parent), places, faults, [*chain, resolved])
    places.update(own_places)
    faults += own_faults
    return _merge(merged, values)


def _record_places(node: yaml.Node, key: Key, path: Path, places: Places) -> None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            place = f"{path}, line {name.start_mark.line + 1}"
            child = (*key, str(name.value))
            if child in places:
                raise RecipeError([f"{place}: key {name.value!r} is written twice"])
            places[child] = place
            _record_places(value, child, path, places)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key; any other value replaces the old one; ``null`` removes the key."""
    merged = dict(base)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _apply_overrides(values: dict[str, Any], places: Places, faults: list[str], overrides: Iterable[str]) -> None:
    """Set each ``key.sub=value`` in ``values``; an empty value or ``null`` removes the key."""
    written: dict[Key, str] = {}  # the new key -> the key as an override wrote it
    for text in overrides:
        name, equals, value = text.partition("=")
        place = f"override {text!r}"
        if not equals or not name:
            faults.append(f"{place}: write it as key=value, for instance train.max_steps=100")
            continue
        key = tuple(name.split("."))
        try:
            parsed, _ = reading.parse_yaml(value)
        except reading.YamlError:
            parsed = value
        layer = parsed
        for part in reversed(key):
            layer = {part: layer}
        layer, own_faults = rename_keys(layer, {key[:n]: place for n in range(1, len(key) + 1)})
        faults += own_faults
        *parents, last = renamed = new_key(key)
        for n in range(1, len(key) + 1):
            new, old = ".".join(renamed[:n]), ".".join(key[:n])
            other = written.setdefault(renamed[:n], old)
            if other != old:
                faults.append(both_given(place, *((old, new) if old != new else (other, new))))
        for part in renamed:
            layer = layer[part]
        target = values
        for parent in parents:
            inner = target.setdefault(parent, {})
            if not isinstance(inner, dict):
                faults.append(f"{place}: {parent!r} is a value, it has no keys below it")
                break
            target = inner
        else:
            if layer is None:
                target.pop(last, None)
            else:
                target[last] = layer
            places[renamed] = place


def _explain(error: ValidationError, places: Places) -> list[str]:
    """Pydantic's errors as lines: the place, what is wrong, and a near name where there is one."""
    faults = []
    for fault in error.errors():
        key = _keys_of(fault["loc"])
        place = next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), "the recipe")
        name = ".".join(key)
        match fault["type"]:
            case "extra_forbidden":
                if key[:-1] == ("train",) and key[-1] in REFUSED:
                    faults.append(f"{place}: {name!r} is not used: {REFUSED[key[-1]]}")
                    continue
                known = _fields_at(fault["loc"][:-1])
                near = did_you_mean(key[-1], [*known, *(REFUSED if key[:-1] == ("train",) else ())])
                message = f"unknown key {name!r}" + (near or f"; known: {', '.join(known)}")
            case "missing":
                message = f"key {name!r} is missing"
            case "union_tag_not_found":
                message = f"{name!r} needs a `{_discriminator(fault)}`: one of {', '.join(_members(_type_at(fault['loc'])))}"
            case "union_tag_invalid":
                tags = [t.strip("' ") for t in str(fault["ctx"]["expected_tags"]).split(",")]
                tag = str(fault["ctx"]["tag"])
                message = f"{name!r}: {_discriminator(fault)} {tag!r} is none of {', '.join(tags)}{did_you_mean(tag, tags)}"
            case "value_error":
                message = f"{name + ': ' if name else ''}{fault['ctx']['error']}"
            case _:
                given = fault["input"]
                reason = fault["msg"][0].lower() + fault["msg"][1:]
                options = [t.strip("' ") for t in str(fault.get("ctx", {}).get("expected", "")).replace(" or ", ", ").split(",")]
                shown = repr(given) if len(repr(given)) <= LONGEST_GIVEN else repr(given)[:LONGEST_GIVEN] + "…"
                near = did_you_mean(str(given)[:LONGEST_GIVEN], options) if fault["type"] == "literal_error" else ""
                message = f"{name!r}: {reason}, given {shown}{near}"
        faults.append(f"{place}: {message}")
    return faults


def _discriminator(fault: Any) -> str:
    return str(fault.get("ctx", {}).get("discriminator", "type")).strip("'")


def _keys_of(location: Location) -> Key:
    """A pydantic location as keys of the file.

    Pydantic adds the tag of the chosen union member; the file has no such key.
    """
    keys: list[str] = []
    parent: Any = Recipe
    for part in location:
        if part not in _members(parent):
            keys.append(str(part))
        parent = _child_type(parent, part)
    return tuple(keys)


def _type_at(location: Location) -> Any:
    """The type that the schema has at a pydantic location; None where it has none."""
    kind: Any = Recipe
    for part in location:
        kind = _child_type(kind, part)
    return kind


def _fields_at(location: Location) -> list[str]:
    """The keys that a mapping at this location may have; empty where they are free."""
    kind = _type_at(location)
    return sorted(kind.model_fields) if _is_model(kind) else []


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _plain(kind: Any, metadata: Sequence[Any] = ()) -> Any:
    """A type without its annotations. A field of registered sources becomes their union."""
    if get_origin(kind) is Annotated:
        kind, *own = get_args(kind)
        return _plain(kind, (*own, *metadata))
    registered = next((m for m in metadata if isinstance(m, Registered)), None)
    return kind if registered is None else _plain(registered.union())


def _members(kind: Any) -> dict[str, Any]:
    """The members of a tagged union by tag; empty for any other type."""
    tags: dict[str, Any] = {}
    for member in get_args(kind) if get_origin(kind) in {Union, UnionType} else ():
        name = next((n for n in ("type", "kind") if _is_model(member) and n in member.model_fields), None)
        if name is not None:
            tags.update(dict.fromkeys(get_args(member.model_fields[name].annotation), member))
    return tags


def _child_type(kind: Any, part: int | str) -> Any:
    """The type below ``kind``: the member of a union with this tag, a model's field, or what a dict or list holds."""
    members = _members(kind)
    if part in members:
        return members[str(part)]
    if _is_model(kind) and part in kind.model_fields:
        field = kind.model_fields[part]
        return _plain(field.annotation, field.metadata)
    return _plain(get_args(kind)[-1]) if get_origin(kind) in {dict, list} else None


def _relative_to_root(values: dict[str, Any]) -> dict[str, Any]:
    """A saved recipe's values; paths below its ``data.root`` become relative to it."""
    root = str(values.get("data", {}).get("root", ""))

    def visit(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: visit(inner) for key, inner in value.items()}
        return value.removeprefix(root + "/") if isinstance(value, str) and root not in {"", "/"} else value

    return {key: visit(value) if key in {"sources", "evaluate"} else value for key, value in values.items()}


def _absolute(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths.

    Paths of sources and suites are relative to ``data.root``, the base's to the working folder.
    """
    faults: list[str] = []

    def expanded(path: Path | str, key: str) -> Path:
        """The path with ``~`` expanded; one that no file can have is a fault."""
        try:
            return reading.usable(path)
        except ValueError as error:
            faults.append(f"{key}: {error}")
            return Path()

    root = expanded(recipe.data.root, "data.root").resolve()

    def visit(value: Any) -> Any:
        if isinstance(value, BaseModel):
            changed = {name: visit(getattr(value, name)) for name in type(value).model_fields}
            return value.model_copy(update=changed)
        if isinstance(value, dict):
            return {name: visit(inner) for name, inner in value.items()}
        if isinstance(value, Path):
            if is_packaged(value):
                return value
            return root / expanded(value, "the recipe")
        return value

    base = expanded(recipe.base, "base")
    changed = recipe.model_copy(
        update={
            "base": str(base.resolve()) if base.is_dir() and recipe.base not in BASES else recipe.base,
            "output": expanded(recipe.output, "output"),
            "sources": visit(recipe.sources),
            "evaluate": visit(recipe.evaluate),
            "data": recipe.data.model_copy(update={"root": root}),
        }
    )
    if faults:
        raise RecipeError(faults)
    return changed
