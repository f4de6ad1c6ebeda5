"""Cells -> report.json, predictions.jsonl. A killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from lcl_adapter.amounts import memory_bytes
from lcl_adapter.answering.predict import Predictor, Reply
from lcl_adapter.base.adapter import load_adapter, read_manifest
from lcl_adapter.base.model import Base
from lcl_adapter.base.ref import NOT_GIVEN, BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.conversations import Turn
from lcl_adapter.data.sources import Picture, read_image
from lcl_adapter.errors import DataError
from lcl_adapter.evaluate import baselines, judges
from lcl_adapter.evaluate.cases import Case, Cell
from lcl_adapter.evaluate.pair import ModelPair, ServedModels
from lcl_adapter.evaluate.suites import build_cells, check_measured
from lcl_adapter.files import write_json, write_text
from lcl_adapter.recipe import Recipe, load, presets
from lcl_adapter.terminal import console

CACHE = "evaluation"


def evaluate(
    run: Path,
    suites: tuple[str, ...] = (),
    limit: int | None = None,
    seed: int | None = None,
    base: BaseRef = NOT_GIVEN,
    fresh: bool = False,
    overrides: Sequence[str] = (),
    served: ServedModels | None = None,
) -> dict[str, Any]:
    """Measure a run's adapter and its base; writes ``report.json`` and ``predictions.jsonl``.

    The whole evaluation of the recipe goes into the run's folder; a part of it, or one with another seed, into
    ``partial/`` below it, so that it never takes the whole one's place. Cells that were measured before with the same
    adapter and the same questions are taken from ``evaluation/``. A suite that the recipe has not is taken from those
    that ship by name, over ``data.root``.

    served: ask models behind a server instead; the report goes into ``served/`` below the run. There is no tower then, so no baseline.

    Raises AdapterError, RecipeError, DataError; with ``served`` EndpointError, MissingError, RequestError.
    """
    loaded, manifest = (None, read_manifest(run)) if served else load_adapter(run, base)
    recipe = load(run / "recipe.yaml", overrides, resolved=True)
    added = [name for name in suites if name not in recipe.evaluate.suites and name in presets()]
    if added:
        recipe = load(run / "recipe.yaml", [*overrides, *(f"evaluate.suites.{name}={{preset: {name}}}" for name in added)], resolved=True)
    check_measured(recipe, manifest.get("held_in", {}), suites)
    torch.set_num_threads(recipe.train.threads or torch.get_num_threads())
    rows, lines = [], []
    with served.pair(run) if served else nullcontext(_here(loaded, recipe)) as pair:
        for cell in build_cells(recipe, limit, suites, seed):
            key = _key(cell, manifest, recipe, pair.told)
            kept = run / CACHE / f"{cell.name}-{key[:12]}.json"
            measured = None if fresh or served else _kept(kept, key)  # another model may be behind a server's name by now
            if measured is None:
                measured = {"key": key, **measure(cell, pair)}
                write_json(kept, measured)
            rows.append(measured["row"])
            lines += measured["predictions"]
            console.print(_line(measured["row"]), highlight=False, markup=False, soft_wrap=True)
        told = {"served": pair.told} if served else {}
    report = {
        "run": run.name,
        "base": manifest["base"],
        "seed": recipe.evaluate.seed if seed is None else seed,
        "limit": limit,
        **told,
        "suites": rows,
        "retention": retention_of([(r["suite"], r["base"]["value"], r["adapter"]["value"]) for r in rows], recipe),
    }
    out = run / "served" if served else report_folder(run, suites, limit, seed, overrides)
    report["folder"] = str(out)
    write_text(out / "predictions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_json(out / "report.json", report)
    return report


def _here(base: Base | None, recipe: Recipe) -> ModelPair:
    """On this machine."""
    assert base is not None
    return ModelPair.of(Predictor(base, VisionFeatures(base, memory_bytes(recipe.train.feature_cache)), recipe.evaluate.batch_size))


def report_folder(run: Path, suites: tuple[str, ...], limit: int | None, seed: int | None, overrides: Sequence[str] = ()) -> Path:
    return run / "partial" if suites or limit or seed is not None or overrides else run


def measure(cell: Cell, pair: ModelPair) -> dict[str, Any]:
    """One cell: the same requests to the base and to the adapter, and the baseline. Cases with a broken picture are left out, and counted.

    Raises DataError where none is left.
    """
    asked = len(cell.cases)
    cell, _ = readable(cell, pair.vision)
    cases = cell.cases
    requests = [(c.support, c.query, c.answers) for c in cases]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(cell.name, total=2 * len(requests))

        def done(count: int) -> None:
            bar.advance(task, count)

        of_base = pair.base(requests, done=done, new_tokens=cell.new_tokens)
        of_adapter = pair.adapter(requests, done=done, new_tokens=cell.new_tokens)
    baseline, nearest = baselines.measure(cell, pair.vision) if pair.vision else (None, [None] * len(cases))
    row = {
        **{k: getattr(cell, k) for k in ("suite", "name", "kind", "metric", "policy", "ways", "shots", "neighbours", "control")},
        "n": len(cases),
        "left_out": asked - len(cases),
        "chance": round(cell.chance, 4),
        "baseline": baseline,
        "published": [{"who": who, "value": value} for who, value in cell.published],
        "base": cell.judge(cases, of_base),
        "adapter": cell.judge(cases, of_adapter),
    }
    predictions = [_prediction(cell, index, case, of_base[index], of_adapter[index], nearest[index]) for index, case in enumerate(cases)]
    return {"row": row, "predictions": predictions}


def readable(cell: Cell, vision: VisionFeatures | None) -> tuple[Cell, list[str]]:
    """The cell without the cases whose pictures cannot be read, and why they cannot."""
    found: dict[Picture, str | None] = {}

    def fault(picture: Picture) -> str | None:
        if picture not in found:
            try:
                if vision is None or picture not in vision.cache:
                    read_image(picture)
                found[picture] = None
            except DataError as error:
                found[picture] = str(error)
        return found[picture]

    pictures = [[p for turn in (*c.support, c.query) for p in turn.pictures] for c in cell.cases]
    kept = tuple(c for c, shown in zip(cell.cases, pictures, strict=True) if not any(fault(p) for p in shown))
    broken = [why for why in found.values() if why]
    for why in broken:
        console.print(f"{cell.name}: left out: {why}", style="yellow", markup=False, highlight=False)
    if not kept:
        why = broken[0] if broken else "it is empty"
        raise DataError(f"evaluate.suites.{cell.suite}: no case of {cell.name} has pictures that can be read: {why}")
    return (cell if not broken else replace(cell, cases=kept)), broken


def measure_adapter(cells: Sequence[Cell], predictor: Predictor) -> dict[str, float]:
    """The main figure of each cell for the model as it stands, by the cell's name: what is watched while training."""
    found = {}
    for cell in cells:
        requests = [(c.support, c.query, c.answers) for c in cell.cases]
        found[cell.name] = cell.judge(cell.cases, predictor.run(requests, new_tokens=cell.new_tokens))["value"]
    return found


def measure_base(cells: Sequence[Cell], predictor: Predictor) -> dict[str, float]:
    """The same without the adapter."""
    with predictor.base.without_adapter():
        return measure_adapter(cells, predictor)


def retention_of(figures: Sequence[tuple[str, float, float]], recipe: Recipe) -> list[dict[str, Any]]:
    """For every suite under ``keep``: how far the adapter fell below the base, in points, and whether that is allowed.

    ``figures`` are (suite, base, adapter) of each cell; a suite of several cells is judged by their mean.
    """
    found = []
    for suite, allowed in recipe.evaluate.keep.items():
        own = [(base, adapter) for name, base, adapter in figures if name == suite]
        if own:
            fell = 100 * sum(base - adapter for base, adapter in own) / len(own)
            found.append({"suite": suite, "fell": round(fell, 2), "allowed": allowed, "kept": fell <= allowed})
    return found


def _prediction(cell: Cell, index: int, case: Case, base: Reply, adapter: Reply, nearest: bool | None) -> dict[str, Any]:
    def told(reply: Reply) -> dict[str, Any]:
        scores = {label: round(value, 5) for label, value in zip(case.labels, reply.log_likelihoods, strict=True)}
        return {"text": reply.text, "log_likelihoods": scores}

    truth = case.truth if isinstance(case.truth, dict) else {}
    return {
        "suite": cell.suite,
        "cell": cell.name,
        "kind": cell.kind,
        "control": cell.control,
        "index": index,
        "question": case.query.text,
        "picture": str(case.query.picture),
        "support": [[str(e.picture), e.label] for e in case.episode.support] if case.episode else [],
        "class": case.group,
        "labels": list(case.labels),
        "gold": case.gold,
        **({"defect": truth["defect"]} if "defect" in truth else {}),
        "base": told(base),
        "adapter": told(adapter),
        "right": bool(cell.judge([case], [adapter])["value"] >= 0.3) if not case.labels else judges.answer_of(case, adapter) == case.gold,
        "prototype_right": nearest,
    }


def _key(cell: Cell, manifest: dict[str, Any], recipe: Recipe, who: Any) -> str:
    """What a kept cell's figures depend on."""

    def told(turn: Turn) -> str:
        sizes = [f"{p} {p.path.stat().st_size if p.path.exists() else 0}" for p in turn.pictures]
        return f"{turn.text} {' '.join(sizes)}"

    spoken = [[c.labels, c.gold, str(c.truth), told(c.query), [told(t) for t in c.support]] for c in cell.cases]
    facts = json.dumps([manifest["files"], manifest["base_hash"], recipe.wording, cell.control, cell.metric, cell.new_tokens, spoken, who])
    return hashlib.sha256(facts.encode()).hexdigest()


def _kept(path: Path, key: str) -> dict[str, Any] | None:
    try:
        measured: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return measured if measured.get("key") == key else None


def _line(row: dict[str, Any]) -> str:
    own = row["adapter"]
    parts = [f"{row['name']:<26} n {row['n']:>5}", f"{row['metric']}", f"chance {row['chance']:.2f}"]
    parts += [f"{row['baseline']['name']} {row['baseline']['value']:.3f}"] if row["baseline"] else []
    parts += [f"base {row['base']['value']:.3f}", f"adapter {own['value']:.3f} [{own['ci95'][0]:.3f}, {own['ci95'][1]:.3f}]"]
    parts += [f"text {own['greedy']:.3f}"] if own["greedy"] is not None else []
    figures = ", ".join(f"{p['who']} {p['value']:.2f}" for p in row["published"])
    parts += [f"published: {figures}"] if figures else []
    return "  ".join(parts)
