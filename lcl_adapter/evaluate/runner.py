"""Cells -> report.json and predictions.jsonl. An interrupted evaluation continues from its cached cells."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from lcl_adapter.amounts import memory_bytes
from lcl_adapter.answering.judgement import read_weighing
from lcl_adapter.answering.predict import Predictor, Reply
from lcl_adapter.base.adapter import load_adapter, read_manifest
from lcl_adapter.base.model import Base
from lcl_adapter.base.ref import NOT_GIVEN, BaseRef
from lcl_adapter.base.supports import asked_otherwise
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.sources import Picture, fault_of
from lcl_adapter.errors import DataError
from lcl_adapter.evaluate import baselines, judges
from lcl_adapter.evaluate.caching import cache_key, read_cached
from lcl_adapter.evaluate.cases import Case, Cell, Judged
from lcl_adapter.evaluate.metrics import Estimate, calibration_error
from lcl_adapter.evaluate.pair import ModelPair, ServedModels
from lcl_adapter.evaluate.retention import retention_of
from lcl_adapter.evaluate.suites import build_cells, check_measured, perplexity, suite_tokens, validation_cells
from lcl_adapter.evaluate.trained import trained_features
from lcl_adapter.evaluate.weighing import evidence_of, weigh
from lcl_adapter.files import write_json, write_text
from lcl_adapter.recipe import Recipe, load, presets
from lcl_adapter.terminal import console, show_notes

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

    The complete evaluation of the recipe is written into the run's folder. A part of it, or one with another seed, goes
    to ``partial/`` in that folder, so that it never replaces the complete one. Cells that were measured before, with the
    same adapter, questions, code and libraries, are read from ``evaluation/``. A suite that the recipe does not have is looked up
    among the shipped ones, and reads its data under ``data.root``.

    Where the recipe has suites under ``evaluate.validation``, the weights of model and tower in a judgement are fitted on them first,
    unless they were before.

    fresh: measure again instead of reading cached cells, and fit the weights again. served: ask models behind a server instead. The report then goes
    to ``served/`` in the run's folder, and has no baselines, because there is no vision tower.

    Raises AdapterError, RecipeError, DataError; with ``served`` EndpointError, MissingError, RequestError.
    """
    manifest = read_manifest(run)
    recipe = load(run / "recipe.yaml", overrides, resolved=True)
    # The recipe as it is overridden; an imported run has no such value of its own
    own = {
        "support_tokens": recipe.image_tokens.most, "supports": recipe.supports, "orientations": recipe.orientations, "readings": recipe.readings,
    }  # fmt: skip
    loaded = None if served else load_adapter(run, base.defaulting_to(**own))[0]
    if loaded is not None:
        show_notes(asked_otherwise(manifest, loaded))
        for tokens in suite_tokens(recipe):  # each must be possible, before anything is measured
            loaded.with_supports(tokens, loaded.supports, loaded.shots)
    added = [name for name in suites if name not in recipe.evaluate.suites and name in presets()]
    if added:
        recipe = load(run / "recipe.yaml", [*overrides, *(f"evaluate.suites.{name}={{preset: {name}}}" for name in added)], resolved=True)
    check_measured(recipe, manifest.get("held_in", {}), suites)
    torch.set_num_threads(recipe.train.threads or torch.get_num_threads())
    rows, lines, falls = [], [], []
    with served.connect(run) if served else nullcontext(_local_pair(loaded, recipe, run, manifest, fresh)) as pair:
        for cell in build_cells(recipe, limit, suites, seed, added=added):
            if served and cell.kind == perplexity.KIND:
                console.print(f"{cell.name}: left out, because a server gives no likelihood of a text", style="yellow", markup=False, highlight=False)
                continue
            key = cache_key(cell, manifest, recipe, pair.identity)
            cached = run / CACHE / f"{cell.name}-{key[:12]}.json"
            # The name of a served model may stand for another model by now.
            measured = None if fresh or served else read_cached(cached, key)
            if measured is None:
                measured = {"key": key, **measure_cell(cell, pair)}
                write_json(cached, measured)
            rows.append(measured["row"])
            lines += measured["predictions"]
            falls.append((cell.suite, measured["row"]["n"], Estimate.from_json(measured["fall"])))
            console.print(_summary_line(measured["row"]), highlight=False, markup=False, soft_wrap=True)
        served_models = {"served": pair.identity, "notes": list(pair.notes)} if served else {}
    report = {
        "run": run.name,
        "base": manifest["base"],
        "seed": recipe.evaluate.seed if seed is None else seed,
        "limit": limit,
        **served_models,
        **({"support_tokens": loaded.support_tokens} if loaded is not None and loaded.support_tokens else {}),
        **({"supports": loaded.supports} if loaded is not None and loaded.supports != "ordered" else {}),
        **({"orientations": loaded.orientations} if loaded is not None and loaded.orientations > 1 else {}),
        **({"readings": loaded.readings} if loaded is not None and loaded.readings > 1 else {}),
        "suites": rows,
        "retention": retention_of(falls, recipe),
    }
    out = run / "served" if served else report_folder(run, suites, limit, seed, overrides)
    report["folder"] = str(out)
    write_text(out / "predictions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_json(out / "report.json", report)
    return report


def _local_pair(base: Base | None, recipe: Recipe, run: Path, manifest: Mapping[str, Any], fresh: bool = False) -> ModelPair:
    assert base is not None
    predictor = Predictor(base, VisionFeatures(base, memory_bytes(recipe.train.feature_cache)), recipe.evaluate.batch_size)
    weighed = read_weighing(run, manifest)
    if recipe.evaluate.validation and (weighed is None or fresh):
        cells = [drop_unreadable(cell, predictor.vision, "validation")[0] for cell in validation_cells(recipe)]
        weighed = weigh(run, cells, predictor, trained_features(recipe, predictor.vision))
    return ModelPair.local(predictor, weighed)


def weigh_run(run: Path) -> None:
    """Fit the weights of a run's judgements, where its recipe has suites under ``evaluate.validation``."""
    loaded, manifest = load_adapter(run)
    _local_pair(loaded, load(run / "recipe.yaml", resolved=True), run, manifest)


def report_folder(run: Path, suites: tuple[str, ...], limit: int | None, seed: int | None, overrides: Sequence[str] = ()) -> Path:
    """The run's folder for a complete evaluation, ``partial/`` in it for any other."""
    return run / "partial" if suites or limit or seed is not None or overrides else run


def measure_cell(cell: Cell, pair: ModelPair) -> dict[str, Any]:
    """Send a cell's requests to the base and to the adapter, and compute its baseline.

    Returns its row, its predictions, and its fall: the estimate of base minus adapter, as JSON.

    Cases with a broken picture are left out, and counted. Raises DataError if no case remains.
    """
    total = len(cell.cases) + len(cell.faults)
    cell, _ = drop_unreadable(cell, pair.vision)
    cases = cell.cases
    requests = [(c.support, c.query, c.answers) for c in cases]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(cell.name, total=2 * len(requests))

        def done(count: int) -> None:
            bar.advance(task, count)

        base_replies = pair.base(requests, done=done, new_tokens=cell.new_tokens)
        adapter_replies = pair.adapter(requests, done=done, new_tokens=cell.new_tokens)
    base, adapter = cell.judge(cases, base_replies), cell.judge(cases, adapter_replies)
    judged = _judged(cell, adapter_replies, pair)
    fall, gain = base.estimate.minus(adapter.estimate), adapter.estimate.minus(base.estimate)
    baseline, nearest = baselines.measure_baseline(cell, pair.vision) if pair.vision else (None, [None] * len(cases))
    row = {
        **{k: getattr(cell, k) for k in ("suite", "name", "kind", "metric", "policy", "ways", "shots", "neighbours", "control")},
        "n": len(cases),
        "left_out": total - len(cases),
        "chance": None if cell.chance is None else round(cell.chance, 4),
        "baseline": baseline,
        "published": [{"who": who, "value": value} for who, value in cell.published],
        "base": base.figures,
        "adapter": adapter.figures,
        "difference": _difference(gain),
        **_figures_of_judges(adapter, judged, cases),
    }
    compared = zip(cases, base_replies, adapter_replies, nearest, strict=True)
    predictions = [_prediction(cell, index, *replies) for index, replies in enumerate(compared)]
    for name, (replies, _) in judged.items():
        for line, case, reply in zip(predictions, cases, replies, strict=True):
            line[name] = dict(zip(case.labels, (round(value, 5) for value in reply.log_likelihoods), strict=True))
    return {"row": row, "predictions": predictions, "fall": fall.to_json()}


def _judged(cell: Cell, replies: Sequence[Reply], pair: ModelPair) -> dict[str, tuple[list[Reply], Judged]]:
    """Replies and figures of the tower alone, and of model and tower; empty where the cell's questions have no weights."""
    if pair.weighing is None or pair.tower is None or not cell.cases[0].labels:
        return {}
    evidence = evidence_of(cell.cases, pair.tower)
    judged = {}
    for name in ("tower", "both"):
        scores = [pair.weighing.scores(reply.log_likelihoods, own, name) for reply, own in zip(replies, evidence, strict=True)]
        if any(score is None for score in scores):
            return {}
        scored = [replace(reply, log_likelihoods=score) for reply, score in zip(replies, scores, strict=True) if score is not None]
        judged[name] = (scored, cell.judge(cell.cases, scored))
    return judged


def _figures_of_judges(model: Judged, judged: Mapping[str, tuple[list[Reply], Judged]], cases: Sequence[Case]) -> dict[str, Any]:
    """A row's figures of ``judge: tower`` and ``judge: both``, and how far ``both`` is from the better of model and tower."""
    if not judged:
        return {}
    tower, (replies, both) = judged["tower"][1], judged["both"]
    better = max(("model", model), ("tower", tower), key=lambda one: one[1].estimate.value)
    gain = both.estimate.minus(better[1].estimate)
    right = [judges.answer_of(case, reply) == case.gold for case, reply in zip(cases, replies, strict=True)]
    error = calibration_error([max(reply.probabilities) for reply in replies], right)
    return {
        "tower": tower.figures,
        "both": {**both.figures, "calibration_error": round(error, 4), "against": better[0], "gain": _difference(gain)},
    }


def _difference(gain: Estimate) -> dict[str, Any]:
    """Adapter minus base; of a perplexity, the relative change, which is above 0 where the adapter is worse."""
    low, high = gain.interval(-1.0, 1.0)
    if gain.unit == "share":
        return {"value": round(gain.value, 4), "ci95": [round(low, 4), round(high, 4)]}
    return {"value": round(math.expm1(-gain.value), 4), "ci95": [round(math.expm1(-high), 4), round(math.expm1(-low), 4)], "relative": True}


def drop_unreadable(cell: Cell, vision: VisionFeatures | None, part: str = "suites") -> tuple[Cell, list[str]]:
    """The cell without the cases whose pictures cannot be read, and the messages about those pictures.

    Prints what is left out, records without a case included. part: of the recipe's ``evaluate``, where the cell comes from.

    Raises DataError if no case remains.
    """
    messages: dict[Picture, str | None] = {}

    def is_broken(picture: Picture) -> bool:
        if picture not in messages:
            messages[picture] = None if vision is not None and picture in vision.cache else fault_of(picture)
        return messages[picture] is not None

    readable = tuple(case for case in cell.cases if not any(is_broken(p) for turn in (*case.support, case.query) for p in turn.pictures))
    broken = [message for message in messages.values() if message]
    for message in (*cell.faults, *broken):
        console.print(f"{cell.name}: left out: {message}", style="yellow", markup=False, highlight=False)
    if not readable:
        reason = broken[0] if broken else "it is empty"
        raise DataError(f"evaluate.{part}.{cell.suite}: no case of {cell.name} has pictures that can be read: {reason}")
    return (cell if not broken else replace(cell, cases=readable)), broken


def measure_adapter(cells: Sequence[Cell], predictor: Predictor) -> dict[str, Estimate]:
    """The main figure of each cell for the model in its present state, by the cell's name. Used during training."""
    figures = {}
    for cell in cells:
        requests = [(c.support, c.query, c.answers) for c in cell.cases]
        figures[cell.name] = cell.judge(cell.cases, predictor.run(requests, new_tokens=cell.new_tokens)).estimate
    return figures


def measure_base(cells: Sequence[Cell], predictor: Predictor) -> dict[str, Estimate]:
    """The main figure of each cell without the adapter."""
    with predictor.base.without_adapter():
        return measure_adapter(cells, predictor)


def _prediction(cell: Cell, index: int, case: Case, base: Reply, adapter: Reply, nearest: bool | None) -> dict[str, Any]:
    def as_json(reply: Reply) -> dict[str, Any]:
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
        "base": as_json(base),
        "adapter": as_json(adapter),
        "right": _is_right(cell, case, adapter),
        "prototype_right": nearest,
    }


def _is_right(cell: Cell, case: Case, reply: Reply) -> bool | None:
    """Whether the label with the highest score is right. None for a perplexity, which is of no answer.

    Free text is right from a score of 0.3 on, one match of VQAv2's ten answers.
    """
    if cell.kind == perplexity.KIND:
        return None
    if case.labels:
        return judges.answer_of(case, reply) == case.gold
    return bool(cell.judge([case], [reply]).estimate.value >= 0.3)


def count_of(row: Mapping[str, Any]) -> str:
    """How many cases a row of the report has, and how many were left out."""
    return f"{row['n']} ({row['left_out']} left out)" if row.get("left_out") else str(row["n"])


def _summary_line(row: dict[str, Any]) -> str:
    own = row["adapter"]
    parts = [f"{row['name']:<26} n {count_of(row):>5}", f"{row['metric']}"]
    parts += [f"chance {row['chance']:.2f}"] if row["chance"] is not None else []
    parts += [f"{row['baseline']['name']} {row['baseline']['value']:.3f}"] if row["baseline"] else []
    parts += [f"base {row['base']['value']:.3f}", f"adapter {own['value']:.3f} [{own['ci95'][0]:.3f}, {own['ci95'][1]:.3f}]"]
    parts += [f"tower {row['tower']['value']:.3f}", f"both {row['both']['value']:.3f}"] if "both" in row else []
    parts += [f"text {own['greedy']:.3f}"] if own["greedy"] is not None else []
    figures = ", ".join(f"{p['who']} {p['value']:.2f}" for p in row["published"])
    parts += [f"published: {figures}"] if figures else []
    return "  ".join(parts)
