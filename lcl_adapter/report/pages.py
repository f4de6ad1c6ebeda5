"""``report.html``: the table, the plots, and the wrong answers of which the adapter was most confident."""

from __future__ import annotations

import base64
import math
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from lcl_adapter.data.sources import Picture
from lcl_adapter.evaluate.metrics import log_odds
from lcl_adapter.evaluate.runner import count_of
from lcl_adapter.files import read_lines, read_result, write_text
from lcl_adapter.report.table import retention_line, verdict_of
from lcl_adapter.report.thumbs import url_or_grey

MOST_SHOWN = 40  # wrong answers on a page


def write_report_page(run: Path) -> Path:
    """Write the page from ``report.json``, ``predictions.jsonl`` and the plots in a run's folder."""
    report = read_result(run / "report.json")
    predictions = read_predictions(run)
    plots = [(name, run / f"{name}.png") for name in ("accuracy", "roc")]
    shown = [(name, "data:image/png;base64," + base64.b64encode(p.read_bytes()).decode()) for name, p in plots if p.exists()]
    page = Environment(loader=PackageLoader("lcl_adapter.report", "."), autoescape=True).get_template("report.html")
    write_text(
        run / "report.html",
        page.render(
            title=f"{run.name}: base against adapter",
            plots=shown,
            rows=[{**row, "count": count_of(row)} for row in report["suites"]],
            confusions=[r for r in report["suites"] if "confusion" in r["adapter"]],
            inspections=[r for r in report["suites"] if "by_category" in r["adapter"]],
            retention=[(retention_line(row), verdict_of(row)) for row in report["retention"]],
            wrong=wrong_answers(predictions),
        ),
    )
    return run / "report.html"


def read_predictions(run: Path) -> list[dict[str, Any]]:
    return [value for _, value in read_lines(run / "predictions.jsonl")]


def wrong_answers(predictions: list[dict[str, Any]], count: int = MOST_SHOWN) -> list[dict[str, Any]]:
    """The wrong answers with the highest confidence, from the suites in turn.

    Controls, and labels without a support set, are left out.
    """
    by_suite: dict[str, list[tuple[float, str, dict[str, Any]]]] = {}  # log-odds, answer, prediction
    for line in predictions:
        wrong = None if line["control"] else _wrong_answer(line)
        if wrong is not None:
            by_suite.setdefault(line["suite"], []).append((*wrong, line))
    for answers in by_suite.values():
        answers.sort(key=lambda item: (-item[0], item[2]["cell"], item[2]["index"]))
    in_turn = [item for items in zip_longest(*by_suite.values()) for item in items if item is not None]
    return [_page_item(odds, answer, line) for odds, answer, line in in_turn[:count]]


def _wrong_answer(line: dict[str, Any]) -> tuple[float, str] | None:
    """The log-odds of a wrong answer (of its probability; minus infinity for free text), and the answer.

    None for a right one, and for labels without a support set.
    """
    scores = line["adapter"]["log_likelihoods"]
    if not scores:
        return None if line["right"] else (-math.inf, line["adapter"]["text"])
    answer = max(scores, key=scores.__getitem__)
    if answer == line["gold"] or not line["support"]:
        return None
    return log_odds(list(scores.values()), list(scores).index(answer)), answer


def _page_item(log_odds_given: float, answer: str, line: dict[str, Any]) -> dict[str, Any]:
    return {
        "cell": line["cell"],
        "index": line["index"],
        "class_name": line["class"] if line["support"] or line["labels"] else line["question"],
        "defect": line.get("defect"),
        "gold": line["gold"],
        "answer": answer,
        "confidence": f"({1 / (1 + math.exp(-log_odds_given)):.0%})" if log_odds_given > -math.inf else "",
        "query": _url(line["picture"]),
        "support": [{"url": _url(name), "label": label} for name, label in line["support"]],
    }


def _url(name: str) -> str:
    """A data URL for a picture's name in predictions.jsonl; a grey square if the file no longer exists."""
    return url_or_grey(Picture.parse(name))
