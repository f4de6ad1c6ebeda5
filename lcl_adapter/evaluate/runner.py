"""Cells -> report.json, predictions.jsonl, plots and the page of wrong answers. A killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from lcl_adapter.adapter import load_adapter
from lcl_adapter.conversations import Turn
from lcl_adapter.evaluate import metrics
from lcl_adapter.evaluate.prototype import nearest_prototype
from lcl_adapter.evaluate.suites import Case, Cell, build_cells
from lcl_adapter.files import write_json, write_text
from lcl_adapter.predict import Predictor, Reply
from lcl_adapter.recipe import Recipe, load
from lcl_adapter.terminal import console
from lcl_adapter.vision import VisionFeatures, memory_bytes

CACHE = "evaluation"


def evaluate(
    run: Path,
    suites: tuple[str, ...] = (),
    limit: int | None = None,
    seed: int | None = None,
    base_name: str | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Measure a run's adapter and its base; writes ``report.json`` and ``predictions.jsonl``.

    The whole evaluation of the recipe goes into the run's folder; a part of it, or one with another seed, into
    ``partial/`` below it, so that it never takes the whole one's place. Cells that were measured before with the same
    adapter and the same questions are taken from ``evaluation/``.

    Raises AdapterError, RecipeError, DataError.
    """
    base, manifest = load_adapter(run, base_name)
    recipe = load(run / "recipe.yaml")
    torch.set_num_threads(recipe.train.threads or torch.get_num_threads())
    vision = VisionFeatures(base, memory_bytes(recipe.train.feature_cache))
    predictor = Predictor(base, vision, recipe.evaluate.batch_size)
    rows, lines = [], []
    for cell in build_cells(recipe, limit, suites, seed):
        key = _key(cell, manifest, recipe)
        kept = run / CACHE / f"{cell.name}-{key[:12]}.json"
        measured = None if fresh else _kept(kept, key)
        if measured is None:
            measured = {"key": key, **measure(cell, predictor)}
            write_json(kept, measured)
        rows.append(measured["row"])
        lines += measured["predictions"]
        console.print(_line(measured["row"]), highlight=False, markup=False, soft_wrap=True)
    report = {
        "run": run.name,
        "base": manifest["base"],
        "seed": recipe.evaluate.seed if seed is None else seed,
        "limit": limit,
        "suites": rows,
        "retention": retention(rows, recipe),
    }
    out = report_folder(run, suites, limit, seed)
    report["folder"] = str(out)
    write_text(out / "predictions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_json(out / "report.json", report)
    return report


def report_folder(run: Path, suites: tuple[str, ...], limit: int | None, seed: int | None) -> Path:
    return run / "partial" if suites or limit or seed is not None else run


def measure(cell: Cell, predictor: Predictor) -> dict[str, Any]:
    """One cell: the same requests to the base and to the adapter, and the prototypes."""
    cases = cell.cases
    requests = [(c.support, c.query, c.answers) for c in cases]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(cell.name, total=2 * len(requests))

        def done(count: int) -> None:
            bar.advance(task, count)

        with predictor.base.without_adapter():
            of_base = predictor.run(requests, done=done)
        of_adapter = predictor.run(requests, done=done)
    nearest = nearest_prototype(cases, predictor.vision) if cell.kind != "vqa" else [None] * len(cases)
    known = [n for n in nearest if n is not None]
    row = {
        **{k: getattr(cell, k) for k in ("suite", "name", "kind", "policy", "ways", "shots", "neighbours", "control")},
        "n": len(cases),
        "chance": round(cell.chance, 4),
        "prototype": {"accuracy": _mean(known) if known else None},
        "base": judge(cases, of_base),
        "adapter": judge(cases, of_adapter),
    }
    predictions = [_prediction(cell, index, case, of_base[index], of_adapter[index], nearest[index]) for index, case in enumerate(cases)]
    return {"row": row, "predictions": predictions}


def judge(cases: Sequence[Case], replies: Sequence[Reply]) -> dict[str, Any]:
    """Accuracy (of scored labels where there are labels, else of exact text), its interval, and what the text says."""
    texts = [metrics.exact(r.text, _worded(c)) for c, r in zip(cases, replies, strict=True)]
    if not cases[0].labels:
        right, rule = texts, None
    else:
        right = [c.labels[r.best] == c.gold for c, r in zip(cases, replies, strict=True)]
        rule = _mean([metrics.lcl_rule(r.text, c.gold, [x for x in c.labels if x != c.gold]) for c, r in zip(cases, replies, strict=True)])
    low, high = metrics.class_bootstrap(right, [c.group for c in cases])
    return {"accuracy": _mean(right), "ci95": [round(low, 4), round(high, 4)], "greedy": _mean(texts), "lcl_rule": rule}


def retention(rows: Sequence[dict[str, Any]], recipe: Recipe) -> list[dict[str, Any]]:
    """For every suite under ``keep``: how far the adapter fell below the base, in points, and whether that is allowed."""
    found = []
    for row in rows:
        if row["kind"] == "vqa" and row["suite"] in recipe.evaluate.keep:
            fell = 100 * (row["base"]["accuracy"] - row["adapter"]["accuracy"])
            allowed = recipe.evaluate.keep[row["suite"]]
            found.append({"suite": row["suite"], "fell": round(fell, 2), "allowed": allowed, "kept": fell <= allowed})
    return found


def _worded(case: Case) -> str:
    return case.answers[case.labels.index(case.gold)] if case.labels else case.gold


def _mean(values: Sequence[bool]) -> float:
    return round(sum(values) / len(values), 4)


def _prediction(cell: Cell, index: int, case: Case, base: Reply, adapter: Reply, nearest: bool | None) -> dict[str, Any]:
    def told(reply: Reply) -> dict[str, Any]:
        scores = {label: round(value, 5) for label, value in zip(case.labels, reply.log_likelihoods, strict=True)}
        return {"text": reply.text, "log_likelihoods": scores}

    return {
        "suite": cell.suite,
        "cell": cell.name,
        "index": index,
        "question": case.query.text,
        "picture": str(case.query.picture),
        "support": [[str(e.picture), e.label] for e in case.episode.support] if case.episode else [],
        "class": case.group,
        "labels": list(case.labels),
        "gold": case.gold,
        "base": told(base),
        "adapter": told(adapter),
        "prototype_right": nearest,
    }


def _key(cell: Cell, manifest: dict[str, Any], recipe: Recipe) -> str:
    """What a kept cell's figures depend on."""

    def told(turn: Turn) -> str:
        size = turn.picture.path.stat().st_size if turn.picture and turn.picture.path.exists() else 0
        return f"{turn.text} {turn.picture} {size}"

    spoken = [[c.labels, c.gold, told(c.query), [told(t) for t in c.support]] for c in cell.cases]
    facts = json.dumps([manifest["files"], manifest["base_fingerprint"], recipe.wording, cell.control, spoken])
    return hashlib.sha256(facts.encode()).hexdigest()


def _kept(path: Path, key: str) -> dict[str, Any] | None:
    try:
        measured: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return measured if measured.get("key") == key else None


def _line(row: dict[str, Any]) -> str:
    nearest, own = row["prototype"]["accuracy"], row["adapter"]
    parts = [f"{row['name']:<26} n {row['n']:>5}", f"chance {row['chance']:.2f}"]
    parts += [f"prototype {nearest:.3f}"] if nearest is not None else []
    parts += [f"base {row['base']['accuracy']:.3f}", f"adapter {own['accuracy']:.3f} [{own['ci95'][0]:.3f}, {own['ci95'][1]:.3f}]"]
    return "  ".join([*parts, f"text {own['greedy']:.3f}"])
