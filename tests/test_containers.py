"""The container's files: what they copy exists, what they run is a command of this project, and nothing is reached without a key."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from lcl_adapter.cli import main

ROOT = Path(__file__).parent.parent


def parsed(arguments: list[str]) -> click.Context:
    """By the command's own parser, without running it."""
    command = main.get_command(click.Context(main), arguments[0])
    assert command is not None
    return command.make_context(arguments[0], list(arguments[1:]))


@pytest.fixture(scope="module")
def dockerfile() -> list[str]:
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_what_is_copied_is_there_and_is_not_ignored(dockerfile: list[str]) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")}
    copied = {source for line in dockerfile if line.startswith("COPY") for source in shlex.split(line)[1:-1]}
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)
    # What setuptools needs to build a wheel: the package, the recipes beside it, the README and the licence.
    assert {"lcl_adapter", "recipes", "README.md", "LICENSE", "pyproject.toml"} <= copied


def test_the_extras_and_the_pin_are_there(dockerfile: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = next(line.partition("=")[2] for line in dockerfile if line.startswith("ARG EXTRAS"))
    assert re.search(rf"^{extras} = \[", project, re.MULTILINE)
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_containers_command_is_one(dockerfile: list[str]) -> None:
    entry = json.loads(next(line for line in dockerfile if line.startswith("ENTRYPOINT")).removeprefix("ENTRYPOINT "))
    command = json.loads(next(line for line in dockerfile if line.startswith("CMD")).removeprefix("CMD "))
    assert entry == ["lcl-adapter"]
    options = parsed(command).params
    assert options["host"] == "0.0.0.0"
    assert options["key_file"] == Path("/run/secrets/keys")
    assert any(line.startswith("USER ") and line != "USER root" for line in dockerfile)


def test_composes_services() -> None:
    told = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    own, vllm = told["services"]["lcl-adapter"], told["services"]["vllm"]
    options = parsed([re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in own["command"]]).params
    assert options["base_name"] == "pocket"
    assert options["key_file"] == Path("/run/secrets") / own["secrets"][0]
    assert str(options["store"]).startswith("/data/")
    for service in (own, vllm):
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert vllm["profiles"] == ["vllm"]
    assert own["read_only"]
    assert own["tmpfs"] == ["/tmp"]
    named = {volume.split(":")[0] for volume in own["volumes"] if not volume.startswith(("$", ".", "/"))}
    assert named == set(told["volumes"])
    assert set(own["secrets"]) == set(told["secrets"])
    assert "keys.txt" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()  # a key file is never committed
