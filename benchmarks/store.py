"""Store the report of a run as a result that documents cite.

    python -m benchmarks.store runs/quickstart --as quickstart --command "make quickstart"

Writes benchmarks/results/quickstart.json: the run's report.json, and under ``stored`` the command, the commit, the
machine, the date, the versions and the seconds of the training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import write_result
from lcl_adapter.base.adapter import MANIFEST, read_manifest


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, or `partial` in it, with its report.json")
    parser.add_argument("--as", dest="name", help="the name of the result [default: the folder's]")
    parser.add_argument("--command", required=True, help="what was typed to train and evaluate the run")
    options = parser.parse_args(arguments)
    report = options.run / "report.json"
    if not report.exists():
        parser.error(f"{report} is missing: `lcl-adapter eval {options.run}` writes it")
    run = options.run if (options.run / MANIFEST).exists() else options.run.parent  # of a part of an evaluation, in `partial/`
    seconds = read_manifest(run).get("training_seconds")
    stored = json.loads(report.read_text(encoding="utf-8"))
    stored.pop("folder", None)  # where the run was on this machine
    return write_result(options.name or options.run.name, stored, options.command, training_seconds=seconds)


if __name__ == "__main__":
    main()
