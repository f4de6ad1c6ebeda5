"""The second half of pack.sh: makes the downloaded wheels small enough, and prints the line that installs them.

Of bitsandbytes, whose wheel holds a library for each version of CUDA, ROCm and XPU, one library stays. Standard library
only, so that any Python runs it.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import shlex
import sys
import zipfile
from pathlib import Path

LIMIT = 40 * 10**6  # bytes of all wheels
# The CUDA 13 library, and the one that bitsandbytes uses for tensors on the CPU.
RETAINED = {"libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so"}
LIBRARY = re.compile(r"bitsandbytes/(libbitsandbytes_\w+\.so)")
SITE = "/tmp/site"


class PackError(Exception):
    """The wheels are not what is expected. The message says which, and what to do."""


def slim(wheel: Path) -> None:
    """Rewrite a bitsandbytes wheel with the libraries of RETAINED only. RECORD lists what stays.

    Raises PackError where one of RETAINED is not in the wheel, or a file differs from its hash in RECORD.
    """
    partial = wheel.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target:
        libraries = {name: match[1] for name in source.namelist() if (match := LIBRARY.fullmatch(name))}
        if missing := RETAINED - set(libraries.values()):
            raise PackError(f"{wheel}: no {' or '.join(sorted(missing))} in it, only {', '.join(sorted(libraries.values()))}. Adapt RETAINED.")
        dropped = {name for name, library in libraries.items() if library not in RETAINED}
        record = next(name for name in source.namelist() if name.endswith(".dist-info/RECORD"))
        rows = [row for row in csv.reader(io.StringIO(source.read(record).decode())) if row and row[0] not in dropped]
        hashes = {row[0]: row[1] for row in rows}
        for entry in source.infolist():
            if entry.filename in dropped or entry.filename == record or entry.is_dir():
                continue
            data = source.read(entry)
            if hashes.get(entry.filename) != record_hash(data):
                raise PackError(f"{wheel}: {entry.filename} differs from its hash in RECORD. Download the wheel again.")
            target.writestr(entry, data, zipfile.ZIP_DEFLATED)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        target.writestr(record, text.getvalue())
    partial.replace(wheel)


def record_hash(data: bytes) -> str:
    """The hash of a file as RECORD writes it (PEP 376, PEP 427)."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def pack(folder: Path, limit: int = LIMIT) -> int:
    """Make the wheels in ``folder`` small. Returns their bytes.

    Raises PackError where they hold more than ``limit`` bytes, or where there are none.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise PackError(f"{folder}: no wheels in it. Run tools/gpu/pack.sh.")
    for wheel in wheels:
        if wheel.name.startswith("bitsandbytes-"):
            slim(wheel)
    total = sum(wheel.stat().st_size for wheel in wheels)
    if total > limit:
        largest = sorted(wheels, key=lambda wheel: -wheel.stat().st_size)[:3]
        sizes = ", ".join(f"{wheel.name} {wheel.stat().st_size / 1e6:.1f} MB" for wheel in largest)
        raise PackError(f"{folder}: {total / 1e6:.1f} MB of wheels, more than {limit / 1e6:.0f}. The largest: {sizes}.")
    return total


def command(folder: Path) -> str:
    """The line for the CUDA machine, to be run in the repository's folder: installs the wheels, and runs the benchmark."""
    install = f"python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target {SITE} {shlex.quote(str(folder))}/*.whl"
    return f"{install} && PYTHONPATH={SITE}:. HF_HUB_OFFLINE=1 python3 -m benchmarks.gpu --minutes 8"


def main() -> None:
    folder = Path(sys.argv[1])
    try:
        total = pack(folder)
    except PackError as error:
        raise SystemExit(str(error)) from error
    count = len(list(folder.glob("*.whl")))
    print(f"{folder}: {count} wheels, {total / 1e6:.1f} MB. On the CUDA machine, in the repository's folder:", file=sys.stderr)
    print(command(folder))


if __name__ == "__main__":
    main()
