"""Wheels for a CUDA machine without network: nothing is missing, each version is the tested one, and bitsandbytes is made small."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import shlex
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.gpu import wheels

ROOT = Path(__file__).parent.parent
GPU = ROOT / "tools/gpu"
EXTRAS = ("bnb", "serve")  # of the project, that the tests on a GPU use
FOR_TESTS = {"sentencepiece"}  # new enough on the machine to be used, and packed for what the tests do with it


def listed(file: Path) -> dict[str, str | None]:
    """Name -> pinned version, None where the line names none."""
    lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = [line.partition("==")[::2] for line in lines if line]
    return {canonicalize_name(name): version or None for name, version in pairs}


def project() -> list[Requirement]:
    """The dependencies of the project and of EXTRAS."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in (*table["dependencies"], *(text for extra in EXTRAS for text in table["optional-dependencies"][extra]))]


def unmet(needed: list[Requirement], machine: dict[str, str | None], packed: dict[str, str | None]) -> tuple[list[str], set[str]]:
    """What neither the machine nor the pack meets, in words; and the names that were looked at.

    The requirements of a packed package are needed too. What the machine has came with its own requirements.
    """
    environment = {**default_environment(), "python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}
    waiting, reached, wrong = [(requirement, "the project") for requirement in needed], set[str](), []
    while waiting:
        requirement, by = waiting.pop()
        name = canonicalize_name(requirement.name)
        version = packed.get(name) or machine.get(name)
        if name not in packed and name not in machine:
            wrong.append(f"{by} needs {requirement}: neither on the machine nor packed")
        elif version and not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{by} needs {requirement}: {version} is {'packed' if name in packed else 'on the machine'}")
        if name in packed and name not in reached:
            own = [Requirement(text) for text in importlib.metadata.requires(name) or ()]
            waiting += [(r, name) for r in own if r.marker is None or r.marker.evaluate(environment)]
        reached.add(name)
    return sorted(set(wrong)), reached


MACHINE, PACKED = listed(GPU / "machine.txt"), listed(GPU / "requirements.txt")


def test_machine_and_pack_have_all_that_the_project_needs() -> None:
    wrong, _ = unmet(project(), MACHINE, PACKED)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["trl", "pydantic-core", "dill", "starlette"])
def test_a_missing_package_is_noticed(name: str) -> None:
    """One of the project's own, and those that only another package needs."""
    wrong, _ = unmet(project(), MACHINE, {k: v for k, v in PACKED.items() if k != name})
    assert wrong
    assert all("neither" in line and name in line.replace("_", "-") for line in wrong)


def test_a_version_that_is_too_old_is_noticed() -> None:
    wrong, _ = unmet(project(), MACHINE, {k: v for k, v in PACKED.items() if k != "transformers"})
    assert wrong == ["the project needs transformers<6,>=5.23: 5.17.0 is on the machine"]


def test_packed_versions_are_those_that_the_tests_run_with() -> None:
    tested = listed(ROOT / "constraints.txt")
    assert {name: tested.get(name) for name in PACKED} == PACKED


def test_nothing_is_packed_that_the_machine_has() -> None:
    """A package is packed because it is needed, and the machine lacks it, has it too old, or has it in an unknown version."""
    _, reached = unmet(project(), MACHINE, PACKED)
    assert not PACKED.keys() - reached
    for name in PACKED.keys() & {name for name, version in MACHINE.items() if version} - FOR_TESTS:
        wrong, _ = unmet(project(), MACHINE, {k: v for k, v in PACKED.items() if k != name})
        assert wrong, f"{name} {MACHINE[name]} on the machine is new enough"


# The wheels

LIBRARIES = ("cpu", "cuda118", "cuda128", "cuda130", "cuda132", "rocm72", "xpu2026")
INFO = "bitsandbytes-1.0.dist-info"


def in_record(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


@pytest.fixture
def made_up(tmp_path: Path) -> Callable[..., Path]:
    """Writes a wheel as bitsandbytes publishes it: code, a library for each kind of device, a licence."""

    def write(libraries: tuple[str, ...] = LIBRARIES, size: int = 10_000, **changed: bytes) -> Path:
        files = {
            "bitsandbytes/__init__.py": b"value = 1\n",
            "bitsandbytes/a, b.txt": b"a comma in a name\n",
            **{f"bitsandbytes/libbitsandbytes_{name}.so": os.urandom(size) for name in libraries},
            f"{INFO}/licenses/LICENSE": b"MIT\n",
            f"{INFO}/METADATA": b"Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 1.0\n",
            f"{INFO}/WHEEL": b"Wheel-Version: 1.0\nGenerator: made up\nRoot-Is-Purelib: false\nTag: py3-none-any\n",
        }
        quoted = {name: f'"{name}"' if "," in name else name for name in files}
        record = "".join(f"{quoted[name]},{in_record(data)},{len(data)}\n" for name, data in files.items())
        path = tmp_path / "wheels/bitsandbytes-1.0-py3-none-any.whl"
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as wheel:
            for name, data in files.items():
                wheel.writestr(name, changed.get(Path(name).stem, data))
            wheel.writestr(f"{INFO}/RECORD", record + f"{INFO}/RECORD,,\n")
        return path

    return write


def test_one_cuda_library_stays(made_up: Callable[..., Path]) -> None:
    wheel = made_up()
    before = {name: zipfile.ZipFile(wheel).read(name) for name in zipfile.ZipFile(wheel).namelist()}
    size = wheel.stat().st_size
    assert wheels.pack(wheel.parent) == wheel.stat().st_size < size / 2
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        assert sorted(Path(name).stem for name in names if name.endswith(".so")) == ["libbitsandbytes_cpu", "libbitsandbytes_cuda130"]
        assert f"{INFO}/licenses/LICENSE" in names
        assert all(packed.read(name) == before[name] for name in names if not name.endswith("RECORD"))
    assert list(wheel.parent.iterdir()) == [wheel]
    wheels.pack(wheel.parent)  # a second time, on what is small already
    assert zipfile.ZipFile(wheel).namelist() == names


def test_a_small_wheel_installs_with_a_record_that_holds(made_up: Callable[..., Path], tmp_path: Path) -> None:
    wheels.slim(made_up())
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
    subprocess.run([*install, *map(str, (tmp_path / "wheels").glob("*.whl"))], check=True)
    (distribution,) = importlib.metadata.distributions(path=[str(site)])
    recorded = {str(file): file for file in distribution.files or ()}
    on_disk = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert recorded.keys() == on_disk
    hashed = {name: file for name, file in recorded.items() if file.hash is not None}
    assert {"bitsandbytes/libbitsandbytes_cuda130.so", "bitsandbytes/a, b.txt"} <= hashed.keys()
    for name, file in hashed.items():
        data = (site / name).read_bytes()
        assert (f"sha256={file.hash.value}", file.size) == (in_record(data), len(data)), name


def test_a_wheel_without_the_library_is_refused(made_up: Callable[..., Path]) -> None:
    wheel = made_up(("cpu", "cuda128", "cuda140"))
    before = wheel.read_bytes()
    with pytest.raises(wheels.PackError, match=r"no libbitsandbytes_cuda130\.so in it, only libbitsandbytes_cpu\.so"):
        wheels.pack(wheel.parent)
    assert wheel.read_bytes() == before


def test_a_damaged_wheel_is_refused(made_up: Callable[..., Path]) -> None:
    with pytest.raises(wheels.PackError, match=r"libbitsandbytes_cuda130\.so differs from its hash"):
        wheels.slim(made_up(libbitsandbytes_cuda130=b"cut off"))


def test_the_limit_is_on_what_is_left(made_up: Callable[..., Path]) -> None:
    wheel = made_up(size=20_000)
    other = wheel.with_name("other-1.0-py3-none-any.whl")
    other.write_bytes(bytes(10_000))
    assert wheel.stat().st_size > 60_000 > wheels.pack(wheel.parent, limit=60_000)
    other.write_bytes(bytes(20_000))
    with pytest.raises(wheels.PackError, match=r"MB of wheels, more than 0\. The largest: bitsandbytes-1\.0"):
        wheels.pack(wheel.parent, limit=60_000)


def test_the_script_prints_the_line_that_installs(made_up: Callable[..., Path], tmp_path: Path) -> None:
    """The whole script, with a pip whose download copies made-up wheels."""
    made_up()
    out = tmp_path / "out folder"
    out.mkdir()
    (out / "trl-0.1-py3-none-any.whl").write_bytes(b"of an earlier run")
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'case "$*" in "-m pip download"*) echo "$@" > {tmp_path}/asked; cp {tmp_path}/wheels/*.whl "{out}" ;;\n'
        f'*) exec {shlex.quote(sys.executable)} "$@" ;; esac\n'
    )
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python)}
    ran = subprocess.run([str(GPU / "pack.sh"), str(out)], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    (line,) = ran.stdout.splitlines()
    asked = (tmp_path / "asked").read_text().split()
    assert {"--no-deps", "3.12", "manylinux_2_24_x86_64", "tools/gpu/requirements.txt"} <= set(asked)
    assert "1 wheels" in ran.stderr
    install, run = line.split(" && ")
    assert shlex.split(run)[-2:] == ["--minutes", "8"]
    site = tmp_path / "site"
    subprocess.run(install.replace(wheels.SITE, str(site)).replace("python3", sys.executable, 1), shell=True, check=True)
    assert (site / "bitsandbytes/libbitsandbytes_cuda130.so").is_file()
    assert not (site / "bitsandbytes/libbitsandbytes_cuda118.so").exists()


def test_the_script_fails_where_the_wheels_are_unusable(made_up: Callable[..., Path], tmp_path: Path) -> None:
    wheel = made_up(("cpu",))
    ran = subprocess.run([sys.executable, "-m", "tools.gpu.wheels", str(wheel.parent)], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"{wheel}: no libbitsandbytes_cuda130.so")
    assert not ran.stdout
    (tmp_path / "empty").mkdir()
    with pytest.raises(wheels.PackError, match=r"no wheels in it\. Run tools/gpu/pack\.sh"):
        wheels.pack(tmp_path / "empty")
