"""YAML + ``extends`` + ``key.sub=value`` overrides -> :class:`Recipe`, or one error that lists every fault with its place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from lcl_adapter.errors import RecipeError, did_you_mean
from lcl_adapter.files import write_text
from lcl_adapter.pocket import shipped
from lcl_adapter.recipe.schema import Recipe
from lcl_adapter.recipe.shipped import find_recipe
from lcl_adapter.recipe.sources import Registered

Key = tuple[str, ...]
Location = tuple[int | str, ...]  # where pydantic places a fault
Places = dict[Key, str]  # where each key was written: "file, line 3" or "override 'a=b'"
PACKAGED = "pocket:"  # a path that starts so is a file of the shipped data


def load(path: str | Path, overrides: Sequence[str] = (), resolved: bool = False) -> Recipe:
    """Read a recipe file (or a shipped recipe's name), apply overrides, check everything.

    resolved: the file is a run's own, with absolute paths; those under its ``data.root`` move with an overridden one.
    Raises RecipeError with all faults together.
    """
    places: Places = {}
    data = _read(find_recipe(path), places, [])
    if resolved:
        data = _unrooted(data)
    faults = _override(data, places, overrides)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError([*faults, *_explain(error, places)]) from None
    if faults:
        raise RecipeError(faults)
    return _absolute(recipe)


def save(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe; loading it again gives an equal one."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    head = f"# The resolved recipe of this run. It trains the same adapter again:\n#   lcl-adapter train {path.name} output=runs/again\n"
    write_text(path, head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def packaged(path: Path) -> Path:
    """``pocket:NAME`` -> the shipped file; any other path as it is."""
    text = str(path)
    return shipped(text.removeprefix(PACKAGED)) if text.startswith(PACKAGED) else path


def _read(path: Path, places: Places, chain: list[Path]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in chain:
        circle = " -> ".join(p.name for p in [*chain[chain.index(resolved) :], resolved])
        raise RecipeError([f"{path}: `extends` goes in a circle: {circle}"])
    try:
        text = path.read_bytes().decode("utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except OSError as error:
        raise RecipeError([f"{path}: cannot be read ({error.strerror})"]) from error
    except UnicodeDecodeError as error:
        raise RecipeError([f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8"]) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError([f"{path}{line}: not YAML ({getattr(error, 'problem', None) or error})"]) from error
    if not isinstance(data, dict) or not isinstance(node, yaml.MappingNode):
        raise RecipeError([f"{path}: a recipe is a mapping of keys; this is {type(data).__name__}"])
    own: Places = {}
    try:
        _mark(node, (), path, own)
    except RecursionError as error:
        raise RecipeError([f"{path}: an alias that holds itself; write the value out"]) from error
    parent = data.pop("extends", None)
    merged: dict[str, Any] = {}
    if parent is not None:
        if not isinstance(parent, str):
            raise RecipeError([f"{own[('extends',)]}: `extends` names one recipe"])
        beside = path.parent / parent
        merged = _read(beside if beside.exists() else find_recipe(parent), places, [*chain, resolved])
    places.update(own)
    return _merge(merged, data)


def _mark(node: yaml.Node, key: Key, path: Path, places: Places) -> None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            place = f"{path}, line {name.start_mark.line + 1}"
            inner = (*key, str(name.value))
            if inner in places:
                raise RecipeError([f"{place}: key {name.value!r} is written twice"])
            places[inner] = place
            _mark(value, inner, path, places)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key; anything else is replaced; ``null`` takes a key away."""
    merged = dict(under)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _override(data: dict[str, Any], places: Places, overrides: Iterable[str]) -> list[str]:
    faults = []
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not name:
            faults.append(f"override {text!r}: write it as key=value, for instance train.max_steps=100")
            continue
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
        *parents, last = name.split(".")
        target = data
        for parent in parents:
            inner = target.setdefault(parent, {})
            if not isinstance(inner, dict):
                faults.append(f"override {text!r}: {parent!r} is a value, it has no keys below it")
                break
            target = inner
        else:
            if parsed is None:
                target.pop(last, None)
            else:
                target[last] = parsed
            places[(*parents, last)] = f"override {text!r}"
    return faults


def _explain(error: ValidationError, places: Places) -> list[str]:
    faults = []
    for fault in error.errors():
        key = _keys_of(fault["loc"])
        place = next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), "the recipe")
        name = ".".join(key)
        match fault["type"]:
            case "extra_forbidden":
                known = _fields_at(fault["loc"][:-1])
                why = f"unknown key {name!r}{did_you_mean(key[-1], known)}" + ("" if did_you_mean(key[-1], known) else f"; known: {', '.join(known)}")
            case "missing":
                why = f"key {name!r} is missing"
            case "union_tag_not_found":
                why = f"{name!r} needs a `{_discriminator(fault)}`: one of {', '.join(_members(_type_at(fault['loc'])))}"
            case "union_tag_invalid":
                context = fault["ctx"]
                tags = [t.strip("' ") for t in str(context["expected_tags"]).split(",")]
                tag = str(context["tag"])
                why = f"{name!r}: {_discriminator(fault)} {tag!r} is none of {', '.join(tags)}{did_you_mean(tag, tags)}"
            case "value_error":
                why = f"{name + ': ' if name else ''}{fault['ctx']['error']}"
            case _:
                given = fault["input"]
                message = fault["msg"][0].lower() + fault["msg"][1:]
                options = [t.strip("' ") for t in str(fault.get("ctx", {}).get("expected", "")).replace(" or ", ", ").split(",")]
                near = did_you_mean(str(given), options) if fault["type"] == "literal_error" else ""
                why = f"{name!r}: {message}, given {given!r}{near}"
        faults.append(f"{place}: {why}")
    return faults


def _discriminator(fault: Any) -> str:
    return str(fault.get("ctx", {}).get("discriminator", "type")).strip("'")


def _keys_of(location: Location) -> Key:
    """A pydantic location as keys of the file. Pydantic adds the tag of the chosen union member; the file has no such key."""
    keys: list[str] = []
    parent: Any = Recipe
    for part in location:
        if part not in _members(parent):
            keys.append(str(part))
        parent = _child_type(parent, part)
    return tuple(keys)


def _type_at(location: Location) -> Any:
    """The type that the schema has at a pydantic location; None where it has none."""
    found: Any = Recipe
    for part in location:
        found = _child_type(found, part)
    return found


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


def _unrooted(data: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe's values with the paths below its ``data.root`` relative to it again."""
    root = str(data.get("data", {}).get("root", ""))

    def visit(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: visit(inner) for key, inner in value.items()}
        return value.removeprefix(root + "/") if isinstance(value, str) and root not in {"", "/"} else value

    return {key: visit(value) if key in {"sources", "evaluate"} else value for key, value in data.items()}


def _absolute(recipe: Recipe) -> Recipe:
    """Paths of sources, suites and the base folder, relative to ``data.root``, made absolute."""
    root = recipe.data.root.expanduser().resolve()

    def visit(value: Any) -> Any:
        if isinstance(value, BaseModel):
            changed = {name: visit(getattr(value, name)) for name in type(value).model_fields}
            return value.model_copy(update=changed)
        if isinstance(value, dict):
            return {name: visit(inner) for name, inner in value.items()}
        if isinstance(value, Path):
            if str(value).startswith(PACKAGED):
                return value
            return root / value.expanduser()
        return value

    base = Path(recipe.base).expanduser()
    return recipe.model_copy(
        update={
            "base": str(base.resolve()) if base.is_dir() and recipe.base != "pocket" else recipe.base,
            "sources": visit(recipe.sources),
            "evaluate": visit(recipe.evaluate),
            "data": recipe.data.model_copy(update={"root": root}),
        }
    )
