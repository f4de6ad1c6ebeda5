"""``report.html``: the table, the plot, and the adapter's surest mistakes as pictures."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import DataError
from lcl_adapter.files import write_text
from lcl_adapter.report.thumbs import data_url

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
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").split("\n") if line]


def mistakes(predictions: list[dict[str, Any]], count: int = WORST) -> list[dict[str, Any]]:
    """The surest wrong answers of the suites that have something to learn from, and wrong texts of plain questions; suites in turn."""
    by_suite: dict[str, list[tuple[float, str, dict[str, Any]]]] = {}
    for line in predictions:
        wrong = None if line["control"] else _wrong(line)
        if wrong is not None:
            by_suite.setdefault(line["suite"], []).append((*wrong, line))
    for found in by_suite.values():
        found.sort(key=lambda item: (-item[0], item[2]["cell"], item[2]["index"]))
    turns = [found[place] for place in range(count) for found in by_suite.values() if place < len(found)]
    return [_shown(sure, said, line) for sure, said, line in turns[:count]]


def _wrong(line: dict[str, Any]) -> tuple[float, str] | None:
    """How sure a wrong answer was (0 for free text) and what was said; None for a right one, and where nothing was shown to learn from."""
    scores = line["adapter"]["log_likelihoods"]
    if not scores:
        return None if line["right"] else (0.0, line["adapter"]["text"])
    said = max(scores, key=scores.__getitem__)
    if said == line["gold"] or not line["support"]:
        return None
    return 1 / sum(math.exp(v - scores[said]) for v in scores.values()), said


def _shown(sure: float, said: str, line: dict[str, Any]) -> dict[str, Any]:
    return {
        "cell": line["cell"],
        "index": line["index"],
        "class_name": line["class"] if line["support"] or line["labels"] else line["question"],
        "defect": line.get("defect"),
        "gold": line["gold"],
        "said": said,
        "sure": f"({sure:.0%})" if sure else "",
        "query": _url(line["picture"]),
        "support": [{"url": _url(name), "label": label} for name, label in line["support"]],
    }


def _url(name: str) -> str:
    """A picture's name in predictions.jsonl back into a picture; a grey square where the file has gone."""
    try:
        return data_url(Picture.parse(name))
    except DataError:
        return "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'%3E%3Crect width='9' height='9' fill='%23ccc'/%3E%3C/svg%3E"
