"""``report.html``: the table, the plot, and the adapter's surest mistakes as pictures."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from lcl_adapter.errors import DataError
from lcl_adapter.files import write_text
from lcl_adapter.report.thumbs import data_url
from lcl_adapter.sources import Picture

WORST = 40


def write_report_page(run: Path) -> Path:
    """From ``report.json`` and ``predictions.jsonl`` of a run, with the plots beside them."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    predictions = read_predictions(run)
    plots = [(name, run / f"{name}.png") for name in ("accuracy", "roc")]
    shown = [(name, "data:image/png;base64," + base64.b64encode(p.read_bytes()).decode()) for name, p in plots if p.exists()]
    page = Environment(loader=PackageLoader("lcl_adapter.report", "."), autoescape=True).get_template("report.html")
    write_text(
        run / "report.html",
        page.render(
            title=f"{run.name}: base against adapter",
            plots=shown,
            rows=report["suites"],
            confusions=[r for r in report["suites"] if "confusion" in r["adapter"]],
            inspections=[r for r in report["suites"] if "by_category" in r["adapter"]],
            retention=report["retention"],
            wrong=mistakes(predictions),
        ),
    )
    return run / "report.html"


def read_predictions(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def mistakes(predictions: list[dict[str, Any]], count: int = WORST) -> list[dict[str, Any]]:
    """The surest wrong answers among scored labels of suites that have something to learn from, taken from each suite in turn."""
    by_suite: dict[str, list[tuple[float, str, dict[str, Any]]]] = {}
    for line in predictions:
        scores = line["adapter"]["log_likelihoods"]
        if not scores or not line["support"] or "shuffled" in line["cell"]:
            continue
        said = max(scores, key=scores.__getitem__)
        if said != line["gold"]:
            sure = 1 / sum(math.exp(v - scores[said]) for v in scores.values())
            by_suite.setdefault(line["suite"], []).append((sure, said, line))
    for found in by_suite.values():
        found.sort(key=lambda item: (-item[0], item[2]["cell"], item[2]["index"]))
    turns = [found[place] for place in range(count) for found in by_suite.values() if place < len(found)]
    return [_shown(sure, said, line) for sure, said, line in turns[:count]]


def _shown(sure: float, said: str, line: dict[str, Any]) -> dict[str, Any]:
    return {
        "cell": line["cell"],
        "index": line["index"],
        "class_name": line["class"],
        "defect": line.get("defect"),
        "gold": line["gold"],
        "said": said,
        "sure": f"({sure:.0%})",
        "query": _url(line["picture"]),
        "support": [{"url": _url(name), "label": label} for name, label in line["support"]],
    }


def _url(name: str) -> str:
    """A picture's name in predictions.jsonl back into a picture; a grey square where the file has gone."""
    try:
        return data_url(Picture.named(name))
    except DataError:
        return "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'%3E%3Crect width='9' height='9' fill='%23ccc'/%3E%3C/svg%3E"
