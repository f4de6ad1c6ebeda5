"""The container's files. The image is built here without Docker: what COPY copies is installed, and ENTRYPOINT with CMD is run from it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import click
import httpx2
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


def words_of(dockerfile: list[str], instruction: str) -> list[str]:
    """The JSON list of ENTRYPOINT, CMD or a health check."""
    line = next(line for line in dockerfile if line.startswith(f"{instruction} "))
    words: list[str] = json.loads(line[line.index("[") :])
    return words


def sent_to_docker(path: str) -> bool:
    """Whether .dockerignore lets a file into the build. A pattern matches a path or a folder above it; the last match decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern, exception = line.removeprefix("!"), line.startswith("!")
        expression = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if pattern and re.match(rf"{expression}(/|$)", path):
            sent = exception
    return sent


def copy_as_docker_does(dockerfile: list[str], context: Path) -> list[str]:
    """Each COPY of the Dockerfile, into ``context``. Returns the copied files, relative to it."""
    for line in dockerfile:
        if line.startswith("COPY "):
            *sources, target = shlex.split(line)[1:]
            for source in sources:
                place = context / target / ("" if (ROOT / source).is_dir() else source)
                for file in [path for path in (ROOT / source).rglob("*") if path.is_file()] if (ROOT / source).is_dir() else [ROOT / source]:
                    if sent_to_docker(str(file.relative_to(ROOT))):
                        copied = place / file.relative_to(ROOT / source)
                        copied.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(file, copied)
    return sorted(str(path.relative_to(context)) for path in context.rglob("*") if path.is_file())


def install(context: Path, target: Path) -> None:
    """``pip install .`` into a folder, without the network and without what it depends on."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--no-compile"]
    done = subprocess.run([*command, "--target", str(target), str(context)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def not_installed(files: list[str], target: Path) -> list[str]:
    """Files of the package and its recipes that were copied but did not reach the installed package."""
    installed = {
        file: file if file.startswith("lcl_adapter/") else f"lcl_adapter/{file}" for file in files if file.startswith(("lcl_adapter/", "recipes/"))
    }
    return [file for file, place in installed.items() if not (target / place).is_file()]


@pytest.fixture(scope="module")
def image(dockerfile: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder that the image's ``pip install`` fills, and the files that COPY copied."""
    folder = tmp_path_factory.mktemp("image")
    files = copy_as_docker_does(dockerfile, folder / "app")
    install(folder / "app", folder / "installed")
    return folder / "installed", files


def test_what_is_copied_is_there_and_is_not_ignored(dockerfile: list[str]) -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")}
    copied = {source for line in dockerfile if line.startswith("COPY") for source in shlex.split(line)[1:-1]}
    assert copied == sent
    assert all((ROOT / source).exists() for source in copied)
    # What setuptools needs to build a wheel: the package, the recipes beside it, the README and the licence.
    assert {"lcl_adapter", "recipes", "README.md", "LICENSE", "pyproject.toml"} <= copied


def test_the_installed_package_is_complete_and_has_nothing_else(image: tuple[Path, list[str]]) -> None:
    """Every module, recipe, phrase list, page and weight file that was copied; no tools, tests or benchmarks."""
    installed, files = image
    assert len([file for file in files if file.startswith("recipes/")]) == len(list((ROOT / "recipes").glob("*.yaml")))
    assert not not_installed(files, installed)
    assert not [file for file in files if "__pycache__" in file or file.endswith(".pyc")]
    others = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert others == {"lcl_adapter", "bin"}


def test_a_package_or_data_file_that_setuptools_leaves_out_is_noticed(image: tuple[Path, list[str]], dockerfile: list[str], tmp_path: Path) -> None:
    """The check above on builds with a fault: one package and one line of package data are missing from pyproject.toml."""
    files = copy_as_docker_does(dockerfile, tmp_path / "app")
    project = tmp_path / "app" / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    project.write_text(text.replace('  "lcl_adapter.recipe.wording",\n', "").replace('"base/*", ', ""), encoding="utf-8")
    install(tmp_path / "app", tmp_path / "installed")
    missing = not_installed(files, tmp_path / "installed")
    assert {"lcl_adapter/recipe/wording/__init__.py", "lcl_adapter/recipe/wording/phrases.yaml", "lcl_adapter/pocket/base/model.safetensors"} <= set(
        missing
    )


def test_the_containers_command_serves_from_the_installed_package(image: tuple[Path, list[str]], dockerfile: list[str], tmp_path: Path) -> None:
    """ENTRYPOINT and CMD with the container's folders under ``tmp_path``; then HEALTHCHECK's own command; then SIGTERM."""
    installed, _ = image
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "PATH": f"{installed / 'bin'}:{os.environ['PATH']}"}

    def inside(words: list[str]) -> list[str]:
        return [
            re.sub(r"^/(?=run/secrets|data)", f"{tmp_path}/", word).replace("0.0.0.0", "127.0.0.1").replace(":8000", f":{port}") for word in words
        ]

    where = subprocess.run([sys.executable, "-c", "import lcl_adapter; print(lcl_adapter.__file__)"], env=environment, capture_output=True, text=True)
    assert where.stdout.startswith(str(installed)), "the copy under test, not the checkout"
    command = [*words_of(dockerfile, "ENTRYPOINT"), *words_of(dockerfile, "CMD")]
    refused = subprocess.run(inside(command), env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2
    assert f"{tmp_path}/run/secrets/keys" in refused.stderr
    (tmp_path / "run" / "secrets").mkdir(parents=True)
    (tmp_path / "run" / "secrets" / "keys").write_text("plant-a 0123456789abcdef0123456789abcdef\n")
    (tmp_path / "data").mkdir()
    server = subprocess.Popen(
        [*inside(command), "--port", str(port)], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    health = inside(words_of(dockerfile, "HEALTHCHECK"))
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while server.poll() is None and time.monotonic() < deadline and not answers(f"{url}/ready"):
            time.sleep(0.2)
        assert server.poll() is None, server.communicate()[0]
        assert subprocess.run([sys.executable, *health[1:]]).returncode == 0
        assert httpx2.get(f"{url}/v1/models").status_code == 401
        listed = httpx2.get(f"{url}/v1/models", headers={"Authorization": "Bearer 0123456789abcdef0123456789abcdef"})
        assert [model["id"] for model in listed.json()["data"]] == ["base"]
        server.send_signal(signal.SIGTERM)
        output, _ = server.communicate(timeout=60)
        assert server.returncode in {0, -signal.SIGTERM}, output
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


def answers(url: str) -> bool:
    try:
        return httpx2.get(url).status_code == 200
    except httpx2.TransportError:
        return False


def test_the_extras_and_the_pin_are_there(dockerfile: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = next(line.partition("=")[2] for line in dockerfile if line.startswith("ARG EXTRAS"))
    assert re.search(rf"^{extras} = \[", project, re.MULTILINE)
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_containers_command_is_one(dockerfile: list[str]) -> None:
    assert words_of(dockerfile, "ENTRYPOINT") == ["lcl-adapter"]
    options = parsed(words_of(dockerfile, "CMD")).params
    assert options["host"] == "0.0.0.0"
    assert options["key_file"] == Path("/run/secrets/keys")
    assert any(line.startswith("USER ") and line != "USER root" for line in dockerfile)


def test_composes_services() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    own, vllm = compose["services"]["lcl-adapter"], compose["services"]["vllm"]
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
    assert named == set(compose["volumes"])
    assert set(own["secrets"]) == set(compose["secrets"])
    assert "keys.txt" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()  # a key file is never committed
