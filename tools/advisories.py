"""Whether a pinned dependency has a known advisory: constraints.txt against tools/advisories.json. No network is needed.

    python -m tools.advisories                    # what `make check` runs
    pip-audit -r constraints.txt --no-deps --disable-pip -f json -o audit.json    # where there is a network
    python -m tools.advisories --add audit.json   # adds what it reports to the list, with today's date

The list says when a database was last asked, and when the pins were last compared by hand. A new advisory is in it only after that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
LIST = Path(__file__).parent / "advisories.json"
OLD_DAYS = 90  # after which the list says that it is old


def pinned(constraints: Path) -> dict[str, Version]:
    """Package -> version. Raises ValueError for a line that pins nothing."""
    pins: dict[str, Version] = {}
    for number, line in enumerate(constraints.read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if text:
            name, equals, version = text.partition("==")
            if not equals:
                raise ValueError(f"{constraints}:{number}: {text!r} pins no version")
            pins[canonicalize_name(name)] = Version(version)
    return pins


def affected(pins: dict[str, Version], advisories: Sequence[dict[str, str]]) -> list[str]:
    """A line for each advisory of a pinned version."""
    return [
        f"{name} {pins[name]}: {one['id']} ({one['what']}); affected is {one['affected']}"
        for one in advisories
        if (name := canonicalize_name(one["package"])) in pins and pins[name] in SpecifierSet(one["affected"], prereleases=True)
    ]


def added(listed: dict[str, Any], audit: dict[str, Any], today: date) -> dict[str, Any]:
    """The list with what pip-audit reports. audit: its JSON."""
    known = {(canonicalize_name(one["package"]), one["id"]) for one in listed["advisories"]}
    new = []
    for package in audit["dependencies"]:
        for fault in package.get("vulns", ()):
            if (canonicalize_name(package["name"]), fault["id"]) not in known:
                fixed = min(map(Version, fault.get("fix_versions") or ()), default=None)
                what = " ".join(str(fault.get("description", "")).split())[:200]
                new.append({"package": package["name"], "id": fault["id"], "affected": f"<{fixed}" if fixed else ">=0", "what": what})
    return {**listed, "asked": today.isoformat(), "compared": today.isoformat(), "advisories": [*listed["advisories"], *new]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if a pinned version is affected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, help="pip-audit's JSON")
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    parser.add_argument("--list", type=Path, default=LIST)
    options = parser.parse_args(arguments)
    listed = json.loads(options.list.read_text(encoding="utf-8"))
    if options.add:
        listed = added(listed, json.loads(options.add.read_text(encoding="utf-8")), date.today())
        options.list.write_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    pins = pinned(options.constraints)
    lines = affected(pins, listed["advisories"])
    asked = listed["asked"]
    when = f"a database was last asked on {asked}" if asked else f"written by hand, {listed['compared']}; no database was asked yet"
    print(f"{len(pins)} pinned packages, {len(listed['advisories'])} advisories ({when})", file=sys.stderr)
    if asked is None or (date.today() - date.fromisoformat(asked)).days > OLD_DAYS:
        print("ask a database where there is a network: see `python -m tools.advisories --help`", file=sys.stderr)
    for line in lines:
        print(line)
    return int(bool(lines))


if __name__ == "__main__":
    raise SystemExit(main())
